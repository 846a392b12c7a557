// What makes neurons nonlinear.
#pragma once

#include "primitives.cuh"

enum Activation : u32 {
    SILU = 0,       // x / (1 + exp(-x))
    GELU_TANH = 1,  // x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
    RELU = 2,       // max(x, 0)
};

__device__ inline float activated(u32 activation, float x) {
    if (activation == RELU) return fmaxf(x, 0.0f);
    // (1 + tanh(y)) / 2 is 1 / (1 + exp(-2 y)).
    const float y = activation == GELU_TANH ? 1.59576912f * (x + 0.044715f * x * x * x) : x;
    return x / (1.0f + expf(-y));
}
