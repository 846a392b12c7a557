//! What stands before the first block and behind the last: embedding, norm, output layer.

use std::f32::consts::FRAC_1_SQRT_2;

use slim_formats::{
    Decoder, ModelSource, Part, Weight,
    arch::{FIRST_POSITION, Norm},
};
use slim_kernels::{cap, weight};

use crate::{
    Result, RuntimeError,
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
    /// Of models whose tokens say something to each block by themselves.
    pub to_blocks: Option<ToBlocks<'a>>,
    /// `[hidden]`, of models with a norm behind the last block.
    pub norm: Option<Vec<f32>>,
    /// `[hidden]`, of models whose norm has one.
    pub norm_bias: Option<Vec<f32>>,
    /// `[embedding, hidden]`, of the same models as `up`.
    pub down: Option<Weight<'a>>,
    /// `[vocab, embedding]`; the embedding itself in models that tie them.
    pub output: Weight<'a>,
}

/// What makes of tokens what they say to each block by themselves.
#[derive(Clone)]
pub struct ToBlocks<'a> {
    /// `[vocab, blocks * embedded]`.
    pub embedding: Weight<'a>,
    /// `[blocks * embedded, hidden]`.
    pub up: Weight<'a>,
    /// `[embedded]`.
    pub norm: Vec<f32>,
}

/// What tokens say to each block by themselves.
#[derive(Default)]
pub struct Embedded {
    /// `[blocks, tokens, embedded]`; empty of models whose tokens do not.
    values: Vec<f32>,
    /// Values of a block.
    of_block: usize,
}

impl Embedded {
    /// `[tokens, embedded]`.
    pub fn of_block(&self, index: usize) -> &[f32] {
        &self.values[index * self.of_block..][..self.of_block]
    }
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
            to_blocks: match decoder.outside(Part::BlockEmbedding) {
                None => None,
                Some(table) => Some(ToBlocks {
                    embedding: find_weight(source, table)?,
                    up: matrix(Part::BlockEmbeddingUp)?.expect("it belongs to the table"),
                    norm: vector(Part::BlockEmbeddingNorm)?.expect("it belongs to the table"),
                }),
            },
            norm: vector(Part::OutputNorm)?,
            norm_bias: vector(Part::OutputNormBias)?,
            down: matrix(Part::EmbeddingDown)?,
            output: find_weight(source, decoder.output())?,
        })
    }

    /// Refuses tokens outside of the vocabulary, and positions without an embedding; the first
    /// token stands at `start`.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub(crate) fn check(&self, tokens: &[u32], start: usize) -> Result<()> {
        let to_blocks = self.to_blocks.as_ref().map(|to_blocks| to_blocks.embedding);
        let tables = std::iter::once(self.embedding).chain(to_blocks);
        let vocab = tables.map(|table| weight::shape(table).0).min().unwrap_or(0);
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
    /// `InvalidArgument` for a token outside the vocabulary, or a position without an embedding; a
    /// kernel refuses its arguments.
    pub fn embed(&self, context: Context<'_>, tokens: &[u32], start: usize) -> Result<Vec<f32>> {
        self.check(tokens, start)?;
        let (_, width) = weight::shape(self.embedding);
        let mut x = vec![0.0; tokens.len() * width];
        for (&token, row) in tokens.iter().zip(x.chunks_exact_mut(width)) {
            let token = token as usize;
            weight::dequantize_rows(self.embedding, token..token + 1, row)?;
        }
        scale(&mut x, context.decoder.embedding_scale);
        if let Some(up) = self.up {
            x = linear(context, up, &x)?;
        }
        let Some(table) = self.positions else { return Ok(x) };
        let first = start + FIRST_POSITION;
        let mut learned = vec![0.0; x.len()];
        weight::dequantize_rows(table, first..first + tokens.len(), &mut learned)?;
        x.iter_mut().zip(&learned).for_each(|(x, learned)| *x += learned);
        Ok(x)
    }

    /// What `tokens` say to each block, whose embeddings are `x: [tokens.len(), hidden]`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn embedded(&self, context: Context<'_>, tokens: &[u32], x: &[f32]) -> Result<Embedded> {
        let Some(to_blocks) = &self.to_blocks else { return Ok(Embedded::default()) };
        let added = to_blocks.added(context, x)?;
        let normed = norm(context, Norm::Rms, &added, &to_blocks.norm, None);
        let (width, all) = (to_blocks.norm.len(), weight::shape(to_blocks.embedding).1);
        let mut values = vec![0.0; normed.len()];
        let mut row = vec![0.0; all];
        for (t, (&token, normed)) in tokens.iter().zip(normed.chunks_exact(all)).enumerate() {
            let token = token as usize;
            weight::dequantize_rows(to_blocks.embedding, token..token + 1, &mut row)?;
            let of_blocks = row.chunks_exact(width).zip(normed.chunks_exact(width));
            for (block, (own, normed)) in of_blocks.enumerate() {
                let out = &mut values[(block * tokens.len() + t) * width..][..width];
                for ((out, own), normed) in out.iter_mut().zip(own).zip(normed) {
                    *out = (ToBlocks::own_scale(width) * own + normed) * ToBlocks::MEAN;
                }
            }
        }
        Ok(Embedded { values, of_block: tokens.len() * width })
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

impl ToBlocks<'_> {
    /// What the sum of what tokens say and of what their embeddings add is multiplied by.
    pub const MEAN: f32 = FRAC_1_SQRT_2;

    /// What embeddings `x: [m, hidden]` add, before their norm, `[m, blocks * embedded]`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn added(&self, context: Context<'_>, x: &[f32]) -> Result<Vec<f32>> {
        let mut added = linear(context, self.up, x)?;
        scale(&mut added, Self::added_scale(context.decoder));
        Ok(added)
    }

    /// What `up` gives is multiplied by.
    pub fn added_scale(decoder: &Decoder) -> f32 {
        1.0 / (decoder.hidden_size as f32).sqrt()
    }

    /// What a token's own `width` channels of a block are multiplied by.
    pub fn own_scale(width: usize) -> f32 {
        (width as f32).sqrt()
    }
}

/// Scales and caps what the output layer gives.
pub fn finish_logits(decoder: &Decoder, logits: &mut [f32]) {
    scale(logits, decoder.logit_scale);
    if let Some(softcap) = decoder.logit_softcap {
        cap(logits, softcap);
    }
}
