//! How tokens of a block learn of those before them.

use super::Part;

/// What mixes tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mixer {
    /// Each token looks at those before it.
    Attention(Attention),
    /// A state is corrected by each token and asked by it.
    DeltaNet(DeltaNet),
    /// Each token sees the last few.
    Convolution(Convolution),
}

/// Causal attention: `softmax(cap(scale * q k^T)) v`. With sinks, a score of each head takes its
/// share in the softmax, and has no value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`: each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Channels per head, even.
    pub head_dim: usize,
    /// How many tokens back (itself included) a token attends; `None` for all.
    pub window: Option<usize>,
    /// Which of [`Decoder::ropes`](super::Decoder) turns queries and keys; `None` for none.
    pub rope: Option<usize>,
    /// How many channels of a head it turns, the first.
    pub rotated: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// `c * tanh(score / c)` in place of a score.
    pub softcap: Option<f32>,
    /// What normalizes queries and keys, before they are turned.
    pub qk_norm: Option<QkNorm>,
    /// Whether what it gives is multiplied by `sigmoid(gate)`, channel by channel.
    pub is_gated: bool,
    /// Whether queries, keys and values have biases.
    pub has_bias: bool,
    /// Whether what brings attention back to the residual stream has one.
    pub has_output_bias: bool,
    /// What turned queries are multiplied by.
    pub query_scaling: Option<QueryScaling>,
    /// Whether heads have sinks.
    pub has_sinks: bool,
}

/// RMS norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QkNorm {
    /// Each head by itself, with one weight `[head_dim]` for all.
    Heads,
    /// All heads together, with a weight `[heads * head_dim]`.
    Whole,
}

/// `1 + beta * ln(1 + floor(position / context))` (Ministral 3).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueryScaling {
    /// How much queries grow.
    pub beta: f32,
    /// Tokens that a query scaled by 1 sees.
    pub context: usize,
}

impl QueryScaling {
    /// What the query at a position is multiplied by.
    pub fn at(self, position: usize) -> f32 {
        1.0 + self.beta * ((position / self.context) as f32).ln_1p()
    }
}

/// The gated delta net: a matrix `S: [key_dim, value_dim]` per value head, which each token makes
/// forget, corrects, and asks (arXiv:2412.06464).
///
/// Queries, keys and values go through a causal convolution, channel by channel, and SiLU; queries
/// and keys are divided by `sqrt(sum of squares + 1e-6)`, queries by `sqrt(key_dim)`, too. Then,
/// per value head and token:
/// `S = decay * S`, `S = S + k (beta * (v - S^T k))^T`, `o = S^T q`, with
/// `decay = exp(rate * softplus(decay layer))` and `beta = sigmoid(beta layer)`. What it gives is
/// `rms(o) * norm * silu(gate)`, head by head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaNet {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, a multiple of `key_heads`.
    pub value_heads: usize,
    /// Channels of a query and a key.
    pub key_dim: usize,
    /// Channels of a value.
    pub value_dim: usize,
    /// Tokens that the convolution sees, itself included.
    pub taps: usize,
    /// Whether value head `h` takes key head `h % key_heads`, not the one whose group it is in.
    pub is_tiled: bool,
}

/// `out(c * convolution(b * u))`, with `b`, `c` and `u` one after the other in what the input layer
/// gives, and a causal convolution channel by channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Convolution {
    /// Tokens that it sees, itself included.
    pub taps: usize,
}

impl DeltaNet {
    /// Channels of all queries, and of all keys.
    pub fn keys(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Channels of all values.
    pub fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// The head of queries and keys of a value head.
    pub fn key_head(&self, value_head: usize) -> usize {
        match self.is_tiled {
            true => value_head % self.key_heads,
            false => value_head / (self.value_heads / self.key_heads),
        }
    }
}

impl Mixer {
    /// The linear layers that take in what goes into the mixer.
    pub(super) fn layers(&self) -> Vec<Part> {
        let mut layers = match self {
            Self::Attention(_) | Self::DeltaNet(_) => vec![Part::AttnQ, Part::AttnK, Part::AttnV],
            Self::Convolution(_) => vec![Part::ConvolutionInput],
        };
        match self {
            Self::Attention(attention) if attention.is_gated => layers.push(Part::AttnGate),
            Self::DeltaNet(_) => {
                layers.extend([Part::AttnGate, Part::DeltaBeta, Part::DeltaDecay]);
            }
            Self::Attention(_) | Self::Convolution(_) => {}
        }
        layers
    }

    /// Its vectors, but for biases.
    pub(super) fn vectors(&self) -> impl Iterator<Item = Part> + use<> {
        let vectors: &[Part] = match self {
            Self::Attention(Attention { qk_norm: Some(_), .. }) => {
                &[Part::AttnQNorm, Part::AttnKNorm]
            }
            Self::DeltaNet(_) => &[Part::DeltaDecayRate, Part::DeltaNorm],
            Self::Attention(_) | Self::Convolution(_) => &[],
        };
        let has_sinks = matches!(self, Self::Attention(attention) if attention.has_sinks);
        vectors.iter().copied().chain(has_sinks.then_some(Part::AttnSinks))
    }

    /// Channels of queries, keys and values, and of what it gives.
    pub(super) fn widths(&self, hidden_size: usize) -> [usize; 4] {
        match self {
            Self::Attention(Attention { heads, kv_heads, head_dim, .. }) => {
                let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
                [queries, keys, keys, queries]
            }
            Self::DeltaNet(net) => [net.keys(), net.keys(), net.values(), net.values()],
            Self::Convolution(_) => [0, 0, 0, hidden_size],
        }
    }

    /// Channels of what it gives.
    pub fn output_width(&self, hidden_size: usize) -> usize {
        self.widths(hidden_size)[3]
    }

    /// Rows of a head of queries, if it has heads.
    pub fn query_head_dim(&self) -> Option<usize> {
        match self {
            Self::Attention(attention) => Some(attention.head_dim),
            Self::DeltaNet(net) => Some(net.key_dim),
            Self::Convolution(_) => None,
        }
    }

    /// Channels that go through its convolution, if it has one.
    pub fn convolved_channels(&self, hidden_size: usize) -> Option<usize> {
        match self {
            Self::Attention(_) => None,
            Self::DeltaNet(net) => Some(2 * net.keys() + net.values()),
            Self::Convolution(_) => Some(hidden_size),
        }
    }

    /// Tokens that its convolution sees; 0 without one.
    pub fn taps(&self) -> usize {
        match self {
            Self::Attention(_) => 0,
            Self::DeltaNet(DeltaNet { taps, .. }) | Self::Convolution(Convolution { taps }) => {
                *taps
            }
        }
    }

    /// Value heads of a delta net; 0 of others.
    pub(super) fn delta_heads(&self) -> usize {
        if let Self::DeltaNet(net) = self { net.value_heads } else { 0 }
    }

    /// Channels of their values.
    pub(super) fn delta_head_dim(&self) -> usize {
        if let Self::DeltaNet(net) = self { net.value_dim } else { 0 }
    }
}
