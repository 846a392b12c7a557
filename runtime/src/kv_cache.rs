//! Keys and values of the tokens so far.

use slim_formats::ModelConfig;
use slim_kernels::KvView;

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
    /// Room for `capacity` positions. The system hands out the memory as it is first written.
    pub fn new(config: &ModelConfig, capacity: usize) -> Self {
        let len = config.kv_head_count * capacity * config.head_dim;
        let (keys, values) = (vec![0.0; len], vec![0.0; len]);
        Self { keys, values, capacity, head_dim: config.head_dim }
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

/// The cache of a model.
pub struct KvCache {
    pub(crate) blocks: Vec<KvBlock>,
    pub(crate) capacity: usize,
    pub(crate) position: usize,
}

impl KvCache {
    /// Room for `capacity` positions in every block.
    pub fn new(config: &ModelConfig, capacity: usize) -> Self {
        let blocks = (0..config.block_count).map(|_| KvBlock::new(config, capacity)).collect();
        Self { blocks, capacity, position: 0 }
    }

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

    /// Bytes of one position, over all blocks.
    pub fn bytes_per_position(config: &ModelConfig) -> u64 {
        let floats = 2 * config.block_count * config.kv_head_count * config.head_dim;
        (floats * size_of::<f32>()) as u64
    }
}
