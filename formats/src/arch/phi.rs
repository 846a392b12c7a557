//! Phi-3 and Phi-4: fused matrices, part of each head turned, other RoPE factors for long texts.

use super::{BlockSpec, Family, HfType, Part, Stored, llama};
use crate::{ModelConfig, Result, config::Keys};

/// `phi3`.
#[derive(Debug)]
pub struct Phi3;

const QKV: &[Part] = &[Part::AttnQ, Part::AttnK, Part::AttnV];
const GATE_UP: &[Part] = &[Part::FfnGate, Part::FfnUp];

impl Family for Phi3 {
    fn architecture(&self) -> &'static str {
        "phi3"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "phi3", class: "Phi3ForCausalLM" }]
    }

    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "partial_rotary_factor" => Some(1.0),
            "pad_token_id" => Some(32_000.0),
            _ => None,
        }
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        config.sliding_window = keys.count("sliding_window")?;
        keys.windowed(config.block_count)?;
        // Asked again: it is read where RoPE needs it.
        keys.number("original_max_position_embeddings").map(drop)
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        llama::write_partial_rotation(config, json);
        if let Some(context) = json["rope_scaling"].get("original_max_position_embeddings") {
            json["original_max_position_embeddings"] = context.clone();
        }
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        llama::block(config, index)
    }

    fn in_hf(&self, part: Part, _spec: Option<&BlockSpec>) -> Stored {
        match part {
            Part::AttnQ | Part::AttnK | Part::AttnV => {
                Stored::fused("self_attn.qkv_proj.weight", QKV)
            }
            Part::FfnGate | Part::FfnUp => Stored::fused("mlp.gate_up_proj.weight", GATE_UP),
            _ => Stored::PLAIN,
        }
    }

    fn in_gguf(&self, part: Part, _spec: Option<&BlockSpec>) -> Stored {
        match part {
            Part::AttnQ | Part::AttnK | Part::AttnV => Stored::fused("attn_qkv.weight", QKV),
            Part::FfnGate | Part::FfnUp => Stored::fused("ffn_up.weight", GATE_UP),
            _ => Stored::PLAIN,
        }
    }
}
