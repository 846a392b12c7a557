//! The GPTQ sweep: quantize column by column, and push each column's error to the columns not yet
//! done; then refine codes and row scales.
//!
//! Errors go to the columns of the same block one by one, sixteen rows at a time, and to those
//! behind it by one matrix product for each block of columns.

mod refine;
mod row_scales;

#[cfg(test)]
pub(crate) use refine::REFINEMENTS;

use std::{borrow::Cow, ops::Range};

use rayon::prelude::*;
use slim_formats::slim::{BitWidth, CodeColumn, LayerLayout, TILE_ROWS, TileMut};
use slim_kernels::{
    linalg::{self, Mat, Precision, Store},
    per_isa,
};

use crate::{
    coder::{Coder, RowScales, RunScales},
    lanes::{Lanes, gather, nearest_codes, scatter},
    trellis::{self, Values, Viterbi},
};

/// Columns of a block, but for the rest of its last run: work within a block grows with it,
/// products between blocks lose by less.
const BLOCK_COLS: usize = 128;

/// What the sweep weighs errors by.
pub struct Curvature<'a> {
    /// Upper triangular `[cols, cols]` with `H^-1 = U^T U`, for columns in `order`; `None`
    /// quantizes each weight by itself.
    pub factor: Option<&'a [f32]>,
    /// What an error in a column costs, `[cols]`: `1 / U_jj^2`, or ones.
    pub importance: Cow<'a, [f32]>,
    /// The columns in the order in which they are quantized, which is that of `factor`: whole runs
    /// one after the other.
    pub order: Cow<'a, [usize]>,
    /// The damped Hessian itself, `[cols, cols]` in `order`, to refine the codes by; `None` leaves
    /// them as they are.
    pub hessian: Option<&'a [f32]>,
}

/// A tile of 16 rows, quantized.
pub struct SweptTile {
    /// One entry per column; the windows of a trellis, of which the file has the low bits.
    pub codes: Vec<CodeColumn>,
    /// The scales of each run of columns, with its group and its number in the group, in the order
    /// of the sweep.
    pub runs: Vec<(usize, usize, RunScales)>,
    /// Row scales.
    pub rows: RowScales,
    /// The weights that the codes stand for, one entry per column.
    pub dequantized: Vec<Lanes>,
    /// Lanes that are rows of the layer; the others are padding.
    used: usize,
}

/// Quantizes some rows of a layer, `weights: [rows, cols]`.
pub fn sweep(
    weights: &[f32],
    curvature: &Curvature<'_>,
    layout: &LayerLayout,
    coder: Coder,
) -> Vec<SweptTile> {
    let cols = layout.cols();
    let Curvature { factor, importance, order, hessian } = curvature;
    let coding = layout.coding();
    let tiles = weights.len().div_ceil(cols * coding.strip_rows()) * coding.strip_tiles();
    let new_tile = |tile: usize| {
        let rows = weights.get(tile * TILE_ROWS * cols..).unwrap_or_default();
        let rows = &rows[..rows.len().min(TILE_ROWS * cols)];
        SweptTile::new(rows, importance, layout, coder)
    };
    let tiles = (0..tiles).into_par_iter().map(new_tile).collect();
    let mut sweep = Sweep {
        runs: runs(layout, order),
        order,
        importance: order.iter().map(|&col| importance[col]).collect(),
        coder,
        tiles,
    };
    sweep.quantize(reordered(weights, order), *factor);
    if let Some(hessian) = hessian {
        let errors = reordered(&difference(weights, cols, &sweep.tiles), order);
        sweep.refine(errors, hessian);
    }
    sweep.tiles
}

/// Some rows of a layer on their way to codes. Matrices have their columns in the order of the
/// sweep, in which a column is known by its place.
struct Sweep<'a> {
    runs: Vec<Run>,
    order: &'a [usize],
    /// Of each place.
    importance: Vec<f32>,
    coder: Coder,
    tiles: Vec<SweptTile>,
}

impl Sweep<'_> {
    /// The GPTQ sweep over `w: [rows, cols]`.
    fn quantize(&mut self, mut w: Vec<f32>, factor: Option<&[f32]>) {
        let Self { runs, order, importance, coder, tiles } = self;
        let cols = order.len();
        for block in blocks(runs) {
            let places = places(block);
            let mut errors = vec![0.0; w.len() / cols * places.len()];
            let strip_rows = coder.coding().strip_rows();
            let of_strips = w
                .par_chunks(strip_rows * cols)
                .zip(errors.par_chunks_mut(strip_rows * places.len()));
            strips(tiles, *coder).zip(of_strips).for_each(|(tiles, (w, errors))| {
                let of_tile = |tile| gather(w, cols, tile, places.clone());
                let mut w: Vec<_> = (0..tiles.len()).map(of_tile).collect();
                let mut strip = Strip { tiles, viterbi: Viterbi::default() };
                for run in block {
                    let first = run.places.start - places.start;
                    let mut w: Vec<_> = w.iter_mut().map(|w| &mut w[first..]).collect();
                    strip.choose_scales(&w, &importance[run.places.clone()], run, *coder);
                    strip.sweep_run(&mut w, run, order, factor);
                }
                let errors = errors.chunks_mut(TILE_ROWS * places.len());
                w.iter().zip(errors).for_each(|(w, errors)| scatter(w, errors));
            });
            if let Some(u) = factor {
                let store = Store { alpha: -1.0, add: true };
                let behind = places.end..cols;
                add_product(&mut w, store, &errors, u, places, behind);
            }
        }
    }
}

/// The tiles whose columns are rounded together.
struct Strip<'a> {
    tiles: &'a mut [SweptTile],
    viterbi: Viterbi,
}

/// The tiles of each strip.
fn strips(tiles: &mut [SweptTile], coder: Coder) -> rayon::slice::ChunksMut<'_, SweptTile> {
    tiles.par_chunks_mut(coder.coding().strip_tiles())
}

/// The rows of each tile of a matrix with `cols` columns.
fn rows_of_tiles(matrix: &[f32], cols: usize) -> rayon::slice::Chunks<'_, f32> {
    matrix.par_chunks(TILE_ROWS * cols)
}

fn rows_of_tiles_mut(matrix: &mut [f32], cols: usize) -> rayon::slice::ChunksMut<'_, f32> {
    matrix.par_chunks_mut(TILE_ROWS * cols)
}

/// `out[:, into]` from `left: [rows, from.len()]` times `right[from, into]`, for
/// `out: [rows, cols]`, `right: [cols, cols]`.
fn add_product(
    out: &mut [f32],
    store: Store,
    left: &[f32],
    right: &[f32],
    from: Range<usize>,
    into: Range<usize>,
) {
    let rows = left.len() / from.len();
    let cols = out.len() / rows;
    if into.is_empty() {
        return;
    }
    let right = &right[from.start * cols + into.start..];
    let right = Mat::strided(right, from.len(), into.len(), cols);
    let left = Mat::new(left, rows, from.len());
    linalg::matmul(Precision::Fine, &mut out[into.start..], cols, store, left, right);
}

/// Columns that share scales.
struct Run {
    /// How many runs come before it.
    index: usize,
    group: usize,
    /// Its number in the group.
    number: usize,
    width: BitWidth,
    /// Of its columns.
    places: Range<usize>,
}

/// The runs of a layer in the order of the sweep.
fn runs(layout: &LayerLayout, order: &[usize]) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut first = 0;
    while first < order.len() {
        let col = order[first];
        let index = col / layout.group_size();
        let group = &layout.groups()[index];
        let of_group = group.runs(layout.coding());
        let (number, cols) =
            of_group.enumerate().find(|(_, cols)| cols.contains(&col)).expect("a run");
        let places = first..first + cols.len();
        first = places.end;
        runs.push(Run { index: runs.len(), group: index, number, width: group.bit_width, places });
    }
    runs
}

/// The runs of each block of columns.
fn blocks(runs: &[Run]) -> impl Iterator<Item = &[Run]> {
    let mut end = BLOCK_COLS;
    runs.chunk_by(move |_, next| {
        let is_in_block = next.places.start < end;
        if !is_in_block {
            end = next.places.start + BLOCK_COLS;
        }
        is_in_block
    })
}

/// The places of a block's columns.
fn places(block: &[Run]) -> Range<usize> {
    block[0].places.start..block[block.len() - 1].places.end
}

/// `matrix: [rows, cols]` with column `order[i]` at place `i`.
pub fn reordered(matrix: &[f32], order: &[usize]) -> Vec<f32> {
    let cols = order.len();
    let mut out = vec![0.0; matrix.len()];
    rows_of_tiles_mut(&mut out, cols).zip(rows_of_tiles(matrix, cols)).for_each(|(out, matrix)| {
        for (out, row) in out.chunks_exact_mut(cols).zip(matrix.chunks_exact(cols)) {
            out.iter_mut().zip(order).for_each(|(out, &col)| *out = row[col]);
        }
    });
    out
}

/// `W - What`, row-major.
pub fn difference(weights: &[f32], cols: usize, tiles: &[SweptTile]) -> Vec<f32> {
    let mut difference = weights.to_vec();
    rows_of_tiles_mut(&mut difference, cols).zip(tiles).for_each(|(rows, tile)| {
        for (lane, row) in rows.chunks_exact_mut(cols).enumerate() {
            for (weight, column) in row.iter_mut().zip(&tile.dequantized) {
                *weight -= column[lane];
            }
        }
    });
    difference
}

/// What the codes of a run are worth.
struct Step {
    scale: Lanes,
    offset: Lanes,
    width: BitWidth,
    /// Of the windows of a trellis, which take the place of codes.
    values: Option<&'static Values>,
}

impl Step {
    fn new(scales: &RunScales, rows: &RowScales, width: BitWidth) -> Self {
        let (scale, offset) = scales.affine(rows);
        let is_trellis = matches!(scales, RunScales::Trellis { .. });
        Self { scale, offset, width, values: is_trellis.then(|| trellis::values(width)) }
    }

    /// What codes are worth.
    #[inline(always)]
    fn values(&self, codes: &CodeColumn) -> Lanes {
        match self.values {
            None => std::array::from_fn(|r| self.scale[r] * f32::from(codes[r]) + self.offset[r]),
            Some(of) => std::array::from_fn(|r| self.scale[r] * of[usize::from(codes[r])]),
        }
    }
}

per_isa! {
    /// The codes nearest to `w`, and what they are worth.
    fn nearest_on_grid(step: &Step, w: &Lanes) -> (CodeColumn, Lanes) {
        let code = nearest_codes(w, &step.scale, &step.offset, step.width.max_code().into());
        let code = code.map(|code| code as u8);
        (code, step.values(&code))
    }
}

impl Strip<'_> {
    /// What the codes of a run are worth in each tile.
    fn steps(&self, run: &Run) -> Vec<Step> {
        let step = |tile: &SweptTile| Step::new(&tile.runs[run.index].2, &tile.rows, run.width);
        self.tiles.iter().map(step).collect()
    }

    /// The codes of a column that come closest to `w`, and what they are worth, for each tile.
    fn nearest(&mut self, steps: &[Step], w: [&Lanes; 2]) -> [(CodeColumn, Lanes); 2] {
        match steps {
            [step] => [nearest_on_grid(step, w[0]), Default::default()],
            [above, below] => {
                let windows = self.viterbi.windows(above.width, w, [&above.scale, &below.scale]);
                [(windows[0], above.values(&windows[0])), (windows[1], below.values(&windows[1]))]
            }
            _ => unreachable!("strips have one tile or two"),
        }
    }

    /// The scales of the next run, with weights that `w` of each tile begins with.
    fn choose_scales(&mut self, w: &[&mut [Lanes]], importance: &[f32], run: &Run, coder: Coder) {
        let w: Vec<_> = w.iter().map(|w| &w[..importance.len()]).collect();
        let rows: Vec<_> = self.tiles.iter().map(|tile| &tile.rows).collect();
        let scales = coder.run(&rows, &w, importance, run.width, &mut self.viterbi);
        for (tile, mut scales) in self.tiles.iter_mut().zip(scales) {
            scales.clear_padding(tile.used);
            tile.runs.push((run.group, run.number, scales));
        }
    }

    /// Quantizes the first columns of `w` of each tile, those of `run`. What the columns behind a
    /// column lose in proportion to their part of `factor` stays in its place.
    fn sweep_run(
        &mut self,
        w: &mut [&mut [Lanes]],
        run: &Run,
        order: &[usize],
        factor: Option<&[f32]>,
    ) {
        let steps = self.steps(run);
        for (i, place) in run.places.clone().enumerate() {
            let col = order[place];
            let rounded = self.nearest(&steps, [&w[0][i], &w[w.len() - 1][i]]);
            for ((tile, w), (codes, values)) in self.tiles.iter_mut().zip(&mut *w).zip(rounded) {
                (tile.codes[col], tile.dequantized[col]) = (codes, values);
                if let Some(u) = factor {
                    spread_error(&mut w[i..], &values, &u[place * order.len() + place..]);
                }
            }
        }
    }
}

impl SweptTile {
    /// With the row scales of `weights`, up to 16 rows, and no codes yet.
    fn new(weights: &[f32], importance: &[f32], layout: &LayerLayout, coder: Coder) -> Self {
        let cols = layout.cols();
        let used = weights.len() / cols;
        let mut rows = coder.rows(&gather(weights, cols, 0, 0..cols), importance, layout.groups());
        rows.d[used..].fill(0.0);
        rows.m[used..].fill(0.0);
        Self {
            codes: vec![[0; TILE_ROWS]; cols],
            runs: Vec::new(),
            rows,
            dequantized: vec![[0.0; TILE_ROWS]; cols],
            used,
        }
    }
}

per_isa! {
    /// Spreads the error of the first column of `w`, which has become `value`, over the others:
    /// `w_k -= error / u_0 * u_k`. What it multiplies with stays in its place.
    fn spread_error(w: &mut [Lanes], value: &Lanes, u: &[f32]) {
        let (first, rest) = w.split_at_mut(1);
        let error = &mut first[0];
        for r in 0..TILE_ROWS {
            error[r] = (error[r] - value[r]) / u[0];
        }
        for (w, u) in rest.iter_mut().zip(&u[1..]) {
            for r in 0..TILE_ROWS {
                w[r] -= error[r] * u;
            }
        }
    }
}

impl SweptTile {
    /// Packs the tile.
    pub fn store(&self, tile: &mut TileMut<'_>) {
        for index in 0..tile.layout().groups().len() {
            let group = &tile.layout().groups()[index];
            let stored = |codes: &CodeColumn| codes.map(|code| code & group.bit_width.max_code());
            let codes: Vec<_> = self.codes[group.cols.clone()].iter().map(stored).collect();
            tile.set_codes(index, &codes);
        }
        for (group, run, scales) in &self.runs {
            scales.store(tile, *group, *run);
        }
        tile.set_row_scales(
            &self.rows.d.map(half::f16::from_f32),
            &self.rows.m.map(half::f16::from_f32),
        );
    }
}
