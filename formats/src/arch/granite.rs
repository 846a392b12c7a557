//! Granite 3 and 4: Llama with four multipliers; also with experts.

use std::borrow::Cow;

use super::{
    BlockSpec, ExpertPart, Family, HfType, Part, Routing, Stored, experts, llama,
    llama_cpp::{self, Ability},
};
use crate::{
    ModelConfig, Result,
    config::{Keys, shortest},
};

/// `granite`, `granitemoe` and `granitemoeshared`.
#[derive(Debug, PartialEq)]
pub enum Granite {
    /// Without experts.
    Dense,
    /// With experts, some models with a network beside them.
    Moe,
}

const DENSE: HfType = HfType { model_type: "granite", class: "GraniteForCausalLM" };
const MOE: HfType = HfType { model_type: "granitemoe", class: "GraniteMoeForCausalLM" };
const SHARED: HfType =
    HfType { model_type: "granitemoeshared", class: "GraniteMoeSharedForCausalLM" };
const GATE_UP: &[ExpertPart] = &[ExpertPart::Gate, ExpertPart::Up];

const LOGITS_SCALING: &str = "logits_scaling";

impl Family for Granite {
    fn architecture(&self) -> &'static str {
        match self {
            Self::Dense => "granite",
            Self::Moe => "granitemoe",
        }
    }

    fn hf_types(&self) -> &'static [HfType] {
        match self {
            Self::Dense => &[DENSE],
            Self::Moe => &[MOE, SHARED],
        }
    }

    fn hf_type(&self, config: &ModelConfig) -> HfType {
        match (self, config.features.shared_ffn_size) {
            (Self::Dense, _) => DENSE,
            (Self::Moe, None) => MOE,
            (Self::Moe, Some(_)) => SHARED,
        }
    }

    /// The class's. That of attention is not what other families have.
    fn default(&self, key: &str) -> Option<f64> {
        ["embedding_multiplier", "residual_multiplier", LOGITS_SCALING, "attention_multiplier"]
            .contains(&key)
            .then_some(1.0)
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        let number = |key: &str| -> Result<f32> { Ok(keys.number(key)?.unwrap_or(1.0) as f32) };
        llama::read_attention_bias(keys, config)?;
        let features = &mut config.features;
        features.embedding_scale = number("embedding_multiplier")?;
        features.residual_scale = number("residual_multiplier")?;
        features.logit_scale = 1.0 / number(LOGITS_SCALING)?;
        features.attention_scale = keys.number("attention_multiplier")?.map(|scale| scale as f32);
        if *self == Self::Dense {
            features.has_ffn_bias = keys.flag("mlp_bias")?;
            return Ok(());
        }
        experts::read(keys, config, Routing::SOFTMAX)
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        let features = &config.features;
        let scale =
            config.family.block(config, 0).attention().map_or(1.0, |attention| attention.scale);
        json["embedding_multiplier"] = shortest(features.embedding_scale).into();
        json["residual_multiplier"] = shortest(features.residual_scale).into();
        json[LOGITS_SCALING] = shortest(1.0 / features.logit_scale).into();
        json["attention_multiplier"] = shortest(scale).into();
        if *self == Self::Moe {
            experts::write(config, json, "num_local_experts", None);
            llama::leave_out(json, &["mlp_bias"]);
        }
        if let Some(shared) = features.shared_ffn_size {
            json["shared_intermediate_size"] = shared.into();
        }
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        llama::block(config, index)
    }

    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        Some(llama_cpp::computed(config, &[Ability::Factors, Ability::Biases]))
    }

    fn hf_name(&self, part: Part) -> Cow<'static, str> {
        match part {
            Part::Router => "block_sparse_moe.router.layer.weight".into(),
            _ => llama::hf_name(part),
        }
    }

    fn in_hf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        let has_experts = spec.is_some_and(|spec| spec.experts.is_some());
        match part {
            Part::Expert(_, ExpertPart::Down) => {
                Stored::of_experts("block_sparse_moe.output_linear.weight", &[ExpertPart::Down])
            }
            Part::Expert(..) => Stored::of_experts("block_sparse_moe.input_linear.weight", GATE_UP),
            Part::FfnGate | Part::FfnUp if has_experts => {
                Stored::fused("shared_mlp.input_linear.weight", &[Part::FfnGate, Part::FfnUp])
            }
            Part::FfnDown if has_experts => Stored::named("shared_mlp.output_linear.weight"),
            _ => Stored::PLAIN,
        }
    }

    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        experts::in_gguf(part, spec).unwrap_or_else(|| llama::interleaved(part, spec))
    }
}
