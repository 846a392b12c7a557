//! Codes times 8-bit inputs with AVX2: a register holds four columns of 8 rows, `vpmaddubsw` multiplies them.
#![allow(unsafe_code, reason = "the instruction set is found out at run time")]

use std::{arch::x86_64::*, ops::Range};

use slim_formats::slim::{PackedTensor, ScaleCoding, TILE_ROWS};

use super::{
    AHEAD_BYTES, TileKernel,
    input::{FINE, Input, Step, Units},
    next, run_units,
};
use crate::cpu::unpack::{Lanes, Planes, UNIT, for_width, zero_points};

/// The kernel, if the processor has its instructions.
pub(super) fn detect() -> Option<TileKernel> {
    let has = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    // SAFETY: the processor has what `tile` enables.
    has.then_some(|packed, index, input| unsafe { tile(packed, index, input) })
}

/// A word or f32 for each of the 16 rows: the first 8, and the others.
type Words = [__m256i; 2];
type Floats = [__m256; 2];

#[target_feature(enable = "avx2,fma,f16c")]
fn tile(packed: PackedTensor<'_>, tile: usize, input: &Input) -> Lanes {
    let layout = packed.layout();
    let (codes, records) = (packed.tile_codes(tile), packed.tile_scales(tile));
    let mut sums = Sums { scaled: [_mm256_setzero_ps(); 2], shifted: [_mm256_setzero_ps(); 2] };
    for group in layout.groups() {
        let codes = &codes[group.codes_offset..][..group.code_bytes()];
        let records = &records[group.scales_offset..];
        let input = input.of(group.cols.start / UNIT..group.cols.end / UNIT);
        for_width!(group.bit_width, add_group(&mut sums, codes, layout.coding(), records, input));
    }
    let (mut d, mut m) = ([_mm256_set1_ps(1.0); 2], [_mm256_set1_ps(1.0); 2]);
    if let [stored_d, stored_m] = packed.tile_row_scales(tile).as_chunks::<32>().0 {
        (d, m) = (halves(stored_d), halves(stored_m));
    }
    let mut lanes = [[0f32; 8]; 2];
    for half in 0..2 {
        let shifted = _mm256_mul_ps(m[half], sums.shifted[half]);
        lanes[half] = bytemuck::cast(_mm256_fmsub_ps(d[half], sums.scaled[half], shifted));
    }
    bytemuck::cast(lanes)
}

/// Sums over the runs so far: factor times code times input, and minimum times input.
struct Sums {
    scaled: Floats,
    shifted: Floats,
}

/// Adds the runs of a group: `codes` are its bytes, `records` starts with those of its scales.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_group<const WIDTH: usize>(
    sums: &mut Sums,
    codes: &[u8],
    coding: ScaleCoding,
    mut records: &[u8],
    input: Units<'_>,
) {
    let planes = Planes::of::<WIDTH>(codes);
    let Sums { mut scaled, mut shifted } = *sums;
    let mut ahead = codes.as_ptr().wrapping_add(AHEAD_BYTES);
    let (units, mut unit) = (input.codes.len(), 0);
    while unit < units {
        let (factor, minimum) = match coding {
            ScaleCoding::TwoLevel { scale_bits: 6, .. } => six_bit_scales(next(&mut records)),
            ScaleCoding::TwoLevel { .. } => four_bit_scales(next(&mut records)),
            ScaleCoding::Paper => paper_scales::<WIDTH>(records),
        };
        let end = units.min(unit + run_units(coding, units));
        while unit < end {
            for _ in 0..WIDTH {
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                ahead = ahead.wrapping_add(64);
            }
            let step = unit..end.min(unit + 2);
            let Step { scale, sum, has_fine_codes } = input.steps[unit];
            let mut dots = step_products::<WIDTH>(planes, step.clone(), input.codes);
            if has_fine_codes {
                let rest = step_products::<WIDTH>(planes, step.clone(), input.fine_codes);
                for half in 0..2 {
                    dots[half] = _mm256_fmadd_ps(rest[half], _mm256_set1_ps(FINE), dots[half]);
                }
            }
            for half in 0..2 {
                let dots = _mm256_mul_ps(dots[half], _mm256_set1_ps(scale));
                scaled[half] = _mm256_fmadd_ps(factor[half], dots, scaled[half]);
                shifted[half] = _mm256_fmadd_ps(minimum[half], _mm256_set1_ps(sum), shifted[half]);
            }
            unit = step.end;
        }
    }
    *sums = Sums { scaled, shifted };
}

/// The products of a step of one unit or two.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn step_products<const WIDTH: usize>(
    planes: Planes<'_>,
    units: Range<usize>,
    input: &[[i32; 4]],
) -> Floats {
    let (first, last) = (units.start, units.end - 1);
    let mut dots = add_unit::<WIDTH>([_mm256_setzero_si256(); 2], planes, first, &input[first]);
    if first < last {
        dots = add_unit::<WIDTH>(dots, planes, last, &input[last]);
    }
    [_mm256_cvtepi32_ps(total::<WIDTH>(dots[0])), _mm256_cvtepi32_ps(total::<WIDTH>(dots[1]))]
}

/// Adds the products of 16 columns to `dots`, which [`total`] makes a sum of.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_unit<const WIDTH: usize>(
    mut dots: Words,
    planes: Planes<'_>,
    unit: usize,
    input: &[i32; 4],
) -> Words {
    let zero = [_mm256_setzero_si256(); 2];
    let (mut two, mut one) = (zero, zero);
    if WIDTH & 2 != 0 {
        two = load(&planes.two[unit]);
    }
    if WIDTH & 1 != 0 {
        one = match planes.one.get(unit / 2) {
            Some(block) => load(block).map(|words| shifted_right(words, 4 * (unit % 2))),
            None => spread(planes.short),
        };
    }
    for (t, &input) in input.iter().enumerate() {
        let (mut eight, mut four) = (zero, zero);
        if WIDTH & 8 != 0 {
            eight = load(&planes.eight[4 * unit + t]);
        }
        if WIDTH & 4 != 0 {
            four = load(&planes.four[2 * unit + t / 2]);
        }
        for half in 0..2 {
            let mut codes = eight[half];
            if WIDTH & 4 != 0 {
                codes = field::<4>(four[half], 4 * (t % 2), 0);
            }
            if WIDTH & 2 != 0 {
                codes = _mm256_or_si256(codes, field::<2>(two[half], 2 * t, WIDTH & 4));
            }
            if WIDTH & 1 != 0 {
                codes = _mm256_or_si256(codes, field::<1>(one[half], t, WIDTH & 6));
            }
            dots[half] = add_products::<WIDTH>(dots[half], codes, _mm256_set1_epi32(input));
        }
    }
    dots
}

/// Adds products of codes and inputs, where the largest ones fit: for up to 4 bits, those of a step to 16-bit sums (of 8 products
/// each, at most 8 * 2 * 15 * 127 = 30,480); for up to 7 bits, two products are at most 2 * 127 * 127 = 32,258; 8 bits need two halves.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_products<const WIDTH: usize>(sums: __m256i, codes: __m256i, input: __m256i) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    match WIDTH {
        1..=4 => _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, input)),
        5..=7 => {
            let pairs = _mm256_maddubs_epi16(codes, input);
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, ones))
        }
        _ => {
            let low = _mm256_maddubs_epi16(field::<4>(codes, 0, 0), input);
            let high = _mm256_maddubs_epi16(field::<4>(codes, 4, 0), input);
            let high = _mm256_madd_epi16(high, _mm256_set1_epi16(16));
            _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_madd_epi16(low, ones), high))
        }
    }
}

/// The 32-bit sums of a step.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn total<const WIDTH: usize>(sums: __m256i) -> __m256i {
    match WIDTH {
        1..=4 => _mm256_madd_epi16(sums, _mm256_set1_epi16(1)),
        _ => sums,
    }
}

/// `BITS` bits of each byte, moved from bit `from` to bit `to`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn field<const BITS: usize>(words: __m256i, from: usize, to: usize) -> __m256i {
    let moved = match from >= to {
        true => shifted_right(words, from - to),
        false => _mm256_sllv_epi32(words, _mm256_set1_epi32((to - from) as i32)),
    };
    _mm256_and_si256(moved, _mm256_set1_epi8((((1 << BITS) - 1) << to) as i8))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn shifted_right(words: __m256i, bits: usize) -> __m256i {
    _mm256_srlv_epi32(words, _mm256_set1_epi32(bits as i32))
}

/// The short last block of a 1-bit plane (F13), its bits as in the low half of a whole block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn spread(short: &[u8; 32]) -> Words {
    let halves: [__m128i; 2] = bytemuck::cast(*short);
    halves.map(|half| {
        let words = _mm256_cvtepu16_epi32(half);
        let words = _mm256_or_si256(words, _mm256_slli_epi32::<8>(words));
        let words = _mm256_and_si256(words, _mm256_set1_epi32(0x00ff_00ff));
        let words = _mm256_or_si256(words, _mm256_slli_epi32::<4>(words));
        _mm256_and_si256(words, _mm256_set1_epi8(0x0f))
    })
}

/// Factors and minima of a record with 4-bit codes (F14).
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn four_bit_scales(record: &[u8; 16]) -> (Floats, Floats) {
    let codes = widened(record);
    (
        codes.map(|codes| _mm256_cvtepi32_ps(field::<4>(codes, 0, 0))),
        codes.map(|codes| _mm256_cvtepi32_ps(field::<4>(codes, 4, 0))),
    )
}

/// The same with 6-bit codes (F15).
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn six_bit_scales(record: &[u8; 24]) -> (Floats, Floats) {
    let (low, high) = record.split_first_chunk().expect("24 bytes");
    let low = widened(low);
    // The last 8 rows find their bits in the same bytes as the first 8, but 4 bits further up.
    let high = _mm256_cvtepu8_epi32(_mm_set1_epi64x(i64::from_le_bytes(
        *high.first_chunk().expect("8 bytes"),
    )));
    let (mut s, mut z) = ([_mm256_setzero_ps(); 2], [_mm256_setzero_ps(); 2]);
    for half in 0..2 {
        let high = shifted_right(high, 4 * half);
        let s_codes = _mm256_or_si256(field::<4>(low[half], 0, 0), field::<2>(high, 0, 4));
        let z_codes = _mm256_or_si256(field::<4>(low[half], 4, 0), field::<2>(high, 2, 4));
        (s[half], z[half]) = (_mm256_cvtepi32_ps(s_codes), _mm256_cvtepi32_ps(z_codes));
    }
    (s, z)
}

/// The scales of a paper record, and what to take off a product: scale times zero point (F16), or scale less mean (F17).
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn paper_scales<const WIDTH: usize>(record: &[u8]) -> (Floats, Floats) {
    let (scale, rest) = record.split_first_chunk().expect("16 scales");
    let scale = halves(scale);
    let (mut factor, mut minimum) = (scale, scale);
    match WIDTH {
        1 => {
            let mean = halves(rest.first_chunk().expect("16 means"));
            for half in 0..2 {
                factor[half] = _mm256_add_ps(scale[half], scale[half]);
                minimum[half] = _mm256_sub_ps(scale[half], mean[half]);
            }
        }
        _ => {
            let zero = widened(&zero_points::<WIDTH>(rest));
            for half in 0..2 {
                minimum[half] = _mm256_mul_ps(scale[half], _mm256_cvtepi32_ps(zero[half]));
            }
        }
    }
    (factor, minimum)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(block: &[u8; 64]) -> Words {
    bytemuck::cast(*block)
}

/// 16 bytes as 16 words.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widened(bytes: &[u8; TILE_ROWS]) -> Words {
    let bytes: __m128i = bytemuck::cast(*bytes);
    [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))]
}

/// 16 f16 as f32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves(bytes: &[u8; 32]) -> Floats {
    let halves: [__m128i; 2] = bytemuck::cast(*bytes);
    halves.map(|half| _mm256_cvtph_ps(half))
}
