//! A llama.cpp model in a GGUF file, as a source.

use std::path::{Path, PathBuf};

use super::GgufFile;
use crate::{
    DType, Decoder, DenseTensor, FormatError, Layout, ModelConfig, ModelSource, Part, Result,
    TokenizerSource, Weight, arch::ROPE_FACTORS,
};

/// A GGUF model of one of the families.
#[derive(Debug)]
pub struct GgufModel {
    file: GgufFile,
    config: ModelConfig,
    decoder: Decoder,
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
        let rope_factors = file.f32_vector(ROPE_FACTORS)?;
        let mut config = ModelConfig::from_gguf(path, metadata, rope_factors)?;
        config.tied_embeddings = file.tensor(Part::Output.gguf_name()).is_none();
        let decoder = Decoder::new(&config);
        check_tensors(&file, &decoder)?;
        let tokenizer = TokenizerSource::from_gguf(metadata);
        Ok(Self { file, config, decoder, tokenizer })
    }

    /// The container.
    pub fn gguf(&self) -> &GgufFile {
        &self.file
    }
}

/// Refuses tensors that would be ignored, and types that cannot be read.
fn check_tensors(file: &GgufFile, decoder: &Decoder) -> Result<()> {
    for tensor in file.tensors() {
        let unsupported = |what| Err(FormatError::unsupported(file.path(), what, ""));
        let name = &tensor.name;
        if name != ROPE_FACTORS && decoder.find(name).is_none() {
            return unsupported(format!(
                "tensor `{name}` of a {} model with {} blocks",
                decoder.family.architecture(),
                decoder.blocks.len()
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

    fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn tensor_names(&self) -> Vec<&str> {
        let names = self.file.tensors().iter().map(|tensor| tensor.name.as_str());
        names.filter(|&name| name != ROPE_FACTORS).collect()
    }

    fn tensor(&self, name: &str) -> Result<Option<Weight<'_>>> {
        let Some(tensor) = self.file.tensor(name) else { return Ok(None) };
        let (rows, cols) = tensor.rows_and_cols(self.path())?;
        let layout = self.decoder.find(name).map_or(Layout::AsStored, |known| known.gguf_layout);
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
