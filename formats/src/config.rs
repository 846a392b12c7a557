//! Hyperparameters of a model, from whatever describes them.

mod gguf;
mod hugging_face;
mod keys;
mod llama3;
#[cfg(test)]
mod tests;

use std::path::Path;

pub(crate) use hugging_face::shortest;

use crate::{FormatError, Generation, Result, arch::Family};

/// Hyperparameters of a transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Whose model it is.
    pub family: &'static dyn Family,
    /// The model's name, if the source gives one.
    pub name: Option<String>,
    /// Transformer blocks.
    pub block_count: usize,
    /// Channels of the residual stream.
    pub hidden_size: usize,
    /// Channels inside the feed-forward network.
    pub ffn_size: usize,
    /// Query heads.
    pub head_count: usize,
    /// Key and value heads, a divisor of `head_count`.
    pub kv_head_count: usize,
    /// Channels per head, even.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Tokens the model was made for.
    pub context_length: usize,
    /// The constant under the root of RMS normalization.
    pub norm_epsilon: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// How many tokens back (itself included) a token attends; `None` for all.
    pub sliding_window: Option<usize>,
    /// Whether the embedding is the output projection, too.
    pub tied_embeddings: bool,
    /// The token that starts a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a generated text, the main one first.
    pub eos_token_ids: Vec<u32>,
    /// Whether the model's settings have `bos_token_id` put before a text; a tokenizer can do so,
    /// too.
    pub add_bos: bool,
    /// How its makers want text to be drawn from it.
    pub generation: Generation,
}

/// Rotary position embedding of heads of `2 * factors.len()` channels.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// The base of the frequencies: pair `i` of `head_dim / 2` turns by `theta^(-2 i / head_dim)`
    /// per token ...
    pub theta: f32,
    /// ... divided by entry `i`. All 1 without scaling.
    pub factors: Vec<f32>,
}

impl Rope {
    /// Whether all factors are 1.
    pub fn is_unscaled(&self) -> bool {
        self.factors.iter().all(|&factor| factor == 1.0)
    }
}

const MAX_HEAD_DIM: usize = 1 << 14;

/// Pairs of channels of a head; of a head that [`ModelConfig::validated`] will refuse, no more than
/// memory can hold.
fn rope_pairs(head_dim: usize) -> usize {
    head_dim.min(MAX_HEAD_DIM) / 2
}

impl ModelConfig {
    /// Gives the configuration back if its numbers fit each other.
    fn validated(self, path: &Path) -> Result<Self> {
        for (what, found, limit) in [
            ("block count", self.block_count, 1 << 12),
            ("hidden size", self.hidden_size, 1 << 20),
            ("feed-forward size", self.ffn_size, 1 << 22),
            ("head count", self.head_count, 1 << 14),
            ("key/value head count", self.kv_head_count, 1 << 14),
            ("head size", self.head_dim, MAX_HEAD_DIM),
            ("vocabulary size", self.vocab_size, 1 << 26),
            ("context length", self.context_length, 1 << 30),
            ("sliding window", self.sliding_window.unwrap_or(1), 1 << 30),
        ] {
            if !(1..=limit).contains(&found) {
                return Err(invalid(path, what, found, &format!("1 to {limit}")));
            }
        }
        if !self.head_count.is_multiple_of(self.kv_head_count) {
            let expected = format!("a divisor of the {} query heads", self.head_count);
            return Err(invalid(path, "key/value head count", self.kv_head_count, &expected));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(invalid(path, "head size", self.head_dim, "an even number"));
        }
        if self.rope.factors.len() != self.head_dim / 2 {
            let expected = format!("{}, one per pair of channels", self.head_dim / 2);
            return Err(invalid(
                path,
                "number of RoPE factors",
                self.rope.factors.len(),
                &expected,
            ));
        }
        let positive = [("RMS norm epsilon", self.norm_epsilon), ("RoPE base", self.rope.theta)];
        let factors = self.rope.factors.iter().map(|&factor| ("RoPE factor", factor));
        for (what, found) in positive.into_iter().chain(factors) {
            if !(found.is_finite() && found > 0.0) {
                return Err(invalid(path, what, found, "a finite number above 0"));
            }
        }
        Ok(self)
    }
}

fn invalid(path: &Path, what: &str, found: impl ToString, expected: &str) -> FormatError {
    FormatError::malformed(path, format!("the model's {what}"), "", found, expected)
}
