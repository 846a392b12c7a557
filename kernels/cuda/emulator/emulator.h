// CUDA's language on a host compiler, for tests without a GPU: one fiber per thread, blocks shared
// out among the cores.
//
// It shows wrong results, reads out of bounds and threads that wait for each other for ever. It
// shows no races, no bank conflicts and no speed: those need a card.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include <math.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __restrict__
// One block runs on an operating system thread at a time.
#define __shared__ static thread_local

struct uint3 {
    unsigned x, y, z;
};

namespace emulator {

struct Thread {
    uint3 thread_index, block_index, block_size, grid_size;
};

// The thread that runs now, on this core.
extern __thread Thread* running;
inline Thread& thread() { return *running; }

unsigned char* dynamic_shared();

// Runs `kernel` for every thread of a grid, and returns when all have.
void launch(uint3 grid, uint3 block, size_t shared_bytes, const std::function<void()>& kernel);

// Waits for all threads of the block that have not returned.
void synchronize_block();

// Waits until `threads` threads of the block have come to barrier `barrier`, one of 16.
void synchronize(unsigned barrier, unsigned threads);

// Waits for all 32 lanes of the warp, each of which brings `bytes` bytes (64 at most); lane i's are
// at result + 64 * i until the warp's exchange after the next.
const unsigned char* exchange(const void* mine, size_t bytes);

// By hand: a compiler that may not assume F16C calls a slow function.
inline float half_to_float(unsigned short bits) {
    const unsigned exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 0) return (bits >> 15 ? -0x1p-24f : 0x1p-24f) * float(mantissa);
    const unsigned wide = (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13 | unsigned(bits >> 15) << 31;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline unsigned short half_from_float(float value) {
    const _Float16 half = _Float16(value);
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

inline unsigned half2_fma(unsigned a, unsigned b, unsigned c) {
    unsigned result = 0;
    for (int i = 0; i < 2; ++i) {
        const auto at = [i](unsigned pair) { return double(half_to_float((unsigned short)(pair >> (16 * i)))); };
        // The product is exact in double, and so is the sum, unless it is too large for fp16
        // anyway: rounded once.
        const _Float16 half = _Float16(at(a) * at(b) + at(c));
        unsigned short bits;
        std::memcpy(&bits, &half, 2);
        result |= unsigned(bits) << (16 * i);
    }
    return result;
}

inline unsigned add_one(unsigned* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL); }

void mma_16x8x16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1);

template <class T>
T shuffle(T value, unsigned lane_from) {
    const unsigned char* all = exchange(&value, sizeof value);
    T result;
    std::memcpy(&result, all + 64 * (lane_from % 32), sizeof result);
    return result;
}

}  // namespace emulator

#define threadIdx (emulator::thread().thread_index)
#define blockIdx (emulator::thread().block_index)
#define blockDim (emulator::thread().block_size)
#define gridDim (emulator::thread().grid_size)

inline void __syncthreads() { emulator::synchronize_block(); }
inline void __syncwarp(unsigned = 0xffffffff) { emulator::exchange(nullptr, 0); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulator::shuffle(value, unsigned(lane));
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulator::shuffle(value, threadIdx.x % 32 ^ unsigned(mask));
}

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}

template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}

inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
