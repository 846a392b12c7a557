//! One block forward with all that its gradients need, then the reverse in mirrored order.

use rayon::prelude::*;
use slim_formats::{Decoder, Part};
use slim_kernels::{Backend, Cpu, RopeAngles, linalg::Precision};
use slim_runtime::{Block, Positions};

use super::{
    Gradient, Visitor,
    attention::{Attention, Gradients},
    elementwise, product,
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
}

/// The activations of a block; `m` is the number of tokens of all sequences.
struct Activations {
    /// `[m, hidden]`: input of `attn_q`, `attn_k`, `attn_v`.
    normed: Vec<f32>,
    /// `[m, heads * head_dim]`, rotated.
    q: Vec<f32>,
    /// `[m, kv_heads * head_dim]`, rotated.
    k: Vec<f32>,
    /// `[m, kv_heads * head_dim]`.
    v: Vec<f32>,
    /// `[m, heads * head_dim]`: input of `attn_output`.
    attended: Vec<f32>,
    /// `[m, hidden]`: the residual stream between attention and feed-forward network.
    middle: Vec<f32>,
    /// `[m, hidden]`: input of `ffn_gate`, `ffn_up`.
    ffn_input: Vec<f32>,
    /// `[m, ffn]`.
    gate: Vec<f32>,
    /// `[m, ffn]`.
    up: Vec<f32>,
    /// `[m, ffn]`: input of `ffn_down`.
    activation: Vec<f32>,
}

impl Walk<'_> {
    /// The output of the block for its input `x`; both `[m, hidden]`.
    pub fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        let Activations { mut middle, activation, .. } = self.activations(x, &self.angles())?;
        let added = self.product(Part::FfnDown, &activation)?;
        middle.iter_mut().zip(added).for_each(|(middle, added)| *middle += added);
        Ok(middle)
    }

    /// Turns the gradient `dx` at the block's output into that at its input `x`; both
    /// `[m, hidden]`.
    pub fn reverse(&self, x: &[f32], dx: &mut [f32], visit: &mut Visitor<'_>) -> Result<()> {
        let Self { precision, block, context, .. } = *self;
        let spec = &block.spec;
        let angles = self.angles();
        let Activations {
            normed,
            q,
            k,
            v,
            attended,
            middle,
            ffn_input,
            mut gate,
            mut up,
            activation,
        } = self.activations(x, &angles)?;

        visit(self.linear(Part::FfnDown, &activation, dx))?;
        let mut d_activation = activation;
        d_activation.fill(0.0);
        self.add_product(&mut d_activation, dx, Part::FfnDown)?;
        reverse_swiglu(&mut gate, &mut up, &d_activation);
        drop(d_activation);
        let (d_gate, d_up) = (gate, up);

        visit(self.linear(Part::FfnGate, &ffn_input, &d_gate))?;
        visit(self.linear(Part::FfnUp, &ffn_input, &d_up))?;
        let mut d_ffn_input = vec![0.0; x.len()];
        self.add_product(&mut d_ffn_input, &d_gate, Part::FfnGate)?;
        self.add_product(&mut d_ffn_input, &d_up, Part::FfnUp)?;
        self.reverse_norm(Part::FfnNorm, &middle, &d_ffn_input, dx, visit)?;

        visit(self.linear(Part::AttnOutput, &attended, dx))?;
        let mut d_attended = vec![0.0; attended.len()];
        self.add_product(&mut d_attended, dx, Part::AttnOutput)?;
        let attention = Attention::new(precision, spec, context, &q, &k, &v);
        let Gradients { q: mut d_q, k: mut d_k, v: d_v } =
            attention.reverse(&attended, &d_attended);
        let back = RopeAngles { sin: angles.sin.iter().map(|sin| -sin).collect(), ..angles };
        rotate(&mut d_q, spec.attention.heads, &back);
        rotate(&mut d_k, spec.attention.kv_heads, &back);

        visit(self.linear(Part::AttnQ, &normed, &d_q))?;
        visit(self.linear(Part::AttnK, &normed, &d_k))?;
        visit(self.linear(Part::AttnV, &normed, &d_v))?;
        let mut d_normed = vec![0.0; x.len()];
        self.add_product(&mut d_normed, &d_q, Part::AttnQ)?;
        self.add_product(&mut d_normed, &d_k, Part::AttnK)?;
        self.add_product(&mut d_normed, &d_v, Part::AttnV)?;
        self.reverse_norm(Part::AttnNorm, x, &d_normed, dx, visit)
    }

    /// Adds the gradient at the input `x` of a norm to `dx`, for the gradient `dy` at its output.
    fn reverse_norm(
        &self,
        part: Part,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        visit: &mut Visitor<'_>,
    ) -> Result<()> {
        let (weight, epsilon) = (&self.block.vectors[part], self.decoder.norm_epsilon);
        let dw = reverse_rms_norm(x, weight, epsilon, dy, dx);
        visit(Gradient::Norm { block: Some(self.index), part, dw: &dw })
    }

    /// The rotation angles of one sequence.
    fn angles(&self) -> RopeAngles {
        let mut positions = Positions::new(self.decoder, 0, self.context);
        positions.angles.swap_remove(self.block.spec.attention.rope)
    }

    /// `[m, cols]` to `[m, rows]`.
    fn product(&self, part: Part, x: &[f32]) -> Result<Vec<f32>> {
        product::linear(self.precision, self.block.layers[part], x)
    }

    /// Adds to the gradient `dx` at the inputs of a layer what `dy` at its outputs makes of it.
    fn add_product(&self, dx: &mut [f32], dy: &[f32], part: Part) -> Result<()> {
        product::add(self.precision, dx, dy, self.block.layers[part])
    }

    fn linear<'g>(&self, part: Part, x: &'g [f32], dy: &'g [f32]) -> Gradient<'g> {
        Gradient::Linear { block: self.index, part, x, dy }
    }

    /// The stages of [`Block::forward`], but the last product.
    fn activations(&self, x: &[f32], angles: &RopeAngles) -> Result<Activations> {
        let Self { precision, decoder, block, context, .. } = *self;
        let spec = &block.spec;
        let norm = |x: &[f32], part: Part| {
            let mut out = vec![0.0; x.len()];
            Cpu.rms_norm(x, &block.vectors[part], decoder.norm_epsilon, &mut out);
            out
        };
        let normed = norm(x, Part::AttnNorm);
        let mut q = self.product(Part::AttnQ, &normed)?;
        let mut k = self.product(Part::AttnK, &normed)?;
        let v = self.product(Part::AttnV, &normed)?;
        rotate(&mut q, spec.attention.heads, angles);
        rotate(&mut k, spec.attention.kv_heads, angles);
        let attended = Attention::new(precision, spec, context, &q, &k, &v).forward();
        let mut middle = self.product(Part::AttnOutput, &attended)?;
        middle.iter_mut().zip(x).for_each(|(middle, x)| *middle += x);
        let ffn_input = norm(&middle, Part::FfnNorm);
        let gate = self.product(Part::FfnGate, &ffn_input)?;
        let up = self.product(Part::FfnUp, &ffn_input)?;
        let mut activation = gate.clone();
        Cpu.swiglu(&mut activation, &up);
        Ok(Activations { normed, q, k, v, attended, middle, ffn_input, gate, up, activation })
    }
}

/// Rotates `x: [sequences, context, heads * head_dim]` by the angles of one sequence.
fn rotate(x: &mut [f32], heads: usize, angles: &RopeAngles) {
    let context = angles.cos.len() / (angles.head_dim / 2);
    for sequence in x.chunks_exact_mut(context * heads * angles.head_dim) {
        Cpu.rope(sequence, heads, angles);
    }
}

/// Replaces `gate` and `up` by their gradients, for the gradient `dy` at `silu(gate) * up`; all of
/// one length.
fn reverse_swiglu(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    const PIECE: usize = 1 << 12;
    let pieces = gate.par_chunks_mut(PIECE).zip(up.par_chunks_mut(PIECE)).zip(dy.par_chunks(PIECE));
    pieces.for_each(|((gate, up), dy)| elementwise::reverse_swiglu(gate, up, dy));
}

/// Adds the gradient at the input `x` of a norm to `dx`, for the gradient `dy` at its output, all
/// `[m, hidden]`; gives the gradient at its `weight`, `[hidden]`.
pub fn reverse_rms_norm(
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    dy: &[f32],
    dx: &mut [f32],
) -> Vec<f64> {
    let n = weight.len();
    let piece = TOKENS_PER_TASK * n;
    let pieces = dx.par_chunks_mut(piece).zip(x.par_chunks(piece)).zip(dy.par_chunks(piece));
    let sums = pieces.map(|((dx, x), dy)| {
        let mut d_weight = vec![0.0; n];
        let tokens = dx.chunks_exact_mut(n).zip(x.chunks_exact(n)).zip(dy.chunks_exact(n));
        for ((dx, x), dy) in tokens {
            elementwise::reverse_rms_norm(x, weight, epsilon, dy, dx, &mut d_weight);
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
