//! Calibration: all samples on their way through the blocks, stage by stage.

use slim_formats::{ModelSource, Weight, slim::PackedLayer};
use slim_runtime::{Block, Context, KvBlock, embed, rope_angles};

use crate::{
    Activations, Calibration, Engine, Resources, Result, Settings, convert::find,
    layer::LayerInputs,
};

/// What is done with the linear layers on the way.
pub trait Visitor {
    /// The Hessian of the layers that take `activations` in, of which `name` is the first.
    fn inputs<'a>(
        &mut self,
        name: &str,
        activations: &'a Activations,
        engine: &Engine,
    ) -> Result<LayerInputs<'a>>;

    /// A layer; what runs in its place from here on.
    fn layer(&mut self, name: &str, source: Weight<'_>, inputs: &LayerInputs<'_>) -> Result<Layer>;
}

/// What became of a layer.
pub enum Layer {
    Quantized(Box<PackedLayer>),
    /// The source's weight stays.
    Kept,
}

impl Layer {
    /// The weight that runs from here on.
    pub fn weight<'a>(&'a self, source: Weight<'a>) -> Weight<'a> {
        match self {
            Self::Quantized(packed) => Weight::Packed(packed.view()),
            Self::Kept => source,
        }
    }
}

/// The activations of all samples on their way through the blocks.
pub struct Calibrator<'a> {
    engine: &'a Engine,
    context: Context<'a>,
    tokens_per_sample: usize,
    /// The residual stream, `[samples, tokens, hidden]`.
    residual: Activations,
    /// The normed residual, `[samples, tokens, hidden]`.
    normed: Activations,
    /// The inputs of `attn_output`, `[samples, tokens, heads * head_dim]`.
    attended: Activations,
    /// The inputs of `ffn_down`, `[samples, tokens, ffn]`.
    ffn: Activations,
    /// The residual before the block, for `--reference`: the published code takes the inputs of a block's layers from the
    /// float block, and runs the quantized one afterwards.
    before: Option<Activations>,
}

impl<'a> Calibrator<'a> {
    /// The embeddings of the samples.
    pub fn new(
        source: &'a dyn ModelSource,
        calibration: &Calibration,
        settings: &Settings,
        resources: &'a Resources,
    ) -> Result<Self> {
        let config = source.config();
        let samples = calibration.samples.len();
        let tokens_per_sample = calibration.samples.first().map_or(0, Vec::len);
        let mut memory_left = resources.activation_bytes;
        let mut activations =
            |width| Activations::new(samples, tokens_per_sample, width, &mut memory_left);
        let mut residual = activations(config.hidden_size)?;
        let normed = activations(config.hidden_size)?;
        let attended = activations(config.head_count * config.head_dim)?;
        let ffn = activations(config.ffn_size)?;
        let before = match settings.reference {
            true => Some(activations(config.hidden_size)?),
            false => None,
        };
        let embedding = find(source, "token_embd.weight")?;
        for (index, tokens) in calibration.samples.iter().enumerate() {
            residual.sample_mut(index).copy_from_slice(&embed(embedding, tokens)?);
        }
        let engine = &resources.engine;
        let context = Context { config, backend: engine.backend() };
        Ok(Self { engine, context, tokens_per_sample, residual, normed, attended, ffn, before })
    }

    /// Leads `visitor` to the layers of a block in the order in which data flows through them, and the samples through what
    /// it makes of them.
    pub fn pass_block(
        &mut self,
        index: usize,
        block: &Block<'_>,
        visitor: &mut dyn Visitor,
    ) -> Result<()> {
        let Self { engine, context, tokens_per_sample, residual, normed, attended, ffn, before } =
            self;
        let context = *context;
        let name = |layer: &str| format!("blk.{index}.{layer}.weight");
        if let Some(before) = before {
            before.fill(|i| Ok(residual.sample(i).to_vec()))?;
        }
        let is_sequential = before.is_none();

        normed.fill(|i| Ok(block.attention_input(context, residual.sample(i))))?;
        let (q, k, v) = {
            let inputs = visitor.inputs(&name("attn_q"), normed, engine)?;
            (
                visitor.layer(&name("attn_q"), block.attn_q, &inputs)?,
                visitor.layer(&name("attn_k"), block.attn_k, &inputs)?,
                visitor.layer(&name("attn_v"), block.attn_v, &inputs)?,
            )
        };
        let quantized = Block {
            attn_q: q.weight(block.attn_q),
            attn_k: k.weight(block.attn_k),
            attn_v: v.weight(block.attn_v),
            ..block.clone()
        };
        let running = if is_sequential { &quantized } else { block };

        let angles = rope_angles(context.config, 0, *tokens_per_sample);
        let mut kv = KvBlock::new(context.config, *tokens_per_sample);
        let held = engine.hold(&[running.attn_q, running.attn_k, running.attn_v])?;
        attended.fill(|i| Ok(running.attend(context, normed.sample(i), &mut kv, 0, &angles)?))?;
        drop(held);
        let attn_output = {
            let inputs = visitor.inputs(&name("attn_output"), attended, engine)?;
            visitor.layer(&name("attn_output"), block.attn_output, &inputs)?
        };
        let quantized = Block { attn_output: attn_output.weight(block.attn_output), ..quantized };
        let running = if is_sequential { &quantized } else { block };

        let held = engine.hold(&[running.attn_output])?;
        for i in 0..residual.samples() {
            running.add_attention(context, attended.sample(i), residual.sample_mut(i))?;
        }
        drop(held);
        normed.fill(|i| Ok(running.ffn_input(context, residual.sample(i))))?;
        let (gate, up) = {
            let inputs = visitor.inputs(&name("ffn_gate"), normed, engine)?;
            (
                visitor.layer(&name("ffn_gate"), block.ffn_gate, &inputs)?,
                visitor.layer(&name("ffn_up"), block.ffn_up, &inputs)?,
            )
        };
        let quantized = Block {
            ffn_gate: gate.weight(block.ffn_gate),
            ffn_up: up.weight(block.ffn_up),
            ..quantized
        };
        let running = if is_sequential { &quantized } else { block };

        let held = engine.hold(&[running.ffn_gate, running.ffn_up])?;
        ffn.fill(|i| Ok(running.ffn_activation(context, normed.sample(i))?))?;
        drop(held);
        let down = {
            let inputs = visitor.inputs(&name("ffn_down"), ffn, engine)?;
            visitor.layer(&name("ffn_down"), block.ffn_down, &inputs)?
        };
        let quantized = Block { ffn_down: down.weight(block.ffn_down), ..quantized };
        let _held = match is_sequential {
            true => engine.hold(&[quantized.ffn_down])?,
            false => engine.hold(&quantized.weights())?,
        };
        for i in 0..residual.samples() {
            match before {
                None => quantized.add_ffn(context, ffn.sample(i), residual.sample_mut(i))?,
                Some(before) => {
                    residual.sample_mut(i).copy_from_slice(before.sample(i));
                    quantized.forward(context, residual.sample_mut(i), &mut kv, 0, &angles)?;
                }
            }
        }
        Ok(())
    }
}
