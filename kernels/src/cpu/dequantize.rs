//! Many rows of a packed layer as f32, for products with many tokens.

use std::ops::Range;

use slim_formats::slim::{Bands, PackedTensor, TILE_ROWS};

use super::unpack::{Lanes, Planes, UNIT, UnitWords, for_width};

/// Columns `[cols, tiles.len() * 16]` of a matrix: row `r` of the tiles is lane `r` of every
/// column. Padding rows are zero.
///
/// # Accuracy
/// Equal to [`crate::weight::dequantize_rows`] up to one rounding, where the processor fuses
/// multiply and add.
pub fn columns(bands: Bands<'_>, tiles: Range<usize>) -> Vec<f32> {
    let stride = tiles.len() * TILE_ROWS;
    // Whole units are written; what is past the last column is cut off then.
    let cols = bands.shape().1;
    let mut out = vec![0.0; cols.next_multiple_of(UNIT) * stride];
    for (first_row, band) in bands.iter() {
        let first = first_row / TILE_ROWS;
        let end = first + band.layout().tiles();
        for tile in tiles.start.clamp(first, end)..tiles.end.clamp(first, end) {
            tile_columns(band, tile - first, &mut out[(tile - tiles.start) * TILE_ROWS..], stride);
        }
    }
    out.truncate(cols * stride);
    out
}

per_isa! {
    fn tile_columns(packed: PackedTensor<'_>, tile: usize, out: &mut [f32], stride: usize) {
        let layout = packed.layout();
        let (d, m) = packed.row_scales(tile);
        for group in layout.groups() {
            let codes = &packed.tile_codes(tile)[group.codes_offset..][..group.code_bytes()];
            for (run, cols) in group.runs(layout.coding()).enumerate() {
                let (mut factor, mut offset) = packed.scales(tile, group, run);
                for r in 0..TILE_ROWS {
                    factor[r] *= d[r];
                    offset[r] *= m[r];
                }
                let first = cols.start - group.cols.start;
                let units = first / UNIT..(first + cols.len()).div_ceil(UNIT);
                let out = &mut out[cols.start * stride..];
                for_width!(group.bit_width, run_columns(codes, units, &factor, &offset, out, stride));
            }
        }
    }
}

#[inline(always)]
fn run_columns<const WIDTH: usize>(
    codes: &[u8],
    units: Range<usize>,
    factor: &Lanes,
    offset: &Lanes,
    out: &mut [f32],
    stride: usize,
) {
    let planes = Planes::of::<WIDTH>(codes);
    for (index, unit) in units.enumerate() {
        let words = UnitWords::load::<WIDTH>(planes, unit);
        for t in 0..4 {
            for k in 0..4 {
                let column = words.column::<WIDTH>(t, k);
                let out = &mut out[(UNIT * index + 4 * t + k) * stride..][..TILE_ROWS];
                for r in 0..TILE_ROWS {
                    out[r] = factor[r] * column[r] as i32 as f32 + offset[r];
                }
            }
        }
    }
}
