//! What a tensor is for, whatever a file calls it.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    ops::{Index, IndexMut},
};

/// What a tensor of a model is for, in the order in which tensors are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The embedding of tokens, `[vocab, embedding]`.
    Embedding,
    /// What brings embeddings to the residual stream, `[hidden, embedding]`, of models whose
    /// embeddings have other channels.
    EmbeddingUp,
    /// The embedding of positions, `[positions, hidden]`, of models that learn it.
    Positions,
    /// What tokens say to each block by themselves, `[vocab, blocks * embedded]`.
    BlockEmbedding,
    /// What their embeddings add to it, `[blocks * embedded, hidden]`.
    BlockEmbeddingUp,
    /// The norm of that, block by block, `[embedded]`.
    BlockEmbeddingNorm,
    /// The norm of the residual stream before attention, `[hidden]`.
    AttnNorm,
    /// The bias of this norm, `[hidden]`.
    AttnNormBias,
    /// What queries of latent attention are made of, `[query_rank, hidden]`.
    QueryDown,
    /// Its norm, `[query_rank]`.
    QueryDownNorm,
    /// Queries, `[heads * head_dim, hidden]`, or `[.., query_rank]`.
    AttnQ,
    /// The bias of queries, `[heads * head_dim]`.
    AttnQBias,
    /// The norm of queries, `[head_dim]` or `[heads * head_dim]`.
    AttnQNorm,
    /// The latent, and a key for all heads behind it, `[rank + turned_dim, hidden]`.
    LatentDown,
    /// The norm of the latent, `[rank]`.
    LatentNorm,
    /// Keys made of the latent, `[heads * plain_dim, rank]`.
    LatentKeys,
    /// Values made of the latent, `[heads * value_dim, rank]`.
    LatentValues,
    /// Keys, `[kv_heads * head_dim, hidden]`.
    AttnK,
    /// The bias of keys, `[kv_heads * head_dim]`.
    AttnKBias,
    /// The norm of keys, `[head_dim]` or `[kv_heads * head_dim]`.
    AttnKNorm,
    /// Values, `[kv_heads * head_dim, hidden]`.
    AttnV,
    /// The bias of values, `[kv_heads * head_dim]`.
    AttnVBias,
    /// What heads attend to besides tokens: a score of each, `[heads]`.
    AttnSinks,
    /// What the mixer's output is gated by, of as many channels, `[.., hidden]`.
    AttnGate,
    /// How strongly a token corrects the state of a delta net, `[value_heads, hidden]`.
    DeltaBeta,
    /// How much of the state a token leaves, `[value_heads, hidden]`.
    DeltaDecay,
    /// Its bias, `[value_heads]`.
    DeltaDecayBias,
    /// What its softplus is multiplied by, below 0, `[value_heads]`.
    DeltaDecayRate,
    /// What goes into a convolution and gates it, `[3 * hidden, hidden]`.
    ConvolutionInput,
    /// The weights of a causal convolution, `[channels, taps]`, the last of the token itself.
    Convolution,
    /// The norm of what a delta net gives, `[value_dim]`.
    DeltaNorm,
    /// What brings the mixer's output back to the residual stream, `[hidden, heads * head_dim]`.
    AttnOutput,
    /// Its bias, `[hidden]`.
    AttnOutputBias,
    /// The norm behind attention, `[hidden]`.
    AttnPostNorm,
    /// The bias of this norm, `[hidden]`.
    AttnPostNormBias,
    /// The norm of the residual stream before the feed-forward network, `[hidden]`.
    FfnNorm,
    /// The bias of this norm, `[hidden]`.
    FfnNormBias,
    /// The norm of what goes into a router that has one of its own, `[hidden]`.
    RouterNorm,
    /// What scores the experts of a block, `[experts, hidden]`.
    Router,
    /// Its bias, `[experts]`.
    RouterBias,
    /// What is added to scores where experts are chosen, not where they are weighted, `[experts]`.
    RouterCorrection,
    /// What the weight of each expert is multiplied by, `[experts]`.
    ExpertScale,
    /// What neurons are gated by, `[neurons, hidden]`.
    FfnGate,
    /// Its bias, `[neurons]`.
    FfnGateBias,
    /// The inputs of neurons, `[neurons, hidden]`.
    FfnUp,
    /// Its bias, `[neurons]`.
    FfnUpBias,
    /// What brings neurons back to the residual stream, `[hidden, neurons]`.
    FfnDown,
    /// Its bias, `[hidden]`.
    FfnDownBias,
    /// What the network beside experts is gated by as a whole, `[hidden]`.
    FfnShare,
    /// The norm behind the network beside experts, `[hidden]`.
    BesidePostNorm,
    /// The norm of the residual stream before experts that have one of their own, `[hidden]`.
    ExpertsNorm,
    /// A tensor of an expert, which is counted from 0.
    Expert(u16, ExpertPart),
    /// The norm behind the sum of experts, `[hidden]`.
    ExpertsPostNorm,
    /// The norm behind the feed-forward network, `[hidden]`.
    FfnPostNorm,
    /// The bias of this norm, `[hidden]`.
    FfnPostNormBias,
    /// What gates what a token says to the block, `[embedded, hidden]`.
    EmbeddedGate,
    /// What brings that to the residual stream, `[hidden, embedded]`.
    EmbeddedOutput,
    /// The norm behind it, `[hidden]`.
    EmbeddedPostNorm,
    /// What the output of the block is multiplied by, `[1]`.
    BlockScale,
    /// The norm of the residual stream behind the last block, `[hidden]`.
    OutputNorm,
    /// The bias of this norm, `[hidden]`.
    OutputNormBias,
    /// What brings the residual stream back to the channels of embeddings, `[embedding, hidden]`.
    EmbeddingDown,
    /// The output layer, `[vocab, embedding]`; absent where the embedding doubles as one.
    Output,
}

/// What a tensor of an expert is for, in the order of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ExpertPart {
    /// What its neurons are gated by, `[neurons, hidden]`.
    Gate,
    /// Its bias, `[neurons]`.
    GateBias,
    /// The inputs of its neurons, `[neurons, hidden]`.
    Up,
    /// Its bias, `[neurons]`.
    UpBias,
    /// What brings its neurons back to the residual stream, `[hidden, neurons]`.
    Down,
    /// Its bias, `[hidden]`.
    DownBias,
}

impl ExpertPart {
    /// GGUF's name of the tensor that holds those of all experts, in two pieces, between which the
    /// number of one stands (F3).
    const fn gguf_name(self) -> (&'static str, &'static str) {
        match self {
            Self::Gate => ("ffn_gate_exps", "weight"),
            Self::GateBias => ("ffn_gate_exps", "bias"),
            Self::Up => ("ffn_up_exps", "weight"),
            Self::UpBias => ("ffn_up_exps", "bias"),
            Self::Down => ("ffn_down_exps", "weight"),
            Self::DownBias => ("ffn_down_exps", "bias"),
        }
    }
}

impl Part {
    /// GGUF's name, which follows `blk.N.` for a tensor of a block.
    pub fn gguf_name(self) -> Cow<'static, str> {
        let name = match self {
            Self::Expert(index, part) => {
                let (name, kind) = part.gguf_name();
                return format!("{name}.{index}.{kind}").into();
            }
            Self::Embedding => "token_embd.weight",
            Self::EmbeddingUp => "token_embd_up.weight",
            Self::Positions => "position_embd.weight",
            Self::BlockEmbedding => "per_layer_token_embd.weight",
            Self::BlockEmbeddingUp => "per_layer_model_proj.weight",
            Self::BlockEmbeddingNorm => "per_layer_proj_norm.weight",
            Self::AttnNorm => "attn_norm.weight",
            Self::AttnNormBias => "attn_norm.bias",
            Self::QueryDown => "attn_q_a.weight",
            Self::QueryDownNorm => "attn_q_a_norm.weight",
            Self::LatentDown => "attn_kv_a_mqa.weight",
            Self::LatentNorm => "attn_kv_a_norm.weight",
            Self::LatentKeys => "attn_k_b.weight",
            Self::LatentValues => "attn_v_b.weight",
            Self::AttnQ => "attn_q.weight",
            Self::AttnQBias => "attn_q.bias",
            Self::AttnQNorm => "attn_q_norm.weight",
            Self::AttnK => "attn_k.weight",
            Self::AttnKBias => "attn_k.bias",
            Self::AttnKNorm => "attn_k_norm.weight",
            Self::AttnV => "attn_v.weight",
            Self::AttnVBias => "attn_v.bias",
            Self::AttnGate => "attn_gate.weight",
            Self::DeltaBeta => "ssm_beta.weight",
            Self::DeltaDecay => "ssm_alpha.weight",
            Self::DeltaDecayBias => "ssm_dt.bias",
            Self::DeltaDecayRate => "ssm_a",
            Self::ConvolutionInput => "shortconv.in_proj.weight",
            Self::Convolution => "ssm_conv1d.weight",
            Self::DeltaNorm => "ssm_norm.weight",
            Self::AttnSinks => "attn_sinks.weight",
            Self::AttnOutput => "attn_output.weight",
            Self::AttnOutputBias => "attn_output.bias",
            Self::AttnPostNorm => "post_attention_norm.weight",
            Self::AttnPostNormBias => "post_attention_norm.bias",
            Self::FfnNorm => "ffn_norm.weight",
            Self::FfnNormBias => "ffn_norm.bias",
            Self::FfnGate => "ffn_gate.weight",
            Self::FfnGateBias => "ffn_gate.bias",
            Self::FfnUp => "ffn_up.weight",
            Self::FfnUpBias => "ffn_up.bias",
            Self::FfnDown => "ffn_down.weight",
            Self::FfnDownBias => "ffn_down.bias",
            Self::RouterNorm => "ffn_gate_inp.scale",
            Self::Router => "ffn_gate_inp.weight",
            Self::RouterBias => "ffn_gate_inp.bias",
            Self::RouterCorrection => "exp_probs_b.bias",
            Self::ExpertScale => "ffn_down_exps.scale",
            Self::FfnShare => "ffn_gate_inp_shexp.weight",
            Self::BesidePostNorm => "post_ffw_norm_1.weight",
            Self::ExpertsNorm => "pre_ffw_norm_2.weight",
            Self::ExpertsPostNorm => "post_ffw_norm_2.weight",
            Self::FfnPostNorm => "post_ffw_norm.weight",
            Self::FfnPostNormBias => "post_ffw_norm.bias",
            Self::EmbeddedGate => "inp_gate.weight",
            Self::EmbeddedOutput => "proj.weight",
            Self::EmbeddedPostNorm => "post_norm.weight",
            Self::BlockScale => "layer_output_scale.weight",
            Self::OutputNorm => "output_norm.weight",
            Self::OutputNormBias => "output_norm.bias",
            Self::EmbeddingDown => "token_embd_down.weight",
            Self::Output => "output.weight",
        };
        name.into()
    }

    /// The bias that belongs to a linear layer or a norm; `None` of what has none.
    pub const fn bias(self) -> Option<Self> {
        match self {
            Self::AttnNorm => Some(Self::AttnNormBias),
            Self::AttnQ => Some(Self::AttnQBias),
            Self::AttnK => Some(Self::AttnKBias),
            Self::AttnV => Some(Self::AttnVBias),
            Self::DeltaDecay => Some(Self::DeltaDecayBias),
            Self::AttnOutput => Some(Self::AttnOutputBias),
            Self::AttnPostNorm => Some(Self::AttnPostNormBias),
            Self::FfnNorm => Some(Self::FfnNormBias),
            Self::FfnGate => Some(Self::FfnGateBias),
            Self::FfnUp => Some(Self::FfnUpBias),
            Self::FfnDown => Some(Self::FfnDownBias),
            Self::Router => Some(Self::RouterBias),
            Self::Expert(index, ExpertPart::Gate) => {
                Some(Self::Expert(index, ExpertPart::GateBias))
            }
            Self::Expert(index, ExpertPart::Up) => Some(Self::Expert(index, ExpertPart::UpBias)),
            Self::Expert(index, ExpertPart::Down) => {
                Some(Self::Expert(index, ExpertPart::DownBias))
            }
            Self::FfnPostNorm => Some(Self::FfnPostNormBias),
            Self::OutputNorm => Some(Self::OutputNormBias),
            _ => None,
        }
    }

    /// What the rows of its matrix are; of a bias, its values.
    pub const fn rows(self) -> Rows {
        match self {
            Self::Embedding | Self::BlockEmbedding | Self::Output => Rows::Tokens,
            Self::AttnQ | Self::AttnQBias => Rows::Heads,
            Self::FfnGate | Self::FfnGateBias | Self::FfnUp | Self::FfnUpBias => Rows::Neurons,
            Self::Expert(..) => Rows::OfExpert,
            _ => Rows::Channels,
        }
    }

    /// Whether it is a matrix that is small and decides much: it is never quantized.
    pub const fn stays_precise(self) -> bool {
        matches!(self, Self::Router | Self::DeltaBeta | Self::DeltaDecay | Self::Convolution)
    }
}

/// What the rows of a matrix are: which of them may have bit-widths of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rows {
    /// One per token of the vocabulary.
    Tokens,
    /// Those of one query head after those of another.
    Heads,
    /// One per neuron of a feed-forward network, which stand in any order.
    Neurons,
    /// Those of an expert: there are hundreds of such matrices, each of which is small.
    OfExpert,
    /// Others: they stay together.
    Channels,
}

/// One value for each of some parts, in the order of the parts.
#[derive(Debug, Clone, PartialEq)]
pub struct PartMap<T>(BTreeMap<Part, T>);

impl<T> PartMap<T> {
    /// No parts.
    pub const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// The value of a part, if it is there.
    pub fn get(&self, part: Part) -> Option<&T> {
        self.0.get(&part)
    }

    /// Sets the value of a part.
    pub fn insert(&mut self, part: Part, value: T) {
        self.0.insert(part, value);
    }

    /// Parts and values.
    pub fn iter(&self) -> impl Iterator<Item = (Part, &T)> {
        self.0.iter().map(|(&part, value)| (part, value))
    }

    /// Parts and values, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (Part, &mut T)> {
        self.0.iter_mut().map(|(&part, value)| (part, value))
    }

    /// The values.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.0.values()
    }

    /// The values, to be changed.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.values_mut()
    }
}

impl<T> Default for PartMap<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// # Panics
/// If the part is not there: ask [`PartMap::get`] for what a model may lack.
impl<T> Index<Part> for PartMap<T> {
    type Output = T;

    fn index(&self, part: Part) -> &T {
        self.get(part).unwrap_or_else(|| panic!("no {part:?}"))
    }
}

/// # Panics
/// If the part is not there.
impl<T> IndexMut<Part> for PartMap<T> {
    fn index_mut(&mut self, part: Part) -> &mut T {
        self.0.get_mut(&part).unwrap_or_else(|| panic!("no {part:?}"))
    }
}

impl<T> FromIterator<(Part, T)> for PartMap<T> {
    fn from_iter<I: IntoIterator<Item = (Part, T)>>(entries: I) -> Self {
        Self(entries.into_iter().collect())
    }
}

impl<T> IntoIterator for PartMap<T> {
    type Item = (Part, T);
    type IntoIter = std::collections::btree_map::IntoIter<Part, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<T> Extend<(Part, T)> for PartMap<T> {
    fn extend<I: IntoIterator<Item = (Part, T)>>(&mut self, entries: I) {
        self.0.extend(entries);
    }
}
