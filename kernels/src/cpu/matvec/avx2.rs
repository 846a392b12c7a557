//! AVX2, alone or with AVX-VNNI: a register holds four columns of 8 rows, which `vpmaddubsw`
//! multiplies, or `vpdpbusd` multiplies and adds.
#![allow(unsafe_code, reason = "the instruction set is found out at run time")]

use std::arch::x86_64::*;

use super::{
    Kernels,
    blocks::BlockIsa,
    kernel::{Isa, Kernel, block_kernels, instructions, next_lanes, tile_kernels},
};

/// The kernels, if the processor has their instructions.
pub(super) fn detect() -> Option<Kernels> {
    let has = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    has.then(|| Kernels { tiles: tiles(), blocks: blocks() })
}

/// Those with AVX-VNNI.
pub(super) fn detect_vnni() -> Option<Kernels> {
    let has = detect().is_some() && is_x86_feature_detected!("avxvnni");
    has.then(|| Kernels { tiles: vnni_tiles(), blocks: vnni_blocks() })
}

tile_kernels!(tiles, "avx2,fma,f16c", Kernel::<_, 2>(Avx2::<false>(())), 1: One);
block_kernels!(blocks, "avx2,fma,f16c", Kernel::<_, 1>(Avx2::<false>(())));
tile_kernels!(vnni_tiles, "avx2,fma,f16c,avxvnni", Kernel::<_, 2>(Avx2::<true>(())), 1: One);
block_kernels!(vnni_blocks, "avx2,fma,f16c,avxvnni", Kernel::<_, 1>(Avx2::<true>(())));

/// Made by functions that enable its instructions only.
#[derive(Clone, Copy)]
struct Avx2<const HAS_VNNI: bool>(());

impl<const HAS_VNNI: bool> Isa for Avx2<HAS_VNNI> {
    type Words = __m256i;
    type Floats = __m256;

    instructions! {
        load(bytes: &[u8]) -> __m256i = _mm256_loadu_si256(bytes[..32].as_ptr().cast());
        widened(bytes: &[u8]) -> __m256i
            = _mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes[..8].as_ptr().cast()));
        words(word: i32) -> __m256i = _mm256_set1_epi32(word);
        and(a: __m256i, b: __m256i) -> __m256i = _mm256_and_si256(a, b);
        or(a: __m256i, b: __m256i) -> __m256i = _mm256_or_si256(a, b);
        shifted_left(words: __m256i, bits: usize) -> __m256i
            = _mm256_sllv_epi32(words, _mm256_set1_epi32(bits as i32));
        shifted_right(words: __m256i, bits: __m256i) -> __m256i = _mm256_srlv_epi32(words, bits);
        repeated(bytes: &[u8; 16]) -> __m256i
            = _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast()));
        looked_up(table: __m256i, indices: __m256i) -> __m256i
            = _mm256_shuffle_epi8(table, indices);
        add(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi32(a, b);
        next_lanes(words: __m256i) -> __m256i = {
            const NEXT: [i32; 8] = next_lanes();
            _mm256_permutevar8x32_epi32(words, _mm256_loadu_si256(NEXT.as_ptr().cast()))
        };
        add_products<WIDTH>(sums: __m256i, codes: __m256i, input: __m256i) -> __m256i
            = match HAS_VNNI {
                true => _mm256_dpbusd_avx_epi32(sums, codes, input),
                false => add_products_in_halves::<WIDTH>(sums, codes, input),
            };
        totals<WIDTH>(sums: __m256i) -> __m256i
            = match WIDTH {
                1..=4 if !HAS_VNNI => _mm256_madd_epi16(sums, _mm256_set1_epi16(1)),
                _ => sums,
            };
        floats(value: f32) -> __m256 = _mm256_set1_ps(value);
        halves(bytes: &[u8]) -> __m256
            = _mm256_cvtph_ps(_mm_loadu_si128(bytes[..16].as_ptr().cast()));
        converted(words: __m256i) -> __m256 = _mm256_cvtepi32_ps(words);
        sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        mul_add(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        load_floats(lanes: &[f32]) -> __m256 = _mm256_loadu_ps(lanes[..8].as_ptr());
        store(values: __m256, lanes: &mut [f32]) = _mm256_storeu_ps(lanes[..8].as_mut_ptr(), values);
        store_words(words: __m256i, bytes: &mut [u8])
            = _mm256_storeu_si256(bytes[..32].as_mut_ptr().cast(), words);
        prefetch(address: *const u8) = _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
}

impl<const HAS_VNNI: bool> BlockIsa for Avx2<HAS_VNNI> {
    instructions! {
        // The sign of a code goes to the input, which is never -128.
        add_signed_products(sums: __m256i, codes: __m256i, input: __m256i) -> __m256i
            = {
                let (codes, input) = (_mm256_abs_epi8(codes), _mm256_sign_epi8(input, codes));
                match HAS_VNNI {
                    true => _mm256_dpbusd_avx_epi32(sums, codes, input),
                    false => add_products_in_halves::<7>(sums, codes, input),
                }
            };
        half(bytes: [u8; 2]) -> __m256
            = _mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes(bytes)));
    }
}

/// Adds products in 16 bits, where the largest ones fit: for up to 4 bits, those of a step to
/// 16-bit sums (of 8 products each, at most 8 * 2 * 15 * 127 = 30,480); for up to 7 bits, and for
/// the absolute values of signed bytes, two products are at most 2 * 128 * 127 = 32,512; 8 bits
/// need two halves.
#[inline]
#[target_feature(enable = "avx2")]
fn add_products_in_halves<const WIDTH: usize>(
    sums: __m256i,
    codes: __m256i,
    input: __m256i,
) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    match WIDTH {
        1..=4 => _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, input)),
        5..=7 => {
            let pairs = _mm256_maddubs_epi16(codes, input);
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, ones))
        }
        _ => {
            let fields = _mm256_set1_epi8(15);
            let low = _mm256_maddubs_epi16(_mm256_and_si256(codes, fields), input);
            let high = _mm256_and_si256(_mm256_srli_epi32::<4>(codes), fields);
            let high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, input), _mm256_set1_epi16(16));
            _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_madd_epi16(low, ones), high))
        }
    }
}
