//! What a layer should make of its inputs when the layers before it have changed them: what the float model makes of its own.
//!
//! A layer with weights `W` sees `X` where the float model sees `Xf`. Among the layers on `X`, the one with weights
//! `W + (W (Xf - X)^T + M^T) X (X^T X)^-1` comes closest to the output `W Xf^T + M^T`, where `M` is what the residual stream
//! lacks before the layer adds to it (only for layers that do). The sweep then rounds those weights, as it would round `W`.
//! Either part is taken by a share: the whole of it also follows what is particular to the calibration samples.

use slim_kernels::linalg::{self, Mat, Store};

use crate::{Activations, calibrator::FloatStage};

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

impl Correction {
    /// For inputs `ours` in place of those in `float`; `solve` multiplies `[rows, cols]` with the inverse Hessian of `ours`.
    pub fn new(
        ours: &Activations,
        float: FloatStage<'_>,
        solve: impl Fn(&[f32]) -> Vec<f32>,
    ) -> Self {
        let lacking = |i| difference(float.activations.sample(i), ours.sample(i));
        let relative = cross(ours, ours.width(), INPUT_SHARE, lacking);
        let absolute = float.missing.map(|missing| {
            cross(ours, missing.width(), RESIDUAL_SHARE, |i| missing.sample(i).to_vec())
        });
        Self {
            cols: ours.width(),
            relative: solve(&relative),
            absolute: absolute.map(|m| solve(&m)),
        }
    }

    /// The weights to round in place of `weights: [rows, cols]`.
    pub fn apply(&self, weights: &[f32]) -> Vec<f32> {
        let cols = self.cols;
        let mut out = weights.to_vec();
        let (w, relative) =
            (Mat::new(weights, weights.len() / cols, cols), Mat::new(&self.relative, cols, cols));
        linalg::matmul(&mut out, cols, Store::ADD, w, relative);
        if let Some(absolute) = &self.absolute {
            out.iter_mut().zip(absolute).for_each(|(out, absolute)| *out += absolute);
        }
        out
    }
}

fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// `share * (2 / samples) * sum y^T x`, `[rows, x.width()]`, over `y: [tokens, rows]` of each sample of `x`: in the measure of
/// `Hessian`.
fn cross(x: &Activations, rows: usize, share: f32, y: impl Fn(usize) -> Vec<f32>) -> Vec<f32> {
    let cols = x.width();
    let store = Store { alpha: share * 2.0 / x.samples() as f32, add: true };
    let mut sum = vec![0.0; rows * cols];
    for i in 0..x.samples() {
        let (y, x) = (y(i), x.sample(i));
        let tokens = x.len() / cols;
        let y = Mat::new(&y, tokens, rows).transposed();
        linalg::matmul(&mut sum, cols, store, y, Mat::new(x, tokens, cols));
    }
    sum
}
