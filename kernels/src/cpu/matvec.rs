//! One token times a packed layer, straight from the file's bytes: 16 rows are 16 lanes.

use slim_formats::slim::{PackedTensor, TILE_ROWS};

type Lanes = [f32; TILE_ROWS];

/// Columns that are unpacked at a time: every group is a whole number of them.
const UNIT: usize = 16;

/// The sums of `x` over each run of 16 columns: what a minimum multiplies, shared by all rows.
pub fn column_sums(x: &[f32]) -> Vec<f32> {
    x.chunks_exact(UNIT).map(|unit| unit.iter().sum()).collect()
}

per_isa! {
    /// The products of the 16 rows of a tile with `x`; `sums` from [`column_sums`].
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
                let units = cols.start / UNIT - first_unit..cols.end / UNIT - first_unit;
                let sum: f32 = sums[cols.start / UNIT..cols.end / UNIT].iter().sum();
                let x = &x[cols];
                let dots = match group.bit_width.bits() {
                    1 => dots::<1>(codes, units, x),
                    2 => dots::<2>(codes, units, x),
                    3 => dots::<3>(codes, units, x),
                    4 => dots::<4>(codes, units, x),
                    5 => dots::<5>(codes, units, x),
                    6 => dots::<6>(codes, units, x),
                    7 => dots::<7>(codes, units, x),
                    _ => dots::<8>(codes, units, x),
                };
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
fn dots<const WIDTH: usize>(codes: &[u8], units: std::ops::Range<usize>, x: &[f32]) -> Lanes {
    let mut sums = [0.0; TILE_ROWS];
    for (unit, x) in units.zip(x.chunks_exact(UNIT)) {
        let words = UnitWords::load::<WIDTH>(codes, unit);
        for (col, &x) in x.iter().enumerate() {
            let column = words.column::<WIDTH>(col / 4, col % 4);
            for r in 0..TILE_ROWS {
                sums[r] += column[r] as i32 as f32 * x;
            }
        }
    }
    sums
}

/// The words of each plane that hold a unit; planes that a width lacks stay zero and unused.
struct UnitWords {
    eight: [[u32; TILE_ROWS]; 4],
    four: [[u32; TILE_ROWS]; 2],
    two: [u32; TILE_ROWS],
    one: [u32; TILE_ROWS],
}

impl UnitWords {
    #[inline(always)]
    fn load<const WIDTH: usize>(codes: &[u8], unit: usize) -> Self {
        let zero = [0; TILE_ROWS];
        let mut words = Self { eight: [zero; 4], four: [zero; 2], two: zero, one: zero };
        let cols = codes.len() / (2 * WIDTH);
        let mut plane = codes;
        if WIDTH & 8 != 0 {
            words.eight = std::array::from_fn(|block| load_words(plane, 4 * unit + block));
        }
        if WIDTH & 4 != 0 {
            words.four = std::array::from_fn(|block| load_words(plane, 2 * unit + block));
            plane = &plane[2 * 4 * cols..];
        }
        if WIDTH & 2 != 0 {
            words.two = load_words(plane, unit);
            plane = &plane[2 * 2 * cols..];
        }
        if WIDTH & 1 != 0 {
            let short = unit % 2 == 0 && (unit + 1) * UNIT == cols;
            words.one = if short {
                load_short_words(&plane[unit * 32..])
            } else {
                load_words(plane, unit / 2).map(|word| word >> (4 * (unit % 2)))
            };
        }
        words
    }

    /// The codes of column `4 t + k` of the unit.
    #[inline(always)]
    fn column<const WIDTH: usize>(&self, t: usize, k: usize) -> [u32; TILE_ROWS] {
        let mut column = [0; TILE_ROWS];
        let mut low = 0;
        let mut add = |words: &[u32; TILE_ROWS], bits: usize, shift: usize| {
            for r in 0..TILE_ROWS {
                column[r] |= ((words[r] >> (8 * k + shift)) & ((1 << bits) - 1)) << low;
            }
            low += bits;
        };
        if WIDTH & 8 != 0 {
            add(&self.eight[t], 8, 0);
        }
        if WIDTH & 4 != 0 {
            add(&self.four[t / 2], 4, 4 * (t % 2));
        }
        if WIDTH & 2 != 0 {
            add(&self.two, 2, 2 * t);
        }
        if WIDTH & 1 != 0 {
            add(&self.one, 1, t);
        }
        column
    }
}

/// Block `block` of a plane: a word for each row (F12).
#[inline(always)]
fn load_words(plane: &[u8], block: usize) -> [u32; TILE_ROWS] {
    let bytes = &plane[64 * block..][..64];
    std::array::from_fn(|r| {
        u32::from_le_bytes([bytes[4 * r], bytes[4 * r + 1], bytes[4 * r + 2], bytes[4 * r + 3]])
    })
}

/// The short last block of a 1-bit plane (F13), spread so that its bits lie as in the low half of a whole block.
#[inline(always)]
fn load_short_words(bytes: &[u8]) -> [u32; TILE_ROWS] {
    let bytes = &bytes[..2 * TILE_ROWS];
    std::array::from_fn(|r| {
        let half = u32::from(u16::from_le_bytes([bytes[2 * r], bytes[2 * r + 1]]));
        let spread = (half | half << 8) & 0x00ff_00ff;
        (spread | spread << 4) & 0x0f0f_0f0f
    })
}
