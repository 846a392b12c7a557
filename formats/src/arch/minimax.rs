//! MiniMax-M2: experts scored one by one, queries and keys normed as wholes, a part of each head
//! turned.

use std::borrow::Cow;

use super::{BlockSpec, Family, HfType, Part, QkNorm, Routing, Stored, experts, llama};
use crate::{ModelConfig, Result, config::Keys};

/// `minimax_m2`.
#[derive(Debug)]
pub struct MiniMaxM2;

impl Family for MiniMaxM2 {
    fn architecture(&self) -> &'static str {
        "minimax-m2"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "minimax_m2", class: "MiniMaxM2ForCausalLM" }]
    }

    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "partial_rotary_factor" => Some(0.5),
            "rope_theta" => Some(5e6),
            _ => None,
        }
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        experts::read(keys, config, Routing::SIGMOID)
    }

    /// That they are there is the model, and others say it too; or they are about what guesses
    /// further tokens.
    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        const IGNORED: [&str; 7] = [
            "use_qk_norm",
            "qk_norm_type",
            "use_routing_bias",
            "attn_type_list",
            "use_mtp",
            "num_mtp_modules",
            "mtp_transformer_layers",
        ];
        IGNORED.contains(&key)
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        experts::write(config, json, "num_local_experts", None);
        llama::write_partial_rotation(config, json);
        json["rotary_dim"] = (2 * config.rope.factors.len()).into();
        llama::leave_out(json, &["attention_bias", "mlp_bias"]);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let mut spec = llama::block(config, index);
        spec.attends(|attention| attention.qk_norm = Some(QkNorm::Whole));
        spec
    }

    fn hf_name(&self, part: Part) -> Cow<'static, str> {
        llama::mixtral_name(part).unwrap_or_else(|| llama::hf_name(part))
    }

    fn in_hf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        experts::in_hf(part, spec).unwrap_or(Stored::PLAIN)
    }

    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        experts::in_gguf(part, spec).unwrap_or(Stored::PLAIN)
    }
}
