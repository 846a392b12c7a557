//! Mixers with a state: the delta rule, and causal convolutions.

use rayon::prelude::*;
use slim_formats::arch::DeltaNet;

use super::elementwise::{dot, exp};

/// Tokens that go through a delta net; `m` of them.
pub struct DeltaCall<'a> {
    /// What it computes.
    pub net: DeltaNet,
    /// Queries, keys and values behind the convolution, `[m, 2 * keys + values]`.
    pub qkv: &'a [f32],
    /// What the states are multiplied by, `[m, value_heads]`.
    pub decay: &'a [f32],
    /// How much of what is wrong is put right, `[m, value_heads]`.
    pub beta: &'a [f32],
    /// `[value_heads, key_dim, value_dim]`; updated.
    pub state: &'a mut [f32],
    /// `[m, values]`; overwritten.
    pub out: &'a mut [f32],
}

/// Sends tokens through a delta net, one after the other, all heads side by side.
///
/// # Panics
/// If a length is wrong.
pub fn delta_net(call: DeltaCall<'_>) {
    let DeltaCall { net, qkv, decay, beta, state, out } = call;
    let DeltaNet { value_heads, key_dim, value_dim, .. } = net;
    let width = 2 * net.keys() + net.values();
    let m = qkv.len() / width;
    assert_eq!(qkv.len(), m * width, "queries, keys and values");
    assert_eq!([decay.len(), beta.len()], [m * value_heads; 2], "decay and beta");
    assert_eq!(state.len(), value_heads * key_dim * value_dim, "the state");
    assert_eq!(out.len(), m * net.values(), "outputs");
    let of_heads =
        state.par_chunks_exact_mut(key_dim * value_dim).enumerate().map(|(head, state)| {
            let (mut q, mut k) = (vec![0.0; key_dim], vec![0.0; key_dim]);
            let (mut change, mut out) = (vec![0.0; value_dim], vec![0.0; m * value_dim]);
            for (t, out) in out.chunks_exact_mut(value_dim).enumerate() {
                let token = &qkv[t * width..][..width];
                let [raw_q, raw_k, v] = split(&net, head, token);
                unit(raw_q, (key_dim as f32).sqrt().recip(), &mut q);
                unit(raw_k, 1.0, &mut k);
                let at = t * value_heads + head;
                delta_step(state, &q, &k, v, decay[at], beta[at], &mut change, out);
            }
            out
        });
    let of_heads: Vec<Vec<f32>> = of_heads.collect();
    for (head, of_head) in of_heads.iter().enumerate() {
        for (t, values) in of_head.chunks_exact(value_dim).enumerate() {
            out[(t * value_heads + head) * value_dim..][..value_dim].copy_from_slice(values);
        }
    }
}

/// Query, key and value of a value head in those of all heads of a token,
/// `[2 * keys + values]`.
pub fn split<'q>(net: &DeltaNet, head: usize, token: &'q [f32]) -> [&'q [f32]; 3] {
    let key_head = net.key_head(head);
    let key = |first: usize| &token[first + key_head * net.key_dim..][..net.key_dim];
    let value = &token[2 * net.keys() + head * net.value_dim..][..net.value_dim];
    [key(0), key(net.keys()), value]
}

/// `x / sqrt(sum of squares + 1e-6) * scale`.
pub fn unit(x: &[f32], scale: f32, out: &mut [f32]) {
    let factor = scale / (dot(x, x) + DeltaNet::EPSILON).sqrt();
    out.iter_mut().zip(x).for_each(|(out, x)| *out = x * factor);
}

per_isa! {
    /// Sends a token through the state `[key_dim, value_dim]` of a head: `change` becomes
    /// `beta * (v - decay * S^T k)`, the state `decay * S + k change^T`, `out` what `q` gets of it.
    #[expect(clippy::too_many_arguments, reason = "a state and what a token brings")]
    pub fn delta_step(
        state: &mut [f32],
        q: &[f32],
        k: &[f32],
        v: &[f32],
        decay: f32,
        beta: f32,
        change: &mut [f32],
        out: &mut [f32],
    ) {
        let n = v.len();
        change.fill(0.0);
        for (row, k) in state.chunks_exact(n).zip(k) {
            for (held, s) in change.iter_mut().zip(row) {
                *held += k * s;
            }
        }
        for (change, v) in change.iter_mut().zip(v) {
            *change = beta * (v - decay * *change);
        }
        out.fill(0.0);
        for ((row, k), q) in state.chunks_exact_mut(n).zip(k).zip(q) {
            for ((s, change), out) in row.iter_mut().zip(change.iter()).zip(out.iter_mut()) {
                *s = decay * *s + k * change;
                *out += q * *s;
            }
        }
    }
}

/// A causal convolution of each channel: `y_t = sum of taps[i] * x_(t - n + 1 + i)` for the `n`
/// `taps: [n, channels]`. `recent: [n - 1, channels]` are the inputs before the first of
/// `x: [m, channels]`, and become those before the next.
///
/// # Panics
/// If a length is wrong.
pub fn convolve(taps: &[f32], channels: usize, recent: &mut [f32], x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "inputs and outputs");
    assert_eq!(recent.len() + channels, taps.len(), "inputs before the first");
    let before = recent.len() / channels;
    out.fill(0.0);
    for (t, out) in out.chunks_exact_mut(channels).enumerate() {
        for (i, taps) in taps.chunks_exact(channels).enumerate() {
            // Counted from the first of the inputs before.
            let at = t + i;
            let input = match at < before {
                true => &recent[at * channels..][..channels],
                false => &x[(at - before) * channels..][..channels],
            };
            add_products(taps, input, out);
        }
    }
    if x.len() >= recent.len() {
        recent.copy_from_slice(&x[x.len() - recent.len()..]);
    } else {
        recent.copy_within(x.len().., 0);
        let kept = recent.len() - x.len();
        recent[kept..].copy_from_slice(x);
    }
}

per_isa! {
    fn add_products(a: &[f32], b: &[f32], out: &mut [f32]) {
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            *out += a * b;
        }
    }
}

per_isa! {
    /// Replaces each value by `1 / (1 + e^-x)`.
    pub fn sigmoid(x: &mut [f32]) {
        for x in x {
            *x = 1.0 / (1.0 + exp(-*x));
        }
    }
}

/// `ln(1 + e^x)`.
pub fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
