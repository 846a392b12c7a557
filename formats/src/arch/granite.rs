//! Granite 3 and 4, dense: Llama with four multipliers.

use super::{
    BlockSpec, Family, HfType, Part, Stored, llama,
    llama_cpp::{self, Ability},
};
use crate::{
    ModelConfig, Result,
    config::{Keys, shortest},
};

/// `granite`.
#[derive(Debug)]
pub struct Granite;

const LOGITS_SCALING: &str = "logits_scaling";

impl Family for Granite {
    fn architecture(&self) -> &'static str {
        "granite"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "granite", class: "GraniteForCausalLM" }]
    }

    /// The class's. That of attention is not what other families have.
    fn default(&self, key: &str) -> Option<f64> {
        ["embedding_multiplier", "residual_multiplier", LOGITS_SCALING, "attention_multiplier"]
            .contains(&key)
            .then_some(1.0)
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        let number = |key: &str| -> Result<f32> { Ok(keys.number(key)?.unwrap_or(1.0) as f32) };
        llama::read_attention_bias(keys, config)?;
        let features = &mut config.features;
        features.embedding_scale = number("embedding_multiplier")?;
        features.residual_scale = number("residual_multiplier")?;
        features.logit_scale = 1.0 / number(LOGITS_SCALING)?;
        features.attention_scale = keys.number("attention_multiplier")?.map(|scale| scale as f32);
        features.has_ffn_bias = keys.flag("mlp_bias")?;
        Ok(())
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        let features = &config.features;
        let scale = config.family.block(config, 0).attention.scale;
        json["embedding_multiplier"] = shortest(features.embedding_scale).into();
        json["residual_multiplier"] = shortest(features.residual_scale).into();
        json[LOGITS_SCALING] = shortest(1.0 / features.logit_scale).into();
        json["attention_multiplier"] = shortest(scale).into();
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        llama::block(config, index)
    }

    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        Some(llama_cpp::computed(config, &[Ability::Factors, Ability::Biases]))
    }

    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        llama::interleaved(part, spec)
    }
}
