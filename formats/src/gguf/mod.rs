//! GGUF files, versions 2 and 3, little-endian.
//!
//! A GGUF file is a header (metadata, then one entry per tensor) and the tensors' bytes. Reading
//! is [`GgufFile::open`], or [`GgufHeader::parse`] on bytes; writing is [`HeaderWriter::new`],
//! after which the caller streams the tensors to the offsets that it gives.
//!
//! # Source
//! `docs/gguf.md` of the ggml repository.

mod model;
mod reader;
pub(crate) mod split;
#[cfg(test)]
mod tests;
mod value;
mod writer;

pub use model::GgufModel;
pub use reader::{GgufFile, GgufHeader, GgufPart, TensorInfo};
pub use value::{Array, Metadata, Value};
pub use writer::{HeaderWriter, NewTensor};

use crate::DType;

/// What a token is for: values of `tokenizer.ggml.token_type`.
pub mod token_type {
    /// Ordinary text.
    pub const NORMAL: u64 = 1;
    /// Stands for what has no token.
    pub const UNKNOWN: u64 = 2;
    /// Guides the model, and is no part of the text.
    pub const CONTROL: u64 = 3;
    /// Text that is found before anything else happens to the text around it.
    pub const USER_DEFINED: u64 = 4;
    /// Fills an id.
    pub const UNUSED: u64 = 5;
}

/// The first bytes of every GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";

/// The key that sets where tensors may start, and the value without it.
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u32 = 32;

/// What the specification asks of `general.alignment`.
const ALIGNMENT_RULE: &str = "a u32 that is a multiple of 8, not 0";

const MAX_DIMENSIONS: usize = 4;

fn is_alignment(alignment: u32) -> bool {
    alignment > 0 && alignment.is_multiple_of(8)
}

/// Elements of a tensor, `None` if a dimension is 0, there are none or too many, or the count
/// overflows.
fn element_count(shape: &[u64]) -> Option<u64> {
    let in_range = (1..=MAX_DIMENSIONS).contains(&shape.len()) && !shape.contains(&0);
    in_range
        .then(|| shape.iter().try_fold(1u64, |count, &dimension| count.checked_mul(dimension)))
        .flatten()
}

/// Bytes of a tensor, `None` for an unknown type, rows that do not fill whole blocks, or an
/// overflow.
fn tensor_bytes(dtype: DType, shape: &[u64]) -> Option<u64> {
    let (block_elements, _) = dtype.block()?;
    let whole_blocks = shape.last()?.is_multiple_of(block_elements);
    whole_blocks.then(|| dtype.size_in_bytes(element_count(shape)?)).flatten()
}

/// The numbers that GGUF gives the element types.
const DTYPE_IDS: [(DType, u32); 19] = [
    (DType::F32, 0),
    (DType::F16, 1),
    (DType::Q4_0, 2),
    (DType::Q4_1, 3),
    (DType::Q5_0, 6),
    (DType::Q5_1, 7),
    (DType::Q8_0, 8),
    (DType::Q2_K, 10),
    (DType::Q3_K, 11),
    (DType::Q4_K, 12),
    (DType::Q5_K, 13),
    (DType::Q6_K, 14),
    (DType::I8, 24),
    (DType::I16, 25),
    (DType::I32, 26),
    (DType::I64, 27),
    (DType::F64, 28),
    (DType::BF16, 30),
    (DType::MXFP4, 39),
];

/// The element type of a GGUF type number, [`DType::Unknown`] for a number not known here.
pub fn dtype_from_id(id: u32) -> DType {
    let known = DTYPE_IDS.iter().find(|&&(_, known)| known == id);
    known.map_or(DType::Unknown(id), |&(dtype, _)| dtype)
}

/// The GGUF type number of an element type.
pub fn dtype_id(dtype: DType) -> u32 {
    match dtype {
        DType::Unknown(id) => id,
        known => {
            DTYPE_IDS
                .iter()
                .find(|&&(dtype, _)| dtype == known)
                .expect("every known type is in the table")
                .1
        }
    }
}
