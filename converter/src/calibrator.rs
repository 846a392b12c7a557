//! Calibration: all samples on their way through the blocks, stage by stage.

mod experts;

pub use experts::ENOUGH_TOKENS;

use std::{collections::BTreeMap, ops::Range};

use slim_formats::{
    Decoder, ModelSource, PartMap, Weight,
    arch::{BlockSpec, Stage, Tensor},
    slim::{Bands, PackedLayer},
};
use slim_kernels::cuda::Held;
use slim_runtime::{Block, Context, Ends, Passage, Positions, State, cut, side_by_side};

use crate::{
    Activations, Engine, Method, Result, Settings,
    activations::{FloatInputs, StageInputs},
    rows::output_hessian_sizes,
};

/// What is done with the linear layers on the way.
pub trait Visitor {
    /// The layers of a stage, all of which take `inputs` in; what runs in the place of each from
    /// here on.
    fn stage(
        &mut self,
        layers: &[(&Tensor, Weight<'_>)],
        inputs: StageInputs<'_>,
        engine: &Engine,
    ) -> Result<Vec<Layer>>;

    /// Expert `index` of a block is next: so many tokens of the samples go through it.
    fn expert(&mut self, block: usize, index: u16, tokens: usize);
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
    positions: Positions,
    /// Through the layers as the visitor leaves them.
    stream: Stream,
    /// Through the float model, where the visitor wants to know its outputs.
    float: Option<FloatStream>,
    /// What the tokens of the samples say to each block by themselves, in the float model,
    /// `[samples, tokens, blocks * embedded]`.
    embedded: Option<Activations>,
    /// The residual before the block, for `--reference`: the published code takes the inputs of a
    /// block's layers from the float block, and runs the quantized one afterwards.
    before: Option<Activations>,
}

/// Bytes of the activations of a calibration and of its output Hessians, all of which may go to
/// temporary files.
pub fn float_bytes(decoder: &Decoder, settings: &Settings) -> u64 {
    hessian_bytes(decoder, settings).chain(activation_bytes(decoder, settings)).sum()
}

/// Bytes of the activations of [`Calibrator::new`] that will go to temporary files: what
/// `memory_left` does not hold once it holds the output Hessians.
pub fn scratch_bytes(decoder: &Decoder, settings: &Settings, mut memory_left: u64) -> usize {
    let mut in_scratch = |bytes: u64| match memory_left.checked_sub(bytes) {
        Some(left) => {
            memory_left = left;
            0
        }
        None => bytes,
    };
    hessian_bytes(decoder, settings).for_each(|bytes| {
        in_scratch(bytes);
    });
    activation_bytes(decoder, settings).map(|bytes| in_scratch(bytes) as usize).sum()
}

/// Of each output Hessian, if there are some.
fn hessian_bytes(decoder: &Decoder, settings: &Settings) -> impl Iterator<Item = u64> {
    output_hessian_sizes(decoder).filter(|_| settings.has_budget())
}

/// Of the activations of all samples, in the order in which they are made.
fn activation_bytes(decoder: &Decoder, settings: &Settings) -> impl Iterator<Item = u64> {
    let hidden = decoder.hidden_size;
    let stream = Stream::widths(decoder);
    let mut widths = stream.clone();
    if settings.follows_float() {
        widths.extend(stream.into_iter().chain([hidden]));
    }
    widths.push(embedded_width(decoder));
    if settings.method == Method::Reference {
        widths.push(hidden);
    }
    let tokens = match settings.method {
        Method::RoundToNearest => 0,
        _ => settings.samples * settings.context,
    };
    widths.into_iter().map(move |width| (tokens * width) as u64 * 4)
}

struct FloatStream {
    stream: Stream,
    /// The residual of the float model without ours, over the residual scale.
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
        let decoder = source.decoder();
        let count = samples.len();
        let tokens = samples.first().map_or(0, Vec::len);
        let mut activations = |width| Activations::new(count, tokens, width, memory_left);
        let hidden = decoder.hidden_size;
        let mut ours = Stream::new(decoder, &mut activations)?;
        let mut float = match settings.follows_float() {
            true => Some(Stream::new(decoder, &mut activations)?),
            false => None,
        };
        let of_source = Ends::load(source)?;
        let quantized = Ends { embedding, ..of_source.clone() };
        let positions = Positions::new(decoder, 0, tokens, tokens);
        let context = Context { decoder, backend: engine.backend(settings.precision()) };
        let mut embedded = match embedded_width(decoder) {
            0 => None,
            width => Some(activations(width)?),
        };
        for (index, tokens) in samples.iter().enumerate() {
            let embed = |ends: &Ends<'_>| ends.embed(context, tokens, positions.start);
            ours.residual.sample_mut(index).copy_from_slice(&embed(&quantized)?);
            if let Some(float) = &mut float {
                float.residual.sample_mut(index).copy_from_slice(&embed(&of_source)?);
            }
            if let Some(embedded) = &mut embedded {
                let of_blocks = of_source.embedded(context, tokens, &embed(&of_source)?)?;
                let of_block = |index: usize| (of_blocks.of_block(index), width_of(decoder, index));
                let of_blocks: Vec<_> = (0..decoder.blocks.len()).map(of_block).collect();
                embedded.sample_mut(index).copy_from_slice(&side_by_side(&of_blocks));
            }
        }
        let float = match float {
            Some(stream) => Some(FloatStream { stream, missing: activations(hidden)? }),
            None => None,
        };
        let before = match settings.method {
            Method::Reference => Some(activations(hidden)?),
            _ => None,
        };
        Ok(Self { engine, context, positions, stream: ours, float, embedded, before })
    }

    /// Leads `visitor` to the layers of a block in the order in which data flows through them, and
    /// the samples through what it makes of them.
    pub fn pass_block(
        &mut self,
        index: usize,
        block: &Block<'_>,
        visitor: &mut dyn Visitor,
    ) -> Result<()> {
        if let Some(before) = &mut self.before {
            let residual = &self.stream.residual;
            before.fill(self.engine, |batch| Ok(residual.batch(batch).to_vec()))?;
        }
        let mut layers = PartMap::new();
        let stages: Vec<Stage> = block.spec.stages().collect();
        let first_of_experts = stages.iter().position(|stage| stage.is_of_experts());
        for (at, &stage) in stages.iter().enumerate() {
            if first_of_experts == Some(at) {
                self.pass_experts(index, block, &mut layers, visitor)?;
            }
            if !stage.is_of_experts() {
                self.pass_stage(stage, index, block, &mut layers, visitor)?;
            }
        }
        let Self { engine, context, positions, stream, float, embedded, before } = self;
        let walk =
            Walk { engine, context: *context, positions, index, embedded: embedded.as_ref() };
        if let Some(float) = float {
            float.stream.finish(walk, block)?;
        }
        match before {
            None => stream.finish(walk, block),
            Some(before) => stream.repeat_block(walk, &with_layers(block, &layers), before),
        }
    }

    /// Leads `visitor` to the layers of a stage of all tokens, and the samples through what it
    /// makes of them; `layers` are those of the block so far.
    fn pass_stage(
        &mut self,
        stage: Stage,
        index: usize,
        block: &Block<'_>,
        layers: &mut PartMap<Layer>,
        visitor: &mut dyn Visitor,
    ) -> Result<()> {
        let Self { engine, context, positions, stream, float, embedded, before } = self;
        let walk =
            Walk { engine, context: *context, positions, index, embedded: embedded.as_ref() };
        // What the samples go through: the layers so far, unless they must not feel them yet.
        let so_far = with_layers(block, layers);
        let running = if before.is_none() { &so_far } else { block };
        stream.enter(stage, walk, running)?;
        if let Some(float) = float {
            float.stream.enter(stage, walk, block)?;
            if corrects_residual(stage, block) {
                float.compare(engine, stream, block.spec.residual_scale)?;
            }
        }
        let parts = block.spec.layers_of(stage);
        let tensor = |&part| (walk.context.decoder.tensor(index, part), block.layers[part]);
        let tensors: Vec<_> = parts.iter().map(tensor).collect();
        let of_float = float.as_ref().map(|float| FloatInputs {
            activations: float.stream.inputs_of(stage),
            missing: corrects_residual(stage, block).then_some(&float.missing),
        });
        let inputs = StageInputs { activations: stream.inputs_of(stage), float: of_float };
        if !tensors.is_empty() {
            let of_stage = visitor.stage(&tensors, inputs, engine)?;
            layers.extend(parts.iter().copied().zip(of_stage));
        }
        if stage.adds_to_residual() {
            let so_far = with_layers(block, layers);
            let running = if before.is_none() { &so_far } else { block };
            stream.add(stage, walk, running)?;
            if let Some(float) = float {
                float.stream.add(stage, walk, block)?;
            }
        }
        Ok(())
    }
}

/// Channels of what each token says to all blocks.
fn embedded_width(decoder: &Decoder) -> usize {
    (0..decoder.blocks.len()).map(|index| width_of(decoder, index)).sum()
}

/// Channels of what each token says to a block.
fn width_of(decoder: &Decoder, index: usize) -> usize {
    decoder.blocks[index].embedded.unwrap_or(0)
}

/// A block with what has become of its layers so far.
fn with_layers<'b>(block: &'b Block<'_>, layers: &'b PartMap<Layer>) -> Block<'b> {
    let mut block: Block<'b> = block.clone();
    for (part, layer) in layers.iter() {
        block.layers[part] = layer.weight(block.layers[part]);
    }
    block
}

/// Whether a stage's layer is corrected by what the residual stream misses: it adds to the stream,
/// and no norm in between would scale the correction by all else. A norm of the sum does not
/// matter: the layer aims at the float model's sum.
fn corrects_residual(stage: Stage, block: &Block<'_>) -> bool {
    stage.adds_to_residual() && block.spec.branch_norm(stage).is_none()
}

impl FloatStream {
    /// What the stream misses, as a layer must give it whose output is multiplied by
    /// `residual_scale`.
    fn compare(&mut self, engine: &Engine, ours: &Stream, residual_scale: f32) -> Result<()> {
        let Self { stream, missing } = self;
        missing.fill(engine, |batch| {
            let pairs = stream.residual.batch(batch.clone()).iter().zip(ours.residual.batch(batch));
            Ok(pairs.map(|(float, ours)| (float - ours) / residual_scale).collect())
        })
    }
}

/// What all samples go through the stages with.
#[derive(Clone, Copy)]
struct Walk<'w> {
    engine: &'w Engine,
    context: Context<'w>,
    positions: &'w Positions,
    /// Of the block.
    index: usize,
    /// As [`Calibrator::embedded`].
    embedded: Option<&'w Activations>,
}

impl Walk<'_> {
    /// Keeps the layers of a stage on the device that computes.
    fn hold<'b>(&self, stage: Stage, block: &Block<'b>) -> Result<Vec<Held<'b>>> {
        let layers = block.spec.layers_of(stage).into_iter().map(|part| block.layers[part]);
        self.engine.hold(&layers.collect::<Vec<_>>())
    }

    /// The states that samples begin with, exact as in the reverse pass: empty, or with the keys
    /// and values of the block that this one shares with.
    fn new_states(&self, block: &Block<'_>, kept: &Kept, batch: Range<usize>) -> Vec<State> {
        let (hidden, tokens) = (self.context.decoder.hidden_size, self.positions.count);
        let new = |sample: usize| match block.spec.shares() {
            None => State::new(&block.spec, hidden, tokens, None),
            Some(shared) => {
                let spec = &self.context.decoder.blocks[shared];
                let mut state = State::new(spec, hidden, tokens, None);
                let both = kept[&shared].sample(sample);
                let width = kept[&shared].width();
                let [k, v] = [0..width / 2, width / 2..width].map(|part| cut(both, width, part));
                state.store(&k, &v);
                state
            }
        };
        batch.map(new).collect()
    }

    /// What the tokens of samples say to the block, `[samples, tokens, embedded]`.
    fn embedded(&self, batch: Range<usize>) -> Vec<f32> {
        let Some(of_blocks) = self.embedded else { return Vec::new() };
        let first: usize = (0..self.index).map(|index| width_of(self.context.decoder, index)).sum();
        let columns = first..first + width_of(self.context.decoder, self.index);
        cut(of_blocks.batch(batch), of_blocks.width(), columns)
    }

    /// Samples with their states and what they say to the block, as it takes them.
    fn passages<'p>(&'p self, states: &'p mut [State], embedded: &'p [f32]) -> Vec<Passage<'p>> {
        let of_sample = embedded.len() / states.len();
        let passages = states.iter_mut().enumerate().map(|(index, state)| {
            let embedded = &embedded[index * of_sample..][..of_sample];
            Passage { positions: self.positions, state, embedded }
        });
        passages.collect()
    }
}

/// Turned keys, and values, of blocks that others share, by their numbers,
/// `[samples, tokens, 2 * kv_heads * head_dim]`.
type Kept = BTreeMap<usize, Activations>;

/// The activations of all samples in a block.
struct Stream {
    /// The residual stream, `[samples, tokens, hidden]`.
    residual: Activations,
    /// The normed residual, `[samples, tokens, hidden]`.
    normed: Activations,
    /// What the mixer gives, or makes for layers of its own, `[samples, tokens, channels]`.
    mixed: Activations,
    /// The activations of neurons, or what tokens say to the block, gated,
    /// `[samples, tokens, neurons]`.
    activated: Activations,
    /// What the network beside experts with norms of their own gives, and what these do,
    /// `[samples, tokens, hidden]`.
    joint: Option<[Activations; 2]>,
    kept: Kept,
}

/// Channels of what a mixer gives at a stage.
fn mixed_width(spec: &BlockSpec, stage: Stage, hidden_size: usize) -> Option<usize> {
    let latent = spec.mixer.latent();
    match stage {
        Stage::Query => latent?.query_rank,
        Stage::Latent => latent.map(|latent| latent.rank),
        Stage::MixerOutput => Some(spec.mixer.output_width(hidden_size)),
        _ => None,
    }
}

/// The stages of [`Block::forward`], each for all samples.
impl Stream {
    /// Of a model, with `activations` of so many channels each.
    fn new(
        decoder: &Decoder,
        activations: &mut impl FnMut(usize) -> Result<Activations>,
    ) -> Result<Self> {
        let mut widths = Self::widths(decoder).into_iter();
        let mut next = || activations(widths.next().expect("a width of each field"));
        let (residual, normed, mixed, activated) = (next()?, next()?, next()?, next()?);
        let joint = match Self::joins(decoder) {
            true => Some([next()?, next()?]),
            false => None,
        };
        let kept = shared_blocks(decoder).map(|(index, _)| Ok((index, next()?)));
        let kept = kept.collect::<Result<_>>()?;
        Ok(Self { residual, normed, mixed, activated, joint, kept })
    }

    /// The channels of its activations, in the order of the fields.
    fn widths(decoder: &Decoder) -> Vec<usize> {
        let hidden = decoder.hidden_size;
        let mixed = |block: &BlockSpec| {
            block.stages().filter_map(|stage| mixed_width(block, stage, hidden)).max()
        };
        let widest = decoder.blocks.iter().filter_map(mixed).max().unwrap_or(0);
        let embedded = (0..decoder.blocks.len()).map(|index| width_of(decoder, index)).max();
        let activated = decoder.widest_ffn().max(embedded.unwrap_or(0));
        let joint = if Self::joins(decoder) { vec![hidden; 2] } else { Vec::new() };
        let of_all = [hidden, hidden, widest, activated].into_iter().chain(joint);
        of_all.chain(shared_blocks(decoder).map(|(_, width)| width)).collect()
    }

    fn joins(decoder: &Decoder) -> bool {
        decoder.blocks.iter().any(BlockSpec::has_expert_norms)
    }

    /// The inputs of a stage's layers, once it has been entered.
    fn inputs_of(&self, stage: Stage) -> &Activations {
        match stage {
            Stage::Mixer | Stage::Ffn | Stage::Router | Stage::Experts | Stage::Embedded => {
                &self.normed
            }
            Stage::Query | Stage::Latent | Stage::MixerOutput => &self.mixed,
            Stage::FfnOutput | Stage::EmbeddedOutput => &self.activated,
            Stage::Expert(_) | Stage::ExpertOutput(_) => panic!("{stage:?} has tokens of its own"),
        }
    }

    /// Makes the inputs of a stage's layers.
    fn enter(&mut self, stage: Stage, walk: Walk<'_>, block: &Block<'_>) -> Result<()> {
        if stage == Stage::MixerOutput {
            self.keep_shared(walk, block)?;
        }
        let Self { residual, normed, mixed, activated, kept, .. } = self;
        if let Some(width) = mixed_width(&block.spec, stage, walk.context.decoder.hidden_size) {
            mixed.set_width(width);
        }
        match (stage, block.spec.ffn, block.spec.embedded) {
            (Stage::FfnOutput, Some(ffn), _) => activated.set_width(ffn.width),
            (Stage::EmbeddedOutput, _, Some(width)) => activated.set_width(width),
            _ => {}
        }
        let (from, inputs, running) = match stage {
            Stage::Mixer | Stage::Ffn | Stage::Router | Stage::Experts | Stage::Embedded => {
                (&*residual, normed, None)
            }
            Stage::Query | Stage::Latent | Stage::MixerOutput => {
                (&*normed, mixed, Some(Stage::Mixer))
            }
            Stage::FfnOutput => (&*normed, activated, Some(Stage::Ffn)),
            Stage::EmbeddedOutput => (&*normed, activated, Some(Stage::Embedded)),
            Stage::Expert(_) | Stage::ExpertOutput(_) => panic!("{stage:?} has tokens of its own"),
        };
        let _held = match running {
            Some(before) => Some(walk.hold(before, block)?),
            None => None,
        };
        inputs.fill(walk.engine, |batch| {
            let states = &mut walk.new_states(block, kept, batch.clone());
            let embedded = walk.embedded(batch.clone());
            let passages = &mut walk.passages(states, &embedded);
            Ok(block.input(stage, walk.context, from.batch(batch), passages)?)
        })
    }

    /// Keeps the keys and values of a block that others share, once it has made its input.
    fn keep_shared(&mut self, walk: Walk<'_>, block: &Block<'_>) -> Result<()> {
        let Self { normed, kept, .. } = self;
        let Some(kept) = kept.get_mut(&walk.index) else { return Ok(()) };
        let _held = walk.hold(Stage::Mixer, block)?;
        let width = kept.width() / 2;
        kept.fill(walk.engine, |batch| {
            let positions = batch.clone().map(|_| walk.positions);
            let input = normed.batch(batch);
            let [k, v] = block.keys_and_values(walk.context, input, positions)?;
            Ok(side_by_side(&[(&k, width), (&v, width)]))
        })
    }

    /// Adds what a stage's layer gives to the residual stream, or to what is joined later.
    fn add(&mut self, stage: Stage, walk: Walk<'_>, block: &Block<'_>) -> Result<()> {
        let _held = walk.hold(stage, block)?;
        let Self { residual, mixed, activated, joint, .. } = self;
        let inputs = if stage == Stage::MixerOutput { mixed } else { activated };
        let to = match joint {
            Some([beside, _]) if stage == Stage::FfnOutput && block.spec.has_expert_norms() => {
                beside.fill(walk.engine, |batch| Ok(vec![0.0; residual.batch(batch).len()]))?;
                beside
            }
            _ => residual,
        };
        to.update(walk.engine, |batch, to| {
            Ok(block.add(stage, walk.context, inputs.batch(batch), to)?)
        })
    }

    /// What the block does at last.
    fn finish(&mut self, walk: Walk<'_>, block: &Block<'_>) -> Result<()> {
        self.residual.update(walk.engine, |_, residual| {
            block.finish(residual);
            Ok(())
        })
    }

    /// The whole block once more, from the residual `before` it.
    fn repeat_block(
        &mut self,
        walk: Walk<'_>,
        block: &Block<'_>,
        before: &Activations,
    ) -> Result<()> {
        let layers: Vec<_> = block.layers.values().copied().collect();
        let _held = walk.engine.hold(&layers)?;
        let Self { residual, kept, .. } = self;
        residual.update(walk.engine, |batch, residual| {
            residual.copy_from_slice(before.batch(batch.clone()));
            let states = &mut walk.new_states(block, kept, batch.clone());
            let embedded = walk.embedded(batch);
            Ok(block.forward(walk.context, residual, &mut walk.passages(states, &embedded))?)
        })
    }
}

/// Blocks whose keys and values others attend to, and the channels of both.
fn shared_blocks(decoder: &Decoder) -> impl Iterator<Item = (usize, usize)> {
    let shared = decoder.blocks.iter().enumerate().filter(|&(index, _)| decoder.is_shared(index));
    shared.filter_map(|(index, spec)| {
        let attention = spec.attention()?;
        Some((index, 2 * attention.kv_heads * attention.head_dim))
    })
}
