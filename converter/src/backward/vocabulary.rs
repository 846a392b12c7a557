//! How much the loss minds errors in the embedding and the output layer.

use slim_kernels::linalg::{self, Precision};

use super::sensitivities::Sensitivity;
use crate::hessian::Hessian;

/// Of a matrix with a row for each token of the vocabulary: an error `e` in row `v` costs the loss about `e H e^T` times the
/// sensitivity of that row.
pub struct Vocabulary {
    /// Of each weight by itself, as that of a linear layer; an embedding counts as one whose outputs are the rows that are looked
    /// up, with their gradients for inputs.
    pub sensitivity: Sensitivity,
    /// The sum of `x^T x` over tokens, upper triangle, `[hidden, hidden]`.
    gram: Vec<f32>,
    tokens: usize,
}

impl Vocabulary {
    /// No tokens yet.
    pub fn zeros(vocab: usize, hidden: usize) -> Self {
        let sensitivity = Sensitivity::zeros((vocab, hidden));
        Self { sensitivity, gram: vec![0.0; hidden * hidden], tokens: 0 }
    }

    /// Adds tokens with inputs `x: [tokens, hidden]` of the output layer and gradients `dy: [tokens, vocab]` at their logits.
    pub fn add_output(&mut self, x: &[f32], dy: &[f32]) {
        self.sensitivity.add(x, dy);
        self.add_gram(x);
    }

    /// Adds `tokens` with gradients `dx: [tokens, hidden]` at their embeddings.
    pub fn add_embedding(&mut self, tokens: &[u32], dx: &[f32]) {
        self.sensitivity.add_rows(tokens, dx);
        self.add_gram(dx);
    }

    fn add_gram(&mut self, x: &[f32]) {
        let hidden = self.sensitivity.inputs.len();
        self.tokens += x.len() / hidden;
        linalg::add_gram(Precision::Coarse, &mut self.gram, x, hidden);
    }

    /// Turns sums over tokens into means.
    pub fn divide(&mut self) {
        self.sensitivity.divide(self.tokens as f64);
    }

    /// Of a matrix that is both: costs add up.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let shares = [self, other].map(|part| part.total() / part.tokens as f64);
        let gram = self.gram.iter().zip(&other.gram);
        let gram =
            gram.map(|(a, b)| (shares[0] * f64::from(*a) + shares[1] * f64::from(*b)) as f32);
        // The sums are weighted by now.
        Self {
            sensitivity: self.sensitivity.plus(&other.sensitivity),
            gram: gram.collect(),
            tokens: 1,
        }
    }

    /// The sensitivities of all rows.
    fn total(&self) -> f64 {
        self.sensitivity.outputs.iter().sum()
    }

    /// `H`, in the mean over all rows; no scale matters.
    pub fn hessian(&self) -> Hessian {
        let hidden = self.sensitivity.inputs.len();
        let mut values = self.gram.clone();
        linalg::mirror_upper(&mut values, hidden);
        Hessian::new(values, hidden)
    }
}
