//! Salience of weights and groups (Def. 3.1 of arXiv:2405.14917, as its code computes it).

use std::ops::Range;

use rayon::prelude::*;

/// `sum w_ij^2 / d_j^2` over all rows and the columns of each group, `d` the diagonal of the upper
/// Cholesky factor of `H^-1`; `importance` is `1 / d_j^2`.
///
/// # Shapes and layout
/// `weights`: [rows, cols], row-major; `importance`: [cols].
pub fn group_salience(weights: &[f32], importance: &[f32], groups: &[Range<usize>]) -> Vec<f64> {
    let cols = importance.len();
    let sum_of_squares: Vec<f64> = (0..cols)
        .into_par_iter()
        .map(|j| weights[j..].iter().step_by(cols).map(|w| f64::from(*w).powi(2)).sum())
        .collect();
    let column = |j: usize| sum_of_squares[j] * f64::from(importance[j]);
    groups.iter().map(|group| group.clone().map(column).sum()).collect()
}
