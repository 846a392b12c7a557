//! The tensors of the `llama` architecture: what they are called, and how large they are.

use crate::ModelConfig;

/// Hugging Face's and GGUF's names of the tensors outside the blocks, first to last.
const BEFORE: [(&str, &str); 1] = [("model.embed_tokens.weight", EMBEDDING)];
const AFTER: [(&str, &str); 2] =
    [("model.norm.weight", "output_norm.weight"), ("lm_head.weight", OUTPUT)];

/// The same for one block, after `model.layers.N.` and `blk.N.`.
const BLOCK: [(&str, &str); 9] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
];

/// The embedding of tokens.
pub const EMBEDDING: &str = "token_embd.weight";

/// The output projection, absent where the embedding doubles as one.
pub const OUTPUT: &str = "output.weight";

/// The RoPE factors, part of the configuration rather than of the tensors.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The names of all tensors that a model of `block_count` blocks may have, as
/// `(Hugging Face, GGUF)`, in the order in which they are used.
pub fn tensor_names(block_count: usize) -> impl Iterator<Item = (String, String)> {
    let block = |index: usize| {
        BLOCK.iter().map(move |(hf, gguf)| {
            (format!("model.layers.{index}.{hf}"), format!("blk.{index}.{gguf}"))
        })
    };
    let owned = |&(hf, gguf): &(&str, &str)| (hf.to_owned(), gguf.to_owned());
    BEFORE.iter().map(owned).chain((0..block_count).flat_map(block)).chain(AFTER.iter().map(owned))
}

/// The dimensions of a tensor by its GGUF name, outermost first: output channels, input channels.
///
/// # Panics
/// For a name that [`tensor_names`] does not give.
pub fn tensor_dims(gguf_name: &str, config: &ModelConfig) -> Vec<usize> {
    let &ModelConfig { hidden_size, ffn_size, vocab_size, head_dim, .. } = config;
    let (queries, keys) = (config.head_count * head_dim, config.kv_head_count * head_dim);
    match gguf_name.rsplit('.').nth(1) {
        Some("attn_norm" | "ffn_norm" | "output_norm") => vec![hidden_size],
        Some("token_embd" | "output") => vec![vocab_size, hidden_size],
        Some("attn_q") => vec![queries, hidden_size],
        Some("attn_k" | "attn_v") => vec![keys, hidden_size],
        Some("attn_output") => vec![hidden_size, queries],
        Some("ffn_gate" | "ffn_up") => vec![ffn_size, hidden_size],
        Some("ffn_down") => vec![hidden_size, ffn_size],
        _ => unreachable!("`{gguf_name}` is in none of the tables above"),
    }
}
