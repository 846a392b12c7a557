// Experts: networks of which each token goes through some. One launch serves all that are chosen,
// of all tokens; none is read that no token goes through.
//
//   route       who is chosen for each token, and what it weighs
//   experts_*   neurons[t, i] = weight * activation(gate in[t]) * (up in[t]) of the i-th chosen, or
//               x[t] += scale * sum over i of down neurons[t, i]
//   weigh_rows  rows of operands, each times its own number
//
// Every token of a batch reads the experts that it goes through, from the second cache if others
// have just read them.

#include "strip.cuh"

// ---- the choice ----

enum Scoring : u32 { SOFTMAX = 0, SIGMOID = 1 };

// s = scoring(sharpness * weight x + bias); chosen are those with the largest s + correction; what
// one weighs is scale * s, or that over the sum of s over the chosen.
struct Router {
    const float* weight;      // [count, n]
    const float* bias;        // [count], or null
    const float* correction;  // [count], or null
    const float* share;       // [n] of the network beside the experts, or null
    u32 count;
    u32 used;
    u32 scoring;
    u32 normalizes;
    float sharpness;
    float scale;
};

constexpr u32 ROUTE_WARPS = 8;
constexpr float LEAST_SUM = 1e-20f;

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// A warp's product of a row of n numbers with x, normed.
__device__ inline float product_with_normed(const float* row, const float* x, const Moments& moments, const Norm& norm, u32 n) {
    float sum = 0.0f;
    for (u32 col = 4 * (threadIdx.x % WARP); col < n; col += 4 * WARP) {
        const Float4 a = normed(x, moments, norm, col), w = load_floats(row + col);
        for (u32 j = 0; j < 4; ++j) sum += a.value[j] * w.value[j];
    }
    return warp_sum(sum);
}

// Turns the router's outputs for a token into scores, by a warp: its lanes have every 32nd.
__device__ inline void score(const Router& router, float* outputs) {
    const u32 lane = threadIdx.x % WARP;
    if (router.scoring == SIGMOID) {
        for (u32 i = lane; i < router.count; i += WARP) outputs[i] = sigmoid(outputs[i]);
        return;
    }
    float largest = -HUGE_VALF, sum = 0.0f;
    for (u32 i = lane; i < router.count; i += WARP) largest = fmaxf(largest, outputs[i]);
    largest = warp_max(largest);
    for (u32 i = lane; i < router.count; i += WARP) sum += outputs[i] = expf(outputs[i] - largest);
    sum = warp_sum(sum);
    for (u32 i = lane; i < router.count; i += WARP) outputs[i] /= sum;
}

// The first of the largest of `worth`, by a warp; 0 if nothing is larger than -infinity.
__device__ inline u32 best_of(const float* worth, u32 count) {
    float best = -HUGE_VALF;
    u32 at = 0;
    for (u32 i = threadIdx.x % WARP; i < count; i += WARP)
        if (worth[i] > best) best = worth[i], at = i;
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, best, distance);
        const u32 other_at = __shfl_xor_sync(ALL_LANES, at, distance);
        if (other > best || (other == best && other_at < at)) best = other, at = other_at;
    }
    return at;
}

// The experts of a token and their weights, by a warp. `worth` is room for `count` numbers.
__device__ inline void choose(const Router& router, float* scores, float* worth, u32* experts, float* weights) {
    const u32 lane = threadIdx.x % WARP;
    score(router, scores);
    for (u32 i = lane; i < router.count; i += WARP) worth[i] = scores[i] + (router.correction != nullptr ? router.correction[i] : 0.0f);
    __syncwarp();
    float sum = 0.0f;
    for (u32 slot = 0; slot < router.used; ++slot) {
        const u32 best = best_of(worth, router.count);
        sum += scores[best];
        __syncwarp();
        if (lane == 0) {
            experts[slot] = best;
            worth[best] = -HUGE_VALF;
        }
        __syncwarp();
    }
    const float factor = router.scale / (router.normalizes ? sum + LEAST_SUM : 1.0f);
    for (u32 slot = lane; slot < router.used; slot += WARP) weights[slot] = factor * scores[experts[slot]];
}

//   x        f32 [m, n], the residual stream
//   norm     of n channels
//   scores   f32 [m, 2, count]: room for scores, and for what they are worth
//   counter  one u32, zero between launches
//   experts  u32 [m, used], weights f32 [m, used]
//   shares   f32 [m]: sigmoid(share . normed x)
//
// Grid: (ceil((count + 1) / 8), m). Block: 256, a warp for each expert, and one for the share; the
// last block chooses.
extern "C" __global__ void __launch_bounds__(ROUTE_WARPS * WARP)
    route(const float* x, Norm norm, u32 n, Router router, float* scores, u32* counter, u32* experts, float* weights, float* shares) {
    begin_after_previous_kernel();
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, expert = blockIdx.x * ROUTE_WARPS + warp;
    const u32 token = blockIdx.y, count = router.count;
    x += u64(token) * n;
    const Moments moments = moments_of(x, norm, n);
    if (expert < count) {
        const float product = product_with_normed(router.weight + u64(expert) * n, x, moments, norm, n);
        const float bias = router.bias != nullptr ? router.bias[expert] : 0.0f;
        if (lane == 0) scores[u64(token) * 2 * count + expert] = router.sharpness * product + bias;
    } else if (expert == count && router.share != nullptr) {
        const float share = sigmoid(product_with_normed(router.share, x, moments, norm, n));
        if (lane == 0) shares[token] = share;
    }
    if (!is_last_block(counter, gridDim.x * gridDim.y)) return;
    for (u32 i = warp; i < gridDim.y; i += ROUTE_WARPS) {
        float* of_token = scores + u64(i) * 2 * count;
        choose(router, of_token, of_token + count, experts + i * router.used, weights + i * router.used);
    }
}

// ---- products ----

// A layer of all experts: the bands of expert e are first[e] .. first[e + 1]. Their `out` and
// `bias` are nothing.
template <class Matrix>
struct ExpertLayer {
    const Band<Matrix>* bands;
    const u32* first;
};

// A strip of an expert's layer: the band that has it, and which it is there.
template <class Matrix>
struct ExpertStrip {
    Matrix w;
    u32 strip;

    __device__ ExpertStrip(const ExpertLayer<Matrix>& layer, u32 expert, u32 strip) : strip(strip) {
        u32 band = layer.first[expert];
        const u32 last = layer.first[expert + 1] - 1;
        while (band < last && this->strip >= strips_of(layer.bands[band].w)) this->strip -= strips_of(layer.bands[band++].w);
        w = layer.bands[band].w;
    }

    // What the warp's share of the columns gives for the rows of its lane, [tile][row], as outputs.
    // `x`: one token.
    template <u32 TILES>
    __device__ void multiply(float (&out)[TILES][2], const u16* x, u32 first, u32 stride) const {
        LaneSums sums[TILES] = {};
        multiply_strip(sums, w, strip, LaneInputs{x, 0}, first, stride);
        const u32 row = strip * TILES * TILE_ROWS + threadIdx.x % WARP / 4 * 2;
        for (u32 tile = 0; tile < TILES; ++tile)
            for (u32 r = 0; r < 2; ++r) out[tile][r] = (sums[tile][0][2 * r] + sums[tile][1][2 * r]) * row_unit(w, row + tile * TILE_ROWS + r);
    }
};

// The sums of the warps of a block, for each row of a strip.
template <u32 ROWS>
struct WarpSums {
    float of_warp[MATVEC_WARPS][ROWS];

    template <u32 TILES>
    __device__ void put(const float (&sums)[TILES][2]) {
        const u32 lane = threadIdx.x % WARP;
        if (lane % 4 != 0) return;
        for (u32 tile = 0; tile < TILES; ++tile)
            for (u32 r = 0; r < 2; ++r) of_warp[threadIdx.x / WARP][tile * TILE_ROWS + lane / 4 * 2 + r] = sums[tile][r];
    }

    __device__ float of_row(u32 row, u32 first_warp, u32 warps) const {
        float sum = 0.0f;
        for (u32 i = 0; i < warps; ++i) sum += of_warp[first_warp + i][row];
        return sum;
    }
};

// Either the neurons of the chosen experts, by gates and `up`, or what these add to x:
//
//   experts, weights  [m, used], by `route`
//   in                fp16 [m, stride] or, to add, [m, used, stride]; operand order, padding zero
//   neurons           fp16 [m, used, neuron_stride], operand order; null: adds
//   x                 f32 [m, rows]
//
// Grid: (strips of a layer, used, m); to add (strips of a layer, 1, m). Block: 256, half of the
// warps for the gate.
template <class Matrix>
struct ExpertProduct {
    ExpertLayer<Matrix> layer;  // the gate, or what adds
    ExpertLayer<Matrix> up;
    const u32* experts;
    const float* weights;
    const u16* in;
    u16* neurons;
    float* x;
    u32 stride;
    u32 neuron_stride;
    u32 used;
    u32 rows;
    u32 activation;
    float scale;
};
typedef ExpertProduct<PackedMatrix> ExpertPacked;
typedef ExpertProduct<TrellisMatrix> ExpertTrellis;
typedef ExpertProduct<DenseMatrix> ExpertDense;

template <class Matrix>
__device__ inline void experts(const ExpertProduct<Matrix>& args) {
    constexpr u32 TILES = TILES_OF_STRIP<Matrix>, ROWS = TILES * TILE_ROWS;
    begin_after_previous_kernel();
    __shared__ WarpSums<ROWS> sums;
    const bool has_gates = args.neurons != nullptr;
    const u32 token = blockIdx.z, warp = threadIdx.x / WARP, warps = MATVEC_WARPS >> has_gates;
    const u64 choice = u64(token) * args.used + blockIdx.y;
    float total[TILES][2] = {};
    // Of all that are chosen, if they add to the same.
    for (u32 i = 0; i < (has_gates ? 1 : args.used); ++i) {
        const ExpertStrip<Matrix> strip(warp < warps ? args.layer : args.up, args.experts[choice + i], blockIdx.x);
        float out[TILES][2];
        strip.multiply(out, args.in + (has_gates ? token : choice + i) * args.stride, warp % warps, warps);
        for (u32 tile = 0; tile < TILES; ++tile)
            for (u32 r = 0; r < 2; ++r) total[tile][r] += out[tile][r];
    }
    sums.put(total);
    __syncthreads();
    const u32 row = blockIdx.x * ROWS + threadIdx.x;
    if (threadIdx.x >= ROWS || row >= args.rows) return;
    const float sum = sums.of_row(threadIdx.x, 0, warps);
    if (has_gates) {
        const float neuron = activated(args.activation, sum) * sums.of_row(threadIdx.x, warps, warps);
        args.neurons[choice * args.neuron_stride + operand_index(int(row))] = half_from_float(args.weights[choice] * neuron);
    } else {
        args.x[u64(token) * args.rows + row] += args.scale * sum;
    }
}

extern "C" __global__ void __launch_bounds__(MATVEC_WARPS * WARP, 2) experts_packed(ExpertPacked args) { experts(args); }
extern "C" __global__ void __launch_bounds__(MATVEC_WARPS * WARP, 1) experts_trellis(ExpertTrellis args) { experts(args); }
extern "C" __global__ void __launch_bounds__(MATVEC_WARPS * WARP, 2) experts_dense(ExpertDense args) { experts(args); }

// ---- the network beside ----

//   x        fp16 [m, stride]
//   weights  f32 [m]
//
// Grid: (ceil(stride / 256), m). Block: 256.
extern "C" __global__ void __launch_bounds__(256) weigh_rows(u16* x, u32 stride, const float* weights) {
    begin_after_previous_kernel();
    const u32 col = blockIdx.x * 256 + threadIdx.x;
    if (col >= stride) return;
    u16* at = x + u64(blockIdx.y) * stride + col;
    *at = half_from_float(half_to_float(*at) * weights[blockIdx.y]);
}
