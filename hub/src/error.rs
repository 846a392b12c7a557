//! The one error type of this crate.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// Shorthand for results of this crate.
pub type Result<T, E = HubError> = std::result::Result<T, E>;

/// Why a model of a hub is not there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// A variable of the environment, or a file in its place, cannot be used.
    #[error("`{variable}`: found {found}, expected {expected}")]
    Environment {
        /// Its name.
        variable: &'static str,
        /// What it says.
        found: String,
        /// What would do.
        expected: &'static str,
    },
    /// The cache cannot be read or written.
    #[error("`{}`: cannot {action}", .path.display())]
    Io {
        /// A file or folder of the cache.
        path: PathBuf,
        /// What failed.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The disk of the cache has no room.
    #[error("`{}`: {free} bytes are free, and {needed} are to be fetched", .folder.display())]
    NoRoom {
        /// The folder.
        folder: PathBuf,
        /// Bytes that are free.
        free: u64,
        /// Bytes that are missing.
        needed: u64,
    },
    /// The cache lacks a model, and nothing else may be asked.
    #[error(
        "`{id}`: found neither a file of this name nor a whole model in the hub's cache, `{}`, and \
         `HF_HUB_OFFLINE` keeps it from being fetched",
        .folder.display()
    )]
    Offline {
        /// The id.
        id: String,
        /// The model's folder in the cache.
        folder: PathBuf,
    },
    /// A repository has no model that is read, or several of which one should be named.
    #[error("`{id}`: the repository has {found}")]
    NoModel {
        /// The id.
        id: String,
        /// What there is.
        found: String,
        /// What the user can do.
        hint: String,
    },
    /// The hub does not give a model.
    #[error("`{id}`: {}", .refusal.sentence())]
    Refused {
        /// The id.
        id: String,
        /// The reason.
        refusal: Refusal,
        /// The address of the hub.
        endpoint: String,
        /// Where the token was found, if there was one.
        token: Option<String>,
    },
    /// A hub cannot give anything now.
    #[error("{host}: the server is busy (status {status})")]
    Busy {
        /// The server.
        host: String,
        /// The status of its answer.
        status: u16,
        /// How long it wants to be left alone.
        pause: Option<Duration>,
    },
    /// Nobody answers who could list a model's files, so what was named may be a path as well.
    #[error("`{id}`: there is no such file, and the hub at {host} is not reached ({reason})")]
    NoHub {
        /// The id.
        id: String,
        /// The server.
        host: String,
        /// What happened.
        reason: String,
    },
    /// There is no connection to a server.
    #[error("{host}: the server is not reached ({reason})")]
    Unreached {
        /// The server.
        host: String,
        /// What happened.
        reason: String,
    },
    /// A connection failed, or it is silent.
    #[error("{host}: the connection failed ({reason})")]
    Connection {
        /// The server.
        host: String,
        /// What happened.
        reason: String,
    },
    /// The connection ended before a file did.
    #[error("`{file}`: the connection was cut after {found} of {expected} bytes")]
    Cut {
        /// The file's name.
        file: String,
        /// Bytes that are there.
        found: u64,
        /// Its size.
        expected: u64,
    },
    /// A file is not what the hub's list says.
    #[error("`{file}`: found {kind} {found}, expected {expected}")]
    Mismatch {
        /// The file's name.
        file: String,
        /// The hash.
        kind: &'static str,
        /// That of what was received.
        found: String,
        /// That of the list.
        expected: String,
    },
    /// An answer contradicts what hubs answer.
    #[error("{of}: found {found}, expected {expected}")]
    Answer {
        /// What was asked for.
        of: String,
        /// What came.
        found: String,
        /// What should have come.
        expected: &'static str,
    },
}

/// Why a hub does not give a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// It wants to know who asks, which it also says of models that do not exist (401).
    WhoAsks,
    /// Who asks may not have it (403).
    NotAllowed,
    /// It has no such model (404).
    NoRepository,
    /// The model has no such revision (404).
    NoRevision,
    /// The revision has no such file (404).
    NoFile,
    /// Another status.
    Other(u16),
}

impl Refusal {
    fn sentence(self) -> String {
        match self {
            Self::WhoAsks => "there is no such file, and the hub has no such model, or gives it \
                              only to those it knows (status 401)"
                .to_owned(),
            Self::NotAllowed => "the hub does not give the model to this user (status 403)".into(),
            Self::NoRepository => {
                "there is no such file, and the hub has no such model (status 404)".to_owned()
            }
            Self::NoRevision => "the hub's model has no such revision (status 404)".to_owned(),
            Self::NoFile => "the hub lists a file that it does not have (status 404)".to_owned(),
            Self::Other(status) => format!("the hub answers with status {status}"),
        }
    }
}

impl HubError {
    pub(crate) fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), action, source }
    }

    /// Whether the next try may succeed.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Busy { .. } | Self::Unreached { .. } | Self::Connection { .. } | Self::Cut { .. }
        )
    }

    /// One sentence of advice, where one helps.
    pub fn hint(&self) -> Option<String> {
        let id_of = |id: &str| id.split(['@', ':']).next().unwrap_or_default().to_owned();
        Some(match self {
            Self::NoRoom { .. } => {
                "make room, or name another folder with `HF_HUB_CACHE`".to_owned()
            }
            Self::Offline { .. } => {
                "unset `HF_HUB_OFFLINE` once to fetch it, or give the path of a file".to_owned()
            }
            Self::NoModel { hint, .. } => hint.clone(),
            Self::Refused { refusal: Refusal::WhoAsks, token: None, .. } => {
                "check the spelling; of a private or gated model, set `HF_TOKEN`, or log in with \
                 `hf auth login`"
                    .to_owned()
            }
            Self::Refused { refusal: Refusal::WhoAsks, token: Some(origin), .. } => {
                format!("check the spelling, and the token, which is from {origin}")
            }
            Self::Refused { refusal: Refusal::NotAllowed, token, endpoint, id } => {
                let asks = match token {
                    Some(origin) => format!("with the account whose token is in {origin}"),
                    None => "and set `HF_TOKEN` to a token of your account".to_owned(),
                };
                format!(
                    "a gated model has conditions: accept them at {endpoint}/{}, {asks}",
                    id_of(id)
                )
            }
            Self::Refused {
                refusal: Refusal::NoRepository | Refusal::NoRevision,
                endpoint,
                id,
                ..
            } => {
                format!("check the spelling; the hub shows what it has at {endpoint}/{}", id_of(id))
            }
            Self::Busy { status: 429, pause: Some(pause), .. } if !pause.is_zero() => {
                format!(
                    "try again in {} s; a token (`HF_TOKEN`) may raise the limit",
                    pause.as_secs()
                )
            }
            Self::Busy { status: 429, .. } => {
                "try again later; a token (`HF_TOKEN`) may raise the limit".to_owned()
            }
            Self::NoHub { .. } => "check the spelling, if it is a path; if it is a hub id, the \
                                   network, and behind a proxy `HTTPS_PROXY`"
                .to_owned(),
            Self::Unreached { .. }
            | Self::Connection { .. }
            | Self::Cut { .. }
            | Self::Busy { .. } => "the same command goes on where this one stopped".to_owned(),
            Self::Mismatch { .. } => {
                "it was removed; try again later: what the server sends is not \
                                      what the hub lists"
                    .to_owned()
            }
            _ => return None,
        })
    }
}
