//! Codes that are unpacked once for many tokens: 16 rows and some columns of a matrix, whatever it
//! is stored as.

use std::{array, ops::Range};

use slim_formats::{
    DenseTensor,
    slim::{Group, LayerLayout, PackedTensor, TILE_ROWS},
};

use super::{
    blocks::{BlockIsa, RowBlock, WORDS, blocks_of_row, for_each_step},
    codes::{Codes, ENTRY_BITS, Stored, Windows},
    input::{FINE, STEP},
    kernel::{Floats, Isa, Kernel, Words, has_windows, run_units},
    tokens::TokenBlock,
};
use crate::{
    cpu::unpack::{Lanes, UNIT, for_width},
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
    /// What the sums of a token are worth in the end.
    d: Lanes,
    m: Lanes,
    first_word: usize,
    first_step: usize,
}

/// What the codes of a step are worth: `d` times factor times code, less `m` times minimum.
#[derive(Clone)]
struct Step {
    factor: Lanes,
    minimum: Lanes,
    /// Entries of [`Panel::codes`].
    words: usize,
    /// Bits of a code.
    bits: usize,
}

/// Sums of a token over the steps so far, for 16 rows: factor times code times input, and minimum
/// times input.
#[derive(Clone, Copy, Default)]
pub struct Sums {
    scaled: Lanes,
    shifted: Lanes,
}

impl Panel {
    /// The products of a token, from its sums over all columns.
    pub(super) fn products(&self, Sums { scaled, shifted }: &Sums) -> Lanes {
        array::from_fn(|r| self.d[r] * scaled[r] - self.m[r] * shifted[r])
    }

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
        let (d, m) = self.row_scales(packed.tile_row_scales(tile));
        self.store(d, &mut panel.d);
        self.store(m, &mut panel.m);
        for group in &layout.groups()[chunk.parts.clone()] {
            for_width!(group.bit_width, Self::unpack_group(self, packed, tile, group, panel));
        }
    }

    #[inline(always)]
    fn unpack_group<const WIDTH: usize>(
        self,
        packed: PackedTensor<'_>,
        tile: usize,
        group: &Group,
        panel: &mut Panel,
    ) {
        if has_windows::<WIDTH>(packed) {
            let codes = Windows::<I, WIDTH>::of(self.0, packed, tile, group);
            self.unpack_runs::<WIDTH, _>(codes, ENTRY_BITS, packed, tile, group, panel);
        } else {
            let codes = Stored::<WIDTH>::of(packed, tile, group);
            self.unpack_runs::<WIDTH, _>(codes, WIDTH, packed, tile, group, panel);
        }
    }

    #[inline(always)]
    fn unpack_runs<const WIDTH: usize, C: Codes<I, N>>(
        self,
        codes: C,
        bits: usize,
        packed: PackedTensor<'_>,
        tile: usize,
        group: &Group,
        panel: &mut Panel,
    ) {
        let coding = packed.layout().coding();
        let mut records = &packed.tile_scales(tile)[group.scales_offset..];
        let (units, mut unit) = (group.stored_cols() / UNIT, 0);
        while unit < units {
            let (factor, minimum) = self.run_scales::<WIDTH>(coding, &mut records);
            let end = units.min(unit + run_units(coding, units));
            while unit < end {
                let step = unit..end.min(unit + 2);
                self.push_step(factor, minimum, 4 * step.len(), bits, panel);
                unit = step.end;
                for unit in step {
                    let loaded = codes.unit(self, unit);
                    for t in 0..4 {
                        self.push_codes(codes.words(self, unit, loaded, t), panel);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn push_step(
        self,
        factor: Floats<I, N>,
        minimum: Floats<I, N>,
        words: usize,
        bits: usize,
        panel: &mut Panel,
    ) {
        let zero = [0.0; TILE_ROWS];
        let mut step = Step { factor: zero, minimum: zero, words, bits };
        self.store(factor, &mut step.factor);
        self.store(minimum, &mut step.minimum);
        panel.steps.push(step);
    }

    #[inline(always)]
    fn push_codes(self, codes: Words<I, N>, panel: &mut Panel) {
        let mut block = [0; 64];
        self.store_words(codes, &mut block);
        panel.codes.push(block);
    }

    /// Adds the products of a panel with a block of tokens to their sums.
    #[inline(always)]
    pub fn multiply(self, panel: &Panel, block: &TokenBlock, sums: &mut [Sums]) {
        match block.tokens {
            12 if N == 1 => self.multiply_tokens::<12>(panel, block, sums),
            8 if N == 1 => self.multiply_tokens::<8>(panel, block, sums),
            4 => self.multiply_tokens::<4>(panel, block, sums),
            2 => self.multiply_tokens::<2>(panel, block, sums),
            1 => self.multiply_tokens::<1>(panel, block, sums),
            tokens => unreachable!("a block of {tokens} tokens"),
        }
    }

    #[inline(always)]
    fn multiply_tokens<const T: usize>(self, panel: &Panel, block: &TokenBlock, sums: &mut [Sums]) {
        let sums: &mut [Sums; T] = sums.try_into().expect("sums of each token");
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
            let input = (step_input, step_fine, fine);
            match step.bits {
                ..=4 => self.multiply_step::<4, T>(step, step_codes, input, worth, sums),
                5..=7 => self.multiply_step::<7, T>(step, step_codes, input, worth, sums),
                _ => self.multiply_step::<8, T>(step, step_codes, input, worth, sums),
            }
        }
    }

    /// Adds the products of a step with the first codes of all tokens, and with the second codes of
    /// those whose bit is set.
    #[inline(always)]
    fn multiply_step<const WIDTH: usize, const T: usize>(
        self,
        step: &Step,
        codes: &[[u8; 64]],
        (input, fine_input, fine): (&[[i32; T]], &[[i32; T]], u16),
        [scales, input_sums]: &[[f32; T]; 2],
        sums: &mut [Sums; T],
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
        let (factor, minimum) = (self.load_floats(&step.factor), self.load_floats(&step.minimum));
        for t in 0..T {
            let mut dots = self.converted_totals::<WIDTH>(dots[t]);
            if (fine >> t) & 1 != 0 {
                let rest = self.token_products::<WIDTH, T>(codes, fine_input, t);
                for i in 0..N {
                    dots[i] = isa.mul_add(rest[i], isa.floats(FINE), dots[i]);
                }
            }
            let (scale, input_sum) = (isa.floats(scales[t]), isa.floats(input_sums[t]));
            let mut scaled = self.load_floats(&sums[t].scaled);
            let mut shifted = self.load_floats(&sums[t].shifted);
            for i in 0..N {
                scaled[i] = isa.mul_add(factor[i], isa.mul(dots[i], scale), scaled[i]);
                shifted[i] = isa.mul_add(minimum[i], input_sum, shifted[i]);
            }
            self.store(scaled, &mut sums[t].scaled);
            self.store(shifted, &mut sums[t].shifted);
        }
    }

    /// The products of a step with one token.
    #[inline(always)]
    fn token_products<const WIDTH: usize, const T: usize>(
        self,
        codes: &[[u8; 64]],
        input: &[[i32; T]],
        token: usize,
    ) -> Floats<I, N> {
        let isa = self.0;
        let mut sums = [isa.words(0); N];
        for (codes, input) in codes.iter().zip(input) {
            let codes = self.load(codes);
            for i in 0..N {
                sums[i] = isa.add_products::<WIDTH>(sums[i], codes[i], isa.words(input[token]));
            }
        }
        self.converted_totals::<WIDTH>(sums)
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
        Panel { steps, codes, d, m, .. }: &mut Panel,
    ) {
        // Each block has its own: they are in the factors.
        (*d, *m) = ([1.0; TILE_ROWS], [1.0; TILE_ROWS]);
        let zero = [0.0; TILE_ROWS];
        let step = Step { factor: zero, minimum: zero, words: B::RUN / 4, bits: B::BITS };
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
            step.minimum[row] = scale * (B::OFFSET + below) + minimum;
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
