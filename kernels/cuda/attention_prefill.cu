// Attention of m query tokens: out[t] = softmax(capped(scale * q[t] K^T)) V over the positions that
// token t sees.
//
//   q         f32 [m, heads, head_dim], rotated
//   cache     rows of all positions up to the last token's own
//   position  one u32: the first token's. Token t sees max(0, position + t + 1 - window) ..=
//             position + t
//   out       fp16 [m, stride] in operand order, column head * head_dim + channel
//
// Grid: (ceil(m * heads / kv_heads / 64), kv_heads). The heads that share a kv head are rows of one
// matrix, row = token * (heads / kv_heads) + head: a block takes 64 rows, a warp 16 of them, and
// goes through the positions in tiles of 64. Block: 128. Dynamic shared memory:
// 128 * (2 * P + V) bytes, P = head_dim rounded up to 16, plus 8, V = 72 if head_dim <= 64, else
// 136 (at most 83 KiB).
//
// Queries and probabilities are rounded to fp16. Rows in shared memory are an odd number of 16
// bytes apart, so that the eight rows of a matrix come from all banks.

#include "kv_cache.cuh"

constexpr u32 PREFILL_THREADS = 128;
constexpr u32 PREFILL_ROWS = 64;
constexpr u32 PREFILL_TILE = 64;
// Channels of values that a block has sums for; longer heads take two passes, each with all scores.
constexpr u32 PREFILL_CHANNELS = 128;

// Copies rows `first` .. of keys or values, PREFILL_TILE of them, no further than `last`, to shared
// memory: channels begin .. end, zero from head_dim. Codes come multiplied by `scales`, or if there
// are none, as they are. They are there after the next copy_async_wait and barrier.
template <class Rows>
__device__ inline void copy_rows(u16* tile, u32 tile_stride, const void* rows, const float* scales, u32 head_dim,
                                 u64 first, u64 last, u32 begin, u32 end) {
    // Eight threads copy 128 bytes of a row.
#pragma unroll 1
    for (u32 channel = begin + threadIdx.x % 8 * 8; channel < end; channel += 64)
        for (u32 r = threadIdx.x / 8; r < PREFILL_TILE; r += PREFILL_THREADS / 8) {
            const u64 row = min(first + r, last);
            u16* to = tile + r * tile_stride + channel - begin;
            if (channel < head_dim) {
                Rows::copy8(to, rows, row * head_dim + channel, scales != nullptr ? Rows::scale(scales, row) : 1.0f);
            } else {
                *reinterpret_cast<Vector16*>(to) = Vector16{};
            }
        }
    copy_async_commit();
}

// Not inlined, as it is needed in six places.
__device__ __noinline__ void stage(bool has_codes, u16* tile, u32 tile_stride, const void* rows, const float* scales,
                                   u32 head_dim, u64 first, u64 last, u32 begin, u32 end) {
    if (has_codes) {
        copy_rows<CodeRows>(tile, tile_stride, rows, scales, head_dim, first, last, begin, end);
    } else {
        copy_rows<HalfRows>(tile, tile_stride, rows, scales, head_dim, first, last, begin, end);
    }
}

// Channels value_channel .. value_channel + PREFILL_CHANNELS of the block's results. One function
// for both kinds of rows, which differ only on their way to shared memory; not inlined, for it is
// most of the code.
__device__ __noinline__ void attend_rows(bool has_codes, const float* q, const KvCache cache, u32 start, u32 m,
                                         u32 heads, const Scores scores, u16* out, u32 stride,
                                         u32 value_channel) {
    DYNAMIC_SHARED(shared);
    __shared__ float key_scales[PREFILL_TILE];
    const u32 head_dim = cache.head_dim, kv_head = blockIdx.y, group = heads / cache.kv_heads;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, quarter = lane % 4;
    const u32 key_channels = (head_dim + 15) / 16 * 16, key_stride = key_channels + 8;
    const u32 channels = min(head_dim - value_channel, PREFILL_CHANNELS);
    const u32 value_stride = (channels <= 64 ? 64 : 128) + 8;
    u16* const queries = reinterpret_cast<u16*>(shared);
    u16* const keys = queries + PREFILL_ROWS * key_stride;
    u16* const values = keys + PREFILL_TILE * key_stride;

    // The longest rows first: they decide when the grid is done.
    const u32 first_row = (gridDim.x - 1 - blockIdx.x) * PREFILL_ROWS;
    const u32 last_row = min(first_row + PREFILL_ROWS, m * group) - 1;
    const auto sees_from = [=](u32 token) {
        const u32 window = scores.window, end = start + token + 1;
        return window != 0 && window < end ? end - window : 0;
    };
    const u32 last = start + last_row / group;
    const u64 row0 = u64(kv_head) * cache.capacity;
    const auto stage_keys = [&](u32 first) {
        stage(has_codes, keys, key_stride, cache.keys, nullptr, head_dim, row0 + first, row0 + last, 0, key_channels);
        if (has_codes && threadIdx.x < PREFILL_TILE)
            key_scales[threadIdx.x] = cache.key_scales[row0 + min(first + threadIdx.x, last)];
    };

    u32 first = sees_from(first_row / group);
    stage_keys(first);
#pragma unroll 1
    for (u32 r = threadIdx.x / 16; r < PREFILL_ROWS; r += PREFILL_THREADS / 16) {
        const u32 row = min(first_row + r, last_row);
        const float* from = q + (u64(row / group) * heads + kv_head * group + row % group) * head_dim;
        for (u32 channel = threadIdx.x % 16 * 4; channel < key_channels; channel += 64) {
            const Float4 x = channel < head_dim ? load_floats(from + channel) : Float4{};
            u32* to = reinterpret_cast<u32*>(queries + r * key_stride + channel);
            to[0] = half2_from_floats(x.value[0], x.value[1]);
            to[1] = half2_from_floats(x.value[2], x.value[3]);
        }
    }

    // The lane's rows, g and g + 8 of the warp's.
    u32 row_begin[2], row_length[2];
    for (u32 r = 0; r < 2; ++r) {
        const u32 token = min(first_row + warp * 16 + g + 8 * r, last_row) / group;
        row_begin[r] = sees_from(token);
        row_length[r] = start + token + 1 - row_begin[r];
    }
    const float scale = scores.scale;
    float max[2] = {LOWEST_SCORE, LOWEST_SCORE}, sum[2] = {};
    float result[PREFILL_CHANNELS / 8][4] = {};

    for (; first <= last; first += PREFILL_TILE) {
        copy_async_wait<0>();
        __syncthreads();  // the keys are there, and the last values have been used
        stage(has_codes, values, value_stride, cache.values, cache.value_scales, head_dim, row0 + first, row0 + last,
              value_channel, value_channel + channels);

        float score[PREFILL_TILE / 8][4] = {};
#pragma unroll 1
        for (u32 channel = 0; channel < key_channels; channel += 16) {
            u32 a[4];
            load_matrices<false>(a, queries + (warp * 16 + lane % 16) * key_stride + channel + lane / 16 * 8);
            for (u32 n = 0; n < PREFILL_TILE / 8; n += 2) {
                u32 b[4];
                const u32 position = 8 * n + lane / 16 * 8 + lane % 8;
                load_matrices<false>(b, keys + position * key_stride + channel + lane / 8 % 2 * 8);
                mma_16x8x16(score[n], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma_16x8x16(score[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }

        if (has_codes)
            for (u32 n = 0; n < PREFILL_TILE / 8; ++n)
                for (u32 j = 0; j < 4; ++j) score[n][j] *= key_scales[8 * n + 2 * quarter + j % 2];
        // Products here, which are multiplied by the scale below.
        if (scores.cap != 0.0f)
            for (u32 n = 0; n < PREFILL_TILE / 8; ++n)
                for (u32 j = 0; j < 4; ++j) score[n][j] = capped(score[n][j], scores.cap / scale);

        copy_async_wait<0>();
        __syncthreads();  // the values are there, and the keys have been used
        if (first + PREFILL_TILE <= last) stage_keys(first + PREFILL_TILE);

        if (first < row_begin[1] || first + PREFILL_TILE > row_begin[0] + row_length[0])
            for (u32 n = 0; n < PREFILL_TILE / 8; ++n)
                for (u32 j = 0; j < 4; ++j) {
                    const u32 position = first + 8 * n + 2 * quarter + j % 2;
                    // One comparison: below row_begin the difference is huge.
                    if (position - row_begin[j / 2] >= row_length[j / 2]) score[n][j] = -INFINITY;
                }
        for (u32 r = 0; r < 2; ++r) {
            float largest = -INFINITY;
            for (u32 n = 0; n < PREFILL_TILE / 8; ++n)
                largest = fmaxf(largest, fmaxf(score[n][2 * r], score[n][2 * r + 1]));
            for (u32 distance = 1; distance < 4; distance *= 2)
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
            const float next_max = fmaxf(max[r], largest * scale), decay = exp2_flushed(max[r] - next_max);
            max[r] = next_max;
            sum[r] *= decay;
            for (u32 n = 0; n < PREFILL_CHANNELS / 8; ++n)
                for (u32 j = 0; j < 2; ++j) result[n][2 * r + j] *= decay;
            for (u32 n = 0; n < PREFILL_TILE / 8; ++n)
                for (u32 j = 0; j < 2; ++j) {
                    float& weight = score[n][2 * r + j];
                    weight = exp2_flushed(weight * scale - next_max);
                    sum[r] += weight;
                }
        }

        // What a product of 16 positions leaves in two results is the next one's first operand.
        for (u32 k = 0; k < PREFILL_TILE / 16; ++k) {
            u32 a[4];
            for (u32 i = 0; i < 4; ++i) {
                const float* pair = score[2 * k + i / 2] + i % 2 * 2;
                a[i] = half2_from_small_floats(pair[0], pair[1]);
            }
            for (u32 n = 0; n < PREFILL_CHANNELS / 8; n += 2) {
                if (n == 8 && channels <= 64) break;
                u32 b[4];
                load_matrices<true>(b, values + (16 * k + lane % 16) * value_stride + 8 * n + lane / 16 * 8);
                mma_16x8x16(result[n], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma_16x8x16(result[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
    }

    __syncthreads();  // the values have been used: their place takes the results, for stores of whole lines
    for (u32 r = 0; r < 2; ++r) {
        for (u32 distance = 1; distance < 4; distance *= 2) sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], distance);
        const float inverse = 1.0f / sum[r];
        u32* to = reinterpret_cast<u32*>(values + (warp * 16 + g + 8 * r) * value_stride) + quarter;
        for (u32 n = 0; n < PREFILL_CHANNELS / 8; ++n) {
            if (n == 8 && channels <= 64) break;
            to[4 * n] = half2_from_floats(result[n][2 * r] * inverse, result[n][2 * r + 1] * inverse);
        }
    }
    __syncwarp();
    for (u32 r = lane / 8; r < 16; r += WARP / 8) {
        const u32 row = first_row + warp * 16 + r;
        if (row > last_row) continue;
        u16* to = out + u64(row / group) * stride + (kv_head * group + row % group) * head_dim + value_channel;
        for (u32 channel = lane % 8 * 8; channel < channels; channel += 64) {
            const Vector16 x = load16(values + (warp * 16 + r) * value_stride + channel);
            Vector16 operands;
            for (u32 i = 0; i < 4; i += 2) {
                operands.word[i] = permute_bytes(x.word[i], x.word[i + 1], 0x5410);
                operands.word[i + 1] = permute_bytes(x.word[i], x.word[i + 1], 0x7632);
            }
            *reinterpret_cast<Vector16*>(to + channel) = operands;
        }
    }
    __syncwarp();  // products that follow need all lanes
}

__device__ inline void attention_prefill(bool has_codes, const float* q, const KvCache& cache, const u32* position,
                                         u32 m, u32 heads, const Scores& scores, u16* out, u32 stride) {
    for (u32 channel = 0; channel < cache.head_dim; channel += PREFILL_CHANNELS)
        attend_rows(has_codes, q, cache, *position, m, heads, scores, out, stride, channel);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 3)
    attention_prefill_f16(const float* q, KvCache cache, const u32* position, u32 m, u32 heads, Scores scores,
                          u16* out, u32 stride) {
    begin_after_previous_kernel();
    attention_prefill(false, q, cache, position, m, heads, scores, out, stride);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 3)
    attention_prefill_q8(const float* q, KvCache cache, const u32* position, u32 m, u32 heads, Scores scores,
                         u16* out, u32 stride) {
    begin_after_previous_kernel();
    attention_prefill(true, q, cache, position, m, heads, scores, out, stride);
}
