//! Weights in FP8 with scales per tensor, per row or per block, as DeepSeek, Mistral and
//! compressed-tensors store them.

use std::path::Path;

use super::{
    index::{Shards, Table},
    scales::Scales,
};
use crate::{BlockScales, DType, FormatError, Result, ScaleValues, places::floats};

/// What follows a matrix's name, without `.weight`, in that of its scales.
const SCALES: [&str; 3] = [".weight_scale_inv", ".weight_scale", ".qscale_weight"];

/// Endings of scales of activations and of cached keys and values: those are computed in floats.
const OF_ACTIVATIONS: [&str; 6] =
    [".input_scale", ".activation_scale", ".qscale_act", ".k_scale", ".v_scale", ".kv_scale"];

/// Whether a tensor belongs to a matrix in FP8.
pub(super) fn is_scale(name: &str) -> bool {
    SCALES.iter().chain(&OF_ACTIVATIONS).any(|suffix| name.ends_with(suffix))
}

/// The scales of a matrix.
#[derive(Debug, Clone)]
pub(super) struct Fp8Scales {
    /// `[rows of blocks, per_row]`.
    values: Vec<f32>,
    block: (usize, usize),
    per_row: usize,
}

impl Fp8Scales {
    pub fn view(&self) -> BlockScales<'_> {
        let Self { ref values, block, per_row } = *self;
        BlockScales { values: ScaleValues::Floats(values), block, per_row, first_row: 0 }
    }
}

/// Gives every matrix in FP8 its scales, and takes them out of the table. Scales of other matrices
/// stay in it: they are tensors that nobody knows.
///
/// # Errors
/// `Malformed` for a matrix without scales, or scales that do not fill it.
pub(super) fn attach_scales(path: &Path, shards: &Shards, stored: &mut Table) -> Result<()> {
    let in_fp8 = stored.iter().filter(|(_, tensor)| tensor.dtype == DType::F8_E4M3);
    let mut names: Vec<String> = in_fp8.map(|(name, _)| name.clone()).collect();
    if !names.is_empty() {
        let is_of_activations = |name: &str| OF_ACTIVATIONS.iter().any(|end| name.ends_with(end));
        stored.retain(|name, _| !is_of_activations(name));
    }
    names.sort();
    for name in names {
        let malformed = |found: String, expected: &str| {
            FormatError::malformed(path, format!("tensor `{name}` in FP8"), "", found, expected)
        };
        let module = name.trim_end_matches(".weight");
        let scales = SCALES.iter().find_map(|suffix| stored.remove(&format!("{module}{suffix}")));
        let Some(scales) = scales else {
            return Err(malformed("no scale".into(), "`weight_scale_inv` or `weight_scale`"));
        };
        let (rows, cols) = (stored[&name].rows, stored[&name].cols);
        // Of each row one, as a vector.
        let (down, across) = match (scales.rows, scales.cols) {
            (1, count) if count == rows && rows > 1 => (rows, 1),
            shape => shape,
        };
        let values = floats(scales.dtype, shards.bytes_of(&scales)).unwrap_or_default();
        let blocks = block_of(rows, down).zip(block_of(cols, across));
        let Some(block) = blocks.filter(|_| values.len() == down * across) else {
            let found = format!("scales [{down}, {across}]");
            return Err(malformed(found, &format!("one per block of [{rows}, {cols}]")));
        };
        if let Some(found) = values.iter().find(|scale| !scale.is_finite()) {
            return Err(malformed(format!("the scale {found}"), "finite numbers"));
        }
        let scales = Fp8Scales { values, block, per_row: across };
        stored.get_mut(&name).expect("listed above").scales = Some(Scales::Fp8(scales));
    }
    Ok(())
}

/// The length of `count` blocks that fill `len`, but for the last: the smallest power of two that
/// does, which is the only one, unless there is one block.
fn block_of(len: usize, count: usize) -> Option<usize> {
    let powers = (0..usize::BITS - 1).map(|power| 1 << power);
    powers.take_while(|&block| block < 2 * len).find(|&block| len.div_ceil(block) == count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_powers_of_two_that_fill_the_matrix() {
        for (len, count, block) in
            [(256, 2, 128), (300, 3, 128), (130, 2, 128), (64, 1, 64), (96, 1, 128), (96, 96, 1)]
        {
            assert_eq!(block_of(len, count), Some(block), "{len} in {count}");
        }
        assert_eq!(block_of(256, 3), None);
        assert_eq!(block_of(256, 0), None);
        assert_eq!(block_of(4, 5), None);
    }
}
