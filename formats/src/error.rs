//! The one error type of this crate, sorted by culprit.

use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = FormatError> = std::result::Result<T, E>;

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused.
    #[error("`{}`: cannot {action}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried, as the rest of "cannot ...".
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file breaks a rule of its format.
    #[error("`{}`: {place}: found {found}, expected {expected}{}", path.display(), Rule(rule))]
    Malformed {
        /// The file.
        path: Box<Path>,
        /// Where in the file: a tensor, a key, a header field with its byte offset.
        place: String,
        /// The rule of `docs/format.md` (or of the container's specification), such as `F12`; empty
        /// if none is numbered.
        rule: &'static str,
        /// What the file holds.
        found: String,
        /// What the rule asks for.
        expected: String,
        /// What the user can do about it; empty if nothing helps.
        hint: Box<str>,
    },
    /// A file that the model needs is not there.
    #[error("`{}`: there is no such file; {needed_for}", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// What it is needed for, as a clause.
        needed_for: String,
        /// How one gets it.
        hint: String,
    },
    /// Something else stands where a model, or a file of one, was expected.
    #[error("`{}` is {found}, not {expected}", path.display())]
    OtherKind {
        /// The file or folder.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What it was taken for.
        expected: String,
        /// What the user can do about it.
        hint: String,
    },
    /// The file is right, but this program cannot use it.
    #[error("`{}`: {what} is not supported", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The feature, as the subject of "... is not supported".
        what: String,
        /// What the user can do instead; empty if nothing helps.
        hint: String,
    },
    /// The file asks for more than a reader should grant.
    #[error("`{}`: {what}: found {found}, the limit is {limit}", path.display())]
    LimitExceeded {
        /// The file.
        path: PathBuf,
        /// The quantity.
        what: String,
        /// What the file asks for.
        found: u64,
        /// What is granted.
        limit: u64,
    },
    /// Something has the name of an output, and is not to be replaced.
    #[error("`{}` exists already", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// A disk has too little room.
    #[error("`{}`: {what} {}, but {} are free on its disk", path.display(), Size(*needed), Size(*free))]
    NoSpace {
        /// The file, or the folder of the temporary files.
        path: PathBuf,
        /// What takes room, with its verb: `the file takes`.
        what: &'static str,
        /// How many bytes it takes.
        needed: u64,
        /// How many are free.
        free: u64,
    },
    /// A file may not become as large as it has to.
    #[error("`{}`: the file takes {}, but may have {} at most", path.display(), Size(*needed), Size(*limit))]
    FileTooLarge {
        /// The file, or the folder of the temporary files.
        path: PathBuf,
        /// How many bytes it takes.
        needed: u64,
        /// How many it may have.
        limit: u64,
    },
    /// The caller asks for something that the format cannot hold.
    #[error("{what}: found {found}, expected {expected}")]
    InvalidArgument {
        /// The argument: a tensor name, a key.
        what: String,
        /// What the caller passed.
        found: String,
        /// What the format can hold.
        expected: String,
    },
}

/// Prints ` (rule F12)` for a numbered rule, nothing otherwise.
struct Rule<'a>(&'a str);

impl std::fmt::Display for Rule<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            "" => Ok(()),
            rule => write!(f, " (rule {rule})"),
        }
    }
}

/// Prints bytes as `75.3 MB`.
struct Size(u64);

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            bytes @ 0..100_000 => write!(f, "{bytes} bytes"),
            bytes => write!(f, "{:.1} MB", bytes as f64 / 1e6),
        }
    }
}

impl FormatError {
    /// An I/O error with its file.
    pub fn io(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), action, source }
    }

    /// A broken rule.
    pub fn malformed(
        path: &Path,
        place: impl Into<String>,
        rule: &'static str,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Malformed {
            path: path.into(),
            place: place.into(),
            rule,
            found: found.to_string(),
            expected: expected.into(),
            hint: Box::default(),
        }
    }

    /// The same error with advice, if it is of a kind that carries some.
    pub fn with_hint(mut self, advice: impl Into<String>) -> Self {
        match &mut self {
            Self::Malformed { hint, .. } => *hint = advice.into().into(),
            Self::Missing { hint, .. }
            | Self::OtherKind { hint, .. }
            | Self::Unsupported { hint, .. } => *hint = advice.into(),
            _ => {}
        }
        self
    }

    /// A file that has to be there.
    pub fn missing(path: PathBuf, needed_for: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Missing { path, needed_for: needed_for.into(), hint: hint.into() }
    }

    /// Something else than what was expected.
    pub fn other_kind(
        path: &Path,
        found: impl Into<String>,
        expected: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self::OtherKind {
            path: path.to_owned(),
            found: found.into(),
            expected: expected.into(),
            hint: hint.into(),
        }
    }

    /// A valid file that this program cannot use.
    pub fn unsupported(path: &Path, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Unsupported { path: path.to_owned(), what: what.into(), hint: hint.into() }
    }

    /// An argument that the format cannot hold.
    pub fn invalid_argument(
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

    /// One sentence of advice, where one helps.
    pub fn hint(&self) -> Option<String> {
        let hint: &str = match self {
            Self::Malformed { hint, .. } => hint,
            Self::Missing { hint, .. }
            | Self::OtherKind { hint, .. }
            | Self::Unsupported { hint, .. } => hint,
            Self::Exists { .. } => "give a name that is free, or remove it",
            Self::NoSpace { .. } => "free some space, or use another disk",
            Self::FileTooLarge { .. } => "`ulimit -f` tells and sets the limit of the shell",
            Self::Io { .. } | Self::LimitExceeded { .. } | Self::InvalidArgument { .. } => "",
        };
        (!hint.is_empty()).then(|| hint.to_owned())
    }
}
