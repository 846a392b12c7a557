//! Errors of rows that the rows behind them make up for.
//!
//! The loss minds some directions of a layer's outputs more than others. Errors `E` of the weights
//! cost it about `tr(S E H E^T)`: `H` is the Hessian of the inputs, `S` that of the outputs, the
//! mean of `dy^T dy` over tokens whose gradients at the outputs are `dy`. When some rows have their
//! errors `E_b`, the others cost least with `-S_rr^-1 S_rb E_b` added to their weights, whatever
//! `H` is. So rows are rounded a block after the other, and each leaves that to the rows behind it,
//! as the sweep does with columns.
//!
//! # Source
//! The two-sided rounding of YAQA (arXiv:2505.22988), by blocks of rows.

use std::ops::Range;

use slim_formats::{
    Decoder,
    arch::{Rows, Tensor},
    slim::STRIP_ROWS,
};
use slim_kernels::linalg::{self, Mat, Precision, Store};

use crate::{
    Result,
    floats::Floats,
    hessian::{Factor, Hessian},
    layer::SLAB_ROWS,
};

/// Share of the mean diagonal that is added to `S`: it comes from far fewer tokens than `H`, and
/// gradients have heavy tails.
const DAMPING: f32 = 0.3;

/// Rows that make up for each other's errors, at most: bounds what is kept of a layer until its
/// turn comes.
const REACH: usize = 1024;

/// Whether the rows of a matrix make up for each other's errors. Of neurons, which outputs hang
/// together depends on the inputs, and a product of two matrices cannot say so.
pub fn hang_together(tensor: &Tensor) -> bool {
    tensor.is_linear() && ![Rows::Neurons, Rows::OfExpert].contains(&tensor.part.rows())
}

/// `S` of a layer, for rows within reach of each other.
pub struct OutputHessian {
    rows: usize,
    /// `[n, n]` for each `n` rows within reach of each other.
    pub sums: Floats,
}

impl OutputHessian {
    /// Zeros for a layer with `rows` outputs, in memory as for [`Floats::zeros`].
    ///
    /// # Errors
    /// As [`Floats::zeros`].
    pub fn zeros(rows: usize, memory_left: &mut u64) -> Result<Self> {
        Ok(Self { rows, sums: Floats::zeros(value_count(rows), memory_left)? })
    }

    /// Adds tokens with gradients `dy: [tokens, rows]`. No scale matters.
    pub fn add(&mut self, dy: &[f32]) {
        let tokens = dy.len() / self.rows;
        for rows in within_reach(self.rows) {
            let n = rows.len();
            let dy = Mat::strided(&dy[rows.start..], tokens, n, self.rows);
            let sum = &mut self.sums[values_of(&rows, self.rows)];
            linalg::matmul(Precision::Coarse, sum, n, Store::ADD, dy.transposed(), dy);
        }
    }

    fn factors(&self) -> Result<Vec<Factor>> {
        let factor = |part: Range<usize>| {
            let sum = self.sums[values_of(&part, self.rows)].to_vec();
            Ok(Hessian::new(sum, part.len()).factor(DAMPING)?.0)
        };
        within_reach(self.rows).map(factor).collect()
    }
}

/// The bytes of each output Hessian of a model, in the order in which they are made.
pub fn output_hessian_sizes(decoder: &Decoder) -> impl Iterator<Item = u64> {
    let layers = decoder.tensors().iter().filter(|tensor| hang_together(tensor));
    layers.map(|tensor| (value_count(tensor.shape().0) * size_of::<f32>()) as u64)
}

/// How many rows of `rows` are within reach of each other, but for the last ones: equal parts, of
/// whole strips.
fn reach(rows: usize) -> usize {
    let parts = rows.div_ceil(REACH).max(1);
    rows.div_ceil(parts).next_multiple_of(STRIP_ROWS)
}

fn within_reach(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let reach = reach(rows);
    (0..rows).step_by(reach).map(move |first| first..rows.min(first + reach))
}

/// Where the values of one part of `rows` rows begin and end: all parts before it are squares of
/// the same size.
fn values_of(part: &Range<usize>, rows: usize) -> Range<usize> {
    let first = part.start * reach(rows);
    first..first + part.len().pow(2)
}

/// Values of an output Hessian.
fn value_count(rows: usize) -> usize {
    within_reach(rows).map(|rows| rows.len().pow(2)).sum()
}

/// The weights of a matrix as they are to be rounded by now.
pub struct Targets {
    /// `[rows, cols]`.
    weights: Vec<f32>,
    cols: usize,
    /// Rows that are rounded together.
    block: usize,
    /// Rows within reach of each other.
    reach: usize,
    /// Of `S`, for each such rows; none for rows that are on their own.
    factors: Vec<Factor>,
}

impl Targets {
    /// `weights: [rows, cols]`, with `S` if rows are to make up for each other's errors. Those of a
    /// strip of `strip` rows do not: they are rounded together. With strips of four tiles about
    /// half of the gain would be lost.
    ///
    /// # Errors
    /// `Numerical` if `S` is not finite.
    pub fn new(
        weights: Vec<f32>,
        cols: usize,
        outputs: Option<&OutputHessian>,
        strip: usize,
    ) -> Result<Self> {
        let (block, reach, factors) = match outputs {
            Some(outputs) => (strip, reach(outputs.rows), outputs.factors()?),
            None => (SLAB_ROWS, weights.len() / cols, Vec::new()),
        };
        Ok(Self { weights, cols, block, reach, factors })
    }

    /// How many there are in all.
    pub fn row_count(&self) -> usize {
        self.weights.len() / self.cols
    }

    /// Rows that have not been rounded.
    pub fn rows(&self, rows: Range<usize>) -> &[f32] {
        &self.weights[rows.start * self.cols..rows.end * self.cols]
    }

    /// `rows` in the order of rounding: each slab has one block at most of those within reach of
    /// each other.
    pub fn slabs(&self, rows: Range<usize>) -> impl Iterator<Item = Vec<Range<usize>>> + use<> {
        let Self { block, reach, .. } = *self;
        let slab = move |place: usize| -> Vec<Range<usize>> {
            let blocks = (0..rows.end).step_by(reach).map(|first| {
                let start = (first + place).max(rows.start);
                start..(first + reach.min(place + block)).min(rows.end)
            });
            blocks.filter(|block| !block.is_empty()).collect()
        };
        (0..reach).step_by(block).map(slab).filter(|slab| !slab.is_empty())
    }

    /// Leaves the errors of a slab that has been rounded, target less result, `[.., cols]`, to the
    /// rows behind it.
    pub fn spread(&mut self, slab: &[Range<usize>], mut errors: &[f32]) {
        if self.factors.is_empty() {
            return;
        }
        for rows in slab {
            let (of_block, others) = errors.split_at(rows.len() * self.cols);
            self.spread_block(rows, of_block);
            errors = others;
        }
    }

    /// With `S^-1 = U^T U`, the rows behind a block `b` take `(U_bb^-1 U_br)^T` times its errors
    /// off their targets.
    fn spread_block(&mut self, rows: &Range<usize>, errors: &[f32]) {
        let Self { weights, cols, reach, factors, .. } = self;
        let part = rows.start / *reach;
        let factor = &factors[part];
        let block = rows.start - part * *reach..rows.end - part * *reach;
        let behind = factor.size() - block.end;
        if behind == 0 {
            return;
        }
        let shares = factor.shares_behind(block);
        let shares = Mat::new(&shares, rows.len(), behind).transposed();
        let errors = Mat::new(errors, rows.len(), *cols);
        let behind = &mut weights[rows.end * *cols..];
        let store = Store { alpha: -1.0, add: true };
        linalg::matmul(Precision::Fine, behind, *cols, store, shares, errors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::noise;

    const COLS: usize = 16;

    fn outputs(rows: usize) -> OutputHessian {
        let mut outputs = OutputHessian::zeros(rows, &mut (1 << 30)).unwrap();
        let mut dy = noise(200 * rows, 1);
        (1..dy.len()).for_each(|i| dy[i] += 0.8 * dy[i - 1]);
        outputs.add(&dy);
        outputs
    }

    #[test]
    fn rows_behind_a_block_cost_least_with_what_it_leaves_them() {
        const ROWS: usize = 40;
        let outputs = outputs(ROWS);
        let mut targets = Targets::new(vec![0.0; ROWS * COLS], COLS, Some(&outputs), 16).unwrap();
        let mean = outputs.sums.iter().step_by(ROWS + 1).sum::<f32>() / ROWS as f32;
        let damped = |i: usize, j: usize| {
            outputs.sums[i * ROWS + j] + if i == j { DAMPING * mean } else { 0.0 }
        };
        let errors = noise(16 * COLS, 2);
        targets.spread(std::slice::from_ref(&(0..16)), &errors);
        for col in 0..COLS {
            let left: Vec<f32> = (0..ROWS)
                .map(|i| match i {
                    0..16 => -errors[i * COLS + col],
                    _ => targets.weights[i * COLS + col],
                })
                .collect();
            for i in 16..ROWS {
                let slope: f32 = (0..ROWS).map(|j| damped(i, j) * left[j]).sum();
                assert!(slope.abs() < 1e-4 * mean, "row {i}: {slope}");
            }
        }
    }

    #[test]
    fn slabs_hold_every_row_once_and_none_within_reach_of_another() {
        let strips = [16, STRIP_ROWS];
        let cases = [(2100, 704), (1024, 1024), (1030, 544), (40, 64), (16, 32)];
        for ((rows, reach), strip) in cases.into_iter().flat_map(|case| strips.map(|s| (case, s))) {
            assert_eq!(super::reach(rows), reach);
            let outputs = outputs(rows);
            let mut targets =
                Targets::new(vec![0.0; rows * COLS], COLS, Some(&outputs), strip).unwrap();
            // Two bands, which cut the rows within reach of each other.
            let band = (rows / 3).next_multiple_of(strip).min(rows);
            let slabs: Vec<_> = targets.slabs(0..band).chain(targets.slabs(band..rows)).collect();
            let mut all: Vec<usize> = slabs.iter().flatten().cloned().flatten().collect();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..rows));
            for slab in slabs {
                targets.weights.fill(0.0);
                let errors = vec![1.0; slab.iter().map(|rows| rows.len() * COLS).sum()];
                targets.spread(&slab, &errors);
                for block in slab {
                    assert!(block.start.is_multiple_of(strip) && block.len() <= strip);
                    assert!(targets.rows(block.clone()).iter().all(|&weight| weight == 0.0));
                    if block.end < rows && !block.end.is_multiple_of(reach) {
                        assert!(targets.weights[block.end * COLS] != 0.0);
                    }
                }
            }
        }
    }

    #[test]
    fn rows_on_their_own_come_in_whole_slabs() {
        let rows = SLAB_ROWS + 40;
        let targets = Targets::new(vec![0.0; rows * COLS], COLS, None, 16).unwrap();
        let slabs: Vec<_> = targets.slabs(32..rows).flatten().collect();
        assert_eq!(slabs, [32..SLAB_ROWS, SLAB_ROWS..rows]);
    }
}
