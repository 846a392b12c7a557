//! A model ready to run: embedding, blocks, output.

use slim_formats::{ModelConfig, ModelSource, Weight};
use slim_kernels::{Backend, RopeAngles, weight};

use crate::{
    KvCache, Result, RuntimeError,
    block::{Block, Context, find_vector, find_weight, linear, rms_norm},
};

/// Tokens that go through the blocks together: bounds the memory of activations, fills the matrix products.
const PREFILL_BATCH: usize = 512;

/// The weights of a model, where they lie in its source.
pub struct Model<'a> {
    context: Context<'a>,
    /// `[vocab, hidden]`.
    embedding: Weight<'a>,
    blocks: Vec<Block<'a>>,
    output_norm: Vec<f32>,
    /// `[vocab, hidden]`; the embedding itself in models that tie them.
    output: Weight<'a>,
}

impl<'a> Model<'a> {
    /// Finds and checks every tensor; copies only the norms.
    ///
    /// # Errors
    /// `Malformed` if a tensor is missing or has the wrong shape.
    pub fn load(source: &'a dyn ModelSource, backend: &'a dyn Backend) -> Result<Self> {
        let config = source.config();
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = find_weight(source, "token_embd.weight", vocab, hidden)?;
        let output = match config.tied_embeddings {
            true => embedding,
            false => find_weight(source, "output.weight", vocab, hidden)?,
        };
        let blocks =
            (0..config.block_count).map(|i| Block::load(source, i)).collect::<Result<_>>()?;
        let output_norm = find_vector(source, "output_norm.weight", hidden)?;
        let context = Context { config, backend };
        Ok(Self { context, embedding, blocks, output_norm, output })
    }

    /// Hyperparameters.
    pub fn config(&self) -> &'a ModelConfig {
        self.context.config
    }

    /// Feeds `tokens` after those that `cache` holds; gives the normed last hidden states, `[tokens.len(), hidden]`.
    ///
    /// # Errors
    /// `InvalidArgument` for a token outside the vocabulary or a full cache.
    pub fn forward(&self, tokens: &[u32], cache: &mut KvCache) -> Result<Vec<f32>> {
        let free = cache.capacity - cache.position;
        if tokens.len() > free {
            let expected = format!("at most {}, the size of the context", cache.capacity);
            let found = cache.position + tokens.len();
            return Err(RuntimeError::invalid_argument("tokens", found, expected));
        }
        let mut hidden = Vec::with_capacity(tokens.len() * self.config().hidden_size);
        for batch in tokens.chunks(PREFILL_BATCH) {
            hidden.extend(in_pool(|| self.forward_batch(batch, cache))?);
        }
        Ok(hidden)
    }

    fn forward_batch(&self, tokens: &[u32], cache: &mut KvCache) -> Result<Vec<f32>> {
        let start = cache.position;
        let angles = rope_angles(self.config(), start, tokens.len());
        let mut x = embed(self.embedding, tokens)?;
        for (block, kv) in self.blocks.iter().zip(&mut cache.blocks) {
            block.forward(self.context, &mut x, kv, start, &angles)?;
        }
        cache.position += tokens.len();
        Ok(rms_norm(self.context, &x, &self.output_norm))
    }

    /// Logits of hidden states: `[m, hidden]` to `[m, vocab]`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        in_pool(|| linear(self.context, self.output, hidden))
    }

    /// Feeds `tokens` and gives the logits that follow the last one, `[vocab]`.
    ///
    /// # Errors
    /// As [`Self::forward`]; `InvalidArgument` if there are no tokens.
    pub fn next_logits(&self, tokens: &[u32], cache: &mut KvCache) -> Result<Vec<f32>> {
        let hidden = self.forward(tokens, cache)?;
        let last = hidden.len().checked_sub(self.config().hidden_size);
        let last =
            last.ok_or_else(|| RuntimeError::invalid_argument("tokens", 0, "at least one"))?;
        self.logits(&hidden[last..])
    }

    /// Bytes of weights that decoding one token reads: every layer, and one row of the embedding.
    pub fn bytes_per_token(&self) -> u64 {
        let blocks = self.blocks.iter().flat_map(|b| {
            [b.attn_q, b.attn_k, b.attn_v, b.attn_output, b.ffn_gate, b.ffn_up, b.ffn_down]
        });
        blocks.chain([self.output]).map(weight::stored_bytes).sum()
    }
}

/// Runs `work` on a thread of the pool: the hundreds of small parallel steps of a token then start there, instead of
/// being handed over one by one from a thread outside.
fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}

/// The rotation angles of positions `start .. start + m`.
pub fn rope_angles(config: &ModelConfig, start: usize, m: usize) -> RopeAngles {
    RopeAngles::new(config.head_dim, config.rope.theta, &config.rope.factors, start, m)
}

/// The embeddings of `tokens`, `[tokens.len(), hidden]`.
///
/// # Errors
/// `InvalidArgument` for a token outside the vocabulary.
pub fn embed(embedding: Weight<'_>, tokens: &[u32]) -> Result<Vec<f32>> {
    let (vocab, hidden) = weight::shape(embedding);
    let mut x = vec![0.0; tokens.len() * hidden];
    for (&token, row) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
        let token = token as usize;
        if token >= vocab {
            let expected = format!("less than {vocab}, the size of the vocabulary");
            return Err(RuntimeError::invalid_argument("token", token, expected));
        }
        weight::dequantize_rows(embedding, token..token + 1, row)?;
    }
    Ok(x)
}
