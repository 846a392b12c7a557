//! A model of random weights in memory.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use slim_formats::{
    DType, FormatError, ModelConfig, ModelSource, TokenizerSource, Weight,
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
        let mut tensors = HashMap::new();
        for (seed, (name, [rows, cols])) in shapes(&config, distinct).into_iter().enumerate() {
            let is_embedding = name == "token_embd.weight";
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
                    match name.contains(".ffn_gate.") || name.contains(".ffn_up.") {
                        true => spec.bands(seed as u64, &[upper, rows - upper]),
                        false => spec.fill(seed as u64, Fill::Random),
                    }
                }
            };
            tensors.insert(name, weight);
        }
        Self { config, distinct, tensors, tokenizer: TokenizerSource::Missing }
    }

    /// Bytes of all tensors in a file.
    pub fn stored_bytes(&self) -> u64 {
        let names = shapes(&self.config, self.config.block_count).into_iter().map(|(name, _)| name);
        names.filter_map(|name| self.find(&name)).map(weight::stored_bytes).sum()
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

/// The tensors of a model with `blocks` blocks: names, rows and columns.
fn shapes(c: &ModelConfig, blocks: usize) -> Vec<(String, [usize; 2])> {
    let (hidden, ffn) = (c.hidden_size, c.ffn_size);
    let (q_dim, kv_dim) = (c.head_count * c.head_dim, c.kv_head_count * c.head_dim);
    let block = [
        ("attn_norm", [1, hidden]),
        ("attn_q", [q_dim, hidden]),
        ("attn_k", [kv_dim, hidden]),
        ("attn_v", [kv_dim, hidden]),
        ("attn_output", [hidden, q_dim]),
        ("ffn_norm", [1, hidden]),
        ("ffn_gate", [ffn, hidden]),
        ("ffn_up", [ffn, hidden]),
        ("ffn_down", [hidden, ffn]),
    ];
    let blocks = (0..blocks)
        .flat_map(|i| block.map(|(name, shape)| (format!("blk.{i}.{name}.weight"), shape)));
    let ends = [
        ("token_embd.weight", [c.vocab_size, hidden]),
        ("output_norm.weight", [1, hidden]),
        ("output.weight", [c.vocab_size, hidden]),
    ];
    blocks.chain(ends.map(|(name, shape)| (name.to_owned(), shape))).collect()
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
