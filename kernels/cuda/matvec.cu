// Products of 1 to 8 tokens with up to 32 bands of rows of one matrix or of several: a band has
// out[t, row] = sum over columns of w[row, col] * x[t, col] for some rows of its matrix.
//
// A block owns one tile (16 rows) of one band; with SwiGLU the same tile of two, half of the warps each. Its warps share
// out the columns, every warp adds up its own share on tensor cores (one instruction serves 8 tokens), and the block adds the
// warps' sums in a fixed order. Every byte of the weights is read once.
//
//   x         fp16 [m, x_stride], operand order; padding zero
//   out       f32 [m, matrix_rows], of a band its own rows: overwritten (STORE) or added to (ADD)
//   operands  fp16 [m, operand_stride], operand order (SWIGLU): silu(gate x) * (up x); the first half of the bands is the gate's, the
//             other up's, of the same rows
//   normed    with ADD and norm_weight, the bands being all of one matrix: the last block also writes rms_norm(out) *
//             norm_weight, fp16 operand order
//   counter   one u32, zero between launches (used with norm_weight)
//
// Grid: the tiles of all bands in turn (SWIGLU: of the gate's). Block: 256 threads. Dynamic shared memory: packed
// `WARPS * STAGES * slot_size`, dense none. m <= 8.

#include "bands.cuh"
#include "norm.cuh"

constexpr u32 MATVEC_WARPS = 8;
constexpr u32 MATVEC_TOKENS = 8;
// Items that a warp has under way: at 2 bits 4 * 512 bytes, with 24 warps on a multiprocessor 48 KiB, more than twice what
// bandwidth times latency asks for.
constexpr u32 MATVEC_STAGES = 4;
constexpr u32 MATVEC_BANDS = 2 * MAX_BANDS;

template <class Matrix>
struct Matvec {
    Band<Matrix> band[MATVEC_BANDS];
    const u16* x;
    u32 x_stride;
    u32 m;
    u32 bands;
    u32 mode;
    u16* operands;
    u32 operand_stride;
    u32 slot_size;  // slot_bytes(largest max_width)
    const float* norm_weight;
    u16* normed;
    u32 normed_stride;
    float epsilon;
    u32* counter;
};
typedef Matvec<PackedMatrix> MatvecPacked;
typedef Matvec<DenseMatrix> MatvecDense;

// The inputs of a lane for one step: the columns of its unit, for the token whose sums it feeds.
struct Inputs {
    Vector16 half[2];  // words 2i, 2i + 1 of half h are b0, b1 of product 2h + i

    __device__ void load(const u16* unit) {
        half[0] = load16(unit);
        half[1] = load16(unit + 8);
    }
};

// Where the lane's token starts. Lanes past the last token take its inputs: their sums are never looked at.
template <class Matrix>
__device__ inline const u16* inputs_of_lane(const Matvec<Matrix>& args) {
    return args.x + u64(min(threadIdx.x % WARP / 4, args.m - 1)) * args.x_stride;
}

// sums[rows 2g, 2g + 1][tokens 2q, 2q + 1] += an item of a tile.
template <int WIDTH>
__device__ inline void multiply_item(float (&sums)[4], const PackedMatrix& w, const Item& item, const u8* slot, const u8* records,
                                     const RowScales& rows, const Inputs (&inputs)[2]) {
    const u32 units = lane_units(item), first = units * (threadIdx.x % 4);
    Factors scales = {};
#pragma unroll
    for (u32 step = 0; step < 2; ++step) {
        if (step >= units) continue;
        const u32 unit = first + step;
        // Past the item's columns the inputs are zero.
        const bool is_inside = unit < item.units;
        if (is_inside && (step == 0 || w.sub_group_log2 == 4)) scales = factors_of(w, item, records, unit, rows);
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            HalfUnit<WIDTH> words = {};
            if (is_inside) words.load(slot, item, unit, half);
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                u32 a[4];
                operands(a, words, scales, i);
                const Vector16& b = inputs[step].half[half];
                mma_16x8x16(sums, a[0], a[1], a[2], a[3], b.word[2 * i], b.word[2 * i + 1]);
            }
        }
    }
}

// sums += the items `first`, `first + stride`, ... of a tile. `slots`: MATVEC_STAGES slots of this warp.
__device__ inline void multiply_tile(float (&sums)[4], const PackedMatrix& w, u32 tile, const u16* x, u32 first, u32 stride,
                                     u8* slots, u32 slot_size) {
    u32 copied = first;
    for (u32 stage = 0; stage + 1 < MATVEC_STAGES; ++stage, copied += stride) {
        if (copied < w.item_count) copy_item(w, tile, w.items[copied], slots + stage * slot_size);
        copy_async_commit();
    }
    const RowScales rows = row_scales_of(w, tile);
    u32 stage = 0;
    for (u32 i = first; i < w.item_count; i += stride, copied += stride) {
        const u32 free_stage = (stage + MATVEC_STAGES - 1) % MATVEC_STAGES;
        if (copied < w.item_count) copy_item(w, tile, w.items[copied], slots + free_stage * slot_size);
        copy_async_commit();
        const Item item = w.items[i];
        Inputs inputs[2] = {};
#pragma unroll
        for (u32 step = 0; step < 2; ++step) {
            const u32 unit = lane_units(item) * (threadIdx.x % 4) + step;
            if (step < lane_units(item) && unit < item.units) inputs[step].load(x + (item.col16 + unit) * UNIT_COLS);
        }
        const u8* slot = slots + stage * slot_size;
        copy_async_wait<MATVEC_STAGES - 1>();
        __syncwarp();  // the other lanes' copies have arrived, too
        FOR_WIDTH(item.width, multiply_item, sums, w, item, slot, records_of(w, tile, item, slot), rows, inputs);
        __syncwarp();  // the slot may be overwritten
        stage = (stage + 1) % MATVEC_STAGES;
    }
}

__device__ inline void multiply_tile(float (&sums)[4], const DenseMatrix& w, u32 tile, const u16* x, u32 first, u32 stride, u8*, u32) {
    for (u32 step = first; step < w.steps; step += stride) {
        Vector16 a[4];
#pragma unroll
        for (u32 t = 0; t < 4; ++t) a[t] = fragment(w, tile, step, t);
        Inputs inputs;
        inputs.load(x + step * STEP_COLS + threadIdx.x % 4 * UNIT_COLS);
#pragma unroll
        for (u32 t = 0; t < 4; ++t) {
            const Vector16& b = inputs.half[t / 2];
            mma_16x8x16(sums, a[t].word[0], a[t].word[1], a[t].word[2], a[t].word[3], b.word[t % 2 * 2], b.word[t % 2 * 2 + 1]);
        }
    }
}

template <class Matrix>
__device__ inline void matvec(const Matvec<Matrix>& args) {
    DYNAMIC_SHARED(slots);
    __shared__ float partial[MATVEC_WARPS][TILE_ROWS][MATVEC_TOKENS];
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const bool is_swiglu = args.mode == SWIGLU;

    // With a bound that it never meets, or else ptxas spills.
    u32 band = 0, tile = blockIdx.x;
    while (band + 1 < args.bands && tile >= tiles_of(args.band[band].w)) tile -= tiles_of(args.band[band++].w);
    const u32 of_up = band + args.bands / 2;
    const u32 warps = is_swiglu ? MATVEC_WARPS / 2 : MATVEC_WARPS;
    const u32 mine = warp < warps ? band : of_up;

    float sums[4] = {};
    u8* slots_of_warp = slots + warp * MATVEC_STAGES * args.slot_size;
    multiply_tile(sums, args.band[mine].w, tile, inputs_of_lane(args), warp % warps, warps, slots_of_warp, args.slot_size);
    for (u32 i = 0; i < 4; ++i) partial[warp][lane / 4 * 2 + i / 2][lane % 4 * 2 + i % 2] = sums[i];
    __syncthreads();

    const u32 row_of_tile = threadIdx.x / MATVEC_TOKENS, t = threadIdx.x % MATVEC_TOKENS;
    const u32 row = tile * TILE_ROWS + row_of_tile;
    if (row_of_tile < TILE_ROWS && row < args.band[band].w.rows && t < args.m) {
        float sum[2] = {};
        for (u32 i = 0; i < MATVEC_WARPS; ++i) sum[i / warps] += partial[i][row_of_tile][t];
        const float value = sum[0] * row_unit(args.band[band].w, row);
        const u32 row_of_matrix = args.band[band].first_row + row;
        if (is_swiglu) {
            const float up = sum[1] * row_unit(args.band[of_up].w, row);
            args.operands[u64(t) * args.operand_stride + operand_index(row_of_matrix)] = half_from_float(value / (1.0f + expf(-value)) * up);
        } else {
            float* out = args.band[band].out + u64(t) * args.band[band].matrix_rows + row_of_matrix;
            *out = args.mode == ADD ? *out + value : value;
        }
    }

    if (args.norm_weight != nullptr && is_last_block(args.counter, gridDim.x)) {
        const u32 rows = args.band[0].matrix_rows;
        for (u32 i = 0; i < args.m; ++i)
            rms_norm_row(args.band[0].out + u64(i) * rows, args.norm_weight, args.epsilon, rows, args.normed + u64(i) * args.normed_stride);
    }
}

extern "C" __global__ void __launch_bounds__(MATVEC_WARPS * WARP, 3) matvec_packed(MatvecPacked args) { matvec(args); }
extern "C" __global__ void __launch_bounds__(MATVEC_WARPS * WARP, 3) matvec_dense(MatvecDense args) { matvec(args); }
