//! Model files as typed metadata and borrowed views.
//!
//! Two types to know: a [`ModelSource`] is an opened model of any supported kind (a Hugging Face
//! directory, an ONNX model, a GGUF file, a SliM file), and a [`Weight`] is one of its tensors as
//! it lies in the memory map. Nothing here computes with weights; that is the `kernels` crate.

pub mod arch;
mod atomic;
mod config;
mod disk;
mod dtype;
mod error;
mod folder;
mod generation;
pub mod gguf;
mod json;
mod limits;
mod locate;
mod mapped;
mod model;
pub mod onnx;
mod places;
pub mod safetensors;
mod shapes;
pub mod slim;
mod special_tokens;
mod stand_in;
mod temporary;
#[cfg(test)]
mod test_data;
mod vocabulary;

pub use arch::{Decoder, Part, PartMap};
pub use atomic::{AtomicFile, OutputPath};
pub use config::{
    BlockEmbedding, Features, GlobalHeads, LongRope, ModelConfig, Rope, Scaling, TensorFacts, Yarn,
};
pub use disk::{free_bytes, reserve};
pub use dtype::DType;
pub use error::{FormatError, Result};
pub use folder::missing_tokenizer;
pub use generation::Generation;
pub use limits::Limits;
pub use locate::{HubCommit, NumberedFile};
pub use mapped::{MappedFile, ScratchFile};
pub use model::{
    BlockScales, DenseTensor, Layout, ModelSource, ScaleValues, TokenizerSource, Weight,
    open_model, power_of_two,
};
pub use special_tokens::GgmlDefaults;
pub use temporary::{
    Cleared, Removed, TemporaryFolder, remove_leftovers, remove_temporaries, removed_unfinished,
};
pub use vocabulary::vocabulary_faults;
