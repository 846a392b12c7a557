//! The rules that a reader of a SliM file does not depend on, or that cost a pass over its data.

use half::{bf16, f16};

use super::{
    file::{ALIGNMENT, Fault, SlimFile, keys, part_name},
    layout::{PackedTensor, TILE_ROWS},
};
use crate::{
    DType, ModelSource, TokenizerSource, Weight,
    gguf::{Array, GgufPart, TensorInfo, Value},
};

/// Bytes of a tensor's name at most (F1): what llama.cpp's readers take.
const MAX_NAME_BYTES: usize = 63;

/// The faults of everything but layers and hashes.
pub(super) fn faults(file: &SlimFile) -> Vec<Fault> {
    let found = [name_fault, gap_fault, model_fault, tokenizer_fault, error_fault, dense_fault];
    found.into_iter().filter_map(|fault| fault(file)).collect()
}

/// F1, for the first name that is too long.
fn name_fault(file: &SlimFile) -> Option<Fault> {
    let mut names = file.gguf().tensors().iter().map(|info| info.name.as_str());
    let name = names.find(|name| name.len() > MAX_NAME_BYTES)?;
    Some(Fault {
        rule: "F1",
        place: format!("tensor `{name}`"),
        found: format!("a name of {} bytes", name.len()),
        expected: format!("at most {MAX_NAME_BYTES}"),
    })
}

/// F1, for the first part with bytes that belong to no tensor and are no padding.
fn gap_fault(file: &SlimFile) -> Option<Fault> {
    file.gguf().parts().find_map(|part| gap_fault_in(file, part))
}

fn gap_fault_in(file: &SlimFile, part: GgufPart<'_>) -> Option<Fault> {
    let bytes = part.bytes();
    let mut ranges: Vec<_> = part.tensors().iter().map(TensorInfo::range).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.push(bytes.len()..bytes.len());
    let mut end = part.header_bytes().len();
    for range in ranges {
        let padding = &bytes[end..range.start];
        let first = padding.iter().position(|&byte| byte != 0);
        let at = first.or_else(|| (padding.len() >= ALIGNMENT as usize).then_some(0));
        if let Some(at) = at {
            return Some(Fault {
                rule: "F1",
                place: format!("byte {} of the file{}", end + at, file.within(part)),
                found: format!("{} bytes that belong to no tensor", padding.len()),
                expected: format!("fewer than {ALIGNMENT}, all zero"),
            });
        }
        end = range.end;
    }
    None
}

/// F3, for the first tensor of the model that is missing or has another shape.
fn model_fault(file: &SlimFile) -> Option<Fault> {
    file.decoder().tensors().iter().find_map(|tensor| {
        let (name, expected) = (&tensor.name, tensor.shape());
        let found = match file.tensor(name) {
            Ok(Some(Weight::Dense(dense))) => Some((dense.rows, dense.cols)),
            Ok(Some(Weight::Packed(layer))) => Some((layer.layout().rows(), layer.layout().cols())),
            Ok(Some(Weight::Bands(bands))) => Some(bands.shape()),
            Ok(None) | Err(_) => None,
        };
        let shape = |(rows, cols)| format!("{rows} x {cols}");
        (found != Some(expected)).then(|| Fault {
            rule: "F3",
            place: format!("tensor `{name}`"),
            found: found.map_or("none".to_owned(), shape),
            expected: format!("{}, by the keys of the model", shape(expected)),
        })
    })
}

/// F4: a tokenizer; opening checks the ids of its special tokens.
fn tokenizer_fault(file: &SlimFile) -> Option<Fault> {
    matches!(file.tokenizer(), TokenizerSource::Missing).then(|| Fault {
        rule: "F4",
        place: "key `tokenizer.huggingface.json`".into(),
        found: "none".into(),
        expected: "it, or `tokenizer.ggml.tokens`".into(),
    })
}

/// F5, for the first layer error that is no number.
fn error_fault(file: &SlimFile) -> Option<Fault> {
    let Some(Value::Array(Array::F32(errors))) = file.gguf().metadata().get(&keys::layers("error"))
    else {
        return None;
    };
    let measured = errors.iter().map(|&error| (error != -1.0).then_some(error));
    measured.zip(file.layers()).find_map(|(error, info)| layer_error_fault(&info.name, error))
}

/// F5 for the error of layer `name`, `None` if it was not measured.
pub(super) fn layer_error_fault(name: &str, error: Option<f32>) -> Option<Fault> {
    let found = error.filter(|error| !(error.is_finite() && *error >= 0.0))?;
    Some(Fault {
        rule: "F5",
        place: format!("error of layer `{name}`"),
        found: found.to_string(),
        expected: "a finite number from 0 on".into(),
    })
}

/// F22, for the first dense tensor with a value that is no number.
fn dense_fault(file: &SlimFile) -> Option<Fault> {
    let dense = file.gguf().tensors().iter().filter(|info| !file.is_part(&info.name));
    let mut faults =
        dense.map(|info| value_fault(&info.name, info.dtype, file.gguf().bytes_of(info)));
    faults.find_map(|fault| fault)
}

/// F22 for the values of the dense tensor `name`.
pub(super) fn value_fault(name: &str, dtype: DType, bytes: &[u8]) -> Option<Fault> {
    let (at, found) = match dtype {
        DType::F32 => first_not_finite(bytes, f32::from_le_bytes),
        DType::F16 => first_not_finite(bytes, |b| f16::from_le_bytes(b).to_f32()),
        DType::BF16 => first_not_finite(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        _ => None,
    }?;
    Some(Fault {
        rule: "F22",
        place: format!("tensor `{name}`, value {at}"),
        found: found.to_string(),
        expected: "finite values".into(),
    })
}

/// F9, for the first scale, mean or row scale of a layer that is no number.
pub(super) fn scale_fault(name: &str, layer: PackedTensor<'_>) -> Option<Fault> {
    let layout = layer.layout();
    let half = |b| f16::from_le_bytes(b).to_f32();
    (0..layout.tiles()).find_map(|tile| {
        let row_scales = first_not_finite(layer.tile_row_scales(tile), half);
        let found = row_scales.map(|found| ("row_scales", found)).or_else(|| {
            let mut records = layout.groups().iter().map(|group| {
                let bytes = group.float_scale_bytes(layout.coding());
                &layer.tile_scales(tile)[group.scales_offset..][..bytes]
            });
            let found = records.find_map(|record| first_not_finite(record, half));
            found.map(|found| ("scales", found))
        });
        found.map(|(part, (at, value))| {
            let row = tile * TILE_ROWS + at % TILE_ROWS;
            Fault {
                rule: "F9",
                place: format!("tensor `{}`, row {row}", part_name(name, part)),
                found: value.to_string(),
                expected: "finite values".into(),
            }
        })
    })
}

/// The first of the numbers in `bytes` that is not finite, and its index.
fn first_not_finite<const N: usize>(
    bytes: &[u8],
    number: impl Fn([u8; N]) -> f32,
) -> Option<(usize, f32)> {
    let numbers = bytes.as_chunks().0.iter().map(|&bytes| number(bytes));
    numbers.enumerate().find(|(_, number)| !number.is_finite())
}
