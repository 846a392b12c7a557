//! What is trained, and how: Adam.

use slim_kernels::per_isa;

/// Numbers being trained, with their running means.
#[derive(Clone)]
pub struct Parameters {
    /// As they are.
    pub values: Vec<f32>,
    /// Of the gradients.
    mean: Vec<f32>,
    /// Of the squares of the gradients.
    mean_square: Vec<f32>,
}

impl Parameters {
    /// Starts at `values`.
    pub fn new(values: Vec<f32>) -> Self {
        let zeros = vec![0.0; values.len()];
        Self { values, mean: zeros.clone(), mean_square: zeros }
    }

    /// All that the next step goes by.
    pub fn numbers(&self) -> [&[f32]; 3] {
        [&self.values, &self.mean, &self.mean_square]
    }

    /// As [`Self::numbers`].
    pub fn numbers_mut(&mut self) -> [&mut [f32]; 3] {
        [&mut self.values, &mut self.mean, &mut self.mean_square]
    }

    /// Moves each value by about `rate` against its gradient; `step` counts from 1.
    ///
    /// # Source
    /// Algorithm 1 of arXiv:1412.6980, with its constants but the last: gradients of scales are
    /// small, and smaller the larger the model is.
    pub fn step(&mut self, gradient: &[f32], rate: f32, step: usize) {
        let unbiased = |beta: f32| 1.0 / (1.0 - f64::from(beta).powf(step as f64)) as f32;
        let scales = (unbiased(BETA), unbiased(BETA_SQUARE));
        adam(&mut self.values, &mut self.mean, &mut self.mean_square, gradient, rate, scales);
    }
}

const BETA: f32 = 0.9;
const BETA_SQUARE: f32 = 0.999;
const EPSILON: f32 = 1e-12;

per_isa! {
    /// `scales` undo the start of the means at zero.
    fn adam(values: &mut [f32], means: &mut [f32], mean_squares: &mut [f32], gradient: &[f32], rate: f32, scales: (f32, f32)) {
        for (((value, mean), square), g) in values.iter_mut().zip(means).zip(mean_squares).zip(gradient) {
            *mean = BETA * *mean + (1.0 - BETA) * g;
            *square = BETA_SQUARE * *square + (1.0 - BETA_SQUARE) * g * g;
            *value -= rate * (*mean * scales.0) / ((*square * scales.1).sqrt() + EPSILON);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_step_is_the_rate_whatever_the_size_of_the_gradient() {
        let mut parameters = Parameters::new(vec![1.0; 4]);
        parameters.step(&[2.0, -3e-3, 1e-7, 0.0], 0.1, 1);
        for (value, expected) in parameters.values.iter().zip([0.9, 1.1, 0.9, 1.0]) {
            assert!((value - expected).abs() < 1e-4, "{value} for {expected}");
        }
    }

    #[test]
    fn parabola_ends_at_its_minimum() {
        let mut parameters = Parameters::new(vec![3.0]);
        for step in 1..=400 {
            let gradient = 2.0 * (parameters.values[0] - 1.0);
            parameters.step(&[gradient], 0.05 * (1.0 - step as f32 / 400.0), step);
        }
        assert!((parameters.values[0] - 1.0).abs() < 1e-2, "{}", parameters.values[0]);
    }
}
