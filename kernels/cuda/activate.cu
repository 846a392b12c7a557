// The neurons of a feed-forward layer: out = activation(gate) * up, or activation(gate) without up.
//
//   gate  f32 [m, n]
//   up    f32 [m, n]; null: none
//   out   fp16 [m, stride] in operand order
//
// Grid: (ceil(n / 256), m), a thread per column. Block: 256.

#include "activation.cuh"

extern "C" __global__ void __launch_bounds__(256)
    activate(const float* gate, const float* up, u32 n, u32 activation, u16* out, u32 stride) {
    begin_after_previous_kernel();
    const u32 col = blockIdx.x * 256 + threadIdx.x;
    if (col >= n) return;
    const u64 at = u64(blockIdx.y) * n + col;
    const float neuron = activated(activation, gate[at]) * (up != nullptr ? up[at] : 1.0f);
    out[u64(blockIdx.y) * stride + operand_index(int(col))] = half_from_float(neuron);
}
