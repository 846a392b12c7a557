//! DeepSeek V2 and V3, GLM-4.7-Flash: latent attention; experts beside a network for all.

use serde_json::Value;

use super::{
    BlockSpec, ExpertGroups, Family, HfType, LatentAttention, Mixer, Part, Routing, Scores, Stored,
    experts, llama,
};
use crate::{
    Layout, ModelConfig, Result, Scaling,
    config::{Keys, shortest, yarn_amplitude},
};

/// `deepseek_v2`, `deepseek_v3` and `glm4_moe_lite`.
#[derive(Debug)]
pub struct DeepSeek;

const V2: HfType = HfType { model_type: "deepseek_v2", class: "DeepseekV2ForCausalLM" };
const V3: HfType = HfType { model_type: "deepseek_v3", class: "DeepseekV3ForCausalLM" };
const GLM: HfType = HfType { model_type: "glm4_moe_lite", class: "Glm4MoeLiteForCausalLM" };

impl Family for DeepSeek {
    fn architecture(&self) -> &'static str {
        "deepseek2"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[V2, V3, GLM]
    }

    /// GLM-4.7-Flash computes what a DeepSeek V3 does.
    fn hf_type(&self, config: &ModelConfig) -> HfType {
        match config.features.experts.map(|experts| experts.routing.scores) {
            Some(Scores::Sigmoid) => V3,
            Some(Scores::Softmax) | None => V2,
        }
    }

    fn hf_key<'k>(&self, key: &'k str) -> &'k str {
        hf_key(key)
    }

    fn default(&self, key: &str) -> Option<f64> {
        match key {
            "first_k_dense_replace" | "moe_layer_freq" | "rope_interleave" => Some(1.0),
            _ => None,
        }
    }

    fn has_latent_attention(&self) -> bool {
        true
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        if !(keys.is_gguf() || keys.count("moe_layer_freq")? == Some(1)) {
            return Err(keys.unsupported("`moe_layer_freq` of another value than 1".into()));
        }
        let is_v2 = keys.model_type() == Some(V2.model_type);
        let is_softmax = is_v2 || keys.is_gguf() && keys.count("expert_gating_func")? != Some(2);
        let routing = match is_softmax {
            true => Routing { normalizes: false, ..Routing::SOFTMAX },
            false => Routing::SIGMOID,
        };
        experts::read(keys, config, routing)?;
        if let Some(experts) = &mut config.features.experts {
            let groups = experts.routing.groups;
            if is_v2 {
                // Its class has no such key, and masks groups by one method of two.
                let is_limited = keys.is_text("topk_method", "group_limited_greedy")?;
                let limited = groups.map(|groups| ExpertGroups { best: 1, ..groups });
                (experts.routing.normalizes, experts.routing.groups) =
                    (false, limited.filter(|_| is_limited));
            }
        }
        let dense = keys.count("first_k_dense_replace")?.unwrap_or(0);
        let sparse = keys.sparse(config.block_count)?;
        experts::read_blocks(keys, config, |index| match &sparse {
            Some(sparse) => sparse[index],
            None => index >= dense,
        })?;
        read_latent(keys, config)
    }

    /// What follows from others, and what is about training.
    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        ["head_dim", "qk_head_dim", "ep_size", "seq_aux", "aux_loss_alpha"].contains(&key)
    }

    fn write(&self, config: &ModelConfig, json: &mut Value) {
        experts::write(config, json, "n_routed_experts", Some("moe_intermediate_size"));
        experts::write_groups(config, json);
        write_latent(config, json);
        let routing = config.features.experts.map(|experts| experts.routing);
        if self.hf_type(config) == V2 {
            let is_limited = routing.is_some_and(|routing| routing.groups.is_some());
            json["topk_method"] = if is_limited { "group_limited_greedy" } else { "greedy" }.into();
        }
        llama::leave_out(json, &["mlp_bias"]);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        block(config, index)
    }

    fn in_hf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        in_hf(part, spec)
    }

    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        in_gguf(part, spec)
    }
}

/// What a block with latent attention computes that is Llama's but for that.
pub(super) fn block(config: &ModelConfig, index: usize) -> BlockSpec {
    let mut spec = llama::block(config, index);
    if let Some(latent) = config.features.latent {
        let query_scaling = config.features.query_scaling;
        spec.mixer = Mixer::Latent(LatentAttention { query_scaling, ..latent });
    }
    spec
}

/// How Hugging Face's files store a part of a block with latent attention and experts beside a
/// network.
pub(super) fn in_hf(part: Part, spec: Option<&BlockSpec>) -> Stored {
    const KEYS_VALUES: &[Part] = &[Part::LatentKeys, Part::LatentValues];
    match (part, spec.map(|spec| spec.mixer)) {
        (Part::LatentKeys | Part::LatentValues, Some(Mixer::Latent(latent))) => {
            Stored::in_turns("self_attn.kv_b_proj.weight", KEYS_VALUES, latent.heads)
        }
        (Part::AttnQ, Some(Mixer::Latent(LatentAttention { query_rank: Some(_), .. }))) => {
            Stored { layout: neighbours(part, spec), ..Stored::named("self_attn.q_b_proj.weight") }
        }
        (Part::AttnQ | Part::LatentDown, _) => Stored::ordered(neighbours(part, spec)),
        _ => experts::beside(part, spec, experts::BESIDE_MANY)
            .or_else(|| experts::in_hf(part, spec))
            .unwrap_or(Stored::PLAIN),
    }
}

/// How llama.cpp's files store it.
pub(super) fn in_gguf(part: Part, spec: Option<&BlockSpec>) -> Stored {
    match (part, spec.map(|spec| spec.mixer)) {
        (Part::LatentKeys, Some(Mixer::Latent(latent))) => Stored {
            heads: Some(latent.heads),
            layout: Layout::TransposedHeads { head_rows: latent.plain_dim },
            ..Stored::PLAIN
        },
        (Part::LatentValues, Some(Mixer::Latent(latent))) => {
            Stored { heads: Some(latent.heads), ..Stored::PLAIN }
        }
        (Part::AttnQ, Some(Mixer::Latent(LatentAttention { query_rank: Some(_), .. }))) => {
            Stored { layout: neighbours(part, spec), ..Stored::named("attn_q_b.weight") }
        }
        (Part::AttnQ | Part::LatentDown, _) => Stored::ordered(neighbours(part, spec)),
        _ => experts::in_gguf(part, spec).unwrap_or(Stored::PLAIN),
    }
}

/// The order of those who turn neighbours, of the last rows of each head of queries, and of the key
/// behind the latent.
fn neighbours(part: Part, spec: Option<&BlockSpec>) -> Layout {
    let Some(Mixer::Latent(latent)) = spec.map(|spec| spec.mixer) else { return Layout::AsStored };
    let first = if part == Part::AttnQ { latent.plain_dim } else { latent.rank };
    let rotated = latent.turned_dim;
    Layout::Interleaved { head_dim: first + rotated, first, rotated }
}

/// The key under which a family with latent attention says what `key` says elsewhere: the part of
/// a head that is turned is what others call a head.
pub(super) fn hf_key(key: &str) -> &str {
    match key {
        "head_dim" => "qk_rope_head_dim",
        _ => key,
    }
}

/// Reads latent attention, whose keys are turned as neighbours.
pub(super) fn read_latent(keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
    for (key, is_usual) in [
        ("attention_bias", !keys.flag("attention_bias")?),
        ("rope_interleave", keys.is_gguf() || keys.flag("rope_interleave")?),
    ] {
        if !is_usual {
            return Err(keys.unsupported(format!("`{key}` of another value than usual")));
        }
    }
    config.kv_head_count = config.head_count;
    config.features.latent = Some(latent(keys, config)?);
    Ok(())
}

/// The keys of `config.json` that it reads back.
pub(super) fn write_latent(config: &ModelConfig, json: &mut Value) {
    let Some(latent) = config.features.latent else { return };
    json["qk_nope_head_dim"] = latent.plain_dim.into();
    json["qk_rope_head_dim"] = latent.turned_dim.into();
    json["v_head_dim"] = latent.value_dim.into();
    json["kv_lora_rank"] = latent.rank.into();
    json["q_lora_rank"] = latent.query_rank.into();
    if let Scaling::Yarn(yarn) = &config.rope.scaling {
        // The scale of scores is made from it.
        let plain = 1.0 / (latent.query_dim() as f64).sqrt();
        let root = (f64::from(latent.scale) / plain).sqrt();
        let all_dims = (root - 1.0) / (0.1 * yarn.factor.ln());
        json["rope_scaling"]["mscale_all_dim"] = shortest(all_dims as f32).into();
    }
}

/// Reads the sizes of latent attention.
fn latent(keys: &dyn Keys, config: &ModelConfig) -> Result<LatentAttention> {
    let count = |key: &str| Ok::<_, crate::FormatError>(keys.count(key)?.unwrap_or(0));
    let turned_dim = config.head_dim;
    // GGUF has both kinds of channels in one number.
    let plain_dim = match keys.count("qk_mla_head_dim")? {
        Some(all) => all.saturating_sub(turned_dim),
        None => count("qk_nope_head_dim")?,
    };
    let mut scale = 1.0 / ((plain_dim + turned_dim) as f64).sqrt();
    if let (Scaling::Yarn(yarn), Some(all_dims)) =
        (&config.rope.scaling, keys.number("mscale_all_dim")?)
    {
        // llama.cpp's converter stores a tenth of it.
        let all_dims = if keys.is_gguf() { 10.0 * all_dims } else { all_dims };
        scale *= yarn_amplitude(yarn.factor, all_dims).powi(2);
    }
    let stated = keys.number("attention_multiplier")?;
    Ok(LatentAttention {
        heads: config.head_count,
        plain_dim,
        turned_dim,
        value_dim: count("v_head_dim")?,
        rank: count("kv_lora_rank")?,
        query_rank: keys.count("q_lora_rank")?,
        query_scaling: None,
        scale: stated.unwrap_or(scale) as f32,
    })
}
