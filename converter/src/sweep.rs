//! The GPTQ sweep of one tile: quantize column by column, and push each column's error to the columns not yet done.

use std::borrow::Cow;

use slim_formats::slim::{CodeColumn, LayerLayout, TILE_ROWS, TileMut};
use slim_kernels::per_isa;

use crate::{
    coder::{Coder, RowScales, RunScales},
    lanes::{Lanes, nearest_codes},
};

/// What the sweep weighs errors by.
pub struct Curvature<'a> {
    /// Upper triangular `[cols, cols]` with `H^-1 = U^T U`; `None` quantizes each weight by itself.
    pub factor: Option<&'a [f32]>,
    /// What an error in a column costs, `[cols]`: `1 / U_jj^2`, or ones.
    pub importance: Cow<'a, [f32]>,
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

/// Quantizes the 16 rows in `w` (one entry per column); lanes from `used` on are padding.
pub fn sweep(
    mut w: Vec<Lanes>,
    used: usize,
    curvature: &Curvature<'_>,
    layout: &LayerLayout,
    coder: Coder,
) -> SweptTile {
    let cols = layout.cols();
    let mut rows = coder.rows(&w, &curvature.importance, layout.groups());
    rows.d[used..].fill(0.0);
    rows.m[used..].fill(0.0);
    let mut tile = SweptTile {
        codes: Vec::with_capacity(cols),
        runs: Vec::new(),
        rows,
        dequantized: Vec::with_capacity(cols),
    };
    for (index, group) in layout.groups().iter().enumerate() {
        for (run, run_cols) in group.runs(layout.coding()).enumerate() {
            let importance = &curvature.importance[run_cols.clone()];
            let mut scales = coder.run(&rows, &w[run_cols.clone()], importance, group.bit_width);
            scales.clear_padding(used);
            let (factor, offset) = scales.affine(&rows);
            for col in run_cols {
                let max_code = group.bit_width.max_code().into();
                let code = nearest_codes(&w[col], &factor, &offset, max_code);
                let value: Lanes = std::array::from_fn(|r| factor[r] * code[r] + offset[r]);
                if let Some(u) = curvature.factor {
                    feed_back(&mut w[col..], &value, &u[col * cols + col..][..cols - col]);
                }
                tile.codes.push(code.map(|code| code as u8));
                tile.dequantized.push(value);
            }
            tile.runs.push((index, run, scales));
        }
    }
    tile
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
