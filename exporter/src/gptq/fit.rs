//! The scale, the zero point and the codes that come nearest to given weights.

use half::f16;

/// Columns that share a scale and a zero point.
pub const GROUP: usize = 32;

/// One group of a row: weight `j` is `scale * (codes[j] - zero_point)`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Fitted {
    pub scale: f16,
    pub zero_point: u8,
    pub codes: [u8; GROUP],
}

impl Fitted {
    /// The weight of each column.
    pub fn weights(&self) -> [f32; GROUP] {
        let scale = self.scale.to_f32();
        self.codes.map(|code| scale * (f32::from(code) - f32::from(self.zero_point)))
    }
}

/// How many steps beyond the smallest scale that reaches all weights are tried, and how far apart.
const STEPS: u32 = 48;
const STEP: f32 = 1.0 / 32.0;

/// The smallest squared error of all scales that are tried.
///
/// A scale that puts zero on the grid of the weights' own levels gives them exactly, so the
/// smallest distance of two weights and its fractions are tried, besides a row of scales from the
/// smallest that reaches all weights. The best is then moved to the scale that its own codes like
/// most.
pub fn fit(weights: &[f32; GROUP], max_code: u8) -> Fitted {
    let max_code = f32::from(max_code);
    let levels = Levels::of(weights);
    let (low, high) = levels.range();
    let reach = (high - low).max(high).max(-low) / max_code;
    let spacing = levels.spacing();
    let fractions = (1..=max_code as u32).map(|parts| spacing / parts as f32);
    // A scale far below the reach loses the ends of the range, one far above it the codes.
    let fractions = fractions.filter(|scale| (0.75 * reach..4.0 * reach).contains(scale));
    let row = (0..STEPS).map(|step| reach * (0.85 + STEP * step as f32));
    let mut best = Grid::new(&levels, reach, max_code);
    for scale in fractions.chain(row) {
        best = best.better(Grid::new(&levels, scale, max_code));
    }
    for _ in 0..2 {
        best = best.better(Grid::new(&levels, best.ideal_scale(&levels), max_code));
    }
    best.fitted(weights)
}

/// The different weights and how often each is there: a group of few bits has few.
struct Levels {
    /// Ascending.
    values: [f32; GROUP],
    counts: [f32; GROUP],
    len: usize,
}

impl Levels {
    fn of(weights: &[f32; GROUP]) -> Self {
        let mut sorted = *weights;
        sorted.sort_unstable_by(f32::total_cmp);
        let mut levels = Self { values: [0.0; GROUP], counts: [0.0; GROUP], len: 0 };
        for value in sorted {
            if levels.len == 0 || levels.values[levels.len - 1] != value {
                levels.values[levels.len] = value;
                levels.len += 1;
            }
            levels.counts[levels.len - 1] += 1.0;
        }
        levels
    }

    fn iter(&self) -> impl Iterator<Item = (f32, f32)> {
        let values = self.values[..self.len].iter().copied();
        values.zip(self.counts[..self.len].iter().copied())
    }

    fn range(&self) -> (f32, f32) {
        (self.values[0], self.values[self.len - 1])
    }

    /// The smallest distance of two levels; 0 if there is only one.
    fn spacing(&self) -> f32 {
        let distances = self.values[..self.len].windows(2).map(|pair| pair[1] - pair[0]);
        distances.reduce(f32::min).unwrap_or(0.0)
    }
}

/// Multiples of a scale from `-zero_point` to `max_code - zero_point`, and what they cost.
#[derive(Clone, Copy)]
struct Grid {
    scale: f16,
    zero_point: f32,
    max_code: f32,
    error: f32,
}

impl Grid {
    /// The grid of this scale that covers the levels best.
    fn new(levels: &Levels, scale: f32, max_code: f32) -> Self {
        let scale = f16::from_f32(scale);
        let (low, high) = levels.range();
        let mut grid = Self { scale, zero_point: 0.0, max_code, error: 0.0 };
        if scale > f16::ZERO && scale.is_finite() {
            let steps = |value: f32| (value / scale.to_f32()).round();
            // Zero is on the grid; if the levels are wider than the grid, both ends lose alike.
            let spare = (max_code - (steps(high) - steps(low))).min(0.0);
            grid.zero_point = (-steps(low) + (spare / 2.0).trunc()).clamp(0.0, max_code);
        }
        let error = |(value, count)| count * (grid.weight(grid.code(value)) - value).powi(2);
        grid.error = levels.iter().map(error).sum();
        grid
    }

    fn better(self, other: Self) -> Self {
        // Not the other way round: an error that is no number never wins.
        if other.error < self.error { other } else { self }
    }

    fn code(&self, value: f32) -> f32 {
        match self.scale.to_f32() {
            0.0 => self.zero_point,
            scale => ((value / scale).round() + self.zero_point).clamp(0.0, self.max_code),
        }
    }

    fn weight(&self, code: f32) -> f32 {
        self.scale.to_f32() * (code - self.zero_point)
    }

    /// The scale with the least squared error for the codes of this grid.
    fn ideal_scale(&self, levels: &Levels) -> f32 {
        let (mut product, mut square) = (0.0, 0.0);
        for (value, count) in levels.iter() {
            let steps = self.code(value) - self.zero_point;
            product += count * steps * value;
            square += count * steps * steps;
        }
        if square > 0.0 { product / square } else { 0.0 }
    }

    fn fitted(&self, weights: &[f32; GROUP]) -> Fitted {
        Fitted {
            scale: self.scale,
            zero_point: self.zero_point as u8,
            codes: weights.map(|weight| self.code(weight) as u8),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(weights: &[f32; GROUP], fitted: &Fitted) -> f32 {
        let pairs = fitted.weights().into_iter().zip(weights);
        let (difference, norm) = pairs.fold((0.0, 0.0), |(difference, norm), (found, weight)| {
            (difference + (found - weight).powi(2), norm + weight.powi(2))
        });
        (difference / norm).sqrt()
    }

    #[test]
    fn fit_of_an_integer_zero_point_is_exact() {
        for (bits, zero_point) in [(1, 0), (2, 3), (3, 1), (4, 15), (4, 7), (4, 0)] {
            let scale = f16::from_f32(0.0123).to_f32();
            let weights =
                std::array::from_fn(|j| scale * ((j * 7 % (1 << bits)) as f32 - zero_point as f32));
            let fitted = fit(&weights, 15);
            assert!(
                error(&weights, &fitted) < 1e-6,
                "{bits} bits, zero point {zero_point}: {fitted:?}"
            );
        }
    }

    #[test]
    fn fit_of_a_real_minimum_loses_little_at_few_bits() {
        for (bits, most) in [(1, 0.01), (2, 0.05), (3, 0.11), (4, 0.13)] {
            for minimum in [-0.31f32, -0.27, -0.033, 0.0, 0.04] {
                let weights = std::array::from_fn(|j| {
                    0.5 * (j * 7 % (1 << bits)) as f32 / f32::from((1u8 << bits) - 1) + minimum
                });
                let found = error(&weights, &fit(&weights, 15));
                assert!(found < most, "{bits} bits, minimum {minimum}: {found}");
                assert!(error(&weights, &fit(&weights, 255)) < 0.01, "8-bit codes");
            }
        }
    }

    #[test]
    fn fit_of_zeros_and_of_one_weight_is_exact_up_to_rounding() {
        assert_eq!(fit(&[0.0; GROUP], 15).weights(), [0.0; GROUP]);
        for weight in [0.125, -0.125, 0.01] {
            assert!(error(&[weight; GROUP], &fit(&[weight; GROUP], 15)) < 5e-4, "{weight}");
        }
    }
}
