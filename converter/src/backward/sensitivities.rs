//! How much the loss minds an error at each output of the linear layers.

use rayon::prelude::*;
use slim_formats::ModelSource;
use slim_kernels::{linalg::Precision, weight};

use super::{Backward, Gradient, Linear, Loss, block::add_up};
use crate::{ConvertError, Result};

/// Tokens that go through the model together.
const BATCH_TOKENS: usize = 1024;

/// Mean squared gradients of the loss at the outputs of the linear layers of all blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct Sensitivities {
    blocks: Vec<[Vec<f64>; 7]>,
    /// The loss: the mean negative log-likelihood of a predicted token, in nats.
    pub loss: f64,
}

impl Sensitivities {
    /// Of each output of the layer with this tensor, `[rows]`.
    ///
    /// # Panics
    /// If it is no linear layer of a block.
    pub fn of_tensor(&self, name: &str) -> &[f64] {
        let found = self.blocks.iter().enumerate().find_map(|(block, layers)| {
            let layer = Linear::ALL.into_iter().find(|layer| layer.tensor_name(block) == name)?;
            Some(layers[layer as usize].as_slice())
        });
        found.expect("a linear layer of a block")
    }

    /// Of each output of a layer, `[rows]`.
    pub fn of(&self, block: usize, layer: Linear) -> &[f64] {
        &self.blocks[block][layer as usize]
    }
}

/// The mean over all tokens of the squared gradient at each output of the linear layers, for the cross-entropy summed over
/// the tokens of a sample. `samples`: equally long runs of tokens.
///
/// # Errors
/// As [`Backward::load`] and [`Backward::run`]; `InvalidSetting` if the loss is not finite or there is nothing to predict.
pub fn sensitivities(source: &dyn ModelSource, samples: &[Vec<u32>]) -> Result<Sensitivities> {
    let model = Backward::load(source, Precision::Coarse)?;
    let context = samples.first().map_or(0, Vec::len);
    if context < 2 {
        return Err(ConvertError::InvalidSetting {
            what: "samples to measure sensitivities on",
            found: format!("{} of {context} tokens", samples.len()),
            expected: "one or more of at least 2 tokens".into(),
        });
    }
    let rows = |layer: Linear, weights: &[_; 7]| weight::shape(weights[layer as usize]).0;
    let mut blocks: Vec<[Vec<f64>; 7]> = model
        .blocks
        .iter()
        .map(|block| Linear::ALL.map(|layer| vec![0.0; rows(layer, &block.weights())]))
        .collect();
    let mut loss = 0.0;
    for batch in samples.chunks((BATCH_TOKENS / context).max(1)) {
        let sequences: Vec<&[u32]> = batch.iter().map(Vec::as_slice).collect();
        loss += model.run(&sequences, &mut Loss::CrossEntropy, &mut |gradient| {
            if let Gradient::Linear { block, layer, dy, .. } = gradient {
                let sum = &mut blocks[block][layer as usize];
                let squares = sum_squares(dy, sum.len());
                sum.iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
            }
            Ok(())
        })?;
    }
    loss /= (samples.len() * (context - 1)) as f64;
    if !loss.is_finite() {
        return Err(ConvertError::InvalidSetting {
            what: "loss of the model on the calibration samples",
            found: loss.to_string(),
            expected: "a finite number".into(),
        });
    }
    let tokens = (samples.len() * context) as f64;
    blocks.iter_mut().flatten().flatten().for_each(|sum| *sum /= tokens);
    Ok(Sensitivities { blocks, loss })
}

/// The sum over tokens of the squares of `dy: [tokens, rows]`.
fn sum_squares(dy: &[f32], rows: usize) -> Vec<f64> {
    const TOKENS: usize = 64;
    let pieces = dy.par_chunks(TOKENS * rows).map(|dy| {
        let mut sum = vec![0.0; rows];
        for token in dy.chunks_exact(rows) {
            for (sum, dy) in sum.iter_mut().zip(token) {
                *sum += f64::from(*dy) * f64::from(*dy);
            }
        }
        sum
    });
    add_up(pieces.collect(), rows)
}
