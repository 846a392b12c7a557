//! Mixers on their way forward and back.

use slim_formats::{
    Part,
    arch::{self, Activation, LatentAttention, Mixer, Norm, Values},
};
use slim_kernels::{AttentionShape, Backend, Cpu, RopeAngles, convolve, sigmoid};
use slim_runtime::{Positions, attention_shape, cut, decays, multiply, side_by_side};

use super::{
    Gradient, Visitor,
    attention::{Attention, Gradients},
    block::{Walk, reverse_norm},
    delta_net::{DeltaNet, DeltaTokens},
    elementwise,
    shared::{Shared, SharedKeys},
};
use crate::Result;

/// The activations of a mixer's `m` tokens.
pub enum Mixed {
    /// Of attention.
    Attention(Attended),
    /// Of latent attention.
    Latent(OfLatents),
    /// Of a gated delta net.
    DeltaNet(Asked),
    /// Of a short convolution.
    Convolution(Convolved),
}

/// Of attention.
pub struct Attended {
    q: Turned,
    /// Of a block that attends to keys of another, those.
    k: Turned,
    /// The same of values, `[m, kv_heads * head_dim]`.
    v: Turned,
    /// What attention gives and what it is gated by, where it is, `[m, heads * head_dim]`.
    gated: Option<[Vec<f32>; 2]>,
    /// `[m, heads * head_dim]`.
    output: Vec<f32>,
}

/// Of latent attention, with keys and values of each head. All heads are padded to one size.
pub struct OfLatents {
    /// What queries are made of, before its norm and behind it, `[m, query_rank]`.
    down: Option<[Vec<f32>; 2]>,
    /// What the latents' layer gives, before their norm, `[m, rank]`.
    raw: Vec<f32>,
    /// `[m, rank]`.
    latents: Vec<f32>,
    /// `[m, heads * padded]`.
    q: Vec<f32>,
    /// `[m, heads * padded]`.
    k: Vec<f32>,
    /// `[m, heads * padded]`.
    v: Vec<f32>,
    /// `[m, heads * padded]`.
    padded: Vec<f32>,
    /// `[m, heads * value_dim]`.
    output: Vec<f32>,
}

/// Of a gated delta net.
pub struct Asked {
    /// Behind the convolution, before its SiLU, `[m, 2 * keys + values]`.
    convolved: Vec<f32>,
    tokens: DeltaTokens,
    /// What the decay layer gives, `[m, value_heads]`.
    raw_decay: Vec<f32>,
    /// What the net gives, before the norm, `[m, values]`.
    asked: Vec<f32>,
    /// Behind the norm, `[m, values]`.
    normed: Vec<f32>,
    /// What the gate's layer gives, `[m, values]`.
    gate: Vec<f32>,
    /// `[m, values]`.
    output: Vec<f32>,
}

/// Of a short convolution.
pub struct Convolved {
    /// What the input layer gives, `[m, 3 * hidden]`.
    bcu: Vec<f32>,
    /// What the convolution gives, `[m, hidden]`.
    convolved: Vec<f32>,
    /// `[m, hidden]`.
    output: Vec<f32>,
}

impl Mixed {
    /// What the mixer gives.
    pub fn output(&self) -> &[f32] {
        match self {
            Self::Attention(Attended { output, .. })
            | Self::Latent(OfLatents { output, .. })
            | Self::DeltaNet(Asked { output, .. })
            | Self::Convolution(Convolved { output, .. }) => output,
        }
    }

    /// The turned keys, and the values, of attention.
    ///
    /// # Panics
    /// If it is of another mixer.
    pub fn into_keys_and_values(self) -> (Vec<f32>, Vec<f32>) {
        let Self::Attention(Attended { k, v, .. }) = self else { panic!("it is no attention") };
        (k.turned, v.turned)
    }
}

/// Queries, keys or values, `[m, heads * head_dim]`.
struct Turned {
    /// As their layer gives them, if they are normed.
    raw: Option<Vec<f32>>,
    /// As attention takes them.
    turned: Vec<f32>,
}

impl Walk<'_> {
    /// What the mixer makes of its `input: [m, hidden]`.
    pub fn mixed(&self, input: &[f32], shared: &Shared) -> Result<Mixed> {
        Ok(match self.block.spec.mixer {
            Mixer::Attention(_) => Mixed::Attention(self.attended(input, shared)?),
            Mixer::Latent(latent) => Mixed::Latent(self.of_latents(&latent, input)?),
            Mixer::DeltaNet(net) => Mixed::DeltaNet(self.asked(net, input)?),
            Mixer::Convolution(_) => Mixed::Convolution(self.convolved_input(input)?),
        })
    }

    /// Adds the gradient at the mixer's `input` to `d_input`, for the gradient `dy` at what it
    /// gives.
    pub fn reverse_mixer(
        &self,
        mixed: Mixed,
        input: &[f32],
        dy: Vec<f32>,
        d_input: &mut [f32],
        shared: &mut Shared,
        visit: &mut Visitor<'_>,
    ) -> Result<()> {
        let of_layers = match mixed {
            Mixed::Attention(attended) => self.reverse_attended(attended, dy, shared, visit)?,
            Mixed::Latent(of_latents) => self.reverse_latents(of_latents, &dy, visit)?,
            Mixed::DeltaNet(asked) => self.reverse_asked(asked, dy, visit)?,
            Mixed::Convolution(convolved) => self.reverse_convolved(&convolved, &dy),
        };
        for (part, dy) in &of_layers {
            if !part.stays_precise() {
                visit(self.linear(*part, input, dy))?;
            }
        }
        for (part, dy) in &of_layers {
            self.add_product(d_input, dy, *part)?;
        }
        Ok(())
    }

    /// # Panics
    /// If the block has another mixer.
    fn attention(&self) -> &arch::Attention {
        self.block.spec.attention().expect("a block with attention")
    }

    fn attended(&self, input: &[f32], shared: &Shared) -> Result<Attended> {
        let angles = self.angles();
        let angles = angles.as_ref();
        let q = self.turned(self.product(Part::AttnQ, input)?, Part::AttnQNorm, angles);
        let (k, v) = match self.attention().shares {
            Some(block) => {
                let SharedKeys { k, v, .. } = shared.of(block);
                let kept = |x: &Vec<f32>| Turned { raw: None, turned: x.clone() };
                (kept(k), kept(v))
            }
            None => {
                let k = self.turned(self.product(Part::AttnK, input)?, Part::AttnKNorm, angles);
                let v = self.values(input, &k)?;
                (k, v)
            }
        };
        let mut output = self.core(&q, &k, &v).forward();
        let gated = match self.attention().is_gated {
            false => None,
            true => {
                let mut gate = self.product(Part::AttnGate, input)?;
                sigmoid(&mut gate);
                let plain = output.clone();
                multiply(&mut output, &gate);
                Some([plain, gate])
            }
        };
        Ok(Attended { q, k, v, gated, output })
    }

    /// The values of attention, whose keys are `k`.
    fn values(&self, input: &[f32], k: &Turned) -> Result<Turned> {
        let raw = match self.attention().values {
            Values::Plain => {
                return Ok(Turned { raw: None, turned: self.product(Part::AttnV, input)? });
            }
            Values::Normed => self.product(Part::AttnV, input)?,
            Values::NormedKeys => k.raw.clone().expect("keys that are normed"),
        };
        let turned = self.rms_normed(&vec![1.0; self.attention().head_dim], &raw);
        Ok(Turned { raw: Some(raw), turned })
    }

    fn core<'a>(&'a self, q: &'a Turned, k: &'a Turned, v: &'a Turned) -> Attention<'a> {
        let shape = attention_shape(self.attention(), 0, self.context);
        let sinks = self.block.vectors.get(Part::AttnSinks).map(Vec::as_slice);
        let (q, k, v) = (&q.turned, &k.turned, &v.turned);
        Attention { precision: self.precision, shape, q, k, v, sinks }
    }

    /// The gradients at the outputs of the mixer's layers.
    fn reverse_attended(
        &self,
        attended: Attended,
        mut dy: Vec<f32>,
        shared: &mut Shared,
        visit: &mut Visitor<'_>,
    ) -> Result<Vec<(Part, Vec<f32>)>> {
        let Attended { q, k, v, gated, output } = attended;
        let angles = self.angles();
        let (output, d_gate) = match gated {
            None => (output, None),
            Some([plain, gate]) => {
                // y = plain * gate, and the slope of a sigmoid is gate * (1 - gate).
                let pairs = output.iter().zip(&gate).zip(&dy);
                let d_gate = pairs.map(|((y, gate), dy)| dy * y * (1.0 - gate)).collect();
                multiply(&mut dy, &gate);
                (plain, Some((Part::AttnGate, d_gate)))
            }
        };
        let Gradients { q: d_q, k: mut d_k, v: mut d_v } =
            self.core(&q, &k, &v).reverse(&output, &dy);
        let d_q = self.reverse_turned(Part::AttnQNorm, q, d_q, angles.as_ref(), visit)?;
        let mut of_layers = vec![(Part::AttnQ, d_q)];
        match self.attention().shares {
            Some(block) => shared.add(block, &d_k, &d_v),
            None => {
                if self.decoder.is_shared(self.index) {
                    let of_others = shared.of(self.index);
                    add(&mut d_k, &of_others.d_k);
                    add(&mut d_v, &of_others.d_v);
                }
                let d_v = self.reverse_values(&v, d_v);
                let mut d_k =
                    self.reverse_turned(Part::AttnKNorm, k, d_k, angles.as_ref(), visit)?;
                match self.attention().values {
                    Values::NormedKeys => {
                        add(&mut d_k, &d_v);
                        of_layers.push((Part::AttnK, d_k));
                    }
                    Values::Plain | Values::Normed => {
                        of_layers.extend([(Part::AttnK, d_k), (Part::AttnV, d_v)]);
                    }
                }
            }
        }
        Ok(of_layers.into_iter().chain(d_gate).collect())
    }

    /// The gradient at what values are made of, for the gradient `dy` at them.
    fn reverse_values(&self, v: &Turned, dy: Vec<f32>) -> Vec<f32> {
        let Some(raw) = &v.raw else { return dy };
        let mut dx = vec![0.0; raw.len()];
        let ones = vec![1.0; self.attention().head_dim];
        reverse_norm(Norm::Rms, raw, &ones, self.decoder.norm_epsilon, &dy, &mut dx);
        dx
    }

    fn of_latents(&self, latent: &LatentAttention, input: &[f32]) -> Result<OfLatents> {
        let &LatentAttention { heads, plain_dim, turned_dim, value_dim, rank, .. } = latent;
        let vectors = &self.block.vectors;
        let normed = |weight: &[f32], x: &[f32]| {
            let mut out = vec![0.0; x.len()];
            Cpu.rms_norm(x, weight, LatentAttention::EPSILON, &mut out);
            out
        };
        let down = match vectors.get(Part::QueryDownNorm) {
            None => None,
            Some(weight) => {
                let raw = self.product(Part::QueryDown, input)?;
                let normed = normed(weight, &raw);
                Some([raw, normed])
            }
        };
        let mut q = self.product(Part::AttnQ, down.as_ref().map_or(input, |[_, normed]| normed))?;
        self.scale_queries(&mut q);
        let both = self.product(Part::LatentDown, input)?;
        let raw = cut(&both, latent.kept_dim(), 0..rank);
        let mut shared = cut(&both, latent.kept_dim(), rank..latent.kept_dim());
        let latents = normed(&vectors[Part::LatentNorm], &raw);
        let keys = self.product(Part::LatentKeys, &latents)?;
        let values = self.product(Part::LatentValues, &latents)?;

        let angles = self.angles().expect("latent attention turns");
        let mut turned = cut(&q, latent.query_dim(), plain_dim..latent.query_dim());
        rotate(&mut turned, heads, &angles);
        rotate(&mut shared, 1, &angles);
        let of_all: Vec<f32> =
            shared.chunks_exact(turned_dim).flat_map(|key| key.repeat(heads)).collect();
        let plain = cut(&q, latent.query_dim(), 0..plain_dim);
        let of_heads = turned.len() / turned_dim;
        let padding = |dim: usize| {
            (vec![0.0; of_heads * (padded_dim(latent) - dim)], padded_dim(latent) - dim)
        };
        let (more_keys, more_values) = (padding(latent.query_dim()), padding(value_dim));
        let in_columns = |plain: &[f32], turned: &[f32]| {
            side_by_side(&[(plain, plain_dim), (turned, turned_dim), (&more_keys.0, more_keys.1)])
        };
        let (q, k) = (in_columns(&plain, &turned), in_columns(&keys, &of_all));
        let v = side_by_side(&[(&values, value_dim), (&more_values.0, more_values.1)]);
        let padded = self.core_of_latents(latent, &q, &k, &v).forward();
        let output = cut(&padded, padded_dim(latent), 0..value_dim);
        Ok(OfLatents { down, raw, latents, q, k, v, padded, output })
    }

    fn core_of_latents<'a>(
        &'a self,
        latent: &LatentAttention,
        q: &'a [f32],
        k: &'a [f32],
        v: &'a [f32],
    ) -> Attention<'a> {
        let shape = AttentionShape {
            heads: latent.heads,
            kv_heads: latent.heads,
            head_dim: padded_dim(latent),
            start: 0,
            m: self.context,
            window: None,
            scale: latent.scale,
            softcap: None,
        };
        Attention { precision: self.precision, shape, q, k, v, sinks: None }
    }

    /// The gradients at the outputs of the layers that take in the mixer's `input`; those of the
    /// others go to the visitor.
    fn reverse_latents(
        &self,
        of: OfLatents,
        dy: &[f32],
        visit: &mut Visitor<'_>,
    ) -> Result<Vec<(Part, Vec<f32>)>> {
        let Mixer::Latent(latent) = self.block.spec.mixer else { panic!("latent attention") };
        let LatentAttention { heads, plain_dim, turned_dim, value_dim, rank, .. } = latent;
        let (width, vectors) = (padded_dim(&latent), &self.block.vectors);
        let OfLatents { down, raw, latents, q, k, v, padded, .. } = of;
        let padding = vec![0.0; dy.len() / value_dim * (width - value_dim)];
        let dy = side_by_side(&[(dy, value_dim), (&padding, width - value_dim)]);
        let core = self.core_of_latents(&latent, &q, &k, &v);
        let Gradients { q: d_q, k: d_k, v: d_v } = core.reverse(&padded, &dy);
        let back = reversed(&self.angles().expect("latent attention turns"));
        let turned = plain_dim..latent.query_dim();
        let mut d_turned = cut(&d_q, width, turned.clone());
        rotate(&mut d_turned, heads, &back);
        let of_heads = cut(&d_k, width, turned);
        let mut d_shared = vec![0.0; of_heads.len() / heads];
        for (sum, heads) in
            d_shared.chunks_exact_mut(turned_dim).zip(of_heads.chunks_exact(heads * turned_dim))
        {
            for head in heads.chunks_exact(turned_dim) {
                sum.iter_mut().zip(head).for_each(|(sum, part)| *sum += part);
            }
        }
        rotate(&mut d_shared, 1, &back);

        let mut d_latents = vec![0.0; latents.len()];
        for (part, dy) in [
            (Part::LatentKeys, cut(&d_k, width, 0..plain_dim)),
            (Part::LatentValues, cut(&d_v, width, 0..value_dim)),
        ] {
            visit(self.linear(part, &latents, &dy))?;
            self.add_product(&mut d_latents, &dy, part)?;
        }
        let mut reverse_norm = |part: Part, x: &[f32], dy: &[f32]| -> Result<Vec<f32>> {
            let mut dx = vec![0.0; x.len()];
            let epsilon = LatentAttention::EPSILON;
            let dw = reverse_norm(Norm::Rms, x, &vectors[part], epsilon, dy, &mut dx);
            visit(Gradient::Norm { block: Some(self.index), part, dw: &dw })?;
            Ok(dx)
        };
        let d_raw = reverse_norm(Part::LatentNorm, &raw, &d_latents)?;
        let d_down = side_by_side(&[(&d_raw, rank), (&d_shared, turned_dim)]);
        let plain = cut(&d_q, width, 0..plain_dim);
        let mut d_q = side_by_side(&[(&plain, plain_dim), (&d_turned, turned_dim)]);
        self.scale_queries(&mut d_q);
        let of_query = match down {
            None => (Part::AttnQ, d_q),
            Some([raw, normed]) => {
                let mut d_normed = vec![0.0; normed.len()];
                self.add_product(&mut d_normed, &d_q, Part::AttnQ)?;
                let d_raw = reverse_norm(Part::QueryDownNorm, &raw, &d_normed)?;
                visit(self.linear(Part::AttnQ, &normed, &d_q))?;
                (Part::QueryDown, d_raw)
            }
        };
        Ok(vec![of_query, (Part::LatentDown, d_down)])
    }

    fn asked(&self, net: arch::DeltaNet, input: &[f32]) -> Result<Asked> {
        let vectors = &self.block.vectors;
        let (q, k) = (self.product(Part::AttnQ, input)?, self.product(Part::AttnK, input)?);
        let v = self.product(Part::AttnV, input)?;
        let qkv = side_by_side(&[(&q, net.keys()), (&k, net.keys()), (&v, net.values())]);
        let convolved = self.convolution(&qkv);
        let mut qkv = convolved.clone();
        Cpu.activate(Activation::Silu, &mut qkv);
        let mut beta = self.product(Part::DeltaBeta, input)?;
        sigmoid(&mut beta);
        let raw_decay = self.product(Part::DeltaDecay, input)?;
        let mut decay = raw_decay.clone();
        decays(&vectors[Part::DeltaDecayRate], &mut decay);
        let tokens = DeltaTokens { qkv, decay, beta };
        let asked = DeltaNet { net, context: self.context }.forward(&tokens);
        let normed = self.rms_normed(&vectors[Part::DeltaNorm], &asked);
        let gate = self.product(Part::AttnGate, input)?;
        let mut output = gate.clone();
        Cpu.gated(Activation::Silu, &mut output, &normed);
        Ok(Asked { convolved, tokens, raw_decay, asked, normed, gate, output })
    }

    fn reverse_asked(
        &self,
        asked: Asked,
        dy: Vec<f32>,
        visit: &mut Visitor<'_>,
    ) -> Result<Vec<(Part, Vec<f32>)>> {
        let Asked { convolved, tokens, raw_decay, asked, mut normed, mut gate, .. } = asked;
        let Mixer::DeltaNet(net) = self.block.spec.mixer else { panic!("a delta net") };
        elementwise::reverse_gated(Activation::Silu, &mut gate, &mut normed, &dy);
        let (d_gate, d_normed, mut d_asked) = (gate, normed, dy);
        d_asked.fill(0.0);
        let (part, epsilon) = (Part::DeltaNorm, self.decoder.norm_epsilon);
        let weight = &self.block.vectors[part];
        let dw = reverse_norm(Norm::Rms, &asked, weight, epsilon, &d_normed, &mut d_asked);
        visit(Gradient::Norm { block: Some(self.index), part, dw: &dw })?;

        let mut of_tokens = DeltaNet { net, context: self.context }.reverse(&tokens, &d_asked);
        for (d_beta, beta) in of_tokens.beta.iter_mut().zip(&tokens.beta) {
            *d_beta *= beta * (1.0 - beta);
        }
        // decay = exp(rate * softplus(x)), and the slope of a softplus is the sigmoid.
        let mut slopes = raw_decay;
        sigmoid(&mut slopes);
        let rates = self.block.vectors[Part::DeltaDecayRate].iter().cycle();
        let factors = slopes.iter().zip(rates).zip(&tokens.decay);
        for (d_decay, ((slope, rate), decay)) in of_tokens.decay.iter_mut().zip(factors) {
            *d_decay *= slope * rate * decay;
        }
        elementwise::reverse_activation(Activation::Silu, &convolved, &mut of_tokens.qkv);
        let d_qkv = self.reverse_convolution(&of_tokens.qkv);
        let all = 2 * net.keys() + net.values();
        let columns = |first: usize, width: usize| cut(&d_qkv, all, first..first + width);
        Ok(vec![
            (Part::AttnQ, columns(0, net.keys())),
            (Part::AttnK, columns(net.keys(), net.keys())),
            (Part::AttnV, columns(2 * net.keys(), net.values())),
            (Part::AttnGate, d_gate),
            (Part::DeltaBeta, of_tokens.beta),
            (Part::DeltaDecay, of_tokens.decay),
        ])
    }

    fn convolved_input(&self, input: &[f32]) -> Result<Convolved> {
        let bcu = self.product(Part::ConvolutionInput, input)?;
        let mut gated = self.third(&bcu, 0);
        multiply(&mut gated, &self.third(&bcu, 2));
        let convolved = self.convolution(&gated);
        let mut output = convolved.clone();
        multiply(&mut output, &self.third(&bcu, 1));
        Ok(Convolved { bcu, convolved, output })
    }

    fn reverse_convolved(&self, of: &Convolved, dy: &[f32]) -> Vec<(Part, Vec<f32>)> {
        let hidden = self.decoder.hidden_size;
        let [b, c, u] = [0, 1, 2].map(|index| self.third(&of.bcu, index));
        let mut d_c = of.convolved.clone();
        multiply(&mut d_c, dy);
        let mut d_convolved = c;
        multiply(&mut d_convolved, dy);
        let d_gated = self.reverse_convolution(&d_convolved);
        let (mut d_b, mut d_u) = (u, b);
        multiply(&mut d_b, &d_gated);
        multiply(&mut d_u, &d_gated);
        let d_bcu = side_by_side(&[(&d_b, hidden), (&d_c, hidden), (&d_u, hidden)]);
        vec![(Part::ConvolutionInput, d_bcu)]
    }

    /// A third of the channels of what the input layer of a short convolution gives.
    fn third(&self, bcu: &[f32], index: usize) -> Vec<f32> {
        let hidden = self.decoder.hidden_size;
        cut(bcu, 3 * hidden, index * hidden..(index + 1) * hidden)
    }

    /// The convolution of all sequences.
    fn convolution(&self, x: &[f32]) -> Vec<f32> {
        let (taps, channels) = self.taps();
        let mut out = vec![0.0; x.len()];
        let len = self.context * channels;
        for (x, out) in x.chunks_exact(len).zip(out.chunks_exact_mut(len)) {
            convolve(taps, channels, &mut vec![0.0; taps.len() - channels], x, out);
        }
        out
    }

    /// The gradient at the inputs of the convolution: each output has `taps[i]` of the input
    /// `taps - 1 - i` tokens before.
    fn reverse_convolution(&self, dy: &[f32]) -> Vec<f32> {
        let (taps, channels) = self.taps();
        let mut dx = vec![0.0; dy.len()];
        let len = self.context * channels;
        for (dx, dy) in dx.chunks_exact_mut(len).zip(dy.chunks_exact(len)) {
            for (back, taps) in taps.chunks_exact(channels).rev().enumerate() {
                for (dx, dy) in
                    dx.chunks_exact_mut(channels).zip(dy.chunks_exact(channels).skip(back))
                {
                    dx.iter_mut().zip(taps).zip(dy).for_each(|((dx, tap), dy)| *dx += tap * dy);
                }
            }
        }
        dx
    }

    /// `[taps, channels]`, and how many channels there are.
    fn taps(&self) -> (&[f32], usize) {
        let taps = &self.block.vectors[Part::Convolution];
        (taps, taps.len() / self.block.spec.mixer.taps())
    }

    /// Queries or keys as attention takes them.
    fn turned(&self, raw: Vec<f32>, norm: Part, angles: Option<&RopeAngles>) -> Turned {
        let (raw, mut turned) = match self.block.vectors.get(norm) {
            Some(weight) => {
                let normed = self.rms_normed(weight, &raw);
                (Some(raw), normed)
            }
            None => (None, raw),
        };
        self.turn(&mut turned, norm, angles);
        if norm == Part::AttnQNorm {
            self.scale_queries(&mut turned);
        }
        Turned { raw, turned }
    }

    /// The gradient at what the layer of queries or keys gives, for the gradient `dy` at what
    /// attention takes.
    fn reverse_turned(
        &self,
        norm: Part,
        of: Turned,
        mut dy: Vec<f32>,
        angles: Option<&RopeAngles>,
        visit: &mut Visitor<'_>,
    ) -> Result<Vec<f32>> {
        if norm == Part::AttnQNorm {
            self.scale_queries(&mut dy);
        }
        self.turn(&mut dy, norm, angles.map(reversed).as_ref());
        let (Some(raw), Some(weight)) = (of.raw, self.block.vectors.get(norm)) else {
            return Ok(dy);
        };
        let mut dx = vec![0.0; raw.len()];
        let epsilon = self.decoder.norm_epsilon;
        let dw = reverse_norm(Norm::Rms, &raw, weight, epsilon, &dy, &mut dx);
        visit(Gradient::Norm { block: Some(self.index), part: norm, dw: &dw })?;
        Ok(dx)
    }

    /// Turns the heads of queries or keys by the angles of one sequence.
    fn turn(&self, x: &mut [f32], norm: Part, angles: Option<&RopeAngles>) {
        let Some(angles) = angles else { return };
        let attention = self.attention();
        let heads = if norm == Part::AttnQNorm { attention.heads } else { attention.kv_heads };
        rotate(x, heads, angles);
    }

    fn scale_queries(&self, q: &mut [f32]) {
        let (scaling, width) = match &self.block.spec.mixer {
            Mixer::Attention(of) => (of.query_scaling, of.heads * of.head_dim),
            Mixer::Latent(of) => (of.query_scaling, of.heads * of.query_dim()),
            Mixer::DeltaNet(_) | Mixer::Convolution(_) => return,
        };
        let Some(scaling) = scaling else { return };
        for (t, q) in q.chunks_exact_mut(width).enumerate() {
            let scale = scaling.at(t % self.context);
            q.iter_mut().for_each(|q| *q *= scale);
        }
    }

    /// The rotation angles of one sequence, if the block turns anything.
    fn angles(&self) -> Option<RopeAngles> {
        let rope = match &self.block.spec.mixer {
            Mixer::Latent(_) => 0,
            _ => self.attention().rope?,
        };
        let mut positions = Positions::new(self.decoder, 0, self.context, self.context);
        Some(positions.angles.swap_remove(rope))
    }
}

fn add(sum: &mut [f32], part: &[f32]) {
    sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
}

/// Channels of a head when queries, keys and values are of one size.
fn padded_dim(latent: &LatentAttention) -> usize {
    latent.query_dim().max(latent.value_dim)
}

/// The angles that turn back.
fn reversed(angles: &RopeAngles) -> RopeAngles {
    let sin = angles.sin.iter().map(|sin| -sin).collect();
    RopeAngles { sin, ..angles.clone() }
}

/// Rotates `x: [sequences, context, heads * head_dim]` by the angles of one sequence.
fn rotate(x: &mut [f32], heads: usize, angles: &RopeAngles) {
    let context = angles.cos.len() / angles.pairs;
    for sequence in x.chunks_exact_mut(context * heads * angles.head_dim) {
        Cpu.rope(sequence, heads, angles);
    }
}
