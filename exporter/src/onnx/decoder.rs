//! The graph of a model: what `slim_runtime::Block` computes, in ONNX Runtime's operators.
//!
//! Activations are f32, as in the models that ONNX Runtime GenAI builds for the CPU, whose kernels
//! compute in f32. Values are `[batch, sequence, channels]`; weights and values are called as in
//! GGUF.

mod attention;
mod linear;

use std::collections::HashSet;

use slim_formats::{
    Decoder, ModelConfig, ModelSource, Part, Scaling,
    arch::{Activation, BlockSpec, FIRST_POSITION, Norm, Stage, Tensor},
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

/// `GroupQueryAttention` takes heads of multiples of so many channels.
const HEAD_DIM_MULTIPLE: usize = 8;

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
    if let Some(what) = decoder.beyond_llama() {
        return Some(format!("a model with {what}"));
    }
    let attentions = decoder.blocks.iter().filter_map(|block| block.attention());
    let mut head_dims = attentions.map(|attention| attention.head_dim);
    let found = head_dims.find(|head_dim| !head_dim.is_multiple_of(HEAD_DIM_MULTIPLE))?;
    Some(format!("heads of {found} channels, no multiple of {HEAD_DIM_MULTIPLE},"))
}

/// What a graph with one table of cosines and sines computes otherwise.
pub fn warning(config: &ModelConfig) -> Option<String> {
    let Scaling::Long(long) = &config.rope.scaling else { return None };
    let is_long = context_length(config) > long.context;
    is_long.then(|| {
        format!(
            "the graph turns every text as one of more than {} tokens: shorter ones will differ",
            long.context
        )
    })
}

/// How many tokens the graph takes in all.
pub fn context_length(config: &ModelConfig) -> usize {
    config.context_length.min(MAX_POSITIONS)
}

/// Bytes of the data of the model's tensors, at most.
pub fn data_bytes(source: &dyn ModelSource) -> Result<u64> {
    let (config, ropes) = (source.config(), &source.decoder().ropes);
    let angles = 2 * ropes.iter().map(|rope| rope.factors.len()).sum::<usize>();
    let mut bytes = (context_length(config) * angles * size_of::<f32>()) as u64;
    let mut parts = 2 * ropes.len() as u64;
    for tensor in tensors(source)? {
        let is_embedding = [Part::Embedding, Part::Positions].contains(&tensor.part);
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
    Builder { graph, source, config, decoder, on_tensor, made: HashSet::new() }.add()
}

struct Builder<'a> {
    graph: &'a mut Graph,
    source: &'a dyn ModelSource,
    config: &'a ModelConfig,
    decoder: &'a Decoder,
    on_tensor: &'a mut dyn FnMut(&str),
    /// Names of values that several nodes need, and that the graph has already.
    made: HashSet<String>,
}

impl<'a> Builder<'a> {
    fn add(mut self) -> Result<()> {
        let decoder = self.decoder;
        self.add_shared_values();
        let embedding = self.store(decoder.embedding(), EMBEDDING_BITS)?;
        self.look_up(&embedding, "input_ids", "embedding");
        let mut residual = self.scaled("embedding", decoder.embedding_scale);
        residual = self.add_projection(Part::EmbeddingUp, residual)?;
        residual = self.add_learned_positions(residual)?;
        let mut input = match self.norm_before(0, Stage::Mixer) {
            Some(norm) => self.add_norm(&residual, norm)?,
            None => residual.clone(),
        };
        for block in 0..decoder.blocks.len() {
            let mut output = self.add_attention(block, &input)?;
            let mut next = self.norm_before(block, Stage::Ffn);
            output = self.finish(block, Stage::MixerOutput, output)?;
            let norm = self.sum_norm(block, Stage::MixerOutput);
            (residual, input) = self.add_to_residual(&residual, &output, norm, next)?;
            output = self.add_ffn(block, &input)?;
            next = match block + 1 {
                next if next == decoder.blocks.len() => decoder.output_norm(),
                next => self.norm_before(next, Stage::Mixer),
            };
            output = self.finish(block, Stage::FfnOutput, output)?;
            let norm = self.sum_norm(block, Stage::FfnOutput);
            (residual, input) = self.add_to_residual(&residual, &output, norm, next)?;
        }
        input = self.add_projection(Part::EmbeddingDown, input)?;
        let head = match decoder.has_tied_embeddings() {
            true => embedding,
            false => self.store(decoder.output(), LEAST_BITS)?,
        };
        self.add_logits(&head, &input);
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

    /// The positions of the tokens, `[batch, sequence]`, counted as `GroupQueryAttention` does:
    /// padding stands behind a first text, and is not counted among the tokens before a later one.
    fn positions(&mut self) -> &'static str {
        if self.made.insert("positions".into()) {
            let graph = &mut *self.graph;
            graph.integers("zero", &[0], true);
            graph.node("Shape", &["input_ids"], &["input_shape"], &[]);
            graph.node("Gather", &["input_shape", "one"], &["sequence_length"], &[]);
            graph.node("Range", &["zero", "sequence_length", "one"], &["steps"], &[]);
            graph.node("Sub", &["lengths", "sequence_length"], &["before.signed"], &[]);
            graph.node("Max", &["before.signed", "zero"], &["before.flat"], &[]);
            graph.node("Unsqueeze", &["before.flat", "last_axis"], &["before"], &[]);
            graph.node("Add", &["before", "steps"], &["positions"], &[]);
        }
        "positions"
    }

    /// The tables of the rotary embeddings that blocks use, `[positions, pairs]`, for texts of up
    /// to as many tokens as the graph takes.
    fn add_rope_tables(&mut self) -> Result<()> {
        let decoder = self.decoder;
        let positions = context_length(self.config);
        for (index, rope) in decoder.ropes.iter().enumerate() {
            let turns = |block: &BlockSpec| block.attention().and_then(|found| found.rope);
            if !decoder.blocks.iter().any(|block| turns(block) == Some(index)) {
                continue;
            }
            let factors = rope.factors_for(positions);
            let angles = |start: usize| {
                let positions = PIECE.min(positions - start);
                RopeAngles::new(self.config.head_dim, rope.theta, &factors, start, positions)
                    .scaled(rope.amplitude)
            };
            let starts = || (0..positions).step_by(PIECE);
            let dims = [positions, factors.len()];
            let [cos_name, sin_name] = rope_tables(index);
            let cos = starts().map(|start| Ok(f32_bytes(&angles(start).cos)));
            self.graph.tensor(&cos_name, Element::F32, &dims, cos)?;
            let sin = starts().map(|start| Ok(f32_bytes(&angles(start).sin)));
            self.graph.tensor(&sin_name, Element::F32, &dims, sin)?;
        }
        Ok(())
    }

    /// What a matrix outside of blocks makes of `input`; `input` where the model has none.
    fn add_projection(&mut self, part: Part, input: String) -> Result<String> {
        let Some(tensor) = self.decoder.outside(part) else { return Ok(input) };
        let matrix = self.store(tensor, LEAST_BITS)?;
        self.multiply(&matrix, &input, value_of(tensor));
        Ok(value_of(tensor).to_owned())
    }

    /// The residual stream with what the model has learned of positions.
    fn add_learned_positions(&mut self, residual: String) -> Result<String> {
        let Some(tensor) = self.decoder.outside(Part::Positions) else { return Ok(residual) };
        let table = self.store(tensor, EMBEDDING_BITS)?;
        let positions = self.positions();
        self.graph.integers("first_position", &[FIRST_POSITION as i64], true);
        self.graph.node("Add", &[positions, "first_position"], &["position_ids"], &[]);
        self.look_up(&table, "position_ids", value_of(tensor));
        self.graph.node("Add", &[&residual, value_of(tensor)], &["embedding.placed"], &[]);
        Ok("embedding.placed".into())
    }

    /// The norm of the input of a stage, if one stands there.
    fn norm_before(&self, block: usize, stage: Stage) -> Option<&'a Tensor> {
        let norm = stage.norm().filter(|&norm| self.decoder.blocks[block].has(norm))?;
        Some(self.decoder.tensor(block, norm))
    }

    /// The norm of the residual stream to which a stage has added, if one stands there.
    fn sum_norm(&self, block: usize, stage: Stage) -> Option<&'a Tensor> {
        let norm = self.decoder.blocks[block].sum_norm(stage)?;
        Some(self.decoder.tensor(block, norm))
    }

    /// How norms of the residual stream are computed where `norm` stands.
    fn norm_of(&self, norm: &Tensor) -> Norm {
        match norm.block {
            Some(block) => self.decoder.blocks[block].norm,
            None => self.decoder.norm.expect("it stands behind the last block"),
        }
    }

    /// Norm `norm` of `input`.
    fn add_norm(&mut self, input: &str, norm: &Tensor) -> Result<String> {
        let output = value_of(norm);
        self.add_norm_as(self.norm_of(norm), input, norm, output)?;
        Ok(output.to_owned())
    }

    fn add_norm_as(&mut self, kind: Norm, input: &str, norm: &Tensor, output: &str) -> Result<()> {
        let weights = self.store_norm(norm)?;
        let operator = match kind {
            Norm::Rms => "RMSNormalization",
            Norm::Layer => "LayerNormalization",
        };
        let inputs: Vec<&str> = [input].into_iter().chain(weights.iter().map(|w| &**w)).collect();
        self.graph.node(operator, &inputs, &[output], &[self.epsilon(), ("axis", Int(-1))]);
        Ok(())
    }

    /// Adds `input` to the residual stream, on which `norm` may stand; gives the new stream and its
    /// norm `next`, or the stream twice if there is none.
    fn add_to_residual(
        &mut self,
        residual: &str,
        input: &str,
        norm: Option<&Tensor>,
        next: Option<&Tensor>,
    ) -> Result<(String, String)> {
        let Some(norm) = norm else { return self.add_and_norm(residual, input, next) };
        let (_, residual) = self.add_and_norm(residual, input, Some(norm))?;
        match next {
            Some(next) => Ok((residual.clone(), self.add_norm(&residual, next)?)),
            None => Ok((residual.clone(), residual)),
        }
    }

    /// The sum of two values and its norm `norm`, or the sum twice if there is none.
    fn add_and_norm(
        &mut self,
        residual: &str,
        input: &str,
        norm: Option<&Tensor>,
    ) -> Result<(String, String)> {
        let Some(norm) = norm else {
            let sum = format!("{input}.residual");
            self.graph.node("Add", &[residual, input], &[&sum], &[]);
            return Ok((sum.clone(), sum));
        };
        let weights = self.store_norm(norm)?;
        let operator = match self.norm_of(norm) {
            Norm::Rms => "SkipSimplifiedLayerNormalization",
            Norm::Layer => "SkipLayerNormalization",
        };
        let norm = value_of(norm);
        let sum = format!("{norm}.residual");
        let outputs = [norm, "", "", &sum];
        let attributes = [self.epsilon()];
        let inputs: Vec<&str> =
            [residual, input].into_iter().chain(weights.iter().map(|w| &**w)).collect();
        self.graph.contrib_node(operator, &inputs, &outputs, &attributes);
        Ok((sum, norm.to_owned()))
    }

    fn epsilon(&self) -> (&'static str, Attribute) {
        ("epsilon", Float(self.decoder.norm_epsilon))
    }

    /// What attention or network adds to the residual stream, made of what its last layer gives.
    fn finish(&mut self, block: usize, stage: Stage, mut output: String) -> Result<String> {
        let spec = &self.decoder.blocks[block];
        if let Some(norm) = spec.branch_norm(stage) {
            output = self.add_norm(&output, self.decoder.tensor(block, norm))?;
        }
        Ok(self.scaled(&output, spec.residual_scale))
    }

    /// The feed-forward network of block `block`.
    fn add_ffn(&mut self, block: usize, input: &str) -> Result<String> {
        let ffn = self.decoder.blocks[block].ffn.expect("`lacks` refuses other blocks");
        let first = if ffn.is_gated { Part::FfnGate } else { Part::FfnUp };
        let neurons = self.add_linear(block, first, input)?;
        let up = match ffn.is_gated {
            true => Some(self.add_linear(block, Part::FfnUp, input)?),
            false => None,
        };
        let mut activated = self.activate(block, ffn.activation, &neurons);
        if let Some(up) = up {
            let activation = format!("blk.{block}.ffn_activation");
            self.graph.node("Mul", &[&activated, &up], &[&activation], &[]);
            activated = activation;
        }
        self.add_linear(block, Part::FfnDown, &activated)
    }

    fn activate(&mut self, block: usize, activation: Activation, input: &str) -> String {
        let name = |part: &str| format!("blk.{block}.{part}");
        match activation {
            Activation::Silu => {
                let (sigmoid, silu) = (name("ffn_sigmoid"), name("ffn_silu"));
                self.graph.node("Sigmoid", &[input], &[&sigmoid], &[]);
                self.graph.node("Mul", &[input, &sigmoid], &[&silu], &[]);
                silu
            }
            Activation::GeluTanh => {
                let gelu = name("ffn_gelu");
                self.graph.contrib_node("FastGelu", &[input], &[&gelu], &[]);
                gelu
            }
            Activation::Relu => {
                let relu = name("ffn_relu");
                self.graph.node("Relu", &[input], &[&relu], &[]);
                relu
            }
            Activation::ClampedSwish { .. } => panic!("only experts have {activation:?}"),
        }
    }

    /// The product with the output layer, scaled and capped.
    fn add_logits(&mut self, head: &linear::Stored, input: &str) {
        let Decoder { logit_scale, logit_softcap, .. } = *self.decoder;
        match logit_softcap {
            None if logit_scale == 1.0 => self.multiply(head, input, "logits"),
            None => {
                self.multiply(head, input, "logits.plain");
                self.scale("logits.plain", logit_scale, "logits");
            }
            Some(cap) => {
                self.multiply(head, input, "logits.plain");
                self.scale("logits.plain", logit_scale / cap, "logits.shares");
                self.graph.node("Tanh", &["logits.shares"], &["logits.capped"], &[]);
                self.scale("logits.capped", cap, "logits");
            }
        }
    }

    /// `input` times a number; itself if that is 1.
    fn scaled(&mut self, input: &str, factor: f32) -> String {
        if factor == 1.0 {
            return input.to_owned();
        }
        let output = format!("{input}.weighed");
        self.scale(input, factor, &output);
        output
    }

    fn scale(&mut self, input: &str, factor: f32, output: &str) {
        let name = format!("{output}.factor");
        self.graph.float(&name, factor);
        self.graph.node("Mul", &[input, &name], &[output], &[]);
    }

    /// The names of a norm's weight and, if it has one, its bias.
    fn store_norm(&mut self, norm: &Tensor) -> Result<Vec<String>> {
        let mut names = vec![self.store_vector(norm)?];
        if let Some(bias) = self.bias_of(norm) {
            names.push(self.store_vector(bias)?);
        }
        Ok(names)
    }

    fn store_vector(&mut self, tensor: &Tensor) -> Result<String> {
        let name = tensor.name.clone();
        (self.on_tensor)(&name);
        let values = find_vector(self.source, tensor)?;
        self.graph.tensor(&name, Element::F32, &[values.len()], [Ok(f32_bytes(&values))])?;
        Ok(name)
    }

    /// The bias of a linear layer or a norm, if it has one.
    fn bias_of(&self, tensor: &Tensor) -> Option<&'a Tensor> {
        let bias = tensor.part.bias()?;
        match tensor.block {
            None => self.decoder.outside(bias),
            Some(block) => self.decoder.tensors_of(block).iter().find(|tensor| tensor.part == bias),
        }
    }
}

/// The tables of a rotary embedding.
fn rope_tables(index: usize) -> [String; 2] {
    let name = if index == 0 { "rope".to_owned() } else { format!("rope.{index}") };
    ["cos", "sin"].map(|part| format!("{name}.{part}"))
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
