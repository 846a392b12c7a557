//! GLM-4: norms before and behind, half of each head turned, neighbours together; gate and up
//! fused.

use std::borrow::Cow;

use super::{Attention, BlockSpec, Family, HfType, Norms, Part, Stored, llama};
use crate::{Layout, ModelConfig, Result, config::Keys};

/// `glm4`.
#[derive(Debug)]
pub struct Glm4;

const GATE_UP: &[Part] = &[Part::FfnGate, Part::FfnUp];

impl Family for Glm4 {
    fn architecture(&self) -> &'static str {
        "glm4"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "glm4", class: "Glm4ForCausalLM" }]
    }

    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "partial_rotary_factor" => Some(0.5),
            "pad_token_id" => Some(151_329.0),
            _ => None,
        }
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        config.features.has_attention_bias = keys.flag("attention_bias")?;
        Ok(())
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        llama::write_partial_rotation(config, json);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let mut spec = llama::block(config, index);
        spec.norms = Norms::Both;
        spec
    }

    fn hf_name(&self, part: Part) -> Cow<'static, str> {
        match part {
            Part::AttnPostNorm => "post_self_attn_layernorm.weight".into(),
            Part::FfnPostNorm => "post_mlp_layernorm.weight".into(),
            _ => llama::hf_name(part),
        }
    }

    fn in_hf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        match part {
            Part::FfnGate | Part::FfnUp => Stored::fused("mlp.gate_up_proj.weight", GATE_UP),
            _ => neighbours(part, spec),
        }
    }

    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        match part {
            Part::FfnGate | Part::FfnUp => Stored::fused("ffn_up.weight", GATE_UP),
            _ => neighbours(part, spec),
        }
    }
}

/// The order of those who turn neighbours, of the turned part of each head.
fn neighbours(part: Part, spec: Option<&BlockSpec>) -> Stored {
    match (part, spec.and_then(BlockSpec::attention)) {
        (Part::AttnQ | Part::AttnK | Part::AttnQBias | Part::AttnKBias, Some(attention)) => {
            let &Attention { head_dim, rotated, .. } = attention;
            Stored::ordered(Layout::Interleaved { head_dim, first: 0, rotated })
        }
        _ => Stored::PLAIN,
    }
}
