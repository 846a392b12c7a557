//! Gradients of a loss: a model run forward, then walked backwards block by block.
//!
//! The way forward keeps one residual stream per block; on the way back a block is computed again
//! with all that its gradients need (`block.rs`), so that one block's activations live at a time.
//! Gradients are handed to a visitor and forgotten.

mod attention;
mod block;
mod delta_net;
mod elementwise;
mod mixer;
mod network;
mod networks;
mod product;
mod sensitivities;
mod shared;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::ops::Range;

use rayon::prelude::*;
use slim_formats::{DType, Decoder, DenseTensor, Layout, ModelSource, Part, Weight, arch::Norm};
use slim_kernels::{FloatCpu, kl_divergence, linalg::Precision, log_softmax};
use slim_runtime::{Block, Context, Ends, SplitMix64, ToBlocks, finish_logits};

use self::shared::Shared;
use crate::{ConvertError, Result};
pub use product::weight_gradient;
pub use sensitivities::{
    BATCH_TOKENS, Sensitivities, Sensitivity, sensitivities, sensitivity_batches,
    sensitivity_samples,
};
pub use vocabulary::Vocabulary;

/// Tokens whose logits are held at a time.
const LOGIT_TOKENS: usize = 512;

/// A model whose gradients are wanted. Any part can be replaced by another of the same shape.
#[derive(Clone)]
pub struct Backward<'a> {
    /// Of the products of both passes.
    pub precision: Precision,
    /// What it computes.
    pub decoder: &'a Decoder,
    /// The transformer blocks.
    pub blocks: Vec<Block<'a>>,
    /// What stands before and behind them.
    pub ends: Ends<'a>,
    /// What lets go of the parts' pages when a block has been passed; `None` if they are in memory.
    pub source: Option<&'a dyn ModelSource>,
}

/// What is differentiated.
pub enum Loss<'t> {
    /// The entropy behind each position, summed, in nats. Its gradients are random instead, by the
    /// seeds from this one on: the mean of their squares is the Fisher information, the curvature
    /// of KL(model || model with other weights).
    Fisher(u64),
    /// The mean over all tokens of KL(teacher || model), in nats. Called with a range of the tokens
    /// of the batch, counted through its sequences, the teacher gives their logits or
    /// log-probabilities, `[range.len(), vocab]`.
    Divergence(&'t mut dyn FnMut(Range<usize>) -> Result<Vec<f32>>),
}

/// What a visitor is told, from the output of the model to its input.
#[derive(Clone, Copy)]
pub enum Gradient<'g> {
    /// Of a linear layer `y = x w^T`.
    Linear {
        /// The block it is in.
        block: usize,
        /// Which layer of the block.
        part: Part,
        /// Its inputs, `[tokens, cols]`.
        x: &'g [f32],
        /// The gradient of the loss at its outputs, `[tokens, rows]`; of `attn_q` and `attn_k`,
        /// before the rotation.
        dy: &'g [f32],
    },
    /// Of a norm.
    Norm {
        /// The block it is in; `None` for the last one.
        block: Option<usize>,
        /// Which norm of the block.
        part: Part,
        /// The gradient of the loss at its weights.
        dw: &'g [f64],
    },
    /// Of the output layer `y = x w^T`, some tokens after the others.
    Output {
        /// Its inputs, `[tokens, embedding]`.
        x: &'g [f32],
        /// The gradient of the loss at its outputs, the logits before they are scaled and capped,
        /// `[tokens, vocab]`.
        dy: &'g [f32],
    },
    /// The gradient of the loss at the embeddings of all tokens, `[tokens, embedding]`.
    Embedding(&'g [f32]),
    /// The gradient of the loss at the rows of [`Part::BlockEmbedding`] of all tokens,
    /// `[tokens, blocks * embedded]`.
    BlockEmbedding(&'g [f32]),
}

/// What is called with each gradient.
pub type Visitor<'v> = dyn FnMut(Gradient<'_>) -> Result<()> + 'v;

impl<'a> Backward<'a> {
    /// The model as it is in its source, with products of this precision.
    ///
    /// # Errors
    /// `Runtime` if a tensor is missing or has the wrong shape.
    pub fn load(source: &'a dyn ModelSource, precision: Precision) -> Result<Self> {
        let decoder = source.decoder();
        let ends = Ends::load(source)?;
        let blocks = (0..decoder.blocks.len())
            .map(|index| Ok(Block::load(source, index)?))
            .collect::<Result<_>>()?;
        Ok(Self { precision, decoder, blocks, ends, source: Some(source) })
    }

    /// Computes the loss on equally long `sequences` of tokens and hands its gradients to `visit`,
    /// from the last layer to the first.
    ///
    /// # Memory
    /// In floats, `tokens * hidden` per block, the activations of one block, and 512 tokens' logits
    /// up to three times.
    ///
    /// # Errors
    /// `InvalidSetting` if the sequences are empty or not equally long; `Runtime` for a token
    /// outside the vocabulary; `Kernel` for a weight that is not a number; `Numerical` for
    /// activations that are none; those of the visitor and of the teacher.
    pub fn run(
        &self,
        sequences: &[&[u32]],
        loss: &mut Loss<'_>,
        visit: &mut Visitor<'_>,
    ) -> Result<f64> {
        let context = equal_length(sequences)?;
        let mut residuals = vec![self.embed(sequences)?];
        let embedded = self.ends.embedded(self.context(), &sequences.concat(), &residuals[0])?;
        let mut shared = Shared::default();
        for index in 0..self.blocks.len() {
            let walk = self.walk(index, context, embedded.of_block(index));
            let output = walk.forward(&residuals[index], &mut shared)?;
            check_finite(index, &output)?;
            residuals.push(output);
            self.release_pages();
        }
        let x = residuals.pop().expect("the output of the last block");
        let (loss, mut dx) = self.reverse_output(&x, loss, visit)?;
        drop(x);
        self.release_pages();
        let mut d_embedded = Vec::new();
        let mut x = Vec::new();
        for index in (0..self.blocks.len()).rev() {
            x = residuals.pop().expect("the input of each block");
            let walk = self.walk(index, context, embedded.of_block(index));
            d_embedded.push(walk.reverse(&x, &mut dx, &mut shared, visit)?);
            self.release_pages();
        }
        if let Some(to_blocks) = &self.ends.to_blocks {
            d_embedded.reverse();
            self.reverse_to_blocks(to_blocks, &x, &d_embedded, &mut dx, visit)?;
        }
        if let Some(up) = self.ends.up {
            dx = product::reverse(self.precision, &dx, up)?;
        }
        let scale = self.decoder.embedding_scale;
        if scale != 1.0 {
            dx.iter_mut().for_each(|dx| *dx *= scale);
        }
        visit(Gradient::Embedding(&dx))?;
        Ok(loss)
    }

    fn embed(&self, sequences: &[&[u32]]) -> Result<Vec<f32>> {
        let embedded = sequences.iter().map(|tokens| self.ends.embed(self.context(), tokens, 0));
        Ok(embedded.collect::<slim_runtime::Result<Vec<_>>>()?.concat())
    }

    /// What the output layer takes in for equally long `sequences` of tokens,
    /// `[tokens, embedding]`.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn states(&self, sequences: &[&[u32]]) -> Result<Vec<f32>> {
        let context = equal_length(sequences)?;
        let mut x = self.embed(sequences)?;
        let embedded = self.ends.embedded(self.context(), &sequences.concat(), &x)?;
        let mut shared = Shared::default();
        for index in 0..self.blocks.len() {
            x = self.walk(index, context, embedded.of_block(index)).forward(&x, &mut shared)?;
            check_finite(index, &x)?;
            self.release_pages();
        }
        Ok(self.ends.states(self.context(), &x)?)
    }

    /// The logits `[m, vocab]` of what the output layer takes in, `[m, embedding]`.
    ///
    /// # Errors
    /// `Kernel` for a weight that is not a number.
    pub fn logits(&self, states: &[f32]) -> Result<Vec<f32>> {
        let mut logits = product::linear(self.precision, self.ends.output, states)?;
        finish_logits(self.decoder, &mut logits);
        Ok(logits)
    }

    fn release_pages(&self) {
        if let Some(source) = self.source {
            source.release_pages();
        }
    }

    fn walk<'w>(&'w self, index: usize, context: usize, embedded: &'w [f32]) -> block::Walk<'w> {
        let Self { precision, decoder, blocks, .. } = self;
        let (precision, block) = (*precision, &blocks[index]);
        block::Walk { precision, decoder, block, index, context, embedded }
    }

    /// Adds the gradient at the embeddings `x: [tokens, hidden]` of what they say to blocks to
    /// `dx`, for the gradients `d_embedded` at that, `[tokens, embedded]` of each block.
    fn reverse_to_blocks(
        &self,
        to_blocks: &ToBlocks<'_>,
        x: &[f32],
        d_embedded: &[Vec<f32>],
        dx: &mut [f32],
        visit: &mut Visitor<'_>,
    ) -> Result<()> {
        let (width, tokens) = (to_blocks.norm.len(), x.len() / self.decoder.hidden_size);
        let row = |t: usize| d_embedded.iter().flat_map(move |d| &d[t * width..][..width]);
        let d_normed: Vec<f32> = (0..tokens).flat_map(row).map(|d| ToBlocks::MEAN * d).collect();
        let own_scale = ToBlocks::own_scale(width);
        let d_own: Vec<f32> = d_normed.iter().map(|d| own_scale * d).collect();
        visit(Gradient::BlockEmbedding(&d_own))?;
        let added = to_blocks.added(self.context(), x)?;
        let (norm, epsilon) = (&to_blocks.norm, self.decoder.norm_epsilon);
        let mut d_added = vec![0.0; added.len()];
        let dw = block::reverse_norm(Norm::Rms, &added, norm, epsilon, &d_normed, &mut d_added);
        visit(Gradient::Norm { block: None, part: Part::BlockEmbeddingNorm, dw: &dw })?;
        let scale = ToBlocks::added_scale(self.decoder);
        d_added.iter_mut().for_each(|d| *d *= scale);
        product::add(self.precision, dx, &d_added, to_blocks.up)
    }

    fn context(&self) -> Context<'_> {
        Context { decoder: self.decoder, backend: &FloatCpu(Precision::Fine) }
    }

    /// The loss, and its gradient at the output `x: [tokens, hidden]` of the last block.
    fn reverse_output(
        &self,
        x: &[f32],
        loss: &mut Loss<'_>,
        visit: &mut Visitor<'_>,
    ) -> Result<(f64, Vec<f32>)> {
        let Decoder { embedding_size: width, vocab_size: vocab, norm_epsilon, .. } = *self.decoder;
        let states = self.ends.states(self.context(), x)?;
        let count = states.len() / width;
        let mut d_states = vec![0.0; states.len()];
        let mut total = 0.0;
        for first in (0..count).step_by(LOGIT_TOKENS) {
            let tokens = first..count.min(first + LOGIT_TOKENS);
            let piece = tokens.start * width..tokens.end * width;
            let mut logits = self.logits(&states[piece.clone()])?;
            let capped = self.decoder.logit_softcap.map(|cap| (logits.clone(), cap));
            total += match loss {
                Loss::Fisher(seed) => {
                    reverse_fisher(&mut logits, vocab, *seed + tokens.start as u64)
                }
                Loss::Divergence(teacher) => {
                    let teacher = teacher(tokens.clone())?;
                    reverse_divergence(&mut logits, vocab, teacher, count)
                }
            };
            if let Some((capped, cap)) = capped {
                elementwise::reverse_cap(&capped, cap, &mut logits);
            }
            if self.decoder.logit_scale != 1.0 {
                logits.iter_mut().for_each(|d_logit| *d_logit *= self.decoder.logit_scale);
            }
            visit(Gradient::Output { x: &states[piece.clone()], dy: &logits })?;
            product::add(self.precision, &mut d_states[piece], &logits, self.ends.output)?;
        }
        let d_normed = match self.ends.down {
            Some(down) => product::reverse(self.precision, &d_states, down)?,
            None => d_states,
        };
        let (Some(norm), Some(weight)) = (self.decoder.norm, &self.ends.norm) else {
            return Ok((total, d_normed));
        };
        let mut dx = vec![0.0; x.len()];
        let dw = block::reverse_norm(norm, x, weight, norm_epsilon, &d_normed, &mut dx);
        visit(Gradient::Norm { block: None, part: Part::OutputNorm, dw: &dw })?;
        Ok((total, dx))
    }
}

/// Refuses outputs of a block that are out of range: what follows would be no numbers, either.
fn check_finite(block: usize, output: &[f32]) -> Result<()> {
    match output.iter().find(|value| !value.is_finite()) {
        None => Ok(()),
        Some(found) => Err(ConvertError::Numerical {
            layer: format!("blk.{block}"),
            found: format!("{found} in its output on the calibration text"),
            expected: "finite activations",
        }),
    }
}

/// The tokens of each sequence.
fn equal_length(sequences: &[&[u32]]) -> Result<usize> {
    let context = sequences.first().map_or(0, |sequence| sequence.len());
    if context == 0 || sequences.iter().any(|sequence| sequence.len() != context) {
        let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.len()).collect();
        return Err(ConvertError::InvalidSetting {
            what: "tokens in sequences",
            found: format!("{lengths:?}"),
            expected: "equal lengths of at least 1".into(),
        });
    }
    Ok(context)
}

/// A borrowed matrix `[rows, cols]` as the weight of a layer.
///
/// # Panics
/// If `values` has another length.
pub fn dense(values: &[f32], rows: usize, cols: usize) -> Weight<'_> {
    assert_eq!(values.len(), rows * cols);
    let (dtype, bytes) = (DType::F32, bytemuck::cast_slice(values));
    Weight::Dense(DenseTensor { dtype, rows, cols, bytes, layout: Layout::AsStored, scales: None })
}

/// Turns logits `[m, vocab]` into random gradients whose covariance is that of `softmax - one-hot`
/// for a token that the model draws, `diag(p) - p^T p`; gives the entropy.
///
/// With signs `e`, `g = sqrt(p) e - p sum(sqrt(p) e)`. Where the model is nearly certain, these are
/// always small, where those of drawn tokens are mostly zero and rarely large: their squares come
/// to their mean in far fewer tokens.
fn reverse_fisher(logits: &mut [f32], vocab: usize, seed: u64) -> f64 {
    let entropies = logits.par_chunks_mut(vocab).enumerate().map(|(i, row)| {
        log_softmax(row);
        let mut random = SplitMix64::new(seed + i as u64);
        let signed = row
            .chunks_mut(u64::BITS as usize)
            .map(|values| elementwise::signed_roots(values, random.bits()));
        let entropy = signed.sum();
        let sum = row.iter().map(|&root| f64::from(root)).sum::<f64>() as f32;
        row.iter_mut().for_each(|root| *root -= *root * *root * sum);
        entropy
    });
    entropies.collect::<Vec<f64>>().iter().sum()
}

/// Turns logits `[m, vocab]` into gradients `(softmax - teacher's softmax) / tokens`; gives these
/// tokens' part of the loss.
fn reverse_divergence(
    logits: &mut [f32],
    vocab: usize,
    mut teacher: Vec<f32>,
    tokens: usize,
) -> f64 {
    assert_eq!(teacher.len(), logits.len(), "the teacher's logits");
    let share = 1.0 / tokens as f32;
    let rows = logits.par_chunks_mut(vocab).zip(teacher.par_chunks_mut(vocab));
    let losses = rows.map(|(row, teacher)| {
        log_softmax(row);
        log_softmax(teacher);
        let loss = kl_divergence(teacher, row);
        elementwise::reverse_divergence(row, teacher, share);
        loss
    });
    losses.collect::<Vec<f64>>().iter().sum::<f64>() / tokens as f64
}
