//! Which tensors of the model a module path leads to, by whatever exporter it was written.

use std::collections::HashMap;

use crate::{Decoder, ModelConfig, Part, arch::Tensor};

/// Longer paths are no module's.
const MAX_PATH_BYTES: usize = 1 << 12;

/// The tensors of a model and the modules that they are the weights of.
#[derive(Debug)]
pub struct Modules {
    /// In the order of use, with an output layer, though it may be the embedding.
    pub slots: Vec<Tensor>,
    /// Hugging Face's path of a module to its slots: several, one above the other, for a fused one.
    by_path: HashMap<String, Vec<usize>>,
    /// Transformer blocks.
    pub block_count: usize,
}

impl Modules {
    /// The modules of a model.
    pub fn new(config: &ModelConfig) -> Self {
        let block_count = config.block_count;
        let untied = ModelConfig { tied_embeddings: false, ..config.clone() };
        let slots = Decoder::new(&untied).tensors().to_vec();
        let mut by_path: HashMap<String, Vec<usize>> = HashMap::new();
        for (index, slot) in slots.iter().enumerate() {
            let path = slot.hf.name.trim_end_matches(".weight");
            by_path.entry(path.to_owned()).or_default().push(index);
            if let (Part::AttnQ | Part::AttnK | Part::AttnV, false, Some((attention, _))) =
                (slot.part, slot.hf.is_fused(slot), path.rsplit_once('.'))
            {
                by_path.entry(format!("{attention}.qkv_proj")).or_default().push(index);
            }
        }
        Self { slots, by_path, block_count }
    }

    /// The slots of the module at a path of names with dots or slashes between them: one, several
    /// of a fused module, or none if the model has no weights there. What stands before the path of
    /// a known module is skipped.
    pub fn at(&self, path: &str) -> &[usize] {
        self.canonical(path).and_then(|path| self.by_path.get(&path)).map_or(&[], Vec::as_slice)
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
            return match *parts.last()? {
                "embed_tokens" => Some("model.embed_tokens".to_owned()),
                "norm" => Some("model.norm".to_owned()),
                "lm_head" => Some("lm_head".to_owned()),
                _ => None,
            };
        };
        // The ONNX Runtime GenAI builder calls the attention `attn`, and the last norm one of a
        // block after the last.
        let inner = parts[start..].join(".");
        if block == self.block_count && inner == "final_norm_layernorm" {
            return Some("model.norm".to_owned());
        }
        Some(match inner.strip_prefix("attn.") {
            Some(projection) => format!("model.layers.{block}.self_attn.{projection}"),
            None => format!("model.layers.{block}.{inner}"),
        })
    }
}
