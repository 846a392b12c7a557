//! A whole decoder: its blocks, and every tensor that it is made of.

use std::{collections::HashMap, ops::Range};

use super::{Attention, BlockSpec, ExpertPart, Family, Norm, Part, Values};
use crate::{BlockEmbedding, Layout, ModelConfig, Rope};

/// What precedes the names of tensors for guessing further tokens, in files of some families.
const GUESSING: &str = "mtp.";

/// What a model computes, and the tensors that it needs for it.
///
/// `logits = cap(logit_scale * output(down(norm(blocks(x)))))`, with
/// `x = up(embedding_scale * embedding[token])`. `up` and `down` stand where embeddings have other
/// channels than the residual stream. Learned positions, if there are any, are added to what goes
/// into the first block.
///
/// Where tokens have something to say to each block by themselves, that is, with `e` the scaled
/// embedding, `(sqrt(embedded) * table[token] + norm(up(e) / sqrt(hidden))) / sqrt(2)`, of which
/// each block has its own `embedded` channels.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// Whose model it is.
    pub family: &'static dyn Family,
    /// Channels of the residual stream.
    pub hidden_size: usize,
    /// Channels of the embedding and the output layer.
    pub embedding_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// How the norm behind the last block is computed; `None` if there is none.
    pub norm: Option<Norm>,
    /// The constant under the root of normalization.
    pub norm_epsilon: f32,
    /// What embeddings are multiplied by.
    pub embedding_scale: f32,
    /// What logits are multiplied by.
    pub logit_scale: f32,
    /// `c * tanh(logit / c)` in place of a logit.
    pub logit_softcap: Option<f32>,
    /// The rotary position embeddings that blocks choose from.
    pub ropes: Vec<Rope>,
    /// First to last.
    pub blocks: Vec<BlockSpec>,
    /// Blocks behind them that guess further tokens, which files may hold and nothing uses.
    guessing_blocks: usize,
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
    /// The name that it goes by in this project: GGUF's.
    pub name: String,
    /// Outermost first: `[length]` of a vector, `[rows, cols]` of a matrix.
    pub dims: Vec<usize>,
    /// Where it is in Hugging Face's files.
    pub hf: Place,
    /// Where it is in llama.cpp's files.
    pub gguf: Place,
}

/// Where files of a kind have a tensor: alone, or as some rows of a fused one.
#[derive(Debug, Clone, PartialEq)]
pub struct Place {
    /// The stored tensor.
    pub name: String,
    /// The first of its rows; of a vector, of its values.
    pub first_row: usize,
    /// All rows of the stored tensor.
    pub total_rows: usize,
    /// The outermost dimension, of a stored tensor with three: how many experts it holds the rows
    /// of, heads, or the channels of a convolution.
    pub outer: Option<usize>,
    /// The order of rows; of a vector, of values.
    pub layout: Layout,
    /// What the stored values are.
    pub form: Form,
}

/// What the values of a vector are in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The values that are used.
    AsUsed,
    /// `value - 1`, of norms.
    LessOne,
    /// `ln(-value)`, of rates below 0.
    LogOfNegative,
}

impl Form {
    /// What is used for a stored value.
    pub fn used(self, stored: f32) -> f32 {
        match self {
            Self::AsUsed => stored,
            Self::LessOne => stored + 1.0,
            Self::LogOfNegative => -stored.exp(),
        }
    }

    /// What is stored for a value that is used.
    pub fn stored(self, used: f32) -> f32 {
        match self {
            Self::AsUsed => used,
            Self::LessOne => used - 1.0,
            Self::LogOfNegative => (-used).ln(),
        }
    }
}

impl Place {
    /// Whether it is some rows of a fused tensor.
    pub fn is_fused(&self, tensor: &Tensor) -> bool {
        self.total_rows != tensor.dims[0]
    }

    /// The layout of a matrix that is stored column by column, and would otherwise be in this one.
    fn transposed(&self) -> Layout {
        let stride = self.total_rows / self.outer.unwrap_or(1);
        match self.layout {
            Layout::AsStored => Layout::Transposed { stride, step: 1 },
            Layout::Strided { piece: 1, stride: step } => Layout::Transposed { stride, step },
            other => panic!("{other:?} column by column"),
        }
    }

    /// The dimensions of the stored tensor, outermost first: those of `tensor`, with all rows and a
    /// dimension for experts.
    pub fn stored_dims(&self, tensor: &Tensor) -> Vec<usize> {
        let mut dims = tensor.dims.clone();
        dims[0] = self.total_rows / self.outer.unwrap_or(1);
        if let Layout::Transposed { .. } | Layout::TransposedHeads { .. } = self.layout {
            dims.reverse();
        }
        self.outer.into_iter().chain(dims).collect()
    }

    /// Rows and columns of the stored tensor, of matrices of experts one above the other.
    pub(crate) fn stored_shape(&self, tensor: &Tensor) -> (usize, usize) {
        let dims = self.stored_dims(tensor);
        let (cols, above) = dims.split_last().expect("a tensor has dimensions");
        (above.iter().product(), *cols)
    }

    /// How many values of the stored tensor precede the first of a matrix with `cols` columns.
    pub fn first_value(&self, cols: usize) -> usize {
        match self.layout {
            Layout::Transposed { .. } => {
                let of_expert = self.total_rows / self.outer.unwrap_or(1);
                let (expert, row) = (self.first_row / of_expert, self.first_row % of_expert);
                expert * of_expert * cols + row
            }
            _ => self.first_row * cols,
        }
    }
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

    /// Whether it is a linear layer of a block that may be quantized.
    pub fn is_linear(&self) -> bool {
        self.block.is_some() && self.is_matrix() && !self.part.stays_precise()
    }
}

impl Decoder {
    /// The model of a configuration.
    pub fn new(config: &ModelConfig) -> Self {
        let ModelConfig { family, hidden_size, vocab_size, norm_epsilon, .. } = *config;
        let features = &config.features;
        let embedding_size = features.embedding_size.unwrap_or(hidden_size);
        let is_projected = embedding_size != hidden_size;
        let blocks: Vec<BlockSpec> =
            (0..config.block_count).map(|index| family.block(config, index)).collect();
        let mut decoder = Self {
            family,
            hidden_size,
            embedding_size,
            vocab_size,
            norm: features.has_output_norm().then(|| family.norm()),
            norm_epsilon,
            embedding_scale: features.embedding_scale,
            logit_scale: features.logit_scale,
            logit_softcap: features.logit_softcap,
            ropes: std::iter::once(&config.rope).chain(&features.local_rope).cloned().collect(),
            blocks: Vec::new(),
            guessing_blocks: features.guessing_blocks,
            tensors: Vec::new(),
            by_name: HashMap::new(),
            of_blocks: Vec::new(),
        };
        decoder.add(Part::Embedding, None, vec![vocab_size, embedding_size]);
        if is_projected {
            decoder.add(Part::EmbeddingUp, None, vec![hidden_size, embedding_size]);
        }
        if let Some(count) = family.learned_positions(config) {
            decoder.add(Part::Positions, None, vec![count, hidden_size]);
        }
        if let Some(BlockEmbedding { width, rows }) = features.block_embedding {
            let all = config.block_count * width;
            decoder.add(Part::BlockEmbedding, None, vec![rows, all]);
            decoder.add(Part::BlockEmbeddingUp, None, vec![all, hidden_size]);
            decoder.add(Part::BlockEmbeddingNorm, None, vec![width]);
        }
        for (index, spec) in blocks.iter().enumerate() {
            let first = decoder.tensors.len();
            let mut parts: Vec<Part> = spec.parts().collect();
            parts.sort_unstable();
            for part in parts {
                decoder.add(part, Some((index, spec)), spec.dims(part, hidden_size));
            }
            decoder.of_blocks.push(first..decoder.tensors.len());
        }
        if let Some(norm) = decoder.norm {
            decoder.add(Part::OutputNorm, None, vec![hidden_size]);
            if norm == Norm::Layer {
                decoder.add(Part::OutputNormBias, None, vec![hidden_size]);
            }
        }
        if is_projected {
            decoder.add(Part::EmbeddingDown, None, vec![embedding_size, hidden_size]);
        }
        if !config.tied_embeddings {
            decoder.add(Part::Output, None, vec![vocab_size, embedding_size]);
        }
        Self { blocks, ..decoder }
    }

    fn add(&mut self, part: Part, block: Option<(usize, &BlockSpec)>, dims: Vec<usize>) {
        let family = self.family;
        let in_block = |prefix: &str, name: &str| match block {
            None => name.to_owned(),
            Some((index, _)) => format!("{prefix}{index}.{name}"),
        };
        let name = in_block("blk.", &part.gguf_name());
        let place = |prefix: &str, own: &str, stored: Stored| {
            let Stored { layout, form, has_outer, heads, is_transposed, .. } = stored;
            let (first_row, total_rows) = (0, dims[0]);
            let outer = heads.or(has_outer.then_some(total_rows));
            let alone = Place { name: String::new(), first_row, total_rows, outer, layout, form };
            let place = match (stored.fused, block) {
                (Some(Fused::Alone(name)), _) => Place { name: name.to_owned(), ..alone },
                (Some(fused), Some((_, spec))) => fused.place(part, spec, self.hidden_size, alone),
                _ => Place { name: own.to_owned(), ..alone },
            };
            let layout = match is_transposed {
                true => place.transposed(),
                false => place.layout,
            };
            Place { name: in_block(prefix, &place.name), layout, ..place }
        };
        let spec = block.map(|(_, spec)| spec);
        let hf = place(family.hf_blocks(), &family.hf_name(part), family.in_hf(part, spec));
        let gguf = place("blk.", &part.gguf_name(), family.in_gguf(part, spec));
        let block = block.map(|(index, _)| index);
        self.by_name.insert(name.clone(), self.tensors.len());
        self.tensors.push(Tensor { part, block, name, dims, hf, gguf });
    }

    /// All tensors, in the order of use.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensors of a block, in the order of use.
    pub fn tensors_of(&self, block: usize) -> &[Tensor] {
        &self.tensors[self.of_blocks[block].clone()]
    }

    /// The tensor with this name.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// A tensor of a block.
    ///
    /// # Panics
    /// If the block has no such part.
    pub fn tensor(&self, block: usize, part: Part) -> &Tensor {
        let tensors = self.tensors_of(block);
        match tensors.binary_search_by_key(&part, |tensor| tensor.part) {
            Ok(index) => &tensors[index],
            Err(_) => panic!("no {part:?} in block {block}"),
        }
    }

    /// Whether a tensor of a file, whose blocks follow `prefix`, is of those that guess further
    /// tokens: of a block behind the last, or by its name.
    pub(crate) fn is_of_guessing(&self, prefix: &str, name: &str) -> bool {
        if name.starts_with(GUESSING) {
            return true;
        }
        let number = name.strip_prefix(prefix).and_then(|rest| rest.split_once('.'));
        let index = number.and_then(|(index, _)| index.parse::<usize>().ok());
        let blocks = self.blocks.len();
        index.is_some_and(|index| (blocks..blocks + self.guessing_blocks).contains(&index))
    }

    /// A tensor outside of blocks; `None` if the model has no such part.
    pub fn outside(&self, part: Part) -> Option<&Tensor> {
        self.find(&part.gguf_name())
    }

    /// What it computes that engines with Llama's blocks and their variants do not; `None` if
    /// nothing.
    pub fn beyond_llama(&self) -> Option<&'static str> {
        let has_experts = self.blocks.iter().any(|block| block.experts.is_some());
        if has_experts { Some("experts") } else { self.beyond_experts() }
    }

    /// The same of engines that have experts, too.
    pub fn beyond_experts(&self) -> Option<&'static str> {
        let any = |has: &dyn Fn(&BlockSpec) -> bool| self.blocks.iter().any(has);
        let attends =
            |has: fn(&Attention) -> bool| any(&|block| block.attention().is_some_and(has));
        if any(&|block| block.attention().is_none()) {
            Some("blocks of another kind than attention")
        } else if attends(|attention| attention.has_sinks) {
            Some("attention sinks")
        } else if attends(|attention| attention.values != Values::Plain) {
            Some("normed values")
        } else if any(&|block| block.embedded.is_some() || block.is_scaled) {
            Some("embeddings or scales of each block")
        } else {
            None
        }
    }

    /// Whether other blocks attend to the keys and values of block `index`.
    pub fn is_shared(&self, index: usize) -> bool {
        self.blocks.iter().any(|block| block.shares() == Some(index))
    }

    /// Neurons of the widest network of all tokens; 0 if no block has one.
    pub fn widest_ffn(&self) -> usize {
        let width = |block: &BlockSpec| block.ffn.map_or(0, |ffn| ffn.width);
        self.blocks.iter().map(width).max().unwrap_or(0)
    }

    /// The embedding.
    pub fn embedding(&self) -> &Tensor {
        self.outside(Part::Embedding).expect("every model has an embedding")
    }

    /// The norm behind the last block, if there is one.
    pub fn output_norm(&self) -> Option<&Tensor> {
        self.outside(Part::OutputNorm)
    }

    /// The output layer; the embedding itself in models that tie them.
    pub fn output(&self) -> &Tensor {
        self.outside(Part::Output).unwrap_or_else(|| self.embedding())
    }

    /// Whether the embedding is the output layer, too.
    pub fn has_tied_embeddings(&self) -> bool {
        self.output().part == Part::Embedding
    }
}

/// How files of a kind store a part.
#[derive(Debug, Clone, Copy)]
pub struct Stored {
    /// The tensor that it is in, if that is not one of its own name.
    pub fused: Option<Fused>,
    /// The order of rows; of a vector, of values.
    pub layout: Layout,
    /// What the stored values are.
    pub form: Form,
    /// Whether each row has a dimension of its own around it.
    pub has_outer: bool,
    /// The heads of a tensor that has a dimension for them.
    pub heads: Option<usize>,
    /// Whether each matrix is stored column by column.
    pub is_transposed: bool,
}

impl Stored {
    /// By itself, its rows in order, as it is used.
    pub const PLAIN: Self = Self {
        fused: None,
        layout: Layout::AsStored,
        form: Form::AsUsed,
        has_outer: false,
        heads: None,
        is_transposed: false,
    };

    /// By itself, in this form.
    pub const fn in_form(form: Form) -> Self {
        Self { form, ..Self::PLAIN }
    }

    /// In this order of rows.
    pub const fn ordered(layout: Layout) -> Self {
        Self { layout, ..Self::PLAIN }
    }

    /// As rows of a fused tensor of these parts.
    pub const fn fused(name: &'static str, parts: &'static [Part]) -> Self {
        Self::in_turns(name, parts, 1)
    }

    /// As rows of a fused tensor that has an equal number of rows of each of these parts in turn,
    /// `turns` times.
    pub const fn in_turns(name: &'static str, parts: &'static [Part], turns: usize) -> Self {
        Self { fused: Some(Fused::Parts(name, parts, turns)), ..Self::PLAIN }
    }

    /// As rows of a tensor of these parts of all experts of a block.
    pub const fn of_experts(name: &'static str, parts: &'static [ExpertPart]) -> Self {
        Self::of_experts_in_turns(name, parts, 1)
    }

    /// The same, of each expert an equal number of rows of each part in turn, `turns` times.
    pub const fn of_experts_in_turns(
        name: &'static str,
        parts: &'static [ExpertPart],
        turns: usize,
    ) -> Self {
        Self { fused: Some(Fused::Experts(name, parts, turns)), ..Self::PLAIN }
    }

    /// Each matrix column by column.
    pub const fn transposed(self) -> Self {
        Self { is_transposed: true, ..self }
    }

    /// By itself, under another name than its own.
    pub const fn named(name: &'static str) -> Self {
        Self { fused: Some(Fused::Alone(name)), ..Self::PLAIN }
    }
}

/// A tensor of a file that one or several of a model are rows of: its name, and what it holds, in
/// order.
#[derive(Debug, Clone, Copy)]
pub enum Fused {
    /// The part itself.
    Alone(&'static str),
    /// Parts of a block: some rows of each in turn, so many times.
    Parts(&'static str, &'static [Part], usize),
    /// Parts of the first expert of a block, then of the second, and so on; of each, some rows of
    /// each part in turn, so many times.
    Experts(&'static str, &'static [ExpertPart], usize),
}

impl Fused {
    /// Where a part is that would be at `alone` by itself.
    fn place(self, part: Part, spec: &BlockSpec, hidden_size: usize, alone: Place) -> Place {
        let rows = |part: Part| spec.dims(part, hidden_size)[0];
        match (self, part) {
            (Self::Experts(name, parts, turns), Part::Expert(index, _)) => {
                let parts: Vec<Part> =
                    parts.iter().map(|&part| Part::Expert(index, part)).collect();
                let of_expert = in_turns(&parts, turns, part, rows, alone);
                let experts = spec.experts.map_or(0, |experts| usize::from(experts.count));
                Place {
                    name: name.to_owned(),
                    first_row: usize::from(index) * of_expert.total_rows + of_expert.first_row,
                    total_rows: experts * of_expert.total_rows,
                    outer: Some(experts),
                    ..of_expert
                }
            }
            (Self::Parts(name, parts, turns), _) => {
                Place { name: name.to_owned(), ..in_turns(parts, turns, part, rows, alone) }
            }
            (Self::Alone(_) | Self::Experts(..), _) => panic!("{part:?} is in no fused tensor"),
        }
    }
}

/// Where `part` is among `parts`, of each of which some of its `rows` stand in turn, `turns` times;
/// by itself it would be at `alone`.
fn in_turns(
    parts: &[Part],
    turns: usize,
    part: Part,
    rows: impl Fn(Part) -> usize,
    alone: Place,
) -> Place {
    let before = parts.iter().take_while(|&&other| other != part);
    let first_row = before.map(|&part| rows(part) / turns).sum();
    let total_rows: usize = parts.iter().map(|&part| rows(part)).sum();
    let layout = match turns {
        1 => alone.layout,
        _ => Layout::Strided { piece: rows(part) / turns, stride: total_rows / turns },
    };
    Place { first_row, total_rows, layout, ..alone }
}
