//! f32 inputs and sums: loops that the compiler vectorises for any instruction set.

use std::ops::Range;

use slim_formats::slim::{Group, PackedTensor, TILE_ROWS};

use super::super::unpack::{Codes, Lanes, UNIT, for_width};

/// The sums of `x`, in whole units, over each unit: what a minimum multiplies, shared by all rows.
pub fn column_sums(x: &[f32]) -> Vec<f32> {
    x.chunks_exact(UNIT).map(|unit| unit.iter().sum()).collect()
}

per_isa! {
    /// The products of the 16 rows of a tile with `x`, in whole units; `sums` from [`column_sums`].
    ///
    /// # Accuracy
    /// f32 sums in column order within a sub-group (two-level) or group (paper), then over those.
    pub fn tile(packed: PackedTensor<'_>, tile: usize, x: &[f32], sums: &[f32]) -> Lanes {
        let layout = packed.layout();
        let (mut scaled, mut shifted) = ([0.0; TILE_ROWS], [0.0; TILE_ROWS]);
        for group in layout.groups() {
            let first_unit = group.cols.start / UNIT;
            for (run, cols) in group.runs(layout.coding()).enumerate() {
                let units = cols.start / UNIT..cols.end.div_ceil(UNIT);
                let sum: f32 = sums[units.clone()].iter().sum();
                let x = &x[units.start * UNIT..units.end * UNIT];
                let units = units.start - first_unit..units.end - first_unit;
                let dots = for_width!(group.bit_width, dots(packed, tile, group, units, x));
                let (factor, offset) = packed.scales(tile, group, run);
                for r in 0..TILE_ROWS {
                    scaled[r] += factor[r] * dots[r];
                    shifted[r] += offset[r] * sum;
                }
            }
        }
        let (d, m) = packed.row_scales(tile);
        std::array::from_fn(|r| d[r] * scaled[r] + m[r] * shifted[r])
    }
}

/// The sums of code times input over some units of a group, for each row.
#[inline(always)]
fn dots<const WIDTH: usize>(
    packed: PackedTensor<'_>,
    tile: usize,
    group: &Group,
    units: Range<usize>,
    x: &[f32],
) -> Lanes {
    let codes = Codes::of::<WIDTH>(packed, tile, group);
    let mut sums = [0.0; TILE_ROWS];
    for (unit, x) in units.zip(x.chunks_exact(UNIT)) {
        codes.for_columns::<WIDTH>(unit, |col, codes| {
            for r in 0..TILE_ROWS {
                sums[r] += codes[r] as i32 as f32 * x[col];
            }
        });
    }
    sums
}
