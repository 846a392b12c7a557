//! Causal attention: a block of queries of one head at a time, scores and weighted values as matrix
//! products; or a single query, whose keys and values are read once.

use rayon::prelude::*;

use super::elementwise::{cap, dot, softmax};
use crate::{
    AttentionShape, KvView,
    linalg::{self, Mat, Precision, Store},
};

/// Queries per task: enough for an efficient product, few enough to skip most of the masked
/// triangle.
const QUERY_BLOCK: usize = 128;

/// Multiplications below which a single query is one task.
const SMALL: usize = 1 << 16;

/// [`crate::Backend::attention`] of [`crate::Cpu`], with products of this precision.
pub fn attention(
    precision: Precision,
    q: &[f32],
    kv: KvView<'_>,
    shape: &AttentionShape,
    out: &mut [f32],
) {
    if shape.m == 1 {
        return attention_of_one(q, kv, shape, out);
    }
    let tasks: Vec<_> = (0..shape.heads)
        .flat_map(|head| (0..shape.m).step_by(QUERY_BLOCK).map(move |first| (head, first)))
        .collect();
    let results: Vec<Vec<f32>> = tasks
        .par_iter()
        .map(|&(head, first)| query_block(precision, q, kv, shape, head, first))
        .collect();
    let dim = shape.head_dim;
    for (&(head, first), result) in tasks.iter().zip(&results) {
        for (i, row) in result.chunks_exact(dim).enumerate() {
            out[(first + i) * shape.query_stride() + head * dim..][..dim].copy_from_slice(row);
        }
    }
}

/// [`attention`] for a single query.
fn attention_of_one(q: &[f32], kv: KvView<'_>, shape: &AttentionShape, out: &mut [f32]) {
    let (dim, visible) = (shape.head_dim, shape.visible(0));
    let one_head = |(head, (q, out)): (usize, (&[f32], &mut [f32]))| {
        let first = (head / (shape.heads / shape.kv_heads) * kv.capacity + visible.start) * dim;
        let cached = first..first + visible.len() * dim;
        attend(q, &kv.keys[cached.clone()], &kv.values[cached], shape.scale, shape.softcap, out);
    };
    match shape.heads * dim * visible.len() < SMALL {
        true => q.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate().for_each(one_head),
        false => {
            let heads = q.par_chunks_exact(dim).zip(out.par_chunks_exact_mut(dim));
            heads.enumerate().for_each(one_head);
        }
    }
}

per_isa! {
    /// The output `[head_dim]` of one query over `keys` and `values: [positions, head_dim]`.
    fn attend(
        q: &[f32],
        keys: &[f32],
        values: &[f32],
        scale: f32,
        softcap: Option<f32>,
        out: &mut [f32],
    ) {
        let dim = q.len();
        let mut scores = vec![0.0; keys.len() / dim];
        for (score, key) in scores.iter_mut().zip(keys.chunks_exact(dim)) {
            *score = scale * dot(q, key);
        }
        if let Some(softcap) = softcap {
            cap(&mut scores, softcap);
        }
        softmax(&mut scores);
        out.fill(0.0);
        for (score, value) in scores.iter().zip(values.chunks_exact(dim)) {
            for (out, value) in out.iter_mut().zip(value) {
                *out += score * value;
            }
        }
    }
}

/// The outputs `[block, head_dim]` of the queries `first ..` of one head.
fn query_block(
    precision: Precision,
    q: &[f32],
    kv: KvView<'_>,
    shape: &AttentionShape,
    head: usize,
    first: usize,
) -> Vec<f32> {
    let (dim, block) = (shape.head_dim, QUERY_BLOCK.min(shape.m - first));
    let keys_from = shape.visible(first).start;
    let keys_to = shape.visible(first + block - 1).end;
    let len = keys_to - keys_from;
    let kv_head = head / (shape.heads / shape.kv_heads);
    let cached = (kv_head * kv.capacity + keys_from) * dim..(kv_head * kv.capacity + keys_to) * dim;

    let stride = shape.query_stride();
    let queries = Mat::strided(&q[first * stride + head * dim..], block, dim, stride);
    let keys = Mat::new(&kv.keys[cached.clone()], len, dim);
    let mut scores = vec![0.0; block * len];
    linalg::matmul(
        precision,
        &mut scores,
        len,
        Store { alpha: shape.scale, add: false },
        queries,
        keys.transposed(),
    );
    for (i, scores) in scores.chunks_exact_mut(len).enumerate() {
        let visible = shape.visible(first + i);
        let visible = visible.start - keys_from..visible.end - keys_from;
        scores[..visible.start].fill(0.0);
        scores[visible.end..].fill(0.0);
        if let Some(softcap) = shape.softcap {
            cap(&mut scores[visible.clone()], softcap);
        }
        softmax(&mut scores[visible]);
    }
    let mut out = vec![0.0; block * dim];
    let (scores, values) = (Mat::new(&scores, block, len), Mat::new(&kv.values[cached], len, dim));
    linalg::matmul(precision, &mut out, dim, Store::REPLACE, scores, values);
    out
}
