//! Which tensors of the model a module path leads to, by whatever exporter it was written.

use std::collections::HashMap;

use crate::{Decoder, ModelConfig, Part, arch::Tensor};

/// Longer paths are no module's.
const MAX_PATH_BYTES: usize = 1 << 12;

/// The tensors of a model and the modules that they belong to.
#[derive(Debug)]
pub struct Modules {
    /// In the order of use, with an output layer, though it may be the embedding.
    pub slots: Vec<Tensor>,
    /// By Hugging Face's path.
    by_path: HashMap<String, Module>,
    /// The paths of those outside of blocks, by the last name in them.
    outside: HashMap<String, String>,
    /// What stands before a block's number in a path.
    blocks: &'static str,
    /// Transformer blocks.
    pub block_count: usize,
}

/// The slots of a module: several, one above the other, of a fused one.
#[derive(Debug, Default)]
pub struct Module {
    /// Of its weight.
    pub weight: Vec<usize>,
    /// Of its bias; none if it has none.
    pub bias: Vec<usize>,
}

impl Module {
    fn add(&mut self, slot: usize, parameter: &str) {
        match parameter {
            "bias" => self.bias.push(slot),
            _ => self.weight.push(slot),
        }
    }
}

impl Modules {
    /// The modules of a model.
    pub fn new(config: &ModelConfig) -> Self {
        let block_count = config.block_count;
        let untied = ModelConfig { tied_embeddings: false, ..config.clone() };
        let slots = Decoder::new(&untied).tensors().to_vec();
        let mut by_path: HashMap<String, Module> = HashMap::new();
        let mut outside = HashMap::new();
        for (index, slot) in slots.iter().enumerate() {
            let (path, parameter) = slot.hf.name.rsplit_once('.').unwrap_or((&slot.hf.name, ""));
            by_path.entry(path.to_owned()).or_default().add(index, parameter);
            let (parent, name) = path.rsplit_once('.').unwrap_or(("", path));
            if slot.block.is_none() {
                outside.insert(name.to_owned(), path.to_owned());
            }
            if is_of_qkv(slot.part) && !slot.hf.is_fused(slot) {
                let fused = by_path.entry(format!("{parent}.qkv_proj")).or_default();
                fused.add(index, parameter);
            }
        }
        Self { slots, by_path, outside, blocks: config.family.hf_blocks(), block_count }
    }

    /// The module at a path of names with dots or slashes between them; `None` if the model has no
    /// parameters there. What stands before the path of a known module is skipped.
    pub fn at(&self, path: &str) -> Option<&Module> {
        self.by_path.get(&self.canonical(path)?)
    }

    /// Hugging Face's path of a module, its names changed to those of `transformers`.
    fn canonical(&self, path: &str) -> Option<String> {
        if path.len() > MAX_PATH_BYTES {
            return None;
        }
        let parts: Vec<&str> = path.split(['.', '/']).collect();
        let block = parts.windows(2).enumerate().rev().find_map(|(at, pair)| match pair {
            ["layers", number] => Some((at + 2, number.parse::<usize>().ok()?)),
            _ => None,
        });
        let Some((start, block)) = block else {
            return self.outside.get(*parts.last()?).cloned();
        };
        // The ONNX Runtime GenAI builder calls the attention `attn`, and the last norm one of a
        // block after the last.
        let inner = parts[start..].join(".");
        if block == self.block_count && inner == "final_norm_layernorm" {
            let norm = self.slots.iter().find(|slot| slot.part == Part::OutputNorm)?;
            return Some(norm.hf.name.rsplit_once('.')?.0.to_owned());
        }
        let blocks = self.blocks;
        Some(match inner.strip_prefix("attn.") {
            Some(projection) => format!("{blocks}{block}.self_attn.{projection}"),
            None => format!("{blocks}{block}.{inner}"),
        })
    }
}

/// Whether it is of the matrix or the bias that some exporters fuse.
fn is_of_qkv(part: Part) -> bool {
    let of_weights = [Part::AttnQ, Part::AttnK, Part::AttnV];
    of_weights.iter().any(|&weight| weight == part || weight.bias() == Some(part))
}
