//! GLM-4.5 and 4.6: experts scored one by one, beside a network for all; the first blocks have
//! none; half of each head turned.

use super::{BlockSpec, Family, HfType, Part, QkNorm, Routing, Stored, experts, llama};
use crate::{ModelConfig, Result, config::Keys};

/// `glm4_moe`.
#[derive(Debug)]
pub struct Glm4Moe;

impl Family for Glm4Moe {
    fn architecture(&self) -> &'static str {
        "glm4moe"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "glm4_moe", class: "Glm4MoeForCausalLM" }]
    }

    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "partial_rotary_factor" => Some(0.5),
            "first_k_dense_replace" => Some(1.0),
            "use_qk_norm" => Some(0.0),
            _ => None,
        }
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        config.features.has_attention_bias = keys.flag("attention_bias")?;
        config.features.has_qk_norm = keys.flag("use_qk_norm")?;
        experts::read(keys, config, Routing::SIGMOID)?;
        let dense = keys.count("first_k_dense_replace")?.unwrap_or(0);
        experts::read_blocks(keys, config, |index| index >= dense)
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        experts::write(config, json, "n_routed_experts", Some("moe_intermediate_size"));
        experts::write_groups(config, json);
        llama::write_partial_rotation(config, json);
        json["use_qk_norm"] = config.features.has_qk_norm.into();
        llama::leave_out(json, &["mlp_bias"]);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let mut spec = llama::block(config, index);
        let qk_norm = config.features.has_qk_norm.then_some(QkNorm::Heads);
        spec.attends(|attention| attention.qk_norm = qk_norm);
        spec
    }

    fn in_hf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        experts::beside(part, spec, experts::BESIDE_MANY)
            .or_else(|| experts::in_hf(part, spec))
            .unwrap_or(Stored::PLAIN)
    }

    /// The norm before the network has the name that others give the one behind attention.
    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        match part {
            Part::FfnNorm => Stored::named("post_attention_norm.weight"),
            _ => experts::in_gguf(part, spec).unwrap_or(Stored::PLAIN),
        }
    }
}
