//! The graph of a model: what `slim_runtime::Block` computes, in ONNX Runtime's operators.
//!
//! Activations are f32, as in the models that ONNX Runtime GenAI builds for the CPU, whose kernels
//! compute in f32. Values are `[batch, sequence, channels]`; weights and values are called as in
//! GGUF.

mod linear;

use std::collections::HashSet;

use slim_formats::{
    Decoder, ModelConfig, ModelSource, Part,
    arch::{Attention, Tensor},
};
use slim_kernels::RopeAngles;
use slim_runtime::find_vector;

use super::graph::{
    ALIGNMENT,
    Attribute::{self, Float, Int},
    Dim::{Fixed, Named},
    Element, Graph,
};
use crate::{Result, tensor::tensors};

/// `GroupQueryAttention` rotates whole vectors of this many channels.
const HEAD_DIM_MULTIPLE: usize = 16;

/// Positions in the tables of cosines and sines at most.
const MAX_POSITIONS: usize = 1 << 17;

/// Rows, or positions, that are written at a time.
const PIECE: usize = 1 << 10;

/// Bits per code of a layer, at least.
const LEAST_BITS: u8 = 2;

/// Of the embedding: its codes are bytes, which can be gathered.
const EMBEDDING_BITS: u8 = 8;

/// What a model computes that ONNX Runtime's operators do not.
pub fn lacks(decoder: &Decoder) -> Option<String> {
    let mut head_dims = decoder.blocks.iter().map(|block| block.attention.head_dim);
    let found = head_dims.find(|head_dim| !head_dim.is_multiple_of(HEAD_DIM_MULTIPLE))?;
    Some(format!("heads of {found} channels, no multiple of {HEAD_DIM_MULTIPLE},"))
}

/// How many tokens the graph takes in all.
pub fn context_length(config: &ModelConfig) -> usize {
    config.context_length.min(MAX_POSITIONS)
}

/// Bytes of the data of the model's tensors, at most.
pub fn data_bytes(source: &dyn ModelSource) -> Result<u64> {
    let config = source.config();
    let mut bytes = (context_length(config) * config.head_dim * size_of::<f32>()) as u64;
    let mut parts = 2;
    for tensor in tensors(source)? {
        let is_embedding = tensor.part == Part::Embedding;
        let least_bits = if is_embedding { EMBEDDING_BITS } else { LEAST_BITS };
        bytes += linear::stored_bytes(source.require(&tensor.name)?, least_bits);
        parts += linear::MAX_PARTS;
    }
    Ok(bytes + parts * ALIGNMENT)
}

/// Adds the whole model to `graph`.
pub fn add_decoder(
    graph: &mut Graph,
    source: &dyn ModelSource,
    on_tensor: &mut dyn FnMut(&str),
) -> Result<()> {
    let (config, decoder) = (source.config(), source.decoder());
    Builder { graph, source, config, decoder, on_tensor, sums: HashSet::new() }.add()
}

struct Builder<'a> {
    graph: &'a mut Graph,
    source: &'a dyn ModelSource,
    config: &'a ModelConfig,
    decoder: &'a Decoder,
    on_tensor: &'a mut dyn FnMut(&str),
    /// Names of the sums over blocks that the graph has already.
    sums: HashSet<String>,
}

impl Builder<'_> {
    fn add(mut self) -> Result<()> {
        let decoder = self.decoder;
        self.add_shared_values();
        let embedding = self.store(decoder.embedding(), EMBEDDING_BITS)?;
        self.embed(&embedding, "embedding");
        let mut residual = "embedding".to_owned();
        let mut normed = self.add_norm(&residual, decoder.tensor(0, Part::AttnNorm))?;
        for block in 0..decoder.blocks.len() {
            let attended = self.add_attention(block, &normed)?;
            let ffn_norm = decoder.tensor(block, Part::FfnNorm);
            (residual, normed) = self.add_to_residual(&residual, &attended, ffn_norm)?;
            let output = self.add_ffn(block, &normed)?;
            let next_norm = match block + 1 {
                next if next == decoder.blocks.len() => decoder.output_norm(),
                next => decoder.tensor(next, Part::AttnNorm),
            };
            (residual, normed) = self.add_to_residual(&residual, &output, next_norm)?;
        }
        let head = match decoder.has_tied_embeddings() {
            true => embedding,
            false => self.store(decoder.output(), LEAST_BITS)?,
        };
        self.multiply(&head, &normed, "logits");
        let dims = [Named("batch"), Named("sequence"), Fixed(decoder.vocab_size)];
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
    fn add_norm(&mut self, input: &str, norm: &Tensor) -> Result<String> {
        let weight = self.store_norm(norm)?;
        let norm = value_of(norm);
        let attributes = [self.epsilon(), ("axis", Int(-1))];
        self.graph.node("RMSNormalization", &[input, &weight], &[norm], &attributes);
        Ok(norm.to_owned())
    }

    /// Adds `input` to the residual stream; gives the new stream and its RMS norm `norm`.
    fn add_to_residual(
        &mut self,
        residual: &str,
        input: &str,
        norm: &Tensor,
    ) -> Result<(String, String)> {
        let weight = self.store_norm(norm)?;
        let norm = value_of(norm);
        let sum = format!("{norm}.residual");
        let outputs = [norm, "", "", &sum];
        let attributes = [self.epsilon()];
        let inputs = [residual, input, &weight];
        let operator = "SkipSimplifiedLayerNormalization";
        self.graph.contrib_node(operator, &inputs, &outputs, &attributes);
        Ok((sum, norm.to_owned()))
    }

    fn epsilon(&self) -> (&'static str, Attribute) {
        ("epsilon", Float(self.decoder.norm_epsilon))
    }

    /// Attention of block `block`, its output projection included.
    fn add_attention(&mut self, block: usize, input: &str) -> Result<String> {
        let Attention { heads, kv_heads, head_dim, window, .. } =
            self.decoder.blocks[block].attention;
        let q = self.add_linear(block, Part::AttnQ, input)?;
        let k = self.add_linear(block, Part::AttnK, input)?;
        let v = self.add_linear(block, Part::AttnV, input)?;

        let (past, present) = (Named("past_sequence"), Named("total_sequence"));
        let [past_key, past_value] =
            ["key", "value"].map(|part| format!("past_key_values.{block}.{part}"));
        let [present_key, present_value] =
            ["key", "value"].map(|part| format!("present.{block}.{part}"));
        let dims = |length| [Named("batch"), Fixed(kv_heads), length, Fixed(head_dim)];
        for (past_name, present_name) in [(&past_key, &present_key), (&past_value, &present_value)]
        {
            self.graph.input(past_name, Element::F32, &dims(past));
            self.graph.output(present_name, Element::F32, &dims(present));
        }
        let attended = format!("blk.{block}.attended");
        let window = window.map_or(-1, |window| window as i64);
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
                ("num_heads", Int(heads as i64)),
                ("kv_num_heads", Int(kv_heads as i64)),
                ("do_rotary", Int(1)),
                ("local_window_size", Int(window)),
            ],
        );
        self.add_linear(block, Part::AttnOutput, &attended)
    }

    /// The feed-forward network of block `block`: `down(silu(gate) * up)`.
    fn add_ffn(&mut self, block: usize, input: &str) -> Result<String> {
        let name = |part: &str| format!("blk.{block}.{part}");
        let gate = self.add_linear(block, Part::FfnGate, input)?;
        let up = self.add_linear(block, Part::FfnUp, input)?;
        let (sigmoid, silu, activation) =
            (name("ffn_sigmoid"), name("ffn_silu"), name("ffn_activation"));
        self.graph.node("Sigmoid", &[&gate], &[&sigmoid], &[]);
        self.graph.node("Mul", &[&gate, &sigmoid], &[&silu], &[]);
        self.graph.node("Mul", &[&silu, &up], &[&activation], &[]);
        self.add_linear(block, Part::FfnDown, &activation)
    }

    fn store_norm(&mut self, norm: &Tensor) -> Result<String> {
        let name = norm.name.clone();
        (self.on_tensor)(&name);
        let values = find_vector(self.source, norm)?;
        self.graph.tensor(&name, Element::F32, &[values.len()], [Ok(f32_bytes(&values))])?;
        Ok(name)
    }
}

/// What a value is called that is made with a tensor: `blk.0.attn_q`.
fn value_of(tensor: &Tensor) -> &str {
    tensor.name.trim_end_matches(".weight")
}

fn cast(graph: &mut Graph, input: &str, to: Element, output: &str) {
    graph.node("Cast", &[input], &[output], &[("to", Int(to as i64))]);
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
