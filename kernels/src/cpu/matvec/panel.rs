//! Codes that are unpacked once for many tokens: 16 rows and some columns of a matrix, whatever it
//! is stored as.

use std::{iter::Zip, ops::Range, slice::IterMut};

use slim_formats::{
    DenseTensor,
    slim::{Group, LayerLayout, PackedTensor, TILE_ROWS},
};

use super::{
    blocks::{BlockIsa, RowBlock, WORDS, blocks_of_row, for_each_step},
    codes::{Codes, ENTRY_BITS, Stored, Tile, TileWindows},
    input::{FINE, STEP, StepCodes},
    kernel::{AHEAD_BYTES, Floats, Isa, Kernel, has_windows, run_units},
    tokens::{Step, TokenBlock, Tokens},
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
    /// Its columns, in units.
    pub(super) units: Range<usize>,
    /// Its steps of the input.
    pub(super) steps: Range<usize>,
}

/// 16 rows of a chunk, unpacked.
#[derive(Default)]
pub struct Panel {
    codes: Vec<UnitCodes>,
    steps: Vec<PanelStep>,
    /// Of each step.
    minimums: Vec<Lanes>,
    /// What the sums of a token are worth in the end.
    d: Lanes,
    m: Lanes,
}

/// Codes of 16 columns: for each four columns a word of each row.
type UnitCodes = [[u8; 64]; 4];

/// What the codes of a step are worth: `d` times factor times code, less `m` times minimum.
#[derive(Clone, Default)]
struct PanelStep {
    factor: Lanes,
    /// Entries of [`Panel::codes`].
    units: usize,
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
    /// Makes room for a chunk.
    fn resize(&mut self, Chunk { units, steps, .. }: &Chunk) {
        self.codes.resize(units.len(), [[0; 64]; 4]);
        self.steps.resize(steps.len(), PanelStep::default());
        self.minimums.resize(steps.len(), Lanes::default());
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
        panel.resize(chunk);
        let layout = packed.layout();
        let (d, m) = self.row_scales(packed.tile_row_scales(tile));
        self.store(d, &mut panel.d);
        self.store(m, &mut panel.m);
        let mut unpacked = &mut panel.codes[..];
        let mut steps = panel.steps.iter_mut().zip(&mut panel.minimums);
        for group in &layout.groups()[chunk.parts.clone()] {
            unpacked = for_width!(
                group.bit_width,
                Self::unpack_group(self, packed, tile, group, &mut steps, unpacked)
            );
        }
    }

    /// Unpacks a group to the next steps and the first units, and gives the other units.
    #[inline(always)]
    fn unpack_group<'a, const WIDTH: usize>(
        self,
        packed: PackedTensor<'_>,
        tile: usize,
        group: &Group,
        steps: &mut Zip<IterMut<'_, PanelStep>, IterMut<'_, Lanes>>,
        unpacked: &'a mut [UnitCodes],
    ) -> &'a mut [UnitCodes] {
        let (unpacked, others) = unpacked.split_at_mut(group.stored_cols() / UNIT);
        if has_windows::<WIDTH>(packed) {
            let codes = TileWindows::<I, WIDTH>::of(self.0, packed, tile, group);
            self.unpack_runs::<WIDTH, ENTRY_BITS, _>(codes, packed, tile, group, steps, unpacked);
        } else {
            let codes = Stored::<WIDTH, 1>::of([Tile::of(packed, tile)], group);
            self.unpack_runs::<WIDTH, WIDTH, _>(codes, packed, tile, group, steps, unpacked);
        }
        others
    }

    /// The same with codes of so many bits.
    #[inline(always)]
    fn unpack_runs<const WIDTH: usize, const BITS: usize, C: Codes<I, N, 1>>(
        self,
        codes: C,
        packed: PackedTensor<'_>,
        tile: usize,
        group: &Group,
        steps: &mut Zip<IterMut<'_, PanelStep>, IterMut<'_, Lanes>>,
        unpacked: &mut [UnitCodes],
    ) {
        let coding = packed.layout().coding();
        let mut records = &packed.tile_scales(tile)[group.scales_offset..];
        let (units, mut unit) = (unpacked.len(), 0);
        let bytes = &packed.tile_codes(tile)[group.codes_offset..];
        let mut ahead = bytes.as_ptr().wrapping_add(AHEAD_BYTES);
        while unit < units {
            let (factor, minimum) = self.run_scales::<WIDTH>(coding, &mut records);
            let end = units.min(unit + run_units(coding, units));
            while unit < end {
                for _ in 0..WIDTH {
                    self.0.prefetch(ahead);
                    ahead = ahead.wrapping_add(64);
                }
                let (step, step_minimum) = steps.next().expect("the steps of the chunk");
                (step.units, step.bits) = ((end - unit).min(2), BITS);
                self.store(factor, &mut step.factor);
                self.store(minimum, step_minimum);
                for _ in 0..step.units {
                    let loaded = codes.unit(self, unit);
                    for (t, unpacked) in unpacked[unit].iter_mut().enumerate() {
                        let [words] = codes.words(self, unit, loaded, unit % 2, t);
                        self.store_words(words, unpacked);
                    }
                    unit += 1;
                }
            }
        }
    }

    /// Adds the products of a chunk with a block of tokens to their sums.
    #[inline(always)]
    pub fn multiply(self, panel: &Panel, chunk: &Chunk, block: &TokenBlock, sums: &mut [Sums]) {
        match block {
            TokenBlock::One(tokens) => self.multiply_tokens(panel, chunk, tokens, sums),
            TokenBlock::Two(tokens) => self.multiply_tokens(panel, chunk, tokens, sums),
            TokenBlock::Four(tokens) => self.multiply_tokens(panel, chunk, tokens, sums),
            TokenBlock::Eight(tokens) if N == 1 => {
                self.multiply_tokens(panel, chunk, tokens, sums);
            }
            TokenBlock::Twelve(tokens) if N == 1 => {
                self.multiply_tokens(panel, chunk, tokens, sums);
            }
            block => unreachable!("{} tokens", block.tokens()),
        }
    }

    #[inline(always)]
    fn multiply_tokens<const T: usize>(
        self,
        panel: &Panel,
        chunk: &Chunk,
        tokens: &Tokens<T>,
        sums: &mut [Sums],
    ) {
        let isa = self.0;
        let sums: &mut [Sums; T] = sums.try_into().expect("sums of each token");
        let zero = [[isa.floats(0.0); N]; T];
        let input = &tokens.steps[chunk.steps.clone()];

        let mut scaled = zero;
        for t in 0..T {
            scaled[t] = self.load_floats(&sums[t].scaled);
        }
        let mut codes = &panel.codes[..];
        for (step, input) in panel.steps.iter().zip(input) {
            let step_codes;
            (step_codes, codes) = codes.split_at(step.units);
            let fine_codes = &tokens.fine_codes[..];
            let products = match step.bits {
                ..=4 => self.panel_products::<4, T>(step_codes, input, fine_codes),
                5..=7 => self.panel_products::<7, T>(step_codes, input, fine_codes),
                _ => self.panel_products::<8, T>(step_codes, input, fine_codes),
            };
            let factor = self.load_floats(&step.factor);
            for t in 0..T {
                for i in 0..N {
                    let product = isa.mul(products[t][i], isa.floats(input.scales[t]));
                    scaled[t][i] = isa.mul_add(factor[i], product, scaled[t][i]);
                }
            }
        }
        for t in 0..T {
            self.store(scaled[t], &mut sums[t].scaled);
        }

        // By themselves, these sums stay in registers.
        let mut shifted = zero;
        for t in 0..T {
            shifted[t] = self.load_floats(&sums[t].shifted);
        }
        for (minimum, Step { sums: input_sums, .. }) in panel.minimums.iter().zip(input) {
            let minimum = self.load_floats(minimum);
            for t in 0..T {
                for i in 0..N {
                    let sum = isa.floats(input_sums[t]);
                    shifted[t][i] = isa.mul_add(minimum[i], sum, shifted[t][i]);
                }
            }
        }
        for t in 0..T {
            self.store(shifted[t], &mut sums[t].shifted);
        }
    }

    /// The products of tokens, from their sums over all columns.
    #[inline(always)]
    pub fn products_of(self, panel: &Panel, sums: &[Sums], out: &mut [Lanes]) {
        let (d, m) = (self.load_floats(&panel.d), self.load_floats(&panel.m));
        for (Sums { scaled, shifted }, out) in sums.iter().zip(out) {
            let (scaled, shifted) = (self.load_floats(scaled), self.load_floats(shifted));
            let mut products = [self.0.floats(0.0); N];
            for i in 0..N {
                let shifted = self.0.mul(m[i], shifted[i]);
                products[i] = self.0.sub(self.0.mul(d[i], scaled[i]), shifted);
            }
            self.store(products, out);
        }
    }

    /// The products of a step with some tokens: with their first codes, and with the second codes
    /// of those that have them.
    #[inline(always)]
    fn panel_products<const WIDTH: usize, const T: usize>(
        self,
        codes: &[UnitCodes],
        Step { codes: input, fine, .. }: &Step<T>,
        fine_codes: &[StepCodes],
    ) -> [Floats<I, N>; T] {
        let isa = self.0;
        let mut dots = [[isa.words(0); N]; T];
        for (codes, input) in codes.iter().zip(input) {
            for (codes, input) in codes.iter().zip(input) {
                let codes = self.load(codes);
                for t in 0..T {
                    let input = isa.words(input[t]);
                    for i in 0..N {
                        dots[t][i] = isa.add_products::<WIDTH>(dots[t][i], codes[i], input);
                    }
                }
            }
        }
        let mut products = [[isa.floats(0.0); N]; T];
        for t in 0..T {
            products[t] = self.converted_totals::<WIDTH>(dots[t]);
        }
        if fine.tokens != 0 {
            // A loop over copies: `products` stay in registers where no token has second codes.
            let (mut sums, mut tokens) = (products, fine.tokens);
            for input in &fine_codes[fine.first..][..tokens.count_ones() as usize] {
                let rest = self.fine_products::<WIDTH>(codes, input);
                let sums = &mut sums[tokens.trailing_zeros() as usize];
                for i in 0..N {
                    sums[i] = isa.mul_add(rest[i], isa.floats(FINE), sums[i]);
                }
                tokens &= tokens - 1;
            }
            products = sums;
        }
        products
    }

    /// The products of a step with the second codes of a token.
    #[inline(always)]
    fn fine_products<const WIDTH: usize>(
        self,
        codes: &[UnitCodes],
        input: &StepCodes,
    ) -> Floats<I, N> {
        let isa = self.0;
        let mut sums = [isa.words(0); N];
        for (codes, &input) in codes.as_flattened().iter().zip(input.as_flattened()) {
            let codes = self.load(codes);
            for i in 0..N {
                sums[i] = isa.add_products::<WIDTH>(sums[i], codes[i], isa.words(input));
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
        panel.resize(chunk);
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
        panel: &mut Panel,
    ) {
        // Each block has its own: they are in the factors.
        (panel.d, panel.m) = ([1.0; TILE_ROWS], [1.0; TILE_ROWS]);
        for step in &mut panel.steps {
            (step.units, step.bits) = (B::RUN / UNIT, B::BITS);
        }
        for row in 0..TILE_ROWS {
            let blocks = &blocks_of_row(tensor, tile * TILE_ROWS + row)[chunk.parts.clone()];
            let steps = panel.steps.chunks_exact_mut(VALUES / B::RUN);
            let minimums = panel.minimums.chunks_exact_mut(VALUES / B::RUN);
            let codes = panel.codes.chunks_exact_mut(VALUES / UNIT);
            for (((block, steps), minimums), codes) in
                blocks.iter().zip(steps).zip(minimums).zip(codes)
            {
                let codes = codes.as_flattened_mut();
                self.unpack_block::<B, BYTES, VALUES>(block, row, steps, minimums, codes);
            }
        }
    }

    /// Unpacks a block to a lane of each step and of each four columns.
    #[inline(always)]
    fn unpack_block<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        block: &[u8; BYTES],
        row: usize,
        steps: &mut [PanelStep],
        minimums: &mut [Lanes],
        codes: &mut [[u8; 64]],
    ) {
        // Codes with a sign become codes without one.
        let (signs, below) = if B::BITS == 8 { (0x80, 128.0) } else { (0, 0.0) };
        let scales = run_scales::<B, BYTES, VALUES>(block);
        for ((step, minimums), (scale, minimum)) in steps.iter_mut().zip(minimums).zip(scales) {
            step.factor[row] = scale;
            minimums[row] = scale * (B::OFFSET + below) + minimum;
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
    const UNITS: usize = 1024 / UNIT;
    let mut chunks: Vec<Chunk> = Vec::new();
    let (mut unit, mut step) = (0, 0);
    for (index, (cols, steps)) in parts.enumerate() {
        let (units, steps) = (unit..unit + cols / UNIT, step..step + steps);
        (unit, step) = (units.end, steps.end);
        match chunks.last_mut() {
            Some(chunk) if units.end - chunk.units.start <= UNITS => {
                (chunk.parts.end, chunk.units.end, chunk.steps.end) =
                    (index + 1, units.end, steps.end);
            }
            _ => chunks.push(Chunk { parts: index..index + 1, units, steps }),
        }
    }
    chunks
}
