// Products of one token with codes as they are: scales are applied to sums.
//
// A product of tensor cores has 8 columns, of which one token would use one. Here column n has the
// token's inputs in its own 32 of the 256 columns of a *quad*, and zeros in the others: so it adds
// up these 32 columns alone, and a scale is applied to a sum and not to its weights. A code is the
// subnormal fp16 number with its bits, wherever in its half of a word it lies: one instruction for
// two weights. Products whose codes lie at different places go to different sums, joined by powers
// of two; so are planes.
//
//   weight = d * s * code - m * z  of a row and a sub-group, so that
//   sum of weight * x = sum over n of d * s[n] * (sum of code * x) - 32 m * z[n] * (mean of x)
//
// Lane (g, q) = (lane / 4, lane % 4) takes the codes of rows 2g, 2g + 1 in 32 columns: quarter q /
// 2, its first half or second, then the same of quarter q / 2 + 2. Sums of row 2g in columns n =
// 2q, 2q + 1 are its own, and those of row 2g + 1.
//
// A quad in shared memory:
//
//   4 words: of each quarter its first column / 64 and, above that, its width
//   8 scale records: sub-groups of 32 columns; larger ones are found twice
//   for each bit of the codes a row of 128 bytes of each quarter, plane after plane
#pragma once

#include "packed.cuh"

constexpr u32 QUARTERS = 4;
constexpr u32 QUARTER_COLS = 64;
constexpr u32 RUN_COLS = 32;  // that a column of the product adds up
constexpr u32 QUAD_RECORDS_AT = QUARTERS * u32(sizeof(u32));
constexpr u32 QUAD_ROWS_AT = QUAD_RECORDS_AT + QUARTERS * (QUARTER_COLS / RUN_COLS) * TILE_ROWS;
constexpr u32 ROW_BYTES = QUARTER_COLS * TILE_ROWS / 8;

// Lanes that read at a time find their words in all 32 banks: they have q = 0 .. 3, two quarters
// and the first or the second half of their columns. So in every other quarter two chunks of 16
// bytes change places with the next two; of a plane, rows of the first half and of the second take
// turns; and these are half a row further in the banks.
constexpr u32 ROW_STEP = QUARTERS * ROW_BYTES + ROW_BYTES / 2;
__device__ inline u32 row_chunk(u32 chunk, u32 quarter) { return chunk ^ quarter % 2 * 2; }
__device__ constexpr u32 place_of_row(u32 row, u32 bits) { return bits == 1 ? 0 : row % (bits / 2) * 2 + row / (bits / 2); }

// ---- inputs ----

// The token's inputs in shared memory, and of each 32 their mean.
struct RawInputs {
    u8* values;  // fp16 [cols + 64], operand order, the last 64 zero
    u32* means;  // of a quarter, an fp16 pair: [cols / 64 + 1], the last 0

    __device__ RawInputs(u8* shared, u32 cols) : values(shared), means(reinterpret_cast<u32*>(shared + 2 * (cols + QUARTER_COLS))) {}

    // A multiple of 16.
    __device__ static u32 bytes(u32 cols) { return 2 * (cols + QUARTER_COLS) + (cols / QUARTER_COLS / 4 + 1) * 16; }

    // By the whole block; a barrier must follow.
    __device__ void stage(const u16* x, u32 cols) const {
        const u32 lane = threadIdx.x % WARP, cols_of_warp = WARP * 8;
        for (u32 first = threadIdx.x / WARP * cols_of_warp; first < cols + QUARTER_COLS; first += blockDim.x / WARP * cols_of_warp) {
            const u32 col = first + 8 * lane;
            Vector16 inputs = {};
            if (col < cols) inputs = load16(x + col);
            if (col < cols + QUARTER_COLS) *reinterpret_cast<Vector16*>(values + 2 * col) = inputs;
            // The lanes 4n .. 4n + 3 have 32 columns, which are column n of two products with 1 /
            // 32.
            constexpr u32 PART = 0x28002800;
            float mean[4] = {};
            mma_16x8x16(mean, PART, PART, PART, PART, inputs.word[0], inputs.word[1]);
            mma_16x8x16(mean, PART, PART, PART, PART, inputs.word[2], inputs.word[3]);
            const u32 quarter = first / QUARTER_COLS + lane;
            if (lane < cols_of_warp / QUARTER_COLS && quarter <= cols / QUARTER_COLS) means[quarter] = half2_from_small_floats(mean[0], mean[1]);
        }
    }
};

// ---- a quad ----

// What a lane's sums are of a tile, for its two rows, with codes and minimum codes as subnormal
// fp16 numbers. A scale code is put in the place of bits of 1/2, which makes 1/2 + s / 256.
struct RawSums {
    float scaled[2];  // sum of (1/2 + s / 256) * (sum of code * x)
    float plain[2];   // sum of (sum of code * x)
    float offset[4];  // in [0] and [2]: sum of 16 z * mean

    // Those of row 2g + r, for all columns, as a product with weights of `packed.cuh` has them.
    __device__ float of_row(u32 r, const RowScales& rows) const {
        const float d = half_to_float(u16(rows.d[r])), m = half_to_float(u16(rows.m[r]));
        float sum = (scaled[r] - 0.5f * plain[r]) * (d * 16.0f) + offset[2 * r] * (m * 2097152.0f);
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
    }
};

// Where in the halves of a word product h finds its codes, bits. In a plane of 1 bit the upper half
// of each byte comes down first.
template <int BITS>
__device__ constexpr int shift_of(int h) {
    return BITS * h % (BITS == 1 ? 4 : 8);
}

// The weight of a plane's codes is 2^BITS_BEFORE.
template <int WIDTH, int BITS>
constexpr int BITS_BEFORE = WIDTH & ~(2 * BITS - 1);

// The products of a quad whose codes count 2^(p - LOWEST) have the sum number p. Which there are:
constexpr int LOWEST = 6, POWERS = LOWEST + 7;
template <int WIDTH, int BITS>
__device__ constexpr bool has_power(int power) {
    for (int h = 0; h < 8; ++h)
        if (WIDTH & BITS && BITS_BEFORE<WIDTH, BITS> - shift_of<BITS>(h) == power - LOWEST) return true;
    return false;
}
template <int WIDTH>
__device__ constexpr bool has_power(int power) {
    return has_power<WIDTH, 8>(power) || has_power<WIDTH, 4>(power) || has_power<WIDTH, 2>(power) || has_power<WIDTH, 1>(power);
}

// c += the codes of 32 columns of a plane times inputs. `rows`: where the lane has its rows of the
// plane's first block of them.
template <int WIDTH, int BITS>
__device__ inline void multiply_plane(float (&c)[POWERS][4], const u8* rows, const Vector16 (&x)[4]) {
    u32 words[BITS][2];
#pragma unroll
    for (u32 i = 0; i < BITS; ++i) load_pair(words[i], rows + ROW_STEP * place_of_row(i / 2, BITS) + BLOCK_BYTES * (i % 2));
#pragma unroll
    for (u32 h = 0; h < 8; ++h) {
        const u32 word = h * BITS / 8, down = BITS == 1 ? h / 4 * 4 : 0;
        const u32 mask = 0x00010001u * ((1u << BITS) - 1) << shift_of<BITS>(h);
        u32 a[4];
#pragma unroll
        for (u32 k = 0; k < 4; ++k) a[k] = words[word][k % 2] >> (8 * (k / 2) + down) & mask;
        mma_16x8x16(c[LOWEST + BITS_BEFORE<WIDTH, BITS> - shift_of<BITS>(h)], a[0], a[1], a[2], a[3], x[h / 2].word[h % 2 * 2], x[h / 2].word[h % 2 * 2 + 1]);
    }
}

// What a lane takes of every quad.
struct RawLane {
    // Where it is in shared memory for a quarter: at + col64 * step.
    struct Where {
        const u8* at;
        u32 step;

        __device__ const u8* operator()(u32 col64) const { return at + col64 * step; }
    };

    // In a quad: a record; rows 2g, 2g + 1 in the first of its columns, in a plane of 1 bit and
    // others.
    u32 record, single, codes;
    // Inputs of its two quarters, a pair of means; most lanes have zeros for them.
    Where x[2], means;

    __device__ RawLane(const RawInputs& inputs, u32 cols, u32 sub_group_log2) {
        const u32 lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4, n = lane % 8;
        // The lanes 0 .. 7 name what the columns of the product take.
        record = QUAD_RECORDS_AT + (n / 2 * (QUARTER_COLS / RUN_COLS) + ((n % 2 * RUN_COLS) >> sub_group_log2)) * TILE_ROWS;
        const u32 quarter = q / 2, half = q % 2;
        single = QUAD_ROWS_AT + quarter * ROW_BYTES + 16 * row_chunk(g / 2, quarter) + g % 2 * 8;
        codes = single + half * ROW_STEP;
        single += half * BLOCK_BYTES;
        // Not from the first zero on: these are in other banks than what the other lanes read.
        const Where zeros = {inputs.values + 2 * cols + 32, 0};
        const Where values = {inputs.values + 2 * RUN_COLS * half, 2 * QUARTER_COLS};
        x[0] = g == q ? values : zeros;
        x[1] = g == q + 4 ? values : zeros;
        means = q == lane / 8 ? Where{reinterpret_cast<const u8*>(inputs.means), u32(sizeof(u32))} : zeros;
    }
};

// c += a plane of a quad, if codes of WIDTH bits have it.
template <int WIDTH, int BITS>
__device__ inline void multiply_planes(float (&c)[POWERS][4], const RawLane& lane, const u8* quad, const Vector16 (&x)[2][4]) {
    if (!(WIDTH & BITS)) return;
    const u8* const rows = quad + (BITS == 1 ? lane.single : lane.codes) + ROW_STEP * BITS_BEFORE<WIDTH, BITS>;
    multiply_plane<WIDTH, BITS>(c, rows, x[0]);
    multiply_plane<WIDTH, BITS>(c, rows + 2 * ROW_BYTES, x[1]);
}

// sums += a quad of the tile times the token; `col64`: of the quarter that lanes 8i .. 8i + 7 copy.
template <int WIDTH>
__device__ inline void multiply_quad(RawSums& sums, const RawLane& lane, const u8* quad, u32 col64) {
    Vector16 x[2][4];
#pragma unroll
    for (u32 i = 0; i < 8; ++i) x[i / 4][i % 4] = load16(lane.x[i / 4](col64) + i % 4 * 16);
    float c[POWERS][4] = {};
    multiply_planes<WIDTH, 8>(c, lane, quad, x);
    multiply_planes<WIDTH, 4>(c, lane, quad, x);
    multiply_planes<WIDTH, 2>(c, lane, quad, x);
    multiply_planes<WIDTH, 1>(c, lane, quad, x);
    // The first plane has codes at the lowest place: power 0 is always there.
    float sum[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) sum[i] = c[LOWEST][i];
#pragma unroll
    for (int power = 0; power < POWERS; ++power) {
        if (power == LOWEST || !has_power<WIDTH>(power)) continue;
        const float weight = float(1 << power) / float(1 << LOWEST);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) sum[i] += c[power][i] * weight;
    }

    // Bytes 2j + r: sub-group 2q + j, row 2g + r; s below z.
    const u32 records = load_matrix_transposed(quad + lane.record);
    const u32 scales = records & 0x0f0f0f0f;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 r = i / 2, j = i % 2;
        sums.scaled[r] += sum[i] * float_from_bits(permute_bytes(scales, 0x3f000000, 0x7044 | (2 * j + r) << 8));
        sums.plain[r] += sum[i];
    }
    const u32 means = *reinterpret_cast<const u32*>(lane.means(col64));
    mma_16x8x8(sums.offset, records & 0x00f000f0, records >> 8 & 0x00f000f0, means);
}
