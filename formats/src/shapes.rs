//! Whether a model has all of its tensors, each in the size that its configuration says.

use std::path::Path;

use crate::{Decoder, FormatError, ModelConfig, Part, Result};

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
/// `Malformed` for the first that is missing, and for the first that has another shape.
pub(crate) fn check(
    path: &Path,
    config: &ModelConfig,
    decoder: &Decoder,
    spelling: Spelling,
    dims_of: impl Fn(&str) -> Result<Option<(usize, usize)>>,
) -> Result<()> {
    let (mut missing, mut first_missing) = (0, None);
    for tensor in decoder.tensors() {
        let shown = if spelling == Spelling::Gguf { &tensor.name } else { &tensor.hf_name };
        let dims = &tensor.dims;
        match dims_of(&tensor.name)? {
            Some(found) if found == tensor.shape() => {}
            Some((rows, cols)) => {
                let found = match dims.len() {
                    1 if rows == 1 => format!("[{cols}]"),
                    _ => format!("[{rows}, {cols}]"),
                };
                let expected = format!("{dims:?} by {}", reasons(tensor.part, config, spelling));
                let place = format!("tensor `{shown}`");
                return Err(FormatError::malformed(path, place, "", found, expected)
                    .with_hint("weights and configuration are of different models"));
            }
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
fn reasons(part: Part, config: &ModelConfig, spelling: Spelling) -> String {
    let hidden = ("hidden_size", "llama.embedding_length", config.hidden_size);
    let vocab = ("vocab_size", "llama.vocab_size", config.vocab_size);
    let ffn = ("intermediate_size", "llama.feed_forward_length", config.ffn_size);
    let heads = ("num_attention_heads", "llama.attention.head_count", config.head_count);
    let kv_heads = ("num_key_value_heads", "llama.attention.head_count_kv", config.kv_head_count);
    let head_dim = ("head_dim", "llama.attention.key_length", config.head_dim);
    let sizes: &[Size] = match part {
        Part::Embedding | Part::Output => &[vocab, hidden],
        Part::AttnQ => &[heads, head_dim, hidden],
        Part::AttnK | Part::AttnV => &[kv_heads, head_dim, hidden],
        Part::AttnOutput => &[hidden, heads, head_dim],
        Part::FfnGate | Part::FfnUp => &[ffn, hidden],
        Part::FfnDown => &[hidden, ffn],
        Part::AttnNorm | Part::FfnNorm | Part::OutputNorm => &[hidden],
    };
    let in_words = sizes.iter().map(|&(hf, gguf, size)| {
        let key = if spelling == Spelling::Gguf { gguf } else { hf };
        format!("`{key}` {size}")
    });
    in_words.collect::<Vec<_>>().join(", ")
}
