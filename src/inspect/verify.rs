//! What is wrong with the numbers of files that are no SliM files.

use safetensors::{Dtype, SafeTensors};
use slim_formats::{
    DType, DenseTensor, FormatError, Layout, MappedFile, ModelSource, Part, Result,
    TokenizerSource, Weight,
    gguf::{GgufFile, Value},
    slim::Fault,
    vocabulary_faults,
};
use slim_kernels::narrow::Extent;

/// The tensors of a model, and of each the first value that is no number.
pub fn model_faults(source: &dyn ModelSource) -> Result<Vec<Fault>> {
    let mut faults = Vec::new();
    for name in source.tensor_names() {
        if let Some(weight) = source.tensor(name)? {
            faults.extend(value_fault(name, weight));
        }
        source.release_pages();
    }
    Ok(faults)
}

/// The numbers of the metadata and the tensors of a GGUF file, and its vocabulary; scales of ggml's
/// blocks that are no numbers make weights that are none.
pub fn gguf_faults(file: &GgufFile) -> Vec<Fault> {
    let keys = file.metadata().iter().filter_map(|(key, value)| {
        let found = match value {
            Value::F32(value) => f64::from(*value),
            Value::F64(value) => *value,
            _ => return None,
        };
        (!found.is_finite()).then(|| fault(format!("key `{key}`"), found, "a finite number"))
    });
    let tensors = file.tensors().iter().filter_map(|info| {
        let bytes = file.bytes_of(info);
        value_fault(&info.name, dense(info.dtype, &info.shape, bytes))
    });
    // An embedding that lists no rows asks nothing of the vocabulary.
    let rows = file
        .tensor(&Part::Embedding.gguf_name())
        .and_then(|embedding| embedding.shape.first().copied());
    let rows = rows.and_then(|rows| usize::try_from(rows).ok()).unwrap_or(usize::MAX);
    let tokenizer = TokenizerSource::from_gguf(file.metadata());
    keys.chain(tensors).chain(vocabulary_faults(&tokenizer, rows, "")).collect()
}

/// The tensors of a safetensors file.
pub fn safetensors_faults(file: &MappedFile) -> Result<Vec<Fault>> {
    let tensors = SafeTensors::deserialize(file).map_err(|error| {
        FormatError::malformed(file.path(), "the header", "", error, "a safetensors header")
    })?;
    let faults = tensors.iter().filter_map(|(name, tensor)| {
        let dtype = match tensor.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            _ => return None,
        };
        let shape: Vec<u64> = tensor.shape().iter().map(|&dim| dim as u64).collect();
        value_fault(name, dense(dtype, &shape, tensor.data()))
    });
    Ok(faults.collect())
}

/// Any tensor as a matrix of its last dimension.
fn dense<'a>(dtype: DType, shape: &[u64], bytes: &'a [u8]) -> Weight<'a> {
    let cols = shape.last().map_or(1, |&cols| cols as usize);
    let rows = shape.iter().rev().skip(1).product::<u64>() as usize;
    Weight::Dense(DenseTensor { dtype, rows, cols, bytes, layout: Layout::AsStored, scales: None })
}

/// The first value of a tensor that is no number; `None` for types that hold no weights.
fn value_fault(name: &str, weight: Weight<'_>) -> Option<Fault> {
    let (row, found) = Extent::of(weight).ok()?.not_finite?;
    Some(fault(format!("tensor `{name}`, row {row}"), found, "finite values"))
}

fn fault(place: String, found: impl ToString, expected: &str) -> Fault {
    Fault { rule: "", place, found: found.to_string(), expected: expected.to_owned() }
}
