//! A model of random weights in memory.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use slim_formats::{
    DType, Decoder, FormatError, ModelConfig, ModelSource, Part, TokenizerSource, Weight,
    arch::{Rows, Tensor},
    slim::{ScaleCoding, TILE_ROWS},
};
use slim_kernels::weight;

use crate::weights::{Fill, HostWeight, LayerSpec, TWO_LEVEL};

/// How the linear layers are stored.
#[derive(Debug, Clone, Copy)]
pub enum Storage<'a> {
    /// Packed, with groups of these widths in turn, `ffn_gate` and `ffn_up` in two bands; the
    /// embedding and the output layer have 8 bits.
    Packed(&'a [u8]),
    /// fp16.
    Half,
}

/// A model whose blocks share the weights of a few: the host holds only those.
pub struct RandomModel {
    config: ModelConfig,
    decoder: Decoder,
    /// Blocks that differ.
    distinct: usize,
    tensors: HashMap<String, HostWeight>,
    tokenizer: TokenizerSource,
}

impl RandomModel {
    pub fn new(
        config: ModelConfig,
        distinct: usize,
        group_size: usize,
        storage: Storage<'_>,
    ) -> Self {
        let decoder = Decoder::new(&config);
        let mut held = HashMap::new();
        for (seed, tensor) in tensors(&decoder, distinct).enumerate() {
            let (rows, cols) = tensor.shape();
            let is_embedding = tensor.part == Part::Embedding;
            let size = if is_embedding { 1.0 } else { 1.0 / (cols as f32).sqrt() };
            let large = LayerSpec {
                rows,
                cols,
                group_size,
                coding: ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 6 },
                widths: &[8],
                size,
            };
            let weight = match storage {
                _ if rows == 1 => HostWeight::dense(seed as u64, DType::F32, [rows, cols], 1.0),
                Storage::Half => HostWeight::dense(seed as u64, DType::F16, [rows, cols], size),
                Storage::Packed(_) if rows == config.vocab_size => {
                    large.fill(seed as u64, Fill::Random)
                }
                Storage::Packed(widths) => {
                    let spec = LayerSpec { coding: TWO_LEVEL, widths, ..large };
                    let upper = (rows / 4).next_multiple_of(TILE_ROWS);
                    match tensor.part.rows() == Rows::Neurons {
                        true => spec.bands(seed as u64, &[upper, rows - upper]),
                        false => spec.fill(seed as u64, Fill::Random),
                    }
                }
            };
            held.insert(tensor.name.clone(), weight);
        }
        Self { config, decoder, distinct, tensors: held, tokenizer: TokenizerSource::Missing }
    }

    /// Bytes of all tensors in a file.
    pub fn stored_bytes(&self) -> u64 {
        let tensors = self.decoder.tensors().iter();
        tensors.filter_map(|tensor| self.find(&tensor.name)).map(weight::stored_bytes).sum()
    }

    fn find(&self, name: &str) -> Option<Weight<'_>> {
        let of_block = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let held =
            match of_block.and_then(|(index, rest)| Some((index.parse::<usize>().ok()?, rest))) {
                Some((index, rest)) => {
                    self.tensors.get(&format!("blk.{}.{rest}", index % self.distinct))
                }
                None => self.tensors.get(name),
            };
        held.map(HostWeight::view)
    }
}

/// The tensors of the first `blocks` blocks, then those outside of blocks.
fn tensors(decoder: &Decoder, blocks: usize) -> impl Iterator<Item = &Tensor> {
    let of_blocks = (0..blocks).flat_map(|block| decoder.tensors_of(block));
    of_blocks.chain(decoder.tensors().iter().filter(|tensor| tensor.block.is_none()))
}

impl ModelSource for RandomModel {
    fn path(&self) -> &Path {
        Path::new("random weights")
    }

    fn format(&self) -> &'static str {
        "memory"
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn tensor_names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn tensor(&self, name: &str) -> Result<Option<Weight<'_>>, FormatError> {
        Ok(self.find(name))
    }

    fn tokenizer(&self) -> &TokenizerSource {
        &self.tokenizer
    }

    fn chat_template(&self) -> Option<&str> {
        None
    }

    fn files(&self) -> Vec<PathBuf> {
        Vec::new()
    }
}
