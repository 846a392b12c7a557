// The norm of one token, by one block.
#pragma once

#include "primitives.cuh"

// out = (x - mean) / sqrt(mean((x - mean)^2) + epsilon) * weight + bias. Without a bias it is a
// root mean square norm, whose mean counts as 0; without a weight it is none, and out = x.
struct Norm {
    const float* weight;  // [n], or null
    const float* bias;    // [n], or null
    float epsilon;
    u32 unused;
};

// What a norm takes off a vector, and multiplies it by.
struct Moments {
    float mean, scale;
};

// x  f32 [n], 16-byte aligned, n a multiple of 4
//
// All threads of the block must call: whole warps, up to 1024 threads.
__device__ inline Moments moments_of(const float* x, const Norm& norm, u32 n) {
    Moments moments = {0.0f, 1.0f};
    if (norm.weight == nullptr) return moments;
    if (norm.bias != nullptr) {
        float sum = 0.0f;
        for (u32 col = 4 * threadIdx.x; col < n; col += 4 * blockDim.x) {
            const Float4 a = load_floats(x + col);
            for (u32 j = 0; j < 4; ++j) sum += a.value[j];
        }
        moments.mean = block_sum(sum) / float(n);
    }
    float squares = 0.0f;
    for (u32 col = 4 * threadIdx.x; col < n; col += 4 * blockDim.x) {
        const Float4 a = load_floats(x + col);
        for (u32 j = 0; j < 4; ++j) squares += (a.value[j] - moments.mean) * (a.value[j] - moments.mean);
    }
    moments.scale = rsqrtf(block_sum(squares) / float(n) + norm.epsilon);
    return moments;
}

// Four columns of x, normed.
__device__ inline Float4 normed(const float* x, const Moments& moments, const Norm& norm, u32 col) {
    Float4 a = load_floats(x + col);
    if (norm.weight == nullptr) return a;
    const Float4 w = load_floats(norm.weight + col);
    for (u32 j = 0; j < 4; ++j) a.value[j] = (a.value[j] - moments.mean) * (moments.scale * w.value[j]);
    if (norm.bias == nullptr) return a;
    const Float4 b = load_floats(norm.bias + col);
    for (u32 j = 0; j < 4; ++j) a.value[j] += b.value[j];
    return a;
}

// x, normed, as fp16 in operand order: out, 8-byte aligned. All threads must call.
__device__ inline void norm_row(const float* x, const Norm& norm, u32 n, u16* out) {
    const Moments moments = moments_of(x, norm, n);
    for (u32 col = 4 * threadIdx.x; col < n; col += 4 * blockDim.x)
        store_operands(out + col, normed(x, moments, norm, col));
}
