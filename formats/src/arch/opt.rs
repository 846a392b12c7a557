//! OPT: LayerNorm, learned positions, ReLU without a gate, biases everywhere. The paper's models.
//! The one of 350M has its norms on the residual stream, and embeddings of fewer channels.

use std::borrow::Cow;

use super::{Activation, BlockSpec, Family, HfType, Norm, Norms, Part, llama};
use crate::{ModelConfig, Result, config::Keys};

/// `opt`.
#[derive(Debug)]
pub struct Opt;

/// Rows of the embedding of positions before that of the first.
pub const FIRST_POSITION: usize = 2;

const NORMS_BEFORE: &str = "do_layer_norm_before";
const EMBEDDING_SIZE: &str = "word_embed_proj_dim";

impl Family for Opt {
    fn architecture(&self) -> &'static str {
        "opt"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "opt", class: "OPTForCausalLM" }]
    }

    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "tie_word_embeddings" | NORMS_BEFORE | "enable_bias" => Some(1.0),
            "layer_norm_elementwise_affine" => Some(1.0),
            // PyTorch's, which no key says.
            "rms_norm_eps" => Some(1e-5),
            _ => None,
        }
    }

    fn hf_key<'k>(&self, key: &'k str) -> &'k str {
        match key {
            "hidden_act" => "activation_function",
            "intermediate_size" => "ffn_dim",
            _ => key,
        }
    }

    fn norm(&self) -> Norm {
        Norm::Layer
    }

    fn learned_positions(&self, config: &ModelConfig) -> Option<usize> {
        Some(config.context_length + FIRST_POSITION)
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        if !keys.is_gguf() {
            // The class knows of no fewer, whatever a file says.
            config.kv_head_count = config.head_count;
        }
        llama::read_biases(keys, config, "enable_bias")?;
        let features = &mut config.features;
        features.norms_sums = !keys.flag(NORMS_BEFORE)?;
        features.embedding_size =
            keys.count(EMBEDDING_SIZE)?.filter(|&size| size != config.hidden_size);
        Ok(())
    }

    fn ignores(&self, key: &str, config: &ModelConfig) -> bool {
        ["init_std", "dropout", "layerdrop", "activation_dropout"].contains(&key)
            || (key == "intermediate_size" && config.ffn_size > 0)
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        let of_others = [
            "attention_bias",
            "head_dim",
            "mlp_bias",
            "num_key_value_heads",
            "rms_norm_eps",
            "rope_scaling",
            "rope_theta",
        ];
        llama::leave_out(json, &of_others);
        json["enable_bias"] = config.features.has_attention_bias.into();
        json[EMBEDDING_SIZE] = config.features.embedding_size.unwrap_or(config.hidden_size).into();
        json[NORMS_BEFORE] = (!config.features.norms_sums).into();
    }

    fn in_llama_cpp(&self, _config: &ModelConfig) -> Option<ModelConfig> {
        None
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let mut spec = llama::block(config, index);
        spec.norms = if config.features.norms_sums { Norms::OnSum } else { Norms::Before };
        spec.attends(|attention| attention.rope = None);
        spec.activates_by(Activation::Relu, false);
        spec
    }

    fn hf_blocks(&self) -> &'static str {
        "model.decoder.layers."
    }

    fn hf_name(&self, part: Part) -> Cow<'static, str> {
        match part {
            Part::Embedding => "model.decoder.embed_tokens.weight".into(),
            Part::EmbeddingUp => "model.decoder.project_in.weight".into(),
            Part::Positions => "model.decoder.embed_positions.weight".into(),
            Part::AttnNorm | Part::AttnPostNorm => "self_attn_layer_norm.weight".into(),
            Part::AttnNormBias | Part::AttnPostNormBias => "self_attn_layer_norm.bias".into(),
            Part::AttnOutput => "self_attn.out_proj.weight".into(),
            Part::AttnOutputBias => "self_attn.out_proj.bias".into(),
            Part::FfnNorm | Part::FfnPostNorm => "final_layer_norm.weight".into(),
            Part::FfnNormBias | Part::FfnPostNormBias => "final_layer_norm.bias".into(),
            Part::FfnUp => "fc1.weight".into(),
            Part::FfnUpBias => "fc1.bias".into(),
            Part::FfnDown => "fc2.weight".into(),
            Part::FfnDownBias => "fc2.bias".into(),
            Part::OutputNorm => "model.decoder.final_layer_norm.weight".into(),
            Part::OutputNormBias => "model.decoder.final_layer_norm.bias".into(),
            Part::EmbeddingDown => "model.decoder.project_out.weight".into(),
            _ => llama::hf_name(part),
        }
    }
}
