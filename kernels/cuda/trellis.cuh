// The codes of a trellis (docs/format.md, section 5), and how a warp turns them into operands of a
// matrix product.
//
// A row's value is what two tables say to the halves of its *window*: 8 bits, from its own code on
// those of the places behind it in the ring of a strip. Behind row r of the first tile stands row r
// of the second; behind that one a row of the first again, whose bits in reverse order are those of
// r, reversed, and 1. Lane (g, q) = (lane / 4, lane % 4) has rows 2g and 2g + 1 of both tiles; the
// rows behind them are two of another lane.
//
// Codes are held in *nibbles*: a register has 8 nibbles, of each of its four bytes (columns) the
// lower one for product t and the upper one for product t + 2. Halves of windows are then nibbles
// of a register, too: what `prmt` looks up four at a time. An entry has 7 bits, so that it is used
// as a subnormal fp16 number, as codes are (packed.cuh).
#pragma once

#include "packed.cuh"

constexpr u32 STRIP_TILES = 2;
// What a value is less by than its entry (F25).
constexpr u32 TRELLIS_CENTER = 64;
// A record of scales (F26).
constexpr u32 TRELLIS_RECORD_BYTES = TILE_ROWS / 2;
// Bits of codes that say their value by themselves, without the codes of other rows.
constexpr int GRID_WIDTH = 7;

struct TrellisMatrix : PackedMatrix {};

// ---- tables ----

// F25: entries by the lower and by the upper half of a window, four in a word.
struct WindowTable {
    u32 low[4], high[4];
};

__device__ constexpr u32 entries(u32 a, u32 b, u32 c, u32 d) { return a | b << 8 | c << 16 | d << 24; }

template <int WIDTH>
__device__ constexpr WindowTable window_table() {
    static_assert(WIDTH < GRID_WIDTH, "");
    switch (WIDTH) {
        case 1:
            return {{entries(27, 6, 5, 16), entries(14, 3, 18, 10), entries(0, 14, 28, 7), entries(10, 23, 6, 20)},
                    {entries(44, 59, 67, 42), entries(53, 43, 63, 35), entries(56, 33, 46, 63), entries(51, 63, 36, 61)}};
        case 2:
            return {{entries(43, 19, 27, 0), entries(24, 38, 6, 17), entries(17, 18, 1, 36), entries(36, 8, 19, 25)},
                    {entries(53, 56, 36, 40), entries(43, 36, 30, 65), entries(56, 22, 53, 49), entries(37, 43, 48, 29)}};
        case 3:
            return {{entries(44, 32, 23, 17), entries(10, 38, 0, 25), entries(14, 39, 19, 50), entries(24, 5, 28, 33)},
                    {entries(30, 39, 45, 15), entries(26, 46, 44, 34), entries(64, 54, 36, 44), entries(52, 30, 55, 23)}};
        case 4:
            return {{entries(18, 32, 0, 15), entries(46, 18, 8, 26), entries(28, 20, 25, 13), entries(23, 6, 39, 21)},
                    {entries(35, 32, 38, 43), entries(50, 65, 73, 12), entries(45, 48, 40, 53), entries(57, 29, 61, 23)}};
        case 5:
            return {{entries(0, 5, 10, 15), entries(20, 25, 30, 34), entries(39, 45, 49, 54), entries(59, 64, 69, 74)},
                    {entries(26, 29, 47, 14), entries(30, 8, 25, 13), entries(33, 10, 16, 24), entries(41, 44, 23, 31)}};
        default:
            return {{entries(0, 5, 10, 15), entries(20, 25, 30, 35), entries(41, 46, 51, 56), entries(61, 66, 71, 76)},
                    {entries(25, 26, 48, 13), entries(28, 6, 24, 10), entries(32, 9, 15, 23), entries(40, 44, 22, 31)}};
    }
}

// The entries of four nibbles, the lower half of `nibbles`; `flipped` are those with their highest
// bits changed. Of a nibble above 7 the first look-up makes the sign of an entry, which has none:
// 0; of all others the second.
__device__ inline u32 look_up(const u32 (&table)[4], u32 nibbles, u32 flipped) {
    return permute_bytes_and_signs(table[0], table[1], nibbles) + permute_bytes_and_signs(table[2], table[3], flipped);
}

template <int WIDTH>
__device__ inline float value_of_entries(u32 window) {
    constexpr WindowTable table = window_table<WIDTH>();
    const u32 low = window & 15, high = window >> 4;
    return float(look_up(table.low, low, low ^ 8) & 255) + float(look_up(table.high, high, high ^ 8) & 255) - float(TRELLIS_CENTER);
}

// F25.
__device__ inline float value_of_window(u32 width, u32 window) {
    switch (width) {
        case 1: return value_of_entries<1>(window);
        case 2: return value_of_entries<2>(window);
        case 3: return value_of_entries<3>(window);
        case 4: return value_of_entries<4>(window);
        case 5: return value_of_entries<5>(window);
        case 6: return value_of_entries<6>(window);
        case 7: return float(window & 127) - float(TRELLIS_CENTER);
        default: return 0.5f * float(window) - float(TRELLIS_CENTER);
    }
}

// ---- rings ----

// F24: the row in the place behind that of row `row` of a strip.
__device__ inline u32 next_in_ring(u32 row) {
    u32 bit = STRIP_TILES * TILE_ROWS / 2;
    for (; row & bit; bit /= 2) row ^= bit;
    return row | bit;
}

// The words of the rows that stand behind a lane's two, in the same tile.
__device__ inline void load_next_rows(u32 (&next)[2], const u32 (&rows)[2]) {
    const u32 lane = threadIdx.x % WARP, g = lane / 4;
    // 4 5 6 7 2 3 1 0 from g = 0 on.
    const u32 from = (0x01327654u >> 4 * g & 7) * 4 + lane % 4;
    // Behind rows 14 and 15 stand 1 and 0.
    const bool swaps = g == 0;
    next[0] = __shfl_sync(ALL_LANES, swaps ? rows[1] : rows[0], from);
    next[1] = __shfl_sync(ALL_LANES, swaps ? rows[0] : rows[1], from);
}

// The bits of `a` where `mask` has ones, else those of `b`: one instruction in this form.
__device__ inline u32 select_bits(u32 mask, u32 a, u32 b) { return ((a ^ b) & mask) ^ b; }

// Fields of 2 bits as halves of nibbles, for product p: those of `low` below those of `high`. In
// both, a nibble has the field for product 0 (and 2) below that for product 1 (and 3).
__device__ inline u32 joined(u32 low, u32 high, u32 p) {
    return select_bits(0x33333333, low >> 2 * p, high << 2 * (1 - p));
}

// A lane's rows in a unit of a strip, and what stands behind them in the ring, as far as windows
// reach: places 0 and 1 are those of the two tiles, place i + 2 is behind place i.
template <int WIDTH>
struct Ring {
    static constexpr int ONES = WIDTH == 1 ? 9 : WIDTH == 3 ? 3 : WIDTH == 5 ? 2 : 0;
    static constexpr int TWOS = WIDTH == 2 ? 5 : WIDTH == 3 ? 4 : WIDTH == 6 ? 2 : 0;
    static constexpr int FOURS = WIDTH >= 4 ? 3 : 0;

    u32 one[ONES + 1][2];      // [place][row]: bit 0 of a nibble for product 0, bit 2 for product 1
    u32 two[TWOS + 1][2];      // fields as `joined` takes them
    u32 four[2][FOURS + 1][2]; // [product][place][row]

    __device__ Ring(const Unit<WIDTH> (&tiles)[STRIP_TILES]) {
#pragma unroll
        for (u32 tile = 0; tile < STRIP_TILES; ++tile)
#pragma unroll
            for (u32 r = 0; r < 2; ++r) {
                if constexpr (ONES > 0) one[tile][r] = spread(tiles[tile].one[r]);
                if constexpr (TWOS > 0) two[tile][r] = tiles[tile].two[r];
                if constexpr (FOURS > 0) {
                    const u32 first = tiles[tile].four[0][r], second = tiles[tile].four[1][r];
                    four[0][tile][r] = select_bits(0x0f0f0f0f, first, second << 4);
                    four[1][tile][r] = select_bits(0x0f0f0f0f, first >> 4, second);
                }
            }
#pragma unroll
        for (int i = 2; i < ONES; ++i) load_next_rows(one[i], one[i - 2]);
#pragma unroll
        for (int i = 2; i < TWOS; ++i) load_next_rows(two[i], two[i - 2]);
#pragma unroll
        for (u32 p = 0; p < 2; ++p)
#pragma unroll
            for (int i = 2; i < FOURS; ++i) load_next_rows(four[p][i], four[p][i - 2]);
    }

    // The entries of row 2g + r of a tile for the products p and p + 2, by columns: word i has
    // column 2i for p, then for p + 2, then the next column.
    __device__ void load_entries(u32 (&words)[2], u32 tile, u32 r, u32 p) const {
        constexpr WindowTable table = window_table<WIDTH>();
        const u32 low = low_half(tile, r, p), high = high_half(tile, r, p);
        const u32 flipped_low = low ^ 0x88888888, flipped_high = high ^ 0x88888888;
#pragma unroll
        for (u32 i = 0; i < 2; ++i)
            words[i] = look_up(table.low, low >> 16 * i, flipped_low >> 16 * i) + look_up(table.high, high >> 16 * i, flipped_high >> 16 * i);
    }

private:
    // Bits 0 to 3 of a byte at every other bit. The others are another unit's.
    __device__ static u32 spread(u32 word) {
        word = select_bits(0x03030303, word, word << 2);
        return select_bits(0x11111111, word, word << 1) & 0x55555555;
    }

    // Codes of 1 bit of a place and of the next one.
    __device__ u32 pair(u32 place, u32 r) const { return one[place][r] | one[place + 1][r] << 1; }

    // The halves of the windows of a tile, for products p and p + 2.
    __device__ u32 low_half(u32 tile, u32 r, u32 p) const {
        if constexpr (WIDTH == 1) return joined(pair(tile, r), pair(tile + 2, r), p);
        else if constexpr (WIDTH == 2) return joined(two[tile][r], two[tile + 1][r], p);
        else if constexpr (WIDTH == 3) return joined(two[tile][r], select_bits(0x55555555, one[tile][r], two[tile + 1][r] << 1), p);
        else return four[p][tile][r];
    }

    __device__ u32 high_half(u32 tile, u32 r, u32 p) const {
        if constexpr (WIDTH == 1) return joined(pair(tile + 4, r), pair(tile + 6, r), p);
        else if constexpr (WIDTH == 2) return joined(two[tile + 2][r], two[tile + 3][r], p);
        else if constexpr (WIDTH == 3) return joined(select_bits(0x55555555, two[tile + 1][r] >> 1, one[tile + 1][r] << 1), two[tile + 2][r], p);
        else if constexpr (WIDTH == 4) return four[p][tile + 1][r];
        else if constexpr (WIDTH == 5) return select_bits(0x11111111, one[tile][r] >> 2 * p, four[p][tile + 1][r] << 1);
        else return select_bits(0x33333333, two[tile][r] >> 2 * p, four[p][tile + 1][r] << 2);
    }
};

// ---- operands ----

// The factors and offsets of a lane's two rows. `record`: their bytes in one, which have the rows
// of the other half of the tile, too.
__device__ inline Factors trellis_factors(u32 record, u32 width, const RowScales& rows) {
    const u32 codes = record >> threadIdx.x % WARP / 16 * 4;
    Factors out;
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        const u32 s = 0x3c003c00u | (permute_bytes(codes, 0, r == 0 ? 0x4040 : 0x4141) & 0x000f000f) << 6;
        const u32 factor = half2_fma(s, rows.d[r], half2_negated(rows.d[r]));
        // Steps of 8-bit codes are half as wide.
        out.factor[r] = width == 8 ? half2_fma(factor, 0x38003800, 0) : factor;
        out.offset[r] = half2_fma(factor, half2_negated(TRELLIS_CENTER * 0x00010001), 0);
    }
    return out;
}

__device__ inline Factors factors_of(const TrellisMatrix& w, const Item& item, const u8* records, u32 unit, const RowScales& rows) {
    const u8* record = records + ((unit * UNIT_COLS) >> w.sub_group_log2) * TRELLIS_RECORD_BYTES;
    return trellis_factors(*reinterpret_cast<const u16*>(record + threadIdx.x % 16 / 4 * 2), item.width, rows);
}

// Operands of product p (`upper` 0) or p + 2 (1), of what `load_entries` gives for both rows.
__device__ inline void operands(u32 (&a)[4], const u32 (&entries)[2][2], const Factors& scales, u32 upper) {
#pragma unroll
    for (u32 k = 0; k < 4; ++k) {
        // A byte of each word, and above it its sign: 0.
        const u32 byte = k / 2 * 2 + upper, selector = 0xc480 + 0x1111 * byte;
        a[k] = half2_fma(permute_bytes_and_signs(entries[k % 2][0], entries[k % 2][1], selector), scales.factor[k % 2], scales.offset[k % 2]);
    }
}
