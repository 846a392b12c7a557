//! Codes times 8-bit inputs with AVX-512 VNNI: a register holds four columns of 16 rows, `vpdpbusd` multiplies and adds them.
#![allow(
    unsafe_code,
    reason = "the instruction set is found out at run time, and registers load from pointers"
)]

use std::{arch::x86_64::*, ops::Range};

use slim_formats::slim::{PackedTensor, ScaleCoding};

use super::{
    AHEAD_BYTES, TileKernel,
    input::{FINE, Input, Step, Units},
    next, run_units,
};
use crate::cpu::unpack::{Lanes, Planes, UNIT, for_width, zero_points};

/// The kernel, if the processor has its instructions.
pub(super) fn detect() -> Option<TileKernel> {
    let has = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    // SAFETY: the processor has what `tile` enables.
    has.then_some(|packed, index, input| unsafe { tile(packed, index, input) })
}

/// Sums over the runs so far: factor times code times input, and minimum times input.
struct Sums {
    scaled: __m512,
    shifted: __m512,
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn tile(packed: PackedTensor<'_>, tile: usize, input: &Input) -> Lanes {
    let layout = packed.layout();
    let (codes, records) = (packed.tile_codes(tile), packed.tile_scales(tile));
    let mut sums = Sums { scaled: _mm512_setzero_ps(), shifted: _mm512_setzero_ps() };
    for group in layout.groups() {
        let codes = &codes[group.codes_offset..][..group.code_bytes()];
        let records = &records[group.scales_offset..];
        let input = input.of(group.cols.start / UNIT..group.cols.end / UNIT);
        for_width!(group.bit_width, add_group(&mut sums, codes, layout.coding(), records, input));
    }
    let products = match packed.tile_row_scales(tile).as_chunks::<32>().0 {
        [d, m] => {
            let shifted = _mm512_mul_ps(halves(m), sums.shifted);
            _mm512_fmsub_ps(halves(d), sums.scaled, shifted)
        }
        _ => _mm512_sub_ps(sums.scaled, sums.shifted),
    };
    let mut lanes = [0.0; 16];
    // SAFETY: `lanes` has room for 16 values.
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), products) }
    lanes
}

/// Adds the runs of a group: `codes` are its bytes, `records` those of its scales and more.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
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
                dots = _mm512_fmadd_ps(rest, _mm512_set1_ps(FINE), dots);
            }
            let dots = _mm512_mul_ps(dots, _mm512_set1_ps(scale));
            scaled = _mm512_fmadd_ps(factor, dots, scaled);
            shifted = _mm512_fmadd_ps(minimum, _mm512_set1_ps(sum), shifted);
            unit = step.end;
        }
    }
    *sums = Sums { scaled, shifted };
}

/// The products of a step of one unit or two.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn step_products<const WIDTH: usize>(
    planes: Planes<'_>,
    units: Range<usize>,
    input: &[[i32; 4]],
) -> __m512 {
    let (first, last) = (units.start, units.end - 1);
    let mut dots = add_unit::<WIDTH>(_mm512_setzero_si512(), planes, first, &input[first]);
    if first < last {
        dots = add_unit::<WIDTH>(dots, planes, last, &input[last]);
    }
    _mm512_cvtepi32_ps(dots)
}

/// Adds the products of 16 columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_unit<const WIDTH: usize>(
    mut dots: __m512i,
    planes: Planes<'_>,
    unit: usize,
    input: &[i32; 4],
) -> __m512i {
    let zero = _mm512_setzero_si512();
    let (mut two, mut one) = (zero, zero);
    if WIDTH & 2 != 0 {
        two = load(&planes.two[unit]);
    }
    if WIDTH & 1 != 0 {
        one = match planes.one.get(unit / 2) {
            Some(block) => shifted_right(load(block), 4 * (unit % 2)),
            None => spread(planes.short),
        };
    }
    for (t, &input) in input.iter().enumerate() {
        let mut codes = zero;
        if WIDTH & 8 != 0 {
            codes = load(&planes.eight[4 * unit + t]);
        }
        if WIDTH & 4 != 0 {
            codes = field::<4>(load(&planes.four[2 * unit + t / 2]), 4 * (t % 2), 0);
        }
        if WIDTH & 2 != 0 {
            codes = _mm512_or_si512(codes, field::<2>(two, 2 * t, WIDTH & 4));
        }
        if WIDTH & 1 != 0 {
            codes = _mm512_or_si512(codes, field::<1>(one, t, WIDTH & 6));
        }
        dots = _mm512_dpbusd_epi32(dots, codes, _mm512_set1_epi32(input));
    }
    dots
}

/// `BITS` bits of each byte, moved from bit `from` to bit `to`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn field<const BITS: usize>(words: __m512i, from: usize, to: usize) -> __m512i {
    let moved = match from >= to {
        true => shifted_right(words, from - to),
        false => _mm512_sllv_epi32(words, _mm512_set1_epi32((to - from) as i32)),
    };
    _mm512_and_si512(moved, _mm512_set1_epi8((((1 << BITS) - 1) << to) as i8))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn shifted_right(words: __m512i, bits: usize) -> __m512i {
    _mm512_srlv_epi32(words, _mm512_set1_epi32(bits as i32))
}

/// The short last block of a 1-bit plane (F13), its bits as in the low half of a whole block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn spread(short: &[u8; 32]) -> __m512i {
    let words = _mm512_cvtepu16_epi32(bytemuck::cast(*short));
    let words = _mm512_or_si512(words, _mm512_slli_epi32::<8>(words));
    let words = _mm512_and_si512(words, _mm512_set1_epi32(0x00ff_00ff));
    let words = _mm512_or_si512(words, _mm512_slli_epi32::<4>(words));
    _mm512_and_si512(words, _mm512_set1_epi8(0x0f))
}

/// Factors and minima of a record with 4-bit codes (F14).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn four_bit_scales(record: &[u8; 16]) -> (__m512, __m512) {
    let codes = widened(bytemuck::cast(*record));
    let (s, z) = (field::<4>(codes, 0, 0), _mm512_srli_epi32::<4>(codes));
    (_mm512_cvtepi32_ps(s), _mm512_cvtepi32_ps(z))
}

/// The same with 6-bit codes (F15).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn six_bit_scales(record: &[u8; 24]) -> (__m512, __m512) {
    let (low, high) = record.split_first_chunk::<16>().expect("24 bytes");
    let low = widened(bytemuck::cast(*low));
    // The last 8 rows find their bits in the same bytes as the first 8, but 4 bits further up.
    let high = widened(_mm_set1_epi64x(i64::from_le_bytes(*high.first_chunk().expect("8 bytes"))));
    let high =
        _mm512_srlv_epi32(high, _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4));
    let s = _mm512_or_si512(field::<4>(low, 0, 0), field::<2>(high, 0, 4));
    let z = _mm512_or_si512(field::<4>(low, 4, 0), field::<2>(high, 2, 4));
    (_mm512_cvtepi32_ps(s), _mm512_cvtepi32_ps(z))
}

/// The scales of a paper record, and what to take off a product: scale times zero point (F16), or scale less mean (F17).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn paper_scales<const WIDTH: usize>(record: &[u8]) -> (__m512, __m512) {
    let (scale, rest) = record.split_first_chunk().expect("16 scales");
    let scale = halves(scale);
    match WIDTH {
        1 => {
            let mean = halves(rest.first_chunk().expect("16 means"));
            (_mm512_add_ps(scale, scale), _mm512_sub_ps(scale, mean))
        }
        _ => {
            let zero = widened(bytemuck::cast(zero_points::<WIDTH>(rest)));
            (scale, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(zero)))
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn load(block: &[u8; 64]) -> __m512i {
    // SAFETY: `block` has 64 bytes, and any address will do.
    unsafe { _mm512_loadu_si512(block.as_ptr().cast()) }
}

/// 16 bytes as 16 words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn widened(bytes: __m128i) -> __m512i {
    _mm512_cvtepu8_epi32(bytes)
}

/// 16 f16 as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn halves(bytes: &[u8; 32]) -> __m512 {
    _mm512_cvtph_ps(bytemuck::cast(*bytes))
}
