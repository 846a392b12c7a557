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
//
// Weights do not depend on the kernel before: where the card can, the block starts while that one ends, and the first of its
// weights are on their way when the inputs come.

#include "bands.cuh"
#include "norm.cuh"

constexpr u32 MATVEC_WARPS = 8;
constexpr u32 MATVEC_TOKENS = 8;
// Items that a warp has under way: at 2 bits 4 * 512 bytes, with 24 warps on a multiprocessor 48 KiB, more than twice what
// bandwidth times latency asks for.
constexpr u32 MATVEC_STAGES = 4;
// Entries of the item table that a warp has at hand: the items under way, and as many behind them under way themselves.
constexpr u32 MATVEC_ITEMS = 2 * MATVEC_STAGES;
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

// The sums of a lane: rows 2g, 2g + 1 of a tile times tokens 2q, 2q + 1. Products are added to one and to the other by turns: each
// has to wait for the one before it.
typedef float Sums[2][4];

// sums += an item of a tile, which lies in `slot` with its scale records in `records`.
template <int WIDTH, u32 UNITS>
__device__ inline void multiply_item(Sums& sums, const PackedMatrix& w, const Item& item, const u8* slot, const u8* records,
                                     const RowScales& rows, const Inputs (&inputs)[2]) {
    const u32 units = units_of<UNITS>(item), per_lane = lane_units(units), first = per_lane * (threadIdx.x % 4);
    PlacedFactors<WIDTH> scales = {};
#pragma unroll
    for (u32 step = 0; step < 2; ++step) {
        if (step >= per_lane) continue;
        const u32 unit = first + step;
        // Past the item's columns the inputs are zero.
        const bool is_inside = UNITS != 0 || unit < units;
        if (is_inside && (step == 0 || (UNITS == 0 && w.sub_group_log2 == 4))) scales.set(factors_of<UNITS>(w, item, records, unit, rows));
        Unit<WIDTH> codes = {};
        if (is_inside) codes.template load<UNITS>(slot, item, unit);
#pragma unroll
        for (u32 t = 0; t < 4; ++t) {
            u32 a[4];
            operands(a, codes, scales, t);
            const Vector16& b = inputs[step].half[t / 2];
            mma_16x8x16(sums[t % 2], a[0], a[1], a[2], a[3], b.word[t % 2 * 2], b.word[t % 2 * 2 + 1]);
        }
    }
}

// sums += the items `first`, `first + stride`, ... of a tile. Of this warp: `slots` for STAGES items, `items` for ITEMS entries.
__device__ inline void multiply_tile(Sums& sums, const PackedMatrix& w, u32 tile, const u16* x, u32 first, u32 stride,
                                     u8* slots, u32 slot_size, Item* items) {
    const u32 lane = threadIdx.x % WARP;
    const bool is_plain = may_be_plain(w);
    const auto plain_units = [=](const Item& item) { return is_plain && (item.units == 8 || item.units == 4) ? item.units : 0; };
    // The warp's item number i goes from the table to `items`, and what it says from memory to a slot.
    const auto index_of = [=](u32 i) { return first + i * stride; };
    const auto copy_entry = [&](u32 i) {
        if (lane == 0 && index_of(i) < w.item_count) copy16_async(&items[i % MATVEC_ITEMS], &w.items[index_of(i)]);
    };
    const auto copy_codes = [&](u32 i) {
        if (index_of(i) >= w.item_count) return;
        const Item item = load_item(&items[i % MATVEC_ITEMS]);
        u8* slot = slots + i % MATVEC_STAGES * slot_size;
        switch (plain_units(item)) {
            case 8: copy_item<8>(w, tile, item, slot); break;
            case 4: copy_item<4>(w, tile, item, slot); break;
            default: copy_item<0>(w, tile, item, slot);
        }
    };
    if (lane < MATVEC_ITEMS - 1 && index_of(lane) < w.item_count) items[lane] = w.items[index_of(lane)];
    __syncwarp();
    for (u32 i = 0; i + 1 < MATVEC_STAGES; ++i) {
        copy_codes(i);
        copy_async_commit();
    }
    const RowScales rows = row_scales_of(w, tile);
    wait_for_previous_kernel();
    for (u32 i = 0; index_of(i) < w.item_count; ++i) {
        copy_codes(i + MATVEC_STAGES - 1);
        copy_entry(i + MATVEC_ITEMS - 1);
        copy_async_commit();
        const Item item = load_item(&items[i % MATVEC_ITEMS]);
        Inputs inputs[2] = {};
#pragma unroll
        for (u32 step = 0; step < 2; ++step) {
            const u32 per_lane = lane_units(item.units), unit = per_lane * (lane % 4) + step;
            if (step < per_lane && unit < item.units) inputs[step].load(x + (item.col16 + unit) * UNIT_COLS);
        }
        const u8* slot = slots + i % MATVEC_STAGES * slot_size;
        copy_async_wait<MATVEC_STAGES - 1>();
        __syncwarp();  // the other lanes' copies have arrived, too
        switch (plain_units(item)) {
            case 8: FOR_WIDTH(item.width, multiply_item, 8, sums, w, item, slot, records_of<8>(w, tile, item, slot), rows, inputs); break;
            case 4: FOR_WIDTH(item.width, multiply_item, 4, sums, w, item, slot, records_of<4>(w, tile, item, slot), rows, inputs); break;
            default: FOR_WIDTH(item.width, multiply_item, 0, sums, w, item, slot, records_of<0>(w, tile, item, slot), rows, inputs);
        }
        __syncwarp();  // the slot and the entry may be overwritten
    }
}

__device__ inline void multiply_tile(Sums& sums, const DenseMatrix& w, u32 tile, const u16* x, u32 first, u32 stride, u8*, u32, Item*) {
    wait_for_previous_kernel();
    for (u32 step = first; step < w.steps; step += stride) {
        Vector16 a[4];
#pragma unroll
        for (u32 t = 0; t < 4; ++t) a[t] = fragment(w, tile, step, t);
        Inputs inputs;
        inputs.load(x + step * STEP_COLS + threadIdx.x % 4 * UNIT_COLS);
#pragma unroll
        for (u32 t = 0; t < 4; ++t) {
            const Vector16& b = inputs.half[t / 2];
            mma_16x8x16(sums[t % 2], a[t].word[0], a[t].word[1], a[t].word[2], a[t].word[3], b.word[t % 2 * 2], b.word[t % 2 * 2 + 1]);
        }
    }
}

template <class Matrix>
__device__ inline void matvec(const Matvec<Matrix>& args) {
    let_next_kernel_start();
    DYNAMIC_SHARED(slots);
    __shared__ Item items[MATVEC_WARPS][MATVEC_ITEMS];
    __shared__ float partial[MATVEC_WARPS][TILE_ROWS][MATVEC_TOKENS];
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const bool is_swiglu = args.mode == SWIGLU;

    // With a bound that it never meets, or else ptxas spills.
    u32 band = 0, tile = blockIdx.x;
    while (band + 1 < args.bands && tile >= tiles_of(args.band[band].w)) tile -= tiles_of(args.band[band++].w);
    const u32 of_up = band + args.bands / 2;
    const u32 warps = is_swiglu ? MATVEC_WARPS / 2 : MATVEC_WARPS;
    const u32 mine = warp < warps ? band : of_up;

    Sums sums = {};
    u8* slots_of_warp = slots + warp * MATVEC_STAGES * args.slot_size;
    multiply_tile(sums, args.band[mine].w, tile, inputs_of_lane(args), warp % warps, warps, slots_of_warp, args.slot_size,
                  items[warp]);
    for (u32 i = 0; i < 4; ++i) partial[warp][lane / 4 * 2 + i / 2][lane % 4 * 2 + i % 2] = sums[0][i] + sums[1][i];
    __syncthreads();

    const u32 row_of_tile = threadIdx.x / MATVEC_TOKENS, t = threadIdx.x % MATVEC_TOKENS;
    const u32 row = tile * TILE_ROWS + row_of_tile;
    if (row_of_tile < TILE_ROWS && row < args.band[band].w.rows && t < args.m) {
        float sum = 0.0f, sum_of_up = 0.0f;
        for (u32 i = 0; i < MATVEC_WARPS; ++i) (i < warps ? sum : sum_of_up) += partial[i][row_of_tile][t];
        const float value = sum * row_unit(args.band[band].w, row);
        const u32 row_of_matrix = args.band[band].first_row + row;
        if (is_swiglu) {
            const float up = sum_of_up * row_unit(args.band[of_up].w, row);
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
