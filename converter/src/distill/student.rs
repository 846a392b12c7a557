//! The quantized model while it is trained.

use rayon::prelude::*;
use slim_formats::{
    Weight,
    slim::{PackedLayer, SlimFile},
};
use slim_runtime::Block;

use super::{
    layer::{LayerGradients, TrainedLayer},
    parameters::Parameters,
};
use crate::{
    Result,
    backward::{Backward, Gradient, Linear, Loss, Norm},
};

/// How far the weight of a norm moves in a step.
const NORM_RATE: f32 = 0.003;

/// A model from a SliM file, with its scales and norms being trained. It runs on its packed layers, as the file will.
pub struct Student<'a> {
    /// The model of the file.
    start: Backward<'a>,
    /// The linear layers in the order of their blocks; `None` for those without two-level scales.
    layers: Vec<Option<TrainedLayer>>,
    /// In the order of [`Self::norm_index`].
    norms: Vec<Parameters>,
}

/// Gradients of all that is trained, in the student's order.
pub struct Gradients {
    layers: Vec<Option<LayerGradients>>,
    norms: Vec<Vec<f32>>,
}

impl<'a> Student<'a> {
    /// The model of `file`.
    pub fn new(file: &'a SlimFile) -> Result<Self> {
        let start = Backward::load(file)?;
        let trained = |weight| match weight {
            Weight::Packed(packed) => TrainedLayer::new(packed),
            Weight::Dense(_) => None,
        };
        let layers = start.blocks.iter().flat_map(Block::weights).map(trained).collect();
        let of_blocks = start.blocks.iter().flat_map(|block| [&block.attn_norm, &block.ffn_norm]);
        let norms = of_blocks.chain([&start.output_norm]);
        let norms = norms.map(|norm| Parameters::new(norm.clone())).collect();
        Ok(Self { start, layers, norms })
    }

    /// The loss on `sequences`, and its gradients.
    pub fn gradients(&self, sequences: &[&[u32]], loss: &mut Loss<'_>) -> Result<(f64, Gradients)> {
        let mut gradients = Gradients {
            layers: self.layers.iter().map(|_| None).collect(),
            norms: vec![Vec::new(); self.norms.len()],
        };
        let loss = self.model().run(sequences, loss, &mut |gradient| {
            match gradient {
                Gradient::Linear { block, layer, x, dy } => {
                    let index = layer_index(block, layer);
                    let trained = self.layers[index].as_ref();
                    gradients.layers[index] = trained.map(|trained| trained.gradients(x, dy));
                }
                Gradient::Norm(norm, dw) => {
                    gradients.norms[self.norm_index(norm)] = dw.iter().map(|&d| d as f32).collect();
                }
            }
            Ok(())
        })?;
        Ok((loss, gradients))
    }

    /// Takes a step at `rate` times the full rates; `step` counts from 1.
    pub fn update(&mut self, gradients: &Gradients, rate: f32, step: usize) {
        self.layers.par_iter_mut().zip(&gradients.layers).for_each(|pair| {
            if let (Some(layer), Some(gradients)) = pair {
                layer.update(gradients, rate, step);
            }
        });
        for (norm, gradient) in self.norms.iter_mut().zip(&gradients.norms) {
            norm.step(gradient, rate * NORM_RATE, step);
        }
    }

    /// A trained layer by its tensor's name.
    pub fn layer(&self, name: &str) -> Option<&PackedLayer> {
        let blocks = 0..self.start.blocks.len();
        let mut layers = blocks.flat_map(|block| Linear::ALL.map(|layer| (block, layer)));
        let (block, layer) = layers.find(|(block, layer)| layer.tensor_name(*block) == name)?;
        self.layers[layer_index(block, layer)].as_ref().map(TrainedLayer::packed)
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
        Some(&self.norms[self.norm_index(norm)].values)
    }

    /// The model as it is now.
    fn model(&self) -> Backward<'_> {
        let mut model: Backward<'_> = self.start.clone();
        for (index, block) in model.blocks.iter_mut().enumerate() {
            block.attn_norm.clone_from(&self.norms[self.norm_index(Norm::Attn(index))].values);
            block.ffn_norm.clone_from(&self.norms[self.norm_index(Norm::Ffn(index))].values);
            for layer in Linear::ALL {
                if let Some(trained) = &self.layers[layer_index(index, layer)] {
                    *weight_mut(block, layer) = Weight::Packed(trained.packed().view());
                }
            }
        }
        model.output_norm.clone_from(&self.norms[self.norm_index(Norm::Output)].values);
        model
    }

    fn norm_index(&self, norm: Norm) -> usize {
        match norm {
            Norm::Attn(block) => 2 * block,
            Norm::Ffn(block) => 2 * block + 1,
            Norm::Output => 2 * self.start.blocks.len(),
        }
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
