//! One block forward with all that its gradients need, then the reverse in mirrored order.

use std::borrow::Cow;

use rayon::prelude::*;
use slim_formats::{
    Decoder, Part,
    arch::{Norm, Stage},
};
use slim_kernels::{Backend, Cpu, linalg::Precision};
use slim_runtime::Block;

use super::{
    Gradient, Visitor, elementwise, mixer::Mixed, networks::Networks, product, shared::Shared,
};
use crate::Result;

/// Tokens per task in sums over tokens.
const TOKENS_PER_TASK: usize = 64;

/// A block on its way forward and back.
pub struct Walk<'b> {
    /// Of its products.
    pub precision: Precision,
    pub decoder: &'b Decoder,
    pub block: &'b Block<'b>,
    pub index: usize,
    /// Tokens of each sequence.
    pub context: usize,
    /// What all tokens say to the block by themselves, `[m, embedded]`; empty if they do not.
    pub embedded: &'b [f32],
}

/// The activations of a block; `m` is the number of tokens of all sequences.
struct Activations {
    /// `[m, hidden]`: input of the mixer.
    normed: Vec<f32>,
    mixed: Mixed,
    /// What the mixer adds to the residual stream.
    added: Branch,
    /// `[m, hidden]`: the residual stream between mixer and feed-forward network.
    middle: Vec<f32>,
    networks: Networks,
}

/// What norms need on the way back where something is added to the residual stream, `[m, hidden]`.
#[derive(Default)]
pub struct Branch {
    /// What is added, before the norm that stands behind it, if there is one.
    output: Option<Vec<f32>>,
    /// The sum before the norm that stands on it, if there is one.
    sum: Option<Vec<f32>>,
}

impl Walk<'_> {
    /// The output of the block for its input `x`; both `[m, hidden]`.
    pub fn forward(&self, x: &[f32], shared: &mut Shared) -> Result<Vec<f32>> {
        let Activations { middle: mut x, networks, mixed, .. } = self.activations(x, shared)?;
        if self.decoder.is_shared(self.index) {
            let (k, v) = mixed.into_keys_and_values();
            shared.keep(self.index, k, v);
        }
        self.add_networks(&networks, &mut x)?;
        if self.block.spec.embedded.is_some() {
            let gated = self.gated_embedded(&x)?;
            self.add_branch(Stage::EmbeddedOutput, &gated.output, &mut x)?;
        }
        self.block.finish(&mut x);
        Ok(x)
    }

    /// Turns the gradient `dx` at the block's output into that at its input `x`, both
    /// `[m, hidden]`; gives the gradient at what tokens say to it by themselves.
    pub fn reverse(
        &self,
        x: &[f32],
        dx: &mut [f32],
        shared: &mut Shared,
        visit: &mut Visitor<'_>,
    ) -> Result<Vec<f32>> {
        let Activations { normed, mixed, added, middle, networks } = self.activations(x, shared)?;
        self.block.finish(dx);
        let d_embedded = match self.block.spec.embedded {
            None => Vec::new(),
            Some(_) => {
                let mut behind = middle.clone();
                self.add_networks(&networks, &mut behind)?;
                self.reverse_embedded(&behind, dx, visit)?
            }
        };
        self.reverse_networks(networks, &middle, dx, visit)?;

        let d_output = self.reverse_branch(Stage::MixerOutput, added, dx, visit)?;
        visit(self.linear(Part::AttnOutput, mixed.output(), &d_output))?;
        let mut d_mixed = vec![0.0; mixed.output().len()];
        self.add_product(&mut d_mixed, &d_output, Part::AttnOutput)?;
        drop(d_output);
        let mut d_normed = vec![0.0; x.len()];
        self.reverse_mixer(mixed, &normed, d_mixed, &mut d_normed, shared, visit)?;
        self.reverse_norm(Part::AttnNorm, x, &d_normed, dx, visit)?;
        Ok(d_embedded)
    }

    /// What tokens say to the block, gated by the residual stream `x: [m, hidden]`.
    fn gated_embedded(&self, x: &[f32]) -> Result<GatedEmbedded> {
        let gate = self.product(Part::EmbeddedGate, x)?;
        let mut output = gate.clone();
        Cpu.gated(self.block.spec.activation(), &mut output, self.embedded);
        Ok(GatedEmbedded { gate, output })
    }

    /// Turns the gradient `dx` behind what tokens say into that at the residual stream `x` before
    /// it; gives the gradient at what they say.
    fn reverse_embedded(
        &self,
        x: &[f32],
        dx: &mut [f32],
        visit: &mut Visitor<'_>,
    ) -> Result<Vec<f32>> {
        let stage = Stage::EmbeddedOutput;
        let GatedEmbedded { mut gate, output } = self.gated_embedded(x)?;
        let branch = self.add_branch(stage, &output, &mut x.to_vec())?;
        let d_output = self.reverse_branch(stage, branch, dx, visit)?;
        visit(self.linear(Part::EmbeddedOutput, &output, &d_output))?;
        let mut d_gated = vec![0.0; output.len()];
        self.add_product(&mut d_gated, &d_output, Part::EmbeddedOutput)?;
        drop(d_output);
        let mut embedded = self.embedded.to_vec();
        let activation = self.block.spec.activation();
        elementwise::reverse_gated(activation, &mut gate, &mut embedded, &d_gated);
        let (d_gate, d_embedded) = (gate, embedded);
        visit(self.linear(Part::EmbeddedGate, x, &d_gate))?;
        self.add_product(dx, &d_gate, Part::EmbeddedGate)?;
        Ok(d_embedded)
    }

    /// Adds the gradient at the input `x` of a norm of the residual stream to `dx`, for the
    /// gradient `dy` at its output; that itself where no norm stands.
    pub(super) fn reverse_norm(
        &self,
        part: Part,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        visit: &mut Visitor<'_>,
    ) -> Result<()> {
        let Some(weight) = self.block.vectors.get(part) else {
            dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy);
            return Ok(());
        };
        let dw = reverse_norm(self.block.spec.norm, x, weight, self.decoder.norm_epsilon, dy, dx);
        visit(Gradient::Norm { block: Some(self.index), part, dw: &dw })
    }

    /// Adds what a stage's layer gives for its input `x` to the residual stream, with all norms.
    pub(super) fn add_branch(
        &self,
        stage: Stage,
        x: &[f32],
        residual: &mut Vec<f32>,
    ) -> Result<Branch> {
        let spec = &self.block.spec;
        let part = spec.output_layer(stage).expect("a stage that adds");
        let mut branch = Branch::default();
        let mut output = self.product(part, x)?;
        if let Some(norm) = spec.branch_norm(stage) {
            let normed = self.normed(norm, &output);
            branch.output = Some(std::mem::replace(&mut output, normed));
        }
        let scale = spec.scale_of(stage);
        residual.iter_mut().zip(output).for_each(|(x, output)| *x += scale * output);
        if let Some(norm) = spec.sum_norm(stage) {
            let normed = self.normed(norm, residual);
            branch.sum = Some(std::mem::replace(residual, normed));
        }
        Ok(branch)
    }

    /// The gradient at what a stage's layer gives, for the gradient `dx` at the residual stream to
    /// which it was added; that becomes the one before any norm of the sum.
    pub(super) fn reverse_branch<'d>(
        &self,
        stage: Stage,
        branch: Branch,
        dx: &'d mut [f32],
        visit: &mut Visitor<'_>,
    ) -> Result<Cow<'d, [f32]>> {
        let spec = &self.block.spec;
        if let (Some(part), Some(sum)) = (spec.sum_norm(stage), branch.sum) {
            let mut d_sum = vec![0.0; dx.len()];
            self.reverse_norm(part, &sum, dx, &mut d_sum, visit)?;
            dx.copy_from_slice(&d_sum);
        }
        let scale = spec.scale_of(stage);
        let dx: &'d [f32] = dx;
        let mut dy = Cow::Borrowed(dx);
        if scale != 1.0 {
            dy.to_mut().iter_mut().for_each(|dy| *dy *= scale);
        }
        if let (Some(part), Some(output)) = (spec.branch_norm(stage), branch.output) {
            let mut d_output = vec![0.0; output.len()];
            self.reverse_norm(part, &output, &dy, &mut d_output, visit)?;
            dy = Cow::Owned(d_output);
        }
        Ok(dy)
    }

    /// A layer without its bias, `[m, cols]` to `[m, rows]`.
    pub(super) fn product_without_bias(&self, part: Part, x: &[f32]) -> Result<Vec<f32>> {
        product::linear(self.precision, self.block.layers[part], x)
    }

    /// The bias of a layer, if it has one.
    pub(super) fn bias(&self, part: Part) -> Option<&[f32]> {
        Some(self.block.vectors.get(part.bias()?)?)
    }

    /// A layer with its bias, `[m, cols]` to `[m, rows]`.
    pub(super) fn product(&self, part: Part, x: &[f32]) -> Result<Vec<f32>> {
        let mut y = self.product_without_bias(part, x)?;
        if let Some(bias) = self.bias(part) {
            for y in y.chunks_exact_mut(bias.len()) {
                y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
        Ok(y)
    }

    /// Adds to the gradient `dx` at the inputs of a layer what `dy` at its outputs makes of it.
    pub(super) fn add_product(&self, dx: &mut [f32], dy: &[f32], part: Part) -> Result<()> {
        product::add(self.precision, dx, dy, self.block.layers[part])
    }

    pub(super) fn linear<'g>(&self, part: Part, x: &'g [f32], dy: &'g [f32]) -> Gradient<'g> {
        Gradient::Linear { block: self.index, part, x, dy }
    }

    pub(super) fn rms_normed(&self, weight: &[f32], x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        Cpu.rms_norm(x, weight, self.decoder.norm_epsilon, &mut out);
        out
    }

    /// The residual stream normed, or as it is where no norm stands.
    pub(super) fn normed(&self, part: Part, x: &[f32]) -> Vec<f32> {
        let vectors = &self.block.vectors;
        let bias = part.bias().and_then(|bias| vectors.get(bias));
        match (vectors.get(part), bias) {
            (None, _) => x.to_vec(),
            (Some(weight), None) => self.rms_normed(weight, x),
            (Some(weight), Some(bias)) => {
                let mut out = vec![0.0; x.len()];
                Cpu.layer_norm(x, weight, bias, self.decoder.norm_epsilon, &mut out);
                out
            }
        }
    }

    /// The stages of [`Block::forward`] up to the networks, but their last products.
    fn activations(&self, x: &[f32], shared: &Shared) -> Result<Activations> {
        let normed = self.normed(Part::AttnNorm, x);
        let mixed = self.mixed(&normed, shared)?;
        let mut middle = x.to_vec();
        let added = self.add_branch(Stage::MixerOutput, mixed.output(), &mut middle)?;
        let networks = self.networks(&middle)?;
        Ok(Activations { normed, mixed, added, middle, networks })
    }
}

/// What tokens say to the block.
struct GatedEmbedded {
    /// What the gate's layer gives, `[m, embedded]`.
    gate: Vec<f32>,
    /// `[m, embedded]`.
    output: Vec<f32>,
}

/// Adds the gradient at the input `x` of a norm to `dx`, for the gradient `dy` at its output, all
/// `[m, weight.len()]`; gives the gradient at its `weight`.
pub fn reverse_norm(
    norm: Norm,
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    dy: &[f32],
    dx: &mut [f32],
) -> Vec<f64> {
    let n = weight.len();
    let piece = TOKENS_PER_TASK * n;
    let reverse = match norm {
        Norm::Rms => elementwise::reverse_rms_norm,
        Norm::Layer => elementwise::reverse_layer_norm,
    };
    let pieces = dx.par_chunks_mut(piece).zip(x.par_chunks(piece)).zip(dy.par_chunks(piece));
    let sums = pieces.map(|((dx, x), dy)| {
        let mut d_weight = vec![0.0; n];
        let tokens = dx.chunks_exact_mut(n).zip(x.chunks_exact(n)).zip(dy.chunks_exact(n));
        for ((dx, x), dy) in tokens {
            reverse(x, weight, epsilon, dy, dx, &mut d_weight);
        }
        d_weight
    });
    add_up(sums.collect(), n)
}

/// The sum of vectors of `n` values, in their order.
pub fn add_up(parts: Vec<Vec<f64>>, n: usize) -> Vec<f64> {
    let mut sum = vec![0.0; n];
    for part in parts {
        sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    sum
}
