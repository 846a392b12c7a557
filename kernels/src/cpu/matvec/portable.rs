//! f32 inputs and sums: loops that the compiler vectorises for any instruction set.

use std::ops::Range;

use slim_formats::slim::{PackedTensor, TILE_ROWS};

use super::super::unpack::{Lanes, Planes, UNIT, UnitWords, for_width};

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
            let codes = &packed.tile_codes(tile)[group.codes_offset..][..group.code_bytes()];
            let first_unit = group.cols.start / UNIT;
            for (run, cols) in group.runs(layout.coding()).enumerate() {
                let units = cols.start / UNIT..cols.end.div_ceil(UNIT);
                let sum: f32 = sums[units.clone()].iter().sum();
                let x = &x[units.start * UNIT..units.end * UNIT];
                let units = units.start - first_unit..units.end - first_unit;
                let dots = for_width!(group.bit_width, dots(codes, units, x));
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
fn dots<const WIDTH: usize>(codes: &[u8], units: Range<usize>, x: &[f32]) -> Lanes {
    let planes = Planes::of::<WIDTH>(codes);
    let mut sums = [0.0; TILE_ROWS];
    for (unit, x) in units.zip(x.chunks_exact(UNIT)) {
        let words = UnitWords::load::<WIDTH>(planes, unit);
        for t in 0..4 {
            for k in 0..4 {
                let column = words.column::<WIDTH>(t, k);
                for r in 0..TILE_ROWS {
                    sums[r] += column[r] as i32 as f32 * x[4 * t + k];
                }
            }
        }
    }
    sums
}
