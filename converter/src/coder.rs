//! The codings: from the weights of a run of columns to the scales that the file stores.

use half::f16;
use slim_formats::slim::{BitWidth, CodeColumn, Group, ScaleCoding, TILE_ROWS, TileMut};
use slim_kernels::{narrow::Extent, per_isa};

use crate::{
    fit::{fit, fit_error},
    lanes::{Lanes, keep_better, nearest_codes, run_error, zip},
    published,
    trellis::{self, MAX_SCALE_CODE, Viterbi},
};

/// The stored scales of one run of columns, for the 16 rows of a tile.
#[derive(Debug, Clone, Copy)]
pub enum RunScales {
    /// `w = (d * s) * code - m * z`.
    TwoLevel {
        /// Scale codes `s`.
        scale: CodeColumn,
        /// Minimum codes `z`.
        minimum: CodeColumn,
    },
    /// `w = (d * s) * value`, with the value that windows of this width have.
    Trellis {
        /// Scale codes `s`.
        scale: CodeColumn,
        /// Of the run's group.
        width: BitWidth,
    },
    /// `w = scale * (code - zero_point)`.
    Affine {
        /// Rounded to f16 when stored.
        scale: Lanes,
        /// Integer codes.
        zero_point: CodeColumn,
    },
    /// `w = mean + scale` or `mean - scale`.
    Binary {
        /// Rounded to f16 when stored.
        scale: Lanes,
        /// Rounded to f16 when stored.
        mean: Lanes,
    },
}

/// The row scales `d` and `m` of a tile; ones in the paper coding.
#[derive(Debug, Clone, Copy)]
pub struct RowScales {
    /// Multiplies scale codes.
    pub d: Lanes,
    /// Multiplies minimum codes.
    pub m: Lanes,
}

impl RunScales {
    /// Factor and offset of each row: a weight is `factor * code + offset`, as `docs/format.md`
    /// defines it; in a trellis the value of its window takes the place of the code.
    pub fn affine(&self, rows: &RowScales) -> (Lanes, Lanes) {
        match self {
            Self::TwoLevel { scale, minimum } => {
                (zip(&rows.d, &scale.map(f32::from), |d, s| d * s), {
                    zip(&rows.m, &minimum.map(f32::from), |m, z| -(m * z))
                })
            }
            Self::Trellis { scale, .. } => {
                (zip(&rows.d, &scale.map(f32::from), |d, s| d * s), [0.0; TILE_ROWS])
            }
            Self::Affine { scale, zero_point } => {
                (*scale, zip(scale, &zero_point.map(f32::from), |s, z| -(s * z)))
            }
            Self::Binary { scale, mean } => {
                (scale.map(|s| 2.0 * s), zip(mean, scale, |m, s| m - s))
            }
        }
    }

    /// What a weight with each of `codes` gains for one more of `d` and of `m`; `None` in a coding
    /// without row scales.
    pub fn slopes(&self, codes: &CodeColumn) -> Option<[Lanes; 2]> {
        match self {
            Self::TwoLevel { scale, minimum } => {
                let of_d = std::array::from_fn(|r| f32::from(scale[r]) * f32::from(codes[r]));
                Some([of_d, minimum.map(|z| 0.0 - f32::from(z))])
            }
            Self::Trellis { scale, width } => {
                let values = trellis::values(*width);
                let value = |r: usize| values[usize::from(codes[r])];
                let of_d = std::array::from_fn(|r| f32::from(scale[r]) * value(r));
                Some([of_d, [0.0; TILE_ROWS]])
            }
            Self::Affine { .. } | Self::Binary { .. } => None,
        }
    }

    /// Sets the lanes from `used` on to zero: padding rows (F8).
    pub fn clear_padding(&mut self, used: usize) {
        match self {
            Self::TwoLevel { scale, minimum } => {
                scale[used..].fill(0);
                minimum[used..].fill(0);
            }
            Self::Trellis { scale, .. } => scale[used..].fill(0),
            Self::Affine { scale, zero_point } => {
                scale[used..].fill(0.0);
                zero_point[used..].fill(0);
            }
            Self::Binary { scale, mean } => {
                scale[used..].fill(0.0);
                mean[used..].fill(0.0);
            }
        }
    }

    /// Stores the scales of run `run` of group `group`.
    pub fn store(&self, tile: &mut TileMut<'_>, group: usize, run: usize) {
        match self {
            Self::TwoLevel { scale, minimum } => tile.set_two_level(group, run, scale, minimum),
            Self::Trellis { scale, .. } => tile.set_trellis_scales(group, run, scale),
            Self::Affine { scale, zero_point } => {
                tile.set_affine(group, &scale.map(f16::from_f32), zero_point);
            }
            Self::Binary { scale, mean } => {
                tile.set_binary(group, &scale.map(f16::from_f32), &mean.map(f16::from_f32));
            }
        }
    }
}

/// How scales are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coder {
    /// The best fit that the coding of the file can hold.
    Best(ScaleCoding),
    /// SQC as published (paper coding).
    Published,
}

impl Coder {
    /// The coding of the file.
    pub fn coding(self) -> ScaleCoding {
        match self {
            Self::Best(coding) => coding,
            Self::Published => ScaleCoding::Paper,
        }
    }

    /// The row scales of a tile, from its weights before the sweep.
    pub fn rows(self, w: &[Lanes], importance: &[f32], groups: &[Group]) -> RowScales {
        let coding = self.coding();
        let runs = groups.iter().flat_map(|group| {
            group.runs(coding).map(|cols| (&w[cols.clone()], &importance[cols], group.bit_width))
        });
        let (mut scale, mut minimum) = ([0.0; TILE_ROWS], [0.0; TILE_ROWS]);
        let max_code = match coding {
            ScaleCoding::Paper => return RowScales { d: [1.0; TILE_ROWS], m: [1.0; TILE_ROWS] },
            ScaleCoding::TwoLevel { scale_bits, .. } => {
                for (w, importance, width) in runs {
                    let run = fit(w, importance, width);
                    scale = zip(&scale, &run.scale, f32::max);
                    minimum = zip(&minimum, &run.minimum, |a, b| a.max(-b));
                }
                max_scale_code(scale_bits)
            }
            ScaleCoding::Trellis { .. } => {
                for (w, importance, width) in runs {
                    let factors = trellis::suitable_factors(w, importance, width);
                    scale = zip(&scale, &factors, f32::max);
                }
                MAX_SCALE_CODE
            }
        };
        let max_code = f32::from(max_code);
        let row_scale = |largest: f32| f16::from_f32(largest / max_code).to_f32();
        RowScales { d: scale.map(row_scale), m: minimum.map(row_scale) }
    }

    /// The scales of one run of columns, for each tile of a strip.
    pub fn run(
        self,
        rows: &[&RowScales],
        w: &[&[Lanes]],
        importance: &[f32],
        width: BitWidth,
        viterbi: &mut Viterbi,
    ) -> Vec<RunScales> {
        if let (Self::Best(ScaleCoding::Trellis { .. }), &[above, below]) = (self, w) {
            let d = [&rows[0].d, &rows[1].d];
            let scales = trellis::fit_scales(viterbi, d, [above, below], importance, width);
            return scales.map(|scale| RunScales::Trellis { scale, width }).into();
        }
        let of_tile = |(rows, w): (&&RowScales, &&[Lanes])| match self {
            Self::Published => published::sqc(w, width),
            Self::Best(ScaleCoding::TwoLevel { scale_bits, .. }) => {
                best_two_level(rows, w, importance, width, scale_bits)
            }
            Self::Best(ScaleCoding::Paper) => best_paper(w, importance, width),
            Self::Best(ScaleCoding::Trellis { .. }) => unreachable!("strips have two tiles"),
        };
        rows.iter().zip(w).map(of_tile).collect()
    }
}

/// About the importance-weighted squared error that a run is left with at a width.
pub fn expected_error(
    coding: ScaleCoding,
    w: &[Lanes],
    importance: &[f32],
    width: BitWidth,
) -> Lanes {
    match coding {
        ScaleCoding::Paper | ScaleCoding::TwoLevel { .. } => fit_error(w, importance, width),
        ScaleCoding::Trellis { .. } => trellis::expected_error(w, importance, width),
    }
}

/// Whether f16 holds the scales of a matrix at every bit-width: with twice its largest weight for
/// what the sweep adds to it, and with two of f16's smallest steps or more for those of typical
/// rows.
pub fn scales_fit_f16(coding: ScaleCoding, extent: &Extent) -> bool {
    let per_scale = match coding {
        ScaleCoding::Paper => 1.0,
        ScaleCoding::TwoLevel { scale_bits, .. } => f32::from(max_scale_code(scale_bits)),
        ScaleCoding::Trellis { .. } => f32::from(MAX_SCALE_CODE),
    };
    // From the range of a row to its scale, for codes of 1 and of 8 bits.
    let (largest, smallest) = (4.0 * extent.largest.1.abs(), 2.0 * extent.typical / 255.0);
    largest / per_scale <= f16::MAX.to_f32()
        && (extent.typical == 0.0
            || smallest / per_scale >= 2.0 * f16::MIN_POSITIVE_SUBNORMAL.to_f32())
}

fn max_scale_code(scale_bits: u8) -> u8 {
    (1 << scale_bits) - 1
}

/// Scale and minimum codes near the real-valued fit, by the error that they leave.
fn best_two_level(
    rows: &RowScales,
    w: &[Lanes],
    importance: &[f32],
    width: BitWidth,
    scale_bits: u8,
) -> RunScales {
    let max_code = f32::from(max_scale_code(scale_bits));
    let target = fit(w, importance, width);
    let center = scale_codes(&target.scale, &rows.d, max_code);
    let mut best = [(0, 0); TILE_ROWS];
    let mut best_error = [f32::INFINITY; TILE_ROWS];
    for scale_step in [-1.0, 0.0, 1.0, 2.0] {
        let scale = center.map(|center| (center + scale_step).clamp(0.0, max_code));
        let factor = zip(&scale, &rows.d, |s, d| s * d);
        let minimum = best_minimum(w, importance, &factor, &target.minimum, width);
        let center = scale_codes(&minimum.map(|minimum| -minimum), &rows.m, max_code);
        for minimum_step in [-1.0, 0.0, 1.0] {
            let minimum = center.map(|center| (center + minimum_step).clamp(0.0, max_code));
            let offset = zip(&minimum, &rows.m, |z, m| -(m * z));
            let error = run_error(w, importance, &factor, &offset, width.max_code());
            let candidate = std::array::from_fn(|r| (scale[r] as u8, minimum[r] as u8));
            keep_better(&mut best, &mut best_error, &candidate, &error);
        }
    }
    RunScales::TwoLevel { scale: best.map(|(s, _)| s), minimum: best.map(|(_, z)| z) }
}

per_isa! {
    /// The codes nearest to `values` in units of `units`; 0 where the unit is 0.
    fn scale_codes(values: &Lanes, units: &Lanes, max_code: f32) -> Lanes {
        let mut codes = [0.0; TILE_ROWS];
        for r in 0..TILE_ROWS {
            let code = if units[r] == 0.0 { 0.0 } else { values[r] / units[r] };
            codes[r] = code.round_ties_even().clamp(0.0, max_code);
        }
        codes
    }
}

per_isa! {
    /// The least-squares minimum for a given factor, from the codes that `minimum` gives.
    fn best_minimum(
        w: &[Lanes],
        importance: &[f32],
        factor: &Lanes,
        minimum: &Lanes,
        width: BitWidth,
    ) -> Lanes {
        let total: f32 = importance.iter().sum();
        let mut sum = [0.0; TILE_ROWS];
        for (w, importance) in w.iter().zip(importance) {
            let code = nearest_codes(w, factor, minimum, width.max_code().into());
            for r in 0..TILE_ROWS {
                sum[r] += importance * (w[r] - factor[r] * code[r]);
            }
        }
        sum.map(|sum| (sum / total).min(0.0))
    }
}

/// An f16 scale with an integer zero point near the real-valued fit; for one bit, the fit itself as
/// mean and scale.
fn best_paper(w: &[Lanes], importance: &[f32], width: BitWidth) -> RunScales {
    let round = |value: f32| f16::from_f32(value).to_f32();
    let target = fit(w, importance, width);
    if width.bits() == 1 {
        let scale = target.scale.map(|s| round(0.5 * s));
        let mean = zip(&target.minimum, &target.scale, |minimum, s| round(minimum + 0.5 * s));
        return RunScales::Binary { scale, mean };
    }
    let max_code = f32::from(width.max_code());
    let mut best = [(0.0, 0); TILE_ROWS];
    let mut best_error = [f32::INFINITY; TILE_ROWS];
    for share in (0..12).map(|step| 0.7 + 0.05 * step as f32) {
        let scale = target.scale.map(|s| round(s * share));
        let center = zip(&target.minimum, &scale, |minimum, s| {
            if s == 0.0 { 0.0 } else { (-minimum / s).round_ties_even() }
        });
        for step in [-1.0, 0.0, 1.0] {
            let zero_point = center.map(|center| (center + step).clamp(0.0, max_code));
            let offset = zip(&scale, &zero_point, |s, z| -(s * z));
            let error = run_error(w, importance, &scale, &offset, width.max_code());
            let candidate = std::array::from_fn(|r| (scale[r], zero_point[r] as u8));
            keep_better(&mut best, &mut best_error, &candidate, &error);
        }
    }
    RunScales::Affine { scale: best.map(|(s, _)| s), zero_point: best.map(|(_, z)| z) }
}
