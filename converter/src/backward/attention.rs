//! Causal attention over whole sequences, and its reverse, which computes the scores again, a block
//! of queries of one head at a time.

use rayon::prelude::*;
use slim_kernels::{
    AttentionCall, AttentionShape, KvCache, attention, cap,
    linalg::{self, Mat, Precision, Store},
    log_softmax,
};

use super::elementwise::{reverse_cap, reverse_softmax};

/// Queries whose probabilities are held at a time.
const QUERY_BLOCK: usize = 128;

/// Rotated queries and keys, and values of equally long sequences that follow each other; `m`
/// tokens in all.
pub struct Attention<'s> {
    pub precision: Precision,
    /// Of one sequence.
    pub shape: AttentionShape,
    /// `[m, heads * head_dim]`.
    pub q: &'s [f32],
    /// `[m, kv_heads * head_dim]`.
    pub k: &'s [f32],
    /// `[m, kv_heads * head_dim]`.
    pub v: &'s [f32],
    /// `[heads]`, if heads have sinks.
    pub sinks: Option<&'s [f32]>,
}

/// Gradients in the shapes of the queries, keys and values.
pub struct Gradients {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

impl Attention<'_> {
    /// The outputs, `[m, heads * head_dim]`.
    pub fn forward(&self) -> Vec<f32> {
        let Self { precision, shape, q, k, v, sinks } = *self;
        let (q_len, kv_len) = (shape.m * shape.query_stride(), shape.m * shape.kv_stride());
        let mut out = vec![0.0; q.len()];
        let cached = k.chunks_exact(kv_len).zip(v.chunks_exact(kv_len)).map(|(k, v)| {
            let mut kv = KvCache::exact(shape.kv_heads, shape.m, shape.head_dim);
            kv.store(k, v, 0);
            kv
        });
        let cached: Vec<KvCache> = cached.collect();
        let queries = q.chunks_exact(q_len).zip(out.chunks_exact_mut(q_len));
        let calls =
            queries.zip(&cached).map(|((q, out), kv)| AttentionCall { shape, q, kv, sinks, out });
        attention(precision, &mut calls.collect::<Vec<_>>());
        out
    }

    /// The gradients for the gradient `dy` at the outputs `y`, both `[m, heads * head_dim]`.
    pub fn reverse(&self, y: &[f32], dy: &[f32]) -> Gradients {
        let AttentionShape { heads, head_dim: dim, m: context, .. } = self.shape;
        let sequences = self.q.len() / (context * heads * dim);
        let tasks: Vec<(usize, usize)> = (0..sequences)
            .flat_map(|sequence| (0..heads).map(move |head| (sequence, head)))
            .collect();
        let parts: Vec<Gradients> = tasks
            .par_iter()
            .map(|&(sequence, head)| self.reverse_head(sequence, head, y, dy))
            .collect();
        let mut sum = Gradients {
            q: vec![0.0; self.q.len()],
            k: vec![0.0; self.k.len()],
            v: vec![0.0; self.v.len()],
        };
        for (&(sequence, head), part) in tasks.iter().zip(&parts) {
            let (q_at, kv_at) = self.places(sequence, head);
            add_head(&mut sum.q[q_at..], self.shape.query_stride(), &part.q, dim);
            add_head(&mut sum.k[kv_at..], self.shape.kv_stride(), &part.k, dim);
            add_head(&mut sum.v[kv_at..], self.shape.kv_stride(), &part.v, dim);
        }
        sum
    }

    /// One query head's part of the gradients, each `[context, head_dim]`.
    fn reverse_head(&self, sequence: usize, head: usize, y: &[f32], dy: &[f32]) -> Gradients {
        let AttentionShape { head_dim: dim, m: context, .. } = self.shape;
        let (q_stride, kv_stride) = (self.shape.query_stride(), self.shape.kv_stride());
        let (q_at, kv_at) = self.places(sequence, head);
        let AttentionShape { scale, softcap, .. } = self.shape;
        let scaled = Store { alpha: scale, add: false };
        let zeros = || vec![0.0; context * dim];
        let mut gradients = Gradients { q: zeros(), k: zeros(), v: zeros() };
        for first in (0..context).step_by(QUERY_BLOCK) {
            let block = QUERY_BLOCK.min(context - first);
            let seen = self.shape.visible(first).start..self.shape.visible(first + block - 1).end;
            let len = seen.len();
            let (q_at, k_at) = (q_at + first * q_stride, kv_at + seen.start * kv_stride);
            let q = Mat::strided(&self.q[q_at..], block, dim, q_stride);
            let k = Mat::strided(&self.k[k_at..], len, dim, kv_stride);
            let v = Mat::strided(&self.v[k_at..], len, dim, kv_stride);
            let dy_block = Mat::strided(&dy[q_at..], block, dim, q_stride);

            let mut probabilities = vec![0.0; block * len];
            linalg::matmul(self.precision, &mut probabilities, len, scaled, q, k.transposed());
            let mut d_scores = vec![0.0; block * len];
            linalg::matmul(self.precision, &mut d_scores, len, scaled, dy_block, v.transposed());
            let rows = probabilities.chunks_exact_mut(len).zip(d_scores.chunks_exact_mut(len));
            for (t, (probabilities, d_scores)) in (first..).zip(rows) {
                let visible = self.shape.visible(t);
                let visible = visible.start - seen.start..visible.end - seen.start;
                let at = q_at + (t - first) * q_stride;
                let mean = scale * dot(&y[at..][..dim], &dy[at..][..dim]);
                let of_visible = &mut probabilities[visible.clone()];
                let capped = softcap.map(|softcap| {
                    cap(of_visible, softcap);
                    (of_visible.to_vec(), softcap)
                });
                let score = of_visible[0];
                log_softmax(of_visible);
                if let Some(sinks) = self.sinks {
                    count_sink(of_visible, score - of_visible[0], sinks[head]);
                }
                reverse_softmax(of_visible, &mut d_scores[visible.clone()], mean);
                if let Some((capped, softcap)) = capped {
                    reverse_cap(&capped, softcap, &mut d_scores[visible.clone()]);
                }
                for row in [probabilities, d_scores] {
                    row[..visible.start].fill(0.0);
                    row[visible.end..].fill(0.0);
                }
            }

            let d_q = &mut gradients.q[first * dim..][..block * dim];
            let (probabilities, d_scores) =
                (Mat::new(&probabilities, block, len), Mat::new(&d_scores, block, len));
            linalg::matmul(self.precision, d_q, dim, Store::REPLACE, d_scores, k);
            let d_k = &mut gradients.k[seen.start * dim..seen.end * dim];
            linalg::matmul(self.precision, d_k, dim, Store::ADD, d_scores.transposed(), q);
            let d_v = &mut gradients.v[seen.start * dim..seen.end * dim];
            linalg::matmul(
                self.precision,
                d_v,
                dim,
                Store::ADD,
                probabilities.transposed(),
                dy_block,
            );
        }
        gradients
    }

    /// Where the first query of a head lies, and its first key and value.
    fn places(&self, sequence: usize, head: usize) -> (usize, usize) {
        let AttentionShape { heads, kv_heads, head_dim: dim, m: context, .. } = self.shape;
        let q_at = sequence * context * self.shape.query_stride() + head * dim;
        let kv_at = sequence * context * self.shape.kv_stride() + head / (heads / kv_heads) * dim;
        (q_at, kv_at)
    }
}

/// Turns log-probabilities into those of a softmax that a sink takes its share in; `log_sum` is the
/// logarithm of the sum of powers without it.
fn count_sink(log_probabilities: &mut [f32], log_sum: f32, sink: f32) {
    let growth = f64::from(sink - log_sum).exp().ln_1p() as f32;
    log_probabilities.iter_mut().for_each(|value| *value -= growth);
}

/// Adds `part: [m, dim]` to the head at the start of `sum`, whose tokens lie `stride` apart.
fn add_head(sum: &mut [f32], stride: usize, part: &[f32], dim: usize) {
    for (sum, part) in sum.chunks_mut(stride).zip(part.chunks_exact(dim)) {
        sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
}
