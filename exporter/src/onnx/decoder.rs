//! The graph of a model of the Llama family: what `slim_runtime::Block` computes, in ONNX Runtime's
//! operators.
//!
//! Activations are f32, as in the models that ONNX Runtime GenAI builds for the CPU, whose kernels
//! compute in f32. Values are `[batch, sequence, channels]`; weights and values are called as in
//! GGUF.

mod linear;

use std::collections::HashSet;

use slim_formats::{EMBEDDING, ModelConfig, ModelSource};
use slim_kernels::RopeAngles;
use slim_runtime::find_vector;

use super::graph::{
    ALIGNMENT,
    Attribute::{self, Float, Int},
    Dim::{Fixed, Named},
    Element, Graph,
};
use crate::{ExportError, Result, tensor::names};

/// `GroupQueryAttention` rotates whole vectors of this many channels.
const HEAD_DIM_MULTIPLE: usize = 16;

const HINT: &str = "use `--to safetensors`";

/// Positions in the tables of cosines and sines at most.
const MAX_POSITIONS: usize = 1 << 17;

/// Rows, or positions, that are written at a time.
const PIECE: usize = 1 << 10;

/// Bits per code of a layer, at least.
const LEAST_BITS: u8 = 2;

/// Of the embedding: its codes are bytes, which can be gathered.
const EMBEDDING_BITS: u8 = 8;

/// How many tokens the graph takes in all.
pub fn context_length(config: &ModelConfig) -> usize {
    config.context_length.min(MAX_POSITIONS)
}

/// Checks that ONNX Runtime has operators for the model.
///
/// # Errors
/// `Unsupported` if it has none.
pub fn check(source: &dyn ModelSource) -> Result<()> {
    let config = source.config();
    let unsupported =
        |what| Err(ExportError::unsupported(source.path(), "ONNX Runtime", what, HINT));
    if config.architecture != "llama" {
        return unsupported(format!("the architecture `{}`", config.architecture));
    }
    if !config.head_dim.is_multiple_of(HEAD_DIM_MULTIPLE) {
        let found = config.head_dim;
        let what = format!("heads of {found} channels, no multiple of {HEAD_DIM_MULTIPLE},");
        return unsupported(what);
    }
    Ok(())
}

/// Bytes of the data of the model's tensors, at most.
pub fn data_bytes(source: &dyn ModelSource) -> Result<u64> {
    let config = source.config();
    let mut bytes = (context_length(config) * config.head_dim * size_of::<f32>()) as u64;
    let mut parts = 2;
    for (_, name) in names(source)? {
        let least_bits = if name == EMBEDDING { EMBEDDING_BITS } else { LEAST_BITS };
        bytes += linear::stored_bytes(source.require(&name)?, least_bits);
        parts += linear::MAX_PARTS;
    }
    Ok(bytes + parts * ALIGNMENT)
}

/// Adds the whole model, which was [checked](check), to `graph`.
pub fn add_decoder(
    graph: &mut Graph,
    source: &dyn ModelSource,
    on_tensor: &mut dyn FnMut(&str),
) -> Result<()> {
    Decoder { graph, source, config: source.config(), on_tensor, sums: HashSet::new() }.add()
}

struct Decoder<'a> {
    graph: &'a mut Graph,
    source: &'a dyn ModelSource,
    config: &'a ModelConfig,
    on_tensor: &'a mut dyn FnMut(&str),
    /// Names of the sums over blocks that the graph has already.
    sums: HashSet<String>,
}

impl Decoder<'_> {
    fn add(mut self) -> Result<()> {
        let ModelConfig { vocab_size, hidden_size, block_count, .. } = *self.config;
        self.add_shared_values();
        let embedding = self.store(EMBEDDING, vocab_size, hidden_size, EMBEDDING_BITS)?;
        self.embed(&embedding, "embedding");
        let mut residual = "embedding".to_owned();
        let mut normed = self.add_norm(&residual, "blk.0.attn_norm")?;
        for block in 0..block_count {
            let name = |part: &str| format!("blk.{block}.{part}");
            let attended = self.add_attention(block, &normed)?;
            (residual, normed) = self.add_to_residual(&residual, &attended, &name("ffn_norm"))?;
            let output = self.add_ffn(block, &normed)?;
            let next_norm = match block + 1 {
                next if next == block_count => "output_norm".to_owned(),
                next => format!("blk.{next}.attn_norm"),
            };
            (residual, normed) = self.add_to_residual(&residual, &output, &next_norm)?;
        }
        let head = match self.config.tied_embeddings {
            true => embedding,
            false => self.store("output.weight", vocab_size, hidden_size, LEAST_BITS)?,
        };
        self.multiply(&head, &normed, "logits");
        let dims = [Named("batch"), Named("sequence"), Fixed(vocab_size)];
        self.graph.output("logits", Element::F32, &dims);
        // Last, when the weights have shown that heads are as large as the hyperparameters say.
        self.add_rope_tables()
    }

    /// What every block needs: lengths from the mask, constants.
    fn add_shared_values(&mut self) {
        let graph = &mut *self.graph;
        graph.input("input_ids", Element::I64, &[Named("batch"), Named("sequence")]);
        graph.input("attention_mask", Element::I64, &[Named("batch"), Named("total_sequence")]);
        graph.integers("one", &[1], true);
        graph.integers("last_axis", &[-1], false);
        graph.node(
            "ReduceSum",
            &["attention_mask", "last_axis"],
            &["lengths"],
            &[("keepdims", Int(0))],
        );
        graph.node("Sub", &["lengths", "one"], &["last_positions.i64"], &[]);
        cast(graph, "last_positions.i64", Element::I32, "last_positions");
        graph.node("Shape", &["attention_mask"], &["mask_shape"], &[]);
        graph.node("Gather", &["mask_shape", "one"], &["total_length.i64"], &[("axis", Int(0))]);
        cast(graph, "total_length.i64", Element::I32, "total_length");
    }

    /// The tables of RoPE, `[positions, head_dim / 2]`.
    fn add_rope_tables(&mut self) -> Result<()> {
        let rope = &self.config.rope;
        let (head_dim, positions) = (self.config.head_dim, context_length(self.config));
        let angles = |start: usize| {
            let positions = PIECE.min(positions - start);
            RopeAngles::new(head_dim, rope.theta, &rope.factors, start, positions)
        };
        let starts = || (0..positions).step_by(PIECE);
        let dims = [positions, head_dim / 2];
        let cos = starts().map(|start| Ok(f32_bytes(&angles(start).cos)));
        self.graph.tensor("rope.cos", Element::F32, &dims, cos)?;
        let sin = starts().map(|start| Ok(f32_bytes(&angles(start).sin)));
        self.graph.tensor("rope.sin", Element::F32, &dims, sin)
    }

    /// RMS norm `norm` of `input`.
    fn add_norm(&mut self, input: &str, norm: &str) -> Result<String> {
        let weight = self.store_norm(norm)?;
        let attributes = [self.epsilon(), ("axis", Int(-1))];
        self.graph.node("RMSNormalization", &[input, &weight], &[norm], &attributes);
        Ok(norm.to_owned())
    }

    /// Adds `input` to the residual stream; gives the new stream and its RMS norm `norm`.
    fn add_to_residual(
        &mut self,
        residual: &str,
        input: &str,
        norm: &str,
    ) -> Result<(String, String)> {
        let weight = self.store_norm(norm)?;
        let sum = format!("{norm}.residual");
        let outputs = [norm, "", "", &sum];
        let attributes = [self.epsilon()];
        let inputs = [residual, input, &weight];
        let operator = "SkipSimplifiedLayerNormalization";
        self.graph.contrib_node(operator, &inputs, &outputs, &attributes);
        Ok((sum, norm.to_owned()))
    }

    fn epsilon(&self) -> (&'static str, Attribute) {
        ("epsilon", Float(self.config.norm_epsilon))
    }

    /// Attention of block `block`, its output projection included.
    fn add_attention(&mut self, block: usize, input: &str) -> Result<String> {
        let ModelConfig { head_count, kv_head_count, head_dim, hidden_size, .. } = *self.config;
        let name = |part: &str| format!("blk.{block}.{part}");
        let q = self.add_linear(&name("attn_q"), head_count * head_dim, hidden_size, input)?;
        let k = self.add_linear(&name("attn_k"), kv_head_count * head_dim, hidden_size, input)?;
        let v = self.add_linear(&name("attn_v"), kv_head_count * head_dim, hidden_size, input)?;

        let (past, present) = (Named("past_sequence"), Named("total_sequence"));
        let [past_key, past_value] =
            ["key", "value"].map(|part| format!("past_key_values.{block}.{part}"));
        let [present_key, present_value] =
            ["key", "value"].map(|part| format!("present.{block}.{part}"));
        let dims = |length| [Named("batch"), Fixed(kv_head_count), length, Fixed(head_dim)];
        for (past_name, present_name) in [(&past_key, &present_key), (&past_value, &present_value)]
        {
            self.graph.input(past_name, Element::F32, &dims(past));
            self.graph.output(present_name, Element::F32, &dims(present));
        }
        let attended = name("attended");
        let window = self.config.sliding_window.map_or(-1, |window| window as i64);
        self.graph.contrib_node(
            "GroupQueryAttention",
            &[
                &q,
                &k,
                &v,
                &past_key,
                &past_value,
                "last_positions",
                "total_length",
                "rope.cos",
                "rope.sin",
            ],
            &[&attended, &present_key, &present_value],
            &[
                ("num_heads", Int(head_count as i64)),
                ("kv_num_heads", Int(kv_head_count as i64)),
                ("do_rotary", Int(1)),
                ("local_window_size", Int(window)),
            ],
        );
        self.add_linear(&name("attn_output"), hidden_size, head_count * head_dim, &attended)
    }

    /// The feed-forward network of block `block`: `down(silu(gate) * up)`.
    fn add_ffn(&mut self, block: usize, input: &str) -> Result<String> {
        let ModelConfig { hidden_size, ffn_size, .. } = *self.config;
        let name = |part: &str| format!("blk.{block}.{part}");
        let gate = self.add_linear(&name("ffn_gate"), ffn_size, hidden_size, input)?;
        let up = self.add_linear(&name("ffn_up"), ffn_size, hidden_size, input)?;
        let (sigmoid, silu, activation) =
            (name("ffn_sigmoid"), name("ffn_silu"), name("ffn_activation"));
        self.graph.node("Sigmoid", &[&gate], &[&sigmoid], &[]);
        self.graph.node("Mul", &[&gate, &sigmoid], &[&silu], &[]);
        self.graph.node("Mul", &[&silu, &up], &[&activation], &[]);
        self.add_linear(&name("ffn_down"), hidden_size, ffn_size, &activation)
    }

    fn store_norm(&mut self, norm: &str) -> Result<String> {
        let name = format!("{norm}.weight");
        (self.on_tensor)(&name);
        let values = find_vector(self.source, &name, self.config.hidden_size)?;
        self.graph.tensor(&name, Element::F32, &[values.len()], [Ok(f32_bytes(&values))])?;
        Ok(name)
    }
}

fn cast(graph: &mut Graph, input: &str, to: Element, output: &str) {
    graph.node("Cast", &[input], &[output], &[("to", Int(to as i64))]);
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
