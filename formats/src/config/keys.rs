//! What a family asks of a model's description, whichever file it is in.

use crate::Result;

/// The keys of `config.json`, or what GGUF has in their place.
pub trait Keys {
    /// `model_type`; `None` in GGUF, where a family is all that is said.
    fn model_type(&self) -> Option<&str>;

    /// A number.
    ///
    /// # Errors
    /// `Malformed` if it is none.
    fn number(&self, key: &str) -> Result<Option<f64>>;

    /// A whole number; absent, what the family's class takes for it.
    ///
    /// # Errors
    /// `Malformed` if it is none.
    fn count(&self, key: &str) -> Result<Option<usize>>;

    /// Whether a key is true; absent, it is what the family's class takes it for, or false. Of most
    /// flags GGUF has none: tensors tell.
    ///
    /// # Errors
    /// `Malformed` if it is neither true nor false.
    fn flag(&self, key: &str) -> Result<bool>;

    /// A flag for each block, as 0 and 1 or false and true.
    ///
    /// # Errors
    /// `Malformed` if it is no list of `blocks` flags.
    fn flags(&self, key: &str, blocks: usize) -> Result<Option<Vec<bool>>>;

    /// Which blocks attend within a window only, if it is said.
    ///
    /// # Errors
    /// `Malformed` if it is not said of each block; `Unsupported` for another kind of block.
    fn windowed(&self, blocks: usize) -> Result<Option<Vec<bool>>>;

    /// Whether the file is in GGUF, whose numbers and defaults are those of llama.cpp.
    fn is_gguf(&self) -> bool {
        self.model_type().is_none()
    }
}

/// GGUF's name for a key of `config.json`, without the architecture in front of it.
pub(super) fn gguf_name(key: &str) -> Option<&'static str> {
    let names = [
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("llama_4_scaling_beta", "attention.temperature_scale"),
        ("no_rope_layers", "rope.pattern"),
        ("sliding_window", "attention.sliding_window"),
        ("do_layer_norm_before", "norm_before"),
        ("word_embed_proj_dim", "token_embedding_length"),
    ];
    names.into_iter().find_map(|(hf, gguf)| (hf == key).then_some(gguf))
}

/// One block in `interval` without a window, the last of each.
pub(crate) fn every(interval: usize, blocks: usize) -> Vec<bool> {
    (1..=blocks).map(|number| number % interval != 0).collect()
}
