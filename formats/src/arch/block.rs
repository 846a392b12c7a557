//! What a transformer block computes.

use super::Part;

/// What one block computes; blocks of a model may differ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockSpec {
    /// How tokens look at each other.
    pub attention: Attention,
    /// The network that each token goes through by itself.
    pub ffn: Ffn,
}

/// Causal attention.
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
    /// Which of [`Decoder::ropes`](super::Decoder) turns queries and keys.
    pub rope: usize,
}

/// `down(silu(gate) * up)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ffn {
    /// Neurons.
    pub width: usize,
}

/// Where the input of one or more linear layers is ready. A block is run stage by stage; it is
/// calibrated between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The normed residual stream, for queries, keys and values.
    Attention,
    /// What attention gives.
    AttentionOutput,
    /// The normed residual stream, for the feed-forward network.
    Ffn,
    /// The activations of neurons.
    FfnOutput,
}

impl Stage {
    /// Whether its input is made of the residual stream, not of the stage before.
    pub fn reads_residual(self) -> bool {
        matches!(self, Self::Attention | Self::Ffn)
    }

    /// Whether what its layers give is added to the residual stream.
    pub fn adds_to_residual(self) -> bool {
        matches!(self, Self::AttentionOutput | Self::FfnOutput)
    }
}

impl BlockSpec {
    /// The stages, in the order in which data flows through them.
    pub fn stages(&self) -> [Stage; 4] {
        [Stage::Attention, Stage::AttentionOutput, Stage::Ffn, Stage::FfnOutput]
    }

    /// The linear layers that take a stage in.
    pub fn layers_of(&self, stage: Stage) -> &'static [Part] {
        match stage {
            Stage::Attention => &[Part::AttnQ, Part::AttnK, Part::AttnV],
            Stage::AttentionOutput => &[Part::AttnOutput],
            Stage::Ffn => &[Part::FfnGate, Part::FfnUp],
            Stage::FfnOutput => &[Part::FfnDown],
        }
    }

    /// All linear layers, stage by stage.
    pub fn layers(&self) -> impl Iterator<Item = Part> {
        self.stages().into_iter().flat_map(|stage| self.layers_of(stage)).copied()
    }

    /// The vectors: norms.
    pub fn vectors(&self) -> impl Iterator<Item = Part> {
        [Part::AttnNorm, Part::FfnNorm].into_iter()
    }

    /// Whether a part is in the block.
    pub fn has(&self, part: Part) -> bool {
        self.vectors().chain(self.layers()).any(|found| found == part)
    }

    /// The dimensions of a part, outermost first: `[cols]` of a vector, `[rows, cols]` of a matrix.
    ///
    /// # Panics
    /// For a part outside of blocks.
    pub(super) fn dims(&self, part: Part, hidden_size: usize) -> Vec<usize> {
        let Self { attention: Attention { heads, kv_heads, head_dim, .. }, ffn } = self;
        match part {
            Part::AttnNorm | Part::FfnNorm => vec![hidden_size],
            Part::AttnQ => vec![heads * head_dim, hidden_size],
            Part::AttnK | Part::AttnV => vec![kv_heads * head_dim, hidden_size],
            Part::AttnOutput => vec![hidden_size, heads * head_dim],
            Part::FfnGate | Part::FfnUp => vec![ffn.width, hidden_size],
            Part::FfnDown => vec![hidden_size, ffn.width],
            Part::Embedding | Part::OutputNorm | Part::Output => {
                panic!("{part:?} is in no block")
            }
        }
    }
}
