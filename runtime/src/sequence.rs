//! A text that a model has read: its tokens, and the keys and values of each block.

use slim_kernels::KvCache;

use crate::{cuda::SequenceOnDevice, identity::Identity};

/// Memory that the system can give, where it says so: Linux.
pub(crate) fn free_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes << 10)
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
    pub(crate) blocks: Vec<KvCache>,
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
