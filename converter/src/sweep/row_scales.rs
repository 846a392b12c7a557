//! The row scales of a layer, fitted again to its codes.
//!
//! A weight is `d a - m z`, with `a` the product of its scale code and its code, and `z` its
//! minimum code. For given codes the output error `e H e^T` of a row is a parabola in `d` and `m`,
//! and its lowest point the solution of two equations.

use rayon::prelude::*;
use slim_formats::slim::TILE_ROWS;
use slim_kernels::linalg::Store;

use super::{Step, Sweep, SweptTile, add_product, rows_of_tiles_mut};
use crate::coder::RowScales;

/// How the weights of a layer move with one of their row scales, both `[rows, cols]`.
struct Direction {
    /// For one more of it.
    weights: Vec<f32>,
    /// The same times the Hessian.
    curved: Vec<f32>,
}

impl Sweep<'_> {
    /// Gives each row the scales with the least output error for its codes, where the coding has
    /// row scales. `gradient`, the errors times the Hessian, is kept up to date.
    pub(super) fn refit_row_scales(&mut self, gradient: &mut [f32], hessian: &[f32]) {
        let cols = self.order.len();
        let Some([of_d, of_m]) = self.directions(hessian) else { return };
        let Self { runs, order, tiles, .. } = self;
        let tiles = tiles.par_iter_mut().zip(rows_of_tiles_mut(gradient, cols)).enumerate();
        tiles.for_each(|(index, (tile, gradient))| {
            for (lane, gradient) in gradient.chunks_exact_mut(cols).enumerate() {
                let row = index * TILE_ROWS + lane;
                refit_row(&mut tile.rows, lane, gradient, of_d.row(row, cols), of_m.row(row, cols));
            }
            for run in runs.iter() {
                let step = Step::new(&tile.runs[run.index].2, &tile.rows, run.width);
                for &col in &order[run.places.clone()] {
                    tile.dequantized[col] = step.values(&tile.codes[col]);
                }
            }
        });
    }

    /// Those of `d` and of `m`; `None` if the coding has no row scales.
    fn directions(&self, hessian: &[f32]) -> Option<[Direction; 2]> {
        let Self { runs, order, tiles, .. } = self;
        let cols = order.len();
        let rows: usize = tiles.iter().map(|tile| tile.used).sum();
        let mut weights = [0, 1].map(|_| vec![0.0; rows * cols]);
        let [of_d, of_m] = weights.each_mut().map(|weights| rows_of_tiles_mut(weights, cols));
        let fill = |((of_d, of_m), tile): ((&mut [f32], &mut [f32]), &SweptTile)| {
            for run in runs {
                for place in run.places.clone() {
                    let slopes = tile.runs[run.index].2.slopes(&tile.codes[order[place]])?;
                    for (out, slopes) in [&mut *of_d, &mut *of_m].into_iter().zip(slopes) {
                        let rows = out.chunks_exact_mut(cols);
                        rows.zip(slopes).for_each(|(row, slope)| row[place] = slope);
                    }
                }
            }
            Some(())
        };
        of_d.zip(of_m).zip(tiles).map(fill).collect::<Option<()>>()?;
        Some(weights.map(|weights| Direction::new(weights, cols, hessian)))
    }
}

impl Direction {
    fn new(weights: Vec<f32>, cols: usize, hessian: &[f32]) -> Self {
        let mut curved = vec![0.0; weights.len()];
        add_product(&mut curved, Store::REPLACE, &weights, hessian, 0..cols, 0..cols);
        Self { weights, curved }
    }

    /// Both for a row.
    fn row(&self, row: usize, cols: usize) -> (&[f32], &[f32]) {
        let row = row * cols..(row + 1) * cols;
        (&self.weights[row.clone()], &self.curved[row])
    }
}

/// Moves row `lane` to the lowest point of its parabola, rounded as the file stores it. A row whose
/// inputs say so little about its scales that this is far away keeps them.
fn refit_row(
    rows: &mut RowScales,
    lane: usize,
    gradient: &mut [f32],
    (a, a_curved): (&[f32], &[f32]),
    (z, z_curved): (&[f32], &[f32]),
) {
    let [mut aa, mut az, mut zz, mut a_error, mut z_error] = [0.0f64; 5];
    for (i, &gradient) in gradient.iter().enumerate() {
        let (a, z, gradient) = (f64::from(a[i]), f64::from(z[i]), f64::from(gradient));
        aa += a * f64::from(a_curved[i]);
        az += a * f64::from(z_curved[i]);
        zz += z * f64::from(z_curved[i]);
        a_error += a * gradient;
        z_error += z * gradient;
    }
    let determinant = aa * zz - az * az;
    let (by_d, by_m) = if determinant > 1e-6 * aa * zz {
        ((a_error * zz - z_error * az) / determinant, (z_error * aa - a_error * az) / determinant)
    } else if aa > 0.0 {
        (a_error / aa, 0.0)
    } else {
        return;
    };
    let moved = |scale: f32, by: f64| half::f16::from_f64(f64::from(scale) + by).to_f32();
    let is_near = |new: f32, old: f32| (0.5 * old..=2.0 * old).contains(&new);
    let (d, m) = (moved(rows.d[lane], by_d), moved(rows.m[lane], by_m));
    if !is_near(d, rows.d[lane]) || !is_near(m, rows.m[lane]) {
        return;
    }
    let (by_d, by_m) = (d - rows.d[lane], m - rows.m[lane]);
    (rows.d[lane], rows.m[lane]) = (d, m);
    for ((gradient, a), z) in gradient.iter_mut().zip(a_curved).zip(z_curved) {
        *gradient -= by_d * a + by_m * z;
    }
}
