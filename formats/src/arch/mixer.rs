//! How tokens of a block learn of those before them.

use super::Part;

/// What mixes tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mixer {
    /// Each token looks at those before it.
    Attention(Attention),
    /// Attention whose keys and values are made of a few channels.
    Latent(LatentAttention),
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
    /// What values are made of.
    pub values: Values,
    /// The block before whose keys and values it attends to, if it makes none of its own.
    pub shares: Option<usize>,
}

/// What the values of attention are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Values {
    /// What their layer gives.
    Plain,
    /// The same, each head over its root mean square.
    Normed,
    /// What the layer of keys gives, each head over its root mean square.
    NormedKeys,
}

/// RMS norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QkNorm {
    /// Each head by itself, with one weight `[head_dim]` for all.
    Heads,
    /// All heads together, with a weight `[heads * head_dim]`.
    Whole,
}

/// `1 + beta * ln(1 + floor(position / context))` (Ministral 3, Mistral Small 4).
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

/// Latent attention: keys and values of all heads are made of a latent of `rank` channels, which is
/// all that is kept of a token, beside a turned key for all heads (arXiv:2405.04434).
///
/// With `l = rms(latent)` and the matrices `K` and `V` of a head, the score of a query `(a, b)` is
/// `scale * (a . K l + b . key)`, which is `scale * (K^T a . l + b . key)`; what the head gives is
/// `V` times the mean of `l`. Queries are made of the input, or of the norm of `query_rank`
/// channels made of it. These norms have the epsilon 1e-6, whatever that of others is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentAttention {
    /// Query heads.
    pub heads: usize,
    /// Channels of a query and a key that are not turned.
    pub plain_dim: usize,
    /// Channels behind them that are turned, even.
    pub turned_dim: usize,
    /// Channels of a value.
    pub value_dim: usize,
    /// Channels of the latent.
    pub rank: usize,
    /// Channels that queries are made of; `None` for those of the residual stream.
    pub query_rank: Option<usize>,
    /// What queries are multiplied by.
    pub query_scaling: Option<QueryScaling>,
    /// What scores are multiplied by.
    pub scale: f32,
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

impl Attention {
    /// As [`Mixer::dims`].
    fn dims(&self, part: Part, hidden: usize) -> Option<Vec<usize>> {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let normed = |all: usize| match self.qk_norm {
            Some(QkNorm::Heads) => self.head_dim,
            Some(QkNorm::Whole) | None => all,
        };
        Some(match part {
            Part::AttnQ | Part::AttnGate => vec![queries, hidden],
            Part::AttnK | Part::AttnV => vec![keys, hidden],
            Part::AttnQBias => vec![queries],
            Part::AttnKBias | Part::AttnVBias => vec![keys],
            Part::AttnQNorm => vec![normed(queries)],
            Part::AttnKNorm => vec![normed(keys)],
            Part::AttnSinks => vec![self.heads],
            _ => return None,
        })
    }
}

impl LatentAttention {
    /// As [`Mixer::dims`].
    fn dims(&self, part: Part, hidden: usize) -> Option<Vec<usize>> {
        let query_rank = self.query_rank.unwrap_or(hidden);
        Some(match part {
            Part::QueryDown => vec![query_rank, hidden],
            Part::QueryDownNorm => vec![query_rank],
            Part::AttnQ => vec![self.heads * self.query_dim(), query_rank],
            Part::LatentDown => vec![self.kept_dim(), hidden],
            Part::LatentNorm => vec![self.rank],
            Part::LatentKeys => vec![self.heads * self.plain_dim, self.rank],
            Part::LatentValues => vec![self.heads * self.value_dim, self.rank],
            _ => return None,
        })
    }

    /// The constant under the root of its norms.
    pub const EPSILON: f32 = 1e-6;

    /// Channels of a query.
    pub fn query_dim(&self) -> usize {
        self.plain_dim + self.turned_dim
    }

    /// Channels that are kept of a token: the latent, and the turned key.
    pub fn kept_dim(&self) -> usize {
        self.rank + self.turned_dim
    }
}

impl DeltaNet {
    /// What is added to the sums of squares that queries and keys are divided by.
    pub const EPSILON: f32 = 1e-6;

    /// As [`Mixer::dims`].
    fn dims(&self, part: Part, hidden: usize) -> Option<Vec<usize>> {
        Some(match part {
            Part::AttnQ | Part::AttnK => vec![self.keys(), hidden],
            Part::AttnV | Part::AttnGate => vec![self.values(), hidden],
            Part::DeltaBeta | Part::DeltaDecay => vec![self.value_heads, hidden],
            Part::DeltaDecayBias | Part::DeltaDecayRate => vec![self.value_heads],
            Part::DeltaNorm => vec![self.value_dim],
            Part::Convolution => vec![2 * self.keys() + self.values(), self.taps],
            _ => return None,
        })
    }

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
            Self::Attention(Attention { shares: Some(_), .. }) => vec![Part::AttnQ],
            Self::Attention(Attention { values: Values::NormedKeys, .. }) => {
                vec![Part::AttnQ, Part::AttnK]
            }
            Self::Attention(_) | Self::DeltaNet(_) => vec![Part::AttnQ, Part::AttnK, Part::AttnV],
            Self::Latent(latent) => {
                let query = match latent.query_rank {
                    Some(_) => Part::QueryDown,
                    None => Part::AttnQ,
                };
                vec![query, Part::LatentDown]
            }
            Self::Convolution(_) => vec![Part::ConvolutionInput],
        };
        match self {
            Self::Attention(attention) if attention.is_gated => layers.push(Part::AttnGate),
            Self::DeltaNet(_) => {
                layers.extend([Part::AttnGate, Part::DeltaBeta, Part::DeltaDecay]);
            }
            Self::Attention(_) | Self::Latent(_) | Self::Convolution(_) => {}
        }
        layers
    }

    /// Its vectors, but for biases.
    pub(super) fn vectors(&self) -> impl Iterator<Item = Part> + use<> {
        let vectors: &[Part] = match self {
            Self::Attention(Attention { qk_norm: Some(_), shares: Some(_), .. }) => {
                &[Part::AttnQNorm]
            }
            Self::Attention(Attention { qk_norm: Some(_), .. }) => {
                &[Part::AttnQNorm, Part::AttnKNorm]
            }
            Self::DeltaNet(_) => &[Part::DeltaDecayRate, Part::DeltaNorm],
            Self::Latent(LatentAttention { query_rank: Some(_), .. }) => {
                &[Part::QueryDownNorm, Part::LatentNorm]
            }
            Self::Latent(_) => &[Part::LatentNorm],
            Self::Attention(_) | Self::Convolution(_) => &[],
        };
        let has_sinks = matches!(self, Self::Attention(attention) if attention.has_sinks);
        vectors.iter().copied().chain(has_sinks.then_some(Part::AttnSinks))
    }

    /// The dimensions of a part of it, outermost first; `None` of other parts.
    pub(crate) fn dims(&self, part: Part, hidden: usize) -> Option<Vec<usize>> {
        if part == Part::AttnOutput {
            return Some(vec![hidden, self.output_width(hidden)]);
        }
        match self {
            Self::Attention(attention) => attention.dims(part, hidden),
            Self::Latent(latent) => latent.dims(part, hidden),
            Self::DeltaNet(net) => net.dims(part, hidden),
            Self::Convolution(Convolution { taps }) => Some(match part {
                Part::ConvolutionInput => vec![3 * hidden, hidden],
                Part::Convolution => vec![hidden, *taps],
                _ => return None,
            }),
        }
    }

    /// Channels of what it gives.
    pub fn output_width(&self, hidden_size: usize) -> usize {
        match self {
            Self::Attention(attention) => attention.heads * attention.head_dim,
            Self::Latent(latent) => latent.heads * latent.value_dim,
            Self::DeltaNet(net) => net.values(),
            Self::Convolution(_) => hidden_size,
        }
    }

    /// Rows of a head of queries, if it has heads.
    pub fn query_head_dim(&self) -> Option<usize> {
        match self {
            Self::Attention(attention) => Some(attention.head_dim),
            Self::Latent(latent) => Some(latent.query_dim()),
            Self::DeltaNet(net) => Some(net.key_dim),
            Self::Convolution(_) => None,
        }
    }

    /// Channels of a head that number `rope` of [`Decoder::ropes`](super::Decoder) turns, if it
    /// does.
    pub fn turned_head_dim(&self, rope: usize) -> Option<usize> {
        match self {
            Self::Attention(attention) => {
                (attention.rope == Some(rope)).then_some(attention.head_dim)
            }
            Self::Latent(latent) => Some(latent.turned_dim),
            Self::DeltaNet(_) | Self::Convolution(_) => None,
        }
    }

    /// Latent attention, if it is that.
    pub fn latent(&self) -> Option<&LatentAttention> {
        if let Self::Latent(latent) = self { Some(latent) } else { None }
    }

    /// Channels that go through its convolution, if it has one.
    pub fn convolved_channels(&self, hidden_size: usize) -> Option<usize> {
        match self {
            Self::Attention(_) | Self::Latent(_) => None,
            Self::DeltaNet(net) => Some(2 * net.keys() + net.values()),
            Self::Convolution(_) => Some(hidden_size),
        }
    }

    /// Tokens that its convolution sees; 0 without one.
    pub fn taps(&self) -> usize {
        match self {
            Self::Attention(_) | Self::Latent(_) => 0,
            Self::DeltaNet(DeltaNet { taps, .. }) | Self::Convolution(Convolution { taps }) => {
                *taps
            }
        }
    }
}
