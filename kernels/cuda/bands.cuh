// Bands of rows of one matrix or of several, as a launch takes them.

#pragma once

#include "dense.cuh"
#include "trellis.cuh"

// Bands of a matrix at most.
constexpr u32 MAX_BANDS = 16;

// Some rows of a matrix.
template <class Matrix>
struct Band {
    Matrix w;
    float* out;         // where the matrix has its first row of the first token
    const float* bias;  // [matrix_rows]; null: none
    u32 first_row;
    u32 matrix_rows;
};

// What row `row` of a band adds to its sums.
template <class Matrix>
__device__ inline float bias_of(const Band<Matrix>& band, u32 row) {
    return band.bias != nullptr ? band.bias[band.first_row + row] : 0.0f;
}

// What makes an output of the sums of a row: sums * unit + bias.
struct RowEnd {
    float unit, bias;
};

template <class Matrix>
__device__ inline RowEnd row_end(const Band<Matrix>& band, u32 row) {
    return {row_unit(band.w, row), bias_of(band, row)};
}

// Asks for those of a tile, long before they are needed: nobody has touched them before.
template <class Matrix>
__device__ inline void prefetch_row_ends(const Band<Matrix>& band, u32 tile) {
    prefetch_row_unit(band.w, tile * TILE_ROWS);
    if (band.bias != nullptr) prefetch_to_l2(band.bias + band.first_row + tile * TILE_ROWS);
}

// Tiles whose codes belong together.
template <class Matrix>
constexpr u32 TILES_OF_STRIP = 1;
template <>
constexpr u32 TILES_OF_STRIP<TrellisMatrix> = STRIP_TILES;

template <class Matrix>
__device__ inline u32 strips_of(const Matrix& w) {
    constexpr u32 STRIP_ROWS = TILES_OF_STRIP<Matrix> * TILE_ROWS;
    return (w.rows + STRIP_ROWS - 1) / STRIP_ROWS;
}

template <class Matrix>
__device__ inline u32 tiles_of(const Matrix& w) {
    return TILES_OF_STRIP<Matrix> * strips_of(w);
}
