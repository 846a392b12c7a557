//! The mixers of a block: attention, also to latents, the gated delta net, short convolutions.

use std::ops::Range;

use rayon::prelude::*;
use slim_formats::{
    Part, Weight,
    arch::{Activation, Attention, DeltaNet, LatentAttention, Mixer, Norm, Values},
};
use slim_kernels::{
    AttentionCall, AttentionShape, DeltaCall, convolve, delta_net,
    linalg::{self, Mat, Precision, Store},
    sigmoid, softplus, weight,
};

use crate::{
    Positions, Result,
    block::{Block, Context, Passage, norm, scale},
};

impl Block<'_> {
    /// What the mixer makes of its `input: [m, hidden]`, the tokens of all `passages`; each goes on
    /// from its own state.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub(crate) fn mix(
        &self,
        context: Context<'_>,
        input: &[f32],
        passages: &mut [Passage<'_>],
    ) -> Result<Vec<f32>> {
        match &self.spec.mixer {
            Mixer::Attention(attention) => self.attend(attention, context, input, passages),
            Mixer::Latent(latent) => self.attend_to_latents(latent, context, input, passages),
            Mixer::DeltaNet(net) => self.delta_net(*net, context, input, passages),
            Mixer::Convolution(_) => self.short_convolution(context, input, passages),
        }
    }

    /// The turned keys, and the values, of attention to tokens at `positions`, one text after the
    /// other, with this `input: [m, hidden]`; both `[m, kv_heads * head_dim]`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    ///
    /// # Panics
    /// If the block has another mixer, or no keys of its own.
    pub fn keys_and_values<'p>(
        &self,
        context: Context<'_>,
        input: &[f32],
        positions: impl Iterator<Item = &'p Positions>,
    ) -> Result<[Vec<f32>; 2]> {
        let attention = self.spec.attention().expect("a block with attention");
        match attention.values {
            Values::NormedKeys => {
                let raw = self.linear(Part::AttnK, context, input)?;
                Ok(self.turned(attention, context, (raw, None), positions))
            }
            Values::Plain | Values::Normed => {
                let [raw, values] = self.linears([Part::AttnK, Part::AttnV], context, input)?;
                Ok(self.turned(attention, context, (raw, Some(values)), positions))
            }
        }
    }

    /// The same from what the layers of keys and values make.
    fn turned<'p>(
        &self,
        attention: &Attention,
        context: Context<'_>,
        (raw, values): (Vec<f32>, Option<Vec<f32>>),
        positions: impl Iterator<Item = &'p Positions>,
    ) -> [Vec<f32>; 2] {
        let &Attention { kv_heads, head_dim, rope, .. } = attention;
        let over_root = |x: &[f32]| norm(context, Norm::Rms, x, &vec![1.0; head_dim], None);
        let values = match (attention.values, values) {
            (Values::Plain, Some(values)) => values,
            (Values::Normed, Some(values)) => over_root(&values),
            _ => over_root(&raw),
        };
        let mut keys = self.normed_heads(Part::AttnKNorm, context, raw);
        if let Some(rope) = rope {
            let mut rest = &mut keys[..];
            for positions in positions {
                let of_text = positions.count * kv_heads * head_dim;
                let keys = rest.split_off_mut(..of_text).expect("keys of every text");
                context.backend.rope(keys, kv_heads, &positions.angles[rope]);
            }
        }
        [keys, values]
    }

    /// Queries or keys, normed if the block does that, `[m, heads * head_dim]`.
    fn normed_heads(&self, part: Part, context: Context<'_>, x: Vec<f32>) -> Vec<f32> {
        match self.vectors.get(part) {
            Some(weight) => norm(context, Norm::Rms, &x, weight, None),
            None => x,
        }
    }

    /// Attention of queries, keys and values made of `input`.
    fn attend(
        &self,
        attention: &Attention,
        context: Context<'_>,
        input: &[f32],
        passages: &mut [Passage<'_>],
    ) -> Result<Vec<f32>> {
        let &Attention { heads, rope, query_scaling, is_gated, shares, .. } = attention;
        let positions = passages.iter().map(|passage| passage.positions);
        let (q, [k, v]) = match (shares, attention.values) {
            (Some(_), _) => (self.linear(Part::AttnQ, context, input)?, [Vec::new(), Vec::new()]),
            (None, Values::NormedKeys) => {
                let [q, k] = self.linears([Part::AttnQ, Part::AttnK], context, input)?;
                (q, self.turned(attention, context, (k, None), positions))
            }
            (None, Values::Plain | Values::Normed) => {
                let parts = [Part::AttnQ, Part::AttnK, Part::AttnV];
                let [q, k, v] = self.linears(parts, context, input)?;
                (q, self.turned(attention, context, (k, Some(v)), positions))
            }
        };
        let mut q = self.normed_heads(Part::AttnQNorm, context, q);
        let mut out = vec![0.0; q.len()];
        let mut calls = Vec::with_capacity(passages.len());
        let (mut q, mut k, mut v, mut rest) = (&mut q[..], &k[..], &v[..], &mut out[..]);
        for Passage { positions, state, .. } in passages {
            let kv = state.cache();
            let shape = attention_shape(attention, positions.start, positions.count);
            let of_queries = shape.m * shape.query_stride();
            let my_q = q.split_off_mut(..of_queries).expect("queries of every passage");
            let out = rest.split_off_mut(..of_queries).expect("as long as the queries");
            if let Some(rope) = rope {
                context.backend.rope(my_q, heads, &positions.angles[rope]);
            }
            if let Some(scaling) = query_scaling {
                for (t, q) in my_q.chunks_exact_mut(shape.query_stride()).enumerate() {
                    scale(q, scaling.at(shape.start + t));
                }
            }
            if shares.is_none() {
                let of_keys = shape.m * shape.kv_stride();
                let my_k = k.split_off(..of_keys).expect("keys of every passage");
                let my_v = v.split_off(..of_keys).expect("values of every passage");
                kv.store(my_k, my_v, shape.start);
            }
            let sinks = self.vectors.get(Part::AttnSinks).map(Vec::as_slice);
            calls.push(AttentionCall { shape, q: my_q, kv, sinks, out });
        }
        context.backend.attention(&mut calls)?;
        drop(calls);
        if is_gated {
            let mut gate = self.linear(Part::AttnGate, context, input)?;
            sigmoid(&mut gate);
            multiply(&mut out, &gate);
        }
        Ok(out)
    }

    /// What queries of latent attention are made of, `[m, query_rank]`, or the `input` itself.
    pub(crate) fn query_input(&self, context: Context<'_>, input: &[f32]) -> Result<Vec<f32>> {
        let Some(weight) = self.vectors.get(Part::QueryDownNorm) else { return Ok(input.to_vec()) };
        let x = self.linear(Part::QueryDown, context, input)?;
        let mut normed = vec![0.0; x.len()];
        context.backend.rms_norm(&x, weight, LatentAttention::EPSILON, &mut normed);
        Ok(normed)
    }

    /// The normed latents, `[m, rank]`, and the keys that are to be turned, `[m, turned_dim]`.
    pub(crate) fn latents(
        &self,
        context: Context<'_>,
        input: &[f32],
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let weight = &self.vectors[Part::LatentNorm];
        let both = self.linear(Part::LatentDown, context, input)?;
        let width = both.len() / (input.len() / context.decoder.hidden_size);
        let [raw, keys] =
            [0..weight.len(), weight.len()..width].map(|columns| cut(&both, width, columns));
        let mut latents = vec![0.0; raw.len()];
        context.backend.rms_norm(&raw, weight, LatentAttention::EPSILON, &mut latents);
        Ok((latents, keys))
    }

    /// Attention to latents: queries go through the matrices of keys before, what comes of it
    /// through those of values behind, so that all heads have the same keys and values.
    fn attend_to_latents(
        &self,
        latent: &LatentAttention,
        context: Context<'_>,
        input: &[f32],
        passages: &mut [Passage<'_>],
    ) -> Result<Vec<f32>> {
        let &LatentAttention { heads, plain_dim, turned_dim, rank, .. } = latent;
        let (query_dim, kept) = (latent.query_dim(), latent.kept_dim());
        let q = self.query_input(context, input)?;
        let mut q = self.linear(Part::AttnQ, context, &q)?;
        if let Some(scaling) = latent.query_scaling {
            let positions = passages.iter().flat_map(|Passage { positions, .. }| {
                positions.start..positions.start + positions.count
            });
            for (position, q) in positions.zip(q.chunks_exact_mut(heads * query_dim)) {
                scale(q, scaling.at(position));
            }
        }
        let plain = cut(&q, query_dim, 0..plain_dim);
        let mut turned = cut(&q, query_dim, plain_dim..query_dim);
        let (latents, mut keys) = self.latents(context, input)?;
        let mut first = 0;
        for Passage { positions, .. } in passages.iter() {
            let tokens = first..first + positions.count;
            let angles = &positions.angles[0];
            let of_queries = tokens.start * heads * turned_dim..tokens.end * heads * turned_dim;
            context.backend.rope(&mut turned[of_queries], heads, angles);
            context.backend.rope(
                &mut keys[tokens.start * turned_dim..tokens.end * turned_dim],
                1,
                angles,
            );
            first = tokens.end;
        }
        let absorbed = by_heads(self.layers[Part::LatentKeys], heads, &plain, Side::Left)?;
        let q = side_by_side(&[(&absorbed, rank), (&turned, turned_dim)]);
        let k = side_by_side(&[(&latents, rank), (&keys, turned_dim)]);
        let v = side_by_side(&[(&latents, rank), (&vec![0.0; keys.len()], turned_dim)]);
        let mut out = vec![0.0; q.len()];
        let mut calls = Vec::with_capacity(passages.len());
        let (mut q, mut k, mut v, mut rest) = (&q[..], &k[..], &v[..], &mut out[..]);
        for Passage { positions, state, .. } in passages {
            let (start, m) = (positions.start, positions.count);
            let shape = AttentionShape {
                heads,
                kv_heads: 1,
                head_dim: kept,
                start,
                m,
                window: None,
                scale: latent.scale,
                softcap: None,
            };
            let kv = state.cache();
            let my_k = k.split_off(..m * kept).expect("keys of every passage");
            kv.store(my_k, v.split_off(..m * kept).expect("as many values"), start);
            let q = q.split_off(..m * heads * kept).expect("queries of every passage");
            let out = rest.split_off_mut(..m * heads * kept).expect("as long as the queries");
            calls.push(AttentionCall { shape, q, kv, sinks: None, out });
        }
        context.backend.attention(&mut calls)?;
        drop(calls);
        by_heads(self.layers[Part::LatentValues], heads, &cut(&out, kept, 0..rank), Side::Right)
    }

    /// The gated delta net.
    fn delta_net(
        &self,
        net: DeltaNet,
        context: Context<'_>,
        input: &[f32],
        passages: &mut [Passage<'_>],
    ) -> Result<Vec<f32>> {
        let qkv = [Part::AttnQ, Part::AttnK, Part::AttnV];
        let [q, k, v] = self.linears(qkv, context, input)?;
        let qkv = side_by_side(&[(&q, net.keys()), (&k, net.keys()), (&v, net.values())]);
        let mut beta = self.linear(Part::DeltaBeta, context, input)?;
        sigmoid(&mut beta);
        let mut decay = self.linear(Part::DeltaDecay, context, input)?;
        decays(&self.vectors[Part::DeltaDecayRate], &mut decay);
        let mut convolved = self.convolved(&qkv, passages);
        context.backend.activate(Activation::Silu, &mut convolved);

        let (width, heads) = (2 * net.keys() + net.values(), net.value_heads);
        let mut out = vec![0.0; input.len() / context.decoder.hidden_size * net.values()];
        let mut first = 0;
        for Passage { positions, state, .. } in passages {
            let tokens = first..first + positions.count;
            delta_net(DeltaCall {
                net,
                qkv: &convolved[tokens.start * width..tokens.end * width],
                decay: &decay[tokens.start * heads..tokens.end * heads],
                beta: &beta[tokens.start * heads..tokens.end * heads],
                state: &mut state.recurrent().matrices,
                out: &mut out[tokens.start * net.values()..tokens.end * net.values()],
            });
            first = tokens.end;
        }
        let normed = norm(context, Norm::Rms, &out, &self.vectors[Part::DeltaNorm], None);
        let mut gate = self.linear(Part::AttnGate, context, input)?;
        context.backend.gated(Activation::Silu, &mut gate, &normed);
        Ok(gate)
    }

    /// `c * convolution(b * u)`.
    fn short_convolution(
        &self,
        context: Context<'_>,
        input: &[f32],
        passages: &mut [Passage<'_>],
    ) -> Result<Vec<f32>> {
        let hidden = context.decoder.hidden_size;
        let bcu = self.linear(Part::ConvolutionInput, context, input)?;
        let third = |index: usize| cut(&bcu, 3 * hidden, index * hidden..(index + 1) * hidden);
        let mut gated = third(0);
        multiply(&mut gated, &third(2));
        let mut out = self.convolved(&gated, passages);
        multiply(&mut out, &third(1));
        Ok(out)
    }

    /// The convolution of `x: [m, channels]`, channel by channel.
    fn convolved(&self, x: &[f32], passages: &mut [Passage<'_>]) -> Vec<f32> {
        let taps = &self.vectors[Part::Convolution];
        let channels = taps.len() / self.spec.mixer.taps();
        let mut out = vec![0.0; x.len()];
        let mut first = 0;
        for Passage { positions, state, .. } in passages {
            let tokens = first * channels..(first + positions.count) * channels;
            let recent = &mut state.recurrent().recent;
            convolve(taps, channels, recent, &x[tokens.clone()], &mut out[tokens]);
            first += positions.count;
        }
        out
    }
}

/// The attention of `m` queries, the first of which stands at `start`.
pub fn attention_shape(attention: &Attention, start: usize, m: usize) -> AttentionShape {
    let &Attention { heads, kv_heads, head_dim, window, scale, softcap, .. } = attention;
    AttentionShape { heads, kv_heads, head_dim, start, m, window, scale, softcap }
}

/// On which side of a matrix `[rows, cols]` inputs stand: `x w` or `x w^T`.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Left,
    Right,
}

/// The products of `x: [m, heads * n]` with a matrix that has some rows for each head: inputs of a
/// head go through its rows only.
fn by_heads(weight: Weight<'_>, heads: usize, x: &[f32], side: Side) -> Result<Vec<f32>> {
    let (rows, cols) = weight::shape(weight);
    let head_rows = rows / heads;
    let (n, width) = if side == Side::Left { (head_rows, cols) } else { (cols, head_rows) };
    let m = x.len() / (heads * n);
    let of_head = |head: usize| -> Result<Vec<f32>> {
        let mut values = vec![0.0; head_rows * cols];
        weight::dequantize_rows(weight, head * head_rows..(head + 1) * head_rows, &mut values)?;
        let matrix = Mat::new(&values, head_rows, cols);
        let matrix = if side == Side::Left { matrix } else { matrix.transposed() };
        let x = Mat::strided(&x[head * n..], m, n, heads * n);
        let mut out = vec![0.0; m * width];
        linalg::matmul(Precision::Fine, &mut out, width, Store::REPLACE, x, matrix);
        Ok(out)
    };
    let of_heads: Vec<Vec<f32>> = (0..heads).into_par_iter().map(of_head).collect::<Result<_>>()?;
    let row = |t: usize| of_heads.iter().flat_map(move |head| &head[t * width..][..width]);
    Ok((0..m).flat_map(row).copied().collect())
}

/// Some columns of each row of a matrix that is `width` wide.
pub fn cut(x: &[f32], width: usize, columns: Range<usize>) -> Vec<f32> {
    x.chunks_exact(width).flat_map(|row| &row[columns.clone()]).copied().collect()
}

/// Rows of matrices, each given with its width, one behind the other.
pub fn side_by_side(matrices: &[(&[f32], usize)]) -> Vec<f32> {
    let rows = matrices.iter().find(|(_, width)| *width > 0);
    let rows = rows.map_or(0, |(values, width)| values.len() / width);
    let row = |row: usize| {
        matrices.iter().flat_map(move |&(values, width)| &values[row * width..][..width])
    };
    (0..rows).flat_map(row).copied().collect()
}

/// Turns what the decay layer of a delta net gives, `[m, value_heads]`, into what its states are
/// multiplied by, `exp(rate * softplus(x))`.
pub fn decays(rates: &[f32], x: &mut [f32]) {
    for x in x.chunks_exact_mut(rates.len()) {
        x.iter_mut().zip(rates).for_each(|(x, rate)| *x = (rate * softplus(*x)).exp());
    }
}

/// Multiplies each value by that of the other.
pub fn multiply(x: &mut [f32], factors: &[f32]) {
    x.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
}
