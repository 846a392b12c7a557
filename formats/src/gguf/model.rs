//! A llama.cpp model in a GGUF file, as a source.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use super::GgufFile;
use crate::{
    DType, DenseTensor, FormatError, Layout, ModelConfig, ModelSource, Result, TokenizerSource,
    Weight, names,
};

/// A GGUF model of the `llama` architecture.
#[derive(Debug)]
pub struct GgufModel {
    file: GgufFile,
    config: ModelConfig,
    tokenizer: TokenizerSource,
}

impl GgufModel {
    /// Opens a model.
    ///
    /// # Errors
    /// `Unsupported` for another architecture, one file of several, or a tensor that the
    /// architecture does not use; otherwise those of [`GgufFile::open`] and [`ModelConfig::from_gguf`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = GgufFile::open(path)?;
        let metadata = file.metadata();
        if metadata.u64("split.count").is_some_and(|count| count > 1) {
            let hint = "merge the files with `llama-gguf-split --merge` and open the result";
            return Err(FormatError::unsupported(
                path,
                "a model split over several GGUF files",
                hint,
            ));
        }
        let rope_factors = file.f32_vector(names::ROPE_FACTORS)?;
        let mut config = ModelConfig::from_gguf(path, metadata, rope_factors)?;
        config.tied_embeddings = file.tensor(names::OUTPUT).is_none();
        check_tensors(&file, config.block_count)?;
        let tokenizer = TokenizerSource::from_gguf(metadata);
        Ok(Self { file, config, tokenizer })
    }

    /// The container.
    pub fn gguf(&self) -> &GgufFile {
        &self.file
    }
}

/// Refuses tensors that would be ignored, and types that cannot be read.
fn check_tensors(file: &GgufFile, block_count: usize) -> Result<()> {
    let known: HashSet<_> = names::tensor_names(block_count).map(|(_, gguf)| gguf).collect();
    for tensor in file.tensors() {
        let unsupported = |what| Err(FormatError::unsupported(file.path(), what, ""));
        let name = &tensor.name;
        if name != names::ROPE_FACTORS && !known.contains(name) {
            return unsupported(format!(
                "tensor `{name}` of a llama model with {block_count} blocks"
            ));
        }
        if let DType::Unknown(id) = tensor.dtype {
            return unsupported(format!("tensor `{name}`: GGUF element type {id}"));
        }
    }
    Ok(())
}

impl ModelSource for GgufModel {
    fn path(&self) -> &Path {
        self.file.path()
    }

    fn format(&self) -> &'static str {
        "gguf"
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tensor_names(&self) -> Vec<&str> {
        let names = self.file.tensors().iter().map(|tensor| tensor.name.as_str());
        names.filter(|&name| name != names::ROPE_FACTORS).collect()
    }

    fn tensor(&self, name: &str) -> Result<Option<Weight<'_>>> {
        let Some(tensor) = self.file.tensor(name) else { return Ok(None) };
        let (rows, cols) = tensor.rows_and_cols(self.path())?;
        let layout = match name.ends_with(".attn_q.weight") || name.ends_with(".attn_k.weight") {
            true => Layout::Interleaved { head_dim: self.config.head_dim },
            false => Layout::AsStored,
        };
        let bytes = self.file.bytes_of(tensor);
        Ok(Some(Weight::Dense(DenseTensor { dtype: tensor.dtype, rows, cols, bytes, layout })))
    }

    fn tokenizer(&self) -> &TokenizerSource {
        &self.tokenizer
    }

    fn chat_template(&self) -> Option<&str> {
        self.file.metadata().str("tokenizer.chat_template")
    }

    fn files(&self) -> Vec<PathBuf> {
        vec![self.path().to_owned()]
    }

    fn release_pages(&self) {
        self.file.release_pages();
    }
}
