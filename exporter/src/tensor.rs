//! The tensors of a file, made of the model's, and what is lost of these.

use std::collections::HashMap;

use rayon::prelude::*;
use slim_formats::{
    DType, Layout, ModelSource, Weight,
    arch::{Place, Tensor},
    slim::TILE_ROWS,
};
use slim_kernels::{
    ggml,
    narrow::{self, Extent},
    weight,
};

use crate::{ExportError, LayerLoss, Result, rows};

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

/// A tensor of a file: one of the model, or several that the file has fused.
pub struct StoredTensor<'m> {
    /// The file's name.
    pub name: &'m str,
    /// What it is made of, and where in it that is.
    pub parts: Vec<(&'m Tensor, &'m Place)>,
}

/// The tensors of a file that has each of the model's at a `place`, in the order of use.
pub fn stored_tensors<'m>(
    tensors: &'m [Tensor],
    place: impl Fn(&'m Tensor) -> &'m Place,
) -> Vec<StoredTensor<'m>> {
    let mut stored: Vec<StoredTensor<'_>> = Vec::new();
    let mut by_name = HashMap::new();
    for tensor in tensors {
        let place = place(tensor);
        let name = place.name.as_str();
        let at = *by_name.entry(name).or_insert(stored.len());
        if at == stored.len() {
            stored.push(StoredTensor { name, parts: Vec::new() });
        }
        stored[at].parts.push((tensor, place));
    }
    stored
}

impl StoredTensor<'_> {
    /// Its dimensions, outermost first.
    pub fn dims(&self) -> Vec<usize> {
        let (tensor, place) = self.parts[0];
        place.stored_dims(tensor)
    }

    /// Its bytes in a ggml type, and what its matrices lose. `on_tensor` is told each part.
    pub fn encode(
        &self,
        model: &dyn ModelSource,
        dtype: DType,
        on_tensor: &mut dyn FnMut(&str),
    ) -> Result<(Vec<u8>, Vec<LayerLoss>)> {
        let (tensor, place) = self.parts[0];
        let cols = if tensor.is_matrix() { tensor.shape().1 } else { 1 };
        let row_bytes = dtype.size_in_bytes(cols as u64).expect("the type was chosen for it");
        let row_bytes = row_bytes as usize;
        let mut stored = vec![0; place.total_rows * row_bytes];
        let mut losses = Vec::new();
        for &(tensor, place) in &self.parts {
            on_tensor(&tensor.name);
            let weight = model.require(&tensor.name)?;
            let mut put = |first: usize, encoded: &[u8]| {
                let rows = (first..).zip(encoded.chunks_exact(row_bytes));
                match place.layout {
                    Layout::Transposed { stride, step } => {
                        let value_bytes = row_bytes / cols;
                        let start = place.first_value(cols);
                        for (row, bytes) in rows {
                            for (col, value) in bytes.chunks_exact(value_bytes).enumerate() {
                                let at = start + col * stride + row * step;
                                stored[at * value_bytes..][..value_bytes].copy_from_slice(value);
                            }
                        }
                    }
                    layout => {
                        for (row, bytes) in rows {
                            let row = layout.stored_row(row).expect("rows one after the other");
                            stored[(place.first_row + row) * row_bytes..][..row_bytes]
                                .copy_from_slice(bytes);
                        }
                    }
                }
            };
            match tensor.is_matrix() {
                true => losses.push(encode_matrix(tensor, weight, dtype, &mut put)?),
                false => put(0, &encode_vector(tensor, place, weight, dtype)?),
            }
        }
        Ok((stored, losses))
    }
}

/// Gives `put` rows as bytes, with the number of the first.
fn encode_matrix(
    tensor: &Tensor,
    weight: Weight<'_>,
    dtype: DType,
    put: &mut dyn FnMut(usize, &[u8]),
) -> Result<LayerLoss> {
    let (name, (_, cols)) = (&tensor.name, weight::shape(weight));
    let row_bytes = dtype.size_in_bytes(cols as u64).expect("the caller asked that") as usize;
    let mut loss = Loss::default();
    for_each_panel(weight, |first, values| {
        let mut encoded = vec![0; values.len() / cols * row_bytes];
        let steps = encoded.par_chunks_mut(TILE_ROWS * row_bytes);
        steps.zip(values.par_chunks(TILE_ROWS * cols)).enumerate().try_for_each(
            |(step, (bytes, values))| {
                let first = first + step * TILE_ROWS;
                rows::encode(name, weight, dtype, first, values, bytes)
            },
        )?;
        let mut written = vec![0.0; values.len()];
        ggml::dequantize(dtype, &encoded, &mut written)?;
        loss.add(values, &written);
        put(first, &encoded);
        Ok(())
    })?;
    let layout = rows::name_of(dtype);
    Ok(LayerLoss { name: name.clone(), layout, error: loss.relative() })
}

/// The values of a vector as they are stored, in the order of use.
fn encode_vector(
    tensor: &Tensor,
    place: &Place,
    weight: Weight<'_>,
    dtype: DType,
) -> Result<Vec<u8>> {
    let mut values = vec![0.0; tensor.dims[0]];
    weight::dequantize_rows(weight, 0..1, &mut values)?;
    values.iter_mut().for_each(|value| *value = place.form.stored(*value));
    to_bytes(&tensor.name, dtype, 0, values.len(), &values)
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

/// The bytes of `values` in a float type, rows of `cols` from row `first` on of the tensor `name`.
pub fn to_bytes(
    name: &str,
    dtype: DType,
    first: usize,
    cols: usize,
    values: &[f32],
) -> Result<Vec<u8>> {
    narrow::to_bytes(dtype, values).map_err(|at| ExportError::Unrepresentable {
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
