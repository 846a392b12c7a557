//! The tensors of the `llama` architecture and what they are called.

/// Hugging Face's and GGUF's names of the tensors outside the blocks, first to last.
const BEFORE: [(&str, &str); 1] = [("model.embed_tokens.weight", "token_embd.weight")];
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

/// The output projection, absent where the embedding doubles as one.
pub(crate) const OUTPUT: &str = "output.weight";

/// The RoPE factors, part of the configuration rather than of the tensors.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The names of all tensors that a model of `block_count` blocks may have, as
/// `(Hugging Face, GGUF)`, in the order in which they are used.
pub(crate) fn tensor_names(block_count: usize) -> impl Iterator<Item = (String, String)> {
    let block = |index: usize| {
        BLOCK.iter().map(move |(hf, gguf)| {
            (format!("model.layers.{index}.{hf}"), format!("blk.{index}.{gguf}"))
        })
    };
    let owned = |&(hf, gguf): &(&str, &str)| (hf.to_owned(), gguf.to_owned());
    BEFORE.iter().map(owned).chain((0..block_count).flat_map(block)).chain(AFTER.iter().map(owned))
}
