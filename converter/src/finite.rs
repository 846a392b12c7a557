//! Weights as numbers.

use std::ops::Range;

use rayon::prelude::*;
use slim_formats::Weight;
use slim_kernels::weight;

use crate::{ConvertError, Result};

/// Some rows of the tensor `name`, `[rows.len(), cols]`.
///
/// # Errors
/// `NotFinite` for a weight that is no number.
pub fn finite_rows(name: &str, source: Weight<'_>, rows: Range<usize>) -> Result<Vec<f32>> {
    const ROWS: usize = 64;
    let (_, cols) = weight::shape(source);
    let mut weights = vec![0.0; rows.len() * cols];
    weights.par_chunks_mut(ROWS * cols).enumerate().try_for_each(|(index, out)| {
        let first = rows.start + index * ROWS;
        weight::dequantize_rows(source, first..first + out.len() / cols, out)
    })?;
    match weights.iter().position(|weight| !weight.is_finite()) {
        None => Ok(weights),
        Some(at) => Err(ConvertError::NotFinite {
            tensor: name.to_owned(),
            row: rows.start + at / cols,
            found: weights[at],
        }),
    }
}
