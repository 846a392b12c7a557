//! Keys and values that other blocks attend to, too, and the gradients at them.

use std::collections::HashMap;

/// By the numbers of the blocks that make them, of all sequences.
#[derive(Default)]
pub struct Shared(HashMap<usize, SharedKeys>);

/// Turned keys, and values, `[m, kv_heads * head_dim]` each.
pub struct SharedKeys {
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    /// The gradients at them that other blocks have added so far.
    pub d_k: Vec<f32>,
    pub d_v: Vec<f32>,
}

impl Shared {
    /// Keeps the keys and values of a block.
    pub fn keep(&mut self, block: usize, k: Vec<f32>, v: Vec<f32>) {
        let (d_k, d_v) = (vec![0.0; k.len()], vec![0.0; v.len()]);
        self.0.insert(block, SharedKeys { k, v, d_k, d_v });
    }

    /// The keys and values of a block that others attend to.
    ///
    /// # Panics
    /// If they have not been kept.
    pub fn of(&self, block: usize) -> &SharedKeys {
        self.0.get(&block).expect("the block is before those that share with it")
    }

    /// Adds gradients at the keys and values of a block.
    pub fn add(&mut self, block: usize, d_k: &[f32], d_v: &[f32]) {
        let keys = self.0.get_mut(&block).expect("the block is before those that share with it");
        keys.d_k.iter_mut().zip(d_k).for_each(|(sum, part)| *sum += part);
        keys.d_v.iter_mut().zip(d_v).for_each(|(sum, part)| *sum += part);
    }
}
