//! What stands before the first block and behind the last: embedding, norm, output layer.

use slim_formats::{Decoder, ModelSource, Part, Weight, arch::FIRST_POSITION};
use slim_kernels::{cap, weight};

use crate::{
    Positions, Result, RuntimeError,
    block::{Context, find_vector, find_weight, linear, norm, scale},
};

/// The tensors outside of blocks.
#[derive(Clone)]
pub struct Ends<'a> {
    /// `[vocab, embedding]`.
    pub embedding: Weight<'a>,
    /// `[hidden, embedding]`, of models whose embeddings have other channels.
    pub up: Option<Weight<'a>>,
    /// `[positions, hidden]`, of models that learn them.
    pub positions: Option<Weight<'a>>,
    /// `[hidden]`, of models with a norm behind the last block.
    pub norm: Option<Vec<f32>>,
    /// `[hidden]`, of models whose norm has one.
    pub norm_bias: Option<Vec<f32>>,
    /// `[embedding, hidden]`, of the same models as `up`.
    pub down: Option<Weight<'a>>,
    /// `[vocab, embedding]`; the embedding itself in models that tie them.
    pub output: Weight<'a>,
}

impl<'a> Ends<'a> {
    /// Finds the tensors.
    ///
    /// # Errors
    /// `Malformed` if one is missing or has the wrong shape.
    pub fn load(source: &'a dyn ModelSource) -> Result<Self> {
        let decoder = source.decoder();
        let matrix = |part: Part| {
            decoder.outside(part).map(|tensor| find_weight(source, tensor)).transpose()
        };
        let vector = |part: Part| {
            decoder.outside(part).map(|tensor| find_vector(source, tensor)).transpose()
        };
        Ok(Self {
            embedding: find_weight(source, decoder.embedding())?,
            up: matrix(Part::EmbeddingUp)?,
            positions: matrix(Part::Positions)?,
            norm: vector(Part::OutputNorm)?,
            norm_bias: vector(Part::OutputNormBias)?,
            down: matrix(Part::EmbeddingDown)?,
            output: find_weight(source, decoder.output())?,
        })
    }

    /// The residual stream before the first block, `[tokens.len(), hidden]`. There may be several
    /// texts of as many tokens as `positions`.
    ///
    /// # Errors
    /// `InvalidArgument` for a token outside the vocabulary, or a position without an embedding; a
    /// kernel refuses its arguments.
    pub fn embed(
        &self,
        context: Context<'_>,
        tokens: &[u32],
        positions: &Positions,
    ) -> Result<Vec<f32>> {
        let (vocab, width) = weight::shape(self.embedding);
        check_tokens(tokens, vocab)?;
        let mut x = vec![0.0; tokens.len() * width];
        for (&token, row) in tokens.iter().zip(x.chunks_exact_mut(width)) {
            let token = token as usize;
            weight::dequantize_rows(self.embedding, token..token + 1, row)?;
        }
        let Decoder { embedding_scale, hidden_size: hidden, .. } = *context.decoder;
        scale(&mut x, embedding_scale);
        if let Some(up) = self.up {
            x = linear(context, up, &x)?;
        }
        let Some(table) = self.positions else { return Ok(x) };
        let first = positions.start + FIRST_POSITION;
        check_positions(weight::shape(table).0, positions.start, positions.count)?;
        let mut learned = vec![0.0; positions.count * hidden];
        weight::dequantize_rows(table, first..first + positions.count, &mut learned)?;
        for x in x.chunks_exact_mut(learned.len().max(1)) {
            x.iter_mut().zip(&learned).for_each(|(x, learned)| *x += learned);
        }
        Ok(x)
    }

    /// What the output layer takes in, made of the residual stream behind the last block:
    /// `[m, hidden]` to `[m, embedding]`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn states(&self, context: Context<'_>, x: &[f32]) -> Result<Vec<f32>> {
        let normed = self.normed(context, x);
        match self.down {
            Some(down) => linear(context, down, &normed),
            None => Ok(normed),
        }
    }

    /// The residual stream behind the last block as the last norm leaves it, if there is one.
    fn normed(&self, context: Context<'_>, x: &[f32]) -> Vec<f32> {
        match (context.decoder.norm, &self.norm) {
            (Some(kind), Some(weight)) => norm(context, kind, x, weight, self.norm_bias.as_deref()),
            _ => x.to_vec(),
        }
    }

    /// Logits of last hidden states: `[m, embedding]` to `[m, vocab]`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn logits(&self, context: Context<'_>, states: &[f32]) -> Result<Vec<f32>> {
        let mut logits = linear(context, self.output, states)?;
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

/// Refuses positions outside of a table of learned ones.
pub(crate) fn check_positions(rows: usize, start: usize, count: usize) -> Result<()> {
    let known = rows.saturating_sub(FIRST_POSITION);
    match start + count <= known {
        true => Ok(()),
        false => {
            let expected = format!("at most {known}, which the model has learned");
            Err(RuntimeError::invalid_argument("positions", start + count, expected))
        }
    }
}

/// Refuses tokens outside of a vocabulary.
pub(crate) fn check_tokens(tokens: &[u32], vocab: usize) -> Result<()> {
    match tokens.iter().find(|&&token| token as usize >= vocab) {
        None => Ok(()),
        Some(token) => {
            let expected = format!("less than {vocab}, the size of the vocabulary");
            Err(RuntimeError::invalid_argument("token", token, expected))
        }
    }
}
