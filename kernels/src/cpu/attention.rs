//! Causal attention as an online softmax over tiles of positions: whatever a query sees, what it
//! takes is its scores with one tile, and sums that are rescaled when a larger score turns up.
//!
//! All heads that share keys and values go through a tile together, so that it is read, and
//! converted to f32, once. A tile meets many queries in matrix products; a few, as in decoding,
//! in loops that keep up with the memory.

use std::ops::Range;

use rayon::prelude::*;

use super::elementwise::{cap, exp, exponentiate, largest};
use crate::{
    AttentionCall, AttentionShape,
    linalg::{self, Mat, Precision, Store, pieces},
};

/// Rows of a task, which are queries times the heads that share a key: enough for an efficient
/// product, few enough to skip most of the masked triangle.
const TASK_ROWS: usize = 128;

/// Positions that these rows go through at a time: keys, values and scores stay in the second
/// cache.
const TILE: usize = 256;

/// Below so many rows keys and values are what takes time: they are read with loops of our own, and
/// positions are shared out among tasks, too.
const FEW_ROWS: usize = 24;

/// Positions that few rows go through at a time: in f32 they stay in the first cache.
const FEW_TILE: usize = 64;

/// Positions of a task of few rows.
const FEW_POSITIONS: usize = 256;

/// Multiplications below which all is done in one thread.
const SMALL: usize = 1 << 16;

/// [`crate::Backend::attention`] of [`crate::Cpu`], with products of this precision.
pub fn attention(precision: Precision, calls: &mut [AttentionCall<'_>]) {
    let tasks: Vec<Task> = calls
        .iter()
        .enumerate()
        .flat_map(|(call, AttentionCall { shape, .. })| Task::all(call, *shape))
        .collect();
    let attend = |task: &Task| (task.clone(), task.attend(precision, &calls[task.call]));
    let mut attended: Vec<(Task, Attended)> = match tasks.iter().map(Task::work).sum::<usize>() {
        ..SMALL => tasks.iter().map(attend).collect(),
        _ => tasks.par_iter().map(attend).collect(),
    };
    for parts in attended.chunk_by_mut(|(a, _), (b, _)| a.has_rows_of(b)) {
        let ((task, sum), others) = parts.split_first_mut().expect("a part");
        others.iter_mut().for_each(|(_, other)| sum.merge(other));
        if let Some(sinks) = calls[task.call].sinks {
            sum.count_sinks(task.of_heads(sinks));
        }
        task.store(sum, &mut calls[task.call]);
    }
}

/// Consecutive queries of the heads that share a key, and some of the positions that they see.
#[derive(Clone)]
struct Task {
    call: usize,
    shape: AttentionShape,
    kv_head: usize,
    queries: Range<usize>,
    positions: Range<usize>,
}

impl Task {
    /// All tasks of a call, those of the same rows one after the other.
    fn all(call: usize, shape: AttentionShape) -> Vec<Self> {
        let mut tasks = Vec::new();
        let block = (TASK_ROWS / shape.heads_per_kv_head()).max(1);
        for kv_head in 0..shape.kv_heads {
            for queries in pieces(0..shape.m, block) {
                let positions =
                    shape.visible(queries.start).start..shape.visible(queries.end - 1).end;
                let all = Self { call, shape, kv_head, queries, positions };
                let len = if all.is_few() { FEW_POSITIONS } else { all.positions.len() };
                let parts = pieces(all.positions.clone(), len);
                tasks.extend(parts.into_iter().map(|positions| Self { positions, ..all.clone() }));
            }
        }
        tasks
    }

    fn rows(&self) -> usize {
        self.queries.len() * self.shape.heads_per_kv_head()
    }

    fn is_few(&self) -> bool {
        self.rows() < FEW_ROWS
    }

    fn has_rows_of(&self, other: &Self) -> bool {
        let rows = |task: &Self| (task.call, task.kv_head, task.queries.start);
        rows(self) == rows(other)
    }

    /// Multiplications with keys, and as many with values.
    fn work(&self) -> usize {
        self.rows() * self.shape.head_dim * self.positions.len()
    }

    /// What lies of query `t` in an activation of [m, heads, head_dim].
    fn place(&self, t: usize) -> Range<usize> {
        let len = self.shape.heads_per_kv_head() * self.shape.head_dim;
        let start = t * self.shape.query_stride() + self.kv_head * len;
        start..start + len
    }

    /// What the heads have of `[heads]`.
    fn of_heads<'a>(&self, values: &'a [f32]) -> &'a [f32] {
        let count = self.shape.heads_per_kv_head();
        &values[self.kv_head * count..][..count]
    }

    /// Attention of the queries to the positions.
    fn attend(&self, precision: Precision, call: &AttentionCall<'_>) -> Attended {
        let (dim, rows) = (self.shape.head_dim, self.rows());
        let q = self.queries.clone().flat_map(|t| &call.q[self.place(t)]);
        let q: Vec<f32> = q.map(|q| self.shape.scale * q).collect();
        let tile = if self.is_few() { FEW_TILE } else { TILE };
        let mut scores = vec![0.0; rows * tile.min(self.positions.len())];
        let mut scratch = Vec::new();
        let mut attended = Attended::new(rows, dim);
        for positions in pieces(self.positions.clone(), tile) {
            let n = positions.len();
            let scores = &mut scores[..rows * n];
            let keys = call.kv.keys.read(self.kv_head, positions.clone(), &mut scratch);
            match self.is_few() {
                true => multiply_keys(&q, keys, dim, scores),
                false => {
                    let (q, keys) = (Mat::new(&q, rows, dim), Mat::new(keys, n, dim).transposed());
                    linalg::matmul(precision, scores, n, Store::REPLACE, q, keys);
                }
            }
            for (row, scores) in scores.chunks_exact_mut(n).enumerate() {
                let visible = self.visible(row, &positions);
                scores[..visible.start].fill(0.0);
                scores[visible.end..].fill(0.0);
                attended.weigh(row, &mut scores[visible], self.shape.softcap);
            }
            let values = call.kv.values.read(self.kv_head, positions, &mut scratch);
            let out = &mut attended.out;
            match self.is_few() {
                true => add_values(scores, values, dim, out),
                false => {
                    let (scores, values) = (Mat::new(scores, rows, n), Mat::new(values, n, dim));
                    linalg::matmul(precision, out, dim, Store::ADD, scores, values);
                }
            }
        }
        attended
    }

    /// Which of these positions a row sees.
    fn visible(&self, row: usize, positions: &Range<usize>) -> Range<usize> {
        let query = self.queries.start + row / self.shape.heads_per_kv_head();
        let Range { start, end } = self.shape.visible(query);
        let place =
            |position: usize| position.clamp(positions.start, positions.end) - positions.start;
        place(start)..place(end)
    }

    /// Writes what the rows come to.
    fn store(&self, Attended { sum, out, .. }: &Attended, call: &mut AttentionCall<'_>) {
        let dim = self.shape.head_dim;
        let mut rows = out.chunks_exact(dim).zip(sum);
        for t in self.queries.clone() {
            for (to, (out, sum)) in call.out[self.place(t)].chunks_exact_mut(dim).zip(&mut rows) {
                to.iter_mut().zip(out).for_each(|(to, out)| *to = out / sum);
            }
        }
    }
}

/// What rows have taken so far of the values that they see.
struct Attended {
    dim: usize,
    /// The largest score of each row.
    max: Vec<f32>,
    /// Sums of `e^(score - max)`.
    sum: Vec<f32>,
    /// Sums of `e^(score - max) * value`, `[rows, dim]`.
    out: Vec<f32>,
}

impl Attended {
    /// Nothing yet.
    fn new(rows: usize, dim: usize) -> Self {
        let (max, sum) = (vec![f32::NEG_INFINITY; rows], vec![0.0; rows]);
        Self { dim, max, sum, out: vec![0.0; rows * dim] }
    }

    /// Turns further scores of a row into weights, and counts them.
    fn weigh(&mut self, row: usize, scores: &mut [f32], softcap: Option<f32>) {
        if let Some(softcap) = softcap {
            cap(scores, softcap);
        }
        self.raise(row, largest(scores));
        self.sum[row] += exponentiate(scores, self.max[row]);
    }

    /// Measures the sums of a row by another largest score, if it is larger.
    fn raise(&mut self, row: usize, max: f32) {
        if max > self.max[row] {
            let factor = exp(self.max[row] - max);
            self.max[row] = max;
            self.sum[row] *= factor;
            self.out[row * self.dim..][..self.dim].iter_mut().for_each(|out| *out *= factor);
        }
    }

    /// Counts a score of each head without a value.
    fn count_sinks(&mut self, sinks: &[f32]) {
        for (row, &sink) in (0..self.max.len()).zip(sinks.iter().cycle()) {
            self.raise(row, sink);
            self.sum[row] += exp(sink - self.max[row]);
        }
    }

    /// Adds what the same rows have taken elsewhere.
    fn merge(&mut self, other: &mut Self) {
        for row in 0..self.max.len() {
            self.raise(row, other.max[row]);
            other.raise(row, self.max[row]);
        }
        self.sum.iter_mut().zip(&other.sum).for_each(|(sum, other)| *sum += other);
        self.out.iter_mut().zip(&other.out).for_each(|(out, other)| *out += other);
    }
}

/// Channels that a product with a key takes at a time.
const LANES: usize = 16;

per_isa! {
    /// `scores[rows, n] = q[rows, dim] * keys[n, dim]^T`, for up to [`FEW_TILE`] keys.
    fn multiply_keys(q: &[f32], keys: &[f32], dim: usize, scores: &mut [f32]) {
        let n = keys.len() / dim;
        for (q, scores) in q.chunks_exact(dim).zip(scores.chunks_exact_mut(n)) {
            let (q, q_rest) = q.as_chunks::<LANES>();
            // Sums across lanes go through memory: in registers the compiler would make them, and
            // all that leads to them, two values at a time.
            let mut halves = [[0.0; LANES / 2]; FEW_TILE];
            for (halves, key) in halves.iter_mut().zip(keys.chunks_exact(dim)) {
                let mut lanes = [0.0; LANES];
                for (q, key) in q.iter().zip(key.as_chunks::<LANES>().0) {
                    for i in 0..LANES {
                        lanes[i] += q[i] * key[i];
                    }
                }
                for i in 0..LANES / 2 {
                    halves[i] = lanes[i] + lanes[i + LANES / 2];
                }
            }
            let sums = scores.iter_mut().zip(&halves).zip(keys.chunks_exact(dim));
            for ((score, halves), key) in sums {
                *score = 0.0;
                for half in halves {
                    *score += half;
                }
                for (q, key) in q_rest.iter().zip(key.as_chunks::<LANES>().1) {
                    *score += q * key;
                }
            }
        }
    }
}

/// Channels that are summed up in registers.
const CHANNELS: usize = 64;

per_isa! {
    /// `out[rows, dim] += weights[rows, n] * values[n, dim]`.
    fn add_values(weights: &[f32], values: &[f32], dim: usize, out: &mut [f32]) {
        let n = values.len() / dim;
        for (weights, out) in weights.chunks_exact(n).zip(out.chunks_exact_mut(dim)) {
            let (chunks, rest) = out.as_chunks_mut::<CHANNELS>();
            let first_of_rest = chunks.len() * CHANNELS;
            for (chunk, out) in chunks.iter_mut().enumerate() {
                let mut sums = *out;
                for (weight, values) in weights.iter().zip(values.chunks_exact(dim)) {
                    let values = &values[chunk * CHANNELS..][..CHANNELS];
                    for i in 0..CHANNELS {
                        sums[i] += weight * values[i];
                    }
                }
                *out = sums;
            }
            for (weight, values) in weights.iter().zip(values.chunks_exact(dim)) {
                for (out, value) in rest.iter_mut().zip(&values[first_of_rest..]) {
                    *out += weight * value;
                }
            }
        }
    }
}
