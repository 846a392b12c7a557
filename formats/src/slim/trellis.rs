//! The trellis: what the codes of a strip of 32 rows say together (section 5 of `docs/format.md`).
//!
//! A column's 32 codes stand in a ring. Each row reads the 8 bits from its own code on, its
//! *window*, and looks its value up: neighbours share bits, which is what makes values of fewer
//! bits better than those of a grid.

use super::{
    group::BitWidth,
    layout::{CodeColumn, TILE_ROWS},
};

/// Rows whose codes share a ring: two tiles.
pub const STRIP_ROWS: usize = 2 * TILE_ROWS;

/// What a value is less by than its entry in the tables (F25).
pub const TRELLIS_CENTER: u8 = 64;

/// Bits of a window.
const WINDOW_BITS: u8 = 8;

/// The codes of a column in the order of their ring.
type Ring = [u8; STRIP_ROWS];

/// Where a row of a strip stands in the ring (F24): successors of a vector of rows are another
/// vector of rows, or the lanes of one in another order.
pub const fn ring_place(row: usize) -> usize {
    (row as u8).reverse_bits() as usize >> 3
}

/// What windows of groups of one width are worth: the sum of an entry by the low half of the window
/// and one by its high half (F25).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowTable {
    /// By the low 4 bits.
    pub low: [u8; 16],
    /// By the high 4 bits.
    pub high: [u8; 16],
}

impl WindowTable {
    /// The table of a width.
    #[inline]
    pub fn of(width: BitWidth) -> &'static Self {
        &TABLES[usize::from(width.bits()) - 1]
    }

    /// The entry of each window.
    pub fn entries(&self) -> [u8; 256] {
        std::array::from_fn(|window| self.low[window % 16] + self.high[window / 16])
    }
}

/// Bits of an entry: 7, or 8 in groups of that width, whose entries are their codes.
pub(super) fn entry_width(width: BitWidth) -> BitWidth {
    width.max(BitWidth::new(WINDOW_BITS - 1).expect("7 bits"))
}

/// What one more in an entry is worth: values reach as far at every width.
pub fn value_step(width: BitWidth) -> f32 {
    if width.bits() == WINDOW_BITS { 0.5 } else { 1.0 }
}

/// The windows of a ring of codes, in its order.
fn windows(codes: &Ring, width: BitWidth) -> Ring {
    let mut windows = [0; STRIP_ROWS];
    let mut window = 0;
    // From the end to the start. A window reaches over 8 codes at most; behind the last place
    // stand the first ones.
    for place in (0..STRIP_ROWS).chain(0..usize::from(WINDOW_BITS)).rev() {
        window = (u16::from(window) << width.bits()) as u8 | codes[place];
        windows[place] = window;
    }
    windows
}

/// The entries that the codes of a column in the two tiles of a strip stand for.
pub(super) fn entries(
    tiles: [&CodeColumn; 2],
    width: BitWidth,
    table: &[u8; 256],
) -> [CodeColumn; 2] {
    let mut ring = [0; STRIP_ROWS];
    for (row, &code) in tiles.into_iter().flatten().enumerate() {
        ring[ring_place(row)] = code;
    }
    let windows = windows(&ring, width);
    let entry = |row| table[usize::from(windows[ring_place(row)])];
    [0, TILE_ROWS].map(|first| std::array::from_fn(|r| entry(first + r)))
}

/// A pair for each width, trained on noise of a deviation of 16 about the center; at 7 and 8 bits
/// plain grids.
const TABLES: [WindowTable; 8] = [
    WindowTable {
        low: [27, 6, 5, 16, 14, 3, 18, 10, 0, 14, 28, 7, 10, 23, 6, 20],
        high: [44, 59, 67, 42, 53, 43, 63, 35, 56, 33, 46, 63, 51, 63, 36, 61],
    },
    WindowTable {
        low: [43, 19, 27, 0, 24, 38, 6, 17, 17, 18, 1, 36, 36, 8, 19, 25],
        high: [53, 56, 36, 40, 43, 36, 30, 65, 56, 22, 53, 49, 37, 43, 48, 29],
    },
    WindowTable {
        low: [44, 32, 23, 17, 10, 38, 0, 25, 14, 39, 19, 50, 24, 5, 28, 33],
        high: [30, 39, 45, 15, 26, 46, 44, 34, 64, 54, 36, 44, 52, 30, 55, 23],
    },
    WindowTable {
        low: [18, 32, 0, 15, 46, 18, 8, 26, 28, 20, 25, 13, 23, 6, 39, 21],
        high: [35, 32, 38, 43, 50, 65, 73, 12, 45, 48, 40, 53, 57, 29, 61, 23],
    },
    WindowTable {
        low: [0, 5, 10, 15, 20, 25, 30, 34, 39, 45, 49, 54, 59, 64, 69, 74],
        high: [26, 29, 47, 14, 30, 8, 25, 13, 33, 10, 16, 24, 41, 44, 23, 31],
    },
    WindowTable {
        low: [0, 5, 10, 15, 20, 25, 30, 35, 41, 46, 51, 56, 61, 66, 71, 76],
        high: [25, 26, 48, 13, 28, 6, 24, 10, 32, 9, 15, 23, 40, 44, 22, 31],
    },
    WindowTable {
        low: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        high: [0, 16, 32, 48, 64, 80, 96, 112, 0, 16, 32, 48, 64, 80, 96, 112],
    },
    WindowTable {
        low: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        high: [0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240],
    },
];
