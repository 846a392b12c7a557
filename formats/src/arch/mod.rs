//! What models compute, as data: one description per family.
//!
//! A [`Family`] turns hyperparameters into a [`Decoder`]. Whatever runs, quantizes or exports a
//! model walks that description, and knows no family by name.

mod block;
mod decoder;
mod deepseek;
mod experts;
mod gemma;
mod gemma4;
mod glm;
mod glm_moe;
mod gpt_oss;
mod granite;
mod lfm2;
mod llama;
mod llama_cpp;
mod minimax;
mod ministral;
mod mistral4;
mod mixer;
mod olmo;
mod opt;
mod part;
mod phi;
mod qwen;
mod qwen_moe;
mod qwen_next;
mod smollm;
mod starcoder2;

use std::{borrow::Cow, fmt::Debug};

pub use block::{Activation, BlockSpec, Ffn, Norm, Norms, Stage};
pub use decoder::{Decoder, Form, Place, Stored, Tensor};
pub use experts::{ExpertGroups, Experts, Routing, Scores};
pub use llama::Llama;
pub(crate) use llama::leave_out;
pub use mixer::{
    Attention, Convolution, DeltaNet, LatentAttention, Mixer, QkNorm, QueryScaling, Values,
};
pub use opt::FIRST_POSITION;
pub use part::{ExpertPart, Part, PartMap, Rows};

use crate::{ModelConfig, Result, config::Keys};

/// The RoPE factors, in files part of the tensors, here of the configuration.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The RoPE factors of short texts, of models that have others for long ones.
pub const ROPE_FACTORS_SHORT: &str = "rope_factors_short.weight";

/// Those of long texts.
pub const ROPE_FACTORS_LONG: &str = "rope_factors_long.weight";

/// All tensors that are part of the configuration here.
pub const ROPE_TENSORS: [&str; 3] = [ROPE_FACTORS, ROPE_FACTORS_SHORT, ROPE_FACTORS_LONG];

/// A kind of model in Hugging Face's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HfType {
    /// `model_type`.
    pub model_type: &'static str,
    /// The class in `architectures`.
    pub class: &'static str,
}

/// Models that are described by the same keys and compute the same but for numbers.
///
/// What is not overridden is as in Llama.
pub trait Family: Debug + Sync {
    /// GGUF's name, `general.architecture`.
    fn architecture(&self) -> &'static str;

    /// Hugging Face's names.
    fn hf_types(&self) -> &'static [HfType];

    /// Which of them a model is.
    fn hf_type(&self, _config: &ModelConfig) -> HfType {
        self.hf_types()[0]
    }

    /// Reads what only some families have. `config` holds what all have, and Llama's features.
    ///
    /// # Errors
    /// `Malformed` for a key with a value of the wrong kind, `Unsupported` for what is not
    /// computed.
    fn read(&self, _keys: &dyn Keys, _config: &mut ModelConfig) -> Result<()> {
        Ok(())
    }

    /// Whether a key of `config.json` has no effect on what is computed, though others' would.
    fn ignores(&self, _key: &str, _config: &ModelConfig) -> bool {
        false
    }

    /// The keys of `config.json` for what only some families have: what [`read`](Self::read) reads
    /// back.
    fn write(&self, _config: &ModelConfig, _json: &mut serde_json::Value) {}

    /// What the class of transformers takes for a key of `config.json` that is absent: a number,
    /// or 1 for true. A key of which it says nothing here has to be there, or has no effect.
    fn default(&self, _key: &str) -> Option<f64> {
        None
    }

    /// Its name for a key of Llama's `config.json`.
    fn hf_key<'k>(&self, key: &'k str) -> &'k str {
        key
    }

    /// Whether blocks with a window may have a rotary embedding of their own.
    fn has_local_rope(&self) -> bool {
        false
    }

    /// Whether blocks without a window may have other heads than those with one.
    fn has_global_heads(&self) -> bool {
        false
    }

    /// Whether `head_dim` is that of what is turned, and the other sizes of heads have keys of
    /// their own.
    fn has_latent_attention(&self) -> bool {
        false
    }

    /// How norms of the residual stream are computed.
    fn norm(&self) -> Norm {
        Norm::Rms
    }

    /// Positions that the model has learned embeddings of.
    fn learned_positions(&self, _config: &ModelConfig) -> Option<usize> {
        None
    }

    /// What block `index` computes.
    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec;

    /// The model that llama.cpp computes when it is given this one; `None` if it has no code for
    /// the architecture.
    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        Some(llama_cpp::computed(config, &[]))
    }

    /// What precedes the number of a block in Hugging Face's names.
    fn hf_blocks(&self) -> &'static str {
        "model.layers."
    }

    /// Hugging Face's name of a part; for one of a block, what follows its number.
    fn hf_name(&self, part: Part) -> Cow<'static, str> {
        llama::hf_name(part)
    }

    /// How Hugging Face's files store a part; `spec` is that of its block.
    fn in_hf(&self, _part: Part, _spec: Option<&BlockSpec>) -> Stored {
        Stored::PLAIN
    }

    /// How llama.cpp's files store a part; `spec` is that of its block.
    fn in_gguf(&self, _part: Part, _spec: Option<&BlockSpec>) -> Stored {
        Stored::PLAIN
    }
}

impl PartialEq for dyn Family {
    fn eq(&self, other: &Self) -> bool {
        self.architecture() == other.architecture()
    }
}

/// Every family.
pub const FAMILIES: [&dyn Family; 26] = [
    &Llama,
    &qwen::Qwen2,
    &qwen::Qwen3,
    &qwen_moe::QwenMoe::Two,
    &qwen_moe::QwenMoe::Three,
    &qwen_next::QwenNext::Next,
    &qwen_next::QwenNext::Dense,
    &qwen_next::QwenNext::Moe,
    &gemma::Gemma::Two,
    &gemma::Gemma::Three,
    &gemma4::Gemma4,
    &phi::Phi3,
    &ministral::Ministral3,
    &smollm::SmolLm3,
    &olmo::Olmo,
    &granite::Granite::Dense,
    &granite::Granite::Moe,
    &glm::Glm4,
    &glm_moe::Glm4Moe,
    &minimax::MiniMaxM2,
    &gpt_oss::GptOss,
    &deepseek::DeepSeek,
    &mistral4::Mistral4,
    &lfm2::Lfm2,
    &opt::Opt,
    &starcoder2::StarCoder2,
];

/// The family that GGUF calls so.
pub fn by_architecture(name: &str) -> Option<&'static dyn Family> {
    FAMILIES.into_iter().find(|family| family.architecture() == name)
}

/// The family that Hugging Face calls so, and which of its kinds it is.
pub fn by_model_type(name: &str) -> Option<(&'static dyn Family, HfType)> {
    FAMILIES.into_iter().find_map(|family| {
        let found = family.hf_types().iter().find(|found| found.model_type == name)?;
        Some((family, *found))
    })
}
