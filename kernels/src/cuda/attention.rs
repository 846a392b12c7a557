//! What attention keeps on the device: keys and values, angles, the position, scratch memory.

use std::sync::Arc;

use slim_formats::arch::QueryScaling;

use super::{Buffer, Device, View, check_equal, check_limit};
use crate::{KvType, Result, RopeAngles};

/// The largest head that the kernels take.
const MAX_HEAD_DIM: usize = 256;
/// Far above any model; the kernels count in 32 bits.
const MAX_HEADS: usize = 1 << 16;
const MAX_POSITIONS: usize = 1 << 31;
/// Query heads of a kv head that one block of the decode kernels takes.
const DECODE_HEADS: usize = 8;
/// Positions that a block of the decode kernels takes at least.
const DECODE_SPAN: usize = 64;
/// Blocks of the decode kernels for each multiprocessor, so that none idles.
const DECODE_BLOCKS_PER_MULTIPROCESSOR: usize = 2;
/// Floats of a partial result beside its channels.
const PART_HEADER: usize = 4;

/// The keys and values of one block.
pub struct KvCache {
    /// [kv_heads, capacity, head_dim], 2 or 1 bytes each.
    pub(super) keys: Buffer<u8>,
    pub(super) values: Buffer<u8>,
    /// [kv_heads, capacity]; empty for fp16.
    pub(super) key_scales: Buffer<f32>,
    pub(super) value_scales: Buffer<f32>,
    pub(super) kv_type: KvType,
    pub(super) kv_heads: usize,
    pub(super) capacity: usize,
    pub(super) head_dim: usize,
}

impl KvCache {
    /// Whether the attention kernels take heads of this many channels: multiples of 8, up to 256.
    pub fn takes_head_dim(head_dim: usize) -> bool {
        head_dim > 0 && head_dim.is_multiple_of(8) && head_dim <= MAX_HEAD_DIM
    }

    /// Room for `capacity` positions.
    ///
    /// # Errors
    /// `ShapeMismatch` unless `head_dim` is a multiple of 8; `TooLarge` for heads of more than 256
    /// channels, and for numbers far above any model's; `OutOfDeviceMemory`; `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn new(
        device: &Arc<Device>,
        kv_type: KvType,
        kv_heads: usize,
        capacity: usize,
        head_dim: usize,
    ) -> Result<Self> {
        check_limit("channels of a head", head_dim, MAX_HEAD_DIM)?;
        check_equal("channels of a head", head_dim, head_dim.next_multiple_of(8).max(8))?;
        check_limit("kv heads", kv_heads, MAX_HEADS)?;
        check_limit("positions", capacity, MAX_POSITIONS)?;
        let rows = kv_heads * capacity;
        let (number_bytes, scales) = match kv_type {
            KvType::F16 => (2, 0),
            KvType::Q8 => (1, rows),
        };
        Ok(Self {
            keys: Buffer::zeros(device, rows * head_dim * number_bytes)?,
            values: Buffer::zeros(device, rows * head_dim * number_bytes)?,
            key_scales: Buffer::zeros(device, scales)?,
            value_scales: Buffer::zeros(device, scales)?,
            kv_type,
            kv_heads,
            capacity,
            head_dim,
        })
    }

    /// Positions that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes of device memory that it takes.
    pub fn device_bytes(&self) -> u64 {
        let rows = [&self.keys, &self.values].map(Buffer::device_bytes);
        let scales = [&self.key_scales, &self.value_scales].map(Buffer::device_bytes);
        rows.iter().chain(&scales).sum()
    }
}

/// What a query sees, and what becomes of its products with keys.
#[derive(Debug, Clone, Copy)]
pub struct Scores {
    /// Positions that it sees, its own included; `None` for all.
    pub window: Option<usize>,
    /// What products are multiplied by.
    pub scale: f32,
    /// `c * tanh(score / c)` in place of a score.
    pub softcap: Option<f32>,
}

/// What queries and keys go through before they meet.
#[derive(Clone, Copy, Default)]
pub struct Rotation<'a> {
    /// Norms of each head.
    pub norms: Option<HeadNorms<'a>>,
    /// What rotates them; `None` if they stay as they are.
    pub tables: Option<&'a RopeTables>,
    /// What queries are multiplied by.
    pub query_scaling: Option<QueryScaling>,
}

/// RMS norms of the heads of queries and keys.
#[derive(Clone, Copy)]
pub struct HeadNorms<'a> {
    /// `[head_dim]` of queries, `[head_dim]` of keys.
    pub weights: [View<'a, f32>; 2],
    /// Added to the mean square.
    pub epsilon: f32,
}

/// The shape of attention, and scratch memory for one call at a time.
pub struct Attention {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// Blocks that share out the positions of a head when there is one token.
    pub(super) splits: usize,
    /// [heads, splits, head_dim + 4].
    pub(super) partial: Buffer<f32>,
    /// [kv_heads * head_groups], zero between launches.
    pub(super) counters: Buffer<u32>,
}

impl Attention {
    /// `heads` query heads that look into caches like `cache`.
    ///
    /// # Errors
    /// `ShapeMismatch` unless `heads` is a multiple of the cache's heads; `OutOfDeviceMemory`;
    /// `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn new(device: &Arc<Device>, heads: usize, cache: &KvCache) -> Result<Self> {
        let (kv_heads, head_dim) = (cache.kv_heads, cache.head_dim);
        check_limit("query heads", heads, MAX_HEADS)?;
        check_equal("query heads", heads, heads.next_multiple_of(kv_heads).max(kv_heads))?;
        let groups = (heads / kv_heads).div_ceil(DECODE_HEADS);
        let blocks = DECODE_BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors();
        let most = cache.capacity.div_ceil(DECODE_SPAN).max(1);
        let splits = blocks.div_ceil(kv_heads * groups).min(most);
        Ok(Self {
            heads,
            kv_heads,
            head_dim,
            splits,
            partial: Buffer::zeros(device, heads * splits * (head_dim + PART_HEADER))?,
            counters: Buffer::zeros(device, kv_heads * groups)?,
        })
    }

    /// Blocks that share the query heads of a kv head when there is one token.
    pub(super) fn head_groups(&self) -> usize {
        (self.heads / self.kv_heads).div_ceil(DECODE_HEADS)
    }
}

/// Cosines and sines of the rotation at the positions of a cache.
pub struct RopeTables {
    /// [positions, pairs].
    pub(super) cos: Buffer<f32>,
    /// [positions, pairs].
    pub(super) sin: Buffer<f32>,
    pub(super) head_dim: usize,
    pub(super) pairs: usize,
}

impl RopeTables {
    /// Copies the angles of the positions from 0 on to the device.
    ///
    /// # Errors
    /// `OutOfDeviceMemory`; `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn upload(device: &Arc<Device>, angles: &RopeAngles) -> Result<Self> {
        let (cos, sin) =
            (Buffer::upload(device, &angles.cos)?, Buffer::upload(device, &angles.sin)?);
        Ok(Self { cos, sin, head_dim: angles.head_dim, pairs: angles.pairs })
    }

    /// Positions with angles.
    pub fn positions(&self) -> usize {
        self.cos.len().min(self.sin.len()) / self.pairs
    }
}

/// The position of the first token of a call, in device memory: a graph that is launched again
/// reads it again.
pub struct Position {
    pub(super) buffer: Buffer<u32>,
    value: usize,
    capacity: usize,
}

impl Position {
    /// Position 0 of caches of `capacity` positions.
    ///
    /// # Errors
    /// `OutOfDeviceMemory`; `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn new(device: &Arc<Device>, capacity: usize) -> Result<Self> {
        Ok(Self { buffer: Buffer::zeros(device, 1)?, value: 0, capacity })
    }

    /// The position.
    pub fn value(&self) -> usize {
        self.value
    }

    /// Sets the position, for all work from now on.
    ///
    /// # Errors
    /// `TooLarge` if the caches have no such position; `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn set(&mut self, value: usize) -> Result<()> {
        check_limit("positions", value, self.capacity.saturating_sub(1))?;
        self.buffer.view_mut().write(&[value as u32])?;
        self.value = value;
        Ok(())
    }

    /// The caches' positions, as `new` was told.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }
}

/// The tokens of a call: `m` of them, one after the other.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    /// Where the first one stands.
    pub position: &'a Position,
    /// How many there are.
    pub m: usize,
}
