//! How much a conversion has to compute, in units that are alike for layers of all shapes.

use slim_formats::{Decoder, arch::Tensor};

use crate::{
    Contents, Method, Settings, Storage, backward::sensitivity_samples, rows::hang_together,
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

    /// What a whole conversion has of it.
    pub(crate) fn planned(
        self,
        decoder: &Decoder,
        contents: &Contents,
        settings: &Settings,
    ) -> f64 {
        let is_calibrated = settings.method != Method::RoundToNearest;
        match self {
            Self::Sensitivities if settings.has_budget() => {
                let samples = sensitivity_samples(settings.samples, settings.context);
                sensitivities(decoder, samples * settings.context)
            }
            Self::Fits if settings.has_budget() => layers(contents).map(weights).sum(),
            Self::Forward if is_calibrated => {
                (0..decoder.blocks.len()).map(|block| forward(decoder, block, settings)).sum()
            }
            Self::Hessians if is_calibrated => {
                first_layers(decoder).map(|first| hessian(first, settings)).sum()
            }
            Self::Sweeps => {
                layers(contents).map(sweep).sum::<f64>() - linked(decoder, contents, settings)
            }
            Self::LinkedSweeps => linked(decoder, contents, settings),
            Self::Steps if settings.method == Method::SlimPlus => {
                settings.steps as f64 * step(decoder, settings)
            }
            _ => 0.0,
        }
    }
}

/// Rows and columns of the layers that are quantized.
fn layers(contents: &Contents) -> impl Iterator<Item = (usize, usize)> {
    let layers = contents.tensors().iter().filter(|t| matches!(t.storage, Storage::Layer(_)));
    layers.map(|tensor| (tensor.rows, tensor.cols))
}

/// Sweeps of the matrices whose rows make up for each other's errors.
fn linked(decoder: &Decoder, contents: &Contents, settings: &Settings) -> f64 {
    let is_linked =
        |tensor: &&Tensor| hang_together(tensor) && contents.kept_type(&tensor.name).is_none();
    match settings.has_budget() {
        true => decoder.tensors().iter().filter(is_linked).map(|t| sweep(t.shape())).sum(),
        false => 0.0,
    }
}

/// The first layer behind each stage of each block.
fn first_layers(decoder: &Decoder) -> impl Iterator<Item = &Tensor> {
    decoder.blocks.iter().enumerate().flat_map(|(index, spec)| {
        let firsts = spec.stages().map(|stage| spec.layers_of(stage)[0]);
        firsts.map(|part| decoder.tensor(index, part))
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
pub fn hessian(layer: &Tensor, settings: &Settings) -> f64 {
    let cols = layer.shape().1 as f64;
    let products = if settings.follows_float() { 2.0 } else { 0.5 };
    cols * cols * (products * tokens(settings) + FACTORING as f64 * cols)
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
    layers.map(|tensor| weights(tensor.shape())).sum()
}
