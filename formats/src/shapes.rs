//! Whether a model has all of its tensors, each in the size that its configuration says.

use std::path::Path;

use crate::{FormatError, ModelConfig, Result, names};

/// In whose words messages speak.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spelling {
    HuggingFace,
    Gguf,
}

/// A size of a model: the key that says it in `config.json` and in GGUF, and what it says.
type Size = (&'static str, &'static str, usize);

/// Checks the tensors of a model, of which `dims_of` gives rows and columns by GGUF's names.
///
/// # Errors
/// `Malformed` for the first that is missing, other than a tied output projection, and for the
/// first that has another shape.
pub(crate) fn check(
    path: &Path,
    config: &ModelConfig,
    spelling: Spelling,
    dims_of: impl Fn(&str) -> Result<Option<(usize, usize)>>,
) -> Result<()> {
    let (mut missing, mut first_missing) = (0, None);
    for (hf_name, name) in names::tensor_names(config.block_count) {
        let shown = if spelling == Spelling::Gguf { &name } else { &hf_name };
        let dims = names::tensor_dims(&name, config);
        let expected = match dims[..] {
            [rows, cols] => (rows, cols),
            _ => (1, dims[0]),
        };
        match dims_of(&name)? {
            Some(found) if found == expected => {}
            Some((rows, cols)) => {
                let found = match dims.len() {
                    1 if rows == 1 => format!("[{cols}]"),
                    _ => format!("[{rows}, {cols}]"),
                };
                let expected = format!("{dims:?} by {}", reasons(&name, config, spelling));
                let place = format!("tensor `{shown}`");
                return Err(FormatError::malformed(path, place, "", found, expected)
                    .with_hint("weights and configuration are of different models"));
            }
            None if config.tied_embeddings && name == names::OUTPUT => {}
            None => {
                missing += 1;
                first_missing.get_or_insert_with(|| shown.clone());
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
fn reasons(name: &str, config: &ModelConfig, spelling: Spelling) -> String {
    let hidden = ("hidden_size", "llama.embedding_length", config.hidden_size);
    let vocab = ("vocab_size", "llama.vocab_size", config.vocab_size);
    let ffn = ("intermediate_size", "llama.feed_forward_length", config.ffn_size);
    let heads = ("num_attention_heads", "llama.attention.head_count", config.head_count);
    let kv_heads = ("num_key_value_heads", "llama.attention.head_count_kv", config.kv_head_count);
    let head_dim = ("head_dim", "llama.attention.key_length", config.head_dim);
    let sizes: &[Size] = match name.rsplit('.').nth(1) {
        Some("token_embd" | "output") => &[vocab, hidden],
        Some("attn_q") => &[heads, head_dim, hidden],
        Some("attn_k" | "attn_v") => &[kv_heads, head_dim, hidden],
        Some("attn_output") => &[hidden, heads, head_dim],
        Some("ffn_gate" | "ffn_up") => &[ffn, hidden],
        Some("ffn_down") => &[hidden, ffn],
        _ => &[hidden],
    };
    let in_words = sizes.iter().map(|&(hf, gguf, size)| {
        let key = if spelling == Spelling::Gguf { gguf } else { hf };
        format!("`{key}` {size}")
    });
    in_words.collect::<Vec<_>>().join(", ")
}
