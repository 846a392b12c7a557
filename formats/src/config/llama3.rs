//! The RoPE scaling of Llama 3: long wavelengths are divided by `factor`, short ones kept, those
//! between interpolated.

use std::f64::consts::TAU;

use super::Rope;

/// The parameters, as `rope_scaling` of `config.json` has them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Llama3 {
    pub factor: f64,
    /// `low_freq_factor`.
    pub low: f64,
    /// `high_freq_factor`, more than `low`.
    pub high: f64,
    /// `original_max_position_embeddings`.
    pub original_context: f64,
}

/// What factors in f32 may differ from those of the parameters that were found for them.
const TOLERANCE: f32 = 1e-4;

impl Llama3 {
    /// The factor of each pair of channels.
    ///
    /// # Source
    /// `modeling_rope_utils.py::_compute_llama3_parameters` of transformers.
    pub fn factors(&self, theta: f64, pairs: usize) -> Vec<f32> {
        let pair_factor = |pair: usize| {
            let wavelength = wavelength(theta, pair, pairs);
            // 0 where the wavelength is too long to be kept, 1 where it is short enough.
            let kept = (self.original_context / wavelength - self.low) / (self.high - self.low);
            let kept = kept.clamp(0.0, 1.0);
            (1.0 / ((1.0 - kept) / self.factor + kept)) as f32
        };
        (0..pairs).map(pair_factor).collect()
    }

    /// Parameters that give these factors, `None` if there are none.
    ///
    /// `1 / factor` is a straight line in `1 / wavelength` between two bounds, so two of its points
    /// tell it; `low` is free, and 1 as in Llama 3.
    pub fn of(rope: &Rope) -> Option<Self> {
        let (theta, pairs) = (f64::from(rope.theta), rope.factors.len());
        let least = 1.0 / f64::from(rope.factors.iter().copied().fold(1.0, f32::max));
        let point =
            |pair| (1.0 / wavelength(theta, pair, pairs), 1.0 / f64::from(rope.factors[pair]));
        let through = |left: usize, right: usize| {
            let ((x0, y0), (x1, y1)) = (point(left), point(right));
            let slope = (y0 - y1) / (x0 - x1);
            let kept_at_0 = (y0 - slope * x0 - least) / (1.0 - least);
            let slope = slope / (1.0 - least);
            let spread = if kept_at_0 < 0.0 { -1.0 / kept_at_0 } else { 1.0 };
            let original_context = (slope * spread).round().max(1.0);
            let spread = original_context / slope;
            let (low, high) = (-kept_at_0 * spread, (1.0 - kept_at_0) * spread);
            // Factors in f32 tell numbers that people chose only about.
            let neat = |number: f64| (1e4 * number).round() / 1e4;
            let factor = 1.0 / least;
            let exact = Self { factor, low, high, original_context };
            let neat = Self { low: neat(low), high: neat(high), ..exact };
            [neat, exact].into_iter().find(|found| {
                let factors = found.factors(theta, pairs);
                let agrees = |(a, b): (&f32, &f32)| (a - b).abs() <= TOLERANCE * b;
                found.high > found.low && factors.iter().zip(&rope.factors).all(agrees)
            })
        };
        let is_between = |&pair: &usize| (least..1.0).contains(&point(pair).1);
        let first = (0..pairs).find(is_between)?;
        let last = (first..pairs).take_while(|pair| point(*pair).1 > least).last();
        // The ends of the slope, or a point beyond one where the slope has less than two.
        let ends = [Some(first), last, first.checked_sub(1), Some((first + 1).min(pairs - 1))];
        let ends: Vec<usize> = ends.into_iter().flatten().collect();
        let lines = ends.iter().flat_map(|&a| ends.iter().map(move |&b| (a, b)));
        lines.filter(|(a, b)| a < b).find_map(|(left, right)| through(left, right))
    }
}

/// Tokens in which pair `pair` of `pairs` turns once.
fn wavelength(theta: f64, pair: usize, pairs: usize) -> f64 {
    TAU * theta.powf(pair as f64 / pairs as f64)
}
