//! One token times rows of a tensor in one of ggml's quantized types, 32 columns of a row at a
//! time. Sums stay in the lanes of registers until a row has ended.

use slim_formats::{DType, DenseTensor};

use super::{
    input::{FINE, Input, STEP, StepCodes},
    kernel::{Isa, Kernel},
    tokens::Step,
};
use crate::ggml::{Block, Bytes, Words, for_block};

/// Columns that share a scale in a tensor of this type; `None` of types whose values are no codes.
pub(super) fn run(dtype: DType) -> Option<usize> {
    fn of<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>() -> Option<usize> {
        Some(B::RUN)
    }
    for_block!(dtype, of(), _ => None)
}

/// Words of four codes in a step of the input, whose columns are multiplied at a time.
pub(super) const WORDS: usize = STEP / 4;
/// Rows that are walked side by side: they share what is loaded of the input, and none waits for
/// its own sums.
pub(super) const ROWS: usize = 4;

/// What blocks ask of an instruction set beyond the rest.
pub(super) trait BlockIsa: Isa {
    /// Adds products as [`Isa::add_products`] does, of codes that are signed bytes.
    fn add_signed_products(
        self,
        sums: Self::Words,
        codes: Self::Words,
        input: Self::Words,
    ) -> Self::Words;
    /// The same f16 everywhere.
    fn half(self, bytes: [u8; 2]) -> Self::Floats;
}

/// Does the same for each step of a block, written out, so that a step's shifts are constants.
macro_rules! for_each_step {
    ($values:expr, |$step:ident| $body:block) => {
        for_each_step!($values, |$step| $body, 0 1 2 3 4 5 6 7)
    };
    ($values:expr, |$step:ident| $body:block, $($index:literal)*) => {$(
        if $index < $values / $crate::cpu::matvec::input::STEP {
            let $step = $index;
            $body
        }
    )*};
}
pub(super) use for_each_step;

/// The blocks of a row; the last one stands for those below it.
///
/// # Panics
/// If values are not stored row by row.
#[inline(always)]
pub(super) fn blocks_of_row<'a, const BYTES: usize>(
    tensor: &DenseTensor<'a>,
    row: usize,
) -> &'a [[u8; BYTES]] {
    let stored = tensor.layout.stored_row(row.min(tensor.rows - 1));
    let stored = stored.expect("rows one after the other");
    let count = tensor.row_bytes() / BYTES;
    &tensor.bytes.as_chunks().0[stored * count..][..count]
}

/// A block, of which `N` registers hold [`WORDS`] words.
#[derive(Clone, Copy)]
pub(super) struct RowBlock<'a, I, const N: usize, const BYTES: usize>(
    pub Kernel<I, N>,
    pub &'a [u8; BYTES],
);

/// Words of a row in registers.
#[derive(Clone, Copy)]
pub(super) struct RowWords<I: Isa, const N: usize>(Kernel<I, N>, pub [I::Words; N]);

impl<I: BlockIsa, const N: usize, const BYTES: usize> Bytes for RowBlock<'_, I, N, BYTES> {
    type Words = RowWords<I, N>;

    #[inline(always)]
    fn words(self, at: usize, len: usize, first: usize) -> RowWords<I, N> {
        let Self(kernel @ Kernel(isa), block) = self;
        let bytes = &block[at..];
        let mut words = [isa.words(0); N];
        for (i, words) in words.iter_mut().enumerate() {
            *words = match len {
                4 => isa.words(i32::from_le_bytes(*bytes.first_chunk().expect("4 bytes"))),
                16 => isa.repeated(bytes.first_chunk().expect("16 bytes")),
                _ => isa.load(&bytes[4 * first % len + i * STEP / N..]),
            };
        }
        RowWords(kernel, words)
    }
}

impl<I: Isa, const N: usize> Words for RowWords<I, N> {
    #[inline(always)]
    fn and(mut self, mask: u32) -> Self {
        let isa = self.0.0;
        for words in &mut self.1 {
            *words = isa.and(*words, isa.words(mask.cast_signed()));
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
    fn right(mut self, bits: impl Fn(usize) -> usize) -> Self {
        let mut counts = [0u32; WORDS];
        for (i, count) in counts.iter_mut().enumerate() {
            *count = bits(i) as u32;
        }
        let counts: &[u8; STEP] = bytemuck::cast_ref(&counts);
        for (words, counts) in self.1.iter_mut().zip(counts.chunks_exact(STEP / N)) {
            *words = self.0.0.shifted_right(*words, self.0.0.load(counts));
        }
        self
    }
}

/// The input of a block of columns.
#[derive(Clone, Copy)]
struct BlockInput<'a> {
    steps: &'a [Step<1>],
    fine_codes: &'a [StepCodes],
    word_sums: &'a [[[f32; 4]; 2]],
}

/// Sums of a row so far: scale times code times input, and minimum times input.
#[derive(Clone, Copy)]
struct Sums<I: Isa, const N: usize> {
    scaled: [I::Floats; N],
    shifted: [I::Floats; N],
}

impl<I: BlockIsa, const N: usize> Kernel<I, N> {
    /// The products of rows from `first` on with an input.
    ///
    /// # Panics
    /// If the type has no codes, or values are not stored row by row.
    #[inline(always)]
    pub fn blocks(self, tensor: &DenseTensor<'_>, first: usize, input: &Input, out: &mut [f32]) {
        for_block!(tensor.dtype, Self::rows(self, tensor, first, input, out), other => {
            unreachable!("{other:?} has no codes")
        });
    }

    #[inline(always)]
    fn rows<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        tensor: &DenseTensor<'_>,
        mut first: usize,
        input: &Input,
        out: &mut [f32],
    ) {
        for out in out.chunks_mut(ROWS) {
            let products = self.some_rows::<B, BYTES, VALUES>(tensor, first, input);
            out.copy_from_slice(&products[..out.len()]);
            first += ROWS;
        }
    }

    /// The products of a few rows; the last one stands for those below it.
    #[inline(always)]
    fn some_rows<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        tensor: &DenseTensor<'_>,
        first: usize,
        input: &Input,
    ) -> [f32; ROWS] {
        let isa = self.0;
        let count = tensor.cols / VALUES;
        let mut rows = [&[][..]; ROWS];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = &blocks_of_row(tensor, first + r)[..count];
        }
        let zero = [isa.floats(0.0); N];
        let mut sums = [Sums { scaled: zero, shifted: zero }; ROWS];
        let ahead = ROWS * count * BYTES;
        for index in 0..count {
            let steps = index * (VALUES / STEP)..(index + 1) * (VALUES / STEP);
            let input = BlockInput {
                steps: &input.tokens.steps[steps.clone()],
                fine_codes: &input.tokens.fine_codes,
                word_sums: &input.word_sums[steps],
            };
            // With these lengths steps need no checks of their own.
            assert!([input.steps.len(), input.word_sums.len()] == [VALUES / STEP; 2]);
            for (sums, row) in sums.iter_mut().zip(&rows) {
                let block = &row[index];
                for at in (0..BYTES).step_by(64) {
                    isa.prefetch(block.as_ptr().wrapping_add(ahead + at));
                }
                self.add_block::<B, BYTES, VALUES>(sums, block, input);
            }
        }
        let mut products = [0.0; ROWS];
        for (product, sums) in products.iter_mut().zip(&sums) {
            *product = self.total(sums, B::M.map_or(0.0, |(_, sign)| sign));
        }
        products
    }

    /// Adds the products of a block with its input.
    #[inline(always)]
    fn add_block<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        sums: &mut Sums<I, N>,
        block: &[u8; BYTES],
        input: BlockInput<'_>,
    ) {
        let isa = self.0;
        let zero = [isa.floats(0.0); N];
        let mut of_block = Sums { scaled: zero, shifted: zero };
        for_each_step!(VALUES, |step| {
            self.add_step::<B, BYTES, VALUES>(&mut of_block, block, step, input);
        });
        let d = isa.half([block[B::D], block[B::D + 1]]);
        for i in 0..N {
            sums.scaled[i] = isa.mul_add(d, of_block.scaled[i], sums.scaled[i]);
        }
        if let Some((at, _)) = B::M {
            let m = isa.half([block[at], block[at + 1]]);
            for i in 0..N {
                sums.shifted[i] = isa.mul_add(m, of_block.shifted[i], sums.shifted[i]);
            }
        }
    }

    /// Adds a step of a block.
    #[inline(always)]
    fn add_step<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        sums: &mut Sums<I, N>,
        block: &[u8; BYTES],
        step: usize,
        input: BlockInput<'_>,
    ) {
        let isa = self.0;
        let Step { codes: input_codes, scales: [scale], fine, .. } = &input.steps[step];
        let codes = B::codes(RowBlock(self, block), step * WORDS).1;
        let mut dots =
            self.step_of_block::<B, BYTES, VALUES>(codes, bytemuck::cast_ref(input_codes));
        if fine.tokens != 0 {
            let fine_codes = &input.fine_codes[fine.first];
            let rest = self.step_of_block::<B, BYTES, VALUES>(codes, fine_codes);
            for i in 0..N {
                dots[i] = isa.mul_add(rest[i], isa.floats(FINE), dots[i]);
            }
        }
        let first_run = step * STEP / B::RUN;
        let s = B::scales(block, first_run / 4);
        let z = B::minimums(block, first_run / 4);
        let s = s.map(|s| self.of_runs::<B, BYTES, VALUES>(s, first_run));
        let z = z.map(|z| self.of_runs::<B, BYTES, VALUES>(z, first_run));
        let input_sums = input.word_sums[step].as_flattened();
        for i in 0..N {
            let input_sums = isa.load_floats(&input_sums[i * WORDS / N..]);
            let mut dots = isa.mul(dots[i], isa.floats(*scale));
            if B::OFFSET > 0.0 {
                dots = isa.mul_add(input_sums, isa.floats(-B::OFFSET), dots);
            }
            sums.scaled[i] = match s {
                Some(s) => {
                    let s = isa.sub(s[i], isa.floats(B::SCALE_OFFSET));
                    isa.mul_add(s, dots, sums.scaled[i])
                }
                // Of a block of one step.
                None => dots,
            };
            sums.shifted[i] = match z {
                Some(z) => isa.mul_add(z[i], input_sums, sums.shifted[i]),
                None => input_sums,
            };
        }
    }

    /// The sums of a step, of four columns each.
    #[inline(always)]
    fn step_of_block<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        codes: [I::Words; N],
        input: &StepCodes,
    ) -> [I::Floats; N] {
        let isa = self.0;
        let input: &[u8] = bytemuck::cast_slice(input);
        let mut dots = [isa.floats(0.0); N];
        for i in 0..N {
            let (none, input) = (isa.words(0), isa.load(&input[i * STEP / N..]));
            dots[i] = isa.converted(match B::BITS {
                ..=4 => isa.totals::<4>(isa.add_products::<4>(none, codes[i], input)),
                5..=7 => isa.totals::<7>(isa.add_products::<7>(none, codes[i], input)),
                _ => isa.add_signed_products(none, codes[i], input),
            });
        }
        dots
    }

    /// Those of four codes that belong to the runs of a step, in the lanes of these runs.
    #[inline(always)]
    fn of_runs<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        codes: u32,
        first_run: usize,
    ) -> [I::Floats; N] {
        let codes = RowWords(self, [self.0.words(codes.cast_signed()); N]);
        let run = |i: usize| (first_run + 4 * i / B::RUN) % 4;
        self.converted(codes.right(|i| 8 * run(i)).and(0xff).1)
    }

    /// The product of a row. Lanes are added in the same order for all instruction sets.
    #[inline(always)]
    fn total(self, sums: &Sums<I, N>, sign: f32) -> f32 {
        let isa = self.0;
        let mut lanes = [0.0; WORDS];
        for (i, lanes) in lanes.chunks_exact_mut(WORDS / N).enumerate() {
            let sign = isa.floats(-sign);
            isa.store(isa.mul_add(sums.shifted[i], sign, sums.scaled[i]), lanes);
        }
        for half in [4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        lanes[0]
    }
}
