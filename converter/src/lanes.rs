//! Sixteen rows at a time: a tile's weights as columns of 16 lanes, so that loops over rows
//! vectorise and every row's arithmetic is its own.

use std::ops::Range;

use slim_formats::slim::TILE_ROWS;
use slim_kernels::per_isa;

/// One value for each row of a tile.
pub type Lanes = [f32; TILE_ROWS];

/// The columns `span` of rows `16 * tile ..` of `weights: [rows, cols]`; rows past the end are
/// zero.
pub fn gather(weights: &[f32], cols: usize, tile: usize, span: Range<usize>) -> Vec<Lanes> {
    let rows = weights.get(tile * TILE_ROWS * cols..).unwrap_or_default();
    let mut columns = vec![[0.0; TILE_ROWS]; span.len()];
    for (lane, row) in rows.chunks_exact(cols).take(TILE_ROWS).enumerate() {
        for (column, weight) in columns.iter_mut().zip(&row[span.clone()]) {
            column[lane] = *weight;
        }
    }
    columns
}

/// The reverse of [`gather`] for all columns of up to 16 rows, `[rows, columns.len()]`.
pub fn scatter(columns: &[Lanes], rows: &mut [f32]) {
    for (lane, row) in rows.chunks_exact_mut(columns.len()).enumerate() {
        row.iter_mut().zip(columns).for_each(|(weight, column)| *weight = column[lane]);
    }
}

/// `f` of each pair of lanes.
#[inline(always)]
pub fn zip(a: &Lanes, b: &Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    std::array::from_fn(|r| f(a[r], b[r]))
}

/// The code that is nearest to `w` in each lane, for weights `factor * code + offset`; 0 where the
/// factor is 0.
#[inline(always)]
pub fn nearest_codes(w: &Lanes, factor: &Lanes, offset: &Lanes, max_code: f32) -> Lanes {
    let mut codes = [0.0; TILE_ROWS];
    for r in 0..TILE_ROWS {
        let inverse = if factor[r] == 0.0 { 0.0 } else { 1.0 / factor[r] };
        codes[r] = ((w[r] - offset[r]) * inverse).round_ties_even().clamp(0.0, max_code);
    }
    codes
}

per_isa! {
    /// The weighted squared error of quantizing a run of columns to the nearest codes, for each
    /// row.
    pub fn run_error(w: &[Lanes], importance: &[f32], factor: &Lanes, offset: &Lanes, max_code: u8) -> Lanes {
        let mut sum = [0.0; TILE_ROWS];
        for (w, importance) in w.iter().zip(importance) {
            let code = nearest_codes(w, factor, offset, max_code.into());
            for r in 0..TILE_ROWS {
                let error = factor[r] * code[r] + offset[r] - w[r];
                sum[r] += importance * error * error;
            }
        }
        sum
    }
}

/// Takes `candidate` where its error is lower.
#[inline(always)]
pub fn keep_better<T: Copy>(
    best: &mut [T; TILE_ROWS],
    best_error: &mut Lanes,
    candidate: &[T; TILE_ROWS],
    error: &Lanes,
) {
    for r in 0..TILE_ROWS {
        if error[r] < best_error[r] {
            best_error[r] = error[r];
            best[r] = candidate[r];
        }
    }
}
