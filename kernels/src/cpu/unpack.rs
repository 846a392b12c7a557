//! Codes of 16 rows and 16 columns at a time, in registers.
//!
//! Loops over rows are written out rather than mapped: a closure that is not inlined loses the
//! caller's instruction set.

use slim_formats::slim::{
    Group, PackedTensor, ScaleCoding, TILE_ROWS, UNIT_COLS, WindowTable, ring_place,
};

/// One value for each row of a tile.
pub type Lanes = [f32; TILE_ROWS];

/// Columns that are unpacked at a time: every group is stored as a whole number of them.
pub const UNIT: usize = UNIT_COLS;

/// Calls `function::<WIDTH>(arguments)` for a bit-width that is known at run time, or, of
/// `function[MORE](arguments)`, `function::<WIDTH, MORE>(arguments)`.
macro_rules! for_width {
    ($width:expr, $($function:ident)::+ $([$more:ident])? ($($argument:expr),*)) => {
        match $width.bits() {
            1 => $($function)::+::<1 $(, $more)?>($($argument),*),
            2 => $($function)::+::<2 $(, $more)?>($($argument),*),
            3 => $($function)::+::<3 $(, $more)?>($($argument),*),
            4 => $($function)::+::<4 $(, $more)?>($($argument),*),
            5 => $($function)::+::<5 $(, $more)?>($($argument),*),
            6 => $($function)::+::<6 $(, $more)?>($($argument),*),
            7 => $($function)::+::<7 $(, $more)?>($($argument),*),
            _ => $($function)::+::<8 $(, $more)?>($($argument),*),
        }
    };
}
pub(super) use for_width;

/// The planes of a group in blocks (F11, F12); those that its width lacks are empty.
#[derive(Clone, Copy)]
pub struct Planes<'a> {
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

impl Default for Planes<'_> {
    /// Of no columns.
    #[inline(always)]
    fn default() -> Self {
        Self { eight: &[], four: &[], two: &[], one: &[], short: &[0; 32] }
    }
}

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

/// The codes of a group in a tile, and what they stand for.
#[derive(Clone, Copy)]
pub struct Codes<'a> {
    own: Planes<'a>,
    /// Of a trellis: the other tile of the strip, whether it is the one above, and the table.
    strip: Option<(Planes<'a>, bool, &'a WindowTable)>,
}

impl<'a> Codes<'a> {
    /// Finds the codes of a group in a tile.
    #[inline(always)]
    pub fn of<const WIDTH: usize>(packed: PackedTensor<'a>, tile: usize, group: &Group) -> Self {
        let planes = |tile| {
            let codes = &packed.tile_codes(tile)[group.codes_offset..][..group.code_bytes()];
            Planes::of::<WIDTH>(codes)
        };
        let strip = match packed.layout().coding() {
            ScaleCoding::Paper | ScaleCoding::TwoLevel { .. } => None,
            ScaleCoding::Trellis { .. } => {
                Some((planes(tile ^ 1), tile % 2 == 1, WindowTable::of(group.bit_width)))
            }
        };
        Self { own: planes(tile), strip }
    }

    /// Calls `of_column` with the codes of each column of a unit, for a trellis with the entries
    /// that they stand for.
    #[inline(always)]
    pub fn for_columns<const WIDTH: usize>(
        self,
        unit: usize,
        mut of_column: impl FnMut(usize, [u32; TILE_ROWS]),
    ) {
        let own = UnitWords::load::<WIDTH>(self.own, unit);
        match self.strip {
            None => {
                for col in 0..UNIT {
                    of_column(col, own.column::<WIDTH>(col / 4, col % 4));
                }
            }
            Some((other, is_below, table)) => {
                let other = UnitWords::load::<WIDTH>(other, unit);
                for col in 0..UNIT {
                    let own = own.column::<WIDTH>(col / 4, col % 4);
                    let other = other.column::<WIDTH>(col / 4, col % 4);
                    of_column(col, entries::<WIDTH>(own, other, is_below, table));
                }
            }
        }
    }
}

/// The entries of a column's windows (F24, F25): behind a row of the tile above stands that of the
/// tile below, behind this the next one of the tile above.
#[inline(always)]
fn entries<const WIDTH: usize>(
    own: [u32; TILE_ROWS],
    other: [u32; TILE_ROWS],
    is_below: bool,
    table: &WindowTable,
) -> [u32; TILE_ROWS] {
    let (mut code, mut behind) = (own, if is_below { next_rows(other) } else { other });
    let mut windows = [0; TILE_ROWS];
    for bit in (0..8).step_by(WIDTH) {
        for r in 0..TILE_ROWS {
            windows[r] |= code[r] << bit;
        }
        (code, behind) = (behind, next_rows(code));
    }
    let mut entries = [0; TILE_ROWS];
    for r in 0..TILE_ROWS {
        let window = windows[r] as usize % 256;
        entries[r] = u32::from(table.low[window % 16] + table.high[window / 16]);
    }
    entries
}

/// The values of the rows that stand behind those of the same tile in the ring.
#[inline(always)]
fn next_rows(rows: [u32; TILE_ROWS]) -> [u32; TILE_ROWS] {
    let mut next = [0; TILE_ROWS];
    for r in 0..TILE_ROWS {
        // Two places on; as a place is its row's bits in reverse, so is a row its place's.
        next[r] = rows[ring_place((ring_place(r) + 2) % (2 * TILE_ROWS))];
    }
    next
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
