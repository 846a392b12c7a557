//! Qwen3-Next, Qwen3.5 and what follows it: three blocks of four are gated delta nets, the others
//! gated attention with a part of each head turned; with experts or without.

use serde_json::Value;

use super::{
    BlockSpec, DeltaNet, Family, Form, HfType, Mixer, Part, QkNorm, Routing, Stored, experts,
    llama, llama_cpp, qwen::is_about_windows, qwen_moe,
};
use crate::{
    ModelConfig, Result,
    config::{Keys, every},
};

/// `qwen3_next`, `qwen3_5_text` and `qwen3_5_moe_text`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum QwenNext {
    /// Qwen3-Next: experts; rows of fused matrices stand key head by key head.
    Next,
    /// Qwen3.5 and later without experts.
    Dense,
    /// Qwen3.5 and later with experts.
    Moe,
}

// What is fused, in order.
const Q_GATE: &[Part] = &[Part::AttnQ, Part::AttnGate];
const QKV: &[Part] = &[Part::AttnQ, Part::AttnK, Part::AttnV];
const QKVZ: &[Part] = &[Part::AttnQ, Part::AttnK, Part::AttnV, Part::AttnGate];
const BETA_DECAY: &[Part] = &[Part::DeltaBeta, Part::DeltaDecay];

/// One block in so many has attention, if nothing is said.
const INTERVAL: usize = 4;

impl Family for QwenNext {
    fn architecture(&self) -> &'static str {
        match self {
            Self::Next => "qwen3next",
            Self::Dense => "qwen35",
            Self::Moe => "qwen35moe",
        }
    }

    fn hf_types(&self) -> &'static [HfType] {
        match self {
            Self::Next => &[HfType { model_type: "qwen3_next", class: "Qwen3NextForCausalLM" }],
            Self::Dense => &[HfType { model_type: "qwen3_5_text", class: "Qwen3_5ForCausalLM" }],
            Self::Moe => {
                &[HfType { model_type: "qwen3_5_moe_text", class: "Qwen3_5MoeForCausalLM" }]
            }
        }
    }

    fn default(&self, key: &str) -> Option<f64> {
        match (self, key) {
            (_, "partial_rotary_factor") => Some(0.25),
            (_, "linear_conv_kernel_dim") => Some(4.0),
            (_, "linear_key_head_dim" | "linear_value_head_dim") => Some(128.0),
            (_, "linear_num_key_heads") => Some(16.0),
            (_, "linear_num_value_heads") => Some(32.0),
            (Self::Next, "norm_topk_prob") => Some(1.0),
            _ => None,
        }
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        if keys.flag("attention_bias")? {
            return Err(keys.unsupported("`attention_bias` true beside gated attention".into()));
        }
        if keys.said("attn_output_gate")? == Some(false) {
            return Err(keys.unsupported("`attn_output_gate` false".into()));
        }
        if *self != Self::Dense {
            qwen_moe::read_experts(keys, config, Routing::SOFTMAX)?;
        }
        let recurrent = keys.recurrent(config.block_count)?;
        let interval = keys.count("full_attention_interval")?.unwrap_or(INTERVAL).max(1);
        config.features.recurrent =
            recurrent.unwrap_or_else(|| every(interval, config.block_count));
        config.features.recurrence = Some(Mixer::DeltaNet(self.delta_net(keys)?));
        Ok(())
    }

    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        const IGNORED: [&str; 6] = [
            "mamba_ssm_dtype",
            "mtp_num_hidden_layers",
            "mtp_use_dedicated_embeddings",
            "decoder_sparse_step",
            "mlp_only_layers",
            "norm_topk_prob",
        ];
        IGNORED.contains(&key) || is_about_windows(key)
    }

    fn write(&self, config: &ModelConfig, json: &mut Value) {
        let features = &config.features;
        if *self != Self::Dense {
            experts::write(config, json, "num_experts", Some("moe_intermediate_size"));
            json["shared_expert_intermediate_size"] = features.shared_ffn_size.unwrap_or(0).into();
            qwen_moe::write_sparse_blocks(config, json);
        }
        if let Some(Mixer::DeltaNet(net)) = features.recurrence {
            json["linear_num_key_heads"] = net.key_heads.into();
            json["linear_num_value_heads"] = net.value_heads.into();
            json["linear_key_head_dim"] = net.key_dim.into();
            json["linear_value_head_dim"] = net.value_dim.into();
            json["linear_conv_kernel_dim"] = net.taps.into();
        }
        llama::write_layer_types(config, json, "linear_attention", |index| {
            features.is_recurrent(index)
        });
        llama::write_partial_rotation(config, json);
        llama::leave_out(json, &["mlp_bias"]);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let mut spec = llama::block(config, index);
        spec.attends(|attention| {
            attention.qk_norm = Some(QkNorm::Heads);
            attention.is_gated = true;
        });
        spec
    }

    /// Its code has the weights of experts, and the order of value heads.
    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        let mut computed = llama_cpp::computed(config, &[]);
        if let Some(experts) = &mut computed.features.experts {
            experts.routing = Routing::SOFTMAX;
        }
        if let Some(Mixer::DeltaNet(net)) = &mut computed.features.recurrence {
            net.is_tiled = self.is_tiled_in_gguf() && net.value_heads > net.key_heads;
        }
        Some(computed)
    }

    fn in_hf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        let mixer = spec.map(|spec| spec.mixer);
        match (part, mixer) {
            (Part::AttnQ | Part::AttnGate, Some(Mixer::Attention(attention))) => {
                Stored::in_turns("self_attn.q_proj.weight", Q_GATE, attention.heads)
            }
            (
                Part::AttnQ | Part::AttnK | Part::AttnV | Part::AttnGate,
                Some(Mixer::DeltaNet(net)),
            ) if *self == Self::Next => {
                Stored::in_turns("linear_attn.in_proj_qkvz.weight", QKVZ, net.key_heads)
            }
            (Part::AttnQ | Part::AttnK | Part::AttnV, Some(Mixer::DeltaNet(_))) => {
                Stored::fused("linear_attn.in_proj_qkv.weight", QKV)
            }
            (Part::DeltaBeta | Part::DeltaDecay, Some(Mixer::DeltaNet(net)))
                if *self == Self::Next =>
            {
                Stored::in_turns("linear_attn.in_proj_ba.weight", BETA_DECAY, net.key_heads)
            }
            (Part::AttnOutput, Some(Mixer::DeltaNet(_))) => {
                Stored::named("linear_attn.out_proj.weight")
            }
            (Part::Convolution, _) => Stored { has_outer: true, ..Stored::PLAIN },
            (Part::DeltaDecayRate, _) => Stored::in_form(Form::LogOfNegative),
            (
                Part::AttnNorm
                | Part::AttnQNorm
                | Part::AttnKNorm
                | Part::FfnNorm
                | Part::OutputNorm,
                _,
            ) => Stored::in_form(Form::LessOne),
            _ => experts::beside(part, spec, experts::BESIDE_ONE)
                .or_else(|| experts::in_hf(part, spec))
                .unwrap_or(Stored::PLAIN),
        }
    }

    /// The norm before the network has the name that others give the one behind attention.
    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        let mixer = spec.map(|spec| spec.mixer);
        match (part, mixer) {
            (Part::FfnNorm, _) => Stored::named("post_attention_norm.weight"),
            (Part::AttnQ | Part::AttnGate, Some(Mixer::Attention(attention))) => {
                Stored::in_turns("attn_q.weight", Q_GATE, attention.heads)
            }
            (Part::AttnQ | Part::AttnK | Part::AttnV, Some(Mixer::DeltaNet(_))) => {
                Stored::fused("attn_qkv.weight", QKV)
            }
            (Part::DeltaBeta | Part::DeltaDecay, Some(Mixer::DeltaNet(net)))
                if *self == Self::Next =>
            {
                Stored::in_turns("ssm_ba.weight", BETA_DECAY, net.key_heads)
            }
            (Part::AttnOutput, Some(Mixer::DeltaNet(_))) => Stored::named("ssm_out.weight"),
            _ => experts::in_gguf(part, spec).unwrap_or(Stored::PLAIN),
        }
    }
}

impl QwenNext {
    /// llama.cpp's converter reorders the value heads of Qwen3.5, not those of Qwen3-Next.
    fn is_tiled_in_gguf(self) -> bool {
        self != Self::Next
    }

    fn delta_net(self, keys: &dyn Keys) -> Result<DeltaNet> {
        let count = |key: &str| Ok::<_, crate::FormatError>(keys.count(key)?.unwrap_or(0));
        let (key_heads, value_heads) =
            (count("linear_num_key_heads")?, count("linear_num_value_heads")?);
        let value_dim = match keys.count("linear_inner_size")? {
            Some(all) => all.checked_div(value_heads).unwrap_or(0),
            None => count("linear_value_head_dim")?,
        };
        let is_tiled = match keys.said("tiled_value_heads")? {
            Some(said) => said,
            None => keys.is_gguf() && self.is_tiled_in_gguf() && value_heads > key_heads,
        };
        Ok(DeltaNet {
            key_heads,
            value_heads,
            key_dim: count("linear_key_head_dim")?,
            value_dim,
            taps: count("linear_conv_kernel_dim")?,
            is_tiled,
        })
    }
}
