// What the kernels of `matvec` share: their arguments, which tile is a block's, and what becomes of
// its sums.
//
// A product of 1 to 8 tokens with up to 32 bands of rows of one matrix or of several: a band has
// out[t, row] = sum over columns of w[row, col] * x[t, col] for some rows of its matrix.
//
// A block owns one tile (16 rows) of one band, of a trellis a strip (32 rows); with gates the same
// of two, half of the warps each. Its warps share out the columns, every warp adds up its own share
// on tensor cores, and the block adds the warps' sums in a fixed order. Every byte of the weights
// is read once.
//
//   x         fp16 [m, x_stride], operand order; padding zero
//   out       f32 [m, matrix_rows], of a band its own rows: overwritten (STORE) or added to, times
//             scale (ADD)
//   operands  fp16 [m, operand_stride], operand order: neurons, by activation(x) (ACTIVATE) or
//             activation(gate x) * (up x) (GATE: the first half of the bands is the gate's, the
//             other up's, of the same rows)
//   normed    null, or with ADD, the bands being all of one matrix: the last block also writes
//             norm(out), fp16 operand order
//   counter   one u32, zero between launches (used with normed)
//
// Grid: the tiles (strips) of all bands in turn (GATE: of the gate's). Block: 256 threads. m <= 8.
//
// Weights do not depend on the kernel before: where the card can, the block starts while that one
// ends, and the first of its weights are on their way when the inputs come.
#pragma once

#include "activation.cuh"
#include "bands.cuh"
#include "norm.cuh"

constexpr u32 MATVEC_WARPS = 8;
constexpr u32 MATVEC_TOKENS = 8;
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
    u32 activation;
    Norm norm;
    u16* normed;
    u32 normed_stride;
    float scale;
    u32* counter;
    u32 quad_bytes;  // of `matvec_raw`: what a quad takes in shared memory, and how many a warp has there
    u32 depth;
};
typedef Matvec<PackedMatrix> MatvecPacked;
typedef Matvec<TrellisMatrix> MatvecTrellis;
typedef Matvec<DenseMatrix> MatvecDense;

// Which rows are the block's, and which of its warps work on them.
struct BlockTile {
    u32 band, tile;  // of a trellis the strip
    u32 of_up;  // GATE: the band of the other half of the warps
    u32 warps;  // that share out the columns of a band
    bool has_gates;

    template <class Matrix>
    __device__ BlockTile(const Matvec<Matrix>& args) : band(0), tile(blockIdx.x), has_gates(args.mode == GATE) {
        // With a bound that it never meets, or else ptxas spills.
        while (band + 1 < args.bands && tile >= strips_of(args.band[band].w)) tile -= strips_of(args.band[band++].w);
        of_up = band + args.bands / 2;
        warps = MATVEC_WARPS >> has_gates;
    }

    // By the whole block, before anything else.
    template <class Matrix>
    __device__ void prefetch_ends(const Matvec<Matrix>& args) const {
        if (threadIdx.x != 0) return;
        prefetch_row_ends(args.band[band], tile);
        if (has_gates) prefetch_row_ends(args.band[of_up], tile);
    }

    __device__ u32 band_of_warp() const { return threadIdx.x / WARP < warps ? band : of_up; }
};

// A thread's output of a block of ROWS rows. To be made before the block waits for its warps' sums.
template <u32 ROWS, u32 TOKENS>
struct Output {
    u32 row_of_tile, row, t;
    bool is_one;          // or else the thread has none
    RowEnd end, end_of_up;

    template <class Matrix>
    __device__ Output(const Matvec<Matrix>& args, const BlockTile& block) : end{}, end_of_up{} {
        row_of_tile = threadIdx.x / TOKENS;
        row = block.tile * ROWS + row_of_tile;
        t = threadIdx.x % TOKENS;
        is_one = row_of_tile < ROWS && row < args.band[block.band].w.rows && t < args.m;
        if (is_one) end = row_end(args.band[block.band], row);
        if (is_one && block.has_gates) end_of_up = row_end(args.band[block.of_up], row);
    }

    template <class Matrix>
    __device__ void store(const Matvec<Matrix>& args, const BlockTile& block, const float (&partial)[MATVEC_WARPS][ROWS][TOKENS]) const {
        if (!is_one) return;
        float sum = 0.0f, sum_of_up = 0.0f;
        for (u32 i = 0; i < MATVEC_WARPS; ++i) (i < block.warps ? sum : sum_of_up) += partial[i][row_of_tile][t];
        const float value = sum * end.unit + end.bias;
        const Band<Matrix>& band = args.band[block.band];
        const u32 row_of_matrix = band.first_row + row;
        if (args.mode >= ACTIVATE) {
            float neuron = activated(args.activation, value);
            if (block.has_gates) neuron *= sum_of_up * end_of_up.unit + end_of_up.bias;
            args.operands[u64(t) * args.operand_stride + operand_index(row_of_matrix)] = half_from_float(neuron);
        } else {
            float* out = band.out + u64(t) * band.matrix_rows + row_of_matrix;
            *out = args.mode == ADD ? *out + args.scale * value : value;
        }
    }
};

// What follows the outputs. All threads must call.
template <class Matrix>
__device__ inline void norm_outputs(const Matvec<Matrix>& args) {
    if (args.normed == nullptr || !is_last_block(args.counter, gridDim.x)) return;
    const u32 rows = args.band[0].matrix_rows;
    for (u32 i = 0; i < args.m; ++i)
        norm_row(args.band[0].out + u64(i) * rows, args.norm, rows, args.normed + u64(i) * args.normed_stride);
}
