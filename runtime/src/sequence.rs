//! A text that a model has read: its tokens, and the keys and values of each block.

use slim_formats::arch::Attention;
use slim_kernels::KvView;

use crate::{cuda::SequenceOnDevice, identity::Identity};

/// The keys and values of one block.
pub struct KvBlock {
    /// [kv_heads, capacity, head_dim].
    keys: Vec<f32>,
    /// [kv_heads, capacity, head_dim].
    values: Vec<f32>,
    heads: usize,
    capacity: usize,
    head_dim: usize,
}

impl KvBlock {
    /// Room for `capacity` positions of a block's attention. The system hands out the memory as it
    /// is first written.
    pub fn new(attention: &Attention, capacity: usize) -> Self {
        let Attention { kv_heads: heads, head_dim, .. } = *attention;
        let len = heads * capacity * head_dim;
        Self { keys: vec![0.0; len], values: vec![0.0; len], heads, capacity, head_dim }
    }

    /// Puts `k`, `v: [m, kv_heads, head_dim]` at positions `start ..`.
    pub(crate) fn store(&mut self, k: &[f32], v: &[f32], start: usize, m: usize) {
        let (dim, heads) = (self.head_dim, self.heads);
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

/// A text that a model has read so far: [`crate::Model::sequence`] makes it.
///
/// Any number of sequences share a model and a [`crate::Workspace`].
pub struct Sequence {
    pub(crate) model: Identity,
    /// Those whose keys and values are held.
    pub(crate) tokens: Vec<u32>,
    pub(crate) capacity: usize,
    /// Of the blocks on the CPU.
    pub(crate) blocks: Vec<KvBlock>,
    /// Of the blocks on each CUDA device.
    pub(crate) segments: Vec<SequenceOnDevice>,
}

impl Sequence {
    /// The tokens held; the next one takes the position that is their number.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens but the first `tokens`.
    pub fn truncate(&mut self, tokens: usize) {
        self.tokens.truncate(tokens);
    }
}
