//! What stands before the first block and behind the last: embedding, norm, output layer.

use slim_formats::{Decoder, ModelSource, Part, Weight, arch::FIRST_POSITION};
use slim_kernels::{cap, weight};

use crate::{
    Result, RuntimeError,
    block::{Context, find_vector, find_weight, linear, norm, scale},
};

/// The tensors outside of blocks.
#[derive(Clone)]
pub struct Ends<'a> {
    /// `[vocab, hidden]`.
    pub embedding: Weight<'a>,
    /// `[positions, hidden]`, of models that learn them.
    pub positions: Option<Weight<'a>>,
    /// `[hidden]`.
    pub norm: Vec<f32>,
    /// `[hidden]`, of models whose norm has one.
    pub norm_bias: Option<Vec<f32>>,
    /// `[vocab, hidden]`; the embedding itself in models that tie them.
    pub output: Weight<'a>,
}

impl<'a> Ends<'a> {
    /// Finds the tensors.
    ///
    /// # Errors
    /// `Malformed` if one is missing or has the wrong shape.
    pub fn load(source: &'a dyn ModelSource) -> Result<Self> {
        let decoder = source.decoder();
        let positions = decoder.outside(Part::Positions);
        let norm_bias = decoder.outside(Part::OutputNormBias);
        Ok(Self {
            embedding: find_weight(source, decoder.embedding())?,
            positions: positions.map(|tensor| find_weight(source, tensor)).transpose()?,
            norm: find_vector(source, decoder.output_norm())?,
            norm_bias: norm_bias.map(|tensor| find_vector(source, tensor)).transpose()?,
            output: find_weight(source, decoder.output())?,
        })
    }

    /// Refuses tokens outside of the vocabulary, and positions without an embedding; the first
    /// token stands at `start`.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub(crate) fn check(&self, tokens: &[u32], start: usize) -> Result<()> {
        let vocab = weight::shape(self.embedding).0;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            let expected = format!("less than {vocab}, the size of the vocabulary");
            return Err(RuntimeError::invalid_argument("token", token, expected));
        }
        let Some(table) = self.positions else { return Ok(()) };
        let (known, end) =
            (weight::shape(table).0.saturating_sub(FIRST_POSITION), start + tokens.len());
        if end > known {
            let expected = format!("at most {known}, which the model has learned");
            return Err(RuntimeError::invalid_argument("positions", end, expected));
        }
        Ok(())
    }

    /// The residual stream before the first block, `[tokens.len(), hidden]`, of consecutive tokens
    /// of a text, the first of which stands at `start`.
    ///
    /// # Errors
    /// `InvalidArgument` for a token outside the vocabulary, or a position without an embedding.
    pub fn embed(&self, decoder: &Decoder, tokens: &[u32], start: usize) -> Result<Vec<f32>> {
        self.check(tokens, start)?;
        let hidden = decoder.hidden_size;
        let mut x = vec![0.0; tokens.len() * hidden];
        for (&token, row) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
            let token = token as usize;
            weight::dequantize_rows(self.embedding, token..token + 1, row)?;
        }
        scale(&mut x, decoder.embedding_scale);
        let Some(table) = self.positions else { return Ok(x) };
        let first = start + FIRST_POSITION;
        let mut learned = vec![0.0; x.len()];
        weight::dequantize_rows(table, first..first + tokens.len(), &mut learned)?;
        x.iter_mut().zip(&learned).for_each(|(x, learned)| *x += learned);
        Ok(x)
    }

    /// The residual stream behind the last block, normed.
    pub fn normed(&self, context: Context<'_>, x: &[f32]) -> Vec<f32> {
        norm(context, context.decoder.norm, x, &self.norm, self.norm_bias.as_deref())
    }

    /// Logits of normed hidden states: `[m, hidden]` to `[m, vocab]`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn logits(&self, context: Context<'_>, hidden: &[f32]) -> Result<Vec<f32>> {
        let mut logits = linear(context, self.output, hidden)?;
        finish_logits(context.decoder, &mut logits);
        Ok(logits)
    }
}

/// Scales and caps what the output layer gives.
pub fn finish_logits(decoder: &Decoder, logits: &mut [f32]) {
    scale(logits, decoder.logit_scale);
    if let Some(softcap) = decoder.logit_softcap {
        cap(logits, softcap);
    }
}
