//! Codes of 16 rows and 16 columns at a time, in registers.
//!
//! Loops over rows are written out rather than mapped: a closure that is not inlined loses the
//! caller's instruction set.

use slim_formats::slim::{TILE_ROWS, UNIT_COLS};

/// One value for each row of a tile.
pub type Lanes = [f32; TILE_ROWS];

/// Columns that are unpacked at a time: every group is stored as a whole number of them.
pub const UNIT: usize = UNIT_COLS;

/// Calls `function::<WIDTH>(arguments)` for a bit-width that is known at run time.
macro_rules! for_width {
    ($width:expr, $($function:ident)::+($($argument:expr),*)) => {
        match $width.bits() {
            1 => $($function)::+::<1>($($argument),*),
            2 => $($function)::+::<2>($($argument),*),
            3 => $($function)::+::<3>($($argument),*),
            4 => $($function)::+::<4>($($argument),*),
            5 => $($function)::+::<5>($($argument),*),
            6 => $($function)::+::<6>($($argument),*),
            7 => $($function)::+::<7>($($argument),*),
            _ => $($function)::+::<8>($($argument),*),
        }
    };
}
pub(super) use for_width;

/// The planes of a group in blocks (F11, F12); those that its width lacks are empty.
#[derive(Clone, Copy)]
pub struct Planes<'a> {
    /// Units in the group.
    pub units: usize,
    /// Four blocks for each unit.
    pub eight: &'a [[Block; 4]],
    /// Two blocks for each unit.
    pub four: &'a [[Block; 2]],
    /// A block for each unit.
    pub two: &'a [Block],
    /// A block for each two units.
    pub one: &'a [Block],
    /// The last unit of a 1-bit plane with an odd number of them (F13).
    pub short: &'a [u8; 32],
}

type Block = [u8; 64];

impl<'a> Planes<'a> {
    /// Finds the planes in the codes of a group.
    #[inline(always)]
    pub fn of<const WIDTH: usize>(codes: &'a [u8]) -> Self {
        const BIT_BYTES: usize = UNIT * TILE_ROWS / 8;
        let units = codes.len() / (WIDTH * BIT_BYTES);
        // With these lengths loops over units need no checks of their own.
        let (eight, rest) = codes.split_at(units * BIT_BYTES * (WIDTH & 8));
        let (four, rest) = rest.split_at(units * BIT_BYTES * (WIDTH & 4));
        let (two, one) = rest.split_at(units * BIT_BYTES * (WIDTH & 2));
        let (one, short) = one.as_chunks();
        Self {
            units,
            eight: eight.as_chunks().0.as_chunks().0,
            four: four.as_chunks().0.as_chunks().0,
            two: two.as_chunks().0,
            one,
            short: short.first_chunk().unwrap_or(&[0; 32]),
        }
    }
}

/// The words of each plane that hold a unit; planes that a width lacks stay zero and unused.
pub struct UnitWords {
    eight: [[u32; TILE_ROWS]; 4],
    four: [[u32; TILE_ROWS]; 2],
    two: [u32; TILE_ROWS],
    one: [u32; TILE_ROWS],
}

impl UnitWords {
    /// Finds unit `unit` in the planes of a group.
    #[inline(always)]
    pub fn load<const WIDTH: usize>(planes: Planes<'_>, unit: usize) -> Self {
        let zero = [0; TILE_ROWS];
        let mut words = Self { eight: [zero; 4], four: [zero; 2], two: zero, one: zero };
        if WIDTH & 8 != 0 {
            for block in 0..4 {
                words.eight[block] = load_words(&planes.eight[unit][block]);
            }
        }
        if WIDTH & 4 != 0 {
            for block in 0..2 {
                words.four[block] = load_words(&planes.four[unit][block]);
            }
        }
        if WIDTH & 2 != 0 {
            words.two = load_words(&planes.two[unit]);
        }
        if WIDTH & 1 != 0 {
            words.one = match planes.one.get(unit / 2) {
                Some(block) => {
                    let mut whole = load_words(block);
                    for word in &mut whole {
                        *word >>= 4 * (unit % 2);
                    }
                    whole
                }
                None => short_words(planes.short),
            };
        }
        words
    }

    /// The codes of column `4 t + k` of the unit, one for each row.
    #[inline(always)]
    pub fn column<const WIDTH: usize>(&self, t: usize, k: usize) -> [u32; TILE_ROWS] {
        let mut column = [0; TILE_ROWS];
        let mut low = 0;
        if WIDTH & 8 != 0 {
            low = add_field(&mut column, &self.eight[t], 8, 8 * k, low);
        }
        if WIDTH & 4 != 0 {
            low = add_field(&mut column, &self.four[t / 2], 4, 8 * k + 4 * (t % 2), low);
        }
        if WIDTH & 2 != 0 {
            low = add_field(&mut column, &self.two, 2, 8 * k + 2 * t, low);
        }
        if WIDTH & 1 != 0 {
            add_field(&mut column, &self.one, 1, 8 * k + t, low);
        }
        column
    }
}

/// Adds `bits` bits of each word, from bit `shift` on, to the codes at bit `low`; gives the next
/// free bit.
#[inline(always)]
fn add_field(
    column: &mut [u32; TILE_ROWS],
    words: &[u32; TILE_ROWS],
    bits: usize,
    shift: usize,
    low: usize,
) -> usize {
    for r in 0..TILE_ROWS {
        column[r] |= ((words[r] >> shift) & ((1 << bits) - 1)) << low;
    }
    low + bits
}

/// A block of a plane: a word for each row (F12).
#[inline(always)]
fn load_words(block: &Block) -> [u32; TILE_ROWS] {
    let (bytes, _) = block.as_chunks::<4>();
    let mut words = [0; TILE_ROWS];
    for r in 0..TILE_ROWS {
        words[r] = u32::from_le_bytes(bytes[r]);
    }
    words
}

/// The short last block of a 1-bit plane (F13), spread so that its bits lie as in the low half of a
/// whole block.
#[inline(always)]
pub fn short_words(block: &[u8; 32]) -> [u32; TILE_ROWS] {
    let (bytes, _) = block.as_chunks::<2>();
    let mut words = [0; TILE_ROWS];
    for r in 0..TILE_ROWS {
        let half = u32::from(u16::from_le_bytes(bytes[r]));
        let spread = (half | half << 8) & 0x00ff_00ff;
        words[r] = (spread | spread << 4) & 0x0f0f_0f0f;
    }
    words
}

/// The zero points of a paper record, after its scales (F16).
#[inline(always)]
pub fn zero_points<const WIDTH: usize>(bytes: &[u8]) -> [u8; TILE_ROWS] {
    let mut padded = [0; 16];
    padded[..2 * WIDTH].copy_from_slice(&bytes[..2 * WIDTH]);
    let bits = u128::from_le_bytes(padded);
    let mut zero_points = [0; TILE_ROWS];
    for (r, zero_point) in zero_points.iter_mut().enumerate() {
        *zero_point = (bits >> (WIDTH * r)) as u8 & (u8::MAX >> (8 - WIDTH));
    }
    zero_points
}
