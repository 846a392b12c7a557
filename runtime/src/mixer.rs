//! The mixers of a block: attention, the gated delta net, short convolutions.

use slim_formats::{
    Part,
    arch::{Activation, Attention, DeltaNet, Mixer, Norm},
};
use slim_kernels::{
    AttentionCall, AttentionShape, DeltaCall, convolve, delta_net, sigmoid, softplus,
};

use crate::{
    Result,
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
            Mixer::DeltaNet(net) => self.delta_net(*net, context, input, passages),
            Mixer::Convolution(_) => self.short_convolution(context, input, passages),
        }
    }

    /// Queries or keys, normed if the block does that, `[m, heads * head_dim]`.
    fn queries_or_keys(
        &self,
        part: Part,
        norm_part: Part,
        context: Context<'_>,
        input: &[f32],
    ) -> Result<Vec<f32>> {
        let x = self.linear(part, context, input)?;
        Ok(match self.vectors.get(norm_part) {
            Some(weight) => norm(context, Norm::Rms, &x, weight, None),
            None => x,
        })
    }

    /// Attention of queries, keys and values made of `input`.
    fn attend(
        &self,
        attention: &Attention,
        context: Context<'_>,
        input: &[f32],
        passages: &mut [Passage<'_>],
    ) -> Result<Vec<f32>> {
        let &Attention { heads, kv_heads, rope, query_scaling, is_gated, .. } = attention;
        let mut q = self.queries_or_keys(Part::AttnQ, Part::AttnQNorm, context, input)?;
        let mut k = self.queries_or_keys(Part::AttnK, Part::AttnKNorm, context, input)?;
        let v = self.linear(Part::AttnV, context, input)?;
        let mut out = vec![0.0; q.len()];
        let mut calls = Vec::with_capacity(passages.len());
        let (mut q, mut k, mut v, mut rest) = (&mut q[..], &mut k[..], &v[..], &mut out[..]);
        for Passage { positions, state } in passages {
            let kv = state.cache();
            let shape = attention_shape(attention, positions.start, positions.count);
            let of_queries = shape.m * shape.query_stride();
            let of_keys = shape.m * shape.kv_stride();
            let my_q = q.split_off_mut(..of_queries).expect("queries of every passage");
            let my_k = k.split_off_mut(..of_keys).expect("keys of every passage");
            let my_v = v.split_off(..of_keys).expect("values of every passage");
            let out = rest.split_off_mut(..of_queries).expect("as long as the queries");
            if let Some(rope) = rope {
                let angles = &positions.angles[rope];
                context.backend.rope(my_q, heads, angles);
                context.backend.rope(my_k, kv_heads, angles);
            }
            if let Some(scaling) = query_scaling {
                for (t, q) in my_q.chunks_exact_mut(shape.query_stride()).enumerate() {
                    scale(q, scaling.at(shape.start + t));
                }
            }
            kv.store(my_k, my_v, shape.start);
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

    /// The gated delta net.
    fn delta_net(
        &self,
        net: DeltaNet,
        context: Context<'_>,
        input: &[f32],
        passages: &mut [Passage<'_>],
    ) -> Result<Vec<f32>> {
        let qkv = [Part::AttnQ, Part::AttnK, Part::AttnV];
        let qkv = qkv.map(|part| self.linear(part, context, input));
        let [q, k, v] = qkv;
        let qkv = side_by_side([(&q?, net.keys()), (&k?, net.keys()), (&v?, net.values())]);
        let mut beta = self.linear(Part::DeltaBeta, context, input)?;
        sigmoid(&mut beta);
        let mut decay = self.linear(Part::DeltaDecay, context, input)?;
        decays(&self.vectors[Part::DeltaDecayRate], &mut decay);
        let mut convolved = self.convolved(&qkv, passages);
        context.backend.activate(Activation::Silu, &mut convolved);

        let (width, heads) = (2 * net.keys() + net.values(), net.value_heads);
        let mut out = vec![0.0; input.len() / context.decoder.hidden_size * net.values()];
        let mut first = 0;
        for Passage { positions, state } in passages {
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
        let third = |index: usize| -> Vec<f32> {
            let tokens = bcu.chunks_exact(3 * hidden);
            tokens.flat_map(|token| &token[index * hidden..][..hidden]).copied().collect()
        };
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
        for Passage { positions, state } in passages {
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

/// Rows of matrices, each given with its width, one behind the other.
pub fn side_by_side<const N: usize>(matrices: [(&[f32], usize); N]) -> Vec<f32> {
    let rows = matrices[0].0.len() / matrices[0].1;
    let row = |row: usize| {
        matrices.into_iter().flat_map(move |(values, width)| &values[row * width..][..width])
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
