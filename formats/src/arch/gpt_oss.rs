//! gpt-oss: sinks, every other block with a window, biases everywhere, experts of a clamped
//! activation.

use std::borrow::Cow;

use serde_json::Value;

use super::{
    Activation, BlockSpec, ExpertPart, Experts, Family, Ffn, HfType, Part, Routing, Stored,
    experts, llama,
    llama_cpp::{self, Ability},
};
use crate::{
    ModelConfig, Result,
    config::{Keys, shortest},
};

/// `gpt_oss`.
#[derive(Debug)]
pub struct GptOss;

const ALPHA: f32 = 1.702;
const LIMIT: f32 = 7.0;

const GATE_UP: &[ExpertPart] = &[ExpertPart::Gate, ExpertPart::Up];
const GATE_UP_BIASES: &[ExpertPart] = &[ExpertPart::GateBias, ExpertPart::UpBias];

impl Family for GptOss {
    fn architecture(&self) -> &'static str {
        "gpt-oss"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "gpt_oss", class: "GptOssForCausalLM" }]
    }

    /// Of `truncate` it is what models have whose files say nothing: llama.cpp's.
    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "attention_bias" => Some(1.0),
            "head_dim" => Some(64.0),
            "num_experts_per_tok" => Some(4.0),
            "num_local_experts" => Some(128.0),
            "rope_theta" => Some(150_000.0),
            "sliding_window" => Some(128.0),
            "truncate" => Some(0.0),
            _ => None,
        }
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        llama::read_attention_bias(keys, config)?;
        llama::read_windows(keys, config, 2)?;
        experts::read(keys, config, Routing { has_bias: true, ..Routing::SOFTMAX })?;
        let number = |key: &str, default: f32| -> Result<f32> {
            Ok(keys.number(key)?.map_or(default, |number| number as f32))
        };
        activate_by(config, number("swiglu_alpha", ALPHA)?, number("swiglu_limit", LIMIT)?);
        Ok(())
    }

    /// Others say it too.
    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        ["experts_per_token", "initial_context_length"].contains(&key)
    }

    fn write(&self, config: &ModelConfig, json: &mut Value) {
        experts::write(config, json, "num_local_experts", None);
        llama::write_windows(config, json);
        if let Activation::ClampedSwish { alpha, limit } = self.block(config, 0).activation() {
            json["swiglu_alpha"] = shortest(alpha).into();
            json["swiglu_limit"] = shortest(limit).into();
        }
        llama::leave_out(json, &["mlp_bias"]);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let mut spec = llama::block(config, index);
        spec.attends(|attention| attention.has_sinks = true);
        spec
    }

    /// Its code has the numbers of the activation.
    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        let abilities = &[Ability::Windows, Ability::Factors, Ability::Biases];
        let mut computed = llama_cpp::computed(config, abilities);
        activate_by(&mut computed, ALPHA, LIMIT);
        Some(computed)
    }

    fn hf_name(&self, part: Part) -> Cow<'static, str> {
        match part {
            Part::Router => "mlp.router.weight".into(),
            Part::RouterBias => "mlp.router.bias".into(),
            _ => llama::hf_name(part),
        }
    }

    /// Gates and inputs of neurons take turns. Plain matrices lie column by column.
    fn in_hf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        let (Some(experts), Part::Expert(_, part)) = (spec.and_then(|spec| spec.experts), part)
        else {
            return Stored::PLAIN;
        };
        let in_turns = |name, parts| Stored::of_experts_in_turns(name, parts, experts.ffn.width);
        let matrix = |stored: Stored| match experts.are_mxfp4 {
            true => stored,
            false => stored.transposed(),
        };
        match part {
            ExpertPart::Gate | ExpertPart::Up => {
                matrix(in_turns("mlp.experts.gate_up_proj", GATE_UP))
            }
            ExpertPart::Down => {
                matrix(Stored::of_experts("mlp.experts.down_proj", &[ExpertPart::Down]))
            }
            ExpertPart::GateBias | ExpertPart::UpBias => {
                in_turns("mlp.experts.gate_up_proj_bias", GATE_UP_BIASES)
            }
            ExpertPart::DownBias => {
                Stored::of_experts("mlp.experts.down_proj_bias", &[ExpertPart::DownBias])
            }
        }
    }

    /// The norm before the network has the name that others give the one behind attention.
    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        match part {
            Part::FfnNorm => Stored::named("post_attention_norm.weight"),
            _ => experts::in_gguf(part, spec).unwrap_or(Stored::PLAIN),
        }
    }
}

/// Gives experts their activation, and biases.
fn activate_by(config: &mut ModelConfig, alpha: f32, limit: f32) {
    let activation = Activation::ClampedSwish { alpha, limit };
    let experts = config.features.experts;
    config.features.experts = experts.map(|experts| {
        let ffn = Ffn { activation, has_bias: true, ..experts.ffn };
        Experts { ffn, ..experts }
    });
}
