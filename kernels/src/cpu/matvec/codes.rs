//! The codes of a group in a tile, four columns of all its rows at a time.

use slim_formats::slim::{Group, PackedTensor, WindowTable};

use super::kernel::{Isa, Kernel, Words};
use crate::cpu::unpack::Planes;

/// Bits of the entries that windows stand for (F25).
pub(super) const ENTRY_BITS: usize = 7;

/// Where the codes of a group come from.
pub(super) trait Codes<I: Isa, const N: usize>: Copy {
    /// What is loaded of a unit at once.
    type Unit: Copy;

    fn unit(self, kernel: Kernel<I, N>, unit: usize) -> Self::Unit;

    /// The codes of columns `4 t ..` of a unit.
    fn words(self, kernel: Kernel<I, N>, unit: usize, loaded: Self::Unit, t: usize) -> Words<I, N>;
}

/// Codes as they are stored.
#[derive(Clone, Copy)]
pub(super) struct Stored<'a, const WIDTH: usize>(Planes<'a>);

impl<'a, const WIDTH: usize> Stored<'a, WIDTH> {
    #[inline(always)]
    pub fn of(packed: PackedTensor<'a>, tile: usize, group: &Group) -> Self {
        let codes = &packed.tile_codes(tile)[group.codes_offset..][..group.code_bytes()];
        Self(Planes::of::<WIDTH>(codes))
    }
}

impl<I: Isa, const N: usize, const WIDTH: usize> Codes<I, N> for Stored<'_, WIDTH> {
    type Unit = [Words<I, N>; 2];

    #[inline(always)]
    fn unit(self, kernel: Kernel<I, N>, unit: usize) -> Self::Unit {
        kernel.unit_words::<WIDTH>(self.0, unit)
    }

    #[inline(always)]
    fn words(self, kernel: Kernel<I, N>, unit: usize, loaded: Self::Unit, t: usize) -> Words<I, N> {
        kernel.stored_codes::<WIDTH>(self.0, unit, loaded, t)
    }
}

/// The entries of windows (F24, F25), for widths up to 6.
#[derive(Clone, Copy)]
pub(super) struct Windows<'a, I: Isa, const WIDTH: usize> {
    own: Stored<'a, WIDTH>,
    /// Of the other tile of the strip.
    other: Stored<'a, WIDTH>,
    is_below: bool,
    low: I::Words,
    high: I::Words,
}

impl<'a, I: Isa, const WIDTH: usize> Windows<'a, I, WIDTH> {
    #[inline(always)]
    pub fn of(isa: I, packed: PackedTensor<'a>, tile: usize, group: &Group) -> Self {
        let WindowTable { low, high } = WindowTable::of(group.bit_width);
        Self {
            own: Stored::of(packed, tile, group),
            other: Stored::of(packed, tile ^ 1, group),
            is_below: tile % 2 == 1,
            low: isa.repeated(low),
            high: isa.repeated(high),
        }
    }
}

impl<I: Isa, const N: usize, const WIDTH: usize> Codes<I, N> for Windows<'_, I, WIDTH> {
    type Unit = [[Words<I, N>; 2]; 2];

    #[inline(always)]
    fn unit(self, kernel: Kernel<I, N>, unit: usize) -> Self::Unit {
        [self.own.unit(kernel, unit), self.other.unit(kernel, unit)]
    }

    /// Behind a row of the tile above stands that of the tile below, behind this the next one of
    /// the tile above.
    #[inline(always)]
    fn words(self, k: Kernel<I, N>, unit: usize, loaded: Self::Unit, t: usize) -> Words<I, N> {
        let own = self.own.words(k, unit, loaded[0], t);
        let mut behind = self.other.words(k, unit, loaded[1], t);
        if self.is_below {
            behind = k.next_rows(behind);
        }
        let (low, high) = match WIDTH {
            1 => {
                let pairs = k.or(own, k.field::<1>(behind, 0, 1));
                let fours = k.or(pairs, k.field::<2>(k.next_rows(pairs), 0, 2));
                (fours, k.next_rows(k.next_rows(fours)))
            }
            2 => {
                let pairs = k.or(own, k.field::<2>(behind, 0, 2));
                (pairs, k.next_rows(pairs))
            }
            3 => {
                let low = k.or(own, k.field::<1>(behind, 0, 3));
                let next = k.field::<2>(k.next_rows(own), 0, 2);
                (low, k.or(k.field::<2>(behind, 1, 0), next))
            }
            4 => (own, behind),
            5 => {
                let high = k.or(k.field::<1>(own, 4, 0), k.field::<3>(behind, 0, 1));
                (k.field::<4>(own, 0, 0), high)
            }
            _ => {
                let high = k.or(k.field::<2>(own, 4, 0), k.field::<2>(behind, 0, 2));
                (k.field::<4>(own, 0, 0), high)
            }
        };
        k.sums_of_entries(self.low, low, self.high, high)
    }
}
