//! `--reference`: the quantizer and the bit allocation of the published code, to the letter where
//! `docs/slim-llm.md` does not say otherwise.

use slim_formats::slim::{BitWidth, CodeColumn, TILE_ROWS};
use slim_kernels::per_isa;

use crate::{
    coder::RunScales,
    lanes::{Lanes, keep_better, nearest_codes, zip},
};

/// The damping that the published code adds to every Hessian before it ranks groups.
pub const ABSOLUTE_DAMPING: f32 = 0.01;

/// SQC: the range factor, of 1 and 50 steps up to 1.1 and down to 0.9, with the least sum of
/// `|error|^2.4`; the first of equals. For one bit: mean and mean magnitude.
pub fn sqc(w: &[Lanes], width: BitWidth) -> RunScales {
    if width.bits() == 1 {
        let (scale, mean) = binary(w);
        return RunScales::Binary { scale, mean };
    }
    let (low, high) = range(w);
    let max_code = f32::from(width.max_code());
    let mut best = [(0.0, 0); TILE_ROWS];
    let mut best_error = [f32::INFINITY; TILE_ROWS];
    for tau in range_factors() {
        let (scale, zero_point) = affine(&low, &high, tau, max_code);
        let error = power_error(w, &scale, &zero_point, max_code);
        let candidate = std::array::from_fn(|r| (scale[r], zero_point[r] as u8));
        keep_better(&mut best, &mut best_error, &candidate, &error);
    }
    let zero_point: CodeColumn = best.map(|(_, zero)| zero);
    RunScales::Affine { scale: best.map(|(scale, _)| scale), zero_point }
}

/// The plain min/max quantizer of the SBA search, as factor and offset.
pub fn min_max(w: &[Lanes], width: BitWidth) -> (Lanes, Lanes) {
    if width.bits() == 1 {
        let (scale, mean) = binary(w);
        return (scale.map(|s| 2.0 * s), zip(&mean, &scale, |mean, s| mean - s));
    }
    let (low, high) = range(w);
    let (scale, zero_point) = affine(&low, &high, 1.0, width.max_code().into());
    (scale, zip(&scale, &zero_point, |scale, zero| -(scale * zero)))
}

fn range_factors() -> impl Iterator<Item = f32> {
    let steps = |sign: f32| (1..=50).map(move |step| 1.0 + sign * 0.1 * step as f32 / 50.0);
    std::iter::once(1.0).chain(steps(1.0)).chain(steps(-1.0))
}

/// Least and largest weight of each row, zero included; -1 and 1 for a row of zeros.
fn range(w: &[Lanes]) -> (Lanes, Lanes) {
    let (mut low, mut high) = ([0.0; TILE_ROWS], [0.0; TILE_ROWS]);
    for w in w {
        low = zip(&low, w, f32::min);
        high = zip(&high, w, f32::max);
    }
    for r in 0..TILE_ROWS {
        if low[r] == 0.0 && high[r] == 0.0 {
            (low[r], high[r]) = (-1.0, 1.0);
        }
    }
    (low, high)
}

fn affine(low: &Lanes, high: &Lanes, tau: f32, max_code: f32) -> (Lanes, Lanes) {
    let scale = zip(low, high, |low, high| (tau * high - tau * low) / max_code);
    let zero_point =
        zip(low, &scale, |low, scale| (-tau * low / scale).round_ties_even().clamp(0.0, max_code));
    (scale, zero_point)
}

/// `(mean |w|, mean w)` of each row.
fn binary(w: &[Lanes]) -> (Lanes, Lanes) {
    let (mut scale, mut mean) = ([0.0; TILE_ROWS], [0.0; TILE_ROWS]);
    for w in w {
        scale = zip(&scale, w, |sum, w| sum + w.abs());
        mean = zip(&mean, w, |sum, w| sum + w);
    }
    let n = w.len() as f32;
    (scale.map(|sum| sum / n), mean.map(|sum| sum / n))
}

per_isa! {
    fn power_error(w: &[Lanes], scale: &Lanes, zero_point: &Lanes, max_code: f32) -> Lanes {
        let mut sum = [0.0; TILE_ROWS];
        let offset = zip(scale, zero_point, |scale, zero| -(scale * zero));
        for w in w {
            let code = nearest_codes(w, scale, &offset, max_code);
            for r in 0..TILE_ROWS {
                sum[r] += power_2_4(scale[r] * (code[r] - zero_point[r]) - w[r]);
            }
        }
        sum
    }
}

/// `|x|^2.4`, relative error below 1e-5: the logarithm's mantissa part and the exponential as
/// polynomials, without branches, so that loops vectorise.
#[inline(always)]
fn power_2_4(x: f32) -> f32 {
    let x = x.abs().max(1e-12);
    let bits = x.to_bits();
    let exponent = (bits >> 23) as i32 - 127;
    let mantissa = f32::from_bits(bits & 0x007f_ffff | 0x3f80_0000);
    // log2(mantissa) = 2 / ln 2 * atanh(t), with t in 0 ..= 1/3.
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let tt = t * t;
    let series =
        1.0 + tt * (1.0 / 3.0 + tt * (0.2 + tt * (1.0 / 7.0 + tt * (1.0 / 9.0 + tt / 11.0))));
    let log2 = exponent as f32 + 2.0 * std::f32::consts::LOG2_E * t * series;
    let y = 2.4 * log2;
    let whole = (y + 12_582_912.0) - 12_582_912.0; // 1.5 * 2^23 rounds to an integer
    let f = (y - whole) * std::f32::consts::LN_2;
    let p = 1.0
        + f * (1.0
            + f * (0.5 + f * (1.0 / 6.0 + f * (1.0 / 24.0 + f * (1.0 / 120.0 + f / 720.0)))));
    p * f32::from_bits(((whole as i32 + 127) << 23) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_agrees_with_the_library() {
        for i in 1..4000 {
            let x = i as f32 * 1.7e-4;
            let expected = f64::from(x).powf(2.4);
            assert!((f64::from(power_2_4(x)) / expected - 1.0).abs() < 1e-5, "{x}");
        }
        assert!(power_2_4(0.0) < 1e-26);
    }

    #[test]
    fn range_factors_come_in_the_published_order() {
        let factors: Vec<f32> = range_factors().collect();
        assert_eq!((factors.len(), factors[0]), (101, 1.0));
        assert!((factors[1] - 1.002).abs() < 1e-6 && (factors[50] - 1.1).abs() < 1e-6);
        assert!((factors[51] - 0.998).abs() < 1e-6 && (factors[100] - 0.9).abs() < 1e-6);
    }
}
