//! A whole decoder: its blocks, and every tensor that it is made of.

use std::{collections::HashMap, ops::Range};

use super::{BlockSpec, Family, Part};
use crate::{Layout, ModelConfig, Rope};

/// What a model computes, and the tensors that it needs for it.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// Whose model it is.
    pub family: &'static dyn Family,
    /// Channels of the residual stream.
    pub hidden_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// The constant under the root of RMS normalization.
    pub norm_epsilon: f32,
    /// The rotary position embeddings that blocks choose from.
    pub ropes: Vec<Rope>,
    /// First to last.
    pub blocks: Vec<BlockSpec>,
    /// In the order of use.
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
    /// Where the tensors of each block are.
    of_blocks: Vec<Range<usize>>,
}

/// A tensor of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// What it is for.
    pub part: Part,
    /// The block that it is in, if it is in one.
    pub block: Option<usize>,
    /// GGUF's name, which it goes by in this project.
    pub name: String,
    /// Hugging Face's name.
    pub hf_name: String,
    /// Outermost first: `[cols]` of a vector, `[rows, cols]` of a matrix.
    pub dims: Vec<usize>,
    /// The order of its rows in llama.cpp's files.
    pub gguf_layout: Layout,
}

impl Tensor {
    /// Rows and columns; a vector has one row.
    pub fn shape(&self) -> (usize, usize) {
        match self.dims[..] {
            [rows, cols] => (rows, cols),
            _ => (1, self.dims[0]),
        }
    }

    /// Whether it is a matrix.
    pub fn is_matrix(&self) -> bool {
        self.dims.len() == 2
    }

    /// Whether it is a matrix of a block.
    pub fn is_linear(&self) -> bool {
        self.block.is_some() && self.is_matrix()
    }
}

impl Decoder {
    /// The model of a configuration.
    pub fn new(config: &ModelConfig) -> Self {
        let ModelConfig { family, hidden_size, vocab_size, norm_epsilon, .. } = *config;
        let blocks: Vec<BlockSpec> =
            (0..config.block_count).map(|index| family.block(config, index)).collect();
        let mut decoder = Self {
            family,
            hidden_size,
            vocab_size,
            norm_epsilon,
            ropes: vec![config.rope.clone()],
            blocks: Vec::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
            of_blocks: Vec::new(),
        };
        decoder.add(Part::Embedding, None, vec![vocab_size, hidden_size]);
        for (index, spec) in blocks.iter().enumerate() {
            let first = decoder.tensors.len();
            let mut parts: Vec<Part> = spec.vectors().chain(spec.layers()).collect();
            parts.sort_unstable();
            for part in parts {
                decoder.add(part, Some((index, spec)), spec.dims(part, hidden_size));
            }
            decoder.of_blocks.push(first..decoder.tensors.len());
        }
        decoder.add(Part::OutputNorm, None, vec![hidden_size]);
        if !config.tied_embeddings {
            decoder.add(Part::Output, None, vec![vocab_size, hidden_size]);
        }
        Self { blocks, ..decoder }
    }

    fn add(&mut self, part: Part, block: Option<(usize, &BlockSpec)>, dims: Vec<usize>) {
        let (gguf, hf) = (part.gguf_name(), self.family.hf_name(part));
        let (name, hf_name) = match block {
            None => (gguf.to_owned(), hf.to_owned()),
            Some((index, _)) => {
                (format!("blk.{index}.{gguf}"), format!("model.layers.{index}.{hf}"))
            }
        };
        let gguf_layout = match block {
            None => Layout::AsStored,
            Some((_, spec)) => self.family.gguf_layout(part, spec),
        };
        let block = block.map(|(index, _)| index);
        self.by_name.insert(name.clone(), self.tensors.len());
        self.tensors.push(Tensor { part, block, name, hf_name, dims, gguf_layout });
    }

    /// All tensors, in the order of use.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensors of a block, in the order of use.
    pub fn tensors_of(&self, block: usize) -> &[Tensor] {
        &self.tensors[self.of_blocks[block].clone()]
    }

    /// The tensor with this GGUF name.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// A tensor of a block.
    ///
    /// # Panics
    /// If the block has no such part.
    pub fn tensor(&self, block: usize, part: Part) -> &Tensor {
        let found = self.tensors_of(block).iter().find(|tensor| tensor.part == part);
        found.unwrap_or_else(|| panic!("no {part:?} in block {block}"))
    }

    /// The embedding.
    pub fn embedding(&self) -> &Tensor {
        self.find(Part::Embedding.gguf_name()).expect("every model has an embedding")
    }

    /// The norm behind the last block.
    pub fn output_norm(&self) -> &Tensor {
        self.find(Part::OutputNorm.gguf_name()).expect("every model has one")
    }

    /// The output layer; the embedding itself in models that tie them.
    pub fn output(&self) -> &Tensor {
        self.find(Part::Output.gguf_name()).unwrap_or_else(|| self.embedding())
    }

    /// Whether the embedding is the output layer, too.
    pub fn has_tied_embeddings(&self) -> bool {
        self.output().part == Part::Embedding
    }
}
