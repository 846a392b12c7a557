//! The delta rule over whole sequences, and its reverse, which computes the states of a head again:
//! those before each [`PIECE`] of tokens are kept, those in it when its turn comes.

use rayon::prelude::*;
use slim_formats::arch;
use slim_kernels::{DeltaCall, delta_net, delta_step, split, unit};

/// Tokens whose states are held at a time.
const PIECE: usize = 16;

/// A delta net over sequences of `context` tokens.
pub struct DeltaNet {
    /// What it computes.
    pub net: arch::DeltaNet,
    /// Tokens of each sequence.
    pub context: usize,
}

/// What tokens bring, or the gradients at it; `m` tokens of all sequences.
pub struct DeltaTokens {
    /// `[m, 2 * keys + values]`.
    pub qkv: Vec<f32>,
    /// `[m, value_heads]`.
    pub decay: Vec<f32>,
    /// `[m, value_heads]`.
    pub beta: Vec<f32>,
}

/// Gradients at what tokens bring to one head: of each token, query, key and value one behind the
/// other; decay; beta.
struct OfHead {
    qkv: Vec<f32>,
    decay: Vec<f32>,
    beta: Vec<f32>,
}

impl DeltaNet {
    /// The outputs, `[m, values]`.
    pub fn forward(&self, tokens: &DeltaTokens) -> Vec<f32> {
        let Self { net, context } = *self;
        let heads = net.value_heads;
        let width = tokens.qkv.len() / (tokens.decay.len() / heads);
        let mut out = vec![0.0; tokens.decay.len() / heads * net.values()];
        let sequences = tokens
            .qkv
            .chunks_exact(context * width)
            .zip(tokens.decay.chunks_exact(context * heads))
            .zip(tokens.beta.chunks_exact(context * heads));
        for (((qkv, decay), beta), out) in
            sequences.zip(out.chunks_exact_mut(context * net.values()))
        {
            let state = &mut vec![0.0; net.values() * net.key_dim];
            delta_net(DeltaCall { net, qkv, decay, beta, state, out });
        }
        out
    }

    /// The gradients for the gradient `dy` at the outputs, `[m, values]`.
    pub fn reverse(&self, tokens: &DeltaTokens, dy: &[f32]) -> DeltaTokens {
        let Self { net, context } = *self;
        let (heads, width) = (net.value_heads, 2 * net.keys() + net.values());
        let sequences = tokens.decay.len() / heads / context;
        let tasks: Vec<(usize, usize)> = (0..sequences)
            .flat_map(|sequence| (0..heads).map(move |head| (sequence, head)))
            .collect();
        let parts: Vec<OfHead> = tasks
            .par_iter()
            .map(|&(sequence, head)| self.reverse_head(tokens, sequence * context, head, dy))
            .collect();
        let mut sum = DeltaTokens {
            qkv: vec![0.0; tokens.qkv.len()],
            decay: vec![0.0; tokens.decay.len()],
            beta: vec![0.0; tokens.beta.len()],
        };
        for (&(sequence, head), part) in tasks.iter().zip(&parts) {
            let key_at = net.key_head(head) * net.key_dim;
            let places = [
                (key_at, net.key_dim),
                (net.keys() + key_at, net.key_dim),
                (2 * net.keys() + head * net.value_dim, net.value_dim),
            ];
            for t in 0..context {
                let at = sequence * context + t;
                sum.decay[at * heads + head] = part.decay[t];
                sum.beta[at * heads + head] = part.beta[t];
                let of_token = 2 * net.key_dim + net.value_dim;
                let mut own = &part.qkv[t * of_token..][..of_token];
                for (first, len) in places {
                    let of_part = own.split_off(..len).expect("query, key and value");
                    let sum = &mut sum.qkv[at * width + first..][..len];
                    sum.iter_mut().zip(of_part).for_each(|(sum, part)| *sum += part);
                }
            }
        }
        sum
    }

    /// The gradients of a head, for the tokens of a sequence from `first` on.
    ///
    /// With `held = decay * S^T k` and `change = beta * (v - held)`, a token makes
    /// `S' = decay * S + k change^T` and gives `S'^T q`.
    fn reverse_head(&self, tokens: &DeltaTokens, first: usize, head: usize, dy: &[f32]) -> OfHead {
        let Self { net, context } = *self;
        let arch::DeltaNet { key_dim, value_dim: n, value_heads, .. } = net;
        let width = 2 * net.keys() + net.values();
        let of_token = |t: usize| split(&net, head, &tokens.qkv[(first + t) * width..][..width]);
        let [decay, beta] = [&tokens.decay, &tokens.beta]
            .map(|values| move |t: usize| values[(first + t) * value_heads + head]);
        let scale = (key_dim as f32).sqrt().recip();

        let len = key_dim * n;
        let (mut units, mut changes) = (vec![0.0; context * 2 * key_dim], vec![0.0; context * n]);
        let mut out = vec![0.0; n];
        let mut step = |t: usize, state: &mut [f32], units: &mut [f32], changes: &mut [f32]| {
            let [raw_q, raw_k, v] = of_token(t);
            let (q, k) = units[t * 2 * key_dim..][..2 * key_dim].split_at_mut(key_dim);
            unit(raw_q, scale, q);
            unit(raw_k, 1.0, k);
            delta_step(state, q, k, v, decay(t), beta(t), &mut changes[t * n..][..n], &mut out);
        };
        let (mut state, mut before_pieces) = (vec![0.0; len], Vec::new());
        for t in 0..context {
            if t.is_multiple_of(PIECE) {
                before_pieces.extend_from_slice(&state);
            }
            step(t, &mut state, &mut units, &mut changes);
        }
        // Before each token of a piece, and behind its last.
        let mut states = vec![0.0; (PIECE + 1) * len];

        let mut of_head = OfHead {
            qkv: vec![0.0; context * (2 * key_dim + n)],
            decay: vec![0.0; context],
            beta: vec![0.0; context],
        };
        let mut d_state = vec![0.0; len];
        let (mut d_change, mut d_held) = (vec![0.0; n], vec![0.0; n]);
        let (mut d_q, mut d_k) = (vec![0.0; key_dim], vec![0.0; key_dim]);
        for t in (0..context).rev() {
            let (piece, in_piece) = (t / PIECE, t % PIECE);
            if t + 1 == context || in_piece + 1 == PIECE {
                states[..len].copy_from_slice(&before_pieces[piece * len..][..len]);
                for i in 0..=in_piece {
                    let (before, after) = states.split_at_mut((i + 1) * len);
                    let state = &mut after[..len];
                    state.copy_from_slice(&before[i * len..]);
                    step(piece * PIECE + i, state, &mut units, &mut changes);
                }
            }
            let [raw_q, raw_k, v] = of_token(t);
            let (q, k) = units[t * 2 * key_dim..][..2 * key_dim].split_at(key_dim);
            let [before, after] = [in_piece, in_piece + 1].map(|i| &states[i * len..][..len]);
            let (decay, beta, change) = (decay(t), beta(t), &changes[t * n..][..n]);
            let dy = &dy[((first + t) * value_heads + head) * n..][..n];
            d_change.fill(0.0);
            for i in 0..key_dim {
                let d_row = &mut d_state[i * n..][..n];
                add_scaled(d_row, q[i], dy);
                d_q[i] = dot(&after[i * n..][..n], dy);
                d_k[i] = dot(d_row, change);
                add_scaled(&mut d_change, k[i], d_row);
            }
            // That at beta is `d_change . (v - held)`; `held` is taken from the state.
            d_held.iter_mut().zip(&d_change).for_each(|(d_held, d)| *d_held = -beta * d);
            let mut d_beta = dot(&d_change, v);
            let mut d_decay = 0.0;
            for i in 0..key_dim {
                let (d_row, row) = (&mut d_state[i * n..][..n], &before[i * n..][..n]);
                d_beta -= decay * k[i] * dot(&d_change, row);
                d_k[i] += decay * dot(row, &d_held);
                add_scaled(d_row, k[i], &d_held);
                d_decay += dot(d_row, row);
                d_row.iter_mut().for_each(|d| *d *= decay);
            }
            (of_head.beta[t], of_head.decay[t]) = (d_beta, d_decay);
            let own = &mut of_head.qkv[t * (2 * key_dim + n)..][..2 * key_dim + n];
            let (of_keys, d_v) = own.split_at_mut(2 * key_dim);
            let (of_q, of_k) = of_keys.split_at_mut(key_dim);
            reverse_unit(raw_q, scale, &d_q, of_q);
            reverse_unit(raw_k, 1.0, &d_k, of_k);
            d_v.iter_mut().zip(&d_change).for_each(|(d_v, d)| *d_v = beta * d);
        }
        of_head
    }
}

/// The gradient at `x`, for the gradient `dy` at [`unit`]`(x, scale)`.
fn reverse_unit(x: &[f32], scale: f32, dy: &[f32], dx: &mut [f32]) {
    let squares = dot(x, x) + arch::DeltaNet::EPSILON;
    let (factor, along) = (scale / squares.sqrt(), dot(x, dy) / squares);
    for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
        *dx = factor * (dy - along * x);
    }
}

fn add_scaled(sum: &mut [f32], factor: f32, values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * value);
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
