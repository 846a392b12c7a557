//! Mistral Small 4: latent attention as in DeepSeek, with queries that grow with their position;
//! experts beside a network for all.

use serde_json::Value;

use super::{
    BlockSpec, Family, HfType, Part, Routing, Stored, deepseek, experts, llama, ministral,
};
use crate::{ModelConfig, Result, config::Keys};

/// `mistral4`.
#[derive(Debug)]
pub struct Mistral4;

impl Family for Mistral4 {
    fn architecture(&self) -> &'static str {
        "mistral4"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "mistral4", class: "Mistral4ForCausalLM" }]
    }

    fn hf_key<'k>(&self, key: &'k str) -> &'k str {
        deepseek::hf_key(key)
    }

    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "rope_interleave" | "norm_topk_prob" => Some(1.0),
            "llama_4_scaling_beta" => Some(0.0),
            _ => None,
        }
    }

    fn has_latent_attention(&self) -> bool {
        true
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        experts::read(keys, config, Routing::SOFTMAX)?;
        let dense = keys.count("first_k_dense_replace")?.unwrap_or(0);
        experts::read_blocks(keys, config, |index| index >= dense)?;
        ministral::read_query_scaling(keys, config)?;
        deepseek::read_latent(keys, config)
    }

    /// What follows from others, and that all blocks see all tokens.
    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        ["head_dim", "qk_head_dim", "partial_rotary_factor"].contains(&key)
    }

    fn write(&self, config: &ModelConfig, json: &mut Value) {
        experts::write(config, json, "n_routed_experts", Some("moe_intermediate_size"));
        experts::write_groups(config, json);
        deepseek::write_latent(config, json);
        ministral::write_query_scaling(config, json);
        llama::leave_out(json, &["mlp_bias"]);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        deepseek::block(config, index)
    }

    fn in_hf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        deepseek::in_hf(part, spec)
    }

    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        deepseek::in_gguf(part, spec)
    }
}
