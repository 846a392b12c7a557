//! AVX-512 VNNI: a register holds four columns of 16 rows, `vpdpbusd` multiplies and adds them.
#![allow(unsafe_code, reason = "the instruction set is found out at run time")]

use std::arch::x86_64::*;

use super::{
    Kernels, avx2,
    kernel::{Isa, Kernel, instructions, next_lanes, tile_kernels},
};

/// The kernels, if the processor has their instructions.
pub(super) fn detect() -> Option<Kernels> {
    let has = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni");
    // Of a block 256 bits are multiplied at a time.
    let Kernels { blocks, .. } = avx2::detect_vnni().or_else(avx2::detect)?;
    has.then(|| Kernels { tiles: tiles(), blocks })
}

tile_kernels!(
    tiles,
    "avx512f,avx512bw,avx512vnni",
    Kernel::<_, 1>(Avx512(())),
    8: One Two Four Eight
);

/// Made by functions that enable its instructions only.
#[derive(Clone, Copy)]
struct Avx512(());

impl Isa for Avx512 {
    type Words = __m512i;
    type Floats = __m512;

    instructions! {
        load(bytes: &[u8]) -> __m512i = _mm512_loadu_si512(bytes[..64].as_ptr().cast());
        widened(bytes: &[u8]) -> __m512i
            = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes[..16].as_ptr().cast()));
        words(word: i32) -> __m512i = _mm512_set1_epi32(word);
        and(a: __m512i, b: __m512i) -> __m512i = _mm512_and_si512(a, b);
        or(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512(a, b);
        shifted_left(words: __m512i, bits: usize) -> __m512i
            = _mm512_sllv_epi32(words, _mm512_set1_epi32(bits as i32));
        shifted_right(words: __m512i, bits: __m512i) -> __m512i = _mm512_srlv_epi32(words, bits);
        repeated(bytes: &[u8; 16]) -> __m512i
            = _mm512_broadcast_i32x4(_mm_loadu_si128(bytes.as_ptr().cast()));
        looked_up(table: __m512i, indices: __m512i) -> __m512i
            = _mm512_shuffle_epi8(table, indices);
        add(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
        next_lanes(words: __m512i) -> __m512i = {
            const NEXT: [i32; 16] = next_lanes();
            _mm512_permutexvar_epi32(_mm512_loadu_si512(NEXT.as_ptr().cast()), words)
        };
        add_products<WIDTH>(sums: __m512i, codes: __m512i, input: __m512i) -> __m512i
            = _mm512_dpbusd_epi32(sums, codes, input);
        floats(value: f32) -> __m512 = _mm512_set1_ps(value);
        halves(bytes: &[u8]) -> __m512
            = _mm512_cvtph_ps(_mm256_loadu_si256(bytes[..32].as_ptr().cast()));
        converted(words: __m512i) -> __m512 = _mm512_cvtepi32_ps(words);
        sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        load_floats(lanes: &[f32]) -> __m512 = _mm512_loadu_ps(lanes[..16].as_ptr());
        store(values: __m512, lanes: &mut [f32]) = _mm512_storeu_ps(lanes[..16].as_mut_ptr(), values);
        store_words(words: __m512i, bytes: &mut [u8])
            = _mm512_storeu_si512(bytes[..64].as_mut_ptr().cast(), words);
        prefetch(address: *const u8) = _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
}
