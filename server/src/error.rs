//! The one error type of this crate.

use std::{io, net::SocketAddr};

use slim_runtime::RuntimeError;

/// Shorthand for results of this crate.
pub type Result<T, E = ServerError> = std::result::Result<T, E>;

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The model cannot be run, or not so many texts of it.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A name of a host has no address.
    #[error("`{host}`: no such host")]
    Host {
        /// The name.
        host: String,
        /// The system's answer.
        source: io::Error,
    },
    /// An address cannot be listened at.
    #[error("cannot listen at {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The system gives no threads, or no events.
    #[error("cannot start the server")]
    Start(#[source] io::Error),
    /// A fault of this program.
    #[error("the thread that writes texts has failed")]
    Engine,
}

impl ServerError {
    /// One sentence of advice, where one helps.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Runtime(error) => error.hint(),
            Self::Bind { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                Some("another program listens there: take another port".to_owned())
            }
            _ => None,
        }
    }
}
