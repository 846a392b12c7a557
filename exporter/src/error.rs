//! The one error type of this crate.

use std::path::{Path, PathBuf};

use slim_formats::FormatError;
use slim_kernels::KernelError;
use slim_runtime::RuntimeError;

/// Shorthand for results of this crate.
pub type Result<T, E = ExportError> = std::result::Result<T, E>;

/// Why a model was not exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// A file could not be read or written.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A tensor holds no weights.
    #[error(transparent)]
    Kernels(#[from] KernelError),
    /// The tokenizer is broken, or cannot be said in the target's way.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The layout cannot hold the model.
    #[error("`{}`: {what} cannot be exported to {layout}", path.display())]
    Unsupported {
        /// The model.
        path: PathBuf,
        /// The layout, as the end of "... cannot be exported to".
        layout: &'static str,
        /// The tensor or feature, as the subject of that sentence.
        what: String,
        /// What the user can do instead; empty if nothing helps.
        hint: String,
    },
    /// A value beyond those of fp16.
    #[error("tensor `{tensor}`: found {found} in row {row}, expected what fp16 can represent")]
    Unrepresentable {
        /// The tensor.
        tensor: String,
        /// The output channel; 0 for a vector.
        row: usize,
        /// The weight, scale or minimum.
        found: f32,
    },
}

impl ExportError {
    /// A model that a layout cannot hold.
    pub(crate) fn unsupported(
        path: &Path,
        layout: &'static str,
        what: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self::Unsupported { path: path.to_owned(), layout, what: what.into(), hint: hint.into() }
    }

    /// One sentence of advice, where one helps.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Format(error) => error.hint(),
            Self::Kernels(error) => error.hint(),
            Self::Runtime(error) => error.hint(),
            Self::Unsupported { hint, .. } if !hint.is_empty() => Some(hint.clone()),
            _ => None,
        }
    }
}
