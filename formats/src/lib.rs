//! Model files as typed metadata and borrowed views.
//!
//! Two types to know: a [`ModelSource`] is an opened model of any supported kind (a Hugging Face
//! directory, an ONNX model, a GGUF file, a SliM file), and a [`Weight`] is one of its tensors as it lies in the
//! memory map. Nothing here computes with weights; that is the `kernels` crate.

pub mod arch;
mod atomic;
mod config;
mod dtype;
mod error;
mod folder;
pub mod gguf;
mod limits;
mod mapped;
mod model;
pub mod onnx;
pub mod safetensors;
pub mod slim;
#[cfg(test)]
mod test_data;

pub use arch::{Decoder, Part, PartMap};
pub use atomic::AtomicFile;
pub use config::{ModelConfig, Rope};
pub use dtype::DType;
pub use error::{FormatError, Result};
pub use limits::Limits;
pub use mapped::{MappedFile, ScratchFile};
pub use model::{DenseTensor, Layout, ModelSource, TokenizerSource, Weight, open_model};
