//! Writing: the header as bytes, and where everything after it belongs.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use super::{
    ALIGNMENT_KEY, ALIGNMENT_RULE, Array, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMENSIONS, Metadata,
    Value, dtype_id, is_alignment, tensor_bytes,
};
use crate::{DType, FormatError, Result};

const VERSION: u32 = 3;

/// The longest name that llama.cpp reads: its 64 bytes hold a closing zero, too.
const MAX_NAME_BYTES: usize = 63;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTensor {
    /// Its name, unique in the file, 1 to 63 bytes.
    pub name: String,
    /// Its element type; the layout must be known.
    pub dtype: DType,
    /// Its dimensions, outermost first: a matrix is `[rows, cols]`.
    pub shape: Vec<u64>,
}

impl NewTensor {
    /// How many bytes it has, `None` if GGUF cannot hold its type and shape.
    pub fn bytes(&self) -> Option<u64> {
        tensor_bytes(self.dtype, &self.shape)
    }
}

/// The header of a GGUF file, written first; the caller streams the tensors after it, to the
/// offsets that it gives. Bytes of the file that neither covers must be zero.
///
/// # Examples
/// ```
/// use slim_formats::gguf::{GgufHeader, HeaderWriter, Metadata, NewTensor};
/// use slim_formats::{DType, Limits};
///
/// let path = "norm.gguf".as_ref();
/// let mut metadata = Metadata::new();
/// metadata.insert("general.architecture", "llama")?;
/// let tensor = NewTensor { name: "output_norm.weight".into(), dtype: DType::F32, shape: vec![8] };
/// let header = HeaderWriter::new(path, &metadata, &[tensor], 64)?;
///
/// let read = GgufHeader::parse(path, header.bytes(), header.file_bytes(), &Limits::default())?;
/// assert_eq!(read.tensors()[0].offset, header.tensor_offsets()[0]);
/// # Ok::<(), slim_formats::FormatError>(())
/// ```
#[derive(Debug, Clone)]
pub struct HeaderWriter {
    bytes: Vec<u8>,
    unpadded_bytes: usize,
    value_offsets: HashMap<String, usize>,
    tensor_offsets: Vec<u64>,
    file_bytes: u64,
}

impl HeaderWriter {
    /// Lays out a version 3 file with the tensors in the order given, each at a multiple of
    /// `alignment`. An alignment other than GGUF's default of 32 is added to the metadata.
    /// `path` is for messages.
    ///
    /// # Errors
    /// `InvalidArgument` if GGUF cannot hold a name, a shape or the alignment, or if the metadata
    /// already sets the alignment.
    pub fn new(
        path: &Path,
        metadata: &Metadata,
        tensors: &[NewTensor],
        alignment: u32,
    ) -> Result<Self> {
        if !is_alignment(alignment) || metadata.contains(ALIGNMENT_KEY) {
            let what = format!("`{}`: key `{ALIGNMENT_KEY}`", path.display());
            let expected = format!("{ALIGNMENT_RULE}, given as an argument only");
            return Err(FormatError::invalid_argument(what, alignment, expected));
        }
        let own_entry = (alignment != DEFAULT_ALIGNMENT).then_some(Value::U32(alignment));
        let own_entry = own_entry.as_ref().map(|value| (ALIGNMENT_KEY, value));

        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((tensors.len() as u64).to_le_bytes());
        bytes.extend(((metadata.len() + usize::from(own_entry.is_some())) as u64).to_le_bytes());
        let value_offsets = put_metadata(&mut bytes, metadata.iter().chain(own_entry));
        let Placement { offsets, data_bytes } = place(path, tensors, alignment.into())?;
        for (tensor, &offset) in tensors.iter().zip(&offsets) {
            put_tensor_info(&mut bytes, tensor, offset);
        }

        let unpadded_bytes = bytes.len();
        bytes.resize(unpadded_bytes.next_multiple_of(alignment as usize), 0);
        let data_start = bytes.len() as u64;
        let file_bytes = data_start.checked_add(data_bytes).ok_or_else(|| too_large(path))?;
        let tensor_offsets = offsets.iter().map(|offset| data_start + offset).collect();
        Ok(Self { bytes, unpadded_bytes, value_offsets, tensor_offsets, file_bytes })
    }

    /// The header with the padding up to the first tensor.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The header without that padding, as
    /// [`GgufPart::header_bytes`](super::GgufPart::header_bytes) gives it.
    pub fn unpadded(&self) -> &[u8] {
        &self.bytes[..self.unpadded_bytes]
    }

    /// Where each tensor starts, in the order given, counted from the start of the file.
    pub fn tensor_offsets(&self) -> &[u64] {
        &self.tensor_offsets
    }

    /// Bytes of the whole file, with padding after the last tensor.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Where the value of a metadata key starts in [`bytes`](Self::bytes).
    pub fn value_offset(&self, key: &str) -> Option<usize> {
        self.value_offsets.get(key).copied()
    }

    /// Replaces the value of a key that was written as a `u64`, such as a hash of the header.
    ///
    /// # Panics
    /// If the header has no such key.
    pub fn set_u64(&mut self, key: &str, value: u64) {
        let offset = self.value_offset(key).expect("the key was written");
        self.bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }
}

/// Where the tensors start, relative to the first, and the bytes of all with padding.
struct Placement {
    offsets: Vec<u64>,
    data_bytes: u64,
}

fn place(path: &Path, tensors: &[NewTensor], alignment: u64) -> Result<Placement> {
    let mut names = HashSet::new();
    let mut offsets = Vec::with_capacity(tensors.len());
    let mut end = 0u64;
    for tensor in tensors {
        let bytes = checked_bytes(path, tensor)?;
        if !names.insert(&tensor.name) {
            return Err(tensor_error(path, tensor, "a second tensor of this name", "one"));
        }
        offsets.push(end);
        let padded = end.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(alignment));
        end = padded.ok_or_else(|| too_large(path))?;
    }
    Ok(Placement { offsets, data_bytes: end })
}

/// The bytes of a tensor that GGUF can hold.
fn checked_bytes(path: &Path, tensor: &NewTensor) -> Result<u64> {
    let name_bytes = tensor.name.len();
    if !(1..=MAX_NAME_BYTES).contains(&name_bytes) {
        let expected = format!("1 to {MAX_NAME_BYTES}");
        return Err(tensor_error(path, tensor, format!("a name of {name_bytes} bytes"), expected));
    }
    tensor.bytes().ok_or_else(|| {
        let found = format!("{:?} {:?}", tensor.dtype, tensor.shape);
        let expected = format!(
            "a known type, 1 to {MAX_DIMENSIONS} dimensions that are not 0, rows of whole blocks"
        );
        tensor_error(path, tensor, found, expected)
    })
}

fn tensor_error(
    path: &Path,
    tensor: &NewTensor,
    found: impl ToString,
    expected: impl Into<String>,
) -> FormatError {
    let what = format!("`{}`: tensor `{}`", path.display(), tensor.name);
    FormatError::invalid_argument(what, found, expected)
}

fn too_large(path: &Path) -> FormatError {
    let what = format!("`{}`: the sum of the tensors' sizes", path.display());
    FormatError::invalid_argument(what, "more", "at most 2^64 - 1 bytes")
}

/// Writes the entries, and gives back where the value of each starts.
fn put_metadata<'a>(
    out: &mut Vec<u8>,
    entries: impl Iterator<Item = (&'a str, &'a Value)>,
) -> HashMap<String, usize> {
    let mut put_entry = |(key, value): (&str, &Value)| {
        put_string(out, key);
        out.extend(value.type_id().to_le_bytes());
        let offset = out.len();
        put_value(out, value);
        (key.to_owned(), offset)
    };
    entries.map(&mut put_entry).collect()
}

fn put_tensor_info(out: &mut Vec<u8>, tensor: &NewTensor, offset: u64) {
    put_string(out, &tensor.name);
    out.extend((tensor.shape.len() as u32).to_le_bytes());
    for dimension in tensor.shape.iter().rev() {
        out.extend(dimension.to_le_bytes());
    }
    out.extend(dtype_id(tensor.dtype).to_le_bytes());
    out.extend(offset.to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(value) => out.extend(value.to_le_bytes()),
        Value::I8(value) => out.extend(value.to_le_bytes()),
        Value::U16(value) => out.extend(value.to_le_bytes()),
        Value::I16(value) => out.extend(value.to_le_bytes()),
        Value::U32(value) => out.extend(value.to_le_bytes()),
        Value::I32(value) => out.extend(value.to_le_bytes()),
        Value::U64(value) => out.extend(value.to_le_bytes()),
        Value::I64(value) => out.extend(value.to_le_bytes()),
        Value::F32(value) => out.extend(value.to_le_bytes()),
        Value::F64(value) => out.extend(value.to_le_bytes()),
        Value::Bool(value) => out.push((*value).into()),
        Value::String(value) => put_string(out, value),
        Value::Array(array) => put_array(out, array),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.type_id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(values) => out.extend(values),
        Array::I8(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U16(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I16(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::Bool(values) => out.extend(values.iter().map(|&value| u8::from(value))),
        Array::String(values) => values.iter().for_each(|text| put_string(out, text)),
        Array::Array(values) => values.iter().for_each(|array| put_array(out, array)),
    }
}
