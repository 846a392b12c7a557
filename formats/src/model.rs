//! The one door to a model, whatever kind of file holds it.

use std::path::{Path, PathBuf};

use crate::{
    DType, FormatError, MappedFile, ModelConfig, Result,
    gguf::{self, GgufFile, GgufModel, Metadata},
    safetensors::HfDirectory,
    slim::{PackedTensor, SlimFile},
};

/// An opened model. Tensors go by their GGUF names (`token_embd.weight`, `blk.0.attn_q.weight`, ...)
/// whatever the source calls them.
pub trait ModelSource: Send + Sync {
    /// The path that was opened.
    fn path(&self) -> &Path;
    /// Short name of the container: `safetensors`, `gguf`, `slim`.
    fn format(&self) -> &'static str;
    /// Hyperparameters.
    fn config(&self) -> &ModelConfig;
    /// Names of all tensors of the model, in a fixed order.
    fn tensor_names(&self) -> Vec<&str>;
    /// The tensor of this name, `None` if the model has none.
    ///
    /// # Errors
    /// `Malformed` if its shape or bytes contradict its type.
    fn tensor(&self, name: &str) -> Result<Option<Weight<'_>>>;
    /// What the tokenizer is built from.
    fn tokenizer(&self) -> &TokenizerSource;
    /// The Jinja chat template, if the model has one.
    fn chat_template(&self) -> Option<&str>;
    /// Every file that the model was read from.
    fn files(&self) -> Vec<PathBuf>;
}

/// One tensor of a model.
#[derive(Clone, Copy)]
pub enum Weight<'a> {
    /// Plain or ggml-quantized values.
    Dense(DenseTensor<'a>),
    /// A SliM layer.
    Packed(PackedTensor<'a>),
}

/// A borrowed dense tensor, row-major, `rows` x `cols`; a vector has one row.
#[derive(Clone, Copy)]
pub struct DenseTensor<'a> {
    /// Element type.
    pub dtype: DType,
    /// Output channels.
    pub rows: usize,
    /// Input channels, the fastest dimension.
    pub cols: usize,
    /// Exactly `dtype.size_in_bytes(rows * cols)` bytes; `cols` fills whole blocks.
    pub bytes: &'a [u8],
    /// The order in which the rows are stored.
    pub row_order: RowOrder,
}

/// The order of a projection's rows. Everything in this project rotates (RoPE) channel `i` of a
/// head with channel `i + head_dim / 2`, as Hugging Face does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// Rows are stored in the order they are used.
    AsStored,
    /// llama.cpp's order of `attn_q` and `attn_k` in the `llama` architecture: within each head of
    /// `head_dim` rows, stored row `2 i` is row `i`, and stored row `2 i + 1` is row `i + head_dim / 2`.
    Interleaved {
        /// Rows per head.
        head_dim: usize,
    },
}

impl RowOrder {
    /// Where row `row` is stored.
    pub fn stored(self, row: usize) -> usize {
        match self {
            Self::AsStored => row,
            Self::Interleaved { head_dim } => {
                let (head, channel) = (row / head_dim, row % head_dim);
                let half = head_dim / 2;
                head * head_dim + 2 * (channel % half) + channel / half
            }
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
/// a SliM file, another GGUF file.
///
/// # Errors
/// `Unsupported` for other kinds of files, otherwise those of [`HfDirectory::open`],
/// [`SlimFile::open`] and [`GgufModel::open`].
pub fn open_model(path: &Path) -> Result<Box<dyn ModelSource>> {
    let has_extension = |extension| path.extension().is_some_and(|found| found == extension);
    if path.is_dir() || has_extension("safetensors") {
        return Ok(Box::new(HfDirectory::open(path)?));
    }
    if MappedFile::open(path)?.starts_with(&gguf::MAGIC) {
        return match SlimFile::is_described_by(GgufFile::open(path)?.metadata()) {
            true => Ok(Box::new(SlimFile::open(path)?)),
            false => Ok(Box::new(GgufModel::open(path)?)),
        };
    }
    Err(match has_extension("onnx") {
        true => FormatError::unsupported(
            path,
            "an ONNX model",
            "not yet; use the Hugging Face directory or a GGUF file",
        ),
        false => FormatError::unsupported(
            path,
            "this kind of file",
            "give a Hugging Face directory, a `.safetensors` file in one, or a `.gguf` file",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_are_stored_in_pairs() {
        let order = RowOrder::Interleaved { head_dim: 4 };
        let stored: Vec<usize> = (0..8).map(|row| order.stored(row)).collect();
        assert_eq!(stored, [0, 2, 1, 3, 4, 6, 5, 7]);
    }

    #[test]
    fn open_model_other_files_are_refused_with_a_hint() {
        let folder = tempfile::tempdir().unwrap();
        for (name, content, hint) in
            [("a.onnx", "", "not yet"), ("a.bin", "PK", "Hugging Face directory")]
        {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            let error = open_model(&path).err().unwrap();
            assert!(matches!(error, FormatError::Unsupported { .. }), "{name}: {error}");
            assert!(error.hint().unwrap().contains(hint), "{name}");
        }
        assert!(matches!(open_model(&folder.path().join("absent")), Err(FormatError::Io { .. })));
    }
}
