//! What a repository has at a revision, as the hub lists it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::{HubError, Result, Watch, client::Client, patience::Patience};

/// Bytes of a list.
const MAX_BYTES: u64 = 32 << 20;

/// The files of a repository at a commit.
pub struct Listing {
    commit: String,
    /// By their names.
    files: BTreeMap<String, RemoteFile>,
    /// What was asked for, for messages.
    of: String,
}

/// A file of a repository.
pub struct RemoteFile {
    /// Relative, with `/` between its parts.
    pub name: String,
    /// Where to get it.
    pub path: String,
    /// In bytes.
    pub size: u64,
    /// What its bytes must hash to; its name among the blobs of the cache.
    pub hash: Hash,
}

/// The hash that a hub tells of a file.
pub enum Hash {
    /// SHA-256 of the bytes, of files in LFS.
    Sha256(String),
    /// SHA-1 as Git has it, of other files.
    GitBlob(String),
}

impl Hash {
    /// In hex.
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
        }
    }
}

/// The hub's answer: what of it is read.
#[derive(Deserialize)]
struct Answer {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl Listing {
    /// Asks the hub.
    ///
    /// # Errors
    /// `Refused`, `Busy`, `NoHub`, `Connection`; `Answer` if it is no list, or a name in it is none
    /// of a file within the repository.
    pub fn request(client: &Client, watch: &mut dyn Watch) -> Result<Self> {
        let path = client.listing_path();
        let text = Patience::with(watch, || {
            client.text(&path, MAX_BYTES).map_err(|error| match error {
                HubError::Unreached { host, reason } => {
                    HubError::NoHub { id: client.id().to_string(), host, reason }
                }
                error => error,
            })
        })?;
        let of = format!("{}{path}", client.endpoint());
        Self::parse(&text, of, |commit, name| client.file_path(commit, name))
    }

    fn parse(text: &[u8], of: String, path: impl Fn(&str, &str) -> String) -> Result<Self> {
        let wrong = |found: String, expected| HubError::Answer { of: of.clone(), found, expected };
        let answer: Answer = serde_json::from_slice(text)
            .map_err(|error| wrong(error.to_string(), "a list of a repository's files"))?;
        if !is_hex(&answer.sha, &[40, 64]) {
            return Err(wrong(format!("the commit `{}`", cut(&answer.sha)), "a hash in hex"));
        }
        let mut files = BTreeMap::new();
        for sibling in answer.siblings {
            let name = sibling.rfilename.clone();
            if !is_inside(&name) {
                return Err(wrong(format!("a file called `{}`", cut(&name)), INSIDE));
            }
            let path = path(&answer.sha, &name);
            if let Some((size, hash)) = sibling.hashed() {
                files.insert(name.clone(), RemoteFile { name, path, size, hash });
            }
        }
        Ok(Self { commit: answer.sha, files, of })
    }

    /// The commit of the revision that was asked for.
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// The names of all files.
    pub fn names(&self) -> BTreeSet<&str> {
        self.files.keys().map(String::as_str).collect()
    }

    /// A file by its name.
    ///
    /// # Errors
    /// `Answer` if the list does not have it.
    pub fn file(&self, name: &str) -> Result<&RemoteFile> {
        self.files.get(name).ok_or_else(|| HubError::Answer {
            of: self.of.clone(),
            found: format!("no `{}` with its size and hash", cut(name)),
            expected: "all files of the model",
        })
    }
}

impl Sibling {
    /// Size and hash; `None` if they are not told as they should be.
    fn hashed(self) -> Option<(u64, Hash)> {
        match self.lfs {
            Some(lfs) => is_hex(&lfs.sha256, &[64]).then_some((lfs.size, Hash::Sha256(lfs.sha256))),
            None => {
                let hash = self.blob_id.filter(|hash| is_hex(hash, &[40]))?;
                Some((self.size?, Hash::GitBlob(hash)))
            }
        }
    }
}

const INSIDE: &str = "a relative name without `..`";

/// Whether a name is one within a folder, on every system.
fn is_inside(name: &str) -> bool {
    let is_part = |part: &str| !part.is_empty() && part != "." && part != "..";
    let is_obeyed = |c: char| c.is_control() || matches!(c, '\\' | ':');
    name.len() <= 1024 && name.split('/').all(is_part) && !name.contains(is_obeyed)
}

fn is_hex(text: &str, lengths: &[usize]) -> bool {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    lengths.contains(&text.len()) && text.bytes().all(is_digit)
}

/// The beginning of a text of the hub.
fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(siblings: &str) -> Result<Listing> {
        let text = format!(r#"{{"sha": "{}", "siblings": [{siblings}]}}"#, "a".repeat(40));
        Listing::parse(text.as_bytes(), "list".to_owned(), |_, name| name.to_owned())
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for name in ["../a", "/a", "a/../b", "a//b", "", "a/.", "c:a", "a\\\\b", "a\\u0000", "a/"] {
            let error = parse(&format!(r#"{{"rfilename": "{name}"}}"#)).err().unwrap();
            assert!(error.to_string().contains(INSIDE), "{name}: {error}");
        }
        assert!(parse(r#"{"rfilename": "a b/ü..c"}"#).is_ok());
    }

    #[test]
    fn files_without_a_hash_are_missing() {
        let (sha1, sha256) = ("b".repeat(40), "c".repeat(64));
        let listing = parse(&format!(
            r#"{{"rfilename": "a", "size": 1, "blobId": "{sha1}"}},
               {{"rfilename": "b", "size": 9, "blobId": "{sha1}", "lfs": {{"sha256": "{sha256}", "size": 2}}}},
               {{"rfilename": "c", "size": 3}},
               {{"rfilename": "d", "size": 3, "blobId": "../{sha1}"}}"#
        ))
        .unwrap();
        assert_eq!(listing.names().into_iter().collect::<Vec<_>>(), ["a", "b"]);
        let file = listing.file("b").unwrap();
        assert_eq!((file.size, file.hash.hex()), (2, sha256.as_str()));
        assert!(listing.file("c").is_err());
    }

    #[test]
    fn commit_that_is_no_hash_is_refused() {
        for text in [r#"{"sha": "../../x", "siblings": []}"#, "{}", "<html>"] {
            let parsed = Listing::parse(text.as_bytes(), "list".to_owned(), |_, _| String::new());
            assert!(parsed.is_err(), "{text}");
        }
    }
}
