//! How much a file may ask a reader to allocate.

use std::{
    fs::File,
    io::{self, ErrorKind, Read},
    path::{Path, PathBuf},
};

use crate::{FormatError, Result};

/// Caps on what a reader grants a file, whatever the file's length allows.
///
/// Every count is also bounded by the bytes that remain in the file, before anything is allocated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a GGUF header: everything before the tensor data.
    pub header_bytes: u64,
    /// Metadata entries.
    pub metadata_count: u64,
    /// Tensors.
    pub tensor_count: u64,
    /// Operations of a graph.
    pub node_count: u64,
    /// Bytes of one string, and of one text file such as `tokenizer.json`.
    pub string_bytes: u64,
    /// Elements of one metadata array; a vocabulary is one.
    pub array_len: u64,
    /// Levels of arrays in arrays; a plain array has depth 1.
    pub array_depth: u32,
}

impl Default for Limits {
    /// Several times what the largest published models need.
    fn default() -> Self {
        Self {
            header_bytes: 1 << 30,
            metadata_count: 1 << 16,
            tensor_count: 1 << 18,
            node_count: 1 << 20,
            string_bytes: 256 << 20,
            array_len: 16 << 20,
            array_depth: 4,
        }
    }
}

/// Refuses a quantity above its limit.
pub(crate) fn check(path: &Path, what: impl Into<String>, found: u64, limit: u64) -> Result<()> {
    if found <= limit {
        return Ok(());
    }
    Err(FormatError::LimitExceeded { path: path.to_owned(), what: what.into(), found, limit })
}

/// Reads a regular text file of at most `limits.string_bytes`, `None` if there is no such file.
///
/// What is read here ends up in outputs: a link that a model's folder came with may not lead to the
/// user's own files.
pub(crate) fn read_text(path: &Path, limits: &Limits) -> Result<Option<String>> {
    let failed = |error| FormatError::io(path, "read the file", error);
    let file = match open_regular(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    if let Some(target) = leads_out(path) {
        let text = format!("it is a link that leads out of the model, to `{}`", target.display());
        return Err(failed(io::Error::new(ErrorKind::InvalidInput, text)));
    }
    let length = file.metadata().map_err(failed)?.len();
    check(path, "bytes of a text file", length, limits.string_bytes)?;
    let mut text = String::new();
    // It may grow meanwhile.
    file.take(limits.string_bytes).read_to_string(&mut text).map_err(failed)?;
    Ok(Some(text))
}

/// Opens a regular file; anything else is an error, without waiting for what is behind it.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // A pipe without a writer would wait for one.
        options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
    }
    let file = options.open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file")),
    }
}

/// Where a symbolic link leads, if that is neither in its folder nor in the store of the hub cache
/// that the folder belongs to (`snapshots/REVISION` beside `blobs`).
fn leads_out(path: &Path) -> Option<PathBuf> {
    if !path.is_symlink() {
        return None;
    }
    let target = path.canonicalize().ok()?;
    let folder = path.parent()?.canonicalize().ok()?;
    let cache = folder.ancestors().find(|folder| folder.file_name() == Some("snapshots".as_ref()));
    let store = cache.and_then(|snapshots| Some(snapshots.parent()?.join("blobs")));
    let is_in = |folder: &Path| target.starts_with(folder);
    let stays = is_in(&folder) || store.is_some_and(|store| is_in(&store));
    (!stays).then_some(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_text_too_long_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let limits = Limits { string_bytes: 3, ..Limits::default() };
        assert_eq!(read_text(&path, &limits).unwrap(), None);
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(read_text(&path, &limits).unwrap().as_deref(), Some("abc"));
        std::fs::write(&path, "abcd").unwrap();
        assert!(matches!(
            read_text(&path, &limits),
            Err(FormatError::LimitExceeded { found: 4, limit: 3, .. })
        ));
    }
}
