// fp16 weights in *fragment order*: the words that the lanes of a warp feed to the matrix product,
// one after the other.
//
// `[tiles][steps][4 products t][32 lanes][4 words]`: with lane = 4g + q, words 0 and 2 are row 2g
// of the tile, words 1 and 3 row 2g + 1, at columns 4t, 4t + 2 (words 0, 1) and 4t + 1, 4t + 3
// (words 2, 3) of the lane's unit, columns 64 * step + 16q .. of the matrix. Rows and columns past
// the matrix are zero.
#pragma once

#include "packed.cuh"

struct DenseMatrix {
    const u32* fragments;  // 16-byte aligned
    u32 rows;
    u32 cols;
    u32 steps;  // ceil(cols / 64)
    u32 unused;
};

constexpr u32 STEP_WORDS = 4 * WARP * 4;

// The calling lane's operands of product `t` of a step of a tile.
__device__ inline Vector16 fragment(const DenseMatrix& w, u32 tile, u32 step, u32 t) {
    const u32* from = w.fragments + (u64(tile) * w.steps + step) * STEP_WORDS;
    return load16(from + (t * WARP + threadIdx.x % WARP) * 4);
}

// What the sums of a row are multiplied with.
__device__ inline float row_unit(const PackedMatrix& w, u32 row) { return w.units[row] * operand_unit(w.coding); }
__device__ inline float row_unit(const DenseMatrix&, u32) { return 1.0f; }
__device__ inline void prefetch_row_unit(const PackedMatrix& w, u32 row) { prefetch_to_l2(w.units + row); }
__device__ inline void prefetch_row_unit(const DenseMatrix&, u32) {}

// What a product does with its sums, to which a bias has been added.
enum Mode : u32 {
    STORE = 0,     // out = sums
    ADD = 1,       // out += scale * sums
    ACTIVATE = 2,  // operands = activation(sums)
    GATE = 3,      // operands = activation(sums of the gate) * sums of up
};
