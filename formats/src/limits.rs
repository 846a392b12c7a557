//! How much a file may ask a reader to allocate.

use std::path::Path;

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

/// Reads a text file of at most `limits.string_bytes`, `None` if there is no such file.
pub(crate) fn read_text(path: &Path, limits: &Limits) -> Result<Option<String>> {
    let length = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(FormatError::io(path, "read the file", error)),
    };
    check(path, "bytes of a text file", length, limits.string_bytes)?;
    let text = std::fs::read_to_string(path);
    text.map(Some).map_err(|error| FormatError::io(path, "read the file", error))
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
