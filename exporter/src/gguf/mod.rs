//! `--to gguf`: a file for llama.cpp.

mod blocks;
mod metadata;

use std::io::{Read, Seek, Write};

use rayon::prelude::*;
use slim_formats::{
    AtomicFile, DType, FormatError, ModelSource, OutputPath,
    arch::{ROPE_FACTORS, Tensor},
    gguf::{HeaderWriter, NewTensor},
    slim::TILE_ROWS,
};
use slim_kernels::{ggml, weight};

use crate::{
    LayerLoss, Report, Result,
    tensor::{Loss, check_values, for_each_panel, tensors},
};

/// Where tensors start: at multiples of GGUF's default.
const ALIGNMENT: u32 = 32;

pub(crate) fn write(
    model: &dyn ModelSource,
    output: OutputPath<'_>,
    on_tensor: &mut dyn FnMut(&str),
) -> Result<Report> {
    let planned = plan(model)?;
    let mut warnings = warnings(model);
    warnings.extend(check_values(model, |tensor| {
        let mut planned = planned.iter().filter(|planned| planned.name == tensor.name);
        planned.any(|planned| planned.dtype == DType::F16)
    })?);
    let metadata = metadata::of(model, &planned)?;
    let header = HeaderWriter::new(output.path, &metadata, &planned, ALIGNMENT)?;
    let write_error = |error| FormatError::io(output.path, "write the file", error);

    let mut out = AtomicFile::create(output)?;
    out.reserve(header.file_bytes())?;
    out.write_all(header.bytes()).map_err(write_error)?;
    let mut layers = Vec::new();
    for (tensor, &offset) in planned.iter().zip(header.tensor_offsets()) {
        on_tensor(&tensor.name);
        pad_to(&mut out, offset).map_err(write_error)?;
        let bytes = match model.decoder().find(&tensor.name) {
            Some(known) => {
                let (bytes, loss) = encode(model, known, tensor.dtype)?;
                layers.extend(loss);
                bytes
            }
            // No tensor of a `ModelSource`.
            None => f32_bytes(&model.config().rope.factors),
        };
        out.write_all(&bytes).map_err(write_error)?;
    }
    pad_to(&mut out, header.file_bytes()).map_err(write_error)?;
    out.commit()?;
    let tensors = planned.iter().filter(|tensor| tensor.name != ROPE_FACTORS).count();
    Ok(Report { tensors, file_bytes: header.file_bytes(), layers, warnings })
}

/// What llama.cpp does not do for its `llama` architecture.
fn warnings(model: &dyn ModelSource) -> Vec<String> {
    let config = model.config();
    let window = config.sliding_window.filter(|&window| window < config.context_length);
    let warning = |window| {
        format!(
            "llama.cpp attends to all tokens: texts longer than the sliding window of {window} \
             tokens will differ"
        )
    };
    window.map(warning).into_iter().collect()
}

/// The tensors of the file.
fn plan(model: &dyn ModelSource) -> Result<Vec<NewTensor>> {
    let mut planned = Vec::new();
    for tensor in tensors(model)? {
        let name = tensor.name.clone();
        let weight = model.require(&name)?;
        let (rows, cols) = weight::shape(weight);
        let shape = match rows {
            1 => vec![cols as u64],
            _ => vec![rows as u64, cols as u64],
        };
        planned.push(NewTensor { name, dtype: blocks::dtype_for(weight), shape });
    }
    let rope = &model.config().rope;
    if !rope.is_unscaled() {
        let (name, shape) = (ROPE_FACTORS.to_owned(), vec![rope.factors.len() as u64]);
        planned.push(NewTensor { name, dtype: DType::F32, shape });
    }
    Ok(planned)
}

/// The bytes of a tensor, and what a matrix loses.
fn encode(
    model: &dyn ModelSource,
    tensor: &Tensor,
    dtype: DType,
) -> Result<(Vec<u8>, Option<LayerLoss>)> {
    let (name, order) = (tensor.name.as_str(), tensor.gguf.layout);
    let weight = model.require(name)?;
    let (rows, cols) = weight::shape(weight);
    let row_bytes = dtype.size_in_bytes(cols as u64).expect("the type was chosen for it") as usize;
    let mut stored = vec![0; rows * row_bytes];
    let mut loss = Loss::default();
    for_each_panel(weight, |first, values| {
        let mut encoded = vec![0; values.len() / cols * row_bytes];
        let steps = encoded.par_chunks_mut(TILE_ROWS * row_bytes);
        steps.zip(values.par_chunks(TILE_ROWS * cols)).enumerate().try_for_each(
            |(step, (bytes, values))| {
                let first = first + step * TILE_ROWS;
                blocks::encode_rows(name, weight, dtype, first, values, bytes)
            },
        )?;
        let mut written = vec![0.0; values.len()];
        ggml::dequantize(dtype, &encoded, &mut written)?;
        loss.add(values, &written);
        let places = (first..).map_while(|row| order.stored_row(row));
        for (place, bytes) in places.zip(encoded.chunks_exact(row_bytes)) {
            stored[place * row_bytes..][..row_bytes].copy_from_slice(bytes);
        }
        Ok(())
    })?;
    let is_matrix = rows > 1;
    let loss = is_matrix.then(|| LayerLoss {
        name: name.to_owned(),
        layout: blocks::name_of(dtype),
        error: loss.relative(),
    });
    Ok((stored, loss))
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn pad_to(out: &mut AtomicFile, offset: u64) -> std::io::Result<()> {
    let position = out.stream_position()?;
    std::io::copy(&mut std::io::repeat(0).take(offset.saturating_sub(position)), out).map(drop)
}
