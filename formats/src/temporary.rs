//! Temporary files and folders beside the outputs that they become.
//!
//! Each is listed as long as it has its temporary name, so that a command that is interrupted can
//! remove it, and locked, so that a later command can tell what one that was killed has left.

use std::{
    fs::{self, File, Metadata, Permissions},
    io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tempfile::{Builder, NamedTempFile, TempDir};

use crate::{FormatError, Result};

const PREFIX: &str = ".slimllm-";
const SUFFIX: &str = ".tmp";

static LIST: Mutex<List> = Mutex::new(List { paths: Vec::new(), removed: Vec::new() });

#[derive(Debug)]
struct List {
    /// What has a temporary name.
    paths: Vec<PathBuf>,
    /// What was removed because it was not finished.
    removed: Vec<Removed>,
}

fn list() -> MutexGuard<'static, List> {
    LIST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A path on the list. When this value is dropped, what still has that name is removed.
#[derive(Debug)]
pub(crate) struct Listed(PathBuf);

impl Listed {
    /// Makes a file or folder in `folder`, and lists it before anyone else may look at the list.
    fn make<T: AsRef<Path>>(
        mode: u32,
        make: impl FnOnce(&Builder<'_, '_>) -> io::Result<T>,
    ) -> io::Result<(T, Self)> {
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let mut options = Builder::new();
        options.prefix(&prefix).suffix(SUFFIX);
        // Temporary files are private by default; this one becomes the user's, with the usual
        // access.
        #[cfg(unix)]
        options.permissions(<Permissions as std::os::unix::fs::PermissionsExt>::from_mode(mode));
        #[cfg(not(unix))]
        let _ = mode;
        let mut list = list();
        let made = make(&options)?;
        let path = made.as_ref().to_owned();
        list.paths.push(path.clone());
        Ok((made, Self(path)))
    }

    /// A file in `folder`.
    pub(crate) fn file_in(folder: &Path) -> io::Result<(NamedTempFile, Self)> {
        let (file, listed) = Self::make(0o666, |options| options.tempfile_in(folder))?;
        // Where there are no locks, a later command leaves the file alone.
        let _ = file.as_file().try_lock();
        Ok((file, listed))
    }
}

/// Calls `rename`, which gives what is `listed` other names, while nothing is removed.
pub(crate) fn renamed<L, T>(listed: L, rename: impl FnOnce() -> T) -> T {
    let answer = {
        let _list = list();
        rename()
    };
    drop(listed);
    answer
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut list = list();
        list.removed.extend(remove(&self.0));
        list.paths.retain(|path| *path != self.0);
    }
}

/// A folder with a temporary name, which is removed with all that is in it when this value is
/// dropped.
#[derive(Debug)]
pub struct TemporaryFolder {
    // Dropped first, it removes the folder.
    listed: Listed,
    folder: TempDir,
    _lock: Option<File>,
}

impl TemporaryFolder {
    /// Makes one in the folder of `path`.
    ///
    /// # Errors
    /// `Io` if that folder cannot be written to.
    pub fn beside(path: &Path) -> Result<Self> {
        let made = Listed::make(0o777, |options| options.tempdir_in(folder_of(path)));
        let (folder, listed) =
            made.map_err(|error| FormatError::io(path, "create the folder", error))?;
        let lock = File::open(folder.path()).ok().filter(|folder| folder.try_lock().is_ok());
        Ok(Self { listed, folder, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Gives it the name `path`, which is free, or that of an empty folder.
    ///
    /// # Errors
    /// `Io` if it is neither; the folder is removed then.
    pub fn rename(self, path: &Path) -> Result<()> {
        let Self { folder, listed, .. } = self;
        let rename = || {
            fs::rename(folder.path(), path)?;
            // It has its new name now: there is nothing to remove.
            let _ = folder.keep();
            Ok(())
        };
        renamed(listed, rename).map_err(|error| FormatError::io(path, "write the folder", error))
    }
}

/// The folder that `path` is in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// A temporary file or folder that was removed.
#[derive(Debug)]
pub struct Removed {
    /// What it was called.
    pub path: PathBuf,
    /// What it, or the files in it, took.
    pub bytes: u64,
}

/// What [`remove_temporaries`] has done. As long as this value lives, this process neither makes
/// temporary files nor gives them other names.
pub struct Cleared {
    /// What was removed.
    pub removed: Vec<Removed>,
    _list: MutexGuard<'static, List>,
}

/// Removes all temporary files and folders of this process that have names: for a process that is
/// about to end.
pub fn remove_temporaries() -> Cleared {
    let list = list();
    let removed = list.paths.iter().filter_map(|path| remove(path)).collect();
    Cleared { removed, _list: list }
}

/// The temporary files and folders that were removed so far because they were not finished, those
/// without a byte left out.
pub fn removed_unfinished() -> Vec<Removed> {
    let mut removed = std::mem::take(&mut list().removed);
    removed.retain(|removed| removed.bytes > 0);
    removed
}

/// Removes from `folder` the temporary files and folders of the user's processes that no longer
/// run.
pub fn remove_leftovers(folder: &Path) -> Vec<Removed> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let entries = entries.filter_map(io::Result::ok);
    let leftovers = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_leftover));
    // The lock is held until the file is gone: no process could take it in between.
    let removed = leftovers.filter_map(|entry| {
        let _lock = unused(&entry.path())?;
        remove(&entry.path())
    });
    removed.collect()
}

/// Whether a name is that of a temporary file of a process that does not run, on this machine at
/// least.
fn is_leftover(name: &str) -> bool {
    let middle = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX));
    let process = middle.and_then(|middle| middle.split_once('-')?.0.parse().ok());
    process.is_some_and(|process: u32| process != std::process::id() && !is_running(process))
}

fn is_running(process: u32) -> bool {
    #[cfg(unix)]
    {
        use rustix::{
            io::Errno,
            process::{Pid, test_kill_process},
        };
        let pid = i32::try_from(process).ok().and_then(Pid::from_raw);
        pid.is_some_and(|pid| test_kill_process(pid) != Err(Errno::SRCH))
    }
    #[cfg(not(unix))]
    {
        let _ = process;
        true
    }
}

/// The lock of a file or folder of the user that no process, of any machine, has locked.
fn unused(path: &Path) -> Option<File> {
    let metadata = path.symlink_metadata().ok()?;
    let is_ours = (metadata.is_file() || metadata.is_dir()) && is_owned(&metadata);
    let file = is_ours.then(|| File::open(path).ok())??;
    file.try_lock().ok()?;
    Some(file)
}

fn is_owned(metadata: &Metadata) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        metadata.uid() == rustix::process::geteuid().as_raw()
    }
    #[cfg(not(unix))]
    {
        let _ = metadata;
        false
    }
}

/// `None` if it is gone already, or stays.
fn remove(path: &Path) -> Option<Removed> {
    let metadata = path.symlink_metadata().ok()?;
    let bytes = if metadata.is_dir() { bytes_in(path) } else { metadata.len() };
    let removed = match metadata.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
    removed.is_ok().then(|| Removed { path: path.to_owned(), bytes })
}

/// Bytes of the files in a folder, not of those in folders in it.
fn bytes_in(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_in(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The number of a process that has ended.
    #[cfg(unix)]
    fn ended_process() -> u32 {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    }

    #[cfg(unix)]
    #[test]
    fn leftovers_are_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (dead, alive) = (ended_process(), std::os::unix::process::parent_id());
        let path = |name: &str| folder.path().join(name);
        let name = |process: u32, end: &str| format!(".slimllm-{process}-{end}.tmp");
        fs::write(path(&name(dead, "file")), [7; 10]).unwrap();
        fs::create_dir(path(&name(dead, "folder"))).unwrap();
        fs::write(path(&name(dead, "folder")).join("model"), [7; 20]).unwrap();

        fs::write(path(&name(dead, "locked")), "").unwrap();
        let locked = File::open(path(&name(dead, "locked"))).unwrap();
        locked.lock().unwrap();
        std::os::unix::fs::symlink("target", path(&name(dead, "link"))).unwrap();
        let kept = [
            name(alive, "alive"),
            name(std::process::id(), "own"),
            ".slimllm-x.tmp".into(),
            ".slimllm-new-one.tmp".into(),
            "target".into(),
        ];
        kept.iter().for_each(|name| fs::write(path(name), "").unwrap());

        let mut bytes: Vec<u64> =
            remove_leftovers(folder.path()).iter().map(|removed| removed.bytes).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, [10, 20]);
        let mut left = kept.to_vec();
        left.extend([name(dead, "locked"), name(dead, "link")]);
        left.sort();
        assert_eq!(names_in(folder.path()), left);
    }

    #[test]
    fn folder_takes_its_name_or_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("out");
        let folder = TemporaryFolder::beside(&target).unwrap();
        fs::write(folder.path().join("half"), "").unwrap();
        drop(folder);
        assert!(names_in(parent.path()).is_empty());

        fs::write(&target, "a file").unwrap();
        TemporaryFolder::beside(&target).unwrap().rename(&target).unwrap_err();
        assert_eq!(names_in(parent.path()), ["out"]);
        fs::remove_file(&target).unwrap();
        TemporaryFolder::beside(&target).unwrap().rename(&target).unwrap();
        assert!(target.is_dir());
        assert!(list().paths.iter().all(|path| !path.starts_with(parent.path())));
    }
}
