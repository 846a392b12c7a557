//! What a layer should make of its inputs when the layers before it have changed them: what the
//! float model makes of its own.
//!
//! A layer with weights `W` sees `X` where the float model sees `Xf`. Among the layers on `X`, the
//! one with weights `W + (W (Xf - X)^T + M^T) X (X^T X)^-1` comes closest to the output
//! `W Xf^T + M^T`, where `M` is what the residual stream lacks before the layer adds to it (only
//! for layers that do). The sweep then rounds those weights, as it would round `W`. Either part is
//! taken by a share: the whole of it also follows what is particular to the calibration samples.

use std::ops::Range;

use rayon::prelude::*;
use slim_kernels::linalg::{self, Mat, Precision, Store};

use crate::{Activations, activations::FloatInputs};

/// Share of what the inputs lack that is made up for.
const INPUT_SHARE: f32 = 0.5;

/// Share of what the residual stream lacks that is made up for.
const RESIDUAL_SHARE: f32 = 0.5;

/// What is added to the weights of layers that take the same inputs.
pub struct Correction {
    cols: usize,
    /// Added for each weight matrix `W` as `W` times this, `[cols, cols]`.
    relative: Vec<f32>,
    /// Added as it is, `[rows, cols]`.
    absolute: Option<Vec<f32>>,
}

/// What inputs and residual stream lack, times the inputs: a [`Correction`] before it is multiplied
/// with the inverse Hessian.
pub struct Lack(Correction);

impl Lack {
    /// Of inputs `ours` in place of those in `float`.
    pub fn new(ours: &Activations, float: FloatInputs<'_>, precision: Precision) -> Self {
        let lacking = |batch: Range<usize>| {
            difference(float.activations.batch(batch.clone()), ours.batch(batch))
        };
        let relative = cross(precision, ours, ours.width(), INPUT_SHARE, lacking);
        let absolute = float.missing.map(|missing| {
            let lacking = |batch| missing.batch(batch).to_vec();
            cross(precision, ours, missing.width(), RESIDUAL_SHARE, lacking)
        });
        Self(Correction { cols: ours.width(), relative, absolute })
    }

    /// `solve` multiplies `[rows, cols]` with the inverse Hessian of the inputs.
    pub fn correction(self, solve: impl Fn(&mut [f32])) -> Correction {
        let Self(mut correction) = self;
        solve(&mut correction.relative);
        correction.absolute.as_deref_mut().map(solve);
        correction
    }
}

impl Correction {
    /// The weights to round in place of `weights: [rows, cols]`.
    pub fn apply(&self, weights: &[f32]) -> Vec<f32> {
        let cols = self.cols;
        let mut out = weights.to_vec();
        let (w, relative) =
            (Mat::new(weights, weights.len() / cols, cols), Mat::new(&self.relative, cols, cols));
        linalg::matmul(Precision::Fine, &mut out, cols, Store::ADD, w, relative);
        if let Some(absolute) = &self.absolute {
            out.iter_mut().zip(absolute).for_each(|(out, absolute)| *out += absolute);
        }
        out
    }
}

fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    const PIECE: usize = 1 << 14;
    let mut out = vec![0.0; a.len()];
    let pieces = out.par_chunks_mut(PIECE).zip(a.par_chunks(PIECE)).zip(b.par_chunks(PIECE));
    pieces.for_each(|((out, a), b)| {
        out.iter_mut().zip(a).zip(b).for_each(|((out, a), b)| *out = a - b);
    });
    out
}

/// `share * (2 / samples) * sum y^T x`, `[rows, x.width()]`, over `y: [tokens, rows]` of each batch
/// of `x`: in the measure of `Hessian`.
fn cross(
    precision: Precision,
    x: &Activations,
    rows: usize,
    share: f32,
    y: impl Fn(Range<usize>) -> Vec<f32>,
) -> Vec<f32> {
    let cols = x.width();
    let store = Store { alpha: share * 2.0 / x.samples() as f32, add: true };
    let mut sum = vec![0.0; rows * cols];
    for batch in x.batches() {
        let (y, x) = (y(batch.clone()), x.batch(batch));
        let tokens = x.len() / cols;
        let y = Mat::new(&y, tokens, rows).transposed();
        linalg::matmul(precision, &mut sum, cols, store, y, Mat::new(x, tokens, cols));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Engine, hessian::Hessian, tests::noise};

    const TOKENS: usize = 96;
    const COLS: usize = 32;
    const ROWS: usize = 8;

    /// Noise, and half of the first columns of `like`.
    fn activations(width: usize, seed: u32, like: Option<&Activations>) -> Activations {
        let mut activations = Activations::new(2, TOKENS, width, &mut (1 << 20)).unwrap();
        let noise = noise(2 * TOKENS * width, seed);
        for (i, sample) in noise.chunks_exact(TOKENS * width).enumerate() {
            let out = activations.sample_mut(i);
            out.copy_from_slice(sample);
            let tokens = like.map(|like| like.sample(i).chunks_exact(like.width()));
            for (out, like) in out.chunks_exact_mut(width).zip(tokens.into_iter().flatten()) {
                out.iter_mut().zip(like).for_each(|(out, like)| *out += 0.5 * like);
            }
        }
        activations
    }

    /// What is left of a least-squares fit has no part along any input.
    #[test]
    fn corrected_weights_solve_the_normal_equations() {
        let ours = activations(COLS, 1, None);
        let (float, missing) =
            (activations(COLS, 2, Some(&ours)), activations(ROWS, 3, Some(&ours)));
        let weights = noise(ROWS * COLS, 4);
        // Any order of columns gives the same.
        let order: Vec<usize> = (0..COLS).rev().collect();
        let hessian = Hessian::of(&ours, &Engine::Cpu, Precision::Fine).unwrap().reordered(&order);
        let (factor, _) = hessian.factor(1e-6).unwrap();
        for missing in [None, Some(&missing)] {
            let stage = FloatInputs { activations: &float, missing };
            let correction =
                Lack::new(&ours, stage, Precision::Fine).correction(|m| factor.solve(m, &order));
            let corrected = correction.apply(&weights);
            let (mut along, mut size) = (vec![0.0; COLS], 0.0);
            for sample in 0..2 {
                for token in 0..TOKENS {
                    let of = |a: &Activations, width: usize| -> Vec<f64> {
                        let values = &a.sample(sample)[token * width..][..width];
                        values.iter().map(|&value| f64::from(value)).collect()
                    };
                    let (x, xf) = (of(&ours, COLS), of(&float, COLS));
                    for row in 0..ROWS {
                        let dot = |w: &[f32], x: &[f64]| -> f64 {
                            let w = &w[row * COLS..][..COLS];
                            w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()
                        };
                        let share = f64::from(INPUT_SHARE);
                        let mut target =
                            (1.0 - share) * dot(&weights, &x) + share * dot(&weights, &xf);
                        if let Some(missing) = missing {
                            target += f64::from(RESIDUAL_SHARE) * of(missing, ROWS)[row];
                        }
                        let left = target - dot(&corrected, &x);
                        size += target.abs();
                        along.iter_mut().zip(&x).for_each(|(along, x)| *along += left * x);
                    }
                }
            }
            assert!(along.iter().all(|along| along.abs() < 1e-4 * size), "{along:?} of {size}");
        }
    }
}
