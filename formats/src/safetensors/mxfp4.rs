//! Weights in MXFP4, as gpt-oss has its experts: `NAME_blocks` of 4-bit numbers beside
//! `NAME_scales` of powers of two, one for 32 numbers of a row.

use std::path::Path;

use safetensors::{Dtype, tensor::TensorInfo};

use super::{
    index::{Shards, StoredTensor, Table},
    scales::Scales,
};
use crate::{BlockScales, DType, FormatError, Result, ScaleValues};

const BLOCKS: &str = "_blocks";
const SCALES: &str = "_scales";

/// Numbers that share a scale.
const BLOCK: usize = 32;

/// Type, rows and columns of a tensor that may be blocks or scales by its name and type; `None` for
/// others.
pub(super) fn stored(name: &str, info: &TensorInfo) -> Option<(DType, usize, usize)> {
    match (info.dtype, &info.shape[..]) {
        (Dtype::U8, &[ref above @ .., blocks, bytes])
            if name.ends_with(BLOCKS) && 2 * bytes == BLOCK =>
        {
            Some((DType::F4_E2M1, above.iter().product(), blocks * BLOCK))
        }
        (Dtype::U8, &[ref above @ .., blocks]) if name.ends_with(SCALES) => {
            Some((DType::F8_E8M0, above.iter().product(), blocks))
        }
        _ => None,
    }
    .filter(|&(_, rows, cols)| rows > 0 && cols > 0)
}

/// The scales of a matrix, where they are stored.
pub(super) fn view<'a>(scales: &StoredTensor, shards: &'a Shards) -> BlockScales<'a> {
    let values = ScaleValues::Exponents(shards.bytes_of(scales));
    BlockScales { values, block: (1, BLOCK), per_row: scales.cols, first_row: 0 }
}

/// Puts every matrix in MXFP4 with its scales under the name that both have in common.
///
/// # Errors
/// `Malformed` for a matrix without scales, or scales that do not fill it.
pub(super) fn attach_scales(path: &Path, stored: &mut Table) -> Result<()> {
    let in_mxfp4 = stored.iter().filter(|(_, tensor)| tensor.dtype == DType::F4_E2M1);
    let mut names: Vec<String> = in_mxfp4.map(|(name, _)| name.clone()).collect();
    names.sort();
    for name in names {
        let malformed = |found: String, expected: String| {
            FormatError::malformed(path, format!("tensor `{name}` in MXFP4"), "", found, expected)
        };
        let mut matrix = stored.remove(&name).expect("listed above");
        let common = name.trim_end_matches(BLOCKS);
        let of_scales = format!("{common}{SCALES}");
        let Some(scales) = stored.remove(&of_scales) else {
            return Err(malformed("no scales".into(), format!("`{of_scales}`")));
        };
        let expected = (matrix.rows, matrix.cols / BLOCK);
        if scales.dtype != DType::F8_E8M0 || (scales.rows, scales.cols) != expected {
            let found = format!("scales [{}, {}] of {:?}", scales.rows, scales.cols, scales.dtype);
            let expected =
                format!("[{}, {}], one byte for {BLOCK} columns", expected.0, expected.1);
            return Err(malformed(found, expected));
        }
        matrix.scales = Some(Scales::Mxfp4(Box::new(scales)));
        if stored.insert(common.to_owned(), matrix).is_some() {
            return Err(malformed(format!("`{common}` beside it"), "one of them".into()));
        }
    }
    Ok(())
}
