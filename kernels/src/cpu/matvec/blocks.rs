//! One token times 16 rows of a tensor in one of ggml's quantized types. Four bytes of each row at a time become words of a register;
//! then codes are unpacked and multiplied as those of packed layers are.

use std::{array, hint::black_box};

use slim_formats::{DType, DenseTensor, slim::TILE_ROWS};

use super::{
    input::{FINE, Input, Step},
    kernel::{Floats, Isa, Kernel, Words},
};
use crate::{
    cpu::unpack::{Lanes, UNIT},
    ggml::{Block, Word, for_block},
};

/// Bytes of the longest block.
const LONGEST: usize = 210;

/// Columns that share a scale in a tensor of this type; `None` of types whose values are no codes.
pub(super) fn run(dtype: DType) -> Option<usize> {
    fn of<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>() -> Option<usize> {
        Some(B::RUN)
    }
    for_block!(dtype, of(), _ => None)
}

/// A block of each of 16 rows.
pub(super) struct Blocks {
    /// Four bytes of each row at a time.
    words: [[u32; TILE_ROWS]; LONGEST / 4],
    pub d: [[u8; 2]; TILE_ROWS],
    pub m: [[u8; 2]; TILE_ROWS],
}

impl Default for Blocks {
    #[inline(always)]
    fn default() -> Self {
        let (zero, halves) = ([0; TILE_ROWS], [[0; 2]; TILE_ROWS]);
        Self { words: [zero; LONGEST / 4], d: halves, m: halves }
    }
}

impl Blocks {
    /// Puts block `index` of each row side by side.
    #[inline(always)]
    pub fn gather<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        &mut self,
        rows: &[&[[u8; BYTES]]; TILE_ROWS],
        index: usize,
    ) {
        for r in 0..TILE_ROWS {
            let block = &rows[r][index];
            let (words, _) = block[B::WORDS..].as_chunks::<4>();
            for (word, of_rows) in words.iter().zip(&mut self.words) {
                of_rows[r] = u32::from_le_bytes(*word);
            }
            self.d[r] = [block[B::D], block[B::D + 1]];
            if let Some((at, _)) = B::M {
                self.m[r] = [block[at], block[at + 1]];
            }
        }
    }
}

/// The blocks of 16 rows from `first` on; the last row stands for those below it.
///
/// # Panics
/// If values are not stored row by row.
#[inline(always)]
pub(super) fn rows<'a, const BYTES: usize>(
    tensor: &DenseTensor<'a>,
    first: usize,
) -> [&'a [[u8; BYTES]]; TILE_ROWS] {
    let row_bytes = tensor.bytes.len() / tensor.rows;
    array::from_fn(|r| {
        let row = tensor.layout.stored_row((first + r).min(tensor.rows - 1));
        let start = row.expect("rows one after the other") * row_bytes;
        // Counted anew, so that loops over blocks need no checks of their own.
        &tensor.bytes[start..start + row_bytes].as_chunks().0[..row_bytes / BYTES]
    })
}

/// Words of 16 rows in registers.
#[derive(Clone, Copy)]
pub(super) struct RowWords<I: Isa, const N: usize>(Kernel<I, N>, pub Words<I, N>);

impl<I: Isa, const N: usize> Word for RowWords<I, N> {
    #[inline(always)]
    fn and(mut self, mask: u32) -> Self {
        let isa = self.0.0;
        for words in &mut self.1 {
            *words = isa.and(*words, isa.words(mask.cast_signed()));
        }
        self
    }

    #[inline(always)]
    fn xor(mut self, mask: u32) -> Self {
        let isa = self.0.0;
        for words in &mut self.1 {
            *words = isa.xor(*words, isa.words(mask.cast_signed()));
        }
        self
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(self.0, self.0.or(self.1, other.1))
    }

    #[inline(always)]
    fn left(mut self, bits: usize) -> Self {
        for words in &mut self.1 {
            *words = self.0.0.shifted_left(*words, bits);
        }
        self
    }

    #[inline(always)]
    fn right(self, bits: usize) -> Self {
        Self(self.0, self.0.shifted_right(self.1, bits))
    }
}

impl<I: Isa, const N: usize> Kernel<I, N> {
    /// The products of 16 rows from `first` on with an input in steps of the type's runs; the last row stands for those below it.
    ///
    /// # Panics
    /// If the type has no [`run`], or values are not stored row by row.
    #[inline(always)]
    pub fn blocks(self, tensor: &DenseTensor<'_>, first: usize, input: &Input) -> Lanes {
        for_block!(tensor.dtype, Self::rows_of_blocks(self, tensor, first, input), other => {
            unreachable!("{other:?} has no codes")
        })
    }

    #[inline(always)]
    fn rows_of_blocks<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        tensor: &DenseTensor<'_>,
        first: usize,
        input: &Input,
    ) -> Lanes {
        let rows = rows::<BYTES>(tensor, first);
        let mut blocks = Blocks::default();
        let mut sums = [self.0.floats(0.0); N];
        for index in 0..rows[0].len() {
            blocks.gather::<B, BYTES, VALUES>(&rows, index);
            self.add_blocks::<B, BYTES, VALUES>(&mut sums, &blocks, input, index * VALUES / UNIT);
        }
        let mut lanes = [0.0; TILE_ROWS];
        self.store(sums, &mut lanes);
        lanes
    }

    /// Adds the products of a block of each row with the input from unit `unit` on.
    #[inline(always)]
    fn add_blocks<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        sums: &mut Floats<I, N>,
        blocks: &Blocks,
        input: &Input,
        unit: usize,
    ) {
        let isa = self.0;
        let word = |at: usize| self.block_word::<B, BYTES, VALUES>(blocks, at);
        let zero = [isa.floats(0.0); N];
        let (mut scaled, mut shifted) = (zero, zero);
        for run in 0..VALUES / B::RUN {
            let input = input.of(unit + run * B::RUN / UNIT..unit + (run + 1) * B::RUN / UNIT);
            let Step { scale, sum, has_fine_codes } = input.steps[0];
            let mut dots = self.run_products::<B, BYTES, VALUES>(word, run, input.codes);
            if has_fine_codes {
                // Codes are unpacked anew, as for packed layers.
                let run = black_box(run);
                let rest = self.run_products::<B, BYTES, VALUES>(word, run, input.fine_codes);
                for i in 0..N {
                    dots[i] = isa.mul_add(rest[i], isa.floats(FINE), dots[i]);
                }
            }
            let (s, z) = self.scales_of_run::<B, BYTES, VALUES>(blocks, run);
            for i in 0..N {
                let mut dots = isa.mul(dots[i], isa.floats(scale));
                if B::OFFSET > 0.0 {
                    dots = isa.sub(dots, isa.floats(B::OFFSET * sum));
                }
                scaled[i] = isa.mul_add(s[i], dots, scaled[i]);
                shifted[i] = isa.mul_add(z[i], isa.floats(sum), shifted[i]);
            }
        }
        let d = self.halves(bytemuck::cast_ref(&blocks.d));
        for i in 0..N {
            sums[i] = isa.mul_add(d[i], scaled[i], sums[i]);
        }
        if let Some((_, sign)) = B::M {
            let m = self.halves(bytemuck::cast_ref(&blocks.m));
            for i in 0..N {
                let m = isa.mul(m[i], isa.floats(-sign));
                sums[i] = isa.mul_add(m, shifted[i], sums[i]);
            }
        }
    }

    /// The words of all rows at an offset of their blocks.
    #[inline(always)]
    pub fn block_word<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        blocks: &Blocks,
        at: usize,
    ) -> RowWords<I, N> {
        RowWords(self, self.load(bytemuck::cast_ref(&blocks.words[(at - B::WORDS) / 4])))
    }

    /// What `d` is multiplied with for a run, and what `m` is.
    #[inline(always)]
    pub fn scales_of_run<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        blocks: &Blocks,
        run: usize,
    ) -> (Floats<I, N>, Floats<I, N>) {
        let word = |at: usize| self.block_word::<B, BYTES, VALUES>(blocks, at);
        let mut s = self.codes_of_run(B::scales(word, run / 4), run);
        for s in &mut s {
            *s = self.0.sub(*s, self.0.floats(B::SCALE_OFFSET));
        }
        (s, self.codes_of_run(B::minimums(word, run / 4), run))
    }

    /// The codes of a run among those of four.
    #[inline(always)]
    fn codes_of_run(self, codes: Option<RowWords<I, N>>, run: usize) -> Floats<I, N> {
        match codes {
            Some(codes) => self.converted(codes.right(run % 4 * 8).and(0xff).1),
            None => [self.0.floats(1.0); N],
        }
    }

    #[inline(always)]
    fn run_products<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        word: impl Fn(usize) -> RowWords<I, N> + Copy,
        run: usize,
        input: &[[i32; 4]],
    ) -> Floats<I, N> {
        let mut sums = [self.0.words(0); N];
        for (i, &input) in input.as_flattened()[..B::RUN / 4].iter().enumerate() {
            let codes = B::codes(word, run * B::RUN / 4 + i).1;
            for i in 0..N {
                let input = self.0.words(input);
                sums[i] = match B::BITS {
                    ..=4 => self.0.add_products::<4>(sums[i], codes[i], input),
                    5..=7 => self.0.add_products::<7>(sums[i], codes[i], input),
                    _ => self.0.add_products::<8>(sums[i], codes[i], input),
                };
            }
        }
        for sums in &mut sums {
            *sums = match B::BITS {
                ..=4 => self.0.totals::<4>(*sums),
                5..=7 => self.0.totals::<7>(*sums),
                _ => self.0.totals::<8>(*sums),
            };
        }
        self.converted(sums)
    }
}
