//! The codes of a group in a tile or a strip, four columns of all its rows at a time.

use slim_formats::slim::{Group, PackedTensor, WindowTable};

use super::kernel::{Isa, Kernel, Words};
use crate::cpu::unpack::Planes;

/// Bits of the entries that windows stand for (F25).
pub(super) const ENTRY_BITS: usize = 7;

/// Where the codes of a group in `T` tiles come from.
pub(super) trait Codes<I: Isa, const N: usize, const T: usize>: Copy {
    /// What is loaded of a unit at once.
    type Unit: Copy;

    fn unit(self, kernel: Kernel<I, N>, unit: usize) -> Self::Unit;

    /// The codes of columns `4 t ..` of a unit in each tile.
    fn words(
        self,
        kernel: Kernel<I, N>,
        unit: usize,
        loaded: Self::Unit,
        t: usize,
    ) -> [Words<I, N>; T];
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

impl<I: Isa, const N: usize, const WIDTH: usize> Codes<I, N, 1> for Stored<'_, WIDTH> {
    type Unit = [Words<I, N>; 2];

    #[inline(always)]
    fn unit(self, k: Kernel<I, N>, unit: usize) -> Self::Unit {
        k.unit_words::<WIDTH>(self.0, unit)
    }

    #[inline(always)]
    fn words(
        self,
        k: Kernel<I, N>,
        unit: usize,
        of_unit: Self::Unit,
        t: usize,
    ) -> [Words<I, N>; 1] {
        [k.stored_codes::<WIDTH>(self.0, unit, of_unit, t)]
    }
}

/// The entries of the windows of a strip (F24, F25), for widths up to 6.
#[derive(Clone, Copy)]
pub(super) struct Windows<'a, I: Isa, const WIDTH: usize> {
    above: Stored<'a, WIDTH>,
    below: Stored<'a, WIDTH>,
    low: I::Words,
    high: I::Words,
}

impl<'a, I: Isa, const WIDTH: usize> Windows<'a, I, WIDTH> {
    /// Of the strip that has `tile`.
    #[inline(always)]
    pub fn of(isa: I, packed: PackedTensor<'a>, tile: usize, group: &Group) -> Self {
        let WindowTable { low, high } = WindowTable::of(group.bit_width);
        Self {
            above: Stored::of(packed, tile & !1, group),
            below: Stored::of(packed, tile | 1, group),
            low: isa.repeated(low),
            high: isa.repeated(high),
        }
    }

    /// The stored codes of both tiles.
    #[inline(always)]
    fn stored<const N: usize>(
        self,
        k: Kernel<I, N>,
        unit: usize,
        [above, below]: [[Words<I, N>; 2]; 2],
        t: usize,
    ) -> [Words<I, N>; 2] {
        let ([above], [below]) =
            (self.above.words(k, unit, above, t), self.below.words(k, unit, below, t));
        [above, below]
    }

    /// The entries of a tile from its codes and those behind them in the ring: behind a row of the
    /// tile above stands that of the tile below, behind this the next one of the tile above.
    #[inline(always)]
    fn entries<const N: usize>(
        self,
        k: Kernel<I, N>,
        own: Words<I, N>,
        behind: Words<I, N>,
    ) -> Words<I, N> {
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

impl<I: Isa, const N: usize, const WIDTH: usize> Codes<I, N, 2> for Windows<'_, I, WIDTH> {
    type Unit = [[Words<I, N>; 2]; 2];

    #[inline(always)]
    fn unit(self, k: Kernel<I, N>, unit: usize) -> Self::Unit {
        [self.above.unit(k, unit), self.below.unit(k, unit)]
    }

    #[inline(always)]
    fn words(
        self,
        k: Kernel<I, N>,
        unit: usize,
        of_unit: Self::Unit,
        t: usize,
    ) -> [Words<I, N>; 2] {
        let [above, below] = self.stored(k, unit, of_unit, t);
        [self.entries(k, above, below), self.entries(k, below, k.next_rows(above))]
    }
}

/// Those of one tile of a strip.
#[derive(Clone, Copy)]
pub(super) struct TileWindows<'a, I: Isa, const WIDTH: usize> {
    strip: Windows<'a, I, WIDTH>,
    is_below: bool,
}

impl<'a, I: Isa, const WIDTH: usize> TileWindows<'a, I, WIDTH> {
    #[inline(always)]
    pub fn of(isa: I, packed: PackedTensor<'a>, tile: usize, group: &Group) -> Self {
        Self { strip: Windows::of(isa, packed, tile, group), is_below: tile % 2 == 1 }
    }
}

impl<I: Isa, const N: usize, const WIDTH: usize> Codes<I, N, 1> for TileWindows<'_, I, WIDTH> {
    type Unit = [[Words<I, N>; 2]; 2];

    #[inline(always)]
    fn unit(self, k: Kernel<I, N>, unit: usize) -> Self::Unit {
        self.strip.unit(k, unit)
    }

    #[inline(always)]
    fn words(
        self,
        k: Kernel<I, N>,
        unit: usize,
        of_unit: Self::Unit,
        t: usize,
    ) -> [Words<I, N>; 1] {
        let [above, below] = self.strip.stored(k, unit, of_unit, t);
        let (own, behind) = match self.is_below {
            true => (below, k.next_rows(above)),
            false => (above, below),
        };
        [self.strip.entries(k, own, behind)]
    }
}
