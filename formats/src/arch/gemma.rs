//! Gemma 2 and 3: norms before and behind, whose weights Hugging Face stores as `weight - 1`; GELU;
//! scaled embeddings. Gemma 2 caps scores and logits; Gemma 3 norms queries and keys.

use serde_json::Value;

use super::{
    Activation, BlockSpec, Family, HfType, Norms, Part, QkNorm, Stored, llama,
    llama_cpp::{self, Ability},
};
use crate::{
    ModelConfig, Result,
    config::{Keys, shortest},
};

/// `gemma2`.
#[derive(Debug)]
pub struct Gemma2;

impl Family for Gemma2 {
    fn architecture(&self) -> &'static str {
        "gemma2"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "gemma2", class: "Gemma2ForCausalLM" }]
    }

    /// The class's, which published configurations leave out.
    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "tie_word_embeddings" => Some(1.0),
            "head_dim" | "query_pre_attn_scalar" => Some(256.0),
            "attn_logit_softcapping" => Some(50.0),
            "final_logit_softcapping" => Some(30.0),
            "sliding_window" => Some(4096.0),
            _ => None,
        }
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        read(keys, config)?;
        llama::read_windows(keys, config, 2)
    }

    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        is_said_twice(key)
    }

    fn write(&self, config: &ModelConfig, json: &mut Value) {
        write(config, json);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        block(config, index)
    }

    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        Some(in_llama_cpp(config))
    }

    fn hf_name(&self, part: Part) -> &'static str {
        hf_name(part)
    }

    fn in_hf(&self, part: Part, _spec: Option<&BlockSpec>) -> Stored {
        in_hf(part)
    }
}

/// `gemma3`, its text model.
#[derive(Debug)]
pub struct Gemma3;

impl Family for Gemma3 {
    fn architecture(&self) -> &'static str {
        "gemma3"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "gemma3_text", class: "Gemma3ForCausalLM" }]
    }

    /// The class's, which configurations of multimodal models leave out.
    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "tie_word_embeddings" => Some(1.0),
            "head_dim" | "query_pre_attn_scalar" => Some(256.0),
            "num_attention_heads" => Some(8.0),
            "num_key_value_heads" => Some(4.0),
            "vocab_size" => Some(262_208.0),
            "max_position_embeddings" => Some(131_072.0),
            "rms_norm_eps" => Some(1e-6),
            "rope_theta" => Some(1e6),
            "rope_local_base_freq" => Some(1e4),
            "sliding_window" => Some(4096.0),
            _ => None,
        }
    }

    fn has_local_rope(&self) -> bool {
        true
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        read(keys, config)?;
        llama::read_windows(keys, config, 6)
    }

    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        is_said_twice(key)
    }

    fn write(&self, config: &ModelConfig, json: &mut Value) {
        write(config, json);
        if config.features.local_rope.is_none() {
            json["rope_local_base_freq"] = shortest(config.rope.theta).into();
        }
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let mut spec = block(config, index);
        spec.attention.qk_norm = Some(QkNorm::Heads);
        spec
    }

    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        Some(in_llama_cpp(config))
    }

    fn hf_name(&self, part: Part) -> &'static str {
        hf_name(part)
    }

    fn in_hf(&self, part: Part, _spec: Option<&BlockSpec>) -> Stored {
        in_hf(part)
    }
}

fn read(keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
    let embedding_scale = keys.number("embedding_multiplier")?.map(|scale| scale as f32);
    let scale = keys.number("attention_multiplier")?.map(|scale| scale as f32);
    let scalar = keys.number("query_pre_attn_scalar")?.map(|scalar| scalar.powf(-0.5) as f32);
    let assumed = if keys.is_gguf() { llama_cpp_scale(config) } else { None };
    let features = &mut config.features;
    features.embedding_scale = embedding_scale.unwrap_or((config.hidden_size as f32).sqrt());
    features.attention_softcap = keys.number("attn_logit_softcapping")?.map(|cap| cap as f32);
    features.logit_softcap = keys.number("final_logit_softcapping")?.map(|cap| cap as f32);
    features.attention_scale = scale.or(scalar).or(assumed);
    llama::read_attention_bias(keys, config)
}

/// `query_pre_attn_scalar` is not among llama.cpp's keys: it takes the head size, but for the two
/// models whose number of blocks tells that it is `hidden_size / heads`.
fn llama_cpp_scale(config: &ModelConfig) -> Option<f32> {
    const LARGEST: [usize; 2] = [46, 62];
    let per_head = (config.hidden_size / config.head_count) as f64;
    LARGEST.contains(&config.block_count).then(|| per_head.powf(-0.5) as f32)
}

fn in_llama_cpp(config: &ModelConfig) -> ModelConfig {
    let mut computed = llama_cpp::computed(config, &[Ability::Windows]);
    computed.features.attention_scale = llama_cpp_scale(config);
    computed
}

/// Keys of older configurations whose newer names are read.
fn is_said_twice(key: &str) -> bool {
    ["hidden_act", "cache_implementation", "use_bidirectional_attention"].contains(&key)
}

fn write(config: &ModelConfig, json: &mut Value) {
    let features = &config.features;
    let cap = |cap: Option<f32>| cap.map_or(Value::Null, |cap| shortest(cap).into());
    json["hidden_activation"] = "gelu_pytorch_tanh".into();
    json["hidden_act"] = "gelu_pytorch_tanh".into();
    json["attn_logit_softcapping"] = cap(features.attention_softcap);
    json["final_logit_softcapping"] = cap(features.logit_softcap);
    let scalar = features.attention_scale.map(|scale| 1.0 / f64::from(scale).powi(2));
    let scalar = scalar.unwrap_or(config.head_dim as f64);
    // Written as people chose it: a whole number, but for what f32 has lost of it.
    let is_whole = (scalar - scalar.round()).abs() < 1e-4 * scalar;
    json["query_pre_attn_scalar"] =
        if is_whole { (scalar.round() as u64).into() } else { scalar.into() };
    llama::write_windows(config, json);
}

fn block(config: &ModelConfig, index: usize) -> BlockSpec {
    let mut spec = llama::block(config, index);
    spec.norms = Norms::Both;
    spec.ffn.activation = Activation::GeluTanh;
    spec
}

fn hf_name(part: Part) -> &'static str {
    match part {
        Part::FfnNorm => "pre_feedforward_layernorm.weight",
        _ => llama::hf_name(part),
    }
}

fn in_hf(part: Part) -> Stored {
    match part {
        Part::AttnNorm
        | Part::AttnPostNorm
        | Part::AttnQNorm
        | Part::AttnKNorm
        | Part::FfnNorm
        | Part::FfnPostNorm
        | Part::OutputNorm => Stored { offset: 1.0, ..Stored::PLAIN },
        _ => Stored::PLAIN,
    }
}
