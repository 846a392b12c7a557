// The gate of a feed-forward layer: out = silu(gate) * up, silu(x) = x / (1 + exp(-x))
//
//   gate, up  f32 [m, n]
//   out       fp16 [m, stride] in operand order
//
// Grid: (ceil(n / 256), m), a thread per column. Block: 256.

#include "primitives.cuh"

extern "C" __global__ void __launch_bounds__(256)
    swiglu(const float* gate, const float* up, u32 n, u16* out, u32 stride) {
    begin_after_previous_kernel();
    const u32 col = blockIdx.x * 256 + threadIdx.x;
    if (col >= n) return;
    const u64 at = u64(blockIdx.y) * n + col;
    const float g = gate[at];
    out[u64(blockIdx.y) * stride + operand_index(int(col))] = half_from_float(g / (1.0f + expf(-g)) * up[at]);
}
