// Products of many tokens with the bands of one matrix: out[t, row] = sum over columns of w[row, col] * x[t, col].
//
// A block computes 128 rows (8 tiles) of a band x 128 tokens, a warp 32 rows x 64 tokens. Weights never exist in fp16 outside
// registers: the packed bytes of 8 tiles and the tokens' inputs are copied to shared memory an item (up to 128 columns) at a
// time, two items deep where that fits, and every warp turns its two tiles' codes into operands, each used for 8 products.
//
//   x    fp16 [m, x_stride], operand order; padding zero
//   out  f32 [m, matrix_rows]: overwritten (STORE) or added to (ADD)
//
// Grid: (sum over the bands of ceil(tiles / 8), ceil(m / 128)). Block: 256 threads. Dynamic shared memory: stages * (INPUT_BYTES +
// 8 * slot_bytes(largest max_width)) for packed weights, stages * INPUT_BYTES for dense ones.

#include "bands.cuh"

constexpr u32 MATMUL_WARPS = 8;
constexpr u32 MATMUL_TILES = 8;
constexpr u32 MATMUL_TOKENS = 128;
// A warp's share: tiles, and blocks of 8 tokens.
constexpr u32 WARP_TILES = 2;
constexpr u32 WARP_TOKEN_BLOCKS = 8;
// The inputs of an item: a row of 16 chunks of 16 bytes for each token.
constexpr u32 INPUT_ROW_BYTES = 2 * ITEM_COLS;
constexpr u32 INPUT_BYTES = MATMUL_TOKENS * INPUT_ROW_BYTES;

template <class Matrix>
struct Matmul {
    Band<Matrix> band[MAX_BANDS];
    const u16* x;
    u32 x_stride;
    u32 m;
    u32 mode;    // STORE or ADD
    u32 stages;  // items in shared memory at a time: 2, or 1 where shared memory is too small for that
    u32 bands;
    u32 unused;
};
typedef Matmul<PackedMatrix> MatmulPacked;
typedef Matmul<DenseMatrix> MatmulDense;

// What a block works on, in shared memory: its registers are full of sums.
template <class Matrix>
struct BlockWork {
    Band<Matrix> band;
    u32 first_tile;

    // By all threads.
    __device__ void find(const Matmul<Matrix>& args) {
        if (threadIdx.x == 0) {
            u32 i = 0, tile = blockIdx.x * MATMUL_TILES;
            const auto tiles_before_next = [&] { return (tiles_of(args.band[i].w) + MATMUL_TILES - 1) / MATMUL_TILES * MATMUL_TILES; };
            for (; i + 1 < args.bands && tile >= tiles_before_next(); ++i) tile -= tiles_before_next();
            band = args.band[i];
            first_tile = tile;
        }
        __syncthreads();
    }
};

// Where chunk `chunk` of token `token` lies: so swapped, the 8 lanes that read at a time (two tokens, q = 0..3) find theirs in
// all 32 banks.
__device__ inline u32 input_offset(u32 token, u32 chunk) {
    return token * INPUT_ROW_BYTES + (chunk ^ (token & 1) ^ (chunk >> 3 << 1)) * 16;
}

// Starts to copy `units` units of inputs from column `col` on. Tokens past the last repeat it: their sums are not stored.
__device__ inline void copy_inputs(const u16* x, u32 x_stride, u32 m, u32 col, u32 units, u8* to) {
    const u32 first_token = blockIdx.y * MATMUL_TOKENS, chunks = 2 * units;
    for (u32 i = threadIdx.x; i < MATMUL_TOKENS * ITEM_COLS / 8; i += MATMUL_WARPS * WARP) {
        const u32 token = i / (ITEM_COLS / 8), chunk = i % (ITEM_COLS / 8);
        if (chunk < chunks) copy16_async(to + input_offset(token, chunk), x + u64(min(first_token + token, m - 1)) * x_stride + col + chunk * 8);
    }
}

typedef float MatmulSums[WARP_TILES][WARP_TOKEN_BLOCKS][4];

// sums += operands `a` of two products, times the inputs of all the warp's tokens in chunk `chunk`.
__device__ inline void multiply_half_unit(MatmulSums& sums, const u32 (&a)[WARP_TILES][2][4], const u8* inputs, u32 first_token, u32 chunk,
                                          bool is_inside) {
    const u32 g = threadIdx.x % WARP / 4;
#pragma unroll
    for (u32 n = 0; n < WARP_TOKEN_BLOCKS; ++n) {
        Vector16 b = {};
        // Past the item's columns shared memory holds no numbers.
        if (is_inside) b = load16(inputs + input_offset(first_token + 8 * n + g, chunk));
#pragma unroll
        for (u32 tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
            for (u32 i = 0; i < 2; ++i)
                mma_16x8x16(sums[tile][n], a[tile][i][0], a[tile][i][1], a[tile][i][2], a[tile][i][3], b.word[2 * i], b.word[2 * i + 1]);
    }
}

// Waits for the oldest of `stages` batches of copies, for all threads.
__device__ inline void wait_for_stage(u32 stages) {
    if (stages == 1)
        copy_async_wait<0>();
    else
        copy_async_wait<1>();
    __syncthreads();
}

// The item under work, for a warp.
struct WarpItem {
    Item item;
    const u8* slots;  // of the warp's first tile; the next follows after slot_size
    u32 slot_size;
    u32 first_tile;
    u32 last_tile;  // of the band: tiles past it repeat it, their sums are not stored
    const RowScales (*rows)[WARP];  // of the warp's first tile, for each lane; of the next after it
    const u8* inputs;
    u32 first_token;
};

template <int WIDTH>
__device__ inline void multiply_warp_item(MatmulSums& sums, const PackedMatrix& w, const WarpItem& work) {
    const Item& item = work.item;
    const u32 per_lane = lane_units(item.units);
#pragma unroll 1
    for (u32 step = 0; step < per_lane; ++step) {
        const u32 unit = per_lane * (threadIdx.x % 4) + step;
        const bool is_inside = unit < item.units;
        Unit<WIDTH> words[WARP_TILES] = {};
        PlacedFactors<WIDTH> scales[WARP_TILES] = {};
#pragma unroll
        for (u32 tile = 0; tile < WARP_TILES; ++tile) {
            if (!is_inside) continue;
            const u8* records = records_of(w, min(work.first_tile + tile, work.last_tile), item, work.slots + tile * work.slot_size);
            scales[tile].set(factors_of(w, item, records, unit, work.rows[tile][threadIdx.x % WARP]));
            words[tile].load(work.slots + tile * work.slot_size, item.units, unit);
        }
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            u32 a[WARP_TILES][2][4];
#pragma unroll
            for (u32 tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
                for (u32 i = 0; i < 2; ++i) operands(a[tile][i], words[tile], scales[tile], 2 * half + i);
            multiply_half_unit(sums, a, work.inputs, work.first_token, 2 * unit + half, is_inside);
        }
    }
}

// out[t, row] for the warp's tiles and tokens.
template <class Matrix>
__device__ inline void store_sums(const MatmulSums& sums, const Matmul<Matrix>& args, const Band<Matrix>& band, u32 first_tile, u32 first_token) {
    const u32 g = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
#pragma unroll
    for (u32 tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
        for (u32 n = 0; n < WARP_TOKEN_BLOCKS; ++n)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 row = (first_tile + tile) * TILE_ROWS + 2 * g + i / 2;
                const u32 token = blockIdx.y * MATMUL_TOKENS + first_token + 8 * n + 2 * q + i % 2;
                if (row >= band.w.rows || token >= args.m) continue;
                float* to = band.out + u64(token) * band.matrix_rows + band.first_row + row;
                const float value = sums[tile][n][i] * row_unit(band.w, row);
                *to = value + (args.mode == ADD ? *to : 0.0f);
            }
}

extern "C" __global__ void __launch_bounds__(MATMUL_WARPS * WARP, 2) matmul_packed(MatmulPacked args) {
    begin_after_previous_kernel();
    DYNAMIC_SHARED(shared);
    __shared__ BlockWork<PackedMatrix> block;
    block.find(args);
    const PackedMatrix& w = block.band.w;
    const u32 warp = threadIdx.x / WARP;
    const u32 last_tile = (w.rows - 1) / TILE_ROWS, block_tile = block.first_tile;
    const u32 copied_tile = min(block_tile + warp, last_tile);
    const u32 warp_tile = warp / 2 * WARP_TILES, warp_token = warp % 2 * 8 * WARP_TOKEN_BLOCKS;
    const u32 slot_size = slot_bytes(w.max_width), stage_bytes = INPUT_BYTES + MATMUL_TILES * slot_size;
    // In registers they would spill.
    __shared__ RowScales rows[MATMUL_TILES][WARP];
    rows[warp][threadIdx.x % WARP] = row_scales_of(w, copied_tile);

    WarpItem work = {};
    work.slot_size = slot_size;
    work.first_tile = block_tile + warp_tile;
    work.last_tile = last_tile;
    work.rows = rows + warp_tile;
    work.first_token = warp_token;
    const auto copy = [&](u32 i) {
        if (i >= w.item_count) return;
        u8* stage = shared + i % args.stages * stage_bytes;
        const Item item = w.items[i];
        copy_inputs(args.x, args.x_stride, args.m, item.col16 * UNIT_COLS, item.units, stage);
        copy_item(w, copied_tile, item, stage + INPUT_BYTES + warp * slot_size);
    };

    MatmulSums sums = {};
    if (args.stages > 1) copy(0);
    copy_async_commit();
    for (u32 i = 0; i < w.item_count; ++i) {
        copy(i + args.stages - 1);
        copy_async_commit();
        wait_for_stage(args.stages);
        const u8* stage = shared + i % args.stages * stage_bytes;
        work.item = w.items[i];
        work.inputs = stage;
        work.slots = stage + INPUT_BYTES + warp_tile * slot_size;
        FOR_WIDTH(work.item.width, multiply_warp_item, sums, w, work);
        __syncthreads();  // the stage may be overwritten
    }
    store_sums(sums, args, block.band, work.first_tile, warp_token);
}

extern "C" __global__ void __launch_bounds__(MATMUL_WARPS * WARP, 2) matmul_dense(MatmulDense args) {
    begin_after_previous_kernel();
    DYNAMIC_SHARED(shared);
    __shared__ BlockWork<DenseMatrix> block;
    block.find(args);
    const DenseMatrix& w = block.band.w;
    const u32 warp = threadIdx.x / WARP;
    const u32 tiles = tiles_of(w);
    const u32 first_tile = block.first_tile + warp / 2 * WARP_TILES;
    const u32 warp_token = warp % 2 * 8 * WARP_TOKEN_BLOCKS;
    const u32 items = (w.steps + 1) / 2;
    const auto units_of = [&](u32 i) { return min(2u, w.steps - 2 * i) * 4; };
    const auto copy = [&](u32 i) {
        if (i >= items) return;
        copy_inputs(args.x, args.x_stride, args.m, i * ITEM_COLS, units_of(i), shared + i % args.stages * INPUT_BYTES);
    };

    MatmulSums sums = {};
    if (args.stages > 1) copy(0);
    copy_async_commit();
    for (u32 i = 0; i < items; ++i) {
        copy(i + args.stages - 1);
        copy_async_commit();
        wait_for_stage(args.stages);
        for (u32 step = 0; 4 * step < units_of(i); ++step)
#pragma unroll 1
            for (u32 half = 0; half < 2; ++half) {
                u32 a[WARP_TILES][2][4];
#pragma unroll
                for (u32 tile = 0; tile < WARP_TILES; ++tile)
#pragma unroll
                    for (u32 t = 0; t < 2; ++t) {
                        const Vector16 words = fragment(w, min(first_tile + tile, tiles - 1), 2 * i + step, 2 * half + t);
#pragma unroll
                        for (u32 k = 0; k < 4; ++k) a[tile][t][k] = words.word[k];
                    }
                multiply_half_unit(sums, a, shared + i % args.stages * INPUT_BYTES, warp_token, 8 * step + 2 * (threadIdx.x % 4) + half, true);
            }
        __syncthreads();  // the stage may be overwritten
    }
    store_sums(sums, args, block.band, first_tile, warp_token);
}
