//! Codes that are unpacked once for many tokens: 16 rows and some columns of a matrix, whatever it
//! is stored as.

use std::ops::Range;

use slim_formats::{
    DenseTensor,
    slim::{Group, LayerLayout, PackedTensor, ScaleCoding, TILE_ROWS},
};

use super::{
    blocks::{BlockIsa, RowBlock, WORDS, blocks_of_row, for_each_step},
    input::{FINE, STEP},
    kernel::{Floats, Isa, Kernel, Words, run_units},
    tokens::TokenBlock,
};
use crate::{
    cpu::unpack::{Lanes, Planes, UNIT, for_width},
    ggml::{Block, for_block, run_scales},
};

/// Some columns of every row.
#[derive(Debug, Clone)]
pub struct Chunk {
    /// Its groups, or its ggml blocks.
    pub(super) parts: Range<usize>,
    /// Columns before it, in fours.
    pub(super) first_word: usize,
    /// Steps of the input before it.
    pub(super) first_step: usize,
}

/// 16 rows of a chunk, unpacked.
#[derive(Default)]
pub struct Panel {
    /// Four columns of 16 rows each.
    codes: Vec<[u8; 64]>,
    steps: Vec<Step>,
    first_word: usize,
    first_step: usize,
}

/// What the codes of a step are worth: factor times code, plus offset.
#[derive(Clone)]
struct Step {
    factor: Lanes,
    offset: Lanes,
    /// Entries of [`Panel::codes`].
    words: usize,
    /// Bits of a code.
    bits: usize,
}

impl Panel {
    fn start(&mut self, chunk: &Chunk) {
        self.codes.clear();
        self.steps.clear();
        (self.first_word, self.first_step) = (chunk.first_word, chunk.first_step);
    }
}

impl<I: Isa, const N: usize> Kernel<I, N> {
    /// How many tokens [`Self::multiply`] multiplies at a time: their sums, codes and inputs have
    /// to fit the registers.
    pub const fn tokens(self) -> usize {
        match N {
            1 => 12,
            _ => 4,
        }
    }

    /// Unpacks a tile of a packed layer.
    #[inline(always)]
    pub fn unpack_tile(
        self,
        packed: PackedTensor<'_>,
        tile: usize,
        chunk: &Chunk,
        panel: &mut Panel,
    ) {
        panel.start(chunk);
        let layout = packed.layout();
        let (codes, records) = (packed.tile_codes(tile), packed.tile_scales(tile));
        let scales = self.row_scales(packed.tile_row_scales(tile));
        for group in &layout.groups()[chunk.parts.clone()] {
            let codes = &codes[group.codes_offset..][..group.code_bytes()];
            let records = &records[group.scales_offset..];
            for_width!(
                group.bit_width,
                Self::unpack_group(self, codes, layout.coding(), records, scales, panel)
            );
        }
    }

    #[inline(always)]
    fn unpack_group<const WIDTH: usize>(
        self,
        codes: &[u8],
        coding: ScaleCoding,
        mut records: &[u8],
        (d, m): (Floats<I, N>, Floats<I, N>),
        panel: &mut Panel,
    ) {
        let isa = self.0;
        let planes = Planes::of::<WIDTH>(codes);
        let (units, mut unit) = (planes.units, 0);
        while unit < units {
            let (mut factor, mut offset) = self.run_scales::<WIDTH>(coding, &mut records);
            for i in 0..N {
                factor[i] = isa.mul(factor[i], d[i]);
                offset[i] = isa.sub(isa.floats(0.0), isa.mul(offset[i], m[i]));
            }
            let end = units.min(unit + run_units(coding, units));
            while unit < end {
                let step = unit..end.min(unit + 2);
                self.push_step(factor, offset, 4 * step.len(), WIDTH, panel);
                unit = step.end;
                for unit in step {
                    let words = self.unit_words::<WIDTH>(planes, unit);
                    for t in 0..4 {
                        self.push_codes(self.codes::<WIDTH>(planes, unit, words, t), panel);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn push_step(
        self,
        factor: Floats<I, N>,
        offset: Floats<I, N>,
        words: usize,
        bits: usize,
        panel: &mut Panel,
    ) {
        let zero = [0.0; TILE_ROWS];
        let mut step = Step { factor: zero, offset: zero, words, bits };
        self.store(factor, &mut step.factor);
        self.store(offset, &mut step.offset);
        panel.steps.push(step);
    }

    #[inline(always)]
    fn push_codes(self, codes: Words<I, N>, panel: &mut Panel) {
        let mut block = [0; 64];
        self.store_words(codes, &mut block);
        panel.codes.push(block);
    }

    /// Adds the products of a panel with a block of tokens to their sums, 16 rows of each token.
    #[inline(always)]
    pub fn multiply(self, panel: &Panel, block: &TokenBlock, sums: &mut [Lanes]) {
        match block.tokens {
            12 => self.multiply_tokens::<12>(panel, block, sums),
            8 => self.multiply_tokens::<8>(panel, block, sums),
            4 => self.multiply_tokens::<4>(panel, block, sums),
            2 => self.multiply_tokens::<2>(panel, block, sums),
            1 => self.multiply_tokens::<1>(panel, block, sums),
            tokens => unreachable!("a block of {tokens} tokens"),
        }
    }

    #[inline(always)]
    fn multiply_tokens<const T: usize>(
        self,
        panel: &Panel,
        block: &TokenBlock,
        sums: &mut [Lanes],
    ) {
        let sums: &mut [Lanes; T] = sums.try_into().expect("sums of each token");
        let mut codes = &panel.codes[..];
        let mut input = &block.codes.as_chunks::<T>().0[panel.first_word..];
        let mut fine_input = &block.fine_codes.as_chunks::<T>().0[panel.first_word..];
        let worths = &block.worths.as_chunks::<T>().0.as_chunks::<2>().0[panel.first_step..];
        let fine = &block.fine[panel.first_step..];
        for ((step, worth), &fine) in panel.steps.iter().zip(worths).zip(fine) {
            let (step_codes, step_input, step_fine);
            (step_codes, codes) = codes.split_at(step.words);
            (step_input, input) = input.split_at(step.words);
            (step_fine, fine_input) = fine_input.split_at(step.words);
            match step.bits {
                ..=4 => self.multiply_step::<4, T>(step, step_codes, step_input, worth, sums),
                5..=7 => self.multiply_step::<7, T>(step, step_codes, step_input, worth, sums),
                _ => self.multiply_step::<8, T>(step, step_codes, step_input, worth, sums),
            }
            let mut fine = fine;
            while fine != 0 {
                let token = fine.trailing_zeros() as usize % T;
                fine &= fine - 1;
                let worth = FINE * worth[0][token];
                match step.bits {
                    ..=4 => {
                        self.multiply_fine::<4, T>(step, step_codes, step_fine, worth, token, sums)
                    }
                    5..=7 => {
                        self.multiply_fine::<7, T>(step, step_codes, step_fine, worth, token, sums)
                    }
                    _ => {
                        self.multiply_fine::<8, T>(step, step_codes, step_fine, worth, token, sums)
                    }
                }
            }
        }
    }

    /// Adds the products of a step.
    #[inline(always)]
    fn multiply_step<const WIDTH: usize, const T: usize>(
        self,
        step: &Step,
        codes: &[[u8; 64]],
        input: &[[i32; T]],
        [scales, input_sums]: &[[f32; T]; 2],
        sums: &mut [Lanes; T],
    ) {
        let isa = self.0;
        let mut dots = [[isa.words(0); N]; T];
        for (codes, input) in codes.iter().zip(input) {
            let codes = self.load(codes);
            for t in 0..T {
                let input = isa.words(input[t]);
                for i in 0..N {
                    dots[t][i] = isa.add_products::<WIDTH>(dots[t][i], codes[i], input);
                }
            }
        }
        let (factor, offset) = (self.load_floats(&step.factor), self.load_floats(&step.offset));
        for t in 0..T {
            let (scale, input_sum) = (isa.floats(scales[t]), isa.floats(input_sums[t]));
            let mut sum = self.load_floats(&sums[t]);
            for i in 0..N {
                let dots = isa.converted(isa.totals::<WIDTH>(dots[t][i]));
                sum[i] = isa.mul_add(factor[i], isa.mul(dots, scale), sum[i]);
                sum[i] = isa.mul_add(offset[i], input_sum, sum[i]);
            }
            self.store(sum, &mut sums[t]);
        }
    }

    /// Adds the products of a step with the second codes of one token.
    #[inline(always)]
    fn multiply_fine<const WIDTH: usize, const T: usize>(
        self,
        step: &Step,
        codes: &[[u8; 64]],
        input: &[[i32; T]],
        worth: f32,
        token: usize,
        sums: &mut [Lanes; T],
    ) {
        let isa = self.0;
        let mut dots = [isa.words(0); N];
        for (codes, input) in codes.iter().zip(input) {
            let codes = self.load(codes);
            for i in 0..N {
                dots[i] = isa.add_products::<WIDTH>(dots[i], codes[i], isa.words(input[token]));
            }
        }
        let factor = self.load_floats(&step.factor);
        let mut sum = self.load_floats(&sums[token]);
        for i in 0..N {
            let dots = isa.converted(isa.totals::<WIDTH>(dots[i]));
            sum[i] = isa.mul_add(factor[i], isa.mul(dots, isa.floats(worth)), sum[i]);
        }
        self.store(sum, &mut sums[token]);
    }
}

impl<I: BlockIsa, const N: usize> Kernel<I, N> {
    /// Unpacks the rows of a tensor in ggml's blocks that are a tile.
    ///
    /// # Panics
    /// As [`Self::blocks`].
    #[inline(always)]
    pub fn unpack_blocks(
        self,
        tensor: &DenseTensor<'_>,
        tile: usize,
        chunk: &Chunk,
        panel: &mut Panel,
    ) {
        panel.start(chunk);
        for_block!(tensor.dtype, Self::unpack_rows(self, tensor, tile, chunk, panel), other => {
            unreachable!("{other:?} has no codes")
        });
    }

    #[inline(always)]
    fn unpack_rows<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        tensor: &DenseTensor<'_>,
        tile: usize,
        chunk: &Chunk,
        Panel { steps, codes, .. }: &mut Panel,
    ) {
        let zero = [0.0; TILE_ROWS];
        let step = Step { factor: zero, offset: zero, words: B::RUN / 4, bits: B::BITS };
        steps.resize(chunk.parts.len() * VALUES / B::RUN, step);
        codes.resize(chunk.parts.len() * VALUES / 4, [0; 64]);
        for row in 0..TILE_ROWS {
            let blocks = &blocks_of_row(tensor, tile * TILE_ROWS + row)[chunk.parts.clone()];
            let steps = steps.chunks_exact_mut(VALUES / B::RUN);
            let codes = codes.chunks_exact_mut(VALUES / 4);
            for ((block, steps), codes) in blocks.iter().zip(steps).zip(codes) {
                self.unpack_block::<B, BYTES, VALUES>(block, row, steps, codes);
            }
        }
    }

    /// Unpacks a block to a lane of each step and of each four columns.
    #[inline(always)]
    fn unpack_block<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        block: &[u8; BYTES],
        row: usize,
        steps: &mut [Step],
        codes: &mut [[u8; 64]],
    ) {
        // Codes with a sign become codes without one.
        let (signs, below) = if B::BITS == 8 { (0x80, 128.0) } else { (0, 0.0) };
        for (step, (scale, minimum)) in steps.iter_mut().zip(run_scales::<B, BYTES, VALUES>(block))
        {
            step.factor[row] = scale;
            step.offset[row] = -scale * (B::OFFSET + below) - minimum;
        }
        let mut words = [[0; 4]; WORDS];
        for_each_step!(VALUES, |step| {
            let registers = B::codes(RowBlock(self, block), step * WORDS).1;
            let bytes = words.as_flattened_mut().chunks_exact_mut(STEP / N);
            for (register, bytes) in registers.into_iter().zip(bytes) {
                self.0.store_words(register, bytes);
            }
            for (word, codes) in words.iter().zip(&mut codes[step * WORDS..]) {
                codes[4 * row..][..4].copy_from_slice(&word.map(|code| code ^ signs));
            }
        });
    }
}

/// The chunks of a packed layer; the columns of a chunk stay in the first cache if groups are not
/// larger.
pub(super) fn chunks_of_groups(layout: &LayerLayout) -> Vec<Chunk> {
    let steps = |group: &Group| -> usize {
        group.runs(layout.coding()).map(|run| run.len().div_ceil(2 * UNIT)).sum()
    };
    let parts = layout
        .groups()
        .iter()
        .map(|group| (group.code_bytes() / group.bit_width.bits() as usize / 2, steps(group)));
    chunks(parts)
}

/// The chunks of rows in ggml's blocks.
pub(super) fn chunks_of_blocks(tensor: &DenseTensor<'_>, run: usize) -> Vec<Chunk> {
    let values = tensor.dtype.block().map_or(1, |(values, _)| values as usize);
    chunks((0..tensor.cols / values).map(|_| (values, values / run)))
}

/// From the stored columns and the steps of each part.
fn chunks(parts: impl Iterator<Item = (usize, usize)>) -> Vec<Chunk> {
    const COLS: usize = 1024;
    let mut chunks: Vec<Chunk> = Vec::new();
    let (mut col, mut step, mut first_col) = (0, 0, 0);
    for (index, (cols, steps)) in parts.enumerate() {
        match chunks.last_mut() {
            Some(chunk) if col + cols - first_col <= COLS => chunk.parts.end = index + 1,
            _ => {
                first_col = col;
                chunks.push(Chunk {
                    parts: index..index + 1,
                    first_word: col / 4,
                    first_step: step,
                });
            }
        }
        col += cols;
        step += steps;
    }
    chunks
}
