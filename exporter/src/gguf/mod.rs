//! `--to gguf`: a file for llama.cpp.

mod differences;
mod metadata;

use std::io::{Read, Seek, Write};

use slim_formats::{
    AtomicFile, DType, FormatError, ModelSource, OutputPath,
    gguf::{HeaderWriter, NewTensor},
};

pub(crate) use differences::lacks;

use crate::{
    ExportError, Report, Result, rows,
    tensor::{StoredTensor, check_values, stored_tensors, tensors},
};

/// Where tensors start: at multiples of GGUF's default.
const ALIGNMENT: u32 = 32;

pub(crate) fn write(
    model: &dyn ModelSource,
    output: OutputPath<'_>,
    on_tensor: &mut dyn FnMut(&str),
) -> Result<Report> {
    let tensors = tensors(model)?;
    let planned = plan(model, stored_tensors(tensors, |tensor| &tensor.gguf))?;
    let rope_vectors = model.config().rope_vectors();
    let mut warnings = differences::warnings(model.config());
    warnings.extend(check_values(model, |tensor| {
        let mut planned = planned.iter().filter(|(stored, _)| stored.name == tensor.gguf.name);
        planned.any(|&(_, dtype)| dtype == DType::F16)
    })?);
    let metadata = metadata::of(model, file_type(&planned))?;
    let mut in_header: Vec<NewTensor> = planned
        .iter()
        .map(|(stored, dtype)| new_tensor(stored.name, *dtype, &stored.dims()))
        .collect();
    in_header.extend(
        rope_vectors.iter().map(|(name, values)| new_tensor(name, DType::F32, &[values.len()])),
    );
    let header = HeaderWriter::new(output.path, &metadata, &in_header, ALIGNMENT)?;
    let write_error = |error| FormatError::io(output.path, "write the file", error);

    let mut out = AtomicFile::create(output)?;
    out.reserve(header.file_bytes())?;
    out.write_all(header.bytes()).map_err(write_error)?;
    let mut layers = Vec::new();
    let of_model = planned.iter().map(|(stored, dtype)| {
        let (bytes, losses) = stored.encode(model, *dtype, on_tensor)?;
        layers.extend(losses);
        Ok::<_, ExportError>(bytes)
    });
    let of_config = rope_vectors.iter().map(|(_, values)| Ok(f32_bytes(values)));
    for (bytes, &offset) in of_model.chain(of_config).zip(header.tensor_offsets()) {
        let bytes = bytes?;
        pad_to(&mut out, offset).map_err(write_error)?;
        out.write_all(&bytes).map_err(write_error)?;
    }
    pad_to(&mut out, header.file_bytes()).map_err(write_error)?;
    out.commit()?;
    Ok(Report { tensors: tensors.len(), file_bytes: header.file_bytes(), layers, warnings })
}

/// The tensors of the file that are the model's, and their types.
fn plan<'m>(
    model: &dyn ModelSource,
    stored: Vec<StoredTensor<'m>>,
) -> Result<Vec<(StoredTensor<'m>, DType)>> {
    let mut planned = Vec::with_capacity(stored.len());
    for tensor in stored {
        let mut dtypes = Vec::with_capacity(tensor.parts.len());
        for (part, _) in &tensor.parts {
            dtypes.push(match part.is_matrix() {
                true => rows::dtype_for(model.require(&part.name)?),
                // What llama.cpp asks for.
                false => DType::F32,
            });
        }
        let dtype = dtypes.into_iter().reduce(rows::wider).expect("it has a part");
        planned.push((tensor, dtype));
    }
    Ok(planned)
}

fn new_tensor(name: &str, dtype: DType, dims: &[usize]) -> NewTensor {
    NewTensor { name: name.to_owned(), dtype, shape: dims.iter().map(|&dim| dim as u64).collect() }
}

/// llama.cpp's number for files that are mostly of the type of the first linear layer.
fn file_type(planned: &[(StoredTensor<'_>, DType)]) -> Option<u32> {
    let is_linear = |(stored, _): &&(StoredTensor<'_>, _)| stored.parts[0].0.is_linear();
    match planned.iter().find(is_linear)?.1 {
        DType::F32 => Some(0),
        DType::F16 => Some(1),
        DType::Q4_0 => Some(2),
        DType::Q4_1 => Some(3),
        DType::Q8_0 => Some(7),
        DType::Q5_0 => Some(8),
        DType::Q5_1 => Some(9),
        DType::BF16 => Some(32),
        _ => None,
    }
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn pad_to(out: &mut AtomicFile, offset: u64) -> std::io::Result<()> {
    let position = out.stream_position()?;
    std::io::copy(&mut std::io::repeat(0).take(offset.saturating_sub(position)), out).map(drop)
}
