//! The factor that the GPTQ sweep goes by.

use faer::{
    Par,
    linalg::{cholesky::llt, triangular_inverse::invert_upper_triangular},
};

use crate::{KernelError, Result};

/// The upper triangular `u: [n, n]` with `(h + damping * I)^-1 = u^T u`, for a symmetric `h` of
/// which the upper triangle is read.
///
/// Reversing rows and columns of `h` turns its lower Cholesky factor into an upper `r` with
/// `h = r r^T`, and `u = r^-1`: one factorization and one triangular inverse instead of Cholesky,
/// inverse, Cholesky.
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
