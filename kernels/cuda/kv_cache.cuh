// The keys and values of one transformer block, and how its rows are stored.
//
// A row is head_dim numbers of one kv head at one position: `[kv_heads, capacity, head_dim]`.
// head_dim is a multiple of 8, at most 256.
#pragma once

#include "primitives.cuh"

constexpr u32 MAX_HEAD_DIM = 256;

// Where the running maximum of scores begins: below every score, and yet a number, so that
// 2^(-inf - LOWEST_SCORE) is 0 and 2^(LOWEST_SCORE - LOWEST_SCORE) is 1.
constexpr float LOWEST_SCORE = -1e30f;

// What a query sees, and what products with keys become: scores, which are logarithms to base 2.
struct Scores {
    u32 window;  // positions, the query's own included; 0: all
    float scale;
    float cap;  // 0: none
};

struct KvCache {
    void* keys;           // 16-byte aligned
    void* values;
    float* key_scales;    // [kv_heads, capacity] where rows are of 8-bit codes
    float* value_scales;
    u32 capacity;  // positions
    u32 kv_heads;
    u32 head_dim;
    u32 unused;
};

// Rows of fp16 numbers.
struct HalfRows {
    static constexpr bool HAS_SCALES = false;
    typedef Vector16 Eight;

    // Eight numbers from `index`, a multiple of eight.
    __device__ static Eight load8(const void* rows, u64 index) { return load16(static_cast<const u16*>(rows) + index); }

    // As fp16, to be multiplied by the row's scale.
    __device__ static Vector16 halves(const Eight& eight) { return eight; }

    __device__ static float scale(const float*, u64) { return 1.0f; }

    // Eight numbers to shared memory; there after the next copy_async_wait and barrier.
    __device__ static void copy8(u16* shared, const void* rows, u64 index, float) {
        copy16_async(shared, static_cast<const u16*>(rows) + index);
    }

    // `largest` is the largest magnitude of the row.
    __device__ static void store(void* rows, u64 index, float number, float) {
        static_cast<u16*>(rows)[index] = half_from_float(number);
    }

    __device__ static void store_scale(float*, u64, float) {}
};

// Rows of 8-bit codes and a scale: number = scale * code, scale = max |number| / 127.
struct CodeRows {
    static constexpr bool HAS_SCALES = true;
    typedef u64 Eight;

    __device__ static Eight load8(const void* rows, u64 index) {
        return *reinterpret_cast<const u64*>(static_cast<const u8*>(rows) + index);
    }

    __device__ static Vector16 halves(Eight codes) {
        constexpr u32 ONE = 0x3c003c00, MINUS_1152 = 0xe480e480;
        Vector16 halves;
        for (u32 i = 0; i < 2; ++i) {
            // 0x6400 | code + 128 is the fp16 number 1024 + 128 + code.
            const u32 word = u32(codes >> (32 * i)) ^ 0x80808080;
            halves.word[2 * i] = half2_fma(permute_bytes(word, 0x64646464, 0x4140), ONE, MINUS_1152);
            halves.word[2 * i + 1] = half2_fma(permute_bytes(word, 0x64646464, 0x4342), ONE, MINUS_1152);
        }
        return halves;
    }

    __device__ static float scale(const float* scales, u64 row) { return scales[row]; }

    __device__ static void copy8(u16* shared, const void* rows, u64 index, float scale) {
        Vector16 x = halves(load8(rows, index));
        for (u32& pair : x.word)
            pair = half2_from_floats(half_to_float(u16(pair)) * scale, half_to_float(u16(pair >> 16)) * scale);
        *reinterpret_cast<Vector16*>(shared) = x;
    }

    __device__ static void store(void* rows, u64 index, float number, float largest) {
        // The quotient first: 127 / largest may be infinite.
        const float code = largest > 0.0f ? rintf(number / largest * 127.0f) : 0.0f;
        static_cast<signed char*>(rows)[index] = static_cast<signed char>(code);
    }

    __device__ static void store_scale(float* scales, u64 row, float largest) { scales[row] = largest / 127.0f; }
};
