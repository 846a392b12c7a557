//! Opening and checking the files that the user names.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Error, Result, ensure};
use slim_formats::{ModelConfig, ModelSource, gguf::GgufFile, open_model, slim::SlimFile};
use slim_runtime::{RuntimeError, Tokenizer};

use crate::{
    fetch::locate,
    output::{note, warn},
};

/// The model that a command runs.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// A SliM file, another GGUF file, an ONNX file, a Hugging Face directory, or a hub id:
    /// org/name or org/name@revision, with :Q4_K_M for a GGUF of a repository
    model: PathBuf,

    /// Open a SliM file without checking its hashes
    #[arg(long)]
    no_hash_check: bool,
}

impl ModelArgs {
    /// Opens the model.
    pub fn open(&self) -> Result<Arc<dyn ModelSource>> {
        self.open_located(&locate(&self.model, false)?)
    }

    /// Opens the model, and does not tell how far a download is.
    pub fn open_quietly(&self) -> Result<Arc<dyn ModelSource>> {
        self.open_located(&locate(&self.model, true)?)
    }

    fn open_located(&self, path: &Path) -> Result<Arc<dyn ModelSource>> {
        match self.no_hash_check && is_slim(path) {
            true => Ok(Arc::new(SlimFile::open_without_hashes(path)?)),
            false => open(path),
        }
    }
}

/// Opens a model of any supported kind, of a hub, too, and says what is odd about it.
pub fn open(path: &Path) -> Result<Arc<dyn ModelSource>> {
    let source = open_model(&locate(path, false)?)?;
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

/// Reads a text file whole.
pub fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path)
        .with_context(|| format!("`{}`: cannot read the text", path.display()))
}
