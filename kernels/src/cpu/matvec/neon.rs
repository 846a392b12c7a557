//! NEON with the dot products of Armv8.2: a register holds four columns of 4 rows, `sdot`
//! multiplies and adds them.
#![allow(
    unsafe_code,
    reason = "the instruction set is found out at run time, and `sdot` has no stable intrinsic"
)]

use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};

use super::{
    Kernels,
    blocks::BlockIsa,
    kernel::{Isa, Kernel, block_kernels, instructions, next_lanes, tile_kernels},
};

/// The kernels, if the processor has their instructions.
pub(super) fn detect() -> Option<Kernels> {
    let has = is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod");
    has.then(|| Kernels { tiles: tiles(), blocks: blocks() })
}

tile_kernels!(tiles, "neon,dotprod", Kernel::<_, 4>(Neon(())), 1: One);
block_kernels!(blocks, "neon,dotprod", Kernel::<_, 2>(Neon(())));

/// Made by functions that enable its instructions only.
#[derive(Clone, Copy)]
struct Neon(());

// Asking for codes ahead is left to the processor: there was none to measure it on.
#[allow(unused_unsafe, reason = "most of these instructions are in every aarch64 target")]
impl Isa for Neon {
    type Words = uint32x4_t;
    type Floats = float32x4_t;

    instructions! {
        load(bytes: &[u8]) -> uint32x4_t = vreinterpretq_u32_u8(vld1q_u8(bytes[..16].as_ptr()));
        widened(bytes: &[u8]) -> uint32x4_t = {
            let bytes = *bytes.first_chunk().expect("4 bytes");
            let bytes = vcreate_u8(u32::from_le_bytes(bytes).into());
            vmovl_u16(vget_low_u16(vmovl_u8(bytes)))
        };
        words(word: i32) -> uint32x4_t = vdupq_n_u32(word.cast_unsigned());
        and(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t = vandq_u32(a, b);
        or(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t = vorrq_u32(a, b);
        shifted_left(words: uint32x4_t, bits: usize) -> uint32x4_t
            = vshlq_u32(words, vdupq_n_s32(bits as i32));
        shifted_right(words: uint32x4_t, bits: uint32x4_t) -> uint32x4_t
            = vshlq_u32(words, vnegq_s32(vreinterpretq_s32_u32(bits)));
        repeated(bytes: &[u8; 16]) -> uint32x4_t = vreinterpretq_u32_u8(vld1q_u8(bytes.as_ptr()));
        looked_up(table: uint32x4_t, indices: uint32x4_t) -> uint32x4_t = {
            let (table, indices) = (vreinterpretq_u8_u32(table), vreinterpretq_u8_u32(indices));
            vreinterpretq_u32_u8(vqtbl1q_u8(table, indices))
        };
        add(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t = vaddq_u32(a, b);
        next_lanes(words: uint32x4_t) -> uint32x4_t = {
            const NEXT: [i32; 4] = next_lanes();
            // Four bytes of each lane.
            let lanes = NEXT.map(|lane| 0x0302_0100 + 0x0404_0404 * lane);
            let (words, lanes) = (vreinterpretq_u8_u32(words), vld1q_s32(lanes.as_ptr()));
            vreinterpretq_u32_u8(vqtbl1q_u8(words, vreinterpretq_u8_s32(lanes)))
        };
        add_products<WIDTH>(sums: uint32x4_t, codes: uint32x4_t, input: uint32x4_t) -> uint32x4_t
            = match WIDTH {
                1..=7 => add_signed_products(sums, codes, input),
                // A code above 127 is no signed byte: it is twice its upper 7 bits and its last
                // one.
                _ => {
                    let upper = vandq_u32(vshrq_n_u32::<1>(codes), vdupq_n_u32(0x7f7f_7f7f));
                    let last = vandq_u32(codes, vdupq_n_u32(0x0101_0101));
                    let sums = add_signed_products(sums, upper, input);
                    add_signed_products(add_signed_products(sums, upper, input), last, input)
                }
            };
        floats(value: f32) -> float32x4_t = vdupq_n_f32(value);
        halves(bytes: &[u8]) -> float32x4_t
            = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(bytes[..8].as_ptr())));
        converted(words: uint32x4_t) -> float32x4_t = vcvtq_f32_s32(vreinterpretq_s32_u32(words));
        sub(a: float32x4_t, b: float32x4_t) -> float32x4_t = vsubq_f32(a, b);
        mul(a: float32x4_t, b: float32x4_t) -> float32x4_t = vmulq_f32(a, b);
        mul_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t = vfmaq_f32(c, a, b);
        load_floats(lanes: &[f32]) -> float32x4_t = vld1q_f32(lanes[..4].as_ptr());
        store(values: float32x4_t, lanes: &mut [f32]) = vst1q_f32(lanes[..4].as_mut_ptr(), values);
        store_words(words: uint32x4_t, bytes: &mut [u8])
            = vst1q_u8(bytes[..16].as_mut_ptr(), vreinterpretq_u8_u32(words));
    }
}

#[allow(unused_unsafe, reason = "most of these instructions are in every aarch64 target")]
impl BlockIsa for Neon {
    instructions! {
        add_signed_products(sums: uint32x4_t, codes: uint32x4_t, input: uint32x4_t) -> uint32x4_t
            = add_signed_products(sums, codes, input);
        half(bytes: [u8; 2]) -> float32x4_t
            = vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(u16::from_le_bytes(bytes))));
    }
}

/// Adds the products of four signed bytes a word.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add_signed_products(mut sums: uint32x4_t, a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
    // SAFETY: the function enables this instruction, which reads and writes these registers and
    // nothing else.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}
