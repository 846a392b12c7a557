//! The codes of a group in a tile or a strip, four columns of all its rows at a time.

use slim_formats::slim::{Group, PackedTensor, WindowTable};

use super::kernel::{Isa, Kernel, Words};
use crate::cpu::unpack::Planes;

/// Bits of the entries that windows stand for (F25).
pub(super) const ENTRY_BITS: usize = 7;

/// The bytes of a tile.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    pub codes: &'a [u8],
    pub scales: &'a [u8],
}

impl<'a> Tile<'a> {
    #[inline(always)]
    pub fn of(packed: PackedTensor<'a>, tile: usize) -> Self {
        Self { codes: packed.tile_codes(tile), scales: packed.tile_scales(tile) }
    }
}

/// Where the codes of a group in `T` tiles come from.
pub(super) trait Codes<I: Isa, const N: usize, const T: usize>: Copy {
    /// What is loaded of a unit at once.
    type Unit: Copy;

    fn unit(self, kernel: Kernel<I, N>, unit: usize) -> Self::Unit;

    /// The codes of columns `4 t ..` of a unit in each tile. `half` says whether it is the second
    /// one of two: known to the compiler, it takes the place of a shift.
    fn words(
        self,
        kernel: Kernel<I, N>,
        unit: usize,
        loaded: Self::Unit,
        half: usize,
        t: usize,
    ) -> [Words<I, N>; T];
}

/// Codes as they are stored, in `T` tiles.
#[derive(Clone, Copy)]
pub(super) struct Stored<'a, const WIDTH: usize, const T: usize>([Planes<'a>; T]);

impl<'a, const WIDTH: usize, const T: usize> Stored<'a, WIDTH, T> {
    #[inline(always)]
    pub fn of(tiles: [Tile<'a>; T], group: &Group) -> Self {
        let mut planes = [Planes::default(); T];
        for (planes, tile) in planes.iter_mut().zip(tiles) {
            let codes = &tile.codes[group.codes_offset..][..group.code_bytes()];
            *planes = Planes::of::<WIDTH>(codes);
        }
        Self(planes)
    }
}

impl<I: Isa, const N: usize, const WIDTH: usize, const T: usize> Codes<I, N, T>
    for Stored<'_, WIDTH, T>
{
    type Unit = [[Words<I, N>; 2]; T];

    #[inline(always)]
    fn unit(self, k: Kernel<I, N>, unit: usize) -> Self::Unit {
        let mut words = [[[k.0.words(0); N]; 2]; T];
        for (words, planes) in words.iter_mut().zip(self.0) {
            *words = k.unit_words::<WIDTH>(planes, unit);
        }
        words
    }

    #[inline(always)]
    fn words(
        self,
        k: Kernel<I, N>,
        unit: usize,
        of_unit: Self::Unit,
        half: usize,
        t: usize,
    ) -> [Words<I, N>; T] {
        let mut words = [[k.0.words(0); N]; T];
        for i in 0..T {
            words[i] = k.stored_codes::<WIDTH>(self.0[i], unit, of_unit[i], half, t);
        }
        words
    }
}

/// The entries of the windows of a strip (F24, F25), for widths up to 6.
#[derive(Clone, Copy)]
pub(super) struct Windows<'a, I: Isa, const WIDTH: usize> {
    codes: Stored<'a, WIDTH, 2>,
    low: I::Words,
    high: I::Words,
}

impl<'a, I: Isa, const WIDTH: usize> Windows<'a, I, WIDTH> {
    /// Of a strip of two tiles.
    #[inline(always)]
    pub fn of(isa: I, strip: [Tile<'a>; 2], group: &Group) -> Self {
        let WindowTable { low, high } = WindowTable::of(group.bit_width);
        let (low, high) = (isa.repeated(low), isa.repeated(high));
        Self { codes: Stored::of(strip, group), low, high }
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
        self.codes.unit(k, unit)
    }

    #[inline(always)]
    fn words(
        self,
        k: Kernel<I, N>,
        unit: usize,
        of_unit: Self::Unit,
        half: usize,
        t: usize,
    ) -> [Words<I, N>; 2] {
        let [above, below] = self.codes.words(k, unit, of_unit, half, t);
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
        let strip = [tile & !1, tile | 1].map(|tile| Tile::of(packed, tile));
        Self { strip: Windows::of(isa, strip, group), is_below: tile % 2 == 1 }
    }
}

impl<I: Isa, const N: usize, const WIDTH: usize> Codes<I, N, 1> for TileWindows<'_, I, WIDTH> {
    type Unit = [[Words<I, N>; 2]; 2];

    #[inline(always)]
    fn unit(self, k: Kernel<I, N>, unit: usize) -> Self::Unit {
        self.strip.codes.unit(k, unit)
    }

    #[inline(always)]
    fn words(
        self,
        k: Kernel<I, N>,
        unit: usize,
        of_unit: Self::Unit,
        half: usize,
        t: usize,
    ) -> [Words<I, N>; 1] {
        let [above, below] = self.strip.codes.words(k, unit, of_unit, half, t);
        let (own, behind) = match self.is_below {
            true => (below, k.next_rows(above)),
            false => (above, below),
        };
        [self.strip.entries(k, own, behind)]
    }
}
