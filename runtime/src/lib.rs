//! Runs models: the graph, its KV cache, tokenizer, chat template, sampler, and perplexity.
//!
//! ```no_run
//! use slim_runtime::{Event, Model, Settings};
//!
//! for event in Model::open("m.slim.gguf")?.generate("Once upon a time", Settings::default())? {
//!     if let Event::Token { text, .. } = event? {
//!         print!("{text}");
//!     }
//! }
//! # Ok::<(), slim_runtime::RuntimeError>(())
//! ```
//!
//! A server keeps a [`Sequence`] for each text, and gives all their new tokens to [`Model::step`]
//! together.

mod block;
mod chat;
mod cuda;
mod ends;
mod error;
mod generation;
mod identity;
mod mixer;
mod model;
#[cfg(feature = "onnx-run")]
mod onnx;
mod perplexity;
mod placement;
mod positions;
mod random;
mod router;
mod sampler;
mod sequence;
mod state;
mod tokenizer;
mod turn;

pub use block::{Block, Context, Passage, find_vector, find_weight};
pub use chat::{
    Chat, ChatFormat, ChatTemplate, Message, end_tokens, isolate_chat_templates, render_for_parent,
};
pub use ends::{Embedded, Ends, ToBlocks, finish_logits};
pub use error::{Result, RuntimeError};
pub use generation::{
    DEFAULT_CONTEXT, End, Event, Generation, Generator, Settings, Timing, Timings,
};
pub use mixer::{attention_shape, cut, decays, multiply, side_by_side};
pub use model::Model;
#[cfg(feature = "onnx-run")]
pub use onnx::{OnnxGraph, OnnxRuntime};
pub use perplexity::{
    Difference, Divergence, Evaluation, InBatches, Logits, NextTokens, Protocol, evaluate,
};
pub use placement::CudaSettings;
pub use positions::Positions;
pub use random::{SplitMix64, random_seed};
pub use router::{Route, routes, shares, weigh};
pub use sampler::{Sampler, SamplerSettings};
pub use sequence::Sequence;
pub use state::{Recurrent, State};
pub use tokenizer::{TextStream, Tokenizer, document_tokens, ggml_keys};
pub use turn::{Turn, Workspace};
