//! Many rows of a packed layer as f32, for products with many tokens.

use std::ops::Range;

use slim_formats::slim::{Bands, Group, PackedTensor, TILE_ROWS};

use super::unpack::{Codes, Lanes, UNIT, for_width};

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
            for (run, cols) in group.runs(layout.coding()).enumerate() {
                let (mut factor, mut offset) = packed.scales(tile, group, run);
                for r in 0..TILE_ROWS {
                    factor[r] *= d[r];
                    offset[r] *= m[r];
                }
                let first = cols.start - group.cols.start;
                let units = first / UNIT..(first + cols.len()).div_ceil(UNIT);
                let out = &mut out[cols.start * stride..];
                for_width!(
                    group.bit_width,
                    run_columns(packed, tile, group, units, [&factor, &offset], out, stride)
                );
            }
        }
    }
}

#[inline(always)]
fn run_columns<const WIDTH: usize>(
    packed: PackedTensor<'_>,
    tile: usize,
    group: &Group,
    units: Range<usize>,
    [factor, offset]: [&Lanes; 2],
    out: &mut [f32],
    stride: usize,
) {
    let codes = Codes::of::<WIDTH>(packed, tile, group);
    for (index, unit) in units.enumerate() {
        codes.for_columns::<WIDTH>(unit, |col, codes| {
            let out = &mut out[(UNIT * index + col) * stride..][..TILE_ROWS];
            for r in 0..TILE_ROWS {
                out[r] = factor[r] * codes[r] as i32 as f32 + offset[r];
            }
        });
    }
}
