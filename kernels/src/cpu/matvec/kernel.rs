//! Codes times 8-bit inputs, the same for every instruction set: what differs is in its [`Isa`].

use std::{hint::black_box, ops::Range, slice};

use slim_formats::slim::{Group, PackedTensor, ScaleCoding, TILE_ROWS, TRELLIS_CENTER};

use super::{
    codes::{Codes, ENTRY_BITS, Stored, Tile, Windows},
    input::{FINE, StepCodes},
    tokens::{Fine, Step, Tokens},
};
use crate::cpu::unpack::{Lanes, Planes, UNIT, for_width, short_words, zero_points};

/// How far ahead the kernel asks for codes: the processor by itself does so too late. It brought
/// 2-bit layers from 0.74 to 1.0 of the speed of a plain read, 3-bit layers from 0.66; from 1,024
/// to 4,096 bytes it makes no difference.
pub(super) const AHEAD_BYTES: usize = 2048;

/// An instruction set that multiplies bytes: what a kernel asks of it, a register at a time.
///
/// A value says that the processor has it. Every method is inlined, so that its instructions become
/// the caller's.
pub(super) trait Isa: Copy {
    /// A register of 32-bit words: of a tile one for each of some rows, of a block those of a row.
    type Words: Copy;
    /// As many f32.
    type Floats: Copy;

    /// Words from their bytes.
    fn load(self, bytes: &[u8]) -> Self::Words;
    /// Words from one byte each.
    fn widened(self, bytes: &[u8]) -> Self::Words;
    /// The same word everywhere.
    fn words(self, word: i32) -> Self::Words;
    fn and(self, a: Self::Words, b: Self::Words) -> Self::Words;
    fn or(self, a: Self::Words, b: Self::Words) -> Self::Words;
    fn shifted_left(self, words: Self::Words, bits: usize) -> Self::Words;
    /// Each word by a number of bits of its own.
    fn shifted_right(self, words: Self::Words, bits: Self::Words) -> Self::Words;

    /// 16 bytes, again and again.
    fn repeated(self, bytes: &[u8; 16]) -> Self::Words;
    /// For each byte of `indices`, which are below 16, that byte of a repeated table.
    fn looked_up(self, table: Self::Words, indices: Self::Words) -> Self::Words;
    fn add(self, a: Self::Words, b: Self::Words) -> Self::Words;
    /// Each lane's next one, where lanes stand in the order of their bits in reverse.
    fn next_lanes(self, words: Self::Words) -> Self::Words;

    /// Adds products of codes, four unsigned bytes a word of `WIDTH` bits each, and inputs, four
    /// signed ones between -127 and 127. What the sums of a step, of 8 calls at most, look like is
    /// the instruction set's own; zeros are empty sums.
    fn add_products<const WIDTH: usize>(
        self,
        sums: Self::Words,
        codes: Self::Words,
        input: Self::Words,
    ) -> Self::Words;

    /// The sums of a step as 32-bit words.
    #[inline(always)]
    fn totals<const WIDTH: usize>(self, sums: Self::Words) -> Self::Words {
        sums
    }

    /// The same f32 everywhere.
    fn floats(self, value: f32) -> Self::Floats;
    /// f32 from the bytes of f16.
    fn halves(self, bytes: &[u8]) -> Self::Floats;
    /// f32 from signed words.
    fn converted(self, words: Self::Words) -> Self::Floats;
    fn sub(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    fn load_floats(self, lanes: &[f32]) -> Self::Floats;
    fn store(self, values: Self::Floats, lanes: &mut [f32]);
    fn store_words(self, words: Self::Words, bytes: &mut [u8]);

    /// Asks for the 64 bytes at an address, which may lie anywhere, where that is known to pay.
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}

/// The lane behind each of `LANES`, a power of two, in the order of their bits in reverse.
pub(super) const fn next_lanes<const LANES: usize>() -> [i32; LANES] {
    let mut next = [0; LANES];
    let mut place = 0;
    while place < LANES {
        next[reversed(place, LANES)] = reversed((place + 1) % LANES, LANES) as i32;
        place += 1;
    }
    next
}

/// The bits of an index below `count`, a power of two, in reverse.
const fn reversed(index: usize, count: usize) -> usize {
    match count {
        1 => 0,
        _ => index.reverse_bits() >> (usize::BITS - count.ilog2()),
    }
}

/// Writes a function that gives the entry points of a [`Kernel`] for tiles, each of which enables
/// `$features`; `$block`s of `$tile_tokens` tokens at the most are multiplied without a panel. Each
/// is a function of its own: in one for all, the compiler spills registers.
macro_rules! tile_kernels {
    ($name:ident, $features:literal, $kernel:expr, $tile_tokens:literal: $($block:ident)*) => {
        fn $name() -> $crate::cpu::matvec::TileKernels {
            use slim_formats::slim::PackedTensor;

            use $crate::cpu::{
                matvec::{
                    TileKernels,
                    panel::{Chunk, Panel, Sums},
                    tokens::{TokenBlock, Tokens},
                },
                unpack::Lanes,
            };

            #[target_feature(enable = $features)]
            fn tile<const T: usize>(
                packed: PackedTensor<'_>,
                tile: usize,
                tokens: &Tokens<T>,
                out: &mut [Lanes],
            ) {
                $kernel.store_tile(packed, tile, tokens, out);
            }

            #[target_feature(enable = $features)]
            fn strip(
                packed: PackedTensor<'_>,
                tile: usize,
                token: &Tokens<1>,
                out: &mut [Lanes],
            ) {
                $kernel.store_strip(packed, tile, token, out);
            }

            #[target_feature(enable = $features)]
            fn unpack(packed: PackedTensor<'_>, tile: usize, chunk: &Chunk, panel: &mut Panel) {
                $kernel.unpack_tile(packed, tile, chunk, panel);
            }

            #[target_feature(enable = $features)]
            fn multiply(panel: &Panel, chunk: &Chunk, block: &TokenBlock, sums: &mut [Sums]) {
                $kernel.multiply(panel, chunk, block, sums);
            }

            #[target_feature(enable = $features)]
            fn products(panel: &Panel, sums: &[Sums], out: &mut [Lanes]) {
                $kernel.products_of(panel, sums, out);
            }

            TileKernels {
                tile: |packed, index, block, out| match block {
                    // SAFETY: whoever calls `$name` has found the processor to have `$features`.
                    $(TokenBlock::$block(tokens) => unsafe { tile(packed, index, tokens, out) },)*
                    #[allow(unreachable_patterns, reason = "all, where there are many registers")]
                    block => unreachable!("{} tokens", block.tokens()),
                },
                tile_tokens: $tile_tokens,
                // SAFETY: as above.
                strip: |packed, first, token, out| unsafe { strip(packed, first, token, out) },
                // SAFETY: as above.
                unpack: |packed, tile, chunk, panel| unsafe { unpack(packed, tile, chunk, panel) },
                // SAFETY: as above.
                multiply: |panel, chunk, block, sums| unsafe {
                    multiply(panel, chunk, block, sums);
                },
                tokens: $kernel.tokens(),
                // SAFETY: as above.
                products: |panel, sums, out| unsafe { products(panel, sums, out) },
            }
        }
    };
}
pub(super) use tile_kernels;

/// The same for ggml's blocks.
macro_rules! block_kernels {
    ($name:ident, $features:literal, $kernel:expr) => {
        fn $name() -> $crate::cpu::matvec::BlockKernels {
            use slim_formats::DenseTensor;

            use $crate::cpu::matvec::{
                BlockKernels, Input,
                panel::{Chunk, Panel},
            };

            #[target_feature(enable = $features)]
            fn products(tensor: &DenseTensor<'_>, first: usize, input: &Input, out: &mut [f32]) {
                $kernel.blocks(tensor, first, input, out);
            }

            #[target_feature(enable = $features)]
            fn unpack(tensor: &DenseTensor<'_>, tile: usize, chunk: &Chunk, panel: &mut Panel) {
                $kernel.unpack_blocks(tensor, tile, chunk, panel);
            }

            BlockKernels {
                // SAFETY: whoever calls `$name` has found the processor to have `$features`.
                products: |tensor, first, input, out| unsafe {
                    products(tensor, first, input, out);
                },
                // SAFETY: as above.
                unpack: |tensor, tile, chunk, panel| unsafe { unpack(tensor, tile, chunk, panel) },
            }
        }
    };
}
pub(super) use block_kernels;

/// Writes methods of [`Isa`] that are one expression of intrinsics each.
macro_rules! instructions {
    ($($name:ident $(<$WIDTH:ident>)? ($($argument:ident: $type:ty),*) $(-> $result:ty)?
        = $value:expr;)*) => {$(
        #[inline(always)]
        fn $name $(<const $WIDTH: usize>)? (self, $($argument: $type),*) $(-> $result)? {
            // SAFETY: a value of `Self` says that the processor has the instructions, and what they
            // read or write through pointers is a slice of that length.
            unsafe { $value }
        }
    )*};
}
pub(super) use instructions;

/// A word for each of the 16 rows of a tile, in `N` registers.
pub(super) type Words<I, const N: usize> = [<I as Isa>::Words; N];
/// An f32 for each.
pub(super) type Floats<I, const N: usize> = [<I as Isa>::Floats; N];

/// Sums over the runs so far: factor times code times input, and minimum times input.
#[derive(Clone, Copy)]
struct Sums<I: Isa, const N: usize> {
    scaled: Floats<I, N>,
    shifted: Floats<I, N>,
}

impl<I: Isa, const N: usize> Sums<I, N> {
    #[inline(always)]
    fn none(isa: I) -> Self {
        let zero = [isa.floats(0.0); N];
        Self { scaled: zero, shifted: zero }
    }
}

/// Steps of tokens, one after the other.
struct Steps<'a, const T: usize> {
    steps: slice::Iter<'a, Step<T>>,
    fine_codes: &'a [StepCodes],
}

impl<'a, const T: usize> Steps<'a, T> {
    #[inline(always)]
    fn of(tokens: &'a Tokens<T>) -> Self {
        Self { steps: tokens.steps.iter(), fine_codes: &tokens.fine_codes }
    }

    #[inline(always)]
    fn next(&mut self) -> &'a Step<T> {
        self.steps.next().expect("as many steps as the layer has")
    }
}

/// The kernel of an instruction set, of whose registers `N` hold 16 words.
#[derive(Clone, Copy)]
pub(super) struct Kernel<I, const N: usize>(pub I);

// Loops over registers are written out: a closure that is not inlined loses the caller's
// instruction set.
impl<I: Isa, const N: usize> Kernel<I, N> {
    /// Stores the products of the 16 rows of a tile with some tokens.
    #[inline(always)]
    pub fn store_tile<const T: usize>(
        self,
        packed: PackedTensor<'_>,
        tile: usize,
        tokens: &Tokens<T>,
        out: &mut [Lanes],
    ) {
        let tiles = [Tile::of(packed, tile)];
        self.store_products(packed, tile, self.tile(packed, tiles, tokens), out);
    }

    /// The same for the 32 rows of a strip of a trellis, which begins with `tile`.
    #[inline(always)]
    pub fn store_strip(
        self,
        packed: PackedTensor<'_>,
        tile: usize,
        token: &Tokens<1>,
        out: &mut [Lanes],
    ) {
        let tiles = [Tile::of(packed, tile), Tile::of(packed, tile + 1)];
        self.store_products(packed, tile, self.strip(packed, tiles, token), out);
    }

    /// The sums of a tile.
    #[inline(always)]
    fn tile<const T: usize>(
        self,
        packed: PackedTensor<'_>,
        tiles: [Tile<'_>; 1],
        tokens: &Tokens<T>,
    ) -> [[Sums<I, N>; T]; 1] {
        let mut sums = [[Sums::none(self.0); T]];
        let (mut steps, layout) = (Steps::of(tokens), packed.layout());
        for group in layout.groups() {
            for_width!(
                group.bit_width,
                Self::add_stored[T](self, &mut sums, tiles, layout.coding(), group, &mut steps)
            );
        }
        sums
    }

    /// The sums of a strip of a trellis: the codes of each tile are unpacked once for both.
    #[inline(always)]
    fn strip(
        self,
        packed: PackedTensor<'_>,
        tiles: [Tile<'_>; 2],
        token: &Tokens<1>,
    ) -> [[Sums<I, N>; 1]; 2] {
        let mut sums = [[Sums::none(self.0)]; 2];
        let (mut steps, layout) = (Steps::of(token), packed.layout());
        for group in layout.groups() {
            for_width!(
                group.bit_width,
                Self::add_strip(self, &mut sums, tiles, layout.coding(), group, &mut steps)
            );
        }
        sums
    }

    /// The products of tiles from their sums.
    #[inline(always)]
    fn store_products<const T: usize, const TILES: usize>(
        self,
        packed: PackedTensor<'_>,
        first: usize,
        sums: [[Sums<I, N>; T]; TILES],
        out: &mut [Lanes],
    ) {
        for (i, (sums, out)) in sums.iter().zip(out.chunks_exact_mut(T)).enumerate() {
            let (d, m) = self.row_scales(packed.tile_row_scales(first + i));
            for (Sums { scaled, shifted }, out) in sums.iter().zip(out) {
                let mut products = [self.0.floats(0.0); N];
                for i in 0..N {
                    let shifted = self.0.mul(m[i], shifted[i]);
                    products[i] = self.0.sub(self.0.mul(d[i], scaled[i]), shifted);
                }
                self.store(products, out);
            }
        }
    }

    /// `d` and `m` of the rows of a tile; a trellis has one for both.
    #[inline(always)]
    pub fn row_scales(self, bytes: &[u8]) -> (Floats<I, N>, Floats<I, N>) {
        match bytes.as_chunks::<32>().0 {
            [d, m] => (self.halves(d), self.halves(m)),
            [d] => (self.halves(d), self.halves(d)),
            _ => ([self.0.floats(1.0); N], [self.0.floats(1.0); N]),
        }
    }

    /// Adds the runs of a group of a tile, whose codes are those of a grid.
    #[inline(always)]
    fn add_stored<const WIDTH: usize, const T: usize>(
        self,
        sums: &mut [[Sums<I, N>; T]; 1],
        tiles: [Tile<'_>; 1],
        coding: ScaleCoding,
        group: &Group,
        input: &mut Steps<'_, T>,
    ) {
        let codes = Stored::<WIDTH, 1>::of(tiles, group);
        self.add_runs::<WIDTH, WIDTH, T, 1, _>(sums, codes, tiles, coding, group, input);
    }

    /// Adds the runs of a group of a strip.
    #[inline(always)]
    fn add_strip<const WIDTH: usize>(
        self,
        sums: &mut [[Sums<I, N>; 1]; 2],
        tiles: [Tile<'_>; 2],
        coding: ScaleCoding,
        group: &Group,
        input: &mut Steps<'_, 1>,
    ) {
        if WIDTH < ENTRY_BITS {
            let codes = Windows::<I, WIDTH>::of(self.0, tiles, group);
            self.add_runs::<WIDTH, ENTRY_BITS, 1, 2, _>(sums, codes, tiles, coding, group, input);
        } else {
            let codes = Stored::<WIDTH, 2>::of(tiles, group);
            self.add_runs::<WIDTH, WIDTH, 1, 2, _>(sums, codes, tiles, coding, group, input);
        }
    }

    /// Adds the runs of a group of tiles, with codes of so many bits, times `T` tokens.
    #[inline(always)]
    fn add_runs<
        const WIDTH: usize,
        const BITS: usize,
        const T: usize,
        const TILES: usize,
        C: Codes<I, N, TILES>,
    >(
        self,
        sums: &mut [[Sums<I, N>; T]; TILES],
        codes: C,
        tiles: [Tile<'_>; TILES],
        coding: ScaleCoding,
        group: &Group,
        input: &mut Steps<'_, T>,
    ) {
        let isa = self.0;
        let (mut records, mut ahead) = ([&[] as &[u8]; TILES], [std::ptr::null(); TILES]);
        for i in 0..TILES {
            records[i] = &tiles[i].scales[group.scales_offset..];
            ahead[i] = tiles[i].codes.as_ptr().wrapping_add(group.codes_offset + AHEAD_BYTES);
        }
        let (units, mut unit) = (group.stored_cols() / UNIT, 0);
        let mut so_far = *sums;
        while unit < units {
            let mut scales = [([isa.floats(0.0); N], [isa.floats(0.0); N]); TILES];
            for i in 0..TILES {
                scales[i] = self.run_scales::<WIDTH>(coding, &mut records[i]);
            }
            let end = units.min(unit + run_units(coding, units));
            while unit < end {
                for ahead in &mut ahead {
                    for _ in 0..WIDTH {
                        isa.prefetch(*ahead);
                        *ahead = ahead.wrapping_add(64);
                    }
                }
                let units = unit..end.min(unit + 2);
                let step = input.next();
                let mut dots =
                    self.step_products::<BITS, T, TILES, C>(codes, units.clone(), &step.codes);
                if step.fine.tokens != 0 {
                    // Codes are unpacked anew: kept for this rare case, they would cost every step
                    // registers.
                    let units = black_box(units.clone());
                    self.add_fine::<BITS, T, TILES, C>(&mut dots, codes, units, step.fine, input);
                }
                for i in 0..TILES {
                    let (factor, minimum) = &scales[i];
                    for t in 0..T {
                        let Sums { scaled, shifted } = &mut so_far[i][t];
                        for n in 0..N {
                            let dots = isa.mul(dots[i][t][n], isa.floats(step.scales[t]));
                            scaled[n] = isa.mul_add(factor[n], dots, scaled[n]);
                            let sum = isa.floats(step.sums[t]);
                            shifted[n] = isa.mul_add(minimum[n], sum, shifted[n]);
                        }
                    }
                }
                unit = units.end;
            }
        }
        *sums = so_far;
    }

    /// Adds the products of a step with the second codes of those tokens that have them.
    #[inline(always)]
    fn add_fine<const BITS: usize, const T: usize, const TILES: usize, C: Codes<I, N, TILES>>(
        self,
        dots: &mut [[Floats<I, N>; T]; TILES],
        codes: C,
        units: Range<usize>,
        fine: Fine,
        input: &Steps<'_, T>,
    ) {
        // Written as a loop that is not unrolled: it is rare, and there is much in it.
        let (mut sums, mut tokens) = (*dots, fine.tokens);
        for fine_codes in &input.fine_codes[fine.first..][..tokens.count_ones() as usize] {
            let input = bytemuck::cast_ref(fine_codes);
            let rest = self.step_products::<BITS, 1, TILES, C>(codes, units.clone(), input);
            let t = tokens.trailing_zeros() as usize;
            for i in 0..TILES {
                for n in 0..N {
                    sums[i][t][n] =
                        self.0.mul_add(rest[i][0][n], self.0.floats(FINE), sums[i][t][n]);
                }
            }
            tokens &= tokens - 1;
        }
        *dots = sums;
    }

    /// The products of a step of one unit or two.
    #[inline(always)]
    fn step_products<
        const BITS: usize,
        const T: usize,
        const TILES: usize,
        C: Codes<I, N, TILES>,
    >(
        self,
        codes: C,
        units: Range<usize>,
        input: &[[[i32; T]; 4]; 2],
    ) -> [[Floats<I, N>; T]; TILES] {
        let first = units.start;
        let mut sums = [[[self.0.words(0); N]; T]; TILES];
        if units.len() == 2 {
            // Runs of two units and more begin with an even one.
            let loaded = [codes.unit(self, first), codes.unit(self, first + 1)];
            for half in 0..2 {
                let unit = (first + half, loaded[half], half);
                self.add_unit::<BITS, T, TILES, C>(&mut sums, codes, unit, &input[half]);
            }
        } else {
            let unit = (first, codes.unit(self, first), first % 2);
            self.add_unit::<BITS, T, TILES, C>(&mut sums, codes, unit, &input[0]);
        }
        let mut products = [[[self.0.floats(0.0); N]; T]; TILES];
        for i in 0..TILES {
            for t in 0..T {
                products[i][t] = self.converted_totals::<BITS>(sums[i][t]);
            }
        }
        products
    }

    /// The sums of a step as f32.
    #[inline(always)]
    pub fn converted_totals<const WIDTH: usize>(self, mut sums: Words<I, N>) -> Floats<I, N> {
        for sums in &mut sums {
            *sums = self.0.totals::<WIDTH>(*sums);
        }
        self.converted(sums)
    }

    /// Adds the products of 16 columns.
    #[inline(always)]
    fn add_unit<const BITS: usize, const T: usize, const TILES: usize, C: Codes<I, N, TILES>>(
        self,
        sums: &mut [[Words<I, N>; T]; TILES],
        codes: C,
        (unit, loaded, half): (usize, C::Unit, usize),
        input: &[[i32; T]; 4],
    ) {
        for (word, input) in input.iter().enumerate() {
            let codes = codes.words(self, unit, loaded, half, word);
            for t in 0..T {
                let input = self.0.words(input[t]);
                for i in 0..TILES {
                    for n in 0..N {
                        sums[i][t][n] =
                            self.0.add_products::<BITS>(sums[i][t][n], codes[i][n], input);
                    }
                }
            }
        }
    }

    /// The words of a unit in the planes of 2 bits and of 1, which two units share.
    #[inline(always)]
    pub fn unit_words<const WIDTH: usize>(
        self,
        planes: Planes<'_>,
        unit: usize,
    ) -> [Words<I, N>; 2] {
        let zero = [self.0.words(0); N];
        let (mut two, mut one) = (zero, zero);
        if WIDTH & 2 != 0 {
            two = self.load(&planes.two[unit]);
        }
        if WIDTH & 1 != 0 {
            one = match planes.one.get(unit / 2) {
                Some(block) => self.load(block),
                None => self.load(&bytemuck::cast(short_words(planes.short))),
            };
        }
        [two, one]
    }

    /// The stored codes of columns `4 t ..` of a unit.
    #[inline(always)]
    pub fn stored_codes<const WIDTH: usize>(
        self,
        planes: Planes<'_>,
        unit: usize,
        [two, one]: [Words<I, N>; 2],
        half: usize,
        t: usize,
    ) -> Words<I, N> {
        let mut codes = [self.0.words(0); N];
        if WIDTH & 8 != 0 {
            codes = self.load(&planes.eight[unit][t]);
        }
        if WIDTH & 4 != 0 {
            codes = self.field::<4>(self.load(&planes.four[unit][t / 2]), 4 * (t % 2), 0);
        }
        if WIDTH & 2 != 0 {
            codes = self.or(codes, self.field::<2>(two, 2 * t, WIDTH & 4));
        }
        if WIDTH & 1 != 0 {
            codes = self.or(codes, self.field::<1>(one, 4 * half + t, WIDTH & 6));
        }
        codes
    }

    /// Factors and minima of the next run, whose record is taken off.
    #[inline(always)]
    pub fn run_scales<const WIDTH: usize>(
        self,
        coding: ScaleCoding,
        records: &mut &[u8],
    ) -> (Floats<I, N>, Floats<I, N>) {
        match coding {
            ScaleCoding::TwoLevel { scale_bits: 6, .. } => self.six_bit_scales(next(records)),
            ScaleCoding::TwoLevel { .. } => self.four_bit_scales(next(records)),
            ScaleCoding::Trellis { .. } => self.trellis_scales::<WIDTH>(next(records)),
            ScaleCoding::Paper => self.paper_scales::<WIDTH>(records),
        }
    }

    /// Factors of a record of a trellis (F26), and the minima that take the center off its entries.
    #[inline(always)]
    fn trellis_scales<const WIDTH: usize>(self, record: &[u8; 8]) -> (Floats<I, N>, Floats<I, N>) {
        let mut factor = self.converted(self.field::<4>(self.halves_apart(record), 0, 0));
        let mut minimum = factor;
        for i in 0..N {
            minimum[i] = self.0.mul(factor[i], self.0.floats(TRELLIS_CENTER.into()));
            if WIDTH == 8 {
                factor[i] = self.0.mul(factor[i], self.0.floats(0.5));
            }
        }
        (factor, minimum)
    }

    /// The bytes of 8 rows, and behind them the same 4 bits further down: what the last 8 rows of a
    /// tile find in them.
    #[inline(always)]
    fn halves_apart(self, bytes: &[u8; 8]) -> Words<I, N> {
        let low = u64::from_le_bytes(*bytes);
        self.widened(&(u128::from(low) | u128::from(low >> 4) << 64).to_le_bytes())
    }

    /// Factors and minima of a record with 4-bit codes (F14).
    #[inline(always)]
    fn four_bit_scales(self, record: &[u8; 16]) -> (Floats<I, N>, Floats<I, N>) {
        let codes = self.widened(record);
        (self.converted(self.field::<4>(codes, 0, 0)), self.converted(self.field::<4>(codes, 4, 0)))
    }

    /// The same with 6-bit codes (F15).
    #[inline(always)]
    fn six_bit_scales(self, record: &[u8; 24]) -> (Floats<I, N>, Floats<I, N>) {
        let (low, high) = record.split_first_chunk().expect("24 bytes");
        let low = self.widened(low);
        let high = self.halves_apart(high.first_chunk().expect("8 bytes"));
        let s = self.or(self.field::<4>(low, 0, 0), self.field::<2>(high, 0, 4));
        let z = self.or(self.field::<4>(low, 4, 0), self.field::<2>(high, 2, 4));
        (self.converted(s), self.converted(z))
    }

    /// The scales of a paper record, and what to take off a product: scale times zero point (F16),
    /// or scale less mean (F17).
    #[inline(always)]
    fn paper_scales<const WIDTH: usize>(self, record: &[u8]) -> (Floats<I, N>, Floats<I, N>) {
        let (scale, rest) = record.split_first_chunk().expect("16 scales");
        let scale = self.halves(scale);
        let (mut factor, mut minimum) = (scale, scale);
        match WIDTH {
            1 => {
                let mean = self.halves(rest.first_chunk().expect("16 means"));
                for i in 0..N {
                    factor[i] = self.0.mul(scale[i], self.0.floats(2.0));
                    minimum[i] = self.0.sub(scale[i], mean[i]);
                }
            }
            _ => {
                let zero = self.converted(self.widened(&zero_points::<WIDTH>(rest)));
                for i in 0..N {
                    minimum[i] = self.0.mul(scale[i], zero[i]);
                }
            }
        }
        (factor, minimum)
    }

    /// `BITS` bits of each byte, moved from bit `from` to bit `to`.
    #[inline(always)]
    pub fn field<const BITS: usize>(
        self,
        words: Words<I, N>,
        from: usize,
        to: usize,
    ) -> Words<I, N> {
        let mask = self.0.words(i32::from_ne_bytes([((1 << BITS) - 1) << to; 4]));
        let mut fields = self.shifted_right(words, from.saturating_sub(to));
        for field in &mut fields {
            if from < to {
                *field = self.0.shifted_left(*field, to - from);
            }
            *field = self.0.and(*field, mask);
        }
        fields
    }

    /// The words of the rows that stand behind those of the same tile in the ring (F24): of a
    /// register those of another, as they are, and once in another order.
    #[inline(always)]
    pub fn next_rows(self, words: Words<I, N>) -> Words<I, N> {
        let mut next = words;
        for (i, next) in next.iter_mut().enumerate() {
            // The registers stand in the order of their bits in reverse, too.
            let place = reversed(i, N);
            *next = match place + 1 == N {
                false => words[reversed(place + 1, N)],
                true => self.0.next_lanes(words[0]),
            };
        }
        next
    }

    /// The sums of what two tables of bytes hold at indices below 16.
    #[inline(always)]
    pub fn sums_of_entries(
        self,
        low: I::Words,
        low_index: Words<I, N>,
        high: I::Words,
        high_index: Words<I, N>,
    ) -> Words<I, N> {
        let mut sums = low_index;
        for i in 0..N {
            let entry = self.0.looked_up(low, low_index[i]);
            sums[i] = self.0.add(entry, self.0.looked_up(high, high_index[i]));
        }
        sums
    }

    #[inline(always)]
    fn shifted_right(self, mut words: Words<I, N>, bits: usize) -> Words<I, N> {
        for words in &mut words {
            *words = self.0.shifted_right(*words, self.0.words(bits as i32));
        }
        words
    }

    #[inline(always)]
    pub fn or(self, mut a: Words<I, N>, b: Words<I, N>) -> Words<I, N> {
        for i in 0..N {
            a[i] = self.0.or(a[i], b[i]);
        }
        a
    }

    #[inline(always)]
    pub fn load(self, block: &[u8; 64]) -> Words<I, N> {
        let mut words = [self.0.words(0); N];
        for (words, bytes) in words.iter_mut().zip(block.chunks_exact(64 / N)) {
            *words = self.0.load(bytes);
        }
        words
    }

    #[inline(always)]
    pub fn store_words(self, words: Words<I, N>, block: &mut [u8; 64]) {
        for (words, bytes) in words.iter().zip(block.chunks_exact_mut(64 / N)) {
            self.0.store_words(*words, bytes);
        }
    }

    #[inline(always)]
    pub fn load_floats(self, lanes: &Lanes) -> Floats<I, N> {
        let mut floats = [self.0.floats(0.0); N];
        for (floats, lanes) in floats.iter_mut().zip(lanes.chunks_exact(TILE_ROWS / N)) {
            *floats = self.0.load_floats(lanes);
        }
        floats
    }

    #[inline(always)]
    pub fn store(self, floats: Floats<I, N>, lanes: &mut Lanes) {
        for (floats, lanes) in floats.iter().zip(lanes.chunks_exact_mut(TILE_ROWS / N)) {
            self.0.store(*floats, lanes);
        }
    }

    #[inline(always)]
    fn widened(self, bytes: &[u8; TILE_ROWS]) -> Words<I, N> {
        let mut words = [self.0.words(0); N];
        for (words, bytes) in words.iter_mut().zip(bytes.chunks_exact(TILE_ROWS / N)) {
            *words = self.0.widened(bytes);
        }
        words
    }

    #[inline(always)]
    pub fn converted(self, words: Words<I, N>) -> Floats<I, N> {
        let mut floats = [self.0.floats(0.0); N];
        for i in 0..N {
            floats[i] = self.0.converted(words[i]);
        }
        floats
    }

    #[inline(always)]
    fn halves(self, bytes: &[u8; 32]) -> Floats<I, N> {
        let mut floats = [self.0.floats(0.0); N];
        for (floats, bytes) in floats.iter_mut().zip(bytes.chunks_exact(32 / N)) {
            *floats = self.0.halves(bytes);
        }
        floats
    }
}

/// Units of 16 columns in a run, for a group of `units`.
#[inline(always)]
pub(super) fn run_units(coding: ScaleCoding, units: usize) -> usize {
    match coding {
        ScaleCoding::TwoLevel { sub_group, .. } | ScaleCoding::Trellis { sub_group } => {
            sub_group / UNIT
        }
        ScaleCoding::Paper => units,
    }
}

/// Whether the codes of groups of this width are windows, not those of a grid.
#[inline(always)]
pub(super) fn has_windows<const WIDTH: usize>(packed: PackedTensor<'_>) -> bool {
    WIDTH < ENTRY_BITS && matches!(packed.layout().coding(), ScaleCoding::Trellis { .. })
}

/// Takes the next record off.
#[inline(always)]
fn next<'a, const BYTES: usize>(records: &mut &'a [u8]) -> &'a [u8; BYTES] {
    let (record, rest) = records.split_first_chunk().expect("a record for each run");
    *records = rest;
    record
}
