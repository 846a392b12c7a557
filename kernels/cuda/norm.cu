// Norms (`norm.cuh`): out[t] = norm(x[t])
//
//   x    f32 [m, n], n a multiple of 4
//   out  fp16 [m, stride] in operand order
//
// and x[t] += scale * norm(y[t]), then out[t] = next(x[t])
//
//   y    f32 [m, n]; x itself with is_added 0: x[t] = scale * norm(y[t])
//   out  null: nothing follows
//
// Grid: m, a block per token. Block: 256. Pointers 16-byte aligned.

#include "norm.cuh"

extern "C" __global__ void __launch_bounds__(256) norm_rows(const float* x, Norm norm, u32 n, u16* out, u32 stride) {
    begin_after_previous_kernel();
    norm_row(x + u64(blockIdx.x) * n, norm, n, out + u64(blockIdx.x) * stride);
}

extern "C" __global__ void __launch_bounds__(256)
    norm_add(const float* y, Norm norm, float scale, u32 is_added, float* x, u32 n, Norm next, u16* out, u32 stride) {
    begin_after_previous_kernel();
    y += u64(blockIdx.x) * n;
    x += u64(blockIdx.x) * n;
    const Moments moments = moments_of(y, norm, n);
    for (u32 col = 4 * threadIdx.x; col < n; col += 4 * blockDim.x) {
        const Float4 added = normed(y, moments, norm, col);
        Float4 sum = {};
        if (is_added) sum = load_floats(x + col);
        for (u32 j = 0; j < 4; ++j) sum.value[j] += scale * added.value[j];
        *reinterpret_cast<Float4*>(x + col) = sum;
    }
    if (out != nullptr) norm_row(x, next, n, out + u64(blockIdx.x) * stride);
}
