//! What a tensor is for, whatever a file calls it.

use std::{
    collections::BTreeMap,
    ops::{Index, IndexMut},
};

/// What a tensor of a model is for, in the order in which tensors are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The embedding of tokens, `[vocab, hidden]`.
    Embedding,
    /// The norm of the residual stream before attention, `[hidden]`.
    AttnNorm,
    /// Queries, `[heads * head_dim, hidden]`.
    AttnQ,
    /// Keys, `[kv_heads * head_dim, hidden]`.
    AttnK,
    /// Values, `[kv_heads * head_dim, hidden]`.
    AttnV,
    /// What brings attention back to the residual stream, `[hidden, heads * head_dim]`.
    AttnOutput,
    /// The norm of the residual stream before the feed-forward network, `[hidden]`.
    FfnNorm,
    /// What neurons are gated by, `[neurons, hidden]`.
    FfnGate,
    /// The inputs of neurons, `[neurons, hidden]`.
    FfnUp,
    /// What brings neurons back to the residual stream, `[hidden, neurons]`.
    FfnDown,
    /// The norm of the residual stream behind the last block, `[hidden]`.
    OutputNorm,
    /// The output layer, `[vocab, hidden]`; absent where the embedding doubles as one.
    Output,
}

impl Part {
    /// GGUF's name, which follows `blk.N.` for a tensor of a block.
    pub const fn gguf_name(self) -> &'static str {
        match self {
            Self::Embedding => "token_embd.weight",
            Self::AttnNorm => "attn_norm.weight",
            Self::AttnQ => "attn_q.weight",
            Self::AttnK => "attn_k.weight",
            Self::AttnV => "attn_v.weight",
            Self::AttnOutput => "attn_output.weight",
            Self::FfnNorm => "ffn_norm.weight",
            Self::FfnGate => "ffn_gate.weight",
            Self::FfnUp => "ffn_up.weight",
            Self::FfnDown => "ffn_down.weight",
            Self::OutputNorm => "output_norm.weight",
            Self::Output => "output.weight",
        }
    }

    /// What the rows of its matrix are.
    pub const fn rows(self) -> Rows {
        match self {
            Self::Embedding | Self::Output => Rows::Tokens,
            Self::AttnQ => Rows::Heads,
            Self::FfnGate | Self::FfnUp => Rows::Neurons,
            _ => Rows::Channels,
        }
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
