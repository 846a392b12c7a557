//! Many tokens times a weight matrix, straight from the file's bytes: a tile's codes are unpacked
//! once into the first cache and multiplied with 8-bit inputs.

use faer::{MatMut, reborrow::ReborrowMut};
use rayon::prelude::*;
use slim_formats::{
    DenseTensor, Weight,
    slim::{PackedTensor, TILE_ROWS},
};

use super::{
    Input, Kernels, Method, TASK_BYTES, blocks,
    input::steps_of,
    panel::{Chunk, Panel, Sums, chunks_of_blocks, chunks_of_groups},
    tokens::{StepPart, TokenBlock},
};
use crate::{cpu::unpack::UNIT, linalg::row_major_mut, weight};

/// Tokens whose inputs stay in the second cache while all tiles pass by.
const TOKENS_IN_CACHE: usize = 128;

/// `out[m, rows]` from `x[m, cols]` times a matrix of codes; `None` if the matrix has no codes or
/// the method does not multiply bytes.
///
/// # Accuracy
/// That of [`super::matvec_by`], to the bit, and of [`super::dense_by`]. A token's products depend
/// on nothing but the matrix and the token, and are the same for every instruction set.
///
/// # Panics
/// If `x` or `out` does not have the length of so many tokens.
pub fn multiply_by(
    method: Method,
    matrix: Weight<'_>,
    x: &[f32],
    m: usize,
    out: &mut [f32],
) -> Option<()> {
    let Method::Integer(_, kernels) = method else { return None };
    let product = Product::of(kernels, matrix)?;
    let (rows, cols) = weight::shape(matrix);
    assert_eq!((x.len(), out.len()), (m * cols, m * rows), "inputs and outputs");
    let tokens = x.chunks(TOKENS_IN_CACHE * cols).zip(out.chunks_mut(TOKENS_IN_CACHE * rows));
    tokens.for_each(|(x, out)| product.store(x, cols, out, rows));
    Some(())
}

/// A matrix, ready for any tokens.
struct Product<'a> {
    kernels: Kernels,
    /// Bands of rows, one above the other.
    bands: Vec<Band<'a>>,
    chunks: Vec<Chunk>,
    steps: Vec<StepPart>,
}

#[derive(Clone, Copy)]
enum Band<'a> {
    Packed(PackedTensor<'a>),
    Blocks(DenseTensor<'a>),
}

impl Band<'_> {
    fn rows(&self) -> usize {
        match self {
            Self::Packed(layer) => layer.layout().rows(),
            Self::Blocks(tensor) => tensor.rows,
        }
    }

    fn tile_bytes(&self) -> usize {
        match self {
            Self::Packed(layer) => {
                layer.layout().tile_code_bytes() + layer.layout().tile_scale_bytes()
            }
            Self::Blocks(tensor) => TILE_ROWS * tensor.row_bytes(),
        }
    }
}

impl<'a> Product<'a> {
    fn of(kernels: Kernels, matrix: Weight<'a>) -> Option<Self> {
        match (matrix, matrix.bands()) {
            (Weight::Dense(tensor), _) => {
                let run = blocks::run(tensor.dtype)?;
                // Rows that are stored one after the other.
                tensor.layout.stored_row(0)?;
                let chunks = chunks_of_blocks(&tensor, run);
                let steps = (0..tensor.cols / UNIT).step_by(run / UNIT).map(|first| StepPart {
                    step: first / 2,
                    units: first % 2..first % 2 + run / UNIT,
                });
                let bands = vec![Band::Blocks(tensor)];
                Some(Self { kernels, bands, chunks, steps: steps.collect() })
            }
            (_, Some(bands)) => {
                // Bands have the same columns in a group and in a run.
                let layout = bands.get(0).layout();
                let chunks = chunks_of_groups(layout);
                let steps = steps_of(layout).enumerate();
                let steps = steps.map(|(step, cols)| StepPart { step, units: 0..cols.len() / UNIT });
                let all = bands.iter().map(|(_, band)| Band::Packed(band)).collect();
                Some(Self { kernels, bands: all, chunks, steps: steps.collect() })
            }
            (_, None) => None,
        }
    }

    /// A token, rounded as it is alone.
    fn round(&self, x: &[f32]) -> Input {
        match self.bands[0] {
            Band::Packed(layer) => Input::new(layer.layout(), x),
            Band::Blocks(_) => Input::in_whole_steps(x),
        }
    }

    /// `out[m, rows]` from `x[m, cols]`.
    fn store(&self, x: &[f32], cols: usize, out: &mut [f32], rows: usize) {
        let blocks =
            TokenBlock::of_all(self.kernels.tiles.tokens, &self.steps, x, cols, |x| self.round(x));
        let m = x.len() / cols;
        let mut rest = row_major_mut(out, m, rows, rows);
        let mut tasks = Vec::new();
        for band in &self.bands {
            // About as many bytes times tokens as a task of one token has.
            let tiles = (TASK_BYTES / (band.tile_bytes() * m)).max(1);
            for first in (0..band.rows()).step_by(tiles * TILE_ROWS) {
                let task_rows = (band.rows() - first).min(tiles * TILE_ROWS);
                let (out, others) = rest.split_at_col_mut(task_rows);
                rest = others;
                tasks.push((*band, first / TILE_ROWS, out));
            }
        }
        // Threads keep what they unpack and add up in.
        let scratch = || (Panel::default(), vec![Sums::default(); m]);
        tasks.into_par_iter().for_each_init(scratch, |(panel, sums), (band, tile, out)| {
            self.store_tiles(band, tile, &blocks, panel, sums, out);
        });
    }

    /// Stores the products of tiles from one on, as many as there is room for.
    fn store_tiles(
        &self,
        band: Band<'_>,
        first: usize,
        blocks: &[TokenBlock],
        panel: &mut Panel,
        sums: &mut [Sums],
        mut out: MatMut<'_, f32>,
    ) {
        for (i, first_row) in (0..out.ncols()).step_by(TILE_ROWS).enumerate() {
            sums.fill(Sums::default());
            for chunk in &self.chunks {
                match band {
                    Band::Packed(layer) => {
                        (self.kernels.tiles.unpack)(layer, first + i, chunk, panel)
                    }
                    Band::Blocks(tensor) => {
                        (self.kernels.blocks.unpack)(&tensor, first + i, chunk, panel)
                    }
                }
                let mut rest = &mut *sums;
                for block in blocks {
                    let (sums, others) = rest.split_at_mut(block.tokens);
                    (self.kernels.tiles.multiply)(panel, chunk, block, sums);
                    rest = others;
                }
            }
            let rows = TILE_ROWS.min(out.ncols() - first_row);
            let out = out.rb_mut().subcols_mut(first_row, rows);
            for (out, sums) in out.row_iter_mut().zip(&*sums) {
                let out = out.try_as_row_major_mut().expect("row-major").as_slice_mut();
                out.copy_from_slice(&panel.products(sums)[..rows]);
            }
        }
    }
}
