//! Hyperparameters of a model, from whatever describes them.

mod gguf;
mod hugging_face;
mod keys;
mod llama3;
mod rope;
#[cfg(test)]
mod tests;
mod unread;

use std::path::Path;

pub use gguf::TensorFacts;
pub(crate) use hugging_face::shortest;
pub use keys::Keys;
pub(crate) use keys::every;
pub(crate) use rope::yarn_amplitude;
pub use rope::{LongRope, Rope, Scaling, Yarn};

use crate::{
    FormatError, Generation, Result,
    arch::{Activation, Experts, Family, LatentAttention, Mixer, QueryScaling},
};

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
    /// How many tokens back (itself included) a token attends in blocks with a window; `None` if
    /// there are none.
    pub sliding_window: Option<usize>,
    /// What Llama has not.
    pub features: Features,
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

/// What some models have that Llama has not, in numbers; [`Features::default`] is Llama.
#[derive(Debug, Clone, PartialEq)]
pub struct Features {
    /// Channels of embeddings, if these are others than those of the residual stream.
    pub embedding_size: Option<usize>,
    /// What embeddings are multiplied by.
    pub embedding_scale: f32,
    /// What mixer and network are multiplied by before they are added to the residual stream.
    pub residual_scale: f32,
    /// What logits are multiplied by.
    pub logit_scale: f32,
    /// `c * tanh(logit / c)` in place of a logit.
    pub logit_softcap: Option<f32>,
    /// What scores are multiplied by; `None` for `1 / sqrt(head_dim)`.
    pub attention_scale: Option<f32>,
    /// `c * tanh(score / c)` in place of a score.
    pub attention_softcap: Option<f32>,
    /// What turned queries are multiplied by.
    pub query_scaling: Option<QueryScaling>,
    /// Whether queries, keys and values have biases.
    pub has_attention_bias: bool,
    /// Whether what brings attention back to the residual stream has one.
    pub has_output_bias: bool,
    /// Whether the feed-forward network has biases.
    pub has_ffn_bias: bool,
    /// Whether queries and keys of each head are normed, of families whose models differ in it.
    pub has_qk_norm: bool,
    /// The experts of blocks that have some.
    pub experts: Option<Experts>,
    /// Which blocks have them, if the model has any; all if it is empty.
    pub sparse: Vec<bool>,
    /// Neurons of the network beside experts, if there is one.
    pub shared_ffn_size: Option<usize>,
    /// Blocks behind the last that guess further tokens: files may hold them, nothing here uses
    /// them.
    pub guessing_blocks: usize,
    /// Latent attention, of families that have it.
    pub latent: Option<LatentAttention>,
    /// What mixes tokens in blocks that have a state in place of keys and values.
    pub recurrence: Option<Mixer>,
    /// Which blocks those are; none if it is empty.
    pub recurrent: Vec<bool>,
    /// The heads of blocks without a window, of families where they may be others.
    pub global_heads: Option<GlobalHeads>,
    /// The last so many blocks attend to keys and values of blocks before them.
    pub sharing_blocks: usize,
    /// Whether the networks of those have twice the neurons.
    pub sharing_are_wide: bool,
    /// What tokens say to each block by themselves, if they do.
    pub block_embedding: Option<BlockEmbedding>,
    /// The rotary embedding of blocks with a window, if it is another than that of the others.
    pub local_rope: Option<Rope>,
    /// Whether norms stand on the residual stream itself, behind attention and network; none stands
    /// behind the last block then.
    pub norms_sums: bool,
    /// Which blocks have the window; all if it is empty.
    pub windowed: Vec<bool>,
    /// Which blocks turn queries and keys; all if it is empty.
    pub rotated: Vec<bool>,
}

/// What tokens say to each block by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockEmbedding {
    /// Channels for each block.
    pub width: usize,
    /// Tokens that say something: the first.
    pub rows: usize,
}

/// Heads of blocks without a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GlobalHeads {
    /// Channels per head, even.
    pub head_dim: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Whether values are made of what the layer of keys gives.
    pub values_are_keys: bool,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            embedding_size: None,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            logit_softcap: None,
            attention_scale: None,
            attention_softcap: None,
            query_scaling: None,
            has_attention_bias: false,
            has_output_bias: false,
            has_ffn_bias: false,
            has_qk_norm: false,
            experts: None,
            sparse: Vec::new(),
            shared_ffn_size: None,
            guessing_blocks: 0,
            latent: None,
            recurrence: None,
            recurrent: Vec::new(),
            global_heads: None,
            sharing_blocks: 0,
            sharing_are_wide: false,
            block_embedding: None,
            local_rope: None,
            norms_sums: false,
            windowed: Vec::new(),
            rotated: Vec::new(),
        }
    }
}

impl Features {
    /// Whether a norm stands behind the last block.
    pub fn has_output_norm(&self) -> bool {
        !self.norms_sums
    }

    /// Whether block `index` has the model's window, if it has one.
    pub fn is_windowed(&self, index: usize) -> bool {
        self.windowed.get(index).copied().unwrap_or(true)
    }

    /// Whether block `index` has the model's experts, if it has any.
    pub fn has_experts(&self, index: usize) -> bool {
        self.sparse.get(index).copied().unwrap_or(true)
    }

    /// Whether block `index` has a state in place of keys and values.
    pub fn is_recurrent(&self, index: usize) -> bool {
        self.recurrent.get(index).copied().unwrap_or(false)
    }

    /// Whether block `index` of `blocks` attends to keys and values of one before it.
    pub fn shares(&self, index: usize, blocks: usize) -> bool {
        index + self.sharing_blocks >= blocks
    }

    /// Whether block `index` turns queries and keys.
    pub fn is_rotated(&self, index: usize) -> bool {
        self.rotated.get(index).copied().unwrap_or(true)
    }
}

const MAX_HEAD_DIM: usize = 1 << 14;

const MAX_BLOCKS: usize = 1 << 12;

const MAX_EXPERTS: usize = 1 << 12;

/// Tokens that a convolution sees.
const MAX_TAPS: usize = 1 << 10;

/// Pairs of channels of a head; of a head that [`ModelConfig::validated`] will refuse, no more than
/// memory can hold.
fn rope_pairs(head_dim: usize) -> usize {
    head_dim.min(MAX_HEAD_DIM) / 2
}

impl ModelConfig {
    /// Whether block `index` attends within a window only.
    pub fn is_windowed(&self, index: usize) -> bool {
        self.sliding_window.is_some() && self.features.is_windowed(index)
    }

    /// Gives the configuration back if its numbers fit each other.
    fn validated(self, path: &Path) -> Result<Self> {
        let stretched_from = match &self.rope.scaling {
            Scaling::Factors => 1,
            Scaling::Yarn(Yarn { context, .. })
            | Scaling::Long(LongRope { context, .. })
            | Scaling::Dynamic { context, .. } => *context,
        };
        let global = self.features.global_heads.unwrap_or(GlobalHeads {
            head_dim: self.head_dim,
            kv_heads: self.kv_head_count,
            values_are_keys: false,
        });
        let block_embedding =
            self.features.block_embedding.unwrap_or(BlockEmbedding { width: 1, rows: 1 });
        for (what, found, limit) in [
            ("block count", self.block_count, MAX_BLOCKS),
            ("number of guessing blocks", self.features.guessing_blocks + 1, MAX_BLOCKS),
            ("hidden size", self.hidden_size, 1 << 20),
            ("embedding size", self.features.embedding_size.unwrap_or(1), 1 << 20),
            ("feed-forward size", self.ffn_size, 1 << 22),
            ("head count", self.head_count, 1 << 14),
            ("key/value head count", self.kv_head_count, 1 << 14),
            ("head size", self.head_dim, MAX_HEAD_DIM),
            ("vocabulary size", self.vocab_size, 1 << 26),
            ("context length", self.context_length, 1 << 30),
            (
                "feed-forward size beside experts",
                self.features.shared_ffn_size.unwrap_or(1),
                1 << 22,
            ),
            ("sliding window", self.sliding_window.unwrap_or(1), 1 << 30),
            ("head size without a window", global.head_dim, MAX_HEAD_DIM),
            ("key/value head count without a window", global.kv_heads, 1 << 14),
            ("size of block embeddings", block_embedding.width, 1 << 16),
            ("number of block embeddings", block_embedding.rows, 1 << 26),
            ("number of blocks that share", self.features.sharing_blocks + 1, self.block_count),
            ("context before RoPE scaling", stretched_from, 1 << 30),
        ] {
            check_size(path, what, found, limit)?;
        }
        for kv_heads in [self.kv_head_count, global.kv_heads] {
            if !self.head_count.is_multiple_of(kv_heads) {
                let expected = format!("a divisor of the {} query heads", self.head_count);
                return Err(invalid(path, "key/value head count", kv_heads, &expected));
            }
        }
        if let Some(experts) = &self.features.experts {
            validate_experts(path, experts)?;
        }
        if let Some(latent) = &self.features.latent {
            validate_latent(path, latent)?;
        }
        if let Some(mixer) = &self.features.recurrence {
            validate_recurrence(path, mixer)?;
        }
        for head_dim in [self.head_dim, global.head_dim] {
            if !head_dim.is_multiple_of(2) {
                return Err(invalid(path, "head size", head_dim, "an even number"));
            }
        }
        let turns_partly = self.family.default("partial_rotary_factor").is_some();
        let ropes = || std::iter::once(&self.rope).chain(&self.features.local_rope);
        for (rope, head_dim) in ropes().zip([global.head_dim, self.head_dim]) {
            let (pairs, all) = (rope.factors.len(), head_dim / 2);
            if pairs != all && !(turns_partly && (1..all).contains(&pairs)) {
                let expected = format!("{all}, one per pair of channels");
                return Err(invalid(path, "number of RoPE factors", pairs, &expected));
            }
        }
        let Features { embedding_scale, residual_scale, logit_scale, .. } = self.features;
        let features = &self.features;
        let caps = [features.logit_softcap, features.attention_softcap, features.attention_scale];
        let positive = [
            ("RMS norm epsilon", self.norm_epsilon),
            ("embedding scale", embedding_scale),
            ("residual scale", residual_scale),
            ("logit scale", logit_scale),
        ];
        let caps = caps.into_iter().flatten().map(|cap| ("scale or cap of scores or logits", cap));
        let of_ropes = ropes().flat_map(|rope| {
            let long =
                if let Scaling::Long(long) = &rope.scaling { &long.factors[..] } else { &[] };
            let factors = rope.factors.iter().chain(long).map(|&factor| ("RoPE factor", factor));
            [("RoPE base", rope.theta), ("RoPE amplitude", rope.amplitude)]
                .into_iter()
                .chain(factors)
        });
        for (what, found) in positive.into_iter().chain(caps).chain(of_ropes) {
            check_positive(path, what, found)?;
        }
        Ok(self)
    }
}

/// Refuses experts whose numbers do not fit each other.
fn validate_experts(path: &Path, experts: &Experts) -> Result<()> {
    let Experts { count, used, ffn, routing, .. } = *experts;
    let used_groups = routing.groups.map_or(1, |groups| groups.used);
    let best = routing.groups.map_or(1, |groups| groups.best);
    let groups = routing.groups.map_or(1, |groups| groups.count);
    for (what, found, limit) in [
        ("number of experts", usize::from(count), MAX_EXPERTS),
        ("number of experts of a token", used.into(), count.into()),
        ("feed-forward size of experts", ffn.width, 1 << 22),
        ("number of expert groups", groups.into(), (count / 2).max(1).into()),
        ("number of expert groups of a token", used_groups.into(), groups.into()),
        ("number of experts that rate a group", best.into(), (count / groups.max(1)).into()),
    ] {
        check_size(path, what, found, limit)?;
    }
    if !count.is_multiple_of(groups) || used > count / groups * used_groups {
        let expected = format!("groups that share {count} experts and hold {used} of a token");
        return Err(invalid(path, "number of expert groups", groups, &expected));
    }
    let (alpha, limit) = match ffn.activation {
        Activation::ClampedSwish { alpha, limit } => (alpha, limit),
        _ => (1.0, 1.0),
    };
    for (what, found) in
        [("scale of experts", routing.scale), ("`swiglu_alpha`", alpha), ("`swiglu_limit`", limit)]
    {
        check_positive(path, what, found)?;
    }
    Ok(())
}

/// Refuses latent attention whose numbers do not fit each other.
fn validate_latent(path: &Path, latent: &LatentAttention) -> Result<()> {
    for (what, found, limit) in [
        ("size of keys that are not turned", latent.plain_dim, MAX_HEAD_DIM),
        ("size of keys that are turned", latent.turned_dim, MAX_HEAD_DIM),
        ("size of values", latent.value_dim, MAX_HEAD_DIM),
        ("size of the latent", latent.rank, MAX_HEAD_DIM),
        ("size of what queries are made of", latent.query_rank.unwrap_or(1), 1 << 20),
    ] {
        check_size(path, what, found, limit)?;
    }
    Ok(())
}

/// Refuses a mixer with a state whose numbers do not fit each other.
fn validate_recurrence(path: &Path, mixer: &Mixer) -> Result<()> {
    let mut sizes = vec![("number of a convolution's taps", mixer.taps(), MAX_TAPS)];
    if let Mixer::DeltaNet(net) = mixer {
        sizes.extend([
            ("number of delta net's key heads", net.key_heads, 1 << 14),
            ("number of delta net's value heads", net.value_heads, 1 << 14),
            ("size of delta net's keys", net.key_dim, MAX_HEAD_DIM),
            ("size of delta net's values", net.value_dim, MAX_HEAD_DIM),
        ]);
    }
    for (what, found, limit) in sizes {
        check_size(path, what, found, limit)?;
    }
    match mixer {
        Mixer::DeltaNet(net) if !net.value_heads.is_multiple_of(net.key_heads) => {
            let expected = format!("a multiple of the {} key heads", net.key_heads);
            Err(invalid(path, "number of delta net's value heads", net.value_heads, &expected))
        }
        _ => Ok(()),
    }
}

/// Refuses a size that is none or beyond `limit`.
fn check_size(path: &Path, what: &str, found: usize, limit: usize) -> Result<()> {
    match (1..=limit).contains(&found) {
        true => Ok(()),
        false => Err(invalid(path, what, found, &format!("1 to {limit}"))),
    }
}

/// Refuses a factor that is none.
fn check_positive(path: &Path, what: &str, found: f32) -> Result<()> {
    match found.is_finite() && found > 0.0 {
        true => Ok(()),
        false => Err(invalid(path, what, found, "a finite number above 0")),
    }
}

fn invalid(path: &Path, what: &str, found: impl ToString, expected: &str) -> FormatError {
    FormatError::malformed(path, format!("the model's {what}"), "", found, expected)
}
