//! Gemma 2 and 3: norms before and behind, whose weights Hugging Face stores as `weight - 1`; GELU;
//! scaled embeddings. Gemma 2 caps scores and logits; Gemma 3 norms queries and keys.

use std::borrow::Cow;

use serde_json::Value;

use super::{
    Activation, BlockSpec, Family, Form, HfType, Norms, Part, QkNorm, Stored, llama,
    llama_cpp::{self, Ability},
};
use crate::{
    ModelConfig, Result,
    config::{Keys, shortest},
};

/// `gemma2` and `gemma3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gemma {
    /// Gemma 2.
    Two,
    /// The text model of Gemma 3.
    Three,
}

impl Family for Gemma {
    fn architecture(&self) -> &'static str {
        match self {
            Self::Two => "gemma2",
            Self::Three => "gemma3",
        }
    }

    fn hf_types(&self) -> &'static [HfType] {
        match self {
            Self::Two => &[HfType { model_type: "gemma2", class: "Gemma2ForCausalLM" }],
            Self::Three => &[HfType { model_type: "gemma3_text", class: "Gemma3ForCausalLM" }],
        }
    }

    /// The class's, which published configurations leave out; of Gemma 3, those of multimodal
    /// models.
    fn default(&self, key: &str) -> Option<f64> {
        Some(match (self, key) {
            (_, "tie_word_embeddings") => 1.0,
            (_, "head_dim" | "query_pre_attn_scalar") => 256.0,
            (_, "sliding_window") => 4096.0,
            (Self::Two, "attn_logit_softcapping") => 50.0,
            (Self::Two, "final_logit_softcapping") => 30.0,
            (Self::Three, "num_attention_heads") => 8.0,
            (Self::Three, "num_key_value_heads") => 4.0,
            (Self::Three, "vocab_size") => 262_208.0,
            (Self::Three, "max_position_embeddings") => 131_072.0,
            (Self::Three, "rms_norm_eps") => 1e-6,
            (Self::Three, "rope_theta") => 1e6,
            (Self::Three, "rope_local_base_freq") => 1e4,
            _ => return None,
        })
    }

    fn has_local_rope(&self) -> bool {
        *self == Self::Three
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        read(keys, config)?;
        let interval = match self {
            Self::Two => 2,
            Self::Three => 6,
        };
        llama::read_windows(keys, config, interval)
    }

    /// Keys of older configurations whose newer names are read.
    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        ["hidden_act", "cache_implementation", "use_bidirectional_attention"].contains(&key)
    }

    fn write(&self, config: &ModelConfig, json: &mut Value) {
        let features = &config.features;
        let cap = |cap: Option<f32>| cap.map_or(Value::Null, |cap| shortest(cap).into());
        // Both names of it are in use.
        json["hidden_activation"] = json["hidden_act"].clone();
        json["attn_logit_softcapping"] = cap(features.attention_softcap);
        json["final_logit_softcapping"] = cap(features.logit_softcap);
        let scalar = features.attention_scale.map(|scale| 1.0 / f64::from(scale).powi(2));
        let scalar = scalar.unwrap_or(config.head_dim as f64);
        // Written as people chose it: a whole number, but for what f32 has lost of it.
        let is_whole = (scalar - scalar.round()).abs() < 1e-4 * scalar;
        json["query_pre_attn_scalar"] =
            if is_whole { (scalar.round() as u64).into() } else { scalar.into() };
        llama::write_windows(config, json);
        if self.has_local_rope() && features.local_rope.is_none() {
            json["rope_local_base_freq"] = shortest(config.rope.theta).into();
        }
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let mut spec = llama::block(config, index);
        spec.norms = Norms::Both;
        spec.activates_by(Activation::GeluTanh, true);
        let qk_norm = (*self == Self::Three).then_some(QkNorm::Heads);
        spec.attends(|attention| attention.qk_norm = qk_norm);
        spec
    }

    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        let mut computed = llama_cpp::computed(config, &[Ability::Windows]);
        computed.features.attention_scale = llama_cpp_scale(config);
        Some(computed)
    }

    fn hf_name(&self, part: Part) -> Cow<'static, str> {
        match part {
            Part::FfnNorm => "pre_feedforward_layernorm.weight".into(),
            _ => llama::hf_name(part),
        }
    }

    fn in_hf(&self, part: Part, _spec: Option<&BlockSpec>) -> Stored {
        match part {
            Part::AttnNorm
            | Part::AttnPostNorm
            | Part::AttnQNorm
            | Part::AttnKNorm
            | Part::FfnNorm
            | Part::FfnPostNorm
            | Part::OutputNorm => Stored::in_form(Form::LessOne),
            _ => Stored::PLAIN,
        }
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
