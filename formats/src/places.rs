//! Tensors where the files of others have them: rows of fused ones, vectors in another order.

use std::{collections::HashMap, path::Path};

use crate::{
    BlockScales, DType, Decoder, DenseTensor, FormatError, Layout, Result, Weight,
    arch::{Form, Place, Tensor},
};

/// The tensors of a model by the names of what files of a kind store them in.
pub(crate) fn by_stored_name<'d>(
    decoder: &'d Decoder,
    place: impl Fn(&'d Tensor) -> &'d Place,
) -> HashMap<&'d str, Vec<&'d Tensor>> {
    let mut by_name: HashMap<&str, Vec<&Tensor>> = HashMap::new();
    for tensor in decoder.tensors() {
        by_name.entry(&place(tensor).name).or_default().push(tensor);
    }
    by_name
}

/// A sentence about the tensors `names` of the model at `path` that only its blocks for guessing
/// further tokens have, if there are any; the names of a file's blocks follow `prefix`.
pub(crate) fn guessing_left_out<'n>(
    path: &Path,
    decoder: &Decoder,
    prefix: &str,
    names: impl Iterator<Item = &'n str>,
) -> Option<String> {
    let count = names.filter(|name| decoder.is_of_guessing(prefix, name)).count();
    let path = path.display();
    (count > 0).then(|| {
        format!("`{path}`: blocks that guess further tokens are left out ({count} tensors)")
    })
}

/// A tensor that is some rows of a stored one, or all of it.
pub(crate) fn rows_of<'a>(
    tensor: &Tensor,
    place: &Place,
    dtype: DType,
    bytes: &'a [u8],
    scales: Option<BlockScales<'a>>,
) -> Weight<'a> {
    let (rows, cols) = tensor.shape();
    let values = match place.layout {
        Layout::Transposed { stride, step } => (cols - 1) * stride + (rows - 1) * step + 1,
        Layout::TransposedHeads { .. } => rows * cols,
        layout => layout.stored_row(rows - 1).map_or(rows, |last| rows.max(last + 1)) * cols,
    };
    let first = if tensor.is_matrix() { place.first_value(cols) } else { 0 };
    let [first, len] =
        [first, values].map(|values| dtype.size_in_bytes(values as u64).unwrap_or(0) as usize);
    let bytes = &bytes[first..][..len];
    let scales = scales.map(|scales| BlockScales { first_row: place.first_row, ..scales });
    Weight::Dense(DenseTensor { dtype, rows, cols, bytes, layout: place.layout, scales })
}

/// Vectors that are not stored as they are used, as f32 in the order of use.
#[derive(Debug, Default)]
pub(crate) struct Fixed(HashMap<String, Vec<u8>>);

impl Fixed {
    /// One of them.
    pub fn get(&self, name: &str) -> Option<Weight<'_>> {
        let bytes = self.0.get(name)?;
        let (dtype, rows, cols) = (DType::F32, 1, bytes.len() / 4);
        Some(Weight::Dense(DenseTensor {
            dtype,
            rows,
            cols,
            bytes,
            layout: Layout::AsStored,
            scales: None,
        }))
    }
}

/// Finds the vectors of a model, whose `place` is in files of this kind, that are not used as they
/// are stored; `stored` gives type and bytes.
///
/// # Errors
/// `Unsupported` for one in another type than F32, F16 and BF16.
pub(crate) fn fixed<'a>(
    path: &Path,
    decoder: &Decoder,
    place: impl Fn(&Tensor) -> &Place,
    stored: impl Fn(&Place) -> Option<(DType, &'a [u8])>,
) -> Result<Fixed> {
    let mut fixed = HashMap::new();
    for tensor in decoder.tensors().iter().filter(|tensor| !tensor.is_matrix()) {
        let place = place(tensor);
        let is_as_used = place.layout == Layout::AsStored && place.form == Form::AsUsed;
        if is_as_used && !place.is_fused(tensor) {
            continue;
        }
        let Some((dtype, bytes)) = stored(place) else { continue };
        let rows = 0..tensor.dims[0];
        let stored_row = |row: usize| place.layout.stored_row(row).unwrap_or(row);
        let end = rows.clone().map(stored_row).max().map_or(0, |last| last + 1);
        let value_bytes = dtype.size_in_bytes(1).unwrap_or_default() as usize;
        let bytes = &bytes[place.first_row * value_bytes..][..end * value_bytes];
        let Some(values) = floats(dtype, bytes) else {
            let what = format!("vector `{}` of type {dtype:?}", place.name);
            return Err(FormatError::unsupported(path, what, ""));
        };
        let value = |row: usize| place.form.used(values[stored_row(row)]).to_le_bytes();
        fixed.insert(tensor.name.clone(), rows.flat_map(value).collect());
    }
    Ok(Fixed(fixed))
}

/// The values of a plain type; `None` of another.
pub(crate) fn floats(dtype: DType, bytes: &[u8]) -> Option<Vec<f32>> {
    let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    Some(match dtype {
        DType::F16 => halves().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
        DType::BF16 => halves().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        DType::F32 => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        _ => return None,
    })
}
