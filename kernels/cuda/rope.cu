// Norms queries and keys, rotates them by their position, and stores keys and values in the cache.
//
//   x' = x / sqrt(mean(x^2) + epsilon) * weight, each head of q and k, if there are weights
//   a' = a * cos - b * sin,  b' = b * cos + a * sin,  a = channel i, b = channel i + pairs,
//                            i < pairs
//   q' = q * (1 + beta * ln(1 + floor(position / context)))
//
//   q         f32 [m, heads, head_dim], overwritten with what attention takes
//   k, v      f32 [m, kv_heads, head_dim]; k is rotated on its way to the cache
//   position  one u32: where the first of the m tokens stands. The last must be below capacity
//
// Grid: (ceil((heads + 2 * kv_heads) / 4), m). Block: 128, a warp per head of q, then of k, then of
// v. No shared memory.

#include "kv_cache.cuh"

constexpr u32 ROPE_WARPS = 4;

// What queries and keys go through.
struct Rotation {
    const float* cos;  // [capacity, pairs]: of the angles at each position
    const float* sin;
    const float* q_norm;  // [head_dim]; null: no norm
    const float* k_norm;
    u32 pairs;  // at most head_dim / 2; channels behind them stay as they are
    float epsilon;
    float beta;  // 0: queries keep their length
    u32 context;
};

template <class Rows>
__device__ inline void rope_store(float* q, const float* k, const float* v, const u32* position, u32 heads,
                                  const KvCache& cache, const Rotation& rotation) {
    constexpr u32 SHARE = MAX_HEAD_DIM / 2 / WARP;
    const u32 kv_heads = cache.kv_heads, half = cache.head_dim / 2, token = blockIdx.y, lane = threadIdx.x % WARP;
    const u32 warp = blockIdx.x * ROPE_WARPS + threadIdx.x / WARP;
    if (warp >= heads + 2 * kv_heads) return;
    const bool is_query = warp < heads, is_value = warp >= heads + kv_heads;
    const u32 head = is_query ? warp : (warp - heads) % kv_heads;
    const u32 place = *position + token;
    const u64 from = (u64(token) * (is_query ? heads : kv_heads) + head) * cache.head_dim;
    const float* x = (is_query ? q : is_value ? v : k) + from;

    // Channels that a lane has two by two: those that are rotated with each other, then the others.
    const u32 pairs = rotation.pairs;
    const auto first = [=](u32 i) { return i < pairs ? i : i + pairs; };
    const auto second = [=](u32 i) { return i < pairs ? i + pairs : i + half; };
    float a[SHARE] = {}, b[SHARE] = {};
    for (u32 j = 0; j < SHARE; ++j) {
        const u32 i = lane + j * WARP;
        if (i >= half) continue;
        a[j] = x[first(i)];
        b[j] = x[second(i)];
    }

    const float* norm = is_value ? nullptr : is_query ? rotation.q_norm : rotation.k_norm;
    if (norm != nullptr) {
        float squares = 0.0f;
        for (u32 j = 0; j < SHARE; ++j) squares += a[j] * a[j] + b[j] * b[j];
        const float scale = rsqrtf(warp_sum(squares) / float(cache.head_dim) + rotation.epsilon);
        for (u32 j = 0; j < SHARE; ++j) {
            const u32 i = lane + j * WARP;
            if (i >= half) continue;
            a[j] *= scale * norm[first(i)];
            b[j] *= scale * norm[second(i)];
        }
    }

    const bool is_stretched = is_query && rotation.beta != 0.0f;
    const float stretch = is_stretched ? 1.0f + rotation.beta * log1pf(float(place / rotation.context)) : 1.0f;
    float largest = 0.0f;
    for (u32 j = 0; j < SHARE; ++j) {
        const u32 i = lane + j * WARP;
        if (!is_value && i < pairs) {
            const u64 at = u64(place) * pairs + i;
            const float c = rotation.cos[at], s = rotation.sin[at], before = a[j];
            a[j] = before * c - b[j] * s;
            b[j] = b[j] * c + before * s;
        }
        a[j] *= stretch;
        b[j] *= stretch;
        largest = fmaxf(largest, fmaxf(fabsf(a[j]), fabsf(b[j])));
    }
    if (Rows::HAS_SCALES) largest = warp_max(largest);

    const u64 row = u64(head) * cache.capacity + place;
    void* rows = is_value ? cache.values : cache.keys;
    for (u32 j = 0; j < SHARE; ++j) {
        const u32 i = lane + j * WARP;
        if (i >= half) continue;
        if (is_query) {
            q[from + first(i)] = a[j];
            q[from + second(i)] = b[j];
        } else {
            Rows::store(rows, row * cache.head_dim + first(i), a[j], largest);
            Rows::store(rows, row * cache.head_dim + second(i), b[j], largest);
        }
    }
    if (!is_query && lane == 0) Rows::store_scale(is_value ? cache.value_scales : cache.key_scales, row, largest);
}

extern "C" __global__ void __launch_bounds__(ROPE_WARPS * WARP)
    rope_store_f16(float* q, const float* k, const float* v, const u32* position, u32 heads, KvCache cache,
                   Rotation rotation) {
    begin_after_previous_kernel();
    rope_store<HalfRows>(q, k, v, position, heads, cache, rotation);
}

extern "C" __global__ void __launch_bounds__(ROPE_WARPS * WARP)
    rope_store_q8(float* q, const float* k, const float* v, const u32* position, u32 heads, KvCache cache,
                  Rotation rotation) {
    begin_after_previous_kernel();
    rope_store<CodeRows>(q, k, v, position, heads, cache, rotation);
}
