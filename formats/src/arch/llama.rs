//! Llama, and Mistral, which differs by its window.

use super::{Attention, BlockSpec, Family, Ffn, Part};
use crate::{Layout, ModelConfig};

/// `llama` and `mistral`.
#[derive(Debug)]
pub struct Llama;

impl Family for Llama {
    fn architecture(&self) -> &'static str {
        "llama"
    }

    fn model_types(&self) -> &'static [&'static str] {
        &["llama", "mistral"]
    }

    fn block(&self, config: &ModelConfig, _index: usize) -> BlockSpec {
        let attention = Attention {
            heads: config.head_count,
            kv_heads: config.kv_head_count,
            head_dim: config.head_dim,
            window: config.sliding_window,
            rope: 0,
        };
        BlockSpec { attention, ffn: Ffn { width: config.ffn_size } }
    }

    fn hf_name(&self, part: Part) -> &'static str {
        match part {
            Part::Embedding => "model.embed_tokens.weight",
            Part::AttnNorm => "input_layernorm.weight",
            Part::AttnQ => "self_attn.q_proj.weight",
            Part::AttnK => "self_attn.k_proj.weight",
            Part::AttnV => "self_attn.v_proj.weight",
            Part::AttnOutput => "self_attn.o_proj.weight",
            Part::FfnNorm => "post_attention_layernorm.weight",
            Part::FfnGate => "mlp.gate_proj.weight",
            Part::FfnUp => "mlp.up_proj.weight",
            Part::FfnDown => "mlp.down_proj.weight",
            Part::OutputNorm => "model.norm.weight",
            Part::Output => "lm_head.weight",
        }
    }

    fn gguf_layout(&self, part: Part, spec: &BlockSpec) -> Layout {
        match part {
            Part::AttnQ | Part::AttnK => Layout::Interleaved { head_dim: spec.attention.head_dim },
            _ => Layout::AsStored,
        }
    }
}
