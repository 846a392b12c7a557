//! What stands in place of a file that was never fetched: a pointer, an error page, nothing at all.

use std::path::Path;

use crate::{FormatError, Result};

/// Longer files are no pointers, and no messages of a server.
const MAX_BYTES: usize = 4096;
/// Characters of a text that a message shows.
const SHOWN_CHARACTERS: usize = 60;

/// Refuses what is plainly no `expected`: an empty file, a Git LFS pointer, a page or a short text
/// of a server, a zip archive.
///
/// # Errors
/// `OtherKind`.
pub(crate) fn refuse(path: &Path, bytes: &[u8], expected: &str) -> Result<()> {
    match recognise(bytes) {
        Some((found, hint)) => Err(FormatError::other_kind(path, found, expected, hint)),
        None => Ok(()),
    }
}

/// The same for a file that should hold JSON, which a short text may well be.
pub(crate) fn refuse_for_json(path: &Path, text: &str) -> Result<()> {
    match text.trim_start().starts_with(['{', '[']) {
        true => Ok(()),
        false => refuse(path, text.as_bytes(), "a JSON file"),
    }
}

/// What a stand-in is, and how one gets the file itself.
fn recognise(bytes: &[u8]) -> Option<(String, &'static str)> {
    const FETCH: &str = "download the file again";
    const PAGE: &str = "download the file itself, not the page about it; a server that wants a \
                        login or does not find the file answers with such a page";
    if bytes.is_empty() {
        return Some(("an empty file".to_owned(), FETCH));
    }
    if bytes.starts_with(b"PK\x03\x04") {
        let hint = "PyTorch checkpoints are such archives: load it with transformers and save it \
                    with `save_pretrained`, which writes safetensors";
        return Some(("a zip archive".to_owned(), hint));
    }
    let start = &bytes[..bytes.len().min(MAX_BYTES)];
    let start = start.strip_prefix("\u{feff}".as_bytes()).unwrap_or(start).trim_ascii_start();
    let is_page = [&b"<!doctype"[..], b"<html", b"<?xml"]
        .iter()
        .any(|tag| start.get(..tag.len()).is_some_and(|found| found.eq_ignore_ascii_case(tag)));
    if is_page {
        return Some(("an HTML page".to_owned(), PAGE));
    }
    let text = std::str::from_utf8(bytes).ok().filter(|text| text.len() <= MAX_BYTES)?;
    if text.chars().any(|c| c.is_control() && !c.is_whitespace()) {
        return None;
    }
    if let Some(bytes) = lfs_pointer(text) {
        let hint =
            "run `git lfs pull` in the folder of the repository, or download the file itself";
        return Some((format!("a Git LFS pointer to {bytes} bytes"), hint));
    }
    let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("blank lines");
    let shown: String = line.trim().chars().take(SHOWN_CHARACTERS).collect();
    Some((format!("a text of {} bytes (`{shown}`)", text.len()), PAGE))
}

/// The size of the file that a Git LFS pointer stands for.
///
/// # Source
/// `docs/spec.md` of git-lfs: lines of key and value, `version` first, among them `oid` and `size`.
fn lfs_pointer(text: &str) -> Option<u64> {
    let mut lines = text.lines();
    lines.next()?.strip_prefix("version ")?;
    let lines: Vec<&str> = lines.collect();
    let value = |key: &str| lines.iter().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    value("oid")?;
    value("size")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stand_ins_are_told_from_models() {
        let pointer = "version https://example.org/spec/v1\noid sha256:00ff\nsize 134515008\n";
        for (bytes, found) in [
            ("", "an empty file"),
            (pointer, "a Git LFS pointer to 134515008 bytes"),
            ("\u{feff}\n<!DOCTYPE html><html>", "an HTML page"),
            ("<html lang=en>", "an HTML page"),
            ("Entry not found", "a text of 15 bytes (`Entry not found`)"),
            ("\n\nInvalid credentials\nmore", "a text of 26 bytes (`Invalid credentials`)"),
            ("PK\x03\x04...", "a zip archive"),
        ] {
            let (what, hint) = recognise(bytes.as_bytes()).expect(found);
            assert_eq!(what, found);
            assert!(!hint.is_empty());
        }
        for bytes in [&b"GGUF\x03\0\0\0"[..], b"\x08\x09\x12\x07pytorch\x1a", &[b'a'; 5000]] {
            assert!(recognise(bytes).is_none());
        }
    }
}
