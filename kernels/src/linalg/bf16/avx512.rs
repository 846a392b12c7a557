//! `vdpbf16ps` of AVX-512: adds the products of two pairs in each of 16 lanes.
#![allow(unsafe_code, reason = "the instruction set is found out at run time")]

use std::arch::x86_64::*;

use super::{LANES, PAIRS, Precision, Product, Row, SIDE, step_rows};

/// Says that this processor has AVX-512 BF16.
#[derive(Debug, Clone, Copy)]
pub struct Unit(());

/// Rows of the left factor that are multiplied at a time: with two registers of sums for each, of
/// the right one's two and of theirs, all stay in registers.
const ROWS: usize = 8;

impl Unit {
    pub fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
        has.then_some(Self(()))
    }

    /// The product of 32 lanes with 32 lanes, over equally many steps.
    pub(super) fn multiply(self, left: &[Row], right: &[Row], product: &mut Product) {
        // SAFETY: `self` says that the processor has the instructions.
        unsafe { multiply(left, right, product) }
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn multiply(left: &[Row], right: &[Row], product: &mut Product) {
    const STEP_ROWS: usize = step_rows(Precision::Coarse);
    let (left, right) = (left.as_chunks::<STEP_ROWS>().0, right.as_chunks::<STEP_ROWS>().0);
    for (first, out) in (0..SIDE).step_by(ROWS).zip(product.0.chunks_exact_mut(ROWS)) {
        let mut sums = [[_mm512_setzero_ps(); SIDE / LANES]; ROWS];
        for (left, right) in left.iter().zip(right) {
            let left: &[Row; ROWS] = left[first..].first_chunk().expect("rows of a step");
            for pair in 0..PAIRS {
                let right = [load(&right[pair]), load(&right[LANES + pair])];
                for (sums, left) in sums.iter_mut().zip(left) {
                    let left = bh(_mm512_set1_epi32(left.0[pair].cast_signed()));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = _mm512_dpbf16_ps(*sum, left, right);
                    }
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            for (out, sum) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
                // SAFETY: `out` has 16 values.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) }
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
fn load(row: &Row) -> __m512bh {
    // SAFETY: a row has 64 bytes, at an address that they divide.
    bh(unsafe { _mm512_load_si512((&raw const row.0).cast()) })
}

#[target_feature(enable = "avx512f")]
fn bh(words: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of any content.
    unsafe { std::mem::transmute(words) }
}
