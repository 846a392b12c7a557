//! The factor that the GPTQ sweep goes by.

use std::ops::Range;

use faer::{
    Accum, Mat, MatRef, Par,
    linalg::{cholesky::llt, matmul::matmul, triangular_inverse::invert_upper_triangular},
};
use rayon::prelude::*;

use crate::{KernelError, Result};

/// Columns that are worked out together. What a block costs by itself grows with their number, and
/// the conversions to f64 with that of the blocks.
const BLOCK: usize = 128;

/// Rows that a task works on.
const TASK_ROWS: usize = 64;

/// The upper triangular `u: [n, n]` with `(h + damping * I)^-1 = u^T u`, for a symmetric `h` of
/// which the upper triangle is read.
///
/// `u` is the inverse of the upper triangular `r` with `h = r r^T`: one factorization and one
/// triangular inverse instead of Cholesky, inverse, Cholesky. Both are done in place, a block of
/// columns at a time, with sums in f64: besides `h` it takes one matrix of its size.
///
/// # Errors
/// `NotPositiveDefinite` if the damped `h` is not, as far as f64 can tell, or if it is not finite.
pub fn inverse_cholesky(h: &[f32], n: usize, damping: f32) -> Result<Vec<f32>> {
    let refused = |_| KernelError::NotPositiveDefinite { size: n };
    let mut u = h.to_vec();
    for (i, row) in u.chunks_exact_mut(n).enumerate() {
        row[..i].fill(0.0);
        row[i] += damping;
    }
    let blocks: Vec<_> = (0..n).step_by(BLOCK).map(|first| first..n.min(first + BLOCK)).collect();
    for block in blocks.iter().rev() {
        factor_block(&mut u, n, block).map_err(refused)?;
    }
    for block in &blocks {
        invert_block(&mut u, n, block);
    }
    match u.iter().all(|value| value.is_finite()) {
        true => Ok(u),
        false => Err(refused(NotFactored)),
    }
}

struct NotFactored;

/// Replaces a block of columns of `h: [n, n]` by those of `r`, with those behind it replaced
/// already: `r_ib = (h_ib - r_i r_b^T) r_bb^-T`, of which the sum goes over the columns behind.
fn factor_block(h: &mut [f32], n: usize, block: &Range<usize>) -> Result<(), NotFactored> {
    let behind = block.end..n;
    let (above, rest) = h.split_at_mut(block.start * n);
    let own = &mut rest[..block.len() * n];
    let r_b = widened(own, n, &behind);
    let left = |rows: &[f32]| {
        let mut left = widened(rows, n, block);
        let r = widened(rows, n, &behind);
        matmul(&mut left, Accum::Add, &r, r_b.transpose(), -1.0, Par::Seq);
        left
    };
    let r_bb = reverse_cholesky(left(own).as_ref())?;
    let inverse = inverse(r_bb.as_ref());
    narrow(r_bb.as_ref(), own, n, block);
    above.par_chunks_mut(TASK_ROWS * n).for_each(|rows| {
        let left = left(rows);
        narrow((left * inverse.transpose()).as_ref(), rows, n, block);
    });
    Ok(())
}

/// Replaces a block of columns of `r: [n, n]` by those of `u = r^-1`, with those before it replaced
/// already: `u_ib = -u_i r_b r_bb^-1`, of which the sum goes over the rows above the block.
fn invert_block(r: &mut [f32], n: usize, block: &Range<usize>) {
    let (above, rest) = r.split_at_mut(block.start * n);
    let own = &mut rest[..block.len() * n];
    let inverse = inverse(widened(own, n, block).as_ref());
    narrow(inverse.as_ref(), own, n, block);
    let r_b = widened(above, n, block);
    above.par_chunks_mut(TASK_ROWS * n).enumerate().for_each(|(task, rows)| {
        let first = task * TASK_ROWS;
        let sum = widened(rows, n, &(first..block.start)) * r_b.subrows(first, block.start - first);
        narrow((-sum * &inverse).as_ref(), rows, n, block);
    });
}

/// The upper triangular `r` with `h = r r^T`, for a symmetric `h` of which the upper triangle is
/// read: reversing rows and columns turns it into a lower Cholesky factor.
fn reverse_cholesky(h: MatRef<'_, f64>) -> Result<Mat<f64>, NotFactored> {
    let n = h.nrows();
    let mut l = h.reverse_rows_and_cols().to_owned();
    let scratch = llt::factor::cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default());
    let mut memory = faer::dyn_stack::MemBuffer::new(scratch);
    llt::factor::cholesky_in_place(
        l.as_mut(),
        Default::default(),
        Par::Seq,
        faer::dyn_stack::MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|_| NotFactored)?;
    let r = l.reverse_rows_and_cols();
    Ok(Mat::from_fn(n, n, |i, j| if i <= j { r[(i, j)] } else { 0.0 }))
}

/// The inverse of an upper triangular matrix.
fn inverse(r: MatRef<'_, f64>) -> Mat<f64> {
    let mut inverse = Mat::zeros(r.nrows(), r.ncols());
    invert_upper_triangular(inverse.as_mut(), r, Par::Seq);
    inverse
}

/// Some columns of the rows `rows: [.., n]`.
fn widened(rows: &[f32], n: usize, columns: &Range<usize>) -> Mat<f64> {
    let of_row = |i: usize| &rows[i * n + columns.start..i * n + columns.end];
    Mat::from_fn(rows.len() / n, columns.len(), |i, j| f64::from(of_row(i)[j]))
}

/// Stores some columns of the rows `rows: [.., n]`.
fn narrow(values: MatRef<'_, f64>, rows: &mut [f32], n: usize, columns: &Range<usize>) {
    for (i, row) in rows.chunks_exact_mut(n).enumerate() {
        let out = row[columns.clone()].iter_mut().enumerate();
        out.for_each(|(j, out)| *out = values[(i, j)] as f32);
    }
}
