//! The hub's cache on disk: `models--ORG--NAME` with `refs`, `snapshots` and `blobs`.

use std::{
    collections::BTreeSet,
    fs::{self, File, TryLockError},
    io::Read,
    path::{Path, PathBuf},
};

use slim_formats::free_bytes;

use crate::{
    HubError, HubId, Result, Watch,
    choice::{NEEDED, Weights, gguf_models, safetensors, shards},
    listing::RemoteFile,
};

/// Folders within each other, and names in all of them, that are looked at.
const MAX_DEPTH: usize = 3;
const MAX_NAMES: usize = 1 << 16;

/// What the cache has of a repository.
pub struct Repository {
    folder: PathBuf,
    locks: PathBuf,
}

impl Repository {
    /// That of an id, whether there is anything of it or not.
    pub fn of(cache: &Path, id: &HubId) -> Self {
        let name = format!("models--{}", id.repository().replace('/', "--"));
        Self { folder: cache.join(&name), locks: cache.join(".locks").join(&name) }
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The commit of a revision, if it was fetched.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let mut commit = String::new();
        let file = File::open(self.folder.join("refs").join(revision)).ok()?;
        file.take(256).read_to_string(&mut commit).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Notes which commit a revision is.
    pub fn write_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        create_parent(&path)?;
        let unfinished = path.with_added_extension(format!("{}.tmp", std::process::id()));
        fs::write(&unfinished, commit)
            .and_then(|()| fs::rename(&unfinished, &path))
            .map_err(|source| HubError::io(&path, "write", source))
    }

    /// The files of a commit.
    pub fn snapshot(&self, commit: &str) -> Snapshot {
        let folder = self.folder.join("snapshots").join(commit);
        Snapshot { folder, unfinished: self.locks.clone() }
    }

    /// Where the bytes of a file are.
    pub fn blob(&self, file: &RemoteFile) -> PathBuf {
        self.folder.join("blobs").join(file.hash.hex())
    }

    /// Whether they are there.
    pub fn has_blob(&self, file: &RemoteFile) -> bool {
        self.blob(file).metadata().is_ok_and(|found| found.is_file() && found.len() == file.size)
    }

    /// Where they are until they are whole.
    pub fn incomplete(&self, file: &RemoteFile) -> PathBuf {
        self.blob(file).with_added_extension("incomplete")
    }

    /// Bytes of a file that are not there yet.
    pub fn missing_bytes(&self, file: &RemoteFile) -> u64 {
        let there = self.incomplete(file).metadata().map_or(0, |found| found.len());
        file.size.saturating_sub(there)
    }

    /// Checks that the disk has room for what is missing of files.
    ///
    /// # Errors
    /// `NoRoom`; `Io` if the cache cannot be created.
    pub fn require_room(&self, needed: u64) -> Result<()> {
        let folder = self.folder.join("blobs");
        fs::create_dir_all(&folder).map_err(|source| HubError::io(&folder, "create", source))?;
        match free_bytes(&folder) {
            Some(free) if free < needed => Err(HubError::NoRoom { folder, free, needed }),
            _ => Ok(()),
        }
    }

    /// Waits until no other process fetches a file. The lock ends with what is given back.
    pub fn lock(&self, file: &RemoteFile, watch: &mut dyn Watch) -> Result<File> {
        let path = self.locks.join(format!("{}.lock", file.hash.hex()));
        create_parent(&path)?;
        let io = |source| HubError::io(&path, "lock", source);
        let lock = File::options().create(true).append(true).open(&path).map_err(io)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                watch.waits_for_another(&file.name);
                lock.lock().map_err(io)?;
            }
            Err(TryLockError::Error(error)) => return Err(io(error)),
        }
        Ok(lock)
    }
}

/// What the cache has of a commit.
pub struct Snapshot {
    folder: PathBuf,
    /// Where links are made: among the files of the commit others would take them for some of it.
    unfinished: PathBuf,
}

impl Snapshot {
    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where a file of the repository is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Where the model is that an id means, if it is whole: the one in safetensors, or the GGUF
    /// model with this ending.
    pub fn model(&self, gguf: Option<&str>) -> Option<PathBuf> {
        let mut found = BTreeSet::new();
        collect_names(&self.folder, "", MAX_DEPTH, &mut found);
        let names: BTreeSet<&str> = found.iter().map(String::as_str).collect();
        let has_all = |needed: &[String]| needed.iter().all(|name| found.contains(name));
        if gguf.is_some() {
            let mut models = gguf_models(&names, gguf);
            let parts = models.pop().filter(|parts| models.is_empty() && has_all(parts))?;
            return Some(self.path(&parts[0]));
        }
        let has_weights = match safetensors(&names)? {
            Weights::Single(name) => has_all(&[name]),
            Weights::Index(name) => has_all(&shards(&self.path(&name)).ok()?),
            Weights::Gguf(parts) => has_all(&parts),
        };
        let is_whole = has_weights && NEEDED.iter().all(|name| names.contains(name));
        is_whole.then(|| self.folder.clone())
    }

    /// Gives a blob the name that it has in the repository.
    pub fn link(&self, file: &RemoteFile) -> Result<()> {
        let link = self.path(&file.name);
        create_parent(&link)?;
        // Another process may be reading what is there: it stays until it is replaced.
        let name = format!("{}.{}.tmp", file.hash.hex(), std::process::id());
        let unfinished = self.unfinished.join(name);
        create_parent(&unfinished)?;
        let _ = fs::remove_file(&unfinished);
        self.create_link(&unfinished, file)
            .and_then(|()| fs::rename(&unfinished, &link))
            .map_err(|source| HubError::io(&link, "create", source))
    }

    /// The link is relative to its place in the snapshot: the cache may be moved.
    #[cfg(unix)]
    fn create_link(&self, link: &Path, file: &RemoteFile) -> std::io::Result<()> {
        let up = "../".repeat(2 + file.name.matches('/').count());
        std::os::unix::fs::symlink(format!("{up}blobs/{}", file.hash.hex()), link)
    }

    /// Elsewhere not every user may create symbolic links.
    #[cfg(not(unix))]
    fn create_link(&self, link: &Path, file: &RemoteFile) -> std::io::Result<()> {
        fs::hard_link(self.folder.join("../../blobs").join(file.hash.hex()), link)
    }
}

/// The names of the files below a folder whose bytes are there, with `/` between their parts.
fn collect_names(folder: &Path, prefix: &str, depth: usize, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if names.len() == MAX_NAMES {
            return;
        }
        match entry.path().metadata() {
            Ok(found) if found.is_file() => _ = names.insert(format!("{prefix}{name}")),
            Ok(found) if found.is_dir() && depth > 0 => {
                collect_names(&entry.path(), &format!("{prefix}{name}/"), depth - 1, names);
            }
            _ => {}
        }
    }
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn create_parent(path: &Path) -> Result<()> {
    let folder = path.parent().expect("it is a path within the cache");
    fs::create_dir_all(folder).map_err(|source| HubError::io(folder, "create", source))
}
