// Rotates queries and keys by their position, and stores keys and values in the cache.
//
//   a' = a * cos - b * sin,  b' = b * cos + a * sin,  a = channel i, b = channel i + head_dim / 2,
//                            i < head_dim / 2
//
//   q         f32 [m, heads, head_dim], rotated in place
//   k, v      f32 [m, kv_heads, head_dim]; k is rotated on its way to the cache
//   cos, sin  f32 [capacity, head_dim / 2]: of the angles at each position
//   position  one u32: where the first of the m tokens stands. The last must be below capacity
//
// Grid: (ceil((heads + 2 * kv_heads) / 4), m). Block: 128, a warp per head of q, then of k, then of
// v. No shared memory.

#include "kv_cache.cuh"

constexpr u32 ROPE_WARPS = 4;

template <class Rows>
__device__ inline void rope_store(float* q, const float* k, const float* v, const float* cos, const float* sin,
                                  const u32* position, u32 heads, const KvCache& cache) {
    constexpr u32 SHARE = MAX_HEAD_DIM / 2 / WARP;
    const u32 kv_heads = cache.kv_heads, half = cache.head_dim / 2, token = blockIdx.y, lane = threadIdx.x % WARP;
    const u32 warp = blockIdx.x * ROPE_WARPS + threadIdx.x / WARP;
    if (warp >= heads + 2 * kv_heads) return;
    const bool is_query = warp < heads, is_value = warp >= heads + kv_heads;
    const u32 head = is_query ? warp : (warp - heads) % kv_heads;
    const u64 place = *position + token;
    const u64 from = (u64(token) * (is_query ? heads : kv_heads) + head) * cache.head_dim;
    const float* x = (is_query ? q : is_value ? v : k) + from;

    float a[SHARE], b[SHARE], largest = 0.0f;
    for (u32 j = 0; j < SHARE; ++j) {
        const u32 i = lane + j * WARP;
        if (i >= half) continue;
        a[j] = x[i];
        b[j] = x[i + half];
        if (!is_value) {
            const float c = cos[place * half + i], s = sin[place * half + i], first = a[j];
            a[j] = first * c - b[j] * s;
            b[j] = b[j] * c + first * s;
        }
        largest = fmaxf(largest, fmaxf(fabsf(a[j]), fabsf(b[j])));
    }
    if (Rows::HAS_SCALES) largest = warp_max(largest);

    const u64 row = u64(head) * cache.capacity + place;
    void* rows = is_value ? cache.values : cache.keys;
    for (u32 j = 0; j < SHARE; ++j) {
        const u32 i = lane + j * WARP;
        if (i >= half) continue;
        if (is_query) {
            q[from + i] = a[j];
            q[from + i + half] = b[j];
        } else {
            Rows::store(rows, row * cache.head_dim + i, a[j], largest);
            Rows::store(rows, row * cache.head_dim + i + half, b[j], largest);
        }
    }
    if (!is_query && lane == 0) Rows::store_scale(is_value ? cache.value_scales : cache.key_scales, row, largest);
}

extern "C" __global__ void __launch_bounds__(ROPE_WARPS * WARP)
    rope_store_f16(float* q, const float* k, const float* v, const float* cos, const float* sin, const u32* position,
                   u32 heads, KvCache cache) {
    begin_after_previous_kernel();
    rope_store<HalfRows>(q, k, v, cos, sin, position, heads, cache);
}

extern "C" __global__ void __launch_bounds__(ROPE_WARPS * WARP)
    rope_store_q8(float* q, const float* k, const float* v, const float* cos, const float* sin, const u32* position,
                  u32 heads, KvCache cache) {
    begin_after_previous_kernel();
    rope_store<CodeRows>(q, k, v, cos, sin, position, heads, cache);
}
