// C = beta * C + alpha * A B^T in f32: C[i, j] = beta * C[i, j] + alpha * sum over l of A[i, l] *
// B[j, l].
//
// A block computes 128 x 128 numbers of C, a thread 8 x 8 of them. A and B pass through shared
// memory in slabs of 8 columns; while one slab is multiplied, the next is on its way to registers.
// Sums run in the order of l: equal inputs give equal bits.
//
//   a  f32 [m, k]: A[i, l] is a[i * a_row + l * a_col]; likewise b [n, k]
//   c  f32 [m, n]: C[i, j] is c[i * c_row + j]; not read if beta = 0
//
// Reads coalesce if one stride of an operand is 1, so X W^T takes X and W as they lie, and X^T X
// takes X twice with a_row = 1. C must not overlap A or B.
//
// Grid: (ceil(n / 128), ceil(m / 128)). Block: 256 threads. No dynamic shared memory (17 KiB
// static). m <= 128 * 65535.

#include "primitives.cuh"

constexpr u32 GEMM_THREADS = 256;
constexpr u32 GEMM_TILE = 128;
constexpr u32 GEMM_DEPTH = 8;
// Numbers of a slab that each thread brings.
constexpr u32 GEMM_SHARE = GEMM_TILE * GEMM_DEPTH / GEMM_THREADS;

struct GemmArgs {
    const float* a;
    const float* b;
    float* c;
    u64 a_row;
    u64 a_col;
    u64 b_row;
    u64 b_col;
    u64 c_row;
    u32 m;
    u32 n;
    u32 k;
    float alpha;
    float beta;
    u32 unused;
};

struct alignas(16) Vector4 {
    float value[4];
};

// A slab of an operand, column after column. The 4 numbers between two columns let a warp store 4
// rows of 8 columns without bank conflicts.
struct Slab {
    Vector4 column[GEMM_DEPTH][GEMM_TILE / 4 + 1];

    __device__ float& at(u32 row, u32 col) { return column[col][row / 4].value[row % 4]; }
};

// What a thread reads of an operand: GEMM_SHARE numbers of each slab, neighbouring threads
// neighbouring numbers.
struct Reader {
    const float* from;       // the first of them
    u64 next;                // from one to the next
    u64 next_slab;
    u32 row, col;            // place of the first in the slab
    u32 row_step, col_step;  // from one to the next
    u32 rows, cols;          // of the operand, from this slab on
    float values[GEMM_SHARE];

    __device__ Reader(const float* operand, u64 row_stride, u64 col_stride, u32 first_row, u32 all_rows, u32 all_cols) {
        const bool is_row_major = col_stride == 1;
        row = is_row_major ? threadIdx.x / GEMM_DEPTH : threadIdx.x % GEMM_TILE;
        col = is_row_major ? threadIdx.x % GEMM_DEPTH : threadIdx.x / GEMM_TILE;
        row_step = is_row_major ? GEMM_THREADS / GEMM_DEPTH : 0;
        col_step = is_row_major ? 0 : GEMM_THREADS / GEMM_TILE;
        from = operand + (first_row + row) * row_stride + col * col_stride;
        next = row_step * row_stride + col_step * col_stride;
        next_slab = GEMM_DEPTH * col_stride;
        rows = all_rows - first_row;
        cols = all_cols;
    }

    // Reads this slab's numbers, zero past the operand's edges, and goes on to the next slab.
    __device__ void load() {
        for (u32 i = 0; i < GEMM_SHARE; ++i) {
            const bool is_inside = row + i * row_step < rows && col + i * col_step < cols;
            values[i] = is_inside ? from[i * next] : 0.0f;
        }
        from += next_slab;
        cols -= min(cols, GEMM_DEPTH);
    }

    __device__ void store(Slab& slab) const {
        for (u32 i = 0; i < GEMM_SHARE; ++i) slab.at(row + i * row_step, col + i * col_step) = values[i];
    }
};

// Rows (of A) or columns (of B) of the tile that a thread computes: 4 and, half a tile on, 4 more.
__device__ inline u32 gemm_place(u32 thread, u32 i) { return i / 4 * (GEMM_TILE / 2) + 4 * thread + i % 4; }

// sums += the product of two slabs.
__device__ inline void multiply_slabs(float (&sums)[8][8], const Slab& a, const Slab& b, u32 thread_row,
                                      u32 thread_col) {
    // Unrolled further, registers spill.
#pragma unroll 2
    for (u32 l = 0; l < GEMM_DEPTH; ++l) {
        const Vector4 left[2] = {a.column[l][thread_row], a.column[l][GEMM_TILE / 8 + thread_row]};
        const Vector4 right[2] = {b.column[l][thread_col], b.column[l][GEMM_TILE / 8 + thread_col]};
        for (u32 i = 0; i < 8; ++i)
            for (u32 j = 0; j < 8; ++j) sums[i][j] += left[i / 4].value[i % 4] * right[j / 4].value[j % 4];
    }
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2) gemm_f32(GemmArgs args) {
    begin_after_previous_kernel();
    __shared__ Slab slabs[2][2];  // [this slab, next slab][A, B]
    const u32 first_row = blockIdx.y * GEMM_TILE, first_col = blockIdx.x * GEMM_TILE;
    const u32 thread_row = threadIdx.x / 16, thread_col = threadIdx.x % 16;
    Reader a(args.a, args.a_row, args.a_col, first_row, args.m, args.k);
    Reader b(args.b, args.b_row, args.b_col, first_col, args.n, args.k);
    float sums[8][8] = {};

    a.load();
    b.load();
    for (u32 l = 0, stage = 0; l < args.k; l += GEMM_DEPTH, stage ^= 1) {
        a.store(slabs[stage][0]);
        b.store(slabs[stage][1]);
        __syncthreads();
        a.load();
        b.load();
        multiply_slabs(sums, slabs[stage][0], slabs[stage][1], thread_row, thread_col);
    }

    for (u32 i = 0; i < 8; ++i) {
        const u32 row = first_row + gemm_place(thread_row, i);
        if (row >= args.m) break;
        for (u32 j = 0; j < 8; ++j) {
            const u32 col = first_col + gemm_place(thread_col, j);
            if (col >= args.n) break;
            float* c = args.c + row * args.c_row + col;
            const float product = args.alpha * sums[i][j];
            *c = args.beta == 0.0f ? product : args.beta * *c + product;
        }
    }
}
