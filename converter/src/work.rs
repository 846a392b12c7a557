//! How much a conversion has to compute, in units that are alike for layers of all shapes.

use slim_formats::{Decoder, Part, arch::Tensor};

use crate::{
    Contents, Method, PlannedTensor, Settings, Storage, WorkFolder, backward::sensitivity_samples,
    budget::SURVEY, rows::hang_together,
};

/// A kind of work. One unit of a kind takes a machine about the same time wherever it comes up;
/// how the kinds compare depends on the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Work {
    /// Forward and reverse passes that measure what the loss minds: multiplications.
    Sensitivities,
    /// What bits are worth: weights.
    Fits,
    /// Forward passes between calibrated layers: multiplications.
    Forward,
    /// Hessians and their factors: multiplications.
    Hessians,
    /// Rounding of rows by themselves, many at a time.
    Sweeps,
    /// Rounding of rows that make up for each other's errors, a few at a time.
    LinkedSweeps,
    /// Steps of training: multiplications.
    Steps,
}

/// Columns whose part in the rounding of a weight takes as much time as what does not depend on
/// their number.
const ROUNDING: usize = 540;

/// Multiplications of a matrix product that one of a factorization takes as much time as.
const FACTORING: usize = 8;

impl Work {
    /// All kinds.
    pub const ALL: [Self; 7] = [
        Self::Sensitivities,
        Self::Fits,
        Self::Forward,
        Self::Hessians,
        Self::Sweeps,
        Self::LinkedSweeps,
        Self::Steps,
    ];

    /// What a unit takes on a machine with two cores and AVX2, in picoseconds: where no unit has
    /// been measured yet, the others and these tell.
    pub fn usual_cost(self) -> f64 {
        match self {
            Self::Sensitivities => 21.0,
            Self::Fits => 20_000.0,
            Self::Forward => 25.0,
            Self::Hessians => 15.0,
            Self::Sweeps => 150.0,
            Self::LinkedSweeps => 320.0,
            Self::Steps => 21.0,
        }
    }

    /// Whether it is bound by rounding, not by products of matrices: a machine may be fast at one
    /// of both only.
    pub fn is_rounding(self) -> bool {
        matches!(self, Self::Fits | Self::Sweeps | Self::LinkedSweeps)
    }

    /// What a conversion has of it, less what `work` has of an earlier one.
    pub(crate) fn planned(
        self,
        decoder: &Decoder,
        contents: &Contents,
        settings: &Settings,
        work: Option<&WorkFolder>,
    ) -> f64 {
        let has = |record: &str| work.is_some_and(|work| work.has(record));
        let is_calibrated = settings.method != Method::RoundToNearest;
        let is_surveyed = settings.has_budget() && !has(SURVEY);
        let is_done = |matrix: &str| has(&settings.record_of(matrix));
        let sweeps = |are_linked: bool| -> f64 {
            let left = layers(contents).filter(|layer| !is_done(&layer.source));
            let alike = left.filter(|layer| is_linked(layer, decoder, settings) == are_linked);
            alike.map(|layer| sweep((layer.rows, layer.cols))).sum()
        };
        match self {
            Self::Sensitivities if is_surveyed => {
                let samples = sensitivity_samples(settings.samples, settings.context);
                sensitivities(decoder, samples * settings.context)
            }
            Self::Fits if is_surveyed => {
                layers(contents).map(|layer| weights((layer.rows, layer.cols))).sum()
            }
            Self::Forward if is_calibrated => {
                (0..decoder.blocks.len()).map(|block| forward(decoder, block, settings)).sum()
            }
            Self::Hessians if is_calibrated => {
                let is_left = |tensor: &&Tensor| !is_done(&tensor.name);
                let stages = stages(decoder).filter(|stage| stage.iter().any(is_left));
                stages.map(|stage| hessian(stage[0], decoder, settings)).sum()
            }
            Self::Sweeps => sweeps(false),
            Self::LinkedSweeps => sweeps(true),
            Self::Steps if settings.method == Method::SlimPlus => {
                settings.steps as f64 * step(decoder, settings)
            }
            _ => 0.0,
        }
    }
}

/// The layers that are quantized.
fn layers(contents: &Contents) -> impl Iterator<Item = &PlannedTensor> {
    contents.tensors().iter().filter(|tensor| matches!(tensor.storage, Storage::Layer(_)))
}

/// Whether the rows of a layer make up for each other's errors.
fn is_linked(layer: &PlannedTensor, decoder: &Decoder, settings: &Settings) -> bool {
    settings.has_budget() && decoder.find(&layer.source).is_some_and(hang_together)
}

/// The layers of each stage of each block.
fn stages(decoder: &Decoder) -> impl Iterator<Item = Vec<&Tensor>> {
    decoder.blocks.iter().enumerate().flat_map(move |(index, spec)| {
        let is_quantized = |part: &Part| !part.stays_precise();
        let layers = spec.stages().map(move |stage| spec.layers_of(stage));
        let layers = layers.map(move |parts| parts.into_iter().filter(is_quantized));
        layers.map(move |parts| parts.map(|part| decoder.tensor(index, part)).collect())
    })
}

/// Of a matrix.
pub fn weights((rows, cols): (usize, usize)) -> f64 {
    rows as f64 * cols as f64
}

/// Both passes over `tokens` tokens: blocks forward, again with all that gradients need, and back.
pub fn sensitivities(decoder: &Decoder, tokens: usize) -> f64 {
    let blocks = (0..decoder.blocks.len()).map(|block| block_weights(decoder, block));
    let vocabulary = weights(decoder.output().shape());
    tokens as f64 * (4.0 * blocks.sum::<f64>() + 3.0 * vocabulary)
}

/// All samples through a block; also through the float one where that runs along.
pub fn forward(decoder: &Decoder, block: usize, settings: &Settings) -> f64 {
    let models = if settings.follows_float() { 2.0 } else { 1.0 };
    models * tokens(settings) * block_weights(decoder, block)
}

/// The inputs of `layer`, and of those that share them.
pub fn hessian(layer: &Tensor, decoder: &Decoder, settings: &Settings) -> f64 {
    let cols = layer.shape().1 as f64;
    let products = if settings.follows_float() { 2.0 } else { 0.5 };
    let tokens = tokens(settings) * share(layer, decoder);
    cols * cols * (products * tokens + FACTORING as f64 * cols)
}

/// A matrix or a part of one.
pub fn sweep((rows, cols): (usize, usize)) -> f64 {
    weights((rows, cols)) * (ROUNDING + cols) as f64
}

/// A step of training.
pub fn step(decoder: &Decoder, settings: &Settings) -> f64 {
    let tokens = crate::distill::tokens_of_step(settings);
    // The source forward, and the student there and back.
    1.5 * sensitivities(decoder, tokens)
}

fn tokens(settings: &Settings) -> f64 {
    settings.samples as f64 * settings.context as f64
}

fn block_weights(decoder: &Decoder, block: usize) -> f64 {
    let layers = decoder.tensors_of(block).iter().filter(|tensor| tensor.is_matrix());
    layers.map(|tensor| weights(tensor.shape()) * share(tensor, decoder)).sum()
}

/// The part of all tokens that goes through a layer, if experts get as many each.
fn share(layer: &Tensor, decoder: &Decoder) -> f64 {
    let experts = layer.block.and_then(|block| decoder.blocks[block].experts);
    match (layer.part, experts) {
        (Part::Expert(..), Some(experts)) => f64::from(experts.used) / f64::from(experts.count),
        _ => 1.0,
    }
}
