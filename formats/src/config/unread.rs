//! Which keys of a description change what a model computes.
//!
//! Every key is read, or known to be harmless, or refused unless its value is the one at which it
//! changes nothing, or (in `config.json`, where anybody writes what they like) warned of.

use serde_json::Value as Json;

use super::ModelConfig;
use crate::{arch::Scores, gguf::Value};

/// Keys of `config.json` that say nothing about what is computed, by group.
#[rustfmt::skip]
const HARMLESS: [&[&str]; 5] = [
    // Where the model comes from, and how it is kept. The stored element type counts, not this one.
    &[
        "_name_or_path", "_commit_hash", "name_or_path", "transformers_version", "torch_dtype",
        "dtype", "tokenizer_class", "transformers.js_config", "unsloth_fixed", "unsloth_version",
        "license", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
        "task_specific_params", "quantization_config", "quantization",
    ],
    // Tokens, which other readers look after.
    &[
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
        "cls_token_id", "mask_token_id", "decoder_start_token_id", "prefix",
    ],
    // Training, and how the same numbers are computed. Dropout is none outside of training;
    // `pretraining_tp` cuts a product into parts that are put together again.
    &[
        "initializer_range", "attention_dropout", "hidden_dropout", "resid_dropout",
        "resid_pdrop", "embd_pdrop", "attn_pdrop", "gradient_checkpointing", "use_cache",
        "pretraining_tp", "attn_implementation", "_attn_implementation",
        "_attn_implementation_autoset", "_flash_attn_2_enabled", "use_flash_attn",
        "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
        "use_return_dict", "torchscript", "use_bfloat16", "pruned_heads", "tf_legacy_loss",
        "router_jitter_noise",
        "chunk_size_feed_forward", "cross_attention_hidden_size", "router_aux_loss_coef",
    ],
    // Generation, of old configurations.
    &[
        "max_length", "min_length", "max_new_tokens", "do_sample", "temperature", "top_k",
        "top_p", "typical_p", "num_beams", "num_beam_groups", "num_return_sequences",
        "early_stopping", "diversity_penalty", "repetition_penalty", "length_penalty",
        "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
        "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
        "exponential_decay_length_penalty", "remove_invalid_values", "return_dict_in_generate",
        "output_scores",
    ],
    // Of other classes' configurations, of which this one's read another.
    &["layer_norm_eps", "is_decoder", "tie_encoder_decoder", "max_sequence_length", "model_max_length"],
];

/// What an unread key of `config.json` is.
pub(super) enum Unread {
    /// It changes nothing.
    Harmless,
    /// It changes the computation.
    Changes,
    /// Nobody here knows.
    Unknown,
}

/// What an unread key of `config.json` with a value other than `null` is.
pub(super) fn unread(key: &str, value: &Json, model: &ModelConfig) -> Unread {
    let is = |neutral: f64| value.as_f64().is_some_and(|found| is_about(found, neutral));
    let all = |name: &str| {
        let array = value.as_array().into_iter().flatten();
        value.is_array() && array.into_iter().all(|entry| entry == name)
    };
    let is_neutral = match key {
        key if HARMLESS.iter().any(|group| group.contains(&key)) => true,
        key if model.family.ignores(key, model) => true,
        "hidden_act" | "hidden_activation" | "activation_function" | "mlp_hidden_act" => {
            let names = model.family.block(model, 0).activation().hf_names();
            names.iter().any(|&name| value == name)
        }
        "attention_bias"
        | "mlp_bias"
        | "bias"
        | "use_bias"
        | "qkv_bias"
        | "attn_bias"
        | "attention_out_bias"
        | "attention_qkv_bias"
        | "add_bias_linear"
        | "add_qkv_bias"
        | "lm_head_bias"
        | "use_qk_norm"
        | "qk_norm"
        | "qk_layernorm"
        | "use_qkv_bias"
        | "alibi"
        | "use_alibi"
        | "parallel_attn"
        | "use_parallel_residual"
        | "use_sliding_window"
        | "attn_output_gate"
        | "add_cross_attention"
        | "is_encoder_decoder"
        | "use_bidirectional_attention"
        | "use_mrope"
        | "_remove_final_layer_norm" => value == false,
        "is_causal" | "do_layer_norm_before" | "layer_norm_elementwise_affine" => value == true,
        "word_embed_proj_dim" => is(model.hidden_size as f64),
        "position_embedding_type" => ["rope", "rotary"].iter().any(|&kind| value == kind),
        "partial_rotary_factor"
        | "rotary_pct"
        | "rotary_percent"
        | "embedding_multiplier"
        | "residual_multiplier"
        | "logits_scaling"
        | "logit_scale"
        | "lm_head_multiplier"
        | "scale_emb"
        | "embedding_scale"
        | "residual_scale" => is(1.0),
        "rotary_dim" => is(model.head_dim as f64),
        "attention_multiplier" | "attention_scale" => is(attention_scale(model)),
        "query_pre_attn_scalar" => is(model.head_dim as f64),
        "scale_depth" => is((model.block_count as f64).sqrt()),
        "dim_model_base" => is(model.hidden_size as f64),
        "attn_logit_softcapping"
        | "final_logit_softcapping"
        | "clip_qkv"
        | "num_experts"
        | "num_local_experts"
        | "n_routed_experts"
        | "num_nextn_predict_layers" => is(0.0),
        "num_experts_per_tok" | "kv_lora_rank" | "q_lora_rank" => is(0.0),
        "scoring_func" => {
            model.features.experts.is_some_and(|experts| match experts.routing.scores {
                Scores::Softmax => value == "softmax",
                Scores::Sigmoid => value == "sigmoid",
            })
        }
        "topk_method" => model.features.experts.is_some_and(|experts| {
            value == if experts.routing.is_corrected { "noaux_tc" } else { "greedy" }
        }),
        "layer_types" => match model.sliding_window {
            None => all("full_attention"),
            Some(_) => all("sliding_attention"),
        },
        key if is_of_rope(key) => false,
        _ => return Unread::Unknown,
    };
    if is_neutral { Unread::Harmless } else { Unread::Changes }
}

/// Whether an unread key of a GGUF file changes nothing: it is of no description of the
/// computation, or has the value at which llama.cpp does what this program does.
pub(super) fn is_harmless_in_gguf(key: &str, value: &Value, model: &ModelConfig) -> bool {
    let (group, own) = key.split_once('.').unwrap_or(("", key));
    if group != model.family.architecture() {
        let is_talk = ["general", "tokenizer", "slim", "split", "quantize"].contains(&group);
        return is_talk || !is_of_rope(key);
    }
    let number = value.as_f64().or_else(|| value.as_u64().map(|number| number as f64));
    let is = |neutral: f64| number.is_some_and(|found| is_about(found, neutral));
    match own {
        // Of the context that the model was stretched from, which linear scaling does not ask.
        "rope.scaling.original_context_length" | "rope.scaling.finetuned" => true,
        // Which channels turn by which of three positions, which are one for text.
        "rope.dimension_sections" => true,
        // How old converters called the order of rows that every `llama` file has.
        "tensor_data_layout" => value.as_str() == Some("Meta AI original pth"),
        "use_parallel_residual" => value.as_bool() == Some(false),
        "attention.causal" => value.as_bool() == Some(true),
        "attention.scale" => is(0.0) || is(attention_scale(model)),
        "logit_scale" | "residual_scale" | "embedding_scale" | "rope.scaling.attn_factor" => {
            is(0.0) || is(1.0)
        }
        "attention.max_alibi_bias"
        | "attention.clamp_kqv"
        | "attn_logit_softcapping"
        | "final_logit_softcapping"
        | "expert_count"
        | "expert_used_count"
        | "expert_shared_count"
        | "leading_dense_block_count"
        | "nextn_predict_layers"
        | "pooling_type"
        | "rope.scaling.yarn_log_multiplier" => is(0.0),
        _ => false,
    }
}

fn attention_scale(model: &ModelConfig) -> f64 {
    1.0 / (model.head_dim as f64).sqrt()
}

/// Equal but for what a number in f32 or one that people round may lose.
pub(super) fn is_about(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 1e-5 * expected.abs()
}

fn is_of_rope(key: &str) -> bool {
    key.contains("rope") || key.contains("rotary")
}
