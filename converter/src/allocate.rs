//! SBA: which groups get a bit more, which a bit less (Sec. 3.2, Eq. 4 of arXiv:2405.14917).
//!
//! Of the groups of a layer, ranked by salience, the `p` lowest lose a bit and the `p` highest gain
//! one, so that the mean stays. The published search takes the `p` with the least divergence of the
//! layer's outputs; ours predicts the loss of the sweep itself, may keep `p = 0`, and ranks by what
//! a bit is worth (`docs/slim-llm.md` has the measurements).

use std::ops::Range;

use rayon::prelude::*;
use slim_formats::slim::{BitWidth, TILE_ROWS};
use slim_kernels::{
    kl_divergence,
    linalg::{self, Mat, Precision, Store},
    log_softmax,
};

use crate::{
    Activations,
    lanes::{Lanes, gather, nearest_codes},
    published,
};

/// The columns of each group.
pub fn group_columns(cols: usize, group_size: usize) -> Vec<Range<usize>> {
    (0..cols).step_by(group_size).map(|first| first..cols.min(first + group_size)).collect()
}

/// The widths of `n` groups: `bits - 1` for the groups `low`, `bits + 1` for the groups `high`.
fn widths(n: usize, bits: u8, low: &[usize], high: &[usize]) -> Vec<BitWidth> {
    let mut widths = vec![bits; n];
    low.iter().for_each(|&group| widths[group] -= 1);
    high.iter().for_each(|&group| widths[group] += 1);
    widths.into_iter().map(|bits| BitWidth::new(bits).expect("a width of 1 to 8")).collect()
}

/// Groups in ascending order of salience; of equals, the first comes first.
fn ranking(salience: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..salience.len()).collect();
    order.sort_by(|&a, &b| salience[a].total_cmp(&salience[b]));
    order
}

/// The published search: for each `p` from 1 to half the groups less one, the divergence of the
/// layer's outputs.
///
/// Returns the divergence for each `p`.
pub fn published_divergences(
    weights: &[f32],
    inputs: &Activations,
    groups: &[Range<usize>],
    salience: &[f64],
    bits: u8,
) -> Vec<f64> {
    let order = ranking(salience);
    let choices = (groups.len() / 2).saturating_sub(1);
    let n = groups.len();
    let steps: Vec<Vec<BitWidth>> =
        (0..=choices).map(|p| widths(n, bits, &order[..p], &order[n - p..])).collect();
    let [low, middle, high] =
        [bits - 1, bits, bits + 1].map(|bits| min_max(weights, groups, BitWidth::new(bits)));
    let quantized = |width: BitWidth| match width.bits().cmp(&bits) {
        std::cmp::Ordering::Less => &low,
        std::cmp::Ordering::Equal => &middle,
        std::cmp::Ordering::Greater => &high,
    };
    let per_sample: Vec<Vec<f64>> = (0..inputs.samples())
        .into_par_iter()
        .map(|sample| {
            let outputs = Outputs::new(weights, inputs.sample(sample), inputs.width());
            let original = outputs.log_probabilities(&outputs.of(weights));
            let mut current = outputs.of(&middle);
            steps
                .windows(2)
                .map(|step| {
                    for (group, cols) in
                        groups.iter().enumerate().filter(|(g, _)| step[0][*g] != step[1][*g])
                    {
                        let (old, new) = (quantized(step[0][group]), quantized(step[1][group]));
                        outputs.replace(&mut current, cols.clone(), old, new);
                    }
                    outputs.divergence(&outputs.log_probabilities(&current), &original)
                })
                .collect()
        })
        .collect();
    (0..choices)
        .map(|p| per_sample.iter().map(|kl| kl[p]).sum::<f64>() / inputs.samples() as f64)
        .collect()
}

/// The published allocation: `p` from [`published_divergences`], the groups from the final ranking.
pub fn published_widths(divergences: &[f64], salience: &[f64], bits: u8) -> Vec<BitWidth> {
    let best = divergences.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1));
    let p = best.map_or(0, |(index, _)| index + 1);
    let order = ranking(salience);
    widths(order.len(), bits, &order[..p], &order[order.len() - p..])
}

/// The weights after plain min/max rounding; empty for a width that does not exist.
fn min_max(weights: &[f32], groups: &[Range<usize>], width: Option<BitWidth>) -> Vec<f32> {
    let Some(width) = width else { return Vec::new() };
    let cols = groups.last().map_or(0, |group| group.end);
    let mut out = vec![0.0; weights.len()];
    out.par_chunks_mut(TILE_ROWS * cols).enumerate().for_each(|(tile, out)| {
        for group in groups {
            let w = gather(weights, cols, tile, group.clone());
            let (factor, offset) = published::min_max(&w, width);
            for (col, w) in group.clone().zip(&w) {
                let code = nearest_codes(w, &factor, &offset, width.max_code().into());
                let value: Lanes = std::array::from_fn(|r| factor[r] * code[r] + offset[r]);
                for (row, value) in out.chunks_exact_mut(cols).zip(value) {
                    row[col] = value;
                }
            }
        }
    });
    out
}

/// The outputs of a layer on one sample, updated group by group.
struct Outputs<'a> {
    x: &'a [f32],
    tokens: usize,
    rows: usize,
    cols: usize,
}

impl<'a> Outputs<'a> {
    fn new(weights: &[f32], x: &'a [f32], cols: usize) -> Self {
        Self { x, tokens: x.len() / cols, rows: weights.len() / cols, cols }
    }

    /// `x W^T`, `[tokens, rows]`.
    fn of(&self, weights: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; self.tokens * self.rows];
        let x = Mat::new(self.x, self.tokens, self.cols);
        let w = Mat::new(weights, self.rows, self.cols);
        linalg::matmul(Precision::Fine, &mut out, self.rows, Store::REPLACE, x, w.transposed());
        out
    }

    /// Swaps the part of some columns from weights `old` to weights `new`.
    fn replace(&self, out: &mut [f32], cols: Range<usize>, old: &[f32], new: &[f32]) {
        let x = Mat::strided(&self.x[cols.start..], self.tokens, cols.len(), self.cols);
        for (weights, sign) in [(new, 1.0), (old, -1.0)] {
            let w = Mat::strided(&weights[cols.start..], self.rows, cols.len(), self.cols);
            linalg::matmul(
                Precision::Fine,
                out,
                self.rows,
                Store { alpha: sign, add: true },
                x,
                w.transposed(),
            );
        }
    }

    /// Softmax over the output features, clamped as the published code does.
    fn log_probabilities(&self, outputs: &[f32]) -> Vec<f32> {
        let mut out = outputs.to_vec();
        for token in out.chunks_exact_mut(self.rows) {
            log_softmax(token);
            token.iter_mut().for_each(|value| *value = value.max(1e-6f32.ln()));
        }
        out
    }

    /// The mean over tokens of KL(quantized || original).
    fn divergence(&self, quantized: &[f32], original: &[f32]) -> f64 {
        let tokens = quantized.chunks_exact(self.rows).zip(original.chunks_exact(self.rows));
        tokens.map(|(q, o)| kl_divergence(q, o)).sum::<f64>() / self.tokens as f64
    }
}
