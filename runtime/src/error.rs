//! The one error type of this crate, sorted by culprit.

use slim_formats::FormatError;

/// Shorthand for results of this crate.
pub type Result<T, E = RuntimeError> = std::result::Result<T, E>;

/// Why a model could not be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// A model file could not be read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] slim_kernels::KernelError),
    /// The model's tokenizer is broken, or this program cannot use it.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What is wrong, as a clause that names the key or token.
        reason: String,
        /// The tokenizer library's answer.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The model's chat template is broken, or refused the chat.
    #[error("chat template: cannot {action}")]
    ChatTemplate {
        /// What was tried, as the rest of "cannot ...".
        action: &'static str,
        /// The template engine's answer, with the line.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is no library ONNX Runtime, or none that this program can use.
    #[cfg(feature = "onnx-run")]
    #[error("`{}`: cannot load ONNX Runtime: {reason}", library.display())]
    OnnxLibrary {
        /// The library's file, or its name.
        library: std::path::PathBuf,
        /// Why, as a clause.
        reason: String,
    },
    /// ONNX Runtime refused a graph, or failed at it.
    #[cfg(feature = "onnx-run")]
    #[error("`{}`: ONNX Runtime cannot {action}", path.display())]
    OnnxGraph {
        /// The model's file.
        path: std::path::PathBuf,
        /// What was tried, as the rest of "cannot ...".
        action: &'static str,
        /// ONNX Runtime's answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The caller asks for something that cannot be done.
    #[error("{what}: found {found}, expected {expected}")]
    InvalidArgument {
        /// The argument.
        what: String,
        /// What the caller passed.
        found: String,
        /// What can be done.
        expected: String,
    },
}

impl RuntimeError {
    /// One sentence of advice, where one helps.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Format(error) => error.hint(),
            Self::Kernel(error) => error.hint(),
            #[cfg(feature = "onnx-run")]
            Self::OnnxLibrary { .. } => Some(format!(
                "run `pip install 'onnxruntime>=1.{}'` and set ORT_DYLIB_PATH to the file \
                 `onnxruntime/capi/libonnxruntime.so.VERSION` below the location that \
                 `pip show onnxruntime` names",
                ort::MINOR_VERSION
            )),
            _ => None,
        }
    }

    /// A tokenizer that breaks a rule.
    pub(crate) fn tokenizer(reason: impl Into<String>) -> Self {
        Self::Tokenizer { reason: reason.into(), source: None }
    }

    /// A chat template that cannot do something, the rest of "cannot ...".
    pub(crate) fn chat_template(
        action: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::ChatTemplate { action, source: source.into() }
    }

    /// A caller's mistake.
    pub(crate) fn invalid_argument(
        what: impl Into<String>,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::InvalidArgument {
            what: what.into(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}
