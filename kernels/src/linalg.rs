//! Dense linear algebra over `faer`: row-major f32 in and out, one thread per call.
//!
//! Callers split their work into pieces of fixed size and run those in parallel, so that no result depends on the
//! number of threads.

use faer::{
    Accum, MatMut, MatRef, Par,
    linalg::{cholesky::llt, matmul::matmul as gemm, triangular_inverse::invert_upper_triangular},
};
use rayon::prelude::*;

use crate::{KernelError, Result};

/// A borrowed row-major matrix whose rows lie `stride` apart.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a> Mat<'a> {
    /// `data: [rows, cols]`, contiguous.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows that lie `stride` apart.
    ///
    /// # Panics
    /// If `data` is too short.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        Self { data, rows, cols, stride }
    }

    fn faer(self) -> MatRef<'a, f32> {
        MatRef::from_row_major_slice_with_stride(self.data, self.rows, self.cols, self.stride)
    }
}

/// `out[m, n] = alpha * a[m, k] * b[n, k]^T`, plus `out` itself if `add`; rows of `out` lie `out_stride` apart.
pub fn matmul_transposed(
    out: &mut [f32],
    out_stride: usize,
    add: bool,
    alpha: f32,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    let out = row_major_mut(out, a.rows, b.rows, out_stride);
    gemm(out, accumulate(add), a.faer(), b.faer().transpose(), alpha, Par::Seq);
}

/// `out[m, n] = a[m, k] * b[k, n]`, plus `out` itself if `add`; rows of `out` lie `out_stride` apart.
pub fn matmul(out: &mut [f32], out_stride: usize, add: bool, a: Mat<'_>, b: Mat<'_>) {
    let out = row_major_mut(out, a.rows, b.cols, out_stride);
    gemm(out, accumulate(add), a.faer(), b.faer(), 1.0, Par::Seq);
}

/// Not `MatMut::from_row_major_slice_with_stride_mut`: in faer 0.24.4 it swaps the strides and writes out of bounds.
fn row_major_mut(out: &mut [f32], rows: usize, cols: usize, stride: usize) -> MatMut<'_, f32> {
    MatMut::from_column_major_slice_with_stride_mut(out, cols, rows, stride).transpose_mut()
}

fn accumulate(add: bool) -> Accum {
    if add { Accum::Add } else { Accum::Replace }
}

/// Adds `x^T x` to the upper triangle of `h: [n, n]`, for `x: [tokens, n]`. What is below the diagonal is undefined.
pub fn add_gram(h: &mut [f32], x: &[f32], n: usize) {
    const STRIPE: usize = 96;
    let x = MatRef::from_row_major_slice(x, x.len() / n, n);
    h.par_chunks_mut(STRIPE * n).enumerate().for_each(|(index, stripe)| {
        let first = index * STRIPE;
        let rows = stripe.len() / n;
        let out = MatMut::from_row_major_slice_mut(stripe, rows, n).split_at_col_mut(first).1;
        let left = x.subcols(first, rows).transpose();
        gemm(out, Accum::Add, left, x.split_at_col(first).1, 1.0, Par::Seq);
    });
}

/// Copies the upper triangle of `h: [n, n]` to the lower one.
pub fn mirror_upper(h: &mut [f32], n: usize) {
    for i in 1..n {
        for j in 0..i {
            h[i * n + j] = h[j * n + i];
        }
    }
}

/// The upper triangular `u: [n, n]` with `(h + damping * I)^-1 = u^T u`, for a symmetric `h` of which the upper triangle is
/// read.
///
/// Reversing rows and columns of `h` turns its lower Cholesky factor into an upper `r` with `h = r r^T`, and
/// `u = r^-1`: one factorization and one triangular inverse instead of Cholesky, inverse, Cholesky.
///
/// # Errors
/// `NotPositiveDefinite` if the damped `h` is not, as far as f64 can tell, or if it is not finite.
pub fn inverse_cholesky(h: &[f32], n: usize, damping: f32) -> Result<Vec<f32>> {
    // The sum is rounded to f32, as in a Hessian that was damped in place.
    let damped =
        |i: usize, j: usize| f64::from(if i == j { h[i * n + j] + damping } else { h[i * n + j] });
    // Entry (i, j) of the reversed lower triangle is entry (n - 1 - j, n - 1 - i) of the upper one.
    let mut l =
        faer::Mat::<f64>::from_fn(
            n,
            n,
            |i, j| {
                if j <= i { damped(n - 1 - i, n - 1 - j) } else { 0.0 }
            },
        );
    let scratch = llt::factor::cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default());
    let mut memory = faer::dyn_stack::MemBuffer::new(scratch);
    llt::factor::cholesky_in_place(
        l.as_mut(),
        Default::default(),
        Par::Seq,
        faer::dyn_stack::MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|_| KernelError::NotPositiveDefinite { size: n })?;
    let r = l.as_ref().reverse_rows_and_cols();
    let mut u = faer::Mat::<f64>::zeros(n, n);
    invert_upper_triangular(u.as_mut(), r, Par::Seq);
    drop(l);
    if (0..n).any(|i| !u[(i, i)].is_finite()) {
        return Err(KernelError::NotPositiveDefinite { size: n });
    }
    let mut out = vec![0.0; n * n];
    for (i, row) in out.chunks_exact_mut(n).enumerate() {
        for (j, value) in row.iter_mut().enumerate().skip(i) {
            *value = u[(i, j)] as f32;
        }
    }
    Ok(out)
}
