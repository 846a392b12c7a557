// Root mean square norm: out[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * weight
//
//   x       f32 [m, n], n a multiple of 4
//   weight  f32 [n]
//   out     fp16 [m, stride] in operand order
//
// Grid: m, a block per token. Block: 256. Pointers 16-byte aligned.

#include "norm.cuh"

extern "C" __global__ void __launch_bounds__(256)
    rms_norm(const float* x, const float* weight, float epsilon, u32 n, u16* out, u32 stride) {
    begin_after_previous_kernel();
    rms_norm_row(x + u64(blockIdx.x) * n, weight, epsilon, n, out + u64(blockIdx.x) * stride);
}
