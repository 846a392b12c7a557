//! What a family asks of a model's description, whichever file it is in.

use super::{GlobalHeads, ModelConfig};
use crate::{FormatError, Result};

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

    /// Whether a key is true, if it is said or the family's class takes it for something.
    ///
    /// # Errors
    /// `Malformed` if it is neither true nor false.
    fn said(&self, key: &str) -> Result<Option<bool>>;

    /// Whole numbers; none if nothing is said.
    ///
    /// # Errors
    /// `Malformed` if it is no list of them.
    fn numbers(&self, key: &str) -> Result<Vec<usize>>;

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

    /// Which blocks have a state in place of keys and values, if it is said.
    ///
    /// # Errors
    /// As [`Self::windowed`].
    fn recurrent(&self, blocks: usize) -> Result<Option<Vec<bool>>>;

    /// Which blocks have experts, if it is said block by block.
    ///
    /// # Errors
    /// As [`Self::windowed`].
    fn sparse(&self, blocks: usize) -> Result<Option<Vec<bool>>>;

    /// The heads of blocks without a window, of a family where they may be others; `config` has
    /// those of blocks with one, and which blocks these are.
    ///
    /// # Errors
    /// `Malformed` for a key with a value of the wrong kind; `Unsupported` if blocks of one kind
    /// differ.
    fn global_heads(&self, config: &ModelConfig) -> Result<GlobalHeads>;

    /// Whether a key is a text, which GGUF has none of.
    ///
    /// # Errors
    /// `Malformed` if it is none.
    fn is_text(&self, key: &str, text: &str) -> Result<bool>;

    /// The error that the model needs what this program does not compute.
    fn unsupported(&self, what: String) -> FormatError;

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
        ("intermediate_size", "feed_forward_length"),
        ("num_kv_shared_layers", "attention.shared_kv_layers"),
        ("hidden_size_per_layer_input", "embedding_length_per_layer_input"),
        ("vocab_size_per_layer_input", "vocab_size_per_layer_input"),
        ("num_local_experts", "expert_count"),
        ("num_experts", "expert_count"),
        ("n_routed_experts", "expert_count"),
        ("num_experts_per_tok", "expert_used_count"),
        ("moe_intermediate_size", "expert_feed_forward_length"),
        ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
        ("shared_intermediate_size", "expert_shared_feed_forward_length"),
        ("n_shared_experts", "expert_shared_count"),
        ("first_k_dense_replace", "leading_dense_block_count"),
        ("norm_topk_prob", "expert_weights_norm"),
        ("routed_scaling_factor", "expert_weights_scale"),
        ("n_group", "expert_group_count"),
        ("topk_group", "expert_group_used_count"),
        ("num_nextn_predict_layers", "nextn_predict_layers"),
        ("expert_pattern", "expert_pattern"),
        ("expert_gating_func", "expert_gating_func"),
        ("expert_group_best", "expert_group_best"),
        ("qk_mla_head_dim", "attention.key_length_mla"),
        ("v_head_dim", "attention.value_length_mla"),
        ("kv_lora_rank", "attention.kv_lora_rank"),
        ("q_lora_rank", "attention.q_lora_rank"),
        ("mscale_all_dim", "rope.scaling.yarn_log_multiplier"),
        ("full_attention_interval", "full_attention_interval"),
        ("recurrent_layers", "attention.recurrent_layers"),
        ("linear_num_key_heads", "ssm.group_count"),
        ("linear_num_value_heads", "ssm.time_step_rank"),
        ("linear_key_head_dim", "ssm.state_size"),
        ("linear_inner_size", "ssm.inner_size"),
        ("linear_conv_kernel_dim", "ssm.conv_kernel"),
        ("tiled_value_heads", "ssm.tiled_value_heads"),
        ("conv_L_cache", "shortconv.l_cache"),
        ("swiglu_alpha", "swiglu_alpha"),
        ("swiglu_limit", "swiglu_limit"),
    ];
    names.into_iter().find_map(|(hf, gguf)| (hf == key).then_some(gguf))
}

/// One block in `interval` without a window, the last of each.
pub(crate) fn every(interval: usize, blocks: usize) -> Vec<bool> {
    (1..=blocks).map(|number| number % interval != 0).collect()
}
