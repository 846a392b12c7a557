//! A weight matrix of any storage as rows of f32.

use std::{mem, ops::Range};

use slim_formats::{
    Weight,
    slim::{Bands, PackedTensor, TILE_ROWS},
};

use crate::{Result, ggml};

/// `(rows, cols)` of a weight: output and input channels.
pub fn shape(weight: Weight<'_>) -> (usize, usize) {
    match weight {
        Weight::Dense(dense) => (dense.rows, dense.cols),
        Weight::Packed(packed) => (packed.layout().rows(), packed.layout().cols()),
        Weight::Bands(bands) => bands.shape(),
    }
}

/// Bytes that a weight takes where it lies.
pub fn stored_bytes(weight: Weight<'_>) -> u64 {
    match weight {
        Weight::Dense(dense) => dense.stored_bytes(),
        Weight::Packed(packed) => packed.layout().stored_bits() / 8,
        Weight::Bands(bands) => bands.iter().map(|(_, band)| band.layout().stored_bits() / 8).sum(),
    }
}

/// Writes rows `rows` of a weight to `out: [rows.len(), cols]`, row-major.
///
/// # Errors
/// `UnsupportedType` for element types that hold no weights.
///
/// # Panics
/// If `out` has another length or `rows` leaves the matrix.
pub fn dequantize_rows(weight: Weight<'_>, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
    match weight {
        Weight::Dense(dense) => ggml::dequantize_rows(&dense, rows, out),
        Weight::Packed(packed) => {
            dequantize_packed_rows(packed, rows, out);
            Ok(())
        }
        Weight::Bands(bands) => {
            dequantize_band_rows(bands, rows, out);
            Ok(())
        }
    }
}

/// What of `rows` each band holds.
fn dequantize_band_rows(bands: Bands<'_>, rows: Range<usize>, mut out: &mut [f32]) {
    let (height, cols) = bands.shape();
    assert!(rows.end <= height && out.len() == rows.len() * cols);
    for (first, band) in bands.iter() {
        let end = first + band.layout().rows();
        let wanted = rows.start.clamp(first, end) - first..rows.end.clamp(first, end) - first;
        let (mine, below) = mem::take(&mut out).split_at_mut(wanted.len() * cols);
        dequantize_packed_rows(band, wanted, mine);
        out = below;
    }
}

/// Section 3 and 4 of `docs/format.md`, to the letter.
fn dequantize_packed_rows(packed: PackedTensor<'_>, rows: Range<usize>, out: &mut [f32]) {
    let layout = packed.layout();
    assert!(rows.end <= layout.rows() && out.len() == rows.len() * layout.cols());
    let longest = layout.groups().iter().map(|group| group.cols.len()).max().unwrap_or(0);
    let mut codes = vec![[0; TILE_ROWS]; longest];
    for tile in rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS) {
        let first_row = tile * TILE_ROWS;
        let wanted = rows.start.max(first_row)..rows.end.min(first_row + TILE_ROWS);
        let (d, m) = packed.row_scales(tile);
        for group in layout.groups() {
            let codes = &mut codes[..group.cols.len()];
            packed.codes(tile, group, codes);
            for (run, cols) in group.runs(layout.coding()).enumerate() {
                let (factor, offset) = packed.scales(tile, group, run);
                let codes = &codes[cols.start - group.cols.start..];
                for row in wanted.clone() {
                    let lane = row - first_row;
                    let (factor, offset) = (d[lane] * factor[lane], m[lane] * offset[lane]);
                    let out = &mut out[(row - rows.start) * layout.cols()..][cols.clone()];
                    for (value, column) in out.iter_mut().zip(codes) {
                        *value = factor * f32::from(column[lane]) + offset;
                    }
                }
            }
        }
    }
}
