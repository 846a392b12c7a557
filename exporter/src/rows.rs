//! Rows of weights in ggml's types.

use half::f16;
use slim_formats::{
    DType, DenseTensor, Weight,
    slim::{Bands, LayerLayout, PackedTensor, TILE_ROWS},
};
use slim_kernels::narrow;

use crate::{ExportError, Result, tensor::to_bytes};

/// Columns of a block of every type that is encoded here.
const BLOCK: usize = 32;

/// Types that hold what those before them hold, but for rounding.
const WIDENING: [DType; 5] = [DType::Q4_1, DType::Q5_1, DType::Q8_0, DType::F16, DType::F32];

/// The type that holds a matrix: of packed layers, the smallest that holds their codes and their
/// scales as they are; of a dense one, its own, or a float if it has scales beside it.
pub fn dtype_for(weight: Weight<'_>) -> DType {
    match (weight, weight.bands()) {
        (_, Some(bands)) => dtype_for_bands(bands),
        // A power of two times few bits.
        (Weight::Dense(DenseTensor { dtype: DType::F4_E2M1, .. }), None) => DType::BF16,
        (Weight::Dense(DenseTensor { scales: Some(_), .. }), None) => DType::F32,
        (Weight::Dense(dense), None) => dense.dtype,
        _ => DType::F32,
    }
}

/// The type of two matrices in one, which have these.
pub fn wider(one: DType, other: DType) -> DType {
    let rank = |dtype| WIDENING.iter().position(|&found| found == dtype);
    match (rank(one), rank(other)) {
        _ if one == other => one,
        (Some(first), Some(second)) => WIDENING[first.max(second)],
        _ => DType::F32,
    }
}

fn dtype_for_bands(bands: Bands<'_>) -> DType {
    let layout = bands.get(0).layout();
    match bands.widest().bits() {
        _ if !layout.cols().is_multiple_of(BLOCK) => DType::F16,
        _ if !has_one_scale_per_block(layout) => DType::Q8_0,
        ..=4 => DType::Q4_1,
        5 => DType::Q5_1,
        _ => DType::Q8_0,
    }
}

/// Whether no block has columns of two runs.
fn has_one_scale_per_block(layout: &LayerLayout) -> bool {
    let mut runs = layout.groups().iter().flat_map(|group| group.runs(layout.coding()));
    runs.all(|run| run.start.is_multiple_of(BLOCK) && run.end.is_multiple_of(BLOCK))
}

/// The name of a type, as llama.cpp spells it.
pub fn name_of(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::Q4_0 => "Q4_0",
        DType::Q4_1 => "Q4_1",
        DType::Q5_0 => "Q5_0",
        DType::Q5_1 => "Q5_1",
        DType::Q8_0 => "Q8_0",
        DType::Q2_K => "Q2_K",
        DType::Q3_K => "Q3_K",
        DType::Q4_K => "Q4_K",
        DType::Q5_K => "Q5_K",
        DType::Q6_K => "Q6_K",
        DType::MXFP4 => "MXFP4",
        _ => "other",
    }
}

/// Encodes up to a tile of rows from row `first` on; `values` are their weights, `bytes` is
/// overwritten.
pub fn encode(
    name: &str,
    weight: Weight<'_>,
    dtype: DType,
    first: usize,
    values: &[f32],
    bytes: &mut [u8],
) -> Result<()> {
    match (weight, dtype) {
        (Weight::Dense(dense), _)
            if dense.dtype == dtype && dense.layout.stored_row(first).is_some() =>
        {
            let row_bytes = dense.row_bytes();
            let stored = (first..).map_while(|row| dense.layout.stored_row(row));
            for (stored, bytes) in stored.zip(bytes.chunks_exact_mut(row_bytes)) {
                bytes.copy_from_slice(&dense.bytes[stored * row_bytes..][..row_bytes]);
            }
        }
        (Weight::Packed(_) | Weight::Bands(_), DType::Q4_1 | DType::Q5_1) => {
            let above = |(first_row, _): &(usize, _)| *first_row <= first;
            let band = weight.bands().and_then(|bands| bands.iter().take_while(above).last());
            let (first_row, packed) = band.expect("the first band begins with row 0");
            encode_codes(name, packed, dtype, first_row, first, bytes)?;
        }
        (_, DType::Q8_0) => encode_q8_0(name, first, values, bytes)?,
        _ => {
            let (_, cols) = slim_kernels::weight::shape(weight);
            bytes.copy_from_slice(&to_bytes(name, dtype, first, cols, values)?);
        }
    }
    Ok(())
}

/// The codes of a tile as they are, from row `first` of the matrix on, in a band that begins with
/// row `first_row`: `scale`, `minimum`, for Q5_1 bit 4 of the codes, then their low 4 bits.
fn encode_codes(
    name: &str,
    packed: PackedTensor<'_>,
    dtype: DType,
    first_row: usize,
    first: usize,
    bytes: &mut [u8],
) -> Result<()> {
    let layout = packed.layout();
    let (_, block_bytes) = dtype.block().expect("the caller chose a known type");
    let block_bytes = block_bytes as usize;
    let row_bytes = layout.cols() / BLOCK * block_bytes;
    let tile = (first - first_row) / TILE_ROWS;
    let (d, m) = packed.row_scales(tile);
    for group in layout.groups() {
        let mut codes = vec![Default::default(); group.cols.len()];
        packed.codes(tile, group, &mut codes);
        for (run, cols) in group.runs(layout.coding()).enumerate() {
            let (factor, offset) = packed.scales(tile, group, run);
            for (lane, row) in bytes.chunks_exact_mut(row_bytes).enumerate() {
                let scale = half(name, first + lane, d[lane] * factor[lane])?;
                let minimum = half(name, first + lane, m[lane] * offset[lane])?;
                for col in cols.clone().step_by(BLOCK) {
                    let codes = &codes[col - group.cols.start..];
                    let codes = std::array::from_fn(|j| codes[j][lane]);
                    let block = &mut row[col / BLOCK * block_bytes..][..block_bytes];
                    block[..2].copy_from_slice(&scale.to_le_bytes());
                    block[2..4].copy_from_slice(&minimum.to_le_bytes());
                    put_codes(&codes, &mut block[4..]);
                }
            }
        }
    }
    Ok(())
}

/// Low halves of the last 16 bytes: the first 16 codes; high halves: the others. Before them, for
/// Q5_1, a bit string of the bits 4.
fn put_codes(codes: &[u8; BLOCK], block: &mut [u8]) {
    let (high, low) = block.split_at_mut(block.len() - BLOCK / 2);
    for (j, byte) in low.iter_mut().enumerate() {
        *byte = codes[j] & 15 | codes[j + BLOCK / 2] << 4;
    }
    for (j, byte) in high.iter_mut().enumerate() {
        let bits = codes[8 * j..][..8].iter().enumerate();
        *byte = bits.fold(0, |byte, (bit, code)| byte | (code >> 4 & 1) << bit);
    }
}

/// Scale and signed bytes: the largest weight of a block is 127 or -127.
fn encode_q8_0(name: &str, first: usize, values: &[f32], bytes: &mut [u8]) -> Result<()> {
    const BLOCK_BYTES: usize = 2 + BLOCK;
    for (values, block) in values.chunks_exact(BLOCK).zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
        let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let scale = half(name, first, largest / 127.0)?;
        block[..2].copy_from_slice(&scale.to_le_bytes());
        // Of a block that fp16 scales cannot tell from zeros, zeros are left.
        let inverse = if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() };
        for (value, byte) in values.iter().zip(&mut block[2..]) {
            *byte = (value * inverse).round().clamp(-127.0, 127.0) as i8 as u8;
        }
    }
    Ok(())
}

/// A finite fp16 value.
fn half(name: &str, row: usize, value: f32) -> Result<f16> {
    let tensor = || name.to_owned();
    narrow::to_f16(value).ok_or_else(|| ExportError::Unrepresentable {
        tensor: tensor(),
        row,
        found: value,
    })
}
