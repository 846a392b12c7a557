//! What llama.cpp makes of a model, whatever a file says: its code has one graph per architecture,
//! which knows of some features only.

use crate::{ModelConfig, Rope, Scaling};

/// What the code of an architecture has that others' lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ability {
    /// Blocks that see the last tokens only.
    Windows,
    /// RoPE factors that are not the same for all pairs of channels.
    Factors,
    /// Biases of other layers than queries, keys and values.
    Biases,
}

/// The model that code with these abilities computes.
pub(super) fn computed(config: &ModelConfig, abilities: &[Ability]) -> ModelConfig {
    let lacks = |ability| !abilities.contains(&ability);
    let mut computed = config.clone();
    if lacks(Ability::Windows) {
        computed.sliding_window = None;
    }
    if lacks(Ability::Biases) {
        computed.features.has_output_bias = false;
        computed.features.has_ffn_bias = false;
    }
    let rope = &config.rope;
    match &rope.scaling {
        Scaling::Factors if lacks(Ability::Factors) && rope.linear_factor().is_none() => {
            computed.rope.factors.fill(1.0);
        }
        Scaling::Yarn(yarn) => {
            let yarn = crate::Yarn { truncate: true, ..*yarn };
            computed.rope = Rope::yarn(rope.theta, rope.factors.len(), yarn, rope.amplitude);
        }
        Scaling::Dynamic { .. } => computed.rope.scaling = Scaling::Factors,
        Scaling::Factors | Scaling::Long(_) => {}
    }
    computed
}
