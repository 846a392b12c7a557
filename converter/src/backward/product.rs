//! Products of the reverse pass, in pieces of fixed size.

use rayon::prelude::*;
use slim_formats::Weight;
use slim_kernels::{
    linalg::{self, Mat},
    weight,
};

use crate::Result;

/// Rows of a weight whose f32 values are held at a time.
const ROWS: usize = 2048;

/// Tokens, or rows of a gradient, per task.
const PIECE: usize = 128;

/// `dx += dy w`, for `dx: [m, cols]`, `dy: [m, rows]`, `w: [rows, cols]`.
pub fn add(dx: &mut [f32], dy: &[f32], w: Weight<'_>) -> Result<()> {
    const ROWS_PER_TASK: usize = 64;
    let (rows, cols) = weight::shape(w);
    let mut weights = vec![0.0; ROWS.min(rows) * cols];
    for first in (0..rows).step_by(ROWS) {
        let len = ROWS.min(rows - first);
        let weights = &mut weights[..len * cols];
        weights.par_chunks_mut(ROWS_PER_TASK * cols).enumerate().try_for_each(|(task, out)| {
            let first = first + task * ROWS_PER_TASK;
            weight::dequantize_rows(w, first..first + out.len() / cols, out)
        })?;
        let weights = Mat::new(weights, len, cols);
        let pieces = dx.par_chunks_mut(PIECE * cols).zip(dy.par_chunks(PIECE * rows));
        pieces.for_each(|(dx, dy)| {
            let dy = Mat::strided(&dy[first..], dx.len() / cols, len, rows);
            linalg::matmul(dx, cols, true, dy, weights);
        });
    }
    Ok(())
}

/// The gradient `dy^T x` of the loss at a layer's weights, `[rows, cols]`, for `x: [m, cols]` and `dy: [m, rows]`.
pub fn weight_gradient(x: &[f32], dy: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let m = x.len() / cols;
    let mut out = vec![0.0; rows * cols];
    out.par_chunks_mut(PIECE * cols).enumerate().for_each(|(piece, out)| {
        let len = out.len() / cols;
        let dy = transposed(&dy[piece * PIECE..], m, len, rows);
        linalg::matmul(out, cols, false, Mat::new(&dy, len, m), Mat::new(x, m, cols));
    });
    out
}

/// The transpose `[cols, rows]` of `a: [rows, cols]`, whose rows lie `stride` apart.
pub fn transposed(a: &[f32], rows: usize, cols: usize, stride: usize) -> Vec<f32> {
    const TILE: usize = 16;
    let mut out = vec![0.0; rows * cols];
    for (j, out) in out.chunks_mut(TILE * rows).enumerate() {
        for i in (0..rows).step_by(TILE) {
            for (j, out) in (j * TILE..).zip(out.chunks_exact_mut(rows)) {
                for (i, out) in (i..).zip(out[i..].iter_mut().take(TILE)) {
                    *out = a[i * stride + j];
                }
            }
        }
    }
    out
}
