//! Tokens times weight matrices, straight from the file's bytes: a few are multiplied with a tile's
//! codes as these are unpacked, of many the 8-bit inputs with codes that are unpacked once into the
//! first cache.

use faer::{MatMut, reborrow::ReborrowMut};
use rayon::prelude::*;
use slim_formats::{
    DenseTensor, Weight,
    slim::{Bands, PackedTensor, ScaleCoding, TILE_ROWS},
};

use super::{
    Kernels, Method, Rounding, TASK_BYTES, blocks,
    panel::{Chunk, Panel, Sums, chunks_of_blocks, chunks_of_groups},
    tokens::TokenBlock,
};
use crate::{cpu::unpack::Lanes, linalg::row_major_mut, weight};

/// Products of a tile or a strip with the tokens that take no panel, at the most.
const MOST_PRODUCTS: usize = 8;

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
    let product = match (matrix, matrix.bands()) {
        (Weight::Dense(tensor), _) => Product::of_blocks(kernels, tensor)?,
        (_, Some(bands)) => Product::of_bands(kernels, [bands]),
        (_, None) => return None,
    };
    let (rows, cols) = weight::shape(matrix);
    assert_eq!((x.len(), out.len()), (m * cols, m * rows), "inputs and outputs");
    product.multiply(x, cols, &mut [out]);
    Some(())
}

/// The same for matrices with the same input, which is rounded once; `None` if they are not all
/// packed, or round it in other ways.
///
/// # Panics
/// If `x` or an output does not have the length of so many tokens.
pub fn multiply_each_by(
    method: Method,
    matrices: &[Weight<'_>],
    x: &[f32],
    m: usize,
    outs: &mut [&mut [f32]],
) -> Option<()> {
    let Method::Integer(_, kernels) = method else { return None };
    let bands: Vec<Bands<'_>> =
        matrices.iter().map(|matrix| matrix.bands()).collect::<Option<_>>()?;
    let columns = |bands: &Bands<'_>| {
        let layout = bands.get(0).layout();
        (layout.cols(), layout.group_size(), layout.coding())
    };
    let (cols, ..) = columns(bands.first()?);
    if bands.iter().any(|other| columns(other) != columns(&bands[0])) {
        return None;
    }
    let lengths = outs.iter().map(|out| out.len());
    assert!(x.len() == m * cols, "inputs");
    assert!(lengths.eq(bands.iter().map(|bands| m * bands.shape().0)), "outputs");
    Product::of_bands(kernels, bands).multiply(x, cols, outs);
    Some(())
}

/// `out[rows]` from a packed layer times `x[cols]`.
pub(super) fn multiply_one(kernels: Kernels, bands: Bands<'_>, x: &[f32], out: &mut [f32]) {
    Product::of_bands(kernels, [bands]).multiply(x, x.len(), &mut [out]);
}

/// Matrices that round their input alike, ready for any tokens.
struct Product<'a> {
    kernels: Kernels,
    matrices: Vec<Matrix<'a>>,
}

/// Bands of rows, one above the other.
struct Matrix<'a> {
    rows: usize,
    bands: Vec<Band<'a>>,
}

#[derive(Clone, Copy)]
enum Band<'a> {
    Packed(PackedTensor<'a>),
    /// With scales for each so many columns.
    Blocks(DenseTensor<'a>, usize),
}

impl Band<'_> {
    fn rows(&self) -> usize {
        match self {
            Self::Packed(layer) => layer.layout().rows(),
            Self::Blocks(tensor, _) => tensor.rows,
        }
    }

    /// Tiles that are multiplied together.
    fn strip_tiles(&self) -> usize {
        match self {
            Self::Packed(layer) => layer.layout().coding().strip_tiles(),
            Self::Blocks(..) => 1,
        }
    }

    fn tile_bytes(&self) -> usize {
        match self {
            Self::Packed(layer) => {
                layer.layout().tile_code_bytes() + layer.layout().tile_scale_bytes()
            }
            Self::Blocks(tensor, _) => TILE_ROWS * tensor.row_bytes(),
        }
    }
}

impl<'a> Product<'a> {
    /// `None` if the tensor has no codes, or its rows are not stored one after the other.
    fn of_blocks(kernels: Kernels, tensor: DenseTensor<'a>) -> Option<Self> {
        let run = blocks::run(tensor.dtype)?;
        tensor.layout.stored_row(0)?;
        let matrix = Matrix { rows: tensor.rows, bands: vec![Band::Blocks(tensor, run)] };
        Some(Self { kernels, matrices: vec![matrix] })
    }

    /// Of matrices with the same columns in a group and in a run, as bands of a matrix have.
    fn of_bands(kernels: Kernels, matrices: impl IntoIterator<Item = Bands<'a>>) -> Self {
        let matrices = matrices.into_iter().map(|bands| Matrix {
            rows: bands.shape().0,
            bands: bands.iter().map(|(_, band)| Band::Packed(band)).collect(),
        });
        Self { kernels, matrices: matrices.collect() }
    }

    /// One of its bands, which all take the same input.
    fn band(&self) -> Band<'a> {
        self.matrices[0].bands[0]
    }

    /// Of each matrix `out[m, rows]` from `x[m, cols]`, for any `m`.
    fn multiply(&self, x: &[f32], cols: usize, outs: &mut [&mut [f32]]) {
        let rounding = self.rounding();
        for (index, x) in x.chunks(TOKENS_IN_CACHE * cols).enumerate() {
            let (first, m) = (index * TOKENS_IN_CACHE, x.len() / cols);
            let outs = self.matrices.iter().zip(&mut *outs).map(|(&Matrix { rows, .. }, out)| {
                row_major_mut(&mut out[first * rows..][..m * rows], m, rows, rows)
            });
            self.store(x, cols, &rounding, outs.collect());
        }
    }

    /// How tokens are rounded, each as it is alone.
    fn rounding(&self) -> Rounding {
        match self.band() {
            Band::Packed(layer) => Rounding::of_layer(layer.layout()),
            Band::Blocks(tensor, run) => Rounding::of_blocks(tensor.cols, run),
        }
    }

    /// The columns that are unpacked at a time.
    fn chunks(&self) -> Vec<Chunk> {
        match self.band() {
            Band::Packed(layer) => chunks_of_groups(layer.layout()),
            Band::Blocks(tensor, run) => chunks_of_blocks(&tensor, run),
        }
    }

    /// How many tokens are multiplied without a panel.
    fn direct_tokens(&self) -> usize {
        match self.band() {
            Band::Packed(layer) => match layer.layout().coding() {
                ScaleCoding::Trellis { .. } => 1,
                ScaleCoding::Paper | ScaleCoding::TwoLevel { .. } => self.kernels.tiles.tile_tokens,
            },
            Band::Blocks(..) => 0,
        }
    }

    /// The same for tokens that stay in the cache.
    fn store(&self, x: &[f32], cols: usize, rounding: &Rounding, outs: Vec<MatMut<'_, f32>>) {
        let (m, tiles) = (x.len() / cols, self.kernels.tiles);
        let direct = m <= self.direct_tokens();
        let largest = if direct { tiles.tile_tokens } else { tiles.tokens };
        let blocks = TokenBlock::of_all(largest, x, cols, rounding);
        let mut tasks = Vec::new();
        for (matrix, mut rest) in self.matrices.iter().zip(outs) {
            for band in &matrix.bands {
                // About as many bytes times tokens as a task of one token has.
                let tiles = band.rows().div_ceil(TILE_ROWS);
                let tasks_of_band = (tiles * band.tile_bytes() * m).div_ceil(TASK_BYTES).min(tiles);
                let step = tiles.div_ceil(tasks_of_band).next_multiple_of(band.strip_tiles());
                for first in (0..tiles).step_by(step) {
                    let task_rows = (step * TILE_ROWS).min(band.rows() - first * TILE_ROWS);
                    let (out, others) = rest.split_at_col_mut(task_rows);
                    rest = others;
                    tasks.push((*band, first, out));
                }
            }
        }
        if direct {
            let store = |(band, first, out): &mut (Band<'_>, usize, MatMut<'_, f32>)| {
                self.store_directly(*band, *first, &blocks, out.rb_mut());
            };
            return match &mut tasks[..] {
                [task] => store(task),
                tasks => tasks.par_iter_mut().for_each(store),
            };
        }
        let chunks = self.chunks();
        // Threads keep what they unpack and add up in.
        tasks.into_par_iter().for_each_init(
            || Scratch::new(m),
            |scratch, (band, first, out)| {
                self.store_tiles(band, first, &chunks, &blocks, scratch, out);
            },
        );
    }

    /// Stores the products of a packed layer's tiles from one on, as many as there is room for,
    /// with codes that are unpacked for each block of tokens.
    fn store_directly(
        &self,
        band: Band<'_>,
        first: usize,
        blocks: &[TokenBlock],
        mut out: MatMut<'_, f32>,
    ) {
        let Band::Packed(layer) = band else { unreachable!("a layer") };
        let strip_tiles = band.strip_tiles();
        for first_row in (0..out.ncols()).step_by(strip_tiles * TILE_ROWS) {
            let mut first_token = 0;
            for block in blocks {
                let mut products = [[0.0; TILE_ROWS]; MOST_PRODUCTS];
                let products = &mut products[..strip_tiles * block.tokens()];
                let tile = first + first_row / TILE_ROWS;
                match block {
                    TokenBlock::One(token) if strip_tiles > 1 => {
                        (self.kernels.tiles.strip)(layer, tile, token, products);
                    }
                    block => (self.kernels.tiles.tile)(layer, tile, block, products),
                }
                let rows = (first_row..out.ncols()).step_by(TILE_ROWS);
                for (first_row, products) in rows.zip(products.chunks_exact(block.tokens())) {
                    let rows = TILE_ROWS.min(out.ncols() - first_row);
                    let out =
                        out.rb_mut().submatrix_mut(first_token, first_row, block.tokens(), rows);
                    store_rows(out, products);
                }
                first_token += block.tokens();
            }
        }
    }

    /// The same for any matrix, with codes that are unpacked once.
    fn store_tiles(
        &self,
        band: Band<'_>,
        first: usize,
        chunks: &[Chunk],
        blocks: &[TokenBlock],
        Scratch { panel, sums, products }: &mut Scratch,
        mut out: MatMut<'_, f32>,
    ) {
        for (i, first_row) in (0..out.ncols()).step_by(TILE_ROWS).enumerate() {
            sums.fill(Sums::default());
            for chunk in chunks {
                match band {
                    Band::Packed(layer) => {
                        (self.kernels.tiles.unpack)(layer, first + i, chunk, panel)
                    }
                    Band::Blocks(tensor, _) => {
                        (self.kernels.blocks.unpack)(&tensor, first + i, chunk, panel)
                    }
                }
                let mut rest = &mut sums[..];
                for block in blocks {
                    let (sums, others) = rest.split_at_mut(block.tokens());
                    (self.kernels.tiles.multiply)(panel, chunk, block, sums);
                    rest = others;
                }
            }
            let rows = TILE_ROWS.min(out.ncols() - first_row);
            (self.kernels.tiles.products)(panel, sums, products);
            store_rows(out.rb_mut().subcols_mut(first_row, rows), products);
        }
    }
}

/// What a thread works in.
struct Scratch {
    panel: Panel,
    /// Of each token.
    sums: Vec<Sums>,
    products: Vec<Lanes>,
}

impl Scratch {
    fn new(tokens: usize) -> Self {
        let (sums, products) = (vec![Sums::default(); tokens], vec![Lanes::default(); tokens]);
        Self { panel: Panel::default(), sums, products }
    }
}

/// Stores the products of some rows of a tile, those of a token in each row of `out`.
fn store_rows(out: MatMut<'_, f32>, products: &[Lanes]) {
    for (out, products) in out.row_iter_mut().zip(products) {
        let out = out.try_as_row_major_mut().expect("row-major").as_slice_mut();
        match <&mut Lanes>::try_from(&mut *out) {
            // Of a known length, which takes no call.
            Ok(out) => *out = *products,
            Err(_) => out.copy_from_slice(&products[..out.len()]),
        }
    }
}
