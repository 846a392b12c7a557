//! Gemma 4: blocks with a window and blocks without have heads of other sizes; values are normed;
//! every block ends in a scale. Some models have experts beside the network of a block, others say
//! to each block something about each token, and share keys and values among their last blocks.

use std::borrow::Cow;

use serde_json::{Value, json};

use super::{
    Activation, BlockSpec, ExpertPart, Experts, Family, Ffn, HfType, Norms, Part, QkNorm, Routing,
    Stored, Values, experts, llama,
    llama_cpp::{self, Ability},
};
use crate::{
    BlockEmbedding, ModelConfig, Result,
    config::{Keys, shortest},
};

/// `gemma4`.
#[derive(Debug)]
pub struct Gemma4;

/// Of so many blocks the last has no window, if nothing is said.
const INTERVAL: usize = 6;

impl Family for Gemma4 {
    fn architecture(&self) -> &'static str {
        "gemma4"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[HfType { model_type: "gemma4_text", class: "Gemma4ForCausalLM" }]
    }

    fn default(&self, key: &str) -> Option<f64> {
        Some(match key {
            "tie_word_embeddings" => 1.0,
            "head_dim" => 256.0,
            "global_head_dim" => 512.0,
            "sliding_window" => 512.0,
            "rms_norm_eps" => 1e-6,
            "rope_theta" => 1e6,
            "rope_local_base_freq" => 1e4,
            "proportional_rotary_factor" => 0.25,
            _ => return None,
        })
    }

    fn has_local_rope(&self) -> bool {
        true
    }

    fn has_global_heads(&self) -> bool {
        true
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        let number = |key: &str| -> Result<Option<f32>> {
            Ok(keys.number(key)?.map(|number| number as f32))
        };
        let features = &mut config.features;
        let scale = number("embedding_multiplier")?;
        features.embedding_scale = scale.unwrap_or((config.hidden_size as f32).sqrt());
        features.attention_scale = number("attention_multiplier")?.or(Some(1.0));
        features.logit_softcap = number("final_logit_softcapping")?;
        let rows = keys.count("vocab_size_per_layer_input")?.unwrap_or(config.vocab_size);
        let width = keys.count("hidden_size_per_layer_input")?.filter(|&width| width > 0);
        features.block_embedding = width.map(|width| BlockEmbedding { width, rows });
        llama::read_attention_bias(keys, config)?;
        read_windows(keys, config)?;
        config.features.global_heads = Some(keys.global_heads(config)?);
        read_sharing(keys, config)?;
        read_experts(keys, config)
    }

    /// Images only may be seen from before them.
    fn ignores(&self, key: &str, _config: &ModelConfig) -> bool {
        ["use_bidirectional_attention", "enable_moe_block", "use_double_wide_mlp"].contains(&key)
    }

    fn write(&self, config: &ModelConfig, json: &mut Value) {
        let features = &config.features;
        json["hidden_activation"] = json["hidden_act"].clone();
        json["final_logit_softcapping"] = features.logit_softcap.map(shortest).into();
        llama::write_windows(config, json);
        write_global_heads(config, json);
        json["num_kv_shared_layers"] = features.sharing_blocks.into();
        json["use_double_wide_mlp"] = features.sharing_are_wide.into();
        let BlockEmbedding { width, rows } = features
            .block_embedding
            .unwrap_or(BlockEmbedding { width: 0, rows: config.vocab_size });
        json["hidden_size_per_layer_input"] = width.into();
        json["vocab_size_per_layer_input"] = rows.into();
        json["enable_moe_block"] = features.experts.is_some().into();
        if let Some(experts) = features.experts {
            json["num_experts"] = experts.count.into();
            json["top_k_experts"] = experts.used.into();
            json["moe_intermediate_size"] = experts.ffn.width.into();
        }
        llama::leave_out(json, &["mlp_bias"]);
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let features = &config.features;
        let mut spec = llama::block(config, index);
        spec.norms = Norms::Both;
        spec.embedded = features.block_embedding.map(|embedding| embedding.width);
        spec.is_scaled = true;
        spec.activates_by(Activation::GeluTanh, true);
        let shares = shared_block(config, index);
        if let (Some(ffn), Some(_), true) = (&mut spec.ffn, shares, features.sharing_are_wide) {
            ffn.width *= 2;
        }
        spec.attends(|attention| {
            (attention.qk_norm, attention.shares) = (Some(QkNorm::Heads), shares);
            attention.values = Values::Normed;
            if let (None, Some(global)) = (attention.window, features.global_heads) {
                (attention.head_dim, attention.kv_heads) = (global.head_dim, global.kv_heads);
                if global.values_are_keys {
                    attention.values = Values::NormedKeys;
                }
            }
        });
        spec
    }

    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        let mut computed = llama_cpp::computed(config, &[Ability::Windows, Ability::Factors]);
        computed.features.attention_scale = Some(1.0);
        Some(computed)
    }

    fn hf_name(&self, part: Part) -> Cow<'static, str> {
        match part {
            Part::FfnNorm => "pre_feedforward_layernorm.weight".into(),
            Part::Router => "router.proj.weight".into(),
            _ => llama::hf_name(part),
        }
    }

    fn in_hf(&self, part: Part, _spec: Option<&BlockSpec>) -> Stored {
        match part {
            Part::Expert(_, ExpertPart::Gate | ExpertPart::Up) => {
                Stored::of_experts("experts.gate_up_proj", &[ExpertPart::Gate, ExpertPart::Up])
            }
            Part::Expert(_, ExpertPart::Down) => {
                Stored::of_experts("experts.down_proj", &[ExpertPart::Down])
            }
            _ => Stored::PLAIN,
        }
    }

    fn in_gguf(&self, part: Part, spec: Option<&BlockSpec>) -> Stored {
        match part {
            Part::Expert(..) => experts::in_gguf(part, spec).unwrap_or(Stored::PLAIN),
            _ => Stored::PLAIN,
        }
    }
}

/// Reads which blocks have a window: all but each sixth and the last, if nothing is said.
fn read_windows(keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
    llama::read_windows(keys, config, INTERVAL)?;
    if keys.windowed(config.block_count)?.is_none() {
        if let Some(last) = config.features.windowed.last_mut() {
            *last = false;
        }
        llama::settle_windows(config);
    }
    Ok(())
}

/// Reads which blocks have no keys and values of their own, and how wide their networks are. GGUF
/// says the latter block by block.
fn read_sharing(keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
    let (blocks, width) = (config.block_count, config.ffn_size);
    config.features.sharing_blocks = keys.count("num_kv_shared_layers")?.unwrap_or(0).min(blocks);
    config.features.sharing_are_wide = keys.flag("use_double_wide_mlp")?;
    let widths = if keys.is_gguf() { keys.numbers("intermediate_size")? } else { Vec::new() };
    if !widths.is_empty() {
        let is_wide = widths.last().is_some_and(|&last| last == 2 * width);
        config.features.sharing_are_wide = is_wide;
        let expected = |index: usize| match is_wide && config.features.shares(index, blocks) {
            true => 2 * width,
            false => width,
        };
        let fits = widths.len() == blocks && (0..blocks).all(|i| widths[i] == expected(i));
        if !fits {
            return Err(keys.unsupported(format!("networks of {widths:?} neurons")));
        }
    }
    let mut sharing = (0..blocks).filter(|&index| config.features.shares(index, blocks));
    match sharing.find(|&index| shared_block(config, index).is_none()) {
        Some(index) => Err(keys.unsupported(format!(
            "block {index}, which shares keys and values with a block of its kind, of which there \
             is none before it"
        ))),
        None => Ok(()),
    }
}

/// The block whose keys and values block `index` attends to, if it has none of its own: the last
/// one with them that has a window if this has one.
fn shared_block(config: &ModelConfig, index: usize) -> Option<usize> {
    let (features, blocks) = (&config.features, config.block_count);
    if !features.shares(index, blocks) {
        return None;
    }
    let is_alike = |&other: &usize| config.is_windowed(other) == config.is_windowed(index);
    (0..blocks - features.sharing_blocks).rev().find(is_alike)
}

/// Reads experts, which stand beside the network of each block.
fn read_experts(keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
    let sharpness = 1.0 / (config.hidden_size as f32).sqrt();
    experts::read(keys, config, Routing { sharpness, ..Routing::SOFTMAX })?;
    let used = keys.count("top_k_experts")?;
    let Some(experts) = config.features.experts else { return Ok(()) };
    config.features.shared_ffn_size = Some(config.ffn_size);
    config.features.experts = Some(Experts {
        used: used.map_or(experts.used, experts::small),
        ffn: Ffn { activation: Activation::GeluTanh, ..experts.ffn },
        has_norms: true,
        ..experts
    });
    Ok(())
}

/// The keys of blocks without a window, in the new spelling and in the old one.
fn write_global_heads(config: &ModelConfig, json: &mut Value) {
    let Some(global) = config.features.global_heads else { return };
    json["attention_k_eq_v"] = global.values_are_keys.into();
    json["global_head_dim"] = global.head_dim.into();
    json["num_global_key_value_heads"] = global.kv_heads.into();
    let mut of_blocks = json!({});
    for index in (0..config.block_count).filter(|&index| !config.is_windowed(index)) {
        of_blocks[index.to_string()] =
            json!({"head_dim": global.head_dim, "num_key_value_heads": global.kv_heads});
    }
    json["per_layer_config"] = of_blocks;
}
