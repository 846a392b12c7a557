//! Qwen2 and 2.5, which have biases of queries, keys and values; Qwen3, which norms queries and
//! keys of each head.

use super::{BlockSpec, Family, HfType, QkNorm, llama};
use crate::{ModelConfig, Result, config::Keys};

/// `qwen2`.
#[derive(Debug)]
pub struct Qwen2;

impl Family for Qwen2 {
    fn architecture(&self) -> &'static str {
        "qwen2"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "qwen2", class: "Qwen2ForCausalLM" }]
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        config.features.has_attention_bias = true;
        read_window(keys, config)
    }

    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        is_about_windows(key)
    }

    /// That there are biases is not said.
    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        llama::leave_out(json, &["attention_bias"]);
        write_window(config, json);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        llama::block(config, index)
    }
}

/// `qwen3`.
#[derive(Debug)]
pub struct Qwen3;

impl Family for Qwen3 {
    fn architecture(&self) -> &'static str {
        "qwen3"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "qwen3", class: "Qwen3ForCausalLM" }]
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        llama::read_attention_bias(keys, config)?;
        read_window(keys, config)
    }

    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        is_about_windows(key)
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        write_window(config, json);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let mut spec = llama::block(config, index);
        spec.attends(|attention| attention.qk_norm = Some(QkNorm::Heads));
        spec
    }
}

/// The window counts only where `use_sliding_window` says so, from `max_window_layers` on.
pub(super) fn read_window(keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
    let (window, windowed) = (keys.count("sliding_window")?, keys.windowed(config.block_count)?);
    let first = keys.number("max_window_layers")?.map_or(0, |first| first as usize);
    if keys.is_gguf() || keys.flag("use_sliding_window")? {
        config.sliding_window = window;
        let by_number = || (0..config.block_count).map(|index| index >= first).collect();
        config.features.windowed = windowed.unwrap_or_else(by_number);
        llama::settle_windows(config);
    }
    Ok(())
}

pub(super) fn is_about_windows(key: &str) -> bool {
    ["max_window_layers", "sliding_window", "layer_types"].contains(&key)
}

pub(super) fn write_window(config: &ModelConfig, json: &mut serde_json::Value) {
    if config.sliding_window.is_some() {
        json["use_sliding_window"] = true.into();
        llama::write_windows(config, json);
    }
}
