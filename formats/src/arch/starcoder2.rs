//! StarCoder2: LayerNorm, biases everywhere, GELU without a gate.

use std::borrow::Cow;

use super::{
    Activation, BlockSpec, Family, HfType, Norm, Part, llama,
    llama_cpp::{Ability, computed},
};
use crate::{ModelConfig, Result, config::Keys};

/// `starcoder2`.
#[derive(Debug)]
pub struct StarCoder2;

const BIASES: &str = "use_bias";

impl Family for StarCoder2 {
    fn architecture(&self) -> &'static str {
        "starcoder2"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "starcoder2", class: "Starcoder2ForCausalLM" }]
    }

    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "tie_word_embeddings" | BIASES => Some(1.0),
            "norm_epsilon" => Some(1e-5),
            _ => None,
        }
    }

    fn hf_key<'k>(&self, key: &'k str) -> &'k str {
        if key == "rms_norm_eps" { "norm_epsilon" } else { key }
    }

    fn norm(&self) -> Norm {
        Norm::Layer
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        config.sliding_window = keys.count("sliding_window")?;
        llama::read_biases(keys, config, BIASES)
    }

    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        ["embedding_dropout", "residual_dropout", "mlp_type", "norm_type"].contains(&key)
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        llama::leave_out(json, &["attention_bias", "mlp_bias"]);
        json[BIASES] = config.features.has_attention_bias.into();
        json["sliding_window"] = config.sliding_window.into();
    }

    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        Some(computed(config, &[Ability::Biases]))
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let mut spec = llama::block(config, index);
        spec.activates_by(Activation::GeluTanh, false);
        spec
    }

    fn hf_name(&self, part: Part) -> Cow<'static, str> {
        match part {
            Part::FfnUp => "mlp.c_fc.weight".into(),
            Part::FfnUpBias => "mlp.c_fc.bias".into(),
            Part::FfnDown => "mlp.c_proj.weight".into(),
            Part::FfnDownBias => "mlp.c_proj.bias".into(),
            _ => llama::hf_name(part),
        }
    }
}
