// Attention of one query token: out = softmax(capped(scale * q K^T)) V over the positions that it
// sees.
//
//   q         f32 [heads, head_dim], rotated
//   cache     rows of all positions up to the token's own
//   position  one u32: the token's. It sees positions max(0, position + 1 - window) ..= position
//   partial   f32 [heads, gridDim.y, head_dim + 4]: scratch, 16-byte aligned
//   counters  u32 [kv_heads * gridDim.z], zero between launches
//   out       fp16 [heads * head_dim] in operand order
//
// Grid: (kv_heads, splits, ceil(heads / kv_heads / 8)): a block takes up to 8 heads, which share
// their kv head, over a *span* of the positions. A span is at least 64 positions, so short contexts
// leave blocks without work; the last block of a head to finish joins what all have found. Block:
// 128. Shared memory: static, 41 KiB.
//
// A product has 16 rows and there are 8 heads: what fp16 rounds off a number takes row g + 8 of its
// head's row g. So queries and probabilities count with 22 bits, and the only rounding is the
// cache's own. A warp takes 16 positions at a time straight from the cache to operands: of the keys
// lane (g, q) = (lane / 4, lane % 4) loads 8 channels of position g, of the values 8 channels of
// each of the positions 2q, 2q + 1, 2q + 8, 2q + 9. Which channel is which column of a product is
// then free.

#include "kv_cache.cuh"

constexpr u32 DECODE_WARPS = 4;
constexpr u32 DECODE_HEADS = 8;
constexpr u32 DECODE_STEP = 16;
constexpr u32 DECODE_SPAN = DECODE_WARPS * DECODE_STEP;
// Channels per load of eight by the 4 lanes of a position (keys), by the 8 of one (values).
constexpr u32 DECODE_KEY_CHANNELS = 32;
constexpr u32 DECODE_VALUE_CHANNELS = 64;
// Such loads in flight, per position.
constexpr u32 DECODE_KEY_LOADS = 4;
constexpr u32 DECODE_VALUE_LOADS = 2;

// A head's result over some positions: sum of values weighted by exp2(score - max). In memory max,
// sum, two unused words, and head_dim weighted values: a *part*.
constexpr u32 PART_HEADER = 4;

struct Joined {
    Float4 values;
    float max, sum;
};

// Four channels of `count` parts, `stride` floats apart, as one. The order of the sums depends on
// nothing but `count`. Not inlined, for both caches use it.
template <u32 BATCH>
__device__ __noinline__ Joined join_parts(const float* parts, u64 stride, u32 count, u32 channel) {
    Joined joined = {{}, LOWEST_SCORE, 0.0f};
    for (u32 first = 0; first < count; first += BATCH) {
        Float4 header[BATCH], values[BATCH];
        float max = joined.max;
        for (u32 i = 0; i < BATCH; ++i) {
            const float* part = parts + min(first + i, count - 1) * stride;
            header[i] = load_floats(part);
            values[i] = load_floats(part + PART_HEADER + channel);
            max = fmaxf(max, header[i].value[0]);
        }
        const float decay = exp2_flushed(joined.max - max);
        joined.max = max;
        joined.sum *= decay;
        for (u32 j = 0; j < 4; ++j) joined.values.value[j] *= decay;
        for (u32 i = 0; i < BATCH; ++i) {
            const float weight = first + i < count ? exp2_flushed(header[i].value[0] - max) : 0.0f;
            joined.sum += weight * header[i].value[1];
            for (u32 j = 0; j < 4; ++j) joined.values.value[j] += weight * values[i].value[j];
        }
    }
    return joined;
}

// Four channels of the softmax.
__device__ inline void store_result(u16* out, Joined joined) {
    const float inverse = 1.0f / joined.sum;
    for (u32 j = 0; j < 4; ++j) joined.values.value[j] *= inverse;
    store_operands(out, joined.values);
}

// Two numbers as fp16, and what that rounds off.
__device__ inline void split_halves(u32& rounded, u32& rest, float x, float y) {
    rounded = half2_from_floats(x, y);
    rest = half2_from_floats(x - half_to_float(u16(rounded)), y - half_to_float(u16(rounded >> 16)));
}

// Operands of the queries of `count` heads: product s of 16 channels takes [s][lane]. Lane (g, q)
// has of head g the channels that its keys hold in words 0, 1 (even s) or 2, 3 (odd s). Not
// inlined, for both caches use it.
__device__ __noinline__ void stage_queries(Vector16* operands, const float* q, u32 count, u32 head_dim) {
    for (u32 k = 0; k < MAX_HEAD_DIM / 16 / DECODE_WARPS; ++k) {
        const u32 i = k * DECODE_WARPS * WARP + threadIdx.x;
        const u32 s = i / WARP, g = i % WARP / 4, channel = s / 2 * DECODE_KEY_CHANNELS + i % 4 * 8 + s % 2 * 4;
        Float4 x = {};
        if (g < count && channel < head_dim) x = load_floats(q + g * head_dim + channel);
        Vector16 a;
        split_halves(a.word[0], a.word[1], x.value[0], x.value[1]);
        split_halves(a.word[2], a.word[3], x.value[2], x.value[3]);
        operands[i] = a;
    }
}

// The warp's share of the positions begin .. end, `first` its first: writes the part of each head,
// of its values those of channels from value_channel.
template <class Rows>
__device__ inline void attend(const Vector16* queries, const KvCache& cache, const Scores& scores, u64 row0, u32 first,
                              u32 end, u32 value_channel, u32 count, float* parts) {
    typedef typename Rows::Eight Eight;
    const u32 lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4, head_dim = cache.head_dim;
    float max = LOWEST_SCORE, sum = 0.0f;
    // What `values` counts in: the largest scale of the rows so far, so that probability * scale
    // fits fp16.
    float unit = Rows::HAS_SCALES ? 1e-30f : 1.0f;
    float values[DECODE_VALUE_LOADS][8][4] = {};

    for (; first < end; first += DECODE_SPAN) {
        // Positions past the end read the last one, and weigh nothing.
        const auto row = [=](u32 position) { return row0 + min(position, end - 1); };
        const auto place = [=](u32 i) { return first + 2 * q + i % 2 + i / 2 * 8; };
        // All loads before the first wait.
        Eight value[4][DECODE_VALUE_LOADS] = {};
        float key_scale[4], value_scale[4];
        for (u32 p = 0; p < 4; ++p) {
            key_scale[p] = Rows::scale(cache.key_scales, row(place(p)));
            value_scale[p] = Rows::scale(cache.value_scales, row(place(p)));
            for (u32 i = 0; i < DECODE_VALUE_LOADS; ++i) {
                const u32 channel = value_channel + i * DECODE_VALUE_CHANNELS + g * 8;
                if (channel < head_dim) value[p][i] = Rows::load8(cache.values, row(place(p)) * head_dim + channel);
            }
        }

        float c[2][4] = {};
#pragma unroll 1
        for (u32 i0 = 0; i0 * DECODE_KEY_CHANNELS < head_dim; i0 += DECODE_KEY_LOADS) {
            Eight key[2][DECODE_KEY_LOADS] = {};
            for (u32 n = 0; n < 2; ++n)
                for (u32 i = 0; i < DECODE_KEY_LOADS; ++i) {
                    const u32 channel = (i0 + i) * DECODE_KEY_CHANNELS + q * 8;
                    const u64 index = row(first + 8 * n + g) * head_dim + channel;
                    if (channel < head_dim) key[n][i] = Rows::load8(cache.keys, index);
                }
            for (u32 i = 0; i < DECODE_KEY_LOADS; ++i)
                for (u32 n = 0; n < 2; ++n) {
                    const Vector16 b = Rows::halves(key[n][i]);
                    for (u32 s = 0; s < 2; ++s) {
                        const Vector16 a = queries[(2 * (i0 + i) + s) * WARP + lane];
                        mma_16x8x16(c[n], a.word[0], a.word[1], a.word[2], a.word[3], b.word[2 * s], b.word[2 * s + 1]);
                    }
                }
        }

        float score[4];
        for (u32 p = 0; p < 4; ++p) score[p] = c[p / 2][p % 2] + c[p / 2][p % 2 + 2];
        float next_max = max, next_unit = unit;
        for (u32 p = 0; p < 4; ++p) {
            score[p] *= scores.scale * key_scale[p];
            if (scores.cap != 0.0f) score[p] = capped(score[p], scores.cap);
            if (place(p) >= end) score[p] = -INFINITY;
            next_max = fmaxf(next_max, score[p]);
            next_unit = fmaxf(next_unit, value_scale[p]);
        }
        // The four lanes of a head, which between them have all 16 positions.
        for (u32 distance = 1; distance < 4; distance *= 2) {
            next_max = fmaxf(next_max, __shfl_xor_sync(ALL_LANES, next_max, distance));
            if (Rows::HAS_SCALES) next_unit = fmaxf(next_unit, __shfl_xor_sync(ALL_LANES, next_unit, distance));
        }
        const float decay = exp2_flushed(max - next_max);
        max = next_max;
        sum *= decay;
        const float inverse = 1.0f / next_unit, value_decay = decay * (unit * inverse);
        unit = next_unit;
        for (u32 i = 0; i < DECODE_VALUE_LOADS; ++i)
            for (u32 n = 0; n < 8; ++n)
                for (u32 j = 0; j < 4; ++j) values[i][n][j] *= value_decay;

        float weight[4];
        for (u32 p = 0; p < 4; ++p) {
            weight[p] = exp2_flushed(score[p] - max);
            sum += weight[p];
            weight[p] *= value_scale[p] * inverse;
        }
        u32 a[4];
        split_halves(a[0], a[1], weight[0], weight[1]);
        split_halves(a[2], a[3], weight[2], weight[3]);
        // Column g of product n is the n-th channel of lane g's eight.
        for (u32 i = 0; i < DECODE_VALUE_LOADS; ++i) {
            if (value_channel + i * DECODE_VALUE_CHANNELS >= head_dim) break;
            Vector16 x[4];
            for (u32 p = 0; p < 4; ++p) x[p] = Rows::halves(value[p][i]);
            for (u32 n = 0; n < 8; ++n) {
                const u32 pick = n % 2 == 0 ? 0x5410 : 0x7632;
                const u32 b0 = permute_bytes(x[0].word[n / 2], x[1].word[n / 2], pick);
                const u32 b1 = permute_bytes(x[2].word[n / 2], x[3].word[n / 2], pick);
                mma_16x8x16(values[i][n], a[0], a[1], a[2], a[3], b0, b1);
            }
        }
    }

    for (u32 distance = 1; distance < 4; distance *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    float* part = parts + g * (head_dim + PART_HEADER);
    if (g < count && q == 0) {
        part[0] = max;
        part[1] = sum;
    }
    for (u32 i = 0; i < DECODE_VALUE_LOADS; ++i)
        for (u32 column = 0; column < 2; ++column) {
            const u32 channel = value_channel + i * DECODE_VALUE_CHANNELS + (2 * q + column) * 8;
            if (g >= count || channel >= head_dim) continue;
            for (u32 n = 0; n < 8; n += 4) {
                Float4 x;
                for (u32 j = 0; j < 4; ++j)
                    x.value[j] = (values[i][n + j][column] + values[i][n + j][column + 2]) * unit;
                *reinterpret_cast<Float4*>(part + PART_HEADER + channel + n) = x;
            }
        }
    __syncwarp();  // products that follow need all lanes
}

template <class Rows>
__device__ inline void attention_decode(const float* q, const KvCache& cache, const u32* position, u32 heads,
                                        const Scores& scores, float* partial, u32* counters, u16* out) {
    __shared__ Vector16 queries[MAX_HEAD_DIM / 16 * WARP];
    __shared__ Float4 shared_parts[DECODE_WARPS * DECODE_HEADS * (MAX_HEAD_DIM + PART_HEADER) / 4];
    const u32 kv_head = blockIdx.x, head_dim = cache.head_dim, warp = threadIdx.x / WARP;
    const u32 group = heads / cache.kv_heads, head = kv_head * group + blockIdx.z * DECODE_HEADS;
    const u32 count = min(group - blockIdx.z * DECODE_HEADS, DECODE_HEADS);

    const u32 limit = *position + 1;  // under way while the queries come
    stage_queries(queries, q + u64(head) * head_dim, count, head_dim);
    const u32 window = scores.window, start = window != 0 && window < limit ? limit - window : 0;
    const u32 longest = (limit - start + gridDim.y - 1) / gridDim.y;
    const u32 span = (longest + DECODE_SPAN - 1) / DECODE_SPAN * DECODE_SPAN;
    const u32 spans = (limit - start + span - 1) / span;
    if (blockIdx.y >= spans) return;
    const u32 begin = start + blockIdx.y * span, end = min(begin + span, limit);
    __syncthreads();

    float* const parts = shared_parts[0].value;
    const u32 part_size = head_dim + PART_HEADER;
    for (u32 channel = 0; channel < head_dim; channel += DECODE_VALUE_LOADS * DECODE_VALUE_CHANNELS)
        attend<Rows>(queries, cache, scores, u64(kv_head) * cache.capacity, begin + warp * DECODE_STEP, end, channel,
                     count, parts + warp * count * part_size);
    __syncthreads();

    const u32 quads = head_dim / 4;
    const u64 head_stride = u64(gridDim.y) * part_size;
    float* const head_parts = partial + head * head_stride;
    u16* const head_out = out + u64(head) * head_dim;
    for (u32 i = threadIdx.x; i < count * quads; i += DECODE_WARPS * WARP) {
        const u32 h = i / quads, channel = i % quads * 4;
        const Joined joined = join_parts<DECODE_WARPS>(parts + h * part_size, count * part_size, DECODE_WARPS, channel);
        if (spans == 1) {
            store_result(head_out + 4 * i, joined);
        } else {
            float* part = head_parts + h * head_stride + blockIdx.y * part_size;
            *reinterpret_cast<Float4*>(part + PART_HEADER + channel) = joined.values;
            if (channel == 0) *reinterpret_cast<Float4*>(part) = {{joined.max, joined.sum}};
        }
    }
    if (spans == 1 || !is_last_block(counters + blockIdx.z * cache.kv_heads + kv_head, spans)) return;

    for (u32 i = threadIdx.x; i < count * quads; i += DECODE_WARPS * WARP)
        store_result(head_out + 4 * i,
                     join_parts<16>(head_parts + i / quads * head_stride, part_size, spans, i % quads * 4));
}

extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP, 3)
    attention_decode_f16(const float* q, KvCache cache, const u32* position, u32 heads, Scores scores,
                         float* partial, u32* counters, u16* out) {
    begin_after_previous_kernel();
    attention_decode<HalfRows>(q, cache, position, heads, scores, partial, counters, out);
}

extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP, 3)
    attention_decode_q8(const float* q, KvCache cache, const u32* position, u32 heads, Scores scores,
                        float* partial, u32* counters, u16* out) {
    begin_after_previous_kernel();
    attention_decode<CodeRows>(q, cache, position, heads, scores, partial, counters, out);
}
