//! The real-valued scale and minimum of a run of columns: weighted least squares over a search of
//! the range.

use slim_formats::slim::{BitWidth, TILE_ROWS};
use slim_kernels::per_isa;

use crate::lanes::{Lanes, nearest_codes};

/// An affine quantizer for each row: a weight is `scale * code + minimum`.
#[derive(Debug, Clone, Copy)]
pub struct Affine {
    /// At least 0; 0 only for a run of zeros.
    pub scale: Lanes,
    /// At most 0.
    pub minimum: Lanes,
    /// The importance-weighted squared error that is left.
    pub error: Lanes,
}

/// Shares of the full range that the search starts from: narrower ones clip outliers.
const RANGE: std::ops::RangeInclusive<f32> = 0.5..=1.1;
const RANGE_STEPS: usize = 16;
/// The same where only the error counts, not the fit.
const ROUGH_RANGE_STEPS: usize = 6;

/// Fits each row of a run of columns.
///
/// For each tried range, codes are rounded, scale and minimum re-fitted to them by least squares
/// (weights: `importance` per column), and codes rounded again; the range with the least error
/// wins.
pub fn fit(w: &[Lanes], importance: &[f32], width: BitWidth) -> Affine {
    fit_lanes(w, importance, f32::from(width.max_code()), RANGE_STEPS)
}

/// About the error that [`fit`] leaves, for a third of the work.
pub fn fit_error(w: &[Lanes], importance: &[f32], width: BitWidth) -> Lanes {
    fit_lanes(w, importance, f32::from(width.max_code()), ROUGH_RANGE_STEPS).error
}

per_isa! {
    fn fit_lanes(w: &[Lanes], importance: &[f32], max_code: f32, steps: usize) -> Affine {
        let (low, high) = range(w);
        let total: f32 = importance.iter().sum();
        let mut sum_w = [0.0; TILE_ROWS];
        for (w, importance) in w.iter().zip(importance) {
            for r in 0..TILE_ROWS {
                sum_w[r] += importance * w[r];
            }
        }
        let mut best = Affine {
            scale: [0.0; TILE_ROWS],
            minimum: [0.0; TILE_ROWS],
            error: [f32::INFINITY; TILE_ROWS],
        };
        for step in 0..steps {
            let share = step as f32 / (steps - 1) as f32;
            let share = RANGE.start() + share * (RANGE.end() - RANGE.start());
            let mut scale = [0.0; TILE_ROWS];
            let mut minimum = [0.0; TILE_ROWS];
            for r in 0..TILE_ROWS {
                scale[r] = (high[r] - low[r]) * share / max_code;
                minimum[r] = 0.5 * (low[r] + high[r]) - 0.5 * scale[r] * max_code;
            }
            least_squares(w, importance, total, &sum_w, max_code, &mut scale, &mut minimum);
            let mut error = [0.0; TILE_ROWS];
            for (w, importance) in w.iter().zip(importance) {
                let code = nearest_codes(w, &scale, &minimum, max_code);
                for r in 0..TILE_ROWS {
                    let e = scale[r] * code[r] + minimum[r] - w[r];
                    error[r] += importance * e * e;
                }
            }
            for r in 0..TILE_ROWS {
                if error[r] < best.error[r] {
                    best.scale[r] = scale[r];
                    best.minimum[r] = minimum[r];
                    best.error[r] = error[r];
                }
            }
        }
        best
    }
}

/// The least and largest weight of each row, zero included: codes can always express zero's sign.
#[inline(always)]
fn range(w: &[Lanes]) -> (Lanes, Lanes) {
    let (mut low, mut high) = ([0.0f32; TILE_ROWS], [0.0f32; TILE_ROWS]);
    for w in w {
        for r in 0..TILE_ROWS {
            low[r] = low[r].min(w[r]);
            high[r] = high[r].max(w[r]);
        }
    }
    (low, high)
}

/// Replaces scale and minimum by the least-squares solution for the codes that they round to. A
/// solution that is degenerate, or not representable (scale below zero, minimum above), leaves the
/// scale, or clamps the minimum.
#[inline(always)]
fn least_squares(
    w: &[Lanes],
    importance: &[f32],
    total: f32,
    sum_w: &Lanes,
    max_code: f32,
    scale: &mut Lanes,
    minimum: &mut Lanes,
) {
    let (mut sum_q, mut sum_qq, mut sum_qw) =
        ([0.0; TILE_ROWS], [0.0; TILE_ROWS], [0.0; TILE_ROWS]);
    for (w, importance) in w.iter().zip(importance) {
        let code = nearest_codes(w, scale, minimum, max_code);
        for r in 0..TILE_ROWS {
            let weighted = importance * code[r];
            sum_q[r] += weighted;
            sum_qq[r] += weighted * code[r];
            sum_qw[r] += weighted * w[r];
        }
    }
    for r in 0..TILE_ROWS {
        let determinant = total * sum_qq[r] - sum_q[r] * sum_q[r];
        let slope = (total * sum_qw[r] - sum_q[r] * sum_w[r]) / determinant;
        let usable = determinant > 1e-6 * total * sum_qq[r] && slope > 0.0;
        scale[r] = if usable { slope } else { scale[r] };
        minimum[r] = ((sum_w[r] - scale[r] * sum_q[r]) / total).min(0.0);
    }
}
