//! The largest logits, found on the device.

use std::sync::Arc;

use super::{Buffer, Device};
use crate::{KernelError, Result};

/// Logits that a block looks through.
const LOGITS_PER_BLOCK: usize = 2048;
const MAX_BLOCKS: usize = 64;
const MAX_K: usize = 128;

/// The largest logits and their tokens, largest first; of equal ones the lower token first.
pub struct TopK {
    k: usize,
    /// [MAX_BLOCKS, k].
    pub(super) partial: Buffer<u64>,
    pub(super) tokens: Buffer<u32>,
    pub(super) values: Buffer<f32>,
}

impl TopK {
    /// Logits that the kernel takes.
    pub(super) const MAX_LOGITS: usize = 1 << 26;

    /// Room for the `k` largest.
    ///
    /// # Errors
    /// `TooLarge` if `k` is above 128; `OutOfDeviceMemory`; `Driver`.
    ///
    /// # Panics
    /// If `k` is 0; inside [`Device::capture`].
    pub fn new(device: &Arc<Device>, k: usize) -> Result<Self> {
        assert!(k > 0, "the 0 largest");
        if k > MAX_K {
            return Err(KernelError::TooLarge { what: "largest logits", found: k, limit: MAX_K });
        }
        Ok(Self {
            k,
            partial: Buffer::zeros(device, MAX_BLOCKS * k)?,
            tokens: Buffer::zeros(device, k)?,
            values: Buffer::zeros(device, k)?,
        })
    }

    /// How many are looked for.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Waits for all work so far and gives `(token, logit)` of each, fewer than `k` if there were
    /// fewer logits. NaN counts as the largest.
    ///
    /// # Errors
    /// `Driver`, also for an earlier kernel that failed.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn read(&self) -> Result<Vec<(u32, f32)>> {
        let found = self.tokens.view().read()?.into_iter().zip(self.values.view().read()?);
        Ok(found.take_while(|&(token, _)| token != u32::MAX).collect())
    }

    /// Blocks that look through `n` logits.
    pub(super) fn blocks(n: usize) -> usize {
        n.div_ceil(LOGITS_PER_BLOCK).clamp(1, MAX_BLOCKS)
    }
}
