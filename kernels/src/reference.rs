//! The scalar oracle: plain loops, f64 sums. Nothing here may change to agree with a fast kernel.

use slim_formats::{Weight, arch::Activation};

use crate::{
    AttentionCall, Backend, Result, RopeAngles, check_matmul,
    weight::{dequantize_rows, shape},
};

/// Every operation as its formula reads.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scalar;

impl Backend for Scalar {
    fn matmul(&self, w: Weight<'_>, x: &[f32], m: usize, out: &mut [f32]) -> Result<()> {
        check_matmul(w, x, m, out)?;
        let (rows, cols) = shape(w);
        let mut row = vec![0.0; cols];
        for r in 0..rows {
            dequantize_rows(w, r..r + 1, &mut row)?;
            for t in 0..m {
                out[t * rows + r] = dot(&row, &x[t * cols..][..cols]) as f32;
            }
        }
        Ok(())
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        let n = weight.len();
        for (x, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
            let scale = 1.0 / (dot(x, x) / n as f64 + f64::from(epsilon)).sqrt();
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = (f64::from(*x) * scale) as f32 * weight;
            }
        }
    }

    fn layer_norm(&self, x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
        let n = weight.len();
        for (x, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
            let mean = x.iter().copied().map(f64::from).sum::<f64>() / n as f64;
            let squares = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>();
            let scale = 1.0 / (squares / n as f64 + f64::from(epsilon)).sqrt();
            for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                *out = ((f64::from(*x) - mean) * scale) as f32 * weight + bias;
            }
        }
    }

    fn rope(&self, x: &mut [f32], heads: usize, angles: &RopeAngles) {
        let half = angles.pairs;
        for (t, token) in x.chunks_exact_mut(heads * angles.head_dim).enumerate() {
            for head in token.chunks_exact_mut(angles.head_dim) {
                for i in 0..half {
                    let (cos, sin) = (angles.cos[t * half + i], angles.sin[t * half + i]);
                    let (a, b) = (head[i], head[i + half]);
                    head[i] = a * cos - b * sin;
                    head[i + half] = b * cos + a * sin;
                }
            }
        }
    }

    fn attention(&self, calls: &mut [AttentionCall<'_>]) -> Result<()> {
        for AttentionCall { shape, q, kv, sinks, out } in calls {
            let (dim, scale) = (shape.head_dim, f64::from(shape.scale));
            for (index, (query, out)) in
                q.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate()
            {
                let (t, head) = (index / shape.heads, index % shape.heads);
                let (kv_head, visible) = (head / shape.heads_per_kv_head(), shape.visible(t));
                let (mut keys, mut values) = (Vec::new(), Vec::new());
                let keys = kv.keys.read(kv_head, visible.clone(), &mut keys);
                let values = kv.values.read(kv_head, visible, &mut values);
                let scores: Vec<f64> = keys
                    .chunks_exact(dim)
                    .map(|key| dot(query, key) * scale)
                    .map(|score| match shape.softcap.map(f64::from) {
                        Some(cap) => cap * (score / cap).tanh(),
                        None => score,
                    })
                    .collect();
                let sink = sinks.map(|sinks| f64::from(sinks[head]));
                let all = || scores.iter().copied().chain(sink);
                let max = all().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = all().map(|score| (score - max).exp()).sum();
                for (i, out) in out.iter_mut().enumerate() {
                    let weighted = scores.iter().zip(values.chunks_exact(dim));
                    let weighted =
                        weighted.map(|(score, value)| (score - max).exp() * f64::from(value[i]));
                    *out = (weighted.sum::<f64>() / sum) as f32;
                }
            }
        }
        Ok(())
    }

    fn gated(&self, activation: Activation, gate: &mut [f32], up: &[f32]) {
        self.activate(activation, gate);
        let input = |up: f32| match activation {
            Activation::ClampedSwish { limit, .. } => 1.0 + up.clamp(-limit, limit),
            _ => up,
        };
        gate.iter_mut().zip(up).for_each(|(gate, &up)| *gate *= input(up));
    }

    fn activate(&self, activation: Activation, x: &mut [f32]) {
        let of = |x: f64| match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                x / 2.0 * (1.0 + inner.tanh())
            }
            Activation::Relu => x.max(0.0),
            Activation::ClampedSwish { alpha, limit } => {
                let x = x.min(f64::from(limit));
                x / (1.0 + (-f64::from(alpha) * x).exp())
            }
        };
        x.iter_mut().for_each(|x| *x = of(f64::from(*x)) as f32);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
