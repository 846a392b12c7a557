//! Calibration: all samples on their way through the blocks, stage by stage.

use slim_formats::{
    EMBEDDING, ModelConfig, ModelSource, Weight,
    slim::{Bands, PackedLayer},
};
use slim_kernels::RopeAngles;
use slim_runtime::{Block, Context, KvBlock, embed, rope_angles};

use crate::{
    Activations, Engine, Method, Result, Settings, layer::LayerInputs, rows::output_hessian_sizes,
};

/// What is done with the linear layers on the way.
pub trait Visitor {
    /// The Hessian of the layers that take `stage` in, of which `name` is the first.
    fn inputs<'a>(
        &mut self,
        name: &str,
        stage: Stage<'a>,
        engine: &Engine,
    ) -> Result<LayerInputs<'a>>;

    /// A layer; what runs in its place from here on.
    fn layer(&mut self, name: &str, source: Weight<'_>, inputs: &LayerInputs<'_>) -> Result<Layer>;
}

/// The inputs of one or more linear layers.
#[derive(Clone, Copy)]
pub struct Stage<'a> {
    /// `[samples, tokens, cols]`, from the layers as they are by now.
    pub activations: &'a Activations,
    /// What the layers should make of them, if it is not their own product with them.
    pub float: Option<FloatStage<'a>>,
}

/// The same stage of the float model.
#[derive(Clone, Copy)]
pub struct FloatStage<'a> {
    /// `[samples, tokens, cols]`.
    pub activations: &'a Activations,
    /// What the residual stream lacks to that of the float model before a layer adds to it,
    /// `[samples, tokens, rows]`; `None` for layers that do not add to it.
    pub missing: Option<&'a Activations>,
}

/// What became of a layer.
pub enum Layer {
    /// Its bands, or itself.
    Quantized(Vec<PackedLayer>),
    /// The source's weight stays.
    Kept,
}

impl Layer {
    /// The weight that runs from here on.
    pub fn weight<'a>(&'a self, source: Weight<'a>) -> Weight<'a> {
        match self {
            Self::Quantized(bands) => Weight::Bands(Bands::new(bands)),
            Self::Kept => source,
        }
    }
}

/// The activations of all samples on their way through the blocks.
pub struct Calibrator<'a> {
    engine: &'a Engine,
    context: Context<'a>,
    angles: RopeAngles,
    /// Through the layers as the visitor leaves them.
    stream: Stream,
    /// Through the float model, where the visitor wants to know its outputs.
    float: Option<FloatStream>,
    /// The residual before the block, for `--reference`: the published code takes the inputs of a
    /// block's layers from the float block, and runs the quantized one afterwards.
    before: Option<Activations>,
}

/// Bytes of the activations of [`Calibrator::new`] that will go to temporary files: what
/// `memory_left` does not hold once it holds the output Hessians.
pub fn scratch_bytes(config: &ModelConfig, settings: &Settings, mut memory_left: u64) -> usize {
    if settings.method == Method::RoundToNearest {
        return 0;
    }
    let mut in_scratch = |bytes: u64| match memory_left.checked_sub(bytes) {
        Some(left) => {
            memory_left = left;
            0
        }
        None => bytes,
    };
    if settings.has_budget() {
        output_hessian_sizes(config).for_each(|bytes| {
            in_scratch(bytes);
        });
    }
    let hidden = config.hidden_size;
    let stream = [hidden, hidden, config.head_count * config.head_dim, config.ffn_size];
    let mut widths = stream.to_vec();
    if settings.follows_float() {
        widths.extend(stream.iter().chain([&hidden]));
    }
    if settings.reference {
        widths.push(hidden);
    }
    let bytes = |width: usize| (settings.samples * settings.context * width) as u64 * 4;
    widths.into_iter().map(|width| in_scratch(bytes(width)) as usize).sum()
}

struct FloatStream {
    stream: Stream,
    /// The residual of the float model without ours.
    missing: Activations,
}

impl<'a> Calibrator<'a> {
    /// The embeddings of samples, which are equally long, in memory as for [`Activations::new`]: by
    /// `embedding`, and where the settings ask for it, also by that of the float model, which runs
    /// along then, so that stages tell its activations, too.
    pub fn new(
        source: &'a dyn ModelSource,
        embedding: Weight<'_>,
        samples: &[Vec<u32>],
        settings: &Settings,
        engine: &'a Engine,
        memory_left: &mut u64,
    ) -> Result<Self> {
        let config = source.config();
        let count = samples.len();
        let tokens = samples.first().map_or(0, Vec::len);
        let mut activations = |width| Activations::new(count, tokens, width, memory_left);
        let mut stream = || -> Result<Stream> {
            Ok(Stream {
                residual: activations(config.hidden_size)?,
                normed: activations(config.hidden_size)?,
                attended: activations(config.head_count * config.head_dim)?,
                ffn: activations(config.ffn_size)?,
            })
        };
        let mut ours = stream()?;
        let mut float = match settings.follows_float() {
            true => Some(stream()?),
            false => None,
        };
        let of_source = source.require(EMBEDDING)?;
        for (index, tokens) in samples.iter().enumerate() {
            ours.residual.sample_mut(index).copy_from_slice(&embed(embedding, tokens)?);
            if let Some(float) = &mut float {
                float.residual.sample_mut(index).copy_from_slice(&embed(of_source, tokens)?);
            }
        }
        let float = match float {
            Some(stream) => Some(FloatStream { stream, missing: activations(config.hidden_size)? }),
            None => None,
        };
        let before = match settings.reference {
            true => Some(activations(config.hidden_size)?),
            false => None,
        };
        let context = Context { config, backend: engine.backend(settings.precision()) };
        let angles = rope_angles(config, 0, tokens);
        Ok(Self { engine, context, angles, stream: ours, float, before })
    }

    /// Leads `visitor` to the layers of a block in the order in which data flows through them, and
    /// the samples through what it makes of them.
    pub fn pass_block(
        &mut self,
        index: usize,
        block: &Block<'_>,
        visitor: &mut dyn Visitor,
    ) -> Result<()> {
        let Self { engine, context, angles, stream, float, before } = self;
        let walk = Walk { engine, context: *context, angles };
        let name = |layer: &str| format!("blk.{index}.{layer}.weight");
        if let Some(before) = before {
            before.fill(engine, |batch| Ok(stream.residual.batch(batch).to_vec()))?;
        }
        let is_sequential = before.is_none();

        stream.attention_input(walk, block)?;
        if let Some(float) = float {
            float.stream.attention_input(walk, block)?;
        }
        let (q, k, v) = {
            let float = float.as_ref().map(|float| &float.stream.normed);
            let stage = Stage::new(&stream.normed, float, None);
            let inputs = visitor.inputs(&name("attn_q"), stage, engine)?;
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

        stream.attend(walk, running)?;
        if let Some(float) = float {
            float.stream.attend(walk, block)?;
            float.compare(engine, stream)?;
        }
        let attn_output = {
            let missing = float.as_ref().map(|float| &float.missing);
            let float = float.as_ref().map(|float| &float.stream.attended);
            let stage = Stage::new(&stream.attended, float, missing);
            let inputs = visitor.inputs(&name("attn_output"), stage, engine)?;
            visitor.layer(&name("attn_output"), block.attn_output, &inputs)?
        };
        let quantized = Block { attn_output: attn_output.weight(block.attn_output), ..quantized };
        let running = if is_sequential { &quantized } else { block };

        stream.add_attention(walk, running)?;
        if let Some(float) = float {
            float.stream.add_attention(walk, block)?;
        }
        let (gate, up) = {
            let float = float.as_ref().map(|float| &float.stream.normed);
            let stage = Stage::new(&stream.normed, float, None);
            let inputs = visitor.inputs(&name("ffn_gate"), stage, engine)?;
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

        stream.ffn_activation(walk, running)?;
        if let Some(float) = float {
            float.stream.ffn_activation(walk, block)?;
            float.compare(engine, stream)?;
        }
        let down = {
            let missing = float.as_ref().map(|float| &float.missing);
            let float = float.as_ref().map(|float| &float.stream.ffn);
            let stage = Stage::new(&stream.ffn, float, missing);
            let inputs = visitor.inputs(&name("ffn_down"), stage, engine)?;
            visitor.layer(&name("ffn_down"), block.ffn_down, &inputs)?
        };
        let quantized = Block { ffn_down: down.weight(block.ffn_down), ..quantized };
        if let Some(float) = float {
            float.stream.add_ffn(walk, block)?;
        }
        match before {
            None => stream.add_ffn(walk, &quantized),
            Some(before) => stream.repeat_block(walk, &quantized, before),
        }
    }
}

impl FloatStream {
    fn compare(&mut self, engine: &Engine, ours: &Stream) -> Result<()> {
        let Self { stream, missing } = self;
        missing.fill(engine, |batch| {
            let pairs = stream.residual.batch(batch.clone()).iter().zip(ours.residual.batch(batch));
            Ok(pairs.map(|(float, ours)| float - ours).collect())
        })
    }
}

impl<'a> Stage<'a> {
    /// `missing` counts only with `float`.
    pub fn new(
        activations: &'a Activations,
        float: Option<&'a Activations>,
        missing: Option<&'a Activations>,
    ) -> Self {
        let float = float.map(|activations| FloatStage { activations, missing });
        Self { activations, float }
    }
}

/// What all samples go through the stages with.
#[derive(Clone, Copy)]
struct Walk<'w> {
    engine: &'w Engine,
    context: Context<'w>,
    angles: &'w RopeAngles,
}

impl Walk<'_> {
    fn new_kv(&self) -> KvBlock {
        KvBlock::new(self.context.config, 2 * self.angles.cos.len() / self.angles.head_dim)
    }
}

/// The activations of all samples in a block.
struct Stream {
    /// The residual stream, `[samples, tokens, hidden]`.
    residual: Activations,
    /// The normed residual, `[samples, tokens, hidden]`.
    normed: Activations,
    /// The inputs of `attn_output`, `[samples, tokens, heads * head_dim]`.
    attended: Activations,
    /// The inputs of `ffn_down`, `[samples, tokens, ffn]`.
    ffn: Activations,
}

/// The stages of [`Block::forward`], each for all samples.
impl Stream {
    fn attention_input(&mut self, walk: Walk<'_>, block: &Block<'_>) -> Result<()> {
        let Self { residual, normed, .. } = self;
        normed.fill(walk.engine, |batch| {
            Ok(block.attention_input(walk.context, residual.batch(batch)))
        })
    }

    fn attend(&mut self, walk: Walk<'_>, block: &Block<'_>) -> Result<()> {
        let Self { normed, attended, .. } = self;
        let _held = walk.engine.hold(&[block.attn_q, block.attn_k, block.attn_v])?;
        attended.fill(walk.engine, |batch| {
            let kv = &mut walk.new_kv();
            Ok(block.attend(walk.context, normed.batch(batch), kv, 0, walk.angles)?)
        })
    }

    fn add_attention(&mut self, walk: Walk<'_>, block: &Block<'_>) -> Result<()> {
        let Self { residual, normed, attended, .. } = self;
        let held = walk.engine.hold(&[block.attn_output])?;
        residual.update(walk.engine, |batch, out| {
            Ok(block.add_attention(walk.context, attended.batch(batch), out)?)
        })?;
        drop(held);
        normed.fill(walk.engine, |batch| Ok(block.ffn_input(walk.context, residual.batch(batch))))
    }

    fn ffn_activation(&mut self, walk: Walk<'_>, block: &Block<'_>) -> Result<()> {
        let Self { normed, ffn, .. } = self;
        let _held = walk.engine.hold(&[block.ffn_gate, block.ffn_up])?;
        ffn.fill(walk.engine, |batch| Ok(block.ffn_activation(walk.context, normed.batch(batch))?))
    }

    fn add_ffn(&mut self, walk: Walk<'_>, block: &Block<'_>) -> Result<()> {
        let Self { residual, ffn, .. } = self;
        let _held = walk.engine.hold(&[block.ffn_down])?;
        residual.update(walk.engine, |batch, out| {
            Ok(block.add_ffn(walk.context, ffn.batch(batch), out)?)
        })
    }

    /// The whole block once more, from the residual `before` it.
    fn repeat_block(
        &mut self,
        walk: Walk<'_>,
        block: &Block<'_>,
        before: &Activations,
    ) -> Result<()> {
        let _held = walk.engine.hold(&block.weights())?;
        self.residual.update(walk.engine, |batch, residual| {
            residual.copy_from_slice(before.batch(batch));
            block.forward(walk.context, residual, &mut walk.new_kv(), 0, walk.angles)?;
            Ok(())
        })
    }
}
