//! Runs models: the graph, its KV cache, tokenizer, chat template, sampler, and perplexity.

mod block;
mod chat;
mod cuda;
mod ends;
mod error;
mod generation;
mod kv_cache;
mod model;
mod onnx;
mod perplexity;
mod placement;
mod positions;
mod random;
mod sampler;
mod tokenizer;

pub use block::{Block, Context, attention_shape, find_vector, find_weight};
pub use chat::{ChatFormat, ChatTemplate, Message, end_tokens};
pub use ends::{Ends, finish_logits};
pub use error::{Result, RuntimeError};
pub use generation::{End, Event, Generation, Generator, Timing, Timings};
pub use kv_cache::{KvBlock, KvCache};
pub use model::Model;
pub use onnx::{OnnxGraph, OnnxRuntime};
pub use perplexity::{Divergence, Evaluation, InBatches, Logits, NextTokens, Protocol, evaluate};
pub use placement::CudaSettings;
pub use positions::Positions;
pub use random::SplitMix64;
pub use sampler::{Sampler, SamplerSettings};
pub use tokenizer::{TextStream, Tokenizer, document_tokens, ggml_keys};
