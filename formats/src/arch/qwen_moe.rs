//! Qwen2 and Qwen3 with experts.

use serde_json::Value;

use super::{
    BlockSpec, Experts, Family, HfType, Part, QkNorm, Routing, Stored, experts, llama, llama_cpp,
    qwen::{is_about_windows, read_window, write_window},
};
use crate::{ModelConfig, Result, config::Keys};

/// `qwen2_moe` and `qwen3_moe`.
#[derive(Debug, PartialEq)]
pub enum QwenMoe {
    /// With biases of queries, keys and values, and a network beside the experts.
    Two,
    /// With norms of queries and keys.
    Three,
}

impl Family for QwenMoe {
    fn architecture(&self) -> &'static str {
        match self {
            Self::Two => "qwen2moe",
            Self::Three => "qwen3moe",
        }
    }

    fn hf_types(&self) -> &'static [HfType] {
        match self {
            Self::Two => &[HfType { model_type: "qwen2_moe", class: "Qwen2MoeForCausalLM" }],
            Self::Three => &[HfType { model_type: "qwen3_moe", class: "Qwen3MoeForCausalLM" }],
        }
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        // llama.cpp has it in the code.
        let normalizes = *self == Self::Three && keys.is_gguf();
        read_experts(keys, config, Routing { normalizes, ..Routing::SOFTMAX })?;
        let features = &mut config.features;
        match self {
            Self::Two => features.has_attention_bias = keys.said("qkv_bias")?.unwrap_or(true),
            Self::Three => llama::read_attention_bias(keys, config)?,
        }
        read_window(keys, config)
    }

    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        is_about_windows(key)
    }

    fn write(&self, config: &ModelConfig, json: &mut Value) {
        let features = &config.features;
        experts::write(config, json, "num_experts", Some("moe_intermediate_size"));
        write_sparse_blocks(config, json);
        if *self == Self::Two {
            json["shared_expert_intermediate_size"] = features.shared_ffn_size.unwrap_or(0).into();
            json["qkv_bias"] = features.has_attention_bias.into();
            llama::leave_out(json, &["attention_bias"]);
        }
        write_window(config, json);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let mut spec = llama::block(config, index);
        let qk_norm = (*self == Self::Three).then_some(QkNorm::Heads);
        spec.attends(|attention| attention.qk_norm = qk_norm);
        spec
    }

    /// Its code has the weights of experts, whatever a file says.
    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        let mut computed = llama_cpp::computed(config, &[]);
        if let Some(experts) = &mut computed.features.experts {
            experts.routing = Routing { normalizes: *self == Self::Three, ..Routing::SOFTMAX };
        }
        Some(computed)
    }

    fn in_hf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        experts::beside(part, spec, experts::BESIDE_ONE)
            .or_else(|| experts::in_hf(part, spec))
            .unwrap_or(Stored::PLAIN)
    }

    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        experts::in_gguf(part, spec).unwrap_or(Stored::PLAIN)
    }
}

/// Reads experts beside a network that is gated as a whole, and which blocks have them.
pub(super) fn read_experts(
    keys: &dyn Keys,
    config: &mut ModelConfig,
    routing: Routing,
) -> Result<()> {
    experts::read(keys, config, routing)?;
    let features = &mut config.features;
    let shares = features.shared_ffn_size.is_some();
    features.experts = features.experts.map(|experts| Experts { shares, ..experts });
    read_sparse_blocks(keys, config)
}

/// Reads which blocks have experts: each `decoder_sparse_step`-th, but for some.
fn read_sparse_blocks(keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
    let dense = keys.numbers("mlp_only_layers")?;
    let step = keys.count("decoder_sparse_step")?.unwrap_or(1).max(1);
    let leading = keys.count("first_k_dense_replace")?.unwrap_or(0);
    experts::read_blocks(keys, config, |index| {
        index >= leading && (index + 1).is_multiple_of(step) && !dense.contains(&index)
    })
}

/// The keys of which blocks have experts, and of how these are weighted.
pub(super) fn write_sparse_blocks(config: &ModelConfig, json: &mut Value) {
    let features = &config.features;
    json["norm_topk_prob"] =
        features.experts.is_some_and(|experts| experts.routing.normalizes).into();
    json["decoder_sparse_step"] = 1.into();
    let dense = (0..config.block_count).filter(|&index| !features.has_experts(index));
    json["mlp_only_layers"] = dense.collect::<Vec<_>>().into();
}
