//! SmolLM3: Llama, some blocks of which turn nothing.

use super::{BlockSpec, Family, HfType, Part, Stored, llama, llama_cpp};
use crate::{
    ModelConfig, Result,
    config::{Keys, every},
};

/// `smollm3`.
#[derive(Debug)]
pub struct SmolLm3;

impl Family for SmolLm3 {
    fn architecture(&self) -> &'static str {
        "smollm3"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "smollm3", class: "SmolLM3ForCausalLM" }]
    }

    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "tie_word_embeddings" => Some(1.0),
            "rope_theta" => Some(2e6),
            "pad_token_id" => Some(128_004.0),
            _ => None,
        }
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        llama::read_attention_bias(keys, config)?;
        let features = &mut config.features;
        features.has_ffn_bias = keys.flag("mlp_bias")?;
        let interval = keys.number("no_rope_layer_interval")?.map_or(4, |every| every as usize);
        let rotated = keys.flags("no_rope_layers", config.block_count)?;
        features.rotated = rotated.unwrap_or_else(|| every(interval.max(1), config.block_count));
        if keys.flag("use_sliding_window")? {
            config.sliding_window = keys.count("sliding_window")?;
            config.features.windowed = keys.windowed(config.block_count)?.unwrap_or_default();
            llama::settle_windows(config);
        }
        Ok(())
    }

    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        ["layer_types", "max_window_layers", "sliding_window"].contains(&key)
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        let flag = |index: usize| u8::from(config.features.is_rotated(index));
        json["no_rope_layers"] = (0..config.block_count).map(flag).collect::<Vec<_>>().into();
        if config.sliding_window.is_some() {
            json["use_sliding_window"] = true.into();
            llama::write_windows(config, json);
        }
    }

    /// It turns nothing in every fourth block.
    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        let mut computed = llama_cpp::computed(config, &[]);
        computed.features.rotated = every(4, config.block_count);
        Some(computed)
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        llama::block(config, index)
    }

    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        llama::interleaved(part, spec)
    }
}
