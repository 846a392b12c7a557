//! Which blocks run where: the last ones on CUDA devices, in order, the first ones on the CPU.

use std::{ops::Range, sync::Arc};

use slim_formats::{
    Decoder, ModelSource, Part,
    arch::{Attention, Experts, Tensor},
};
use slim_kernels::{
    KvType,
    cuda::{self, Device, KvCache},
};

use crate::{
    Block, Result, RuntimeError,
    block::find_weight,
    cuda::{attention_of, bytes_on_device},
    model::PREFILL_BATCH,
};

/// What stays free on a device for the driver, its code, and what else needs a little.
const RESERVE_BYTES: u64 = 300 << 20;

/// The CUDA devices that a model may use, and how.
#[derive(Clone)]
pub struct CudaSettings {
    /// The devices with the numbers that the user knows them by, in the order in which blocks go to
    /// them.
    pub devices: Vec<(usize, Arc<Device>)>,
    /// Blocks on them; `None` for as many as fit.
    pub blocks: Option<usize>,
    /// How keys and values are stored, there and on the CPU.
    pub kv_type: KvType,
    /// Tokens of the longest text: room for their keys and values is kept.
    pub context: usize,
}

impl CudaSettings {
    /// What a model has that devices do not compute.
    pub fn lacks(decoder: &Decoder) -> Option<String> {
        let mut experts = decoder.blocks.iter().filter_map(|block| block.experts);
        let lack = decoder.beyond_experts().or_else(|| experts.find_map(lack_of_experts));
        lack.map(|what| format!("one with {what}"))
    }

    /// Whether every block, the embedding and the output layer fit on the devices.
    ///
    /// # Errors
    /// As [`crate::Model::load`]; `Kernel` if a device does not tell its memory.
    pub fn holds_all(&self, source: &dyn ModelSource) -> Result<bool> {
        if Self::lacks(source.decoder()).is_some() {
            return Ok(false);
        }
        let all = Self { blocks: None, ..self.clone() };
        let placed: usize = all.place(source)?.iter().map(Range::len).sum();
        Ok(placed == source.decoder().blocks.len())
    }

    /// The blocks of each device, by what is free on it.
    ///
    /// # Errors
    /// `InvalidArgument` if not as many blocks fit as were asked for.
    pub(crate) fn place(&self, source: &dyn ModelSource) -> Result<Vec<Range<usize>>> {
        if let Some(lack) = Self::lacks(source.decoder()) {
            let expected = "one without, on a CUDA device; the CPU runs it";
            return Err(RuntimeError::invalid_argument("model", lack, expected));
        }
        let head_dim = attention_of(&source.decoder().blocks[0]).head_dim;
        if !KvCache::takes_head_dim(head_dim) {
            let expected = "a multiple of 8, up to 256, on a CUDA device";
            return Err(RuntimeError::invalid_argument("head size", head_dim, expected));
        }
        // What the norms read at a time.
        let Decoder { hidden_size, embedding_size, .. } = *source.decoder();
        for (what, size) in [("hidden size", hidden_size), ("embedding size", embedding_size)] {
            if !size.is_multiple_of(4) {
                let expected = "a multiple of 4 on a CUDA device";
                return Err(RuntimeError::invalid_argument(what, size, expected));
            }
        }
        let sizes = Sizes::of(source, self)?;
        let free = self.devices.iter().map(|(_, device)| Ok(device.free_memory()?));
        let free: Vec<u64> = free.collect::<Result<_>>()?;
        let counts = sizes.split(&free, self.blocks).map_err(|fit| {
            let expected = format!("at most {fit}: no more fit into their free memory");
            let found = self.blocks.unwrap_or(0);
            RuntimeError::invalid_argument("blocks on CUDA devices", found, expected)
        })?;
        if self.blocks.is_none() && counts.iter().all(|&count| count == 0) {
            let mebibytes = |bytes: u64| format!("{} MiB", bytes >> 20);
            let free = free.into_iter().map(mebibytes).collect::<Vec<_>>().join(" and ");
            let needed = mebibytes(sizes.working + sizes.output + sizes.block);
            let expected = format!("at least {needed}, for one block and the output layer");
            return Err(RuntimeError::invalid_argument("free device memory", free, expected));
        }
        Ok(ranges(sizes.blocks, &counts))
    }
}

/// What experts have that devices do not compute.
fn lack_of_experts(experts: Experts) -> Option<&'static str> {
    let Experts { ffn, routing, has_norms, .. } = experts;
    if has_norms {
        Some("experts with norms of their own")
    } else if routing.groups.is_some() {
        Some("experts in groups")
    } else if ffn.has_bias || !ffn.is_gated || !cuda::Experts::takes(ffn.activation) {
        Some("experts of another kind than gates and inputs without biases")
    } else {
        None
    }
}

/// What a model takes on a device, in bytes.
#[derive(Debug, Clone)]
pub(crate) struct Sizes {
    /// The largest block, with its part of the KV cache.
    pub block: u64,
    /// Blocks of the model.
    pub blocks: usize,
    /// The embedding, with that of positions, which goes to the first device if every block is on a
    /// device.
    pub embedding: u64,
    /// The output layer, which goes to the last device.
    pub output: u64,
    /// Whether the embedding is the output layer, too.
    pub is_tied: bool,
    /// What a device needs besides: activations, code, the driver's own memory.
    pub working: u64,
}

impl Sizes {
    fn of(source: &dyn ModelSource, settings: &CudaSettings) -> Result<Self> {
        let decoder = source.decoder();
        let mut block = 0;
        for index in 0..decoder.blocks.len() {
            let Block { spec, layers, .. } = Block::load(source, index)?;
            let weights: u64 = layers.values().copied().map(bytes_on_device).sum();
            let Attention { kv_heads, head_dim, .. } = *attention_of(&spec);
            let kv = settings.kv_type.row_bytes(head_dim) * kv_heads * settings.context;
            block = block.max(weights + kv as u64);
        }
        let matrix =
            |tensor: &Tensor| -> Result<u64> { Ok(bytes_on_device(find_weight(source, tensor)?)) };
        let outside = |part: Part| decoder.outside(part).map_or(Ok(0), matrix);
        Ok(Self {
            block,
            blocks: decoder.blocks.len(),
            embedding: matrix(decoder.embedding())?
                + outside(Part::EmbeddingUp)?
                + outside(Part::Positions)?,
            output: matrix(decoder.output())? + outside(Part::EmbeddingDown)?,
            is_tied: decoder.has_tied_embeddings(),
            working: RESERVE_BYTES + working_bytes(decoder, settings.context),
        })
    }

    /// How many blocks each device takes, of which `free` bytes are free: `wanted` blocks, or as
    /// many as fit; in proportion to what would fit on each.
    ///
    /// # Errors
    /// How many blocks would fit, if fewer than wanted.
    pub fn split(&self, free: &[u64], wanted: Option<usize>) -> Result<Vec<usize>, usize> {
        let fits = |embedding: u64| -> Vec<usize> {
            let last = free.len() - 1;
            let slots = |(index, &free): (usize, &u64)| {
                let output = if index == last { self.output } else { 0 };
                let is_same = self.is_tied && index == last;
                let embedding = if index == 0 && !is_same { embedding } else { 0 };
                let room = free.checked_sub(self.working + embedding + output)?;
                Some((room / self.block) as usize)
            };
            // Every device that was asked for takes part, or none does.
            free.iter().enumerate().map(slots).collect::<Option<_>>().unwrap_or(vec![0; free.len()])
        };
        let with_embedding = fits(self.embedding);
        let all = with_embedding.iter().sum::<usize>() >= self.blocks;
        let slots = if all { with_embedding } else { fits(0) };
        // Short of all blocks the embedding stays behind, and the first block with it.
        let most = if all { self.blocks } else { slots.iter().sum::<usize>().min(self.blocks - 1) };
        match wanted {
            Some(wanted) if wanted > most => Err(most),
            wanted => Ok(in_proportion(wanted.unwrap_or(most), &slots)),
        }
    }
}

/// Activations of a batch of tokens, angles and logits, in bytes.
fn working_bytes(decoder: &Decoder, context: usize) -> u64 {
    let Attention { heads, head_dim, .. } = *attention_of(&decoder.blocks[0]);
    let experts = decoder.blocks.iter().filter_map(|block| block.experts);
    let of_experts =
        experts.map(|e| 2 * usize::from(e.used) * e.ffn.width + 8 * usize::from(e.count));
    let widths = 12 * decoder.hidden_size
        + 8 * heads * head_dim
        + 10 * decoder.widest_ffn()
        + of_experts.max().unwrap_or(0);
    let batch = PREFILL_BATCH.min(context) * widths;
    let angles: usize = decoder.ropes.iter().map(|rope| 8 * context * rope.factors.len()).sum();
    (batch + angles + 4 * decoder.vocab_size) as u64
}

/// Shares out `count` in proportion to `slots`, never more than there are.
fn in_proportion(count: usize, slots: &[usize]) -> Vec<usize> {
    let total: usize = slots.iter().sum();
    let (mut slots_before, mut given) = (0, 0);
    let share = |&slots: &usize| {
        slots_before += slots;
        let up_to_here = (count * slots_before).div_ceil(total.max(1));
        let share = up_to_here - given;
        given = up_to_here;
        share
    };
    slots.iter().map(share).collect()
}

/// The blocks of each device, the last ones of the model: `counts` one after the other.
pub(crate) fn ranges(blocks: usize, counts: &[usize]) -> Vec<Range<usize>> {
    let mut next = blocks - counts.iter().sum::<usize>();
    let range = |&count: &usize| {
        let first = next;
        next += count;
        first..next
    };
    counts.iter().map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes =
        Sizes { block: 10, blocks: 8, embedding: 7, output: 5, is_tied: false, working: 3 };

    #[test]
    fn one_device_takes_all_if_all_fits() {
        assert_eq!(SIZES.split(&[95], None), Ok(vec![8]));
        assert_eq!(SIZES.split(&[94], None), Ok(vec![7]));
        assert_eq!(SIZES.split(&[94], Some(8)), Err(7));
        assert_eq!(SIZES.split(&[94], Some(3)), Ok(vec![3]));
    }

    #[test]
    fn tied_embeddings_take_their_room_once_on_one_device() {
        let tied = Sizes { is_tied: true, ..SIZES };
        assert_eq!(tied.split(&[88], None), Ok(vec![8]));
    }

    #[test]
    fn too_small_a_device_takes_nothing() {
        assert_eq!(SIZES.split(&[7], None), Ok(vec![0]));
        assert_eq!(SIZES.split(&[0], Some(1)), Err(0));
    }

    #[test]
    fn devices_share_in_proportion_to_their_room() {
        assert_eq!(SIZES.split(&[1000, 1000], None), Ok(vec![4, 4]));
        assert_eq!(SIZES.split(&[70, 28], None), Ok(vec![6, 2]));
        assert_eq!(SIZES.split(&[33, 48], None), Ok(vec![3, 4]));
        assert_eq!(SIZES.split(&[33, 0], Some(3)), Err(0));
    }

    #[test]
    fn ranges_are_the_last_blocks_in_order() {
        assert_eq!(ranges(8, &[3, 2]), [3..6, 6..8]);
        assert_eq!(ranges(2, &[0, 0]), [2..2, 2..2]);
    }
}
