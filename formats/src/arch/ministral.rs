//! Ministral 3 and Mistral Small 3: Mistral with YaRN, and queries that grow with their position.

use super::{
    BlockSpec, Family, HfType, Part, QueryScaling, Stored, llama,
    llama_cpp::{self, Ability},
};
use crate::{
    ModelConfig, Result, Scaling,
    config::{Keys, shortest},
};

/// `ministral3`.
#[derive(Debug)]
pub struct Ministral3;

impl Family for Ministral3 {
    fn architecture(&self) -> &'static str {
        "mistral3"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "ministral3", class: "Ministral3ForCausalLM" }]
    }

    /// That the scale of queries is known.
    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "llama_4_scaling_beta" => Some(0.0),
            _ => None,
        }
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        config.sliding_window = keys.count("sliding_window")?;
        keys.windowed(config.block_count)?;
        read_query_scaling(keys, config)
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        write_query_scaling(config, json);
        json["sliding_window"] = config.sliding_window.into();
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

/// Reads how queries grow.
pub(super) fn read_query_scaling(keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
    let beta = keys.number("llama_4_scaling_beta")?.filter(|&beta| beta != 0.0);
    if let (Some(beta), Scaling::Yarn(yarn)) = (beta, &config.rope.scaling) {
        let scaling = QueryScaling { beta: beta as f32, context: yarn.context };
        config.features.query_scaling = Some(scaling);
    }
    Ok(())
}

/// The new spelling of rotary embeddings, which has a place for it.
pub(super) fn write_query_scaling(config: &ModelConfig, json: &mut serde_json::Value) {
    json["rope_parameters"] = json["rope_scaling"].take();
    json["rope_parameters"]["rope_theta"] = shortest(config.rope.theta).into();
    if let Some(scaling) = config.features.query_scaling {
        json["rope_parameters"]["llama_4_scaling_beta"] = shortest(scaling.beta).into();
    }
}
