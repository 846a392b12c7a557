// The k largest of n logits, largest first; of equal ones the lower index first.
//
// A logit becomes a *key*, one 64-bit number, larger the earlier the logit comes in the result. A
// block picks the k largest keys of its stretch, the last block to finish picks among those of all
// blocks.
//
//   logits   f32 [n]; NaN counts as the largest, -0 as 0
//   partial  u64 [gridDim.x, k]: scratch
//   counter  one u32, zero between launches
//   tokens   u32 [k]: indices; 0xffffffff past the n-th
//   values   f32 [k]: the logits there; -inf past the n-th
//
// Grid: any number of blocks; min(ceil(n / 2048), 64) is meant. Block: 1024 threads. No dynamic
// shared memory (32 KiB static). k is 1 to 128, n at most 2^26.

#include "primitives.cuh"

constexpr u32 TOP_K_THREADS = 1024;
// Keys that a block looks at together: the 40 largest of 64 blocks go in at once.
constexpr u32 TOP_K_KEYS = 4096;

// Below the key of every logit: index 0xffffffff, logit -inf.
constexpr u64 NO_KEY = 0x007fffff00000000;

__device__ inline u64 key_of(float logit, u32 index) {
    const u32 bits = float_bits(logit + 0.0f);  // -0 + 0 = 0
    u32 order = bits >> 31 ? ~bits : bits | 0x80000000;
    if (logit != logit) order = 0xffffffff;
    return u64(order) << 32 | ~index;
}

__device__ inline u32 index_of(u64 key) { return ~u32(key); }

__device__ inline float logit_of(u64 key) {
    const u32 order = u32(key >> 32);
    return float_from_bits(order >> 31 ? order & 0x7fffffff : ~order);
}

// Waits for the threads that share runs of `run` keys: two for each thread, so up to 64 they are of
// one warp.
__device__ inline void synchronize_runs(u32 run) {
    if (run > 2 * WARP) {
        __syncthreads();
    } else {
        __syncwarp();
    }
}

// Of each pair of keys i and i ^ mask puts the larger first. `distance` is the highest bit of the
// mask.
__device__ inline void order_pairs(u64* keys, u32 count, u32 distance, u32 mask, u32 run) {
    for (u32 pair = threadIdx.x; pair < count / 2; pair += TOP_K_THREADS) {
        const u32 i = 2 * pair - (pair & (distance - 1)), j = i ^ mask;
        const u64 a = keys[i], b = keys[j];
        if (a < b) {
            keys[i] = b;
            keys[j] = a;
        }
    }
    synchronize_runs(run);
}

// Sorts sequences of `size` keys, largest first, that rise and then fall or fall and then rise: a
// bitonic merge.
__device__ inline void sort_bitonic(u64* keys, u32 count, u32 size, u32 run) {
    for (u32 distance = size / 2; distance > 0; distance /= 2) order_pairs(keys, count, distance, distance, run);
}

// Brings the `run` largest of `count` keys to the front, largest first. Both are powers of two.
__device__ inline void select_largest(u64* keys, u32 count, u32 run) {
    __syncthreads();
    for (u32 size = 2; size <= run; size *= 2) {
        order_pairs(keys, count, size / 2, size - 1, run);
        sort_bitonic(keys, count, size / 2, run);
    }
    // Of two sorted runs, one mirrored, the larger keys of all pairs are the largest `run` keys: a
    // bitonic sequence.
    while (count > run) {
        __syncthreads();
        count /= 2;
        for (u32 i = threadIdx.x; i < count; i += TOP_K_THREADS) keys[i] = max(keys[i], keys[count + (i ^ (run - 1))]);
        __syncthreads();
        sort_bitonic(keys, count, run, run);
    }
    __syncthreads();
}

__device__ inline u32 power_of_two_from(u32 n) {
    u32 power = 1;
    while (power < n) power *= 2;
    return power;
}

// Brings the k largest of key_at(begin) .. key_at(end - 1) to the front of `keys`, largest first.
template <class KeyAt>
__device__ inline void keep_largest(u64* keys, u32 k, u32 begin, u32 end, KeyAt key_at) {
    const u32 run = power_of_two_from(k);
    u32 kept = 0;
    do {
        const u32 filled = kept + min(end - begin, TOP_K_KEYS - kept);
        const u32 count = max(power_of_two_from(filled), run);
        for (u32 i = kept + threadIdx.x; i < count; i += TOP_K_THREADS)
            keys[i] = i < filled ? key_at(begin + i - kept) : NO_KEY;
        select_largest(keys, count, run);
        begin += filled - kept;
        kept = run;
    } while (begin < end);
}

extern "C" __global__ void __launch_bounds__(TOP_K_THREADS)
    top_k(const float* logits, u32 n, u32 k, u64* partial, u32* counter, u32* tokens, float* values) {
    begin_after_previous_kernel();
    __shared__ u64 keys[TOP_K_KEYS];
    const u32 stretch = (n + gridDim.x - 1) / gridDim.x;
    const u32 begin = min(blockIdx.x * stretch, n), end = min(begin + stretch, n);
    keep_largest(keys, k, begin, end, [=](u32 i) { return key_of(logits[i], i); });
    if (threadIdx.x < k) partial[blockIdx.x * k + threadIdx.x] = keys[threadIdx.x];

    if (!is_last_block(counter, gridDim.x)) return;
    keep_largest(keys, k, 0, gridDim.x * k, [=](u32 i) { return partial[i]; });
    if (threadIdx.x < k) {
        tokens[threadIdx.x] = index_of(keys[threadIdx.x]);
        values[threadIdx.x] = logit_of(keys[threadIdx.x]);
    }
}
