//! Calibration: all samples on their way through the blocks, stage by stage.

mod experts;

pub use experts::ENOUGH_TOKENS;

use slim_formats::{
    Decoder, ModelSource, PartMap, Weight,
    arch::{BlockSpec, Stage, Tensor},
    slim::{Bands, PackedLayer},
};
use slim_kernels::cuda::Held;
use slim_runtime::{Block, Context, Ends, Passage, Positions, State};

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
    /// The residual before the block, for `--reference`: the published code takes the inputs of a
    /// block's layers from the float block, and runs the quantized one afterwards.
    before: Option<Activations>,
}

/// Bytes of the activations of [`Calibrator::new`] that will go to temporary files: what
/// `memory_left` does not hold once it holds the output Hessians.
pub fn scratch_bytes(decoder: &Decoder, settings: &Settings, mut memory_left: u64) -> usize {
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
        output_hessian_sizes(decoder).for_each(|bytes| {
            in_scratch(bytes);
        });
    }
    let hidden = decoder.hidden_size;
    let stream = Stream::widths(decoder);
    let mut widths = stream.to_vec();
    if settings.follows_float() {
        widths.extend(stream.iter().chain([&hidden]));
    }
    if settings.method == Method::Reference {
        widths.push(hidden);
    }
    let bytes = |width: usize| (settings.samples * settings.context * width) as u64 * 4;
    widths.into_iter().map(|width| in_scratch(bytes(width)) as usize).sum()
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
        let mut stream = || -> Result<Stream> {
            let [residual, normed, mixed, activated] = Stream::widths(decoder);
            Ok(Stream {
                residual: activations(residual)?,
                normed: activations(normed)?,
                mixed: activations(mixed)?,
                activated: activations(activated)?,
            })
        };
        let mut ours = stream()?;
        let mut float = match settings.follows_float() {
            true => Some(stream()?),
            false => None,
        };
        let of_source = Ends::load(source)?;
        let quantized = Ends { embedding, ..of_source.clone() };
        let positions = Positions::new(decoder, 0, tokens, tokens);
        let context = Context { decoder, backend: engine.backend(settings.precision()) };
        for (index, tokens) in samples.iter().enumerate() {
            let embed = |ends: &Ends<'_>| ends.embed(context, tokens, positions.start);
            ours.residual.sample_mut(index).copy_from_slice(&embed(&quantized)?);
            if let Some(float) = &mut float {
                float.residual.sample_mut(index).copy_from_slice(&embed(&of_source)?);
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
        Ok(Self { engine, context, positions, stream: ours, float, before })
    }

    /// Leads `visitor` to the layers of a block in the order in which data flows through them, and
    /// the samples through what it makes of them.
    pub fn pass_block(
        &mut self,
        index: usize,
        block: &Block<'_>,
        visitor: &mut dyn Visitor,
    ) -> Result<()> {
        let Self { engine, context, positions, stream, float, before } = self;
        let walk = Walk { engine, context: *context, positions };
        if let Some(before) = before {
            before.fill(engine, |batch| Ok(stream.residual.batch(batch).to_vec()))?;
        }
        let mut layers = PartMap::new();
        let is_of_all = |stage: &Stage| !matches!(stage, Stage::Expert(_) | Stage::ExpertOutput(_));
        for stage in block.spec.stages().filter(is_of_all) {
            // What the samples go through: the layers so far, unless they must not feel them yet.
            let so_far = with_layers(block, &layers);
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
            let of_stage = visitor.stage(&tensors, inputs, engine)?;
            layers.extend(parts.iter().copied().zip(of_stage));
            if stage.adds_to_residual() {
                let so_far = with_layers(block, &layers);
                let running = if before.is_none() { &so_far } else { block };
                stream.add(stage, walk, running)?;
                if let Some(float) = float {
                    float.stream.add(stage, walk, block)?;
                }
            }
        }
        self.pass_experts(index, block, &mut layers, visitor)?;
        let Self { engine, context, positions, stream, before, .. } = self;
        let walk = Walk { engine, context: *context, positions };
        match before {
            None => Ok(()),
            Some(before) => stream.repeat_block(walk, &with_layers(block, &layers), before),
        }
    }
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
}

impl Walk<'_> {
    /// Keeps the layers of a stage on the device that computes.
    fn hold<'b>(&self, stage: Stage, block: &Block<'b>) -> Result<Vec<Held<'b>>> {
        let layers = block.spec.layers_of(stage).into_iter().map(|part| block.layers[part]);
        self.engine.hold(&layers.collect::<Vec<_>>())
    }

    /// Empty states for each of so many samples, exact as in the reverse pass.
    fn new_states(&self, block: &Block<'_>, samples: usize) -> Vec<State> {
        let (hidden, tokens) = (self.context.decoder.hidden_size, self.positions.count);
        let new = || State::new(&block.spec, hidden, tokens, None);
        std::iter::repeat_with(new).take(samples).collect()
    }

    /// The samples with these states, as a block takes them.
    fn passages<'p>(&'p self, states: &'p mut [State]) -> Vec<Passage<'p>> {
        states.iter_mut().map(|state| Passage { positions: self.positions, state }).collect()
    }
}

/// The activations of all samples in a block.
struct Stream {
    /// The residual stream, `[samples, tokens, hidden]`.
    residual: Activations,
    /// The normed residual, `[samples, tokens, hidden]`.
    normed: Activations,
    /// What the mixer gives, or makes for layers of its own, `[samples, tokens, channels]`.
    mixed: Activations,
    /// The activations of neurons, `[samples, tokens, neurons]`.
    activated: Activations,
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
    /// The channels of its activations, in the order of the fields.
    fn widths(decoder: &Decoder) -> [usize; 4] {
        let hidden = decoder.hidden_size;
        let mixed = |block: &BlockSpec| {
            block.stages().filter_map(|stage| mixed_width(block, stage, hidden)).max()
        };
        let widest = decoder.blocks.iter().filter_map(mixed).max().unwrap_or(0);
        [hidden, hidden, widest, decoder.widest_ffn()]
    }

    /// The inputs of a stage's layers, once it has been entered.
    fn inputs_of(&self, stage: Stage) -> &Activations {
        match stage {
            Stage::Mixer | Stage::Ffn => &self.normed,
            Stage::Query | Stage::Latent | Stage::MixerOutput => &self.mixed,
            Stage::FfnOutput => &self.activated,
            Stage::Expert(_) | Stage::ExpertOutput(_) => panic!("{stage:?} has tokens of its own"),
        }
    }

    /// Makes the inputs of a stage's layers.
    fn enter(&mut self, stage: Stage, walk: Walk<'_>, block: &Block<'_>) -> Result<()> {
        let Self { residual, normed, mixed, activated } = self;
        if let Some(width) = mixed_width(&block.spec, stage, walk.context.decoder.hidden_size) {
            mixed.set_width(width);
        }
        if let (Stage::FfnOutput, Some(ffn)) = (stage, block.spec.ffn) {
            activated.set_width(ffn.width);
        }
        let (from, inputs, running) = match stage {
            Stage::Mixer | Stage::Ffn => (&*residual, normed, None),
            Stage::Query | Stage::Latent | Stage::MixerOutput => {
                (&*normed, mixed, Some(Stage::Mixer))
            }
            Stage::FfnOutput => (&*normed, activated, Some(Stage::Ffn)),
            Stage::Expert(_) | Stage::ExpertOutput(_) => panic!("{stage:?} has tokens of its own"),
        };
        let _held = match running {
            Some(before) => Some(walk.hold(before, block)?),
            None => None,
        };
        inputs.fill(walk.engine, |batch| {
            let states = &mut walk.new_states(block, batch.len());
            let passages = &mut walk.passages(states);
            Ok(block.input(stage, walk.context, from.batch(batch), passages)?)
        })
    }

    /// Adds what a stage's layer gives to the residual stream.
    fn add(&mut self, stage: Stage, walk: Walk<'_>, block: &Block<'_>) -> Result<()> {
        let _held = walk.hold(stage, block)?;
        let Self { residual, mixed, activated, .. } = self;
        let inputs = if stage == Stage::MixerOutput { mixed } else { activated };
        residual.update(walk.engine, |batch, residual| {
            Ok(block.add(stage, walk.context, inputs.batch(batch), residual)?)
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
        self.residual.update(walk.engine, |batch, residual| {
            residual.copy_from_slice(before.batch(batch.clone()));
            let states = &mut walk.new_states(block, batch.len());
            Ok(block.forward(walk.context, residual, &mut walk.passages(states))?)
        })
    }
}
