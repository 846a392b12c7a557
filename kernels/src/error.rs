//! The one error type of this crate.

use slim_formats::DType;

/// Shorthand for results of this crate.
pub type Result<T, E = KernelError> = std::result::Result<T, E>;

/// Why a kernel refused its arguments.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// Two arguments do not fit each other.
    #[error("{what}: found {found}, expected {expected}")]
    ShapeMismatch {
        /// The quantity, as a plural noun.
        what: &'static str,
        /// What was passed.
        found: usize,
        /// What the other arguments ask for.
        expected: usize,
    },
    /// Tensors of this type hold no weights that could be computed with.
    #[error("cannot compute with tensors of type {dtype:?}")]
    UnsupportedType {
        /// The type.
        dtype: DType,
    },
    /// A Hessian could not be factored.
    #[error("a {size} x {size} matrix is not positive definite")]
    NotPositiveDefinite {
        /// Rows and columns.
        size: usize,
    },
}
