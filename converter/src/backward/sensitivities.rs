//! How much the loss minds errors in the weights of the linear layers.

use std::{collections::HashMap, ops::Range};

use rayon::prelude::*;
use slim_formats::{ModelSource, Part, PartMap, arch::ExpertPart};
use slim_kernels::linalg::Precision;

use super::{Backward, Gradient, Loss, Vocabulary, block::add_up};
use crate::{
    ConvertError, Result,
    calibrator::ENOUGH_TOKENS,
    rows::{OutputHessian, hang_together},
};

/// Tokens that go through the model together.
pub const BATCH_TOKENS: usize = 1024;

/// Tokens that sensitivities are measured on: such means settle long before a Hessian does.
const TOKENS: usize = 1 << 15;

/// How many of `samples` samples of `context` tokens are measured on.
pub fn sensitivity_samples(samples: usize, context: usize) -> usize {
    samples.min((TOKENS / context).max(1))
}

/// Samples in batches that go through the model together.
pub fn sensitivity_batches(samples: &[Vec<u32>]) -> std::slice::Chunks<'_, Vec<u32>> {
    let context = samples.first().map_or(1, |sample| sample.len().max(1));
    samples.chunks((BATCH_TOKENS / context).max(1))
}

/// How much the loss minds errors in the matrices of a model.
pub struct Sensitivities {
    /// The linear layers of the blocks.
    pub blocks: Vec<PartMap<Sensitivity>>,
    /// How errors at their outputs add up, by the names of their tensors, where rows are to make up
    /// for each other's errors.
    pub outputs: HashMap<String, OutputHessian>,
    /// The embedding and the output layer, if they are not one matrix, and the embedding of what
    /// tokens say to blocks.
    pub vocabulary: PartMap<Vocabulary>,
}

/// How much it minds errors in the weights of a layer: about as much as their squares times both
/// means, that of the weight's input and that of its output.
///
/// Exactly it is the mean of the product of both squares. The tokens of the first mean are weighted
/// by their gradients, so that at least the sum of the products over all outputs is right: inputs
/// that are large where nothing depends on the layer count for little.
#[derive(Debug, Clone, PartialEq)]
pub struct Sensitivity {
    /// The mean square of each input, `[cols]`; each token counts as much as the sum of its squared
    /// gradients at all outputs.
    pub inputs: Vec<f64>,
    /// The mean squared gradient of the loss at each output, `[rows]`.
    pub outputs: Vec<f64>,
}

impl Sensitivity {
    /// Of a band of the layer.
    pub fn of_rows(&self, rows: Range<usize>) -> Self {
        Self { inputs: self.inputs.clone(), outputs: self.outputs[rows].to_vec() }
    }

    /// Of two layers that are one matrix; the sums of products over all outputs, and over all
    /// inputs, are right.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let totals = [self, other].map(|part| part.outputs.iter().sum::<f64>());
        let inputs = [self, other].map(|part| part.inputs.iter().sum::<f64>());
        let outputs = self.outputs.iter().zip(&other.outputs);
        let outputs: Vec<f64> = outputs.map(|(a, b)| inputs[0] * a + inputs[1] * b).collect();
        let total = outputs.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let inputs = self.inputs.iter().zip(&other.inputs);
        let inputs = inputs.map(|(a, b)| (totals[0] * a + totals[1] * b) / total);
        Self { inputs: inputs.collect(), outputs }
    }

    /// The mean of layers of one shape, if there are any.
    fn mean(layers: &[&Self]) -> Option<Self> {
        let first = layers.first()?;
        let mean = |of: fn(&Self) -> &[f64], len: usize| {
            let at = |index: usize| layers.iter().map(|layer| of(layer)[index]).sum::<f64>();
            (0..len).map(|index| at(index) / layers.len() as f64).collect()
        };
        let inputs = mean(|layer| &layer.inputs, first.inputs.len());
        let outputs = mean(|layer| &layer.outputs, first.outputs.len());
        Some(Self { inputs, outputs })
    }

    /// Zeros for a layer `[rows, cols]`.
    pub(super) fn zeros((rows, cols): (usize, usize)) -> Self {
        Self { inputs: vec![0.0; cols], outputs: vec![0.0; rows] }
    }

    /// Adds the squares of tokens with inputs `x: [tokens, cols]` and gradients
    /// `dy: [tokens, rows]`.
    pub(super) fn add(&mut self, x: &[f32], dy: &[f32]) {
        let tokens = dy.par_chunks_exact(self.outputs.len());
        let of_token = tokens.map(|dy| dy.iter().copied().map(square).sum());
        let of_token: Vec<f64> = of_token.collect();
        add_squares(&mut self.inputs, x, &of_token);
        add_squares(&mut self.outputs, dy, &vec![1.0; of_token.len()]);
    }

    /// Adds the squares of tokens with inputs `x: [tokens, cols]`, each of which has one output,
    /// its row, with a gradient of 1.
    pub(super) fn add_rows(&mut self, rows: &[u32], x: &[f32]) {
        add_squares(&mut self.inputs, x, &vec![1.0; rows.len()]);
        rows.iter().for_each(|&row| self.outputs[row as usize] += 1.0);
    }

    /// Refuses means that are no numbers.
    fn check(&self) -> Result<()> {
        match self.inputs.iter().chain(&self.outputs).find(|mean| !mean.is_finite()) {
            None => Ok(()),
            Some(found) => {
                let found = format!("a mean square of {found} on the calibration text");
                Err(ConvertError::numerical(found, "finite activations and gradients"))
            }
        }
    }

    /// Turns the sums over `tokens` tokens into means.
    pub(super) fn divide(&mut self, tokens: f64) {
        // It is zero where nothing depends on the layer.
        let gradients = self.outputs.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        self.inputs.iter_mut().for_each(|sum| *sum /= gradients);
        self.outputs.iter_mut().for_each(|sum| *sum /= tokens);
    }
}

/// The means over all tokens of the squared inputs of the linear layers, and of the squared
/// gradients at their outputs, for the loss [`Loss::Fisher`], and the output Hessians: in memory,
/// or in temporary files where they take more than `memory_left` bytes. `samples`: equally long
/// runs of tokens. `on_batch` is called with the tokens of each batch that is done.
///
/// The negative log-likelihood of what the text has behind each token would do, too, but the model
/// errs in some places by far, and these would outweigh all others (`docs/notes/accuracy.md` has
/// the effect).
///
/// # Errors
/// As [`Backward::load`] and [`Backward::run`]; `InvalidSetting` if there are no tokens;
/// `Numerical` for a loss, activations or gradients that are no numbers; `Format` if a temporary
/// file cannot be made.
pub fn sensitivities(
    source: &dyn ModelSource,
    samples: &[Vec<u32>],
    memory_left: &mut u64,
    on_batch: &mut dyn FnMut(usize),
) -> Result<Sensitivities> {
    let model = Backward::load(source, Precision::Coarse)?;
    let context = samples.first().map_or(0, Vec::len);
    if context == 0 {
        return Err(ConvertError::InvalidSetting {
            what: "samples to measure sensitivities on",
            found: format!("{} of {context} tokens", samples.len()),
            expected: "one or more of at least 1 token".into(),
        });
    }
    let decoder = source.decoder();
    let mut blocks = vec![PartMap::new(); decoder.blocks.len()];
    let mut outputs = HashMap::new();
    for tensor in decoder.tensors().iter().filter(|tensor| tensor.is_linear()) {
        let (Some(block), shape) = (tensor.block, tensor.shape()) else { continue };
        blocks[block].insert(tensor.part, Sensitivity::zeros(shape));
        if hang_together(tensor) {
            outputs.insert(tensor.name.clone(), OutputHessian::zeros(shape.0, memory_left)?);
        }
    }
    let rows = || Vocabulary::zeros(decoder.vocab_size, decoder.embedding_size);
    let (mut embedding, mut output) = (rows(), rows());
    let to_blocks = decoder.outside(Part::BlockEmbedding);
    let mut to_blocks = to_blocks.map(|table| Vocabulary::without_gram(table.shape()));
    let mut seen = vec![PartMap::<usize>::new(); decoder.blocks.len()];
    let mut seed = 0;
    for batch in sensitivity_batches(samples) {
        let sequences: Vec<&[u32]> = batch.iter().map(Vec::as_slice).collect();
        let entropy = model.run(&sequences, &mut Loss::Fisher(seed), &mut |gradient| {
            match gradient {
                Gradient::Linear { block, part, x, dy } => {
                    blocks[block][part].add(x, dy);
                    let tokens = dy.len() / blocks[block][part].outputs.len();
                    let before = seen[block].get(part).copied().unwrap_or(0);
                    seen[block].insert(part, before + tokens);
                    if let Some(hessian) = outputs.get_mut(&decoder.tensor(block, part).name) {
                        hessian.add(dy);
                    }
                }
                Gradient::Output { x, dy } => output.add_output(x, dy),
                Gradient::Embedding(dx) => embedding.add_embedding(&sequences.concat(), dx),
                Gradient::BlockEmbedding(dx) => {
                    let to_blocks = to_blocks.as_mut().expect("a model with such a table");
                    to_blocks.add_embedding(&sequences.concat(), dx);
                }
                Gradient::Norm { .. } => {}
            }
            Ok(())
        })?;
        if !entropy.is_finite() {
            let found = format!("an entropy of {entropy} on the calibration text");
            return Err(
                ConvertError::numerical(found, "finite logits").of_layer(&decoder.output().name)
            );
        }
        seed += (batch.len() * context) as u64;
        on_batch(batch.len() * context);
    }
    let tokens = (samples.len() * context) as f64;
    for (block, layers) in blocks.iter_mut().enumerate() {
        for (part, sensitivity) in layers.iter_mut() {
            sensitivity.divide(tokens);
            let name = &decoder.tensor(block, part).name;
            sensitivity.check().map_err(|error| error.of_layer(name))?;
        }
        fill_in_experts(layers, &seen[block]);
    }
    embedding.divide();
    output.divide();
    let mut vocabulary = match decoder.has_tied_embeddings() {
        true => PartMap::from_iter([(Part::Embedding, embedding.plus(&output))]),
        false => PartMap::from_iter([(Part::Embedding, embedding), (Part::Output, output)]),
    };
    if let Some(mut to_blocks) = to_blocks {
        to_blocks.divide();
        vocabulary.insert(Part::BlockEmbedding, to_blocks);
    }
    Ok(Sensitivities { blocks, outputs, vocabulary })
}

/// Takes experts that have `seen` too few tokens for experts like the others of the block: nothing
/// tells that other texts do not need them.
fn fill_in_experts(layers: &mut PartMap<Sensitivity>, seen: &PartMap<usize>) {
    for kind in [ExpertPart::Gate, ExpertPart::Up, ExpertPart::Down] {
        let is_of_kind = |part: Part| matches!(part, Part::Expert(_, found) if found == kind);
        let is_known = |part: Part| seen.get(part).is_some_and(|&seen| seen >= ENOUGH_TOKENS);
        let of_kind = || layers.iter().filter(|&(part, _)| is_of_kind(part));
        let known: Vec<&Sensitivity> =
            of_kind().filter(|&(part, _)| is_known(part)).map(|(_, found)| found).collect();
        let Some(mean) = Sensitivity::mean(&known) else { continue };
        let unknown = layers.iter_mut().filter(|&(part, _)| is_of_kind(part) && !is_known(part));
        unknown.for_each(|(_, sensitivity)| *sensitivity = mean.clone());
    }
}

/// Adds the squares of `values: [tokens, sum.len()]`, times the weights of their tokens.
fn add_squares(sum: &mut [f64], values: &[f32], weights: &[f64]) {
    const TOKENS: usize = 64;
    let n = sum.len();
    let pieces = values.par_chunks(TOKENS * n).zip(weights.par_chunks(TOKENS));
    let sums = pieces.map(|(values, weights)| {
        let mut sum = vec![0.0; n];
        for (token, weight) in values.chunks_exact(n).zip(weights) {
            for (sum, &value) in sum.iter_mut().zip(token) {
                *sum += weight * square(value);
            }
        }
        sum
    });
    let added = add_up(sums.collect(), n);
    sum.iter_mut().zip(added).for_each(|(sum, added)| *sum += added);
}

fn square(value: f32) -> f64 {
    f64::from(value) * f64::from(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_that_nothing_depends_on_has_zeros_not_nan() {
        let mut layer = Sensitivity::zeros((2, 3));
        layer.add(&[1.0; 12], &[0.0; 8]);
        layer.divide(4.0);
        assert_eq!(layer, Sensitivity::zeros((2, 3)));
    }

    #[test]
    fn products_of_both_means_add_up_to_the_mean_of_the_products() {
        let (x, dy) = ([1.0, 2.0, 3.0, 0.5, 0.0, 4.0], [0.5, 2.0, 1.0, 0.0]);
        let mut layer = Sensitivity::zeros((2, 3));
        layer.add(&x, &dy);
        layer.divide(2.0);
        let outputs: f64 = layer.outputs.iter().sum();
        for (col, input) in layer.inputs.iter().enumerate() {
            let exact = (4.25 * square(x[col]) + square(x[3 + col])) / 2.0;
            assert!((input * outputs / exact - 1.0).abs() < 1e-12, "column {col}: {input}");
        }
    }
}
