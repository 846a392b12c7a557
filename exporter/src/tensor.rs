//! The weights of a tensor as f32, and what is lost of them.

use rayon::prelude::*;
use slim_formats::{DType, ModelSource, Weight, arch::Tensor, slim::TILE_ROWS};
use slim_kernels::{
    narrow::{self, Extent},
    weight,
};

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

/// Looks at all weights before anything is written: each is a number, and those of tensors that
/// become fp16 are within its range. Warns of tensors that it all but loses.
///
/// # Errors
/// `Unrepresentable` for the first tensor with another value.
pub fn check_values(
    model: &dyn ModelSource,
    becomes_f16: impl Fn(&Tensor) -> bool,
) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    for tensor in tensors(model)? {
        let name = &tensor.name;
        let extent = Extent::of(model.require(name)?)?;
        model.release_pages();
        let unrepresentable =
            |row, found| Err(ExportError::Unrepresentable { tensor: name.clone(), row, found });
        if let Some((row, found)) = extent.not_finite {
            return unrepresentable(row, found);
        }
        if !becomes_f16(tensor) || extent.fits_f16() {
            continue;
        }
        let (row, found) = extent.largest;
        if narrow::to_f16(found).is_none() {
            return unrepresentable(row, found);
        }
        warnings.push(format!(
            "`{name}`: fp16 rounds values as small as its own, {} in a typical row",
            extent.typical
        ));
    }
    Ok(warnings)
}

/// fp16 bytes of `values`, rows of `cols` from row `first` on of the tensor `name`.
pub fn to_f16(name: &str, first: usize, cols: usize, values: &[f32]) -> Result<Vec<u8>> {
    narrow::to_bytes(DType::F16, values).map_err(|at| ExportError::Unrepresentable {
        tensor: name.to_owned(),
        row: first + at / cols,
        found: values[at],
    })
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
