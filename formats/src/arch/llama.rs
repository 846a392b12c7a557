//! Llama; Mistral, which differs by its window; Mixtral, which has experts.

use std::borrow::Cow;

use super::{
    Activation, Attention, BlockSpec, ExpertPart, Family, Ffn, HfType, Mixer, Norms, Part, Routing,
    Stored, Values, experts,
    llama_cpp::{self, Ability},
};
use crate::{
    Layout, ModelConfig, Result, Rope,
    config::{Keys, every},
};

/// `llama`, `mistral` and `mixtral`.
#[derive(Debug)]
pub struct Llama;

const LLAMA: HfType = HfType { model_type: "llama", class: "LlamaForCausalLM" };
const MIXTRAL: HfType = HfType { model_type: "mixtral", class: "MixtralForCausalLM" };
const MISTRAL: HfType = HfType { model_type: "mistral", class: "MistralForCausalLM" };

impl Family for Llama {
    fn architecture(&self) -> &'static str {
        "llama"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[LLAMA, MISTRAL, MIXTRAL]
    }

    fn hf_type(&self, config: &ModelConfig) -> HfType {
        match (config.features.experts, config.sliding_window) {
            (Some(_), _) => MIXTRAL,
            (None, Some(_)) => MISTRAL,
            (None, None) => LLAMA,
        }
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        if keys.model_type() != Some(LLAMA.model_type) {
            config.sliding_window = keys.count("sliding_window")?;
        }
        if ![Some(MISTRAL.model_type), Some(MIXTRAL.model_type)].contains(&keys.model_type()) {
            read_attention_bias(keys, config)?;
            config.features.has_ffn_bias = keys.flag("mlp_bias")?;
        }
        if [None, Some(MIXTRAL.model_type)].contains(&keys.model_type()) {
            experts::read(keys, config, Routing::SOFTMAX)?;
        }
        Ok(())
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        if let Some(window) = config.sliding_window {
            json["sliding_window"] = window.into();
        }
        experts::write(config, json, "num_local_experts", None);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        block(config, index)
    }

    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        Some(llama_cpp::computed(config, &[Ability::Factors, Ability::Biases]))
    }

    fn hf_name(&self, part: Part) -> Cow<'static, str> {
        mixtral_name(part).unwrap_or_else(|| hf_name(part))
    }

    fn in_hf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        experts::in_hf(part, spec).unwrap_or(Stored::PLAIN)
    }

    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        experts::in_gguf(part, spec).unwrap_or_else(|| interleaved(part, spec))
    }
}

/// What block `index` of a model computes that is Llama's but for the numbers and features of its
/// configuration.
pub(super) fn block(config: &ModelConfig, index: usize) -> BlockSpec {
    let features = &config.features;
    let window = config.sliding_window.filter(|_| config.is_windowed(index));
    let local_rope = features.local_rope.as_ref().map(|_| 1);
    let rope = if window.is_some() { local_rope.or(Some(0)) } else { Some(0) };
    let attention = Attention {
        heads: config.head_count,
        kv_heads: config.kv_head_count,
        head_dim: config.head_dim,
        window,
        rope: rope.filter(|_| features.is_rotated(index)),
        rotated: 2 * rope_of(config, rope).factors.len(),
        scale: features.attention_scale.unwrap_or(1.0 / (config.head_dim as f32).sqrt()),
        softcap: features.attention_softcap,
        qk_norm: None,
        is_gated: false,
        has_bias: features.has_attention_bias,
        has_output_bias: features.has_output_bias,
        query_scaling: features.query_scaling,
        has_sinks: false,
        values: Values::Plain,
        shares: None,
    };
    let recurrence = features.recurrence.filter(|_| features.is_recurrent(index));
    let mixer = recurrence.unwrap_or(Mixer::Attention(attention));
    let experts = features.experts.filter(|_| features.has_experts(index));
    let width = match experts {
        None => Some(config.ffn_size),
        Some(_) => features.shared_ffn_size,
    };
    let ffn = width.map(|width| Ffn {
        width,
        activation: Activation::Silu,
        is_gated: true,
        has_bias: features.has_ffn_bias,
    });
    let norm = config.family.norm();
    let (norms, residual_scale) = (Norms::Before, features.residual_scale);
    let (embedded, is_scaled) = (None, false);
    BlockSpec { norm, norms, mixer, ffn, experts, residual_scale, embedded, is_scaled }
}

/// Number `index` of [`Decoder::ropes`](super::Decoder); the first, if a block has none.
fn rope_of(config: &ModelConfig, index: Option<usize>) -> &Rope {
    match (index, &config.features.local_rope) {
        (Some(1), Some(local)) => local,
        _ => &config.rope,
    }
}

/// The names of `transformers` that most families have.
pub(super) fn hf_name(part: Part) -> Cow<'static, str> {
    let name = match part {
        Part::Expert(index, part) => {
            return format!("mlp.experts.{index}.{}", hf_expert_name(part)).into();
        }
        Part::Embedding => "model.embed_tokens.weight",
        Part::EmbeddingUp => "model.project_in.weight",
        Part::Positions => "model.embed_positions.weight",
        Part::BlockEmbedding => "model.embed_tokens_per_layer.weight",
        Part::BlockEmbeddingUp => "model.per_layer_model_projection.weight",
        Part::BlockEmbeddingNorm => "model.per_layer_projection_norm.weight",
        Part::AttnNorm => "input_layernorm.weight",
        Part::AttnNormBias => "input_layernorm.bias",
        Part::QueryDown => "self_attn.q_a_proj.weight",
        Part::QueryDownNorm => "self_attn.q_a_layernorm.weight",
        Part::LatentDown => "self_attn.kv_a_proj_with_mqa.weight",
        Part::LatentNorm => "self_attn.kv_a_layernorm.weight",
        Part::LatentKeys => "self_attn.k_b_proj.weight",
        Part::LatentValues => "self_attn.v_b_proj.weight",
        Part::AttnQ => "self_attn.q_proj.weight",
        Part::AttnQBias => "self_attn.q_proj.bias",
        Part::AttnQNorm => "self_attn.q_norm.weight",
        Part::AttnK => "self_attn.k_proj.weight",
        Part::AttnKBias => "self_attn.k_proj.bias",
        Part::AttnKNorm => "self_attn.k_norm.weight",
        Part::AttnV => "self_attn.v_proj.weight",
        Part::AttnVBias => "self_attn.v_proj.bias",
        Part::AttnGate => "linear_attn.in_proj_z.weight",
        Part::DeltaBeta => "linear_attn.in_proj_b.weight",
        Part::DeltaDecay => "linear_attn.in_proj_a.weight",
        Part::DeltaDecayBias => "linear_attn.dt_bias",
        Part::DeltaDecayRate => "linear_attn.A_log",
        Part::ConvolutionInput => "conv.in_proj.weight",
        Part::Convolution => "linear_attn.conv1d.weight",
        Part::DeltaNorm => "linear_attn.norm.weight",
        Part::AttnSinks => "self_attn.sinks",
        Part::AttnOutput => "self_attn.o_proj.weight",
        Part::AttnOutputBias => "self_attn.o_proj.bias",
        // Llama's norm before the network has the name that others give the one behind attention.
        Part::AttnPostNorm | Part::FfnNorm => "post_attention_layernorm.weight",
        Part::AttnPostNormBias | Part::FfnNormBias => "post_attention_layernorm.bias",
        Part::FfnGate => "mlp.gate_proj.weight",
        Part::FfnGateBias => "mlp.gate_proj.bias",
        Part::FfnUp => "mlp.up_proj.weight",
        Part::FfnUpBias => "mlp.up_proj.bias",
        Part::FfnDown => "mlp.down_proj.weight",
        Part::FfnDownBias => "mlp.down_proj.bias",
        Part::FfnPostNorm => "post_feedforward_layernorm.weight",
        Part::FfnPostNormBias => "post_feedforward_layernorm.bias",
        Part::OutputNorm => "model.norm.weight",
        Part::OutputNormBias => "model.norm.bias",
        Part::EmbeddingDown => "model.project_out.weight",
        Part::Output => "lm_head.weight",
        Part::Router => "mlp.gate.weight",
        Part::RouterBias => "mlp.gate.bias",
        Part::RouterCorrection => "mlp.gate.e_score_correction_bias",
        Part::FfnShare => "mlp.shared_expert_gate.weight",
        Part::RouterNorm => "router.scale",
        Part::ExpertScale => "router.per_expert_scale",
        Part::BesidePostNorm => "post_feedforward_layernorm_1.weight",
        Part::ExpertsNorm => "pre_feedforward_layernorm_2.weight",
        Part::ExpertsPostNorm => "post_feedforward_layernorm_2.weight",
        Part::EmbeddedGate => "per_layer_input_gate.weight",
        Part::EmbeddedOutput => "per_layer_projection.weight",
        Part::EmbeddedPostNorm => "post_per_layer_input_norm.weight",
        Part::BlockScale => "layer_scalar",
    };
    name.into()
}

/// Mixtral's names for parts of experts; `None` for other parts.
pub(super) fn mixtral_name(part: Part) -> Option<Cow<'static, str>> {
    let Part::Expert(index, part) = part else {
        return match part {
            Part::Router => Some("block_sparse_moe.gate.weight".into()),
            Part::RouterCorrection => Some("block_sparse_moe.e_score_correction_bias".into()),
            _ => None,
        };
    };
    let matrix = match part {
        ExpertPart::Gate => "w1",
        ExpertPart::Up => "w3",
        ExpertPart::Down => "w2",
        ExpertPart::GateBias | ExpertPart::UpBias | ExpertPart::DownBias => return None,
    };
    Some(format!("block_sparse_moe.experts.{index}.{matrix}.weight").into())
}

/// What follows the number of an expert.
fn hf_expert_name(part: ExpertPart) -> &'static str {
    match part {
        ExpertPart::Gate => "gate_proj.weight",
        ExpertPart::GateBias => "gate_proj.bias",
        ExpertPart::Up => "up_proj.weight",
        ExpertPart::UpBias => "up_proj.bias",
        ExpertPart::Down => "down_proj.weight",
        ExpertPart::DownBias => "down_proj.bias",
    }
}

/// llama.cpp's order of rows for models whose halves it turns as neighbours.
pub(super) fn interleaved(part: Part, spec: Option<&BlockSpec>) -> Stored {
    match (part, spec.and_then(BlockSpec::attention)) {
        (Part::AttnQ | Part::AttnK | Part::AttnQBias | Part::AttnKBias, Some(attention)) => {
            let head_dim = attention.head_dim;
            Stored::ordered(Layout::Interleaved { head_dim, first: 0, rotated: head_dim })
        }
        _ => Stored::PLAIN,
    }
}

/// Reads the flag of biases of all layers.
pub(super) fn read_biases(keys: &dyn Keys, config: &mut ModelConfig, key: &str) -> Result<()> {
    let (features, bias) = (&mut config.features, keys.flag(key)?);
    features.has_attention_bias = bias;
    features.has_output_bias = bias;
    features.has_ffn_bias = bias;
    Ok(())
}

/// Reads the flag of biases of attention, of all its layers.
pub(super) fn read_attention_bias(keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
    let bias = keys.flag("attention_bias")?;
    (config.features.has_attention_bias, config.features.has_output_bias) = (bias, bias);
    Ok(())
}

/// Reads the window and which blocks have it: all but each `interval`-th, if nothing is said.
pub(super) fn read_windows(
    keys: &dyn Keys,
    config: &mut ModelConfig,
    interval: usize,
) -> Result<()> {
    config.sliding_window = keys.count("sliding_window")?;
    let windowed = keys.windowed(config.block_count)?;
    config.features.windowed = windowed.unwrap_or_else(|| every(interval, config.block_count));
    settle_windows(config);
    Ok(())
}

/// Leaves out a window that no block has.
pub(super) fn settle_windows(config: &mut ModelConfig) {
    let windowed = &mut config.features.windowed;
    if config.sliding_window.is_none() || !windowed.contains(&true) {
        config.sliding_window = None;
        windowed.clear();
    }
}

/// The keys of windows in `config.json`.
pub(super) fn write_windows(config: &ModelConfig, json: &mut serde_json::Value) {
    json["sliding_window"] = config.sliding_window.into();
    write_layer_types(config, json, "sliding_attention", |index| config.is_windowed(index));
}

/// The key of kinds of blocks: `other`, or attention to all tokens.
pub(super) fn write_layer_types(
    config: &ModelConfig,
    json: &mut serde_json::Value,
    other: &str,
    is_other: impl Fn(usize) -> bool,
) {
    let kind = |index| if is_other(index) { other } else { "full_attention" };
    json["layer_types"] = (0..config.block_count).map(kind).collect::<Vec<_>>().into();
}

/// Takes back keys that a family's `config.json` does not have.
pub(crate) fn leave_out(json: &mut serde_json::Value, keys: &[&str]) {
    let object = json.as_object_mut().expect("a configuration is an object");
    object.retain(|key, _| !keys.contains(&key.as_str()));
}

/// The key of models that turn a part of each head.
pub(super) fn write_partial_rotation(config: &ModelConfig, json: &mut serde_json::Value) {
    let rotated = 2 * config.rope.factors.len();
    json["partial_rotary_factor"] = (rotated as f64 / config.head_dim as f64).into();
}
