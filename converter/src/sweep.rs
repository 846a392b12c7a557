//! The GPTQ sweep of one tile: quantize column by column, and push each column's error to the columns not yet done; then
//! refine the codes.

use std::borrow::Cow;

use slim_formats::slim::{CodeColumn, LayerLayout, TILE_ROWS, TileMut};
use slim_kernels::per_isa;

use crate::{
    coder::{Coder, RowScales, RunScales},
    lanes::{Lanes, nearest_codes, zip},
};

/// Passes of coordinate descent over the codes of a tile: few codes change after the second.
const REFINEMENTS: usize = 2;

/// What the sweep weighs errors by.
pub struct Curvature<'a> {
    /// Upper triangular `[cols, cols]` with `H^-1 = U^T U`, for columns in `order`; `None` quantizes each weight by itself.
    pub factor: Option<&'a [f32]>,
    /// What an error in a column costs, `[cols]`: `1 / U_jj^2`, or ones.
    pub importance: Cow<'a, [f32]>,
    /// The columns in the order in which they are quantized, which is that of `factor`: whole runs one after the other.
    pub order: Cow<'a, [usize]>,
    /// The damped Hessian itself, `[cols, cols]` in `order`, to refine the codes by; `None` leaves them as they are.
    pub hessian: Option<&'a [f32]>,
}

/// A tile of 16 rows, quantized.
pub struct SweptTile {
    /// One entry per column.
    pub codes: Vec<CodeColumn>,
    /// The scales of each run of columns, with its group and its number in the group.
    pub runs: Vec<(usize, usize, RunScales)>,
    /// Row scales.
    pub rows: RowScales,
    /// The weights that the codes stand for, one entry per column.
    pub dequantized: Vec<Lanes>,
}

/// Quantizes the 16 rows in `columns` (one entry per column); lanes from `used` on are padding.
pub fn sweep(
    columns: &[Lanes],
    used: usize,
    curvature: &Curvature<'_>,
    layout: &LayerLayout,
    coder: Coder,
) -> SweptTile {
    let Curvature { factor, importance, order, hessian } = curvature;
    let cols = layout.cols();
    let mut rows = coder.rows(columns, importance, layout.groups());
    rows.d[used..].fill(0.0);
    rows.m[used..].fill(0.0);
    let mut tile = SweptTile {
        codes: vec![[0; TILE_ROWS]; cols],
        runs: Vec::new(),
        rows,
        dequantized: vec![[0.0; TILE_ROWS]; cols],
    };
    let mut w: Vec<Lanes> = order.iter().map(|&col| columns[col]).collect();
    let importance: Vec<f32> = order.iter().map(|&col| importance[col]).collect();
    let mut steps = Vec::with_capacity(cols);
    let mut first = 0;
    while first < cols {
        let (index, run, len) = run_of(layout, order[first]);
        let span = first..first + len;
        let width = layout.groups()[index].bit_width;
        let mut scales = coder.run(&rows, &w[span.clone()], &importance[span.clone()], width);
        scales.clear_padding(used);
        let (scale, offset) = scales.affine(&rows);
        for i in span {
            let step = Step { scale, offset, max_code: width.max_code().into() };
            let (code, value) = step.nearest(&w[i]);
            if let Some(u) = factor {
                feed_back(&mut w[i..], &value, &u[i * cols + i..][..cols - i]);
            }
            tile.codes[order[i]] = code;
            tile.dequantized[order[i]] = value;
            steps.push(step);
        }
        tile.runs.push((index, run, scales));
        first += len;
    }
    if let Some(hessian) = hessian {
        tile.refine(columns, order, hessian, &steps);
    }
    tile
}

/// The grid that a column's weights lie on.
struct Step {
    scale: Lanes,
    offset: Lanes,
    max_code: f32,
}

impl Step {
    /// The codes nearest to `w`, and what they are worth.
    #[inline(always)]
    fn nearest(&self, w: &Lanes) -> (CodeColumn, Lanes) {
        let code = nearest_codes(w, &self.scale, &self.offset, self.max_code);
        let value = std::array::from_fn(|r| self.scale[r] * code[r] + self.offset[r]);
        (code.map(|code| code as u8), value)
    }
}

impl SweptTile {
    /// Coordinate descent on the output error `e H e^T` of each row: one column after the other takes the code that is best
    /// now that all others are known. The sweep could not know those that came later.
    fn refine(&mut self, w: &[Lanes], order: &[usize], hessian: &[f32], steps: &[Step]) {
        let cols = order.len();
        // e H, kept up to date.
        let mut gradient = vec![[0.0; TILE_ROWS]; cols];
        for (i, &col) in order.iter().enumerate() {
            let error = zip(&w[col], &self.dequantized[col], |w, value| w - value);
            add_scaled(&mut gradient, &hessian[i * cols..][..cols], &error);
        }
        for _ in 0..REFINEMENTS {
            for (i, &col) in order.iter().enumerate() {
                let row = &hessian[i * cols..][..cols];
                // Inputs that are all zero say nothing about the codes.
                if row[i] <= 0.0 {
                    continue;
                }
                let old = self.dequantized[col];
                let best = zip(&old, &gradient[i], |value, gradient| value + gradient / row[i]);
                let (code, value) = steps[i].nearest(&best);
                if value != old {
                    add_scaled(&mut gradient, row, &zip(&old, &value, |old, new| old - new));
                    self.codes[col] = code;
                    self.dequantized[col] = value;
                }
            }
        }
    }
}

per_isa! {
    /// `sums_k += row_k * change`.
    fn add_scaled(sums: &mut [Lanes], row: &[f32], change: &Lanes) {
        for (sum, h) in sums.iter_mut().zip(row) {
            for r in 0..TILE_ROWS {
                sum[r] += change[r] * h;
            }
        }
    }
}

/// The group of a column, the number of its run in the group, and the columns of the run.
fn run_of(layout: &LayerLayout, col: usize) -> (usize, usize, usize) {
    let index = col / layout.group_size();
    let runs = layout.groups()[index].runs(layout.coding());
    let (run, cols) = runs.enumerate().find(|(_, cols)| cols.contains(&col)).expect("a run");
    (index, run, cols.len())
}

per_isa! {
    /// Spreads the error of the first column of `w`, quantized to `value`, over the others: `w_k -= error / u_0 * u_k`.
    fn feed_back(w: &mut [Lanes], value: &Lanes, u: &[f32]) {
        let (first, rest) = w.split_at_mut(1);
        let error: Lanes = std::array::from_fn(|r| (first[0][r] - value[r]) / u[0]);
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
            let cols = tile.layout().groups()[index].cols.clone();
            tile.set_codes(index, &self.codes[cols]);
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
