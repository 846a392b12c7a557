//! How much the loss minds errors in the embedding and the output layer.

use slim_kernels::linalg::{self, Precision};

use super::sensitivities::Sensitivity;
use crate::hessian::Hessian;

/// Of a matrix with a row for each token of the vocabulary: an error `e` in row `v` costs the loss
/// about `e H e^T` times the sensitivity of that row.
pub struct Vocabulary {
    /// Of each weight by itself, as that of a linear layer; an embedding counts as one whose
    /// outputs are the rows that are looked up, with their gradients for inputs.
    pub sensitivity: Sensitivity,
    /// The sum of `x^T x` over tokens, upper triangle, `[embedding, embedding]`; of rows that are
    /// too wide for it none.
    gram: Option<Vec<f32>>,
    tokens: usize,
}

impl Vocabulary {
    /// No tokens yet.
    pub fn zeros(vocab: usize, hidden: usize) -> Self {
        let gram = Some(vec![0.0; hidden * hidden]);
        Self { gram, ..Self::without_gram((vocab, hidden)) }
    }

    /// No tokens yet, of a matrix of this shape whose errors count each by itself.
    pub fn without_gram(shape: (usize, usize)) -> Self {
        Self { sensitivity: Sensitivity::zeros(shape), gram: None, tokens: 0 }
    }

    /// Adds tokens with inputs `x: [tokens, embedding]` of the output layer and gradients
    /// `dy: [tokens, vocab]` at their logits.
    pub fn add_output(&mut self, x: &[f32], dy: &[f32]) {
        self.sensitivity.add(x, dy);
        self.add_gram(x);
    }

    /// Adds `tokens` with gradients `dx: [tokens, embedding]` at their embeddings.
    pub fn add_embedding(&mut self, tokens: &[u32], dx: &[f32]) {
        self.sensitivity.add_rows(tokens, dx);
        self.add_gram(dx);
    }

    fn add_gram(&mut self, x: &[f32]) {
        let hidden = self.sensitivity.inputs.len();
        self.tokens += x.len() / hidden;
        if let Some(gram) = &mut self.gram {
            linalg::add_gram(Precision::Coarse, gram, x, hidden);
        }
    }

    /// Turns sums over tokens into means.
    pub fn divide(&mut self) {
        self.sensitivity.divide(self.tokens as f64);
    }

    /// Of a matrix that is both: costs add up.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let shares = [self, other].map(|part| part.total() / part.tokens as f64);
        let gram = self.gram.as_ref().zip(other.gram.as_ref()).map(|(own, other)| {
            let pairs = own.iter().zip(other);
            let sum =
                pairs.map(|(a, b)| (shares[0] * f64::from(*a) + shares[1] * f64::from(*b)) as f32);
            sum.collect()
        });
        // The sums are weighted by now.
        Self { sensitivity: self.sensitivity.plus(&other.sensitivity), gram, tokens: 1 }
    }

    /// The sensitivities of all rows.
    fn total(&self) -> f64 {
        self.sensitivity.outputs.iter().sum()
    }

    /// `H`, in the mean over all rows, if it is known; no scale matters.
    pub fn hessian(&self) -> Option<Hessian> {
        let hidden = self.sensitivity.inputs.len();
        let mut values = self.gram.clone()?;
        linalg::mirror_upper(&mut values, hidden);
        Some(Hessian::new(values, hidden))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The Hessian of a matrix that is embedding and output layer, and its sensitivity, tell what
    /// an error in all rows costs.
    #[test]
    fn costs_of_both_parts_add_up() {
        let (x, dy) = ([1.0, 2.0, 3.0, -1.0], [1.0, 0.0, -1.0, 0.0, 1.0, 1.0]);
        let (tokens, dx) = ([2, 0], [0.5, 1.0, 2.0, 0.0]);
        let [mut output, mut embedding] = [Vocabulary::zeros(3, 2), Vocabulary::zeros(3, 2)];
        output.add_output(&x[..2], &dy[..3]);
        output.add_output(&x[2..], &dy[3..]);
        embedding.add_embedding(&tokens, &dx);
        output.divide();
        embedding.divide();
        let both = embedding.plus(&output);

        let squares = |rows: &[f32], e: &[f32; 2]| -> f64 {
            let squares = rows.chunks_exact(2).map(|row| (row[0] * e[0] + row[1] * e[1]).powi(2));
            squares.map(f64::from).sum::<f64>() / 2.0
        };
        // Two logits of each token have a gradient of 1.
        let exact = |e: &[f32; 2]| 2.0 * squares(&x, e) + squares(&dx, e);
        for e in [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, -2.0]] {
            assert!(
                (both.hessian().unwrap().quadratic(&e) / exact(&e) - 1.0).abs() < 1e-6,
                "{e:?}"
            );
        }
        let Sensitivity { inputs, outputs } = &both.sensitivity;
        let total: f64 = outputs.iter().sum();
        for (input, e) in inputs.iter().zip([[1.0, 0.0], [0.0, 1.0]]) {
            assert!((input * total / exact(&e) - 1.0).abs() < 1e-9, "{e:?}");
        }
        // The mean square of an input is 7.5, that of a gradient 2.625; rows 0 and 2 are looked up
        // once each in two tokens.
        assert_eq!(*outputs, [0.5 * 7.5 + 0.5 * 2.625, 0.5 * 7.5, 7.5 + 0.5 * 2.625]);
    }
}
