//! Keys and values of the tokens so far.

use slim_formats::arch::Attention;
use slim_kernels::KvView;

use crate::cuda::Session;

/// The cache of one block.
pub struct KvBlock {
    /// [kv_heads, capacity, head_dim].
    keys: Vec<f32>,
    /// [kv_heads, capacity, head_dim].
    values: Vec<f32>,
    capacity: usize,
    head_dim: usize,
}

impl KvBlock {
    /// Room for `capacity` positions of a block's attention. The system hands out the memory as it
    /// is first written.
    pub fn new(attention: &Attention, capacity: usize) -> Self {
        let len = attention.kv_heads * capacity * attention.head_dim;
        let (keys, values) = (vec![0.0; len], vec![0.0; len]);
        Self { keys, values, capacity, head_dim: attention.head_dim }
    }

    /// Puts `k`, `v: [m, kv_heads, head_dim]` at positions `start ..`.
    pub(crate) fn store(&mut self, k: &[f32], v: &[f32], start: usize, m: usize) {
        let dim = self.head_dim;
        let heads = k.len() / (m * dim);
        for (cache, new) in [(&mut self.keys, k), (&mut self.values, v)] {
            for t in 0..m {
                for head in 0..heads {
                    cache[(head * self.capacity + start + t) * dim..][..dim]
                        .copy_from_slice(&new[(t * heads + head) * dim..][..dim]);
                }
            }
        }
    }

    pub(crate) fn view(&self) -> KvView<'_> {
        KvView { keys: &self.keys, values: &self.values, capacity: self.capacity }
    }
}

/// The cache of a model: [`crate::Model::new_cache`] makes it.
pub struct KvCache {
    /// Of the blocks on the CPU.
    pub(crate) blocks: Vec<KvBlock>,
    /// Of the blocks on each CUDA device.
    pub(crate) sessions: Vec<Session>,
    pub(crate) capacity: usize,
    pub(crate) position: usize,
}

impl KvCache {
    /// Tokens held.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Positions that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.position = 0;
    }

    /// Forgets all tokens but the first `tokens`.
    pub fn truncate(&mut self, tokens: usize) {
        self.position = self.position.min(tokens);
    }
}
