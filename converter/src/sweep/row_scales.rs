//! The row scales of a tile, fitted again to its codes.
//!
//! A weight is `d a - m z`, with `a` the product of its scale code and its code, and `z` its
//! minimum code. For given codes the output error `e H e^T` of a row is a parabola in `d` and `m`,
//! and its lowest point the solution of two equations.

use slim_formats::slim::TILE_ROWS;

use super::{Run, Step, SweptTile};
use crate::lanes::{Lanes, zip};

/// How the weights of a tile move with one of their row scales, one entry per place.
pub(super) struct Direction {
    /// What they gain for one more of it.
    pub slopes: Vec<Lanes>,
    /// The same times the Hessian.
    pub curved: Vec<Lanes>,
}

impl SweptTile {
    /// How the weights move with `d` and with `m`; `None` if the coding has no row scales.
    pub(super) fn slopes(&self, runs: &[Run], order: &[usize]) -> Option<[Vec<Lanes>; 2]> {
        let mut slopes = [0, 1].map(|_| Vec::with_capacity(order.len()));
        for run in runs {
            for &col in &order[run.places.clone()] {
                let of_column = self.runs[run.index].2.slopes(&self.codes[col])?;
                slopes.iter_mut().zip(of_column).for_each(|(all, slope)| all.push(slope));
            }
        }
        Some(slopes)
    }

    /// Brings `of_d` up to date with codes that have changed, and with them the gradient:
    /// `(before - gradient) / d` is what that adds to its product with the Hessian.
    pub(super) fn follow_codes(
        &self,
        of_d: &mut Direction,
        before: &[Lanes],
        gradient: &[Lanes],
        runs: &[Run],
        order: &[usize],
    ) {
        // Where `d` is zero no weight moves with a code.
        let inverse = self.rows.d.map(|d| if d == 0.0 { 0.0 } else { 1.0 / d });
        for (curved, (before, after)) in of_d.curved.iter_mut().zip(before.iter().zip(gradient)) {
            let moved = zip(before, after, |before, after| before - after);
            *curved = zip(curved, &zip(&moved, &inverse, |moved, by| moved * by), |c, m| c + m);
        }
        let [slopes, _] = self.slopes(runs, order).expect("it has row scales");
        of_d.slopes = slopes;
    }

    /// Gives each row the scales with the least output error for its codes. `gradient`, the errors
    /// times the Hessian, is kept up to date.
    pub(super) fn refit_row_scales(
        &mut self,
        gradient: &mut [Lanes],
        of_d: &Direction,
        of_m: &Direction,
        runs: &[Run],
        order: &[usize],
    ) {
        let mut parabolas = [Parabola::default(); TILE_ROWS];
        for (place, gradient) in gradient.iter().enumerate() {
            let [a, z] = [of_d, of_m].map(|of| (&of.slopes[place], &of.curved[place]));
            for (r, parabola) in parabolas.iter_mut().enumerate() {
                parabola.add((a.0[r], a.1[r]), (z.0[r], z.1[r]), gradient[r]);
            }
        }
        let (mut by_d, mut by_m) = ([0.0; TILE_ROWS], [0.0; TILE_ROWS]);
        for (r, parabola) in parabolas.iter().enumerate() {
            let (d, m) = (self.rows.d[r], self.rows.m[r]);
            if let Some((new_d, new_m)) = parabola.lowest(d, m) {
                (by_d[r], by_m[r]) = (new_d - d, new_m - m);
                (self.rows.d[r], self.rows.m[r]) = (new_d, new_m);
            }
        }
        for (gradient, (a, z)) in gradient.iter_mut().zip(of_d.curved.iter().zip(&of_m.curved)) {
            for r in 0..TILE_ROWS {
                gradient[r] -= by_d[r] * a[r] + by_m[r] * z[r];
            }
        }
        for run in runs {
            let step = Step::new(&self.runs[run.index].2, &self.rows, run.width);
            for &col in &order[run.places.clone()] {
                self.dequantized[col] = step.values(&self.codes[col]);
            }
        }
    }
}

/// The output error of a row as a function of its scales: sums over its columns.
#[derive(Default, Clone, Copy)]
struct Parabola {
    aa: f64,
    az: f64,
    zz: f64,
    a_error: f64,
    z_error: f64,
}

impl Parabola {
    /// Adds a column: the slopes of both scales, plain and times the Hessian, and the gradient.
    fn add(&mut self, (a, a_curved): (f32, f32), (z, z_curved): (f32, f32), gradient: f32) {
        let (a, z, gradient) = (f64::from(a), f64::from(z), f64::from(gradient));
        self.aa += a * f64::from(a_curved);
        self.az += a * f64::from(z_curved);
        self.zz += z * f64::from(z_curved);
        self.a_error += a * gradient;
        self.z_error += z * gradient;
    }

    /// The scales at the lowest point, rounded as the file stores them. A row whose inputs say so
    /// little about its scales that this is far away has none.
    fn lowest(&self, d: f32, m: f32) -> Option<(f32, f32)> {
        let Self { aa, az, zz, a_error, z_error } = *self;
        let determinant = aa * zz - az * az;
        let (by_d, by_m) = if determinant > 1e-6 * aa * zz {
            (
                (a_error * zz - z_error * az) / determinant,
                (z_error * aa - a_error * az) / determinant,
            )
        } else if aa > 0.0 {
            (a_error / aa, 0.0)
        } else {
            return None;
        };
        let moved = |scale: f32, by: f64| half::f16::from_f64(f64::from(scale) + by).to_f32();
        let is_near = |new: f32, old: f32| (0.5 * old..=2.0 * old).contains(&new);
        let (new_d, new_m) = (moved(d, by_d), moved(m, by_m));
        (is_near(new_d, d) && is_near(new_m, m)).then_some((new_d, new_m))
    }
}
