//! The weights of a tensor as f32, and what is lost of them.

use half::f16;
use rayon::prelude::*;
use slim_formats::{ModelSource, Weight, arch::Tensor, slim::TILE_ROWS};
use slim_kernels::weight;

use crate::{ExportError, Result};

/// Rows that are computed at a time: enough for all threads, little memory.
const PANEL_ROWS: usize = 1024;

/// The tensors that the model is made of, all of which it has, in the order of use.
pub fn tensors(model: &dyn ModelSource) -> Result<&[Tensor]> {
    let tensors = model.decoder().tensors();
    for tensor in tensors {
        model.require(&tensor.name)?;
    }
    Ok(tensors)
}

/// Calls `visit` with `[rows, cols]` weights at a time and the number of their first row.
pub fn for_each_panel(
    weight: Weight<'_>,
    mut visit: impl FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    let (rows, cols) = weight::shape(weight);
    let mut values = vec![0.0; rows.min(PANEL_ROWS) * cols];
    for first in (0..rows).step_by(PANEL_ROWS) {
        let count = PANEL_ROWS.min(rows - first);
        let values = &mut values[..count * cols];
        values.par_chunks_mut(TILE_ROWS * cols).enumerate().try_for_each(|(step, values)| {
            let first = first + step * TILE_ROWS;
            weight::dequantize_rows(weight, first..first + values.len() / cols, values)
        })?;
        visit(first, values)?;
    }
    Ok(())
}

/// fp16 bytes of `values`, rows of `cols` from row `first` on of the tensor `name`.
pub fn to_f16(name: &str, first: usize, cols: usize, values: &[f32]) -> Result<Vec<u8>> {
    let rounded: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
    match rounded.iter().position(|value| !value.is_finite()) {
        None => Ok(rounded.iter().flat_map(|value| value.to_le_bytes()).collect()),
        Some(at) => Err(ExportError::Unrepresentable {
            tensor: name.to_owned(),
            row: first + at / cols,
            found: values[at],
        }),
    }
}

/// What has been lost of a tensor so far.
#[derive(Default)]
pub struct Loss {
    difference: f64,
    norm: f64,
}

impl Loss {
    /// Counts weights as they are and as they were written.
    pub fn add(&mut self, weights: &[f32], written: &[f32]) {
        for (&weight, &written) in weights.iter().zip(written) {
            self.difference += f64::from(written - weight).powi(2);
            self.norm += f64::from(weight).powi(2);
        }
    }

    /// `||W' - W|| / ||W||`; 0 for a tensor of zeros that stayed one.
    pub fn relative(&self) -> f64 {
        match self.difference {
            0.0 => 0.0,
            difference => (difference / self.norm).sqrt(),
        }
    }
}
