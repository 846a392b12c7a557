// Root mean square norm of one token, by one block.
#pragma once

#include "primitives.cuh"

// out = x / sqrt(mean(x^2) + epsilon) * weight
//
// x, weight  f32 [n], 16-byte aligned, n a multiple of 4
// out        fp16 [n] in operand order, 8-byte aligned
//
// All threads of the block must call: whole warps, up to 1024 threads.
__device__ inline void rms_norm_row(const float* x, const float* weight, float epsilon, u32 n, u16* out) {
    float squares = 0.0f;
    for (u32 col = 4 * threadIdx.x; col < n; col += 4 * blockDim.x) {
        const Float4 a = load_floats(x + col);
        for (u32 j = 0; j < 4; ++j) squares += a.value[j] * a.value[j];
    }
    const float scale = rsqrtf(block_sum(squares) / float(n) + epsilon);
    for (u32 col = 4 * threadIdx.x; col < n; col += 4 * blockDim.x) {
        Float4 a = load_floats(x + col);
        const Float4 w = load_floats(weight + col);
        for (u32 j = 0; j < 4; ++j) a.value[j] *= scale * w.value[j];
        store_operands(out + col, a);
    }
}
