//! Opening and checking the files that the user names.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Error, Result, ensure};
use slim_formats::{ModelConfig, ModelSource, gguf::GgufFile, open_model, slim::SlimFile};
use slim_runtime::{RuntimeError, Tokenizer};

use crate::{
    failure::advised,
    output::{note, warn},
};

/// The model that a command runs.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// A SliM file, another GGUF file, an ONNX file, or a Hugging Face directory
    model: PathBuf,

    /// Open a SliM file without checking its hashes
    #[arg(long)]
    no_hash_check: bool,
}

impl ModelArgs {
    /// Opens the model.
    pub fn open(&self) -> Result<Arc<dyn ModelSource>> {
        match self.no_hash_check && is_slim(&self.model) {
            true => Ok(Arc::new(SlimFile::open_without_hashes(&self.model)?)),
            false => open(&self.model),
        }
    }
}

/// Opens a model of any supported kind, and says what is odd about it.
pub fn open(path: &Path) -> Result<Arc<dyn ModelSource>> {
    if !path.exists() && is_hub_id(path) {
        let id = path.display();
        return Err(advised(
            format!(
                "`{id}`: there is no such file, and downloading from a hub is not supported yet"
            ),
            format!("if it is a hub id, run `hf download {id} --local-dir DIR` and use DIR"),
        ));
    }
    let source = open_model(path)?;
    warn_of(&*source);
    Ok(source.into())
}

/// Says what is odd about a model.
pub fn warn_of(source: &dyn ModelSource) {
    for warning in source.warnings() {
        warn(warning);
    }
}

/// The tokenizer of a model, which must have one.
pub fn tokenizer(source: &dyn ModelSource) -> Result<Tokenizer> {
    Tokenizer::of(source).map_err(|error| match error {
        // It names the file.
        RuntimeError::Format(error) => error.into(),
        error => Error::from(error).context(format!("`{}`", source.path().display())),
    })
}

/// Checks that a model was made for texts of `tokens` tokens.
pub fn check_context(config: &ModelConfig, tokens: usize) -> Result<()> {
    let limit = config.context_length;
    ensure!(tokens <= limit, "the model was made for a context of {limit} tokens, not {tokens}");
    Ok(())
}

/// The context to measure or calibrate in where the user asks for none.
pub const USUAL_CONTEXT: usize = 2048;

/// The context that the user asks for, if the model was made for it; without one the usual, or what
/// the model was made for.
pub fn resolve_context(config: &ModelConfig, asked: Option<usize>) -> Result<usize> {
    let limit = config.context_length;
    if let Some(tokens) = asked {
        check_context(config, tokens)?;
        return Ok(tokens);
    }
    if limit < USUAL_CONTEXT {
        note(format_args!(
            "context of {limit} tokens, for which the model was made, in place of {USUAL_CONTEXT}"
        ));
    }
    Ok(limit.min(USUAL_CONTEXT))
}

/// Whether a file is an ONNX model.
pub fn is_onnx(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "onnx")
}

/// Whether a file is a GGUF file that says it is a SliM file.
pub fn is_slim(path: &Path) -> bool {
    path.is_file()
        && GgufFile::open(path).is_ok_and(|file| SlimFile::is_described_by(file.metadata()))
}

/// Whether a path could be `org/name[@revision]` of a model hub.
fn is_hub_id(path: &Path) -> bool {
    let is_name = |name: &str| {
        let is_word = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(is_word)
    };
    let is_file_name = |name: &str| {
        [".gguf", ".safetensors", ".onnx", ".json"]
            .iter()
            .any(|extension| name.ends_with(extension))
    };
    let Some((organization, name)) = path.to_str().and_then(|text| text.split_once('/')) else {
        return false;
    };
    let name = name.split_once('@').map_or(name, |(name, _revision)| name);
    is_name(organization) && is_name(name) && !is_file_name(name)
}

/// Reads a text file whole.
pub fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path)
        .with_context(|| format!("`{}`: cannot read the text", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for id in ["meta-llama/Llama-3.2-1B", "org/name@main", "org/name.v2@refs/pr/1"] {
            assert!(is_hub_id(Path::new(id)), "{id}");
        }
        for path in ["name", "./org/name", "/org/name", "a/b/c", "models/x.gguf", "../x", "org/"] {
            assert!(!is_hub_id(Path::new(path)), "{path}");
        }
    }
}
