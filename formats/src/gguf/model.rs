//! A llama.cpp model in a GGUF file, as a source.

use std::path::{Path, PathBuf};

use super::{GgufFile, Metadata};
use crate::{
    DType, Decoder, FormatError, ModelConfig, ModelSource, Part, Result, TokenizerSource, Weight,
    arch::ROPE_TENSORS,
    folder::tokenizer_warnings,
    places::{self, Fixed},
    shapes::{self, Spelling},
};

/// A GGUF model of one of the families.
#[derive(Debug)]
pub struct GgufModel {
    file: GgufFile,
    config: ModelConfig,
    decoder: Decoder,
    /// Of the tensors of the model, in the order of the file.
    names: Vec<String>,
    /// Vectors that are not used as they are stored.
    fixed: Fixed,
    tokenizer: TokenizerSource,
    warnings: Vec<String>,
}

impl GgufModel {
    /// Opens a model.
    ///
    /// # Errors
    /// `OtherKind` for what is no language model; `Unsupported` for
    /// another architecture, or a tensor that it does not use; `Malformed` if a tensor is missing
    /// or contradicts the metadata; otherwise those of [`GgufFile::open`] and
    /// [`ModelConfig::from_gguf`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = GgufFile::open(path)?;
        let metadata = file.metadata();
        refuse_other_kinds(path, metadata)?;
        let mut config = ModelConfig::from_gguf(path, metadata, file.facts()?)?;
        config.tied_embeddings = file.tensor(&Part::Output.gguf_name()).is_none();
        config.find_biases(|name| file.tensor(name).is_some());
        config.find_keys_as_values(|name| file.tensor(name).is_some());
        config.find_block_embedding(|name| Some(file.tensor(name)?.rows_and_cols(path).ok()?.0));
        config.find_fused_experts(|name| file.tensor(name).is_some());
        let about_groups = config.find_corrections(path, |name| file.tensor(name).is_some());
        let decoder = Decoder::new(&config);
        let names = names_in(&file, &decoder)?;
        shapes::check(path, &config, &decoder, Spelling::Gguf, |place| {
            file.tensor(&place.name).map(|tensor| tensor.rows_and_cols(path)).transpose()
        })?;
        let fixed = places::fixed(
            path,
            &decoder,
            |tensor| &tensor.gguf,
            |place| file.tensor(&place.name).map(|tensor| (tensor.dtype, file.bytes_of(tensor))),
        )?;
        let tokenizer = TokenizerSource::from_gguf(metadata);
        let tensors = file.tensors().iter().map(|tensor| tensor.name.as_str());
        let left_out = places::guessing_left_out(path, &decoder, "blk.", tensors);
        let warnings = tokenizer_warnings(path, &tokenizer, config.vocab_size);
        let warnings = warnings.chain(left_out).chain(about_groups).collect();
        Ok(Self { file, config, decoder, names, fixed, tokenizer, warnings })
    }

    /// The container.
    pub fn gguf(&self) -> &GgufFile {
        &self.file
    }
}

/// Refuses GGUF files that hold something else than a model.
fn refuse_other_kinds(path: &Path, metadata: &Metadata) -> Result<()> {
    let (found, hint) = match metadata.str("general.type") {
        Some("adapter") => {
            ("a LoRA adapter", "merge it into its base model with `llama-export-lora`")
        }
        Some("mmproj") => ("the vision part of a model", "give the file of the language model"),
        Some("imatrix") => ("an importance matrix", "give the file of the model"),
        _ => return Ok(()),
    };
    Err(FormatError::other_kind(path, found, "a language model", hint))
}

/// Names of the tensors of the model in the order of the file. Refuses tensors that would be
/// ignored, and types that cannot be read.
fn names_in(file: &GgufFile, decoder: &Decoder) -> Result<Vec<String>> {
    let known = places::by_stored_name(decoder, |tensor| &tensor.gguf);
    let mut names = Vec::with_capacity(decoder.tensors().len());
    for tensor in file.tensors() {
        let unsupported = |what| Err(FormatError::unsupported(file.path(), what, ""));
        let name = tensor.name.as_str();
        match known.get(name) {
            Some(parts) => names.extend(parts.iter().map(|part| part.name.clone())),
            None if ROPE_TENSORS.contains(&name) => {}
            None if decoder.is_of_guessing("blk.", name) => {}
            None => {
                return unsupported(format!(
                    "tensor `{name}` of a {} model with {} blocks",
                    decoder.family.architecture(),
                    decoder.blocks.len()
                ));
            }
        }
        if let DType::Unknown(id) = tensor.dtype {
            return unsupported(format!("tensor `{name}`: GGUF element type {id}"));
        }
    }
    Ok(names)
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
        self.names.iter().map(String::as_str).collect()
    }

    fn tensor(&self, name: &str) -> Result<Option<Weight<'_>>> {
        let Some(known) = self.decoder.find(name) else { return Ok(None) };
        if let Some(fixed) = self.fixed.get(name) {
            return Ok(Some(fixed));
        }
        let Some(tensor) = self.file.tensor(&known.gguf.name) else { return Ok(None) };
        let bytes = self.file.bytes_of(tensor);
        Ok(Some(places::rows_of(known, &known.gguf, tensor.dtype, bytes, None)))
    }

    fn tokenizer(&self) -> &TokenizerSource {
        &self.tokenizer
    }

    fn chat_template(&self) -> Option<&str> {
        self.file.metadata().str("tokenizer.chat_template")
    }

    fn files(&self) -> Vec<PathBuf> {
        self.file.files()
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn release_pages(&self) {
        self.file.release_pages();
    }
}
