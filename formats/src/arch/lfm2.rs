//! LFM2: most blocks convolve the last few tokens, channel by channel; the others attend.

use std::borrow::Cow;

use super::{BlockSpec, Convolution, Family, HfType, Mixer, Part, QkNorm, Stored, llama};
use crate::{ModelConfig, Result, config::Keys};

/// `lfm2`.
#[derive(Debug)]
pub struct Lfm2;

impl Family for Lfm2 {
    fn architecture(&self) -> &'static str {
        "lfm2"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "lfm2", class: "Lfm2ForCausalLM" }]
    }

    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "tie_word_embeddings" | "block_auto_adjust_ff_dim" => Some(1.0),
            "intermediate_size" => Some(12_288.0),
            "block_multiple_of" => Some(256.0),
            "block_ffn_dim_multiplier" => Some(1.0),
            "conv_L_cache" => Some(3.0),
            "rope_theta" => Some(1e6),
            _ => None,
        }
    }

    fn hf_key<'k>(&self, key: &'k str) -> &'k str {
        match key {
            "rms_norm_eps" => "norm_eps",
            _ => key,
        }
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        if keys.flag("conv_bias")? {
            return Err(keys.unsupported("`conv_bias` true".into()));
        }
        if !keys.is_gguf() {
            config.ffn_size = adjusted_ffn_size(keys, config.ffn_size)?;
        }
        let attending = keys.numbers("full_attn_idxs")?;
        let recurrent = keys.recurrent(config.block_count)?;
        config.features.recurrent = recurrent.unwrap_or_else(|| {
            (0..config.block_count)
                .map(|index| !attending.is_empty() && !attending.contains(&index))
                .collect()
        });
        let taps = keys.count("conv_L_cache")?.unwrap_or(0);
        config.features.recurrence = Some(Mixer::Convolution(Convolution { taps }));
        Ok(())
    }

    /// What follows from others, and how its weights were once drawn.
    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        const IGNORED: [&str; 15] = [
            "tie_embedding",
            "block_dim",
            "block_norm_eps",
            "block_use_swiglu",
            "block_use_xavier_init",
            "block_mlp_init_scale",
            "block_out_init_scale",
            "conv_dim",
            "conv_dim_out",
            "conv_use_xavier_init",
            "num_heads",
            "use_pos_enc",
            "theta",
            "attention_bias",
            "mlp_bias",
        ];
        IGNORED.contains(&key)
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        // The width is what it is.
        json["block_auto_adjust_ff_dim"] = false.into();
        json["conv_bias"] = false.into();
        json["conv_L_cache"] = config.features.recurrence.map_or(0, |mixer| mixer.taps()).into();
        let features = &config.features;
        llama::write_layer_types(config, json, "conv", |index| features.is_recurrent(index));
        llama::leave_out(json, &["attention_bias", "mlp_bias", "hidden_act"]);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let mut spec = llama::block(config, index);
        spec.attends(|attention| attention.qk_norm = Some(QkNorm::Heads));
        spec
    }

    fn hf_name(&self, part: Part) -> Cow<'static, str> {
        let name = match part {
            Part::AttnNorm => "operator_norm.weight",
            Part::AttnQNorm => "self_attn.q_layernorm.weight",
            Part::AttnKNorm => "self_attn.k_layernorm.weight",
            Part::AttnOutput => "self_attn.out_proj.weight",
            Part::ConvolutionInput => "conv.in_proj.weight",
            Part::Convolution => "conv.conv.weight",
            Part::FfnNorm => "ffn_norm.weight",
            Part::FfnGate => "feed_forward.w1.weight",
            Part::FfnUp => "feed_forward.w3.weight",
            Part::FfnDown => "feed_forward.w2.weight",
            Part::OutputNorm => "model.embedding_norm.weight",
            _ => return llama::hf_name(part),
        };
        name.into()
    }

    fn in_hf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        match part {
            Part::AttnOutput if convolves(spec) => Stored::named("conv.out_proj.weight"),
            Part::Convolution => Stored { has_outer: true, ..Stored::PLAIN },
            _ => Stored::PLAIN,
        }
    }

    /// llama.cpp calls the norm behind the last block that of embeddings, as its makers do.
    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        match part {
            Part::AttnOutput if convolves(spec) => Stored::named("shortconv.out_proj.weight"),
            Part::Convolution => Stored::named("shortconv.conv.weight"),
            Part::OutputNorm => Stored::named("token_embd_norm.weight"),
            _ => Stored::PLAIN,
        }
    }
}

fn convolves(spec: Option<&BlockSpec>) -> bool {
    spec.is_some_and(|spec| matches!(spec.mixer, Mixer::Convolution(_)))
}

/// Neurons of a configuration that says how many there would be in a network without gates: two
/// thirds, times a factor, up to a multiple.
fn adjusted_ffn_size(keys: &dyn Keys, stated: usize) -> Result<usize> {
    let stated = keys.count("block_ff_dim")?.unwrap_or(stated);
    let is_adjusted = keys.flag("block_auto_adjust_ff_dim")?;
    let factor = keys.number("block_ffn_dim_multiplier")?.unwrap_or(1.0);
    let multiple = keys.count("block_multiple_of")?.unwrap_or(1).max(1);
    if !is_adjusted {
        return Ok(stated);
    }
    // A size that is refused later must not overflow here.
    let neurons = (factor * (2 * stated.min(1 << 32) / 3) as f64) as usize;
    Ok(neurons.div_ceil(multiple).saturating_mul(multiple))
}
