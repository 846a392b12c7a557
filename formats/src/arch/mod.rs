//! What models compute, as data: one description per family.
//!
//! A [`Family`] turns hyperparameters into a [`Decoder`]. Whatever runs, quantizes or exports a
//! model walks that description, and knows no family by name.

mod block;
mod decoder;
mod llama;
mod part;

use std::fmt::Debug;

pub use block::{Attention, BlockSpec, Ffn, Stage};
pub use decoder::{Decoder, Tensor};
pub use llama::Llama;
pub use part::{Part, PartMap, Rows};

use crate::{Layout, ModelConfig};

/// The RoPE factors, in files part of the tensors, here of the configuration.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Models that are described by the same keys and compute the same but for numbers.
pub trait Family: Debug + Sync {
    /// GGUF's name, `general.architecture`.
    fn architecture(&self) -> &'static str;

    /// Hugging Face's names, `model_type`.
    fn model_types(&self) -> &'static [&'static str];

    /// What block `index` computes.
    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec;

    /// Hugging Face's name of a tensor, which follows `model.layers.N.` for one of a block.
    fn hf_name(&self, part: Part) -> &'static str;

    /// The order in which llama.cpp's converter leaves the rows of a tensor of a block.
    fn gguf_layout(&self, _part: Part, _spec: &BlockSpec) -> Layout {
        Layout::AsStored
    }
}

impl PartialEq for dyn Family {
    fn eq(&self, other: &Self) -> bool {
        self.architecture() == other.architecture()
    }
}

/// Every family.
pub const FAMILIES: [&dyn Family; 1] = [&Llama];

/// The family that GGUF calls so.
pub fn by_architecture(name: &str) -> Option<&'static dyn Family> {
    FAMILIES.into_iter().find(|family| family.architecture() == name)
}

/// The family that Hugging Face calls so.
pub fn by_model_type(name: &str) -> Option<&'static dyn Family> {
    FAMILIES.into_iter().find(|family| family.model_types().contains(&name))
}
