//! The one error type of this crate.

use std::path::PathBuf;

use slim_formats::{DType, FormatError};
use slim_kernels::KernelError;
use slim_runtime::RuntimeError;

/// Shorthand for results of this crate.
pub type Result<T, E = ConvertError> = std::result::Result<T, E>;

/// Why a model was not converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// A file could not be read or written.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The model could not be run on the calibration text.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A kernel refused its arguments, or a device failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A weight that is not a number.
    #[error("tensor `{tensor}`: found {found} in row {row}, expected finite weights")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// Output channel.
        row: usize,
        /// The value.
        found: f32,
    },
    /// A weight beyond the type that it is to be stored in.
    #[error("tensor `{tensor}`: found {found} in row {row}, expected what {dtype:?} can represent")]
    Unrepresentable {
        /// The tensor.
        tensor: String,
        /// Output channel.
        row: usize,
        /// The value.
        found: f32,
        /// The type.
        dtype: DType,
    },
    /// A calculation on the calibration text came to no usable number.
    #[error("`{layer}`: found {found}, expected {expected}")]
    Numerical {
        /// The layer or the block.
        layer: String,
        /// What it came to.
        found: String,
        /// What would be usable.
        expected: &'static str,
    },
    /// The settings contradict themselves or the model.
    #[error("{what}: found {found}, expected {expected}")]
    InvalidSetting {
        /// The setting.
        what: &'static str,
        /// Its value.
        found: String,
        /// What can be done.
        expected: String,
    },
    /// The folder beside the output cannot be used.
    #[error("`{}`: found {found}, expected {expected}", path.display())]
    WorkFolder {
        /// The folder.
        path: PathBuf,
        /// What is there, or what it is to be used for.
        found: String,
        /// What can be used.
        expected: String,
    },
    /// The conversion was asked to stop, and has, between two steps.
    #[error("interrupted")]
    Interrupted,
}

impl ConvertError {
    /// A [`Self::Numerical`] whose layer [`Self::of_layer`] tells.
    pub(crate) fn numerical(found: String, expected: &'static str) -> Self {
        Self::Numerical { layer: String::new(), found, expected }
    }

    /// The error, if it is a numerical one without a layer, as that of layer `name`.
    pub(crate) fn of_layer(mut self, name: &str) -> Self {
        if let Self::Numerical { layer, .. } = &mut self
            && layer.is_empty()
        {
            name.clone_into(layer);
        }
        self
    }
}
