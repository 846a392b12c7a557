//! Whether a model has all of its tensors, each in the size that its configuration says.

use std::path::Path;

use crate::{
    Decoder, FormatError, ModelConfig, Part, Result,
    arch::{Mixer, Place, Tensor},
};

/// In whose words messages speak.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spelling {
    HuggingFace,
    Gguf,
}

/// A size of a model: the key that says it in `config.json`, that in GGUF without the architecture,
/// and what it says.
type Size = (&'static str, &'static str, usize);

/// Checks the tensors of a model; `dims_of` gives the rows and columns of what is at a place.
///
/// # Errors
/// `Malformed` for the first that is missing, and for the first that has another shape.
pub(crate) fn check(
    path: &Path,
    config: &ModelConfig,
    decoder: &Decoder,
    spelling: Spelling,
    dims_of: impl Fn(&Place) -> Result<Option<(usize, usize)>>,
) -> Result<()> {
    let (mut missing, mut first_missing) = (0, None);
    for tensor in decoder.tensors() {
        let place = if spelling == Spelling::Gguf { &tensor.gguf } else { &tensor.hf };
        let name = &place.name;
        let stored = place.stored_shape(tensor);
        match dims_of(place)? {
            Some(found) if found == stored => {}
            Some((rows, cols)) => {
                let is_vector = !tensor.is_matrix();
                let shape = |(rows, cols): (usize, usize)| match is_vector && rows == 1 {
                    true => format!("[{cols}]"),
                    false => format!("[{rows}, {cols}]"),
                };
                let why = reasons(tensor, config, decoder, spelling);
                let expected = format!("{} by {why}", shape(stored));
                let place = format!("tensor `{name}`");
                let found = shape((rows, cols));
                return Err(FormatError::malformed(path, place, "", found, expected)
                    .with_hint("weights and configuration are of different models"));
            }
            None => {
                missing += 1;
                first_missing.get_or_insert_with(|| name.clone());
            }
        }
    }
    let Some(first) = first_missing else { return Ok(()) };
    let found = match missing - 1 {
        0 => "none".to_owned(),
        more => format!("none, and none of {more} more"),
    };
    let expected = format!("the tensors of {} blocks", config.block_count);
    Err(FormatError::malformed(path, format!("tensor `{first}`"), "", found, expected)
        .with_hint("a part of the model is missing; download it again, with all its files"))
}

/// The keys that give a tensor's dimensions, with what they say.
fn reasons(tensor: &Tensor, config: &ModelConfig, decoder: &Decoder, spelling: Spelling) -> String {
    let part = tensor.part;
    let hidden = ("hidden_size", "embedding_length", config.hidden_size);
    let embedding = match config.features.embedding_size {
        Some(size) => ("word_embed_proj_dim", "token_embedding_length", size),
        None => hidden,
    };
    let vocab = ("vocab_size", "vocab_size", config.vocab_size);
    let ffn = (config.family.hf_key("intermediate_size"), "feed_forward_length", config.ffn_size);
    let found = config.features.experts;
    let count = found.map_or(0, |experts| experts.count.into());
    let experts = ("the number of experts", "expert_count", count);
    let width = found.map_or(0, |experts| experts.ffn.width);
    let of_expert = ("moe_intermediate_size", "expert_feed_forward_length", width);
    let heads = ("num_attention_heads", "attention.head_count", config.head_count);
    let kv_heads = ("num_key_value_heads", "attention.head_count_kv", config.kv_head_count);
    let head_dim = ("head_dim", "attention.key_length", config.head_dim);
    let context = ("max_position_embeddings", "context_length", config.context_length);
    let mixer = tensor.block.map(|block| decoder.blocks[block].mixer);
    let of_mixer = mixer.map_or(Vec::new(), |mixer| mixer_sizes(&mixer, part, hidden));
    let sizes: &[Size] = match part {
        _ if !of_mixer.is_empty() => &of_mixer,
        Part::Embedding | Part::Output => &[vocab, embedding],
        Part::EmbeddingUp => &[hidden, embedding],
        Part::EmbeddingDown => &[embedding, hidden],
        Part::Positions => &[context, hidden],
        Part::AttnQ => &[heads, head_dim, hidden],
        Part::AttnK | Part::AttnV => &[kv_heads, head_dim, hidden],
        Part::AttnOutput => &[hidden, heads, head_dim],
        Part::FfnGate | Part::FfnUp => &[ffn, hidden],
        Part::FfnDown => &[hidden, ffn],
        Part::AttnQBias | Part::AttnQNorm => &[heads, head_dim],
        Part::AttnKBias | Part::AttnKNorm | Part::AttnVBias => &[kv_heads, head_dim],
        Part::AttnSinks => &[heads],
        Part::FfnGateBias | Part::FfnUpBias => &[ffn],
        Part::Router | Part::RouterBias | Part::RouterCorrection => &[experts, hidden],
        Part::Expert(..) => &[experts, of_expert, hidden],
        _ => &[hidden],
    };
    let in_words = sizes.iter().map(|&(hf, gguf, size)| match spelling {
        Spelling::Gguf => format!("`{}.{gguf}` {size}", config.family.architecture()),
        Spelling::HuggingFace => format!("`{hf}` {size}"),
    });
    in_words.collect::<Vec<_>>().join(", ")
}

/// The keys that give the dimensions of a part of a mixer other than attention; none of other
/// parts.
fn mixer_sizes(mixer: &Mixer, part: Part, hidden: Size) -> Vec<Size> {
    if mixer.dims(part, hidden.2).is_none() {
        return Vec::new();
    }
    match mixer {
        Mixer::Attention(_) => Vec::new(),
        Mixer::Latent(latent) => {
            let query_rank =
                latent.query_rank.map(|rank| ("q_lora_rank", "attention.q_lora_rank", rank));
            let others = [
                ("num_attention_heads", "attention.head_count", latent.heads),
                ("qk_head_dim", "attention.key_length_mla", latent.query_dim()),
                ("qk_rope_head_dim", "rope.dimension_count", latent.turned_dim),
                ("v_head_dim", "attention.value_length_mla", latent.value_dim),
                ("kv_lora_rank", "attention.kv_lora_rank", latent.rank),
                hidden,
            ];
            query_rank.into_iter().chain(others).collect()
        }
        Mixer::DeltaNet(net) => vec![
            ("linear_num_key_heads", "ssm.group_count", net.key_heads),
            ("linear_num_value_heads", "ssm.time_step_rank", net.value_heads),
            ("linear_key_head_dim", "ssm.state_size", net.key_dim),
            ("the size of all values", "ssm.inner_size", net.values()),
            ("linear_conv_kernel_dim", "ssm.conv_kernel", net.taps),
            hidden,
        ],
        Mixer::Convolution(convolution) => {
            vec![("conv_L_cache", "shortconv.l_cache", convolution.taps), hidden]
        }
    }
}
