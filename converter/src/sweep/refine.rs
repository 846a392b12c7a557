//! Coordinate descent over the codes of swept tiles, with their row scales fitted before and after.
//!
//! A tile needs only its gradient, `e H` for its errors `e`: once all are computed, in one product,
//! tiles are on their own.

use std::ops::Range;

use rayon::prelude::*;
use slim_formats::slim::TILE_ROWS;
use slim_kernels::{linalg::Store, per_isa};

use super::{
    Run, Strip, Sweep, SweptTile, add_product, blocks, places, row_scales::Direction,
    rows_of_tiles_mut, strips,
};
use crate::{
    coder::RunScales,
    lanes::{Lanes, gather, scatter, zip},
    trellis::{self, MAX_SCALE_CODE, Viterbi},
};

/// Passes of coordinate descent over the codes of a layer: two more than two took SmolLM2 from
/// 24.08 to 23.66 at 3.30 bits.
pub(crate) const REFINEMENTS: usize = 4;

impl Sweep<'_> {
    /// Lowers the output error `e H e^T` of each row of `errors: [rows, cols]`.
    pub(super) fn refine(&mut self, errors: Vec<f32>, hessian: &[f32]) {
        let Self { runs, order, tiles, coder, .. } = self;
        let (len, cols) = (errors.len(), order.len());
        let slopes: Option<Vec<_>> =
            tiles.par_iter().map(|tile| tile.slopes(runs, order)).collect();
        let mut moves = errors;
        if let Some(slopes) = &slopes {
            moves.resize(3 * len, 0.0);
            let (of_d, of_m) = moves[len..].split_at_mut(len);
            let rows = rows_of_tiles_mut(of_d, cols).zip(rows_of_tiles_mut(of_m, cols));
            rows.zip(slopes).for_each(|(rows, slopes)| {
                scatter(&slopes[0], rows.0);
                scatter(&slopes[1], rows.1);
            });
        }
        let mut curved = vec![0.0; moves.len()];
        add_product(&mut curved, Store::REPLACE, &moves, hessian, 0..cols, 0..cols);
        drop(moves);
        let curved = |matrix: usize, tile: usize| {
            gather(&curved[matrix * len..(matrix + 1) * len], cols, tile, 0..cols)
        };
        strips(tiles, *coder).enumerate().for_each(|(index, tiles)| {
            let of_strip = index * tiles.len()..(index + 1) * tiles.len();
            let mut gradients: Vec<_> = of_strip.clone().map(|tile| curved(0, tile)).collect();
            let mut strip = Strip { tiles, viterbi: Viterbi::default() };
            let Some(slopes) = &slopes else {
                return strip.refine_codes(&mut gradients, runs, order, hessian);
            };
            let mut directions: Vec<_> = of_strip
                .map(|tile| {
                    let [of_d, of_m] = slopes[tile].clone();
                    let of_d = Direction { slopes: of_d, curved: curved(1, tile) };
                    (of_d, Direction { slopes: of_m, curved: curved(2, tile) })
                })
                .collect();
            let of_tiles = strip.tiles.iter_mut().zip(&mut gradients).zip(&directions);
            for ((tile, gradient), (of_d, of_m)) in of_tiles {
                tile.refit_row_scales(gradient, of_d, of_m, runs, order);
            }
            let before = gradients.clone();
            strip.refine_codes(&mut gradients, runs, order, hessian);
            let of_tiles = strip.tiles.iter_mut().zip(&mut gradients).zip(&mut directions);
            for (((tile, gradient), (of_d, of_m)), before) in of_tiles.zip(&before) {
                tile.follow_codes(of_d, before, gradient, runs, order);
                tile.refit_row_scales(gradient, of_d, of_m, runs, order);
            }
        });
    }
}

impl Strip<'_> {
    /// Coordinate descent: one column after the other takes the codes that are best now that all
    /// others are known. The sweep could not know those that came later. `gradients`, of each tile
    /// the errors times the Hessian, are kept up to date.
    fn refine_codes(
        &mut self,
        gradients: &mut [Vec<Lanes>],
        runs: &[Run],
        order: &[usize],
        hessian: &[f32],
    ) {
        let cols = order.len();
        for block in (0..REFINEMENTS).flat_map(|_| blocks(runs)) {
            let places = places(block);
            let mut of_block: Vec<_> =
                gradients.iter_mut().map(|gradient| &mut gradient[places.clone()]).collect();
            let changes = self.refine_block(&mut of_block, block, order, hessian);
            for (gradient, changes) in gradients.iter_mut().zip(changes) {
                for others in [0..places.start, places.end..cols] {
                    let rows: Vec<_> = changes
                        .iter()
                        .map(|(place, change)| (&hessian[place * cols..][others.clone()], *change))
                        .collect();
                    // A few columns of each tile change: less work than a product with all.
                    rows.chunks(CHANGES)
                        .for_each(|rows| add_scaled(&mut gradient[others.clone()], rows));
                }
            }
        }
    }

    /// Chooses the codes of a block again, whose `gradients` are kept up to date; gives of each
    /// tile the places that changed, and what that took from them.
    fn refine_block(
        &mut self,
        gradients: &mut [&mut [Lanes]],
        block: &[Run],
        order: &[usize],
        hessian: &[f32],
    ) -> Vec<Vec<(usize, Lanes)>> {
        let places = places(block);
        let mut changes = vec![Vec::new(); self.tiles.len()];
        for run in block {
            let of_tiles = self.tiles.iter_mut().zip(&mut *gradients).zip(&mut changes);
            for ((tile, gradient), changes) in of_tiles {
                tile.refit_scale_codes(gradient, run, &places, order, hessian, changes);
            }
            let steps = self.steps(run);
            for place in run.places.clone() {
                let row = &hessian[place * order.len()..][places.clone()];
                let i = place - places.start;
                // Inputs that are all zero say nothing about the codes.
                if row[i] <= 0.0 {
                    continue;
                }
                let col = order[place];
                let old = [0, self.tiles.len() - 1].map(|tile| self.tiles[tile].dequantized[col]);
                let best = [0, self.tiles.len() - 1].map(|tile| {
                    let gradient = &gradients[tile][i];
                    zip(&old[tile], gradient, |value, gradient| value + gradient / row[i])
                });
                let rounded = self.nearest(&steps, best.each_ref());
                if steps.len() == 2
                    && distance(&best, &old) <= distance(&best, &rounded.map(|r| r.1))
                {
                    continue;
                }
                for (t, tile) in self.tiles.iter_mut().enumerate() {
                    let (code, value) = rounded[t];
                    if value != old[t] {
                        let change = zip(&old[t], &value, |old, new| old - new);
                        add_scaled(gradients[t], &[(row, change)]);
                        changes[t].push((place, change));
                    }
                    (tile.codes[col], tile.dequantized[col]) = (code, value);
                }
            }
        }
        changes
    }
}

/// The squared distance of the columns of two tiles.
fn distance(a: &[Lanes; 2], b: &[Lanes; 2]) -> f32 {
    let squares = a.as_flattened().iter().zip(b.as_flattened()).map(|(a, b)| (a - b).powi(2));
    squares.sum()
}

impl SweptTile {
    /// Gives each row of a run of a trellis the scale code with the least output error for its
    /// windows. `gradient`, of a block's `places`, is kept up to date; `changes` get what that took
    /// from the places.
    fn refit_scale_codes(
        &mut self,
        gradient: &mut [Lanes],
        run: &Run,
        places: &Range<usize>,
        order: &[usize],
        hessian: &[f32],
        changes: &mut Vec<(usize, Lanes)>,
    ) {
        let RunScales::Trellis { scale, width } = &mut self.runs[run.index].2 else { return };
        // What a weight gains for one more of its scale code.
        let values = trellis::values(*width);
        let slope = |place: usize| -> Lanes {
            let windows = &self.codes[order[place]];
            std::array::from_fn(|r| self.rows.d[r] * values[usize::from(windows[r])])
        };
        let slopes: Vec<Lanes> = run.places.clone().map(slope).collect();
        let row_of = |place: usize| &hessian[place * order.len()..];
        let (mut along, mut curvature) = ([0.0; TILE_ROWS], [0.0; TILE_ROWS]);
        for (place, slope) in run.places.clone().zip(&slopes) {
            let curved = product(&row_of(place)[run.places.clone()], &slopes);
            for r in 0..TILE_ROWS {
                along[r] += slope[r] * gradient[place - places.start][r];
                curvature[r] += slope[r] * curved[r];
            }
        }
        let old = scale.map(f32::from);
        let new: Lanes = std::array::from_fn(|r| match curvature[r] > 0.0 {
            true => (old[r] + along[r] / curvature[r])
                .round_ties_even()
                .clamp(1.0, MAX_SCALE_CODE.into()),
            false => old[r],
        });
        if new == old {
            return;
        }
        *scale = new.map(|code| code as u8);
        let lost = zip(&old, &new, |old, new| old - new);
        for (place, slope) in run.places.clone().zip(&slopes) {
            let change = zip(&lost, slope, |lost, slope| lost * slope);
            add_scaled(gradient, &[(&row_of(place)[places.clone()], change)]);
            changes.push((place, change));
            let value = &mut self.dequantized[order[place]];
            *value = zip(slope, &new, |slope, new| slope * new);
        }
    }
}

/// Rows that are added in one pass over the sums.
const CHANGES: usize = 4;

per_isa! {
    /// A row of a matrix times columns.
    fn product(row: &[f32], columns: &[Lanes]) -> Lanes {
        let mut sum = [0.0; TILE_ROWS];
        for (h, column) in row.iter().zip(columns) {
            for r in 0..TILE_ROWS {
                sum[r] += h * column[r];
            }
        }
        sum
    }
}

per_isa! {
    /// `sums_k += row_k * change` for up to [`CHANGES`] rows.
    fn add_scaled(sums: &mut [Lanes], rows: &[(&[f32], Lanes)]) {
        // What the sums are read and written for takes as long as a row.
        if let &[(a, of_a), (b, of_b), (c, of_c), (d, of_d)] = rows {
            let rows = a.iter().zip(b).zip(c.iter().zip(d));
            for (sum, ((a, b), (c, d))) in sums.iter_mut().zip(rows) {
                for r in 0..TILE_ROWS {
                    sum[r] += (of_a[r] * a + of_b[r] * b) + (of_c[r] * c + of_d[r] * d);
                }
            }
            return;
        }
        for (row, change) in rows {
            for (sum, h) in sums.iter_mut().zip(*row) {
                for r in 0..TILE_ROWS {
                    sum[r] += change[r] * h;
                }
            }
        }
    }
}
