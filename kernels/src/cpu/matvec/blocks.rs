//! One token times 16 rows of a tensor in one of ggml's quantized types: their codes are brought into the order of a tile, four
//! columns of 16 rows a block, and multiplied as those of packed layers are.

use std::array;

use slim_formats::{DType, DenseTensor, slim::TILE_ROWS};

use super::{
    input::{FINE, Input, Step},
    kernel::{Floats, Isa, Kernel},
};
use crate::{
    cpu::unpack::{Lanes, UNIT},
    ggml::{Block, for_block},
};

/// Values of the longest block.
const LONGEST: usize = 256;

/// Columns that share a scale in a tensor of this type; `None` of types whose values are no codes.
pub(super) fn run(dtype: DType) -> Option<usize> {
    fn of<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>() -> Option<usize> {
        Some(B::RUN)
    }
    for_block!(dtype, of(), _ => None)
}

/// A block of each row, brought into the order of a tile.
struct Unpacked {
    /// For each four columns the codes of 16 rows.
    codes: [[u32; TILE_ROWS]; LONGEST / 4],
    factors: [Lanes; LONGEST / UNIT],
    /// What a run takes off the product: minimum, and factor times offset.
    minimums: [Lanes; LONGEST / UNIT],
}

impl<I: Isa, const N: usize> Kernel<I, N> {
    /// The products of 16 rows from `first` on with an input in steps of the type's runs; the last row stands for those below it.
    ///
    /// # Panics
    /// If the type has no [`run`], or values are not stored row by row.
    #[inline(always)]
    pub fn blocks(self, tensor: &DenseTensor<'_>, first: usize, input: &Input) -> Lanes {
        let row_bytes = tensor.bytes.len() / tensor.rows;
        let rows: [&[u8]; TILE_ROWS] = array::from_fn(|r| {
            let row = tensor.layout.stored_row((first + r).min(tensor.rows - 1));
            &tensor.bytes[row.expect("rows one after the other") * row_bytes..][..row_bytes]
        });
        for_block!(tensor.dtype, Self::blocks_of(self, &rows, input), other => {
            unreachable!("{other:?} has no codes")
        })
    }

    #[inline(always)]
    fn blocks_of<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        rows: &[&[u8]; TILE_ROWS],
        input: &Input,
    ) -> Lanes {
        let rows = rows.map(|row| row.as_chunks::<BYTES>().0);
        let blocks = rows[0].len();
        // With these lengths the loop needs no checks of its own.
        let rows = rows.map(|row| &row[..blocks]);
        let mut unpacked = Unpacked {
            codes: [[0; TILE_ROWS]; LONGEST / 4],
            factors: [[0.0; TILE_ROWS]; LONGEST / UNIT],
            minimums: [[0.0; TILE_ROWS]; LONGEST / UNIT],
        };
        let mut sums = [self.0.floats(0.0); N];
        for index in 0..blocks {
            for r in 0..TILE_ROWS {
                unpack::<B, BYTES, VALUES>(&rows[r][index], r, &mut unpacked);
            }
            for run in 0..VALUES / B::RUN {
                let first = index * VALUES + run * B::RUN;
                self.add_run::<B, BYTES, VALUES>(&mut sums, &unpacked, run, input, first / UNIT);
            }
        }
        let mut lanes = [0.0; TILE_ROWS];
        for (i, lanes) in lanes.chunks_exact_mut(TILE_ROWS / N).enumerate() {
            self.0.store(sums[i], lanes);
        }
        lanes
    }

    /// Adds the products of a run, which is a step of the input and starts with its unit `unit`.
    #[inline(always)]
    fn add_run<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        sums: &mut Floats<I, N>,
        unpacked: &Unpacked,
        run: usize,
        input: &Input,
        unit: usize,
    ) {
        let isa = self.0;
        let codes = &unpacked.codes[run * B::RUN / 4..][..B::RUN / 4];
        let input = input.of(unit..unit + B::RUN / UNIT);
        let Step { scale, sum, has_fine_codes } = input.steps[0];
        let mut dots = self.block_products::<B, BYTES, VALUES>(codes, input.codes);
        if has_fine_codes {
            let rest = self.block_products::<B, BYTES, VALUES>(codes, input.fine_codes);
            for i in 0..N {
                dots[i] = isa.mul_add(rest[i], isa.floats(FINE), dots[i]);
            }
        }
        let factor = self.load_floats(&unpacked.factors[run]);
        let minimum = self.load_floats(&unpacked.minimums[run]);
        for i in 0..N {
            let dots = isa.mul(dots[i], isa.floats(scale));
            let shifted = isa.mul(minimum[i], isa.floats(sum));
            sums[i] = isa.mul_add(factor[i], dots, isa.sub(sums[i], shifted));
        }
    }

    #[inline(always)]
    fn block_products<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
        self,
        codes: &[[u32; TILE_ROWS]],
        input: &[[i32; 4]],
    ) -> Floats<I, N> {
        let mut sums = [self.0.words(0); N];
        for (codes, &input) in codes.iter().zip(input.as_flattened()) {
            let codes = self.load(bytemuck::cast_ref(codes));
            for i in 0..N {
                sums[i] = match B::BITS {
                    ..=4 => self.0.add_products::<4>(sums[i], codes[i], self.0.words(input)),
                    5..=7 => self.0.add_products::<7>(sums[i], codes[i], self.0.words(input)),
                    _ => self.0.add_products::<8>(sums[i], codes[i], self.0.words(input)),
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

/// Brings the block of row `r` into the order of a tile.
#[inline(always)]
fn unpack<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
    block: &[u8; BYTES],
    r: usize,
    unpacked: &mut Unpacked,
) {
    let codes = B::codes(block);
    let (words, _) = codes.as_chunks::<4>();
    for (word, codes) in words.iter().zip(&mut unpacked.codes) {
        codes[r] = u32::from_le_bytes(*word);
    }
    for run in 0..VALUES / B::RUN {
        let (scale, minimum) = B::scale(block, run);
        unpacked.factors[run][r] = scale;
        unpacked.minimums[run][r] = scale * B::OFFSET + minimum;
    }
}
