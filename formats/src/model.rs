//! The one door to a model, whatever kind of file holds it.

use std::path::{Path, PathBuf};

use crate::{
    DType, Decoder, FormatError, MappedFile, ModelConfig, Result,
    gguf::{self, GgufFile, GgufModel, Metadata},
    onnx::OnnxModel,
    safetensors::HfDirectory,
    slim::{Bands, PackedTensor, SlimFile},
    stand_in,
};

/// An opened model. Tensors go by their GGUF names (`token_embd.weight`, `blk.0.attn_q.weight`,
/// ...) whatever the source calls them.
pub trait ModelSource: Send + Sync {
    /// The path that was opened.
    fn path(&self) -> &Path;
    /// Short name of the container: `safetensors`, `onnx`, `gguf`, `slim`.
    fn format(&self) -> &'static str;
    /// Hyperparameters.
    fn config(&self) -> &ModelConfig;
    /// What it computes, and the tensors that it needs for it.
    fn decoder(&self) -> &Decoder;
    /// Names of all tensors of the model, in a fixed order.
    fn tensor_names(&self) -> Vec<&str>;
    /// The tensor of this name, `None` if the model has none.
    ///
    /// # Errors
    /// `Malformed` if its shape or bytes contradict its type.
    fn tensor(&self, name: &str) -> Result<Option<Weight<'_>>>;
    /// The tensor of this name, which must be there.
    ///
    /// # Errors
    /// As [`Self::tensor`]; `Malformed` if the model has none.
    fn require(&self, name: &str) -> Result<Weight<'_>> {
        self.tensor(name)?.ok_or_else(|| {
            let place = format!("tensor `{name}`");
            FormatError::malformed(self.path(), place, "", "none", "a tensor")
        })
    }
    /// What the tokenizer is built from.
    fn tokenizer(&self) -> &TokenizerSource;
    /// The Jinja chat template, if the model has one.
    fn chat_template(&self) -> Option<&str>;
    /// Every file that the model was read from.
    fn files(&self) -> Vec<PathBuf>;
    /// What is odd about the model though it can be used, as sentences: flags that what is stored
    /// contradicts, keys that nobody knows, rules that the vocabulary breaks.
    fn warnings(&self) -> &[String] {
        &[]
    }
    /// Gives back the memory of tensors that were read from mapped files; they are read again when
    /// they are needed. Who walks through a model once calls it now and then, so that a file that
    /// is larger than memory does not fill it.
    fn release_pages(&self) {}
}

/// One tensor of a model.
#[derive(Clone, Copy)]
pub enum Weight<'a> {
    /// Plain or ggml-quantized values.
    Dense(DenseTensor<'a>),
    /// A SliM layer.
    Packed(PackedTensor<'a>),
    /// SliM layers, one above the other.
    Bands(Bands<'a>),
}

impl<'a> Weight<'a> {
    /// The SliM layers that it is made of, one or more; `None` of a dense one.
    pub fn bands(self) -> Option<Bands<'a>> {
        match self {
            Self::Dense(_) => None,
            Self::Packed(layer) => Some(layer.into()),
            Self::Bands(bands) => Some(bands),
        }
    }
}

/// A borrowed dense tensor of `rows` x `cols`; a vector has one row.
#[derive(Clone, Copy)]
pub struct DenseTensor<'a> {
    /// Element type.
    pub dtype: DType,
    /// Output channels.
    pub rows: usize,
    /// Input channels.
    pub cols: usize,
    /// From the tensor's first value to its last. Exactly `dtype.size_in_bytes(rows * cols)` bytes,
    /// `cols` filling whole blocks, unless the layout is one that tells how many.
    pub bytes: &'a [u8],
    /// Where in `bytes` the values are.
    pub layout: Layout,
    /// What blocks of the values are multiplied by; `None` for 1.
    pub scales: Option<BlockScales<'a>>,
}

/// What blocks of a matrix are multiplied by, as sources in FP8 and MXFP4 have it.
#[derive(Clone, Copy)]
pub struct BlockScales<'a> {
    /// `[rows of blocks, per_row]`.
    pub values: ScaleValues<'a>,
    /// Rows and columns of a block.
    pub block: (usize, usize),
    /// Blocks side by side.
    pub per_row: usize,
    /// The row of the blocks' matrix that is the first of the tensor.
    pub first_row: usize,
}

/// The numbers that blocks are multiplied by.
#[derive(Clone, Copy)]
pub enum ScaleValues<'a> {
    /// As they are.
    Floats(&'a [f32]),
    /// The exponents of powers of two, each 127 more ([`power_of_two`]).
    Exponents(&'a [u8]),
}

impl BlockScales<'_> {
    /// Those of a row.
    pub fn of_row(&self, row: usize) -> impl Iterator<Item = f32> {
        let first = (self.first_row + row) / self.block.0 * self.per_row;
        (first..first + self.per_row).map(|index| match self.values {
            ScaleValues::Floats(values) => values[index],
            ScaleValues::Exponents(exponents) => power_of_two(exponents[index]),
        })
    }
}

/// `2^(exponent - 127)`; 255 is not a number (E8M0).
pub fn power_of_two(exponent: u8) -> f32 {
    match exponent {
        // Below the smallest number whose fraction has a leading 1.
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(exponent) << 23),
    }
}

impl DenseTensor<'_> {
    /// Bytes that the tensor's own values take.
    pub fn stored_bytes(&self) -> u64 {
        let values = self.rows as u64 * self.cols as u64;
        self.dtype.size_in_bytes(values).unwrap_or_default()
    }

    /// Bytes of a row, of a tensor whose rows are stored one after the other.
    pub fn row_bytes(&self) -> usize {
        self.dtype.size_in_bytes(self.cols as u64).unwrap_or_default() as usize
    }
}

/// Where the values of a dense tensor lie. Everything in this project takes rows for output
/// channels, and turns (RoPE) channel `i` of the `n` rotated ones of a head with channel
/// `i + n / 2`, as Hugging Face mostly does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Row by row, in the order in which the rows are used.
    AsStored,
    /// Row by row, in the order of those who turn neighbours, as llama.cpp does in the `llama`
    /// architecture: among the `n` rotated rows of each head, stored row `2 i` is row `i`, and
    /// stored row `2 i + 1` is row `i + n / 2`.
    Interleaved {
        /// Rows per head.
        head_dim: usize,
        /// The first rotated one.
        first: usize,
        /// How many follow it.
        rotated: usize,
    },
    /// Row by row, in turns with the rows of others, as in files that fuse tensors so: row `r` is
    /// stored row `r / piece * stride + r % piece`. `bytes` end behind the last row.
    Strided {
        /// Rows that follow one another.
        piece: usize,
        /// Stored rows from the first of a piece to the first of the next.
        stride: usize,
    },
    /// Column by column, as in the right factor of an ONNX `MatMul`. The values are of a plain
    /// type; `bytes` holds `(cols - 1) * stride + (rows - 1) * step + 1` of them.
    Transposed {
        /// Values from a column to the next: `rows`, or more if the tensor is a part of a fused
        /// one.
        stride: usize,
        /// Values from a row to the next: 1, or more if rows of others stand between.
        step: usize,
    },
    /// Head by head, each column by column: a column of a head is a row of blocks.
    TransposedHeads {
        /// Rows per head.
        head_rows: usize,
    },
}

impl Layout {
    /// Which stored row is row `row`; `None` where rows are not stored one after the other.
    pub fn stored_row(self, row: usize) -> Option<usize> {
        match self {
            Self::AsStored => Some(row),
            Self::Interleaved { head_dim, first, rotated } => {
                let (channel, half) = (row % head_dim, rotated / 2);
                let turned = channel.wrapping_sub(first);
                let stored = match turned < rotated {
                    true => first + 2 * (turned % half) + turned / half,
                    false => channel,
                };
                Some(row - channel + stored)
            }
            Self::Strided { piece, stride } => Some(row / piece * stride + row % piece),
            Self::Transposed { .. } | Self::TransposedHeads { .. } => None,
        }
    }
}

/// Where the tokenizer comes from.
#[derive(Debug, Clone)]
pub enum TokenizerSource {
    /// The text of a Hugging Face `tokenizer.json`.
    HuggingFace(String),
    /// The `tokenizer.ggml.*` keys of a GGUF file.
    Ggml(Metadata),
    /// The source has no tokenizer.
    Missing,
}

impl TokenizerSource {
    /// The tokenizer in the metadata of a GGUF file: a whole `tokenizer.json` if it has one.
    pub fn from_gguf(metadata: &Metadata) -> Self {
        if let Some(text) = metadata.str("tokenizer.huggingface.json") {
            return Self::HuggingFace(text.to_owned());
        }
        match metadata.strings("tokenizer.ggml.tokens") {
            Some(_) => Self::Ggml(metadata.with_prefix("tokenizer.")),
            None => Self::Missing,
        }
    }
}

/// Opens a model of any supported kind: a Hugging Face directory or a `.safetensors` file in one,
/// an `.onnx` file, a SliM file, another GGUF file.
///
/// # Errors
/// `Unsupported` for other kinds of files, otherwise those of [`HfDirectory::open`],
/// [`OnnxModel::open`], [`SlimFile::open`] and [`GgufModel::open`].
pub fn open_model(path: &Path) -> Result<Box<dyn ModelSource>> {
    let has_extension = |extension| path.extension().is_some_and(|found| found == extension);
    if path.is_dir() || has_extension("safetensors") {
        return Ok(Box::new(HfDirectory::open(path)?));
    }
    if has_extension("onnx") {
        return Ok(Box::new(OnnxModel::open(path)?));
    }
    let file = MappedFile::open(path)?;
    if file.starts_with(&gguf::MAGIC) {
        return match SlimFile::is_described_by(GgufFile::open(path)?.metadata()) {
            true => Ok(Box::new(SlimFile::open(path)?)),
            false => Ok(Box::new(GgufModel::open(path)?)),
        };
    }
    let hint = if has_extension("json") {
        "give the folder that it lies in"
    } else {
        stand_in::refuse(path, &file, "a model")?;
        "give a Hugging Face directory, a `.safetensors` file in one, a `.gguf` or an `.onnx` file"
    };
    Err(FormatError::unsupported(path, "this kind of file", hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_model_other_files_are_refused_with_a_hint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        std::fs::write(&path, b"\x80\x02}q").unwrap();
        let error = open_model(&path).err().unwrap();
        assert!(matches!(error, FormatError::Unsupported { .. }), "{error}");
        assert!(error.hint().unwrap().contains("Hugging Face directory"));
        assert!(matches!(open_model(&folder.path().join("absent")), Err(FormatError::Io { .. })));
    }

    #[test]
    fn interleaved_rows_are_stored_in_pairs() {
        let stored = |rotated| -> Vec<usize> {
            let order = Layout::Interleaved { head_dim: 4, first: 0, rotated };
            (0..8).filter_map(|row| order.stored_row(row)).collect()
        };
        assert_eq!(stored(4), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(stored(2), [0, 1, 2, 3, 4, 5, 6, 7]);
        let order = |first| Layout::Interleaved { head_dim: 6, first, rotated: 4 };
        let stored = |first| -> Vec<usize> {
            (0..6).filter_map(|row| order(first).stored_row(row)).collect()
        };
        assert_eq!(stored(0), [0, 2, 1, 3, 4, 5]);
        assert_eq!(stored(2), [0, 1, 2, 4, 3, 5]);
    }

    #[test]
    fn strided_rows_are_stored_in_pieces() {
        let order = Layout::Strided { piece: 2, stride: 5 };
        let stored: Vec<usize> = (0..5).filter_map(|row| order.stored_row(row)).collect();
        assert_eq!(stored, [0, 1, 5, 6, 10]);
    }
}
