//! The quantized model while it is trained.

use slim_formats::{
    Weight,
    slim::{Bands, PackedLayer, SlimFile, band_name},
};
use slim_runtime::Block;

use super::{PRECISION, layer::TrainedLayer, parameters::Parameters};
use crate::{
    Result,
    backward::{Backward, Gradient, Linear, Loss, Norm, weight_gradient},
};

/// How far the weight of a norm moves in a step.
const NORM_RATE: f32 = 0.0003;

/// A model from a SliM file, with its scales and norms being trained. It runs on its packed layers,
/// as the file will.
pub struct Student<'a> {
    /// The model of the file.
    start: Backward<'a>,
    /// The bands of the linear layers in the order of their blocks; none of those without two-level
    /// scales.
    layers: Vec<Vec<PackedLayer>>,
    /// What is trained behind each of them.
    trained: Vec<Vec<TrainedLayer>>,
    /// In the order of [`norm_index`].
    norms: Vec<Parameters>,
}

impl<'a> Student<'a> {
    /// The model of `file`.
    pub fn new(file: &'a SlimFile) -> Result<Self> {
        let start = Backward::load(file, PRECISION)?;
        let (mut layers, mut trained) = (Vec::new(), Vec::new());
        for weight in start.blocks.iter().flat_map(Block::weights) {
            let bands = weight.bands().into_iter().flat_map(|bands| bands.iter());
            let two_level = bands.filter_map(|(_, band)| {
                TrainedLayer::new(band).map(|numbers| (band.to_layer(), numbers))
            });
            let (bands, numbers) = two_level.unzip();
            layers.push(bands);
            trained.push(numbers);
        }
        let of_blocks = start.blocks.iter().flat_map(|block| [&block.attn_norm, &block.ffn_norm]);
        let norms = of_blocks.chain([&start.output_norm]);
        let norms = norms.map(|norm| Parameters::new(norm.clone())).collect();
        Ok(Self { start, layers, trained, norms })
    }

    /// Takes a step at `rate` times the full rates, number `step` counted from 1, against the
    /// gradients of the loss on `sequences`; gives the loss before it.
    pub fn step(
        &mut self,
        sequences: &[&[u32]],
        loss: &mut Loss<'_>,
        rate: f32,
        step: usize,
    ) -> Result<f64> {
        let Self { start, layers, trained, norms } = self;
        let blocks = start.blocks.len();
        let loss = running(start, layers, norms).run(sequences, loss, &mut |gradient| {
            match gradient {
                Gradient::Linear { block, layer, x, dy } => {
                    let index = layer_index(block, layer);
                    descend(&layers[index], &mut trained[index], x, dy, rate, step);
                }
                Gradient::Norm(norm, dw) => {
                    let dw: Vec<f32> = dw.iter().map(|&d| d as f32).collect();
                    norms[norm_index(norm, blocks)].step(&dw, rate * NORM_RATE, step);
                }
                Gradient::Output { .. } | Gradient::Embedding(_) => {}
            }
            Ok(())
        })?;
        let layers = layers.iter_mut().flatten();
        layers.zip(trained.iter().flatten()).for_each(|(layer, trained)| trained.store(layer));
        Ok(loss)
    }

    /// A trained layer by its name.
    pub fn layer(&self, name: &str) -> Option<&PackedLayer> {
        let blocks = 0..self.start.blocks.len();
        let layers = blocks.flat_map(|block| Linear::ALL.map(|layer| (block, layer)));
        let mut matrices = layers.zip(&self.layers);
        matrices.find_map(|((block, layer), bands)| {
            let matrix = layer.tensor_name(block);
            let is_named = |index: &usize| {
                if bands.len() == 1 { name == matrix } else { name == band_name(&matrix, *index) }
            };
            (0..bands.len()).find(is_named).map(|index| &bands[index])
        })
    }

    /// A norm by its tensor's name.
    pub fn norm(&self, name: &str) -> Option<&[f32]> {
        let of_block = |block| {
            let name = |norm| format!("blk.{block}.{norm}.weight");
            [(Norm::Attn(block), name("attn_norm")), (Norm::Ffn(block), name("ffn_norm"))]
        };
        let of_blocks = (0..self.start.blocks.len()).flat_map(of_block);
        let mut norms = of_blocks.chain([(Norm::Output, "output_norm.weight".to_owned())]);
        let (norm, _) = norms.find(|(_, found)| found == name)?;
        Some(&self.norms[norm_index(norm, self.start.blocks.len())].values)
    }
}

/// Takes a step with the bands of a matrix, against the gradients for its inputs
/// `x: [tokens, cols]` and the gradient `dy: [tokens, rows]` of the loss at its outputs.
fn descend(
    bands: &[PackedLayer],
    trained: &mut [TrainedLayer],
    x: &[f32],
    dy: &[f32],
    rate: f32,
    step: usize,
) {
    if bands.is_empty() {
        return;
    }
    let (rows, cols) = Bands::new(bands).shape();
    let dw = weight_gradient(PRECISION, x, dy, rows, cols);
    let mut dw = dw.as_slice();
    for (band, trained) in bands.iter().zip(trained) {
        let (mine, below) = dw.split_at(band.layout().rows() * cols);
        trained.descend(band, mine, rate, step);
        dw = below;
    }
}

/// The model of a student as it is now.
fn running<'m>(
    start: &'m Backward<'_>,
    layers: &'m [Vec<PackedLayer>],
    norms: &[Parameters],
) -> Backward<'m> {
    let blocks = start.blocks.len();
    let norm = |norm| norms[norm_index(norm, blocks)].values.clone();
    let mut model: Backward<'m> = start.clone();
    for (index, block) in model.blocks.iter_mut().enumerate() {
        block.attn_norm = norm(Norm::Attn(index));
        block.ffn_norm = norm(Norm::Ffn(index));
        for layer in Linear::ALL {
            let bands = &layers[layer_index(index, layer)];
            if !bands.is_empty() {
                *weight_mut(block, layer) = Weight::Bands(Bands::new(bands));
            }
        }
    }
    model.output_norm = norm(Norm::Output);
    model
}

fn norm_index(norm: Norm, blocks: usize) -> usize {
    match norm {
        Norm::Attn(block) => 2 * block,
        Norm::Ffn(block) => 2 * block + 1,
        Norm::Output => 2 * blocks,
    }
}

fn layer_index(block: usize, layer: Linear) -> usize {
    block * Linear::ALL.len() + layer as usize
}

fn weight_mut<'b, 'a>(block: &'b mut Block<'a>, layer: Linear) -> &'b mut Weight<'a> {
    match layer {
        Linear::AttnQ => &mut block.attn_q,
        Linear::AttnK => &mut block.attn_k,
        Linear::AttnV => &mut block.attn_v,
        Linear::AttnOutput => &mut block.attn_output,
        Linear::FfnGate => &mut block.ffn_gate,
        Linear::FfnUp => &mut block.ffn_up,
        Linear::FfnDown => &mut block.ffn_down,
    }
}
