// What becomes of logits behind the output layer: x = c * tanh(scale * x / c), or scale * x.
//
//   x  f32 [n]
//   c  0: no cap
//
// Grid: ceil(n / 256), a thread per logit. Block: 256.

#include "primitives.cuh"

extern "C" __global__ void __launch_bounds__(256) finish_logits(float* x, u32 n, float scale, float c) {
    begin_after_previous_kernel();
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    const float logit = scale * x[i];
    x[i] = c != 0.0f ? capped(logit, c) : logit;
}
