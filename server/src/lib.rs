//! Serves one model over HTTP, as OpenAI's API does: chats and completions, whole or as streams.
//!
//! ```no_run
//! use slim_runtime::Model;
//! use slim_server::{Server, Settings};
//!
//! let model = Model::open("m.slim.gguf")?;
//! let server = Server::bind(model, "127.0.0.1", 8080, Settings::default())?;
//! println!("serving at http://{}", server.address());
//! server.run()?;
//! # Ok::<(), slim_server::ServerError>(())
//! ```
//!
//! One thread owns the sequences of texts and writes all of them together (`engine`); threads of
//! HTTP (`http`) turn requests into texts and what is written into answers (`api`).

mod api;
mod engine;
mod error;
mod grammar;
mod http;
mod metrics;
mod served;
mod server;
mod stops;
mod tools;

pub use error::{Result, ServerError};
pub use server::{Server, Settings, Stopper};
