//! The proxy Hessian of a layer's inputs, and its factor.

use std::ops::Range;

use rayon::prelude::*;
use slim_kernels::linalg::{self, Mat, Precision, Store, matmul};

use crate::{Activations, ConvertError, Engine, Result, sweep::reordered};

/// `(2 / samples) * sum x^T x` over the calibration inputs, `[n, n]`; of outputs, see `rows.rs`.
#[derive(Clone)]
pub struct Hessian {
    n: usize,
    values: Vec<f32>,
}

/// The upper triangular `U` with `H^-1 = U^T U` of a damped Hessian.
pub struct Factor {
    n: usize,
    values: Vec<f32>,
}

impl Hessian {
    /// From its values, `[n, n]`.
    pub fn new(values: Vec<f32>, n: usize) -> Self {
        assert_eq!(values.len(), n * n);
        Self { n, values }
    }

    /// From the inputs of a layer.
    ///
    /// # Errors
    /// `Kernel` if a device fails.
    pub fn of(inputs: &Activations, engine: &Engine, precision: Precision) -> Result<Self> {
        let n = inputs.width();
        let mut values = engine.gram(inputs, precision)?;
        let scale = 2.0 / inputs.samples() as f32;
        values.iter_mut().for_each(|value| *value *= scale);
        linalg::mirror_upper(&mut values, n);
        Ok(Self::new(values, n))
    }

    /// Adds `damping` to the diagonal.
    #[must_use]
    pub fn damped(mut self, damping: f32) -> Self {
        self.values.iter_mut().step_by(self.n + 1).for_each(|value| *value += damping);
        self
    }

    /// `[n, n]`, row-major.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Rows and columns.
    pub fn size(&self) -> usize {
        self.n
    }

    /// The diagonal.
    pub fn diagonal(&self) -> Vec<f32> {
        self.values.iter().step_by(self.n + 1).copied().collect()
    }

    /// Row and column `order[i]` as row and column `i`; in place, for there may be no room for two.
    #[must_use]
    pub fn reordered(mut self, order: &[usize]) -> Self {
        let n = self.n;
        self.values.par_chunks_mut(n).for_each_init(
            || vec![0.0; n],
            |before, row| {
                before.copy_from_slice(row);
                row.iter_mut().zip(order).for_each(|(out, &col)| *out = before[col]);
            },
        );
        // Along each cycle of the order, every row moves to where the one before it was.
        let mut is_placed = vec![false; n];
        for first in 0..n {
            let mut row = first;
            while !std::mem::replace(&mut is_placed[row], true) {
                let next = order[row];
                if next != first {
                    self.swap_rows(row, next);
                }
                row = next;
            }
        }
        self
    }

    fn swap_rows(&mut self, a: usize, b: usize) {
        let (a, b) = (a.min(b), a.max(b));
        let (head, tail) = self.values.split_at_mut(b * self.n);
        head[a * self.n..][..self.n].swap_with_slice(&mut tail[..self.n]);
    }

    /// The mean of the diagonal.
    pub fn mean_diagonal(&self) -> f32 {
        let sum: f64 = self.values.iter().step_by(self.n + 1).map(|&value| f64::from(value)).sum();
        (sum / self.n as f64) as f32
    }

    /// Factors `H` damped by `share` of its mean diagonal, ten times more after each failure; tells
    /// the share that worked.
    ///
    /// # Errors
    /// `Numerical` if the inputs are not finite, or if even a share of 1 does not help.
    pub fn factor(&self, share: f32) -> Result<(Factor, f32)> {
        if let Some(found) = self.values.iter().find(|value| !value.is_finite()) {
            let found = format!("{found} in its Hessian on the calibration text");
            return Err(ConvertError::numerical(found, "finite activations and gradients"));
        }
        // Inputs that are all zero say nothing: any damping gives the plain quantizer.
        let unit = self.mean_diagonal().max(f32::MIN_POSITIVE.sqrt());
        let mut share = share;
        loop {
            match linalg::inverse_cholesky(&self.values, self.n, share * unit) {
                Ok(values) => return Ok((Factor { n: self.n, values }, share)),
                Err(_) if share >= 1.0 => {
                    let found = format!(
                        "a Hessian that is not positive definite, even with {share} of its mean diagonal as damping"
                    );
                    return Err(ConvertError::numerical(found, "one that can be factored"));
                }
                Err(_) => share = (10.0 * share).max(0.01),
            }
        }
    }

    /// `sum_r d_r H d_r^T` over the rows of `rows: [.., n]`: the squared output error of a weight
    /// error, times 2 / samples.
    pub fn quadratic(&self, rows: &[f32]) -> f64 {
        const ROWS: usize = 64;
        let n = self.n;
        let pieces = rows.par_chunks(ROWS * n).map(|rows| {
            let m = rows.len() / n;
            let mut product = vec![0.0; rows.len()];
            matmul(
                Precision::Fine,
                &mut product,
                n,
                Store::REPLACE,
                Mat::new(rows, m, n),
                Mat::new(&self.values, n, n),
            );
            rows.iter().zip(product).map(|(d, p)| f64::from(*d) * f64::from(p)).sum::<f64>()
        });
        pieces.collect::<Vec<f64>>().iter().sum()
    }
}

impl Factor {
    /// `[n, n]`, row-major; zero below the diagonal.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Rows and columns.
    pub fn size(&self) -> usize {
        self.n
    }

    /// `U_bb^-1 U_br` for the places `b` and all places `r` behind them, `[b.len(), r.len()]`: the
    /// share of an error in each place that those behind make up for.
    pub fn shares_behind(&self, b: Range<usize>) -> Vec<f32> {
        let Self { n, values } = self;
        let behind = n - b.end;
        let row = |place: usize| &values[place * n..(place + 1) * n];
        let mut shares = vec![0.0; b.len() * behind];
        // From the last place to the first.
        for (i, place) in b.clone().enumerate().rev() {
            let (shares, done) = shares.split_at_mut((i + 1) * behind);
            let share = &mut shares[i * behind..];
            share.copy_from_slice(&row(place)[b.end..]);
            for (other, done) in (place + 1..b.end).zip(done.chunks_exact(behind.max(1))) {
                let u = row(place)[other];
                share.iter_mut().zip(done).for_each(|(share, done)| *share -= u * done);
            }
            let u = row(place)[place];
            share.iter_mut().for_each(|share| *share /= u);
        }
        shares
    }

    /// Replaces `m: [.., n]`, whose column `order[i]` is column `i` of the factor, by `m H^-1`.
    pub fn solve(&self, m: &mut [f32], order: &[usize]) {
        const ROWS: usize = 256;
        let n = self.n;
        let u = Mat::new(&self.values, n, n);
        let times = |rows: &[f32], factor| {
            let mut product = vec![0.0; rows.len()];
            let rows = Mat::new(rows, rows.len() / n, n);
            matmul(Precision::Fine, &mut product, n, Store::REPLACE, rows, factor);
            product
        };
        for rows in m.chunks_mut(ROWS * n) {
            let solved = times(&times(&reordered(rows, order), u.transposed()), u);
            for (row, solved) in rows.chunks_exact_mut(n).zip(solved.chunks_exact(n)) {
                order.iter().zip(solved).for_each(|(&col, value)| row[col] = *value);
            }
        }
    }

    /// `1 / U_jj^2`: what an error in column `j` costs after the columns behind it have made up for
    /// it.
    pub fn importance(&self) -> Vec<f32> {
        self.values.iter().step_by(self.n + 1).map(|u| 1.0 / (u * u)).collect()
    }
}
