//! Products of both passes.

use rayon::prelude::*;
use slim_formats::Weight;
use slim_kernels::{
    linalg::{self, Mat, Precision, Store},
    matmul, weight,
};

use crate::Result;

/// Rows of a weight whose f32 values are held at a time.
const ROWS: usize = 2048;

/// `x w^T`, for `x: [m, cols]`, `w: [rows, cols]`.
pub fn linear(precision: Precision, w: Weight<'_>, x: &[f32]) -> Result<Vec<f32>> {
    let (rows, cols) = weight::shape(w);
    let m = x.len() / cols;
    let mut out = vec![0.0; m * rows];
    matmul(precision, w, x, m, &mut out)?;
    Ok(out)
}

/// `dx += dy w`, for `dx: [m, cols]`, `dy: [m, rows]`, `w: [rows, cols]`.
pub fn add(precision: Precision, dx: &mut [f32], dy: &[f32], w: Weight<'_>) -> Result<()> {
    const ROWS_PER_TASK: usize = 64;
    let (rows, cols) = weight::shape(w);
    let m = dx.len() / cols;
    let mut weights = vec![0.0; ROWS.min(rows) * cols];
    for first in (0..rows).step_by(ROWS) {
        let len = ROWS.min(rows - first);
        let weights = &mut weights[..len * cols];
        weights.par_chunks_mut(ROWS_PER_TASK * cols).enumerate().try_for_each(|(task, out)| {
            let first = first + task * ROWS_PER_TASK;
            weight::dequantize_rows(w, first..first + out.len() / cols, out)
        })?;
        let dy = Mat::strided(&dy[first..], m, len, rows);
        linalg::matmul(precision, dx, cols, Store::ADD, dy, Mat::new(weights, len, cols));
    }
    Ok(())
}

/// `dy w`, `[m, cols]`, for `dy: [m, rows]`, `w: [rows, cols]`.
pub fn reverse(precision: Precision, dy: &[f32], w: Weight<'_>) -> Result<Vec<f32>> {
    let (rows, cols) = weight::shape(w);
    let mut dx = vec![0.0; dy.len() / rows * cols];
    add(precision, &mut dx, dy, w)?;
    Ok(dx)
}

/// The gradient `dy^T x` of the loss at a layer's weights, `[rows, cols]`, for `x: [m, cols]` and
/// `dy: [m, rows]`.
pub fn weight_gradient(
    precision: Precision,
    x: &[f32],
    dy: &[f32],
    rows: usize,
    cols: usize,
) -> Vec<f32> {
    let m = x.len() / cols;
    let mut out = vec![0.0; rows * cols];
    let (dy, x) = (Mat::new(dy, m, rows), Mat::new(x, m, cols));
    linalg::matmul(precision, &mut out, cols, Store::REPLACE, dy.transposed(), x);
    out
}
