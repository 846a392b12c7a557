// What every kernel is written in: fp16 pairs, matrix products of a warp, asynchronous copies,
// reductions.
//
// Compiled twice: by nvcc, where a primitive is the PTX instruction it is named after, and by a
// host compiler for the emulator, where it is the same arithmetic in plain C++. Nothing else in
// this folder knows which.
#pragma once

#ifndef __CUDACC__
#include "emulator/emulator.h"
#endif

typedef unsigned char u8;
typedef unsigned short u16;  // the bits of an fp16 number
typedef unsigned int u32;    // also two fp16 numbers, the first in the low half
typedef unsigned long long u64;

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffff;
constexpr float HALF_MAX = 65504.0f;

// Dynamic shared memory, 16-byte aligned.
#ifdef __CUDACC__
extern __shared__ __align__(16) u8 dynamic_shared[];
#define DYNAMIC_SHARED(name) u8* name = dynamic_shared
#else
#define DYNAMIC_SHARED(name) u8* name = emulator::dynamic_shared()
#endif

struct alignas(16) Vector16 {
    u32 word[4];
};

__device__ inline Vector16 load16(const void* aligned) { return *static_cast<const Vector16*>(aligned); }

// `address`, as one number: the compiler would take a sum apart, to add it up again at each use.
__device__ inline const u8* kept(const u8* address) {
#ifdef __CUDACC__
    asm("" : "+l"(address));
#endif
    return address;
}

// ---- f32 ----

__device__ inline u32 float_bits(float value) {
    u32 bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

__device__ inline float float_from_bits(u32 bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// a * b rounded to f32: the compiler may not fuse it with an addition.
__device__ inline float rounded_product(float a, float b) {
#ifdef __CUDACC__
    return __fmul_rn(a, b);
#else
    const volatile float product = a * b;
    return product;
#endif
}

// ---- fp16 ----

__device__ inline float half_to_float(u16 bits) {
#ifdef __CUDACC__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return emulator::half_to_float(bits);
#endif
}

// Rounds to nearest even; what fp16 cannot hold becomes its largest finite number of that sign.
__device__ inline u16 half_from_float(float value) {
    value = fminf(fmaxf(value, -HALF_MAX), HALF_MAX);
#ifdef __CUDACC__
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    return emulator::half_from_float(value);
#endif
}

// Two numbers within the range of fp16.
__device__ inline u32 half2_from_small_floats(float low, float high) {
#ifdef __CUDACC__
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return u32(emulator::half_from_float(low)) | u32(emulator::half_from_float(high)) << 16;
#endif
}

__device__ inline u32 half2_from_floats(float low, float high) {
    return half2_from_small_floats(fminf(fmaxf(low, -HALF_MAX), HALF_MAX), fminf(fmaxf(high, -HALF_MAX), HALF_MAX));
}

// a * b + c for both halves, rounded once. Subnormal numbers count.
__device__ inline u32 half2_fma(u32 a, u32 b, u32 c) {
#ifdef __CUDACC__
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    return emulator::half2_fma(a, b, c);
#endif
}

// -a for both halves; no instruction where it goes into a half2_fma.
__device__ inline u32 half2_negated(u32 a) {
#ifdef __CUDACC__
    u32 d;
    asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(a));
    return d;
#else
    return a ^ 0x80008000;
#endif
}

// Byte i of the result is byte n of b:a (0 to 3: of a), n the i-th hexadecimal digit of `selector`
// from the right.
__device__ inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
#ifdef __CUDACC__
    return __byte_perm(a, b, selector);
#else
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) result |= u32(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
#endif
}

// The same, but digit 8 + n stands for the sign of byte n, in all 8 bits.
__device__ inline u32 permute_bytes_and_signs(u32 a, u32 b, u32 selector) {
#ifdef __CUDACC__
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
    return result;
#else
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 byte = permute_bytes(a, b, selector >> 4 * i & 7) & 255;
        const bool is_sign = selector >> 4 * i & 8;
        result |= (!is_sign ? byte : byte & 128 ? 255 : 0) << 8 * i;
    }
    return result;
#endif
}

// ---- products of a warp ----

// c[16 rows, 8 columns] += a[16 rows, 16] * b[16, 8 columns]: fp16 in, fp32 sums. With g = lane / 4
// and q = lane % 4, a lane holds of a: rows g (a[0], a[2]) and g + 8 (a[1], a[3]), at 2q, 2q + 1
// (a[0], a[1]) and 2q + 8, 2q + 9 (a[2], a[3]); of b: column g at 2q, 2q + 1 (b0) and 2q + 8, 2q +
// 9 (b1); of c: columns 2q, 2q + 1 of row g (c[0], c[1]) and of row g + 8 (c[2], c[3]). PTX:
// mma.m16n8k16.
__device__ inline void mma_16x8x16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    emulator::mma_16x8x16(c, a0, a1, a2, a3, b0, b1);
#endif
}

// The same for a[16 rows, 8] * b[8, 8 columns], without a[2], a[3] and b1. PTX: mma.m16n8k8.
__device__ inline void mma_16x8x8(float (&c)[4], u32 a0, u32 a1, u32 b0) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
#else
    emulator::mma_16x8x16(c, a0, a1, 0, 0, b0, 0);
#endif
}

// Four matrices of 8 rows of 8 fp16 numbers from shared memory: row r of matrix i is the 16 bytes
// that lane 8i + r points to. With g = lane / 4 and q = lane % 4, out[i] is what row g of matrix i
// holds at 2q, 2q + 1, or TRANSPOSED what its column g does. PTX: ldmatrix.m8n8.x4.
template <bool TRANSPOSED>
__device__ inline void load_matrices(u32 (&out)[4], const void* row) {
#ifdef __CUDACC__
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(row));
    if (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(address)
                     : "memory");
    }
#else
    const int g = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) {
        const auto half = [row, i](int r, int col) {
            return u32(__shfl_sync(ALL_LANES, static_cast<const u16*>(row), 8 * i + r)[col]);
        };
        out[i] = TRANSPOSED ? half(2 * q, g) | half(2 * q + 1, g) << 16 : half(g, 2 * q) | half(g, 2 * q + 1) << 16;
    }
#endif
}

// One such matrix, transposed; row r is what lane r of the first 8 points to. PTX:
// ldmatrix.m8n8.x1.
__device__ inline u32 load_matrix_transposed(const void* row) {
#ifdef __CUDACC__
    u32 out;
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(out) : "r"(address) : "memory");
    return out;
#else
    const int g = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
    const auto half = [row](int r, int col) { return u32(__shfl_sync(ALL_LANES, static_cast<const u16*>(row), r)[col]); };
    const u32 low = half(2 * q, g);
    return low | half(2 * q + 1, g) << 16;
#endif
}

// ---- asynchronous copies ----

// Copies 16 bytes from global to shared memory, past the registers and the L1 cache.
__device__ inline void copy16_async(void* shared, const void* global) {
#ifdef __CUDACC__
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
    *static_cast<Vector16*>(shared) = load16(global);
#endif
}

// Closes a batch of copies of this thread.
__device__ inline void copy_async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's batches are under way.
template <int PENDING>
__device__ inline void copy_async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// The same for 1 or 2, known at run time.
__device__ inline void copy_async_wait_but(u32 pending) {
#ifdef __CUDACC__
    asm volatile(
        "{ .reg .pred p; setp.eq.u32 p, %0, 1;\n"
        "@p cp.async.wait_group 1;\n"
        "@!p cp.async.wait_group 2; }" ::"r"(pending)
        : "memory");
#else
    (void)pending;
#endif
}

// Asks for the line of global memory that holds an address, to be in the L2 cache later.
__device__ inline void prefetch_to_l2(const void* global) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#else
    (void)global;
#endif
}

// ---- kernels one behind the other ----

// Where the card and its driver can, every kernel starts while the one before it ends: `device.rs`
// then turns these comments into the instructions that they name. So every kernel must wait before
// it reads what an earlier one has written, and before it writes anything; and no warp may leave
// before it has waited, or the next kernel would take those before this one to have ended, too.
// What a kernel asks for before must be weights.
__device__ inline void wait_for_previous_kernel() {
#ifdef __CUDACC__
    asm volatile("//sm_90: griddepcontrol.wait;" ::: "memory");
#endif
}

// The blocks of the next kernel may start as soon as all of this one have, and have room.
__device__ inline void let_next_kernel_start() {
#ifdef __CUDACC__
    asm volatile("//sm_90: griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What kernels begin with that have nothing to do before.
__device__ inline void begin_after_previous_kernel() {
    let_next_kernel_start();
    wait_for_previous_kernel();
}

// ---- some threads of a block ----

// Waits for THREADS threads (whole warps) that name the same barrier; 0 is the whole block's.
template <u32 BARRIER, u32 THREADS>
__device__ inline void sync_threads_of() {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "n"(THREADS) : "memory");
#else
    emulator::synchronize(BARRIER, THREADS);
#endif
}

// ---- arithmetic ----

// 2^x to 2 units in the last place; 0 below 2^-126.
__device__ inline float exp2_flushed(float x) {
#ifdef __CUDACC__
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#else
    return exp2f(x);
#endif
}

// c * tanh(x / c).
__device__ inline float capped(float x, float c) { return c - 2.0f * c / (1.0f + exp2_flushed(2.88539008f / c * x)); }

// ---- reductions ----

__device__ inline float warp_sum(float value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value += __shfl_xor_sync(ALL_LANES, value, distance);
    return value;
}

__device__ inline float warp_max(float value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, distance));
    return value;
}

// The sum over a block of up to 1024 threads (whole warps), the same for every thread. All threads
// must call.
__device__ inline float block_sum(float value) {
    __shared__ float partial[WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    value = warp_sum(value);
    __syncthreads();  // the last call's sums have been read
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    return warp_sum(lane < int(blockDim.x) / WARP ? partial[lane] : 0.0f);
}

// Adds one to a counter and gives what it was. What this thread knows to be written, by other
// threads of its block before a barrier, too, is seen by whoever counts later, and by those who
// meet them at a barrier: one fence in place of one for each thread, which would empty the cache of
// the blocks beside this one.
__device__ inline u32 count_block(u32* counter) {
#ifdef __CUDACC__
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
#else
    return emulator::add_one(counter);
#endif
}

// Whether this block is the last of `blocks` to get here; it then sees what the others wrote
// before. All threads must call. `counter` starts at zero and is zero again afterwards.
__device__ inline bool is_last_block(u32* counter, u32 blocks) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = count_block(counter) == blocks - 1;
        if (is_last) *counter = 0;
    }
    __syncthreads();
    return is_last;
}

// ---- operand order ----

// Inputs of matrix products lie in fp16, and of each four columns 0 1 2 3 in the order 0 2 1 3: the
// order in which `(word >> shift) & 0x00ff00ff` yields codes. Rows are `operand_stride` numbers
// apart; the padding is zero.
__device__ inline int operand_index(int col) { return (col & ~3) | (col & 1) << 1 | (col >> 1 & 1); }

struct alignas(8) Float2 {
    float value[2];
};

struct alignas(16) Float4 {
    float value[4];
};

__device__ inline Float4 load_floats(const float* aligned) { return *reinterpret_cast<const Float4*>(aligned); }

// Four columns, the first a multiple of four, to their places at `out`: 8 bytes, aligned.
__device__ inline void store_operands(u16* out, const Float4& x) {
    const u64 even = half2_from_floats(x.value[0], x.value[2]), odd = half2_from_floats(x.value[1], x.value[3]);
    *reinterpret_cast<u64*>(out) = even | odd << 32;
}
