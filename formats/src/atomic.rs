//! Files that appear whole or not at all.

use std::{
    fs::{self, File},
    io::{self, BufWriter, ErrorKind, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use tempfile::{NamedTempFile, PersistError};

use crate::{
    FormatError, Result,
    disk::{self, free_bytes},
    temporary::{Listed, folder_of, renamed},
};

/// Where an output goes.
#[derive(Debug, Clone, Copy)]
pub struct OutputPath<'p> {
    /// What it will be called.
    pub path: &'p Path,
    /// Whether it takes the place of a regular file of that name, or an empty folder, if it is a
    /// folder. Nothing else is ever replaced.
    pub replaces: bool,
}

impl OutputPath<'_> {
    /// Checks that a file can be written there, now.
    ///
    /// # Errors
    /// As [`AtomicFile::create`].
    pub fn check_file(self) -> Result<()> {
        AtomicFile::create(self).map(drop)
    }
}

/// A path that is free.
impl<'p, P: AsRef<Path> + ?Sized> From<&'p P> for OutputPath<'p> {
    fn from(path: &'p P) -> Self {
        Self { path: path.as_ref(), replaces: false }
    }
}

/// A buffered file that takes its name only when [`commit`](Self::commit) is called.
///
/// Until then the bytes go to a temporary file in the same folder, which is removed if this value
/// is dropped. A file that had the name before stays whole until it is replaced.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    replaces: bool,
    // Dropped before the file, it removes it.
    listed: Listed,
    writer: BufWriter<NamedTempFile>,
    /// Where the next byte goes, and where the last one has gone.
    position: u64,
    end: u64,
    reserved: u64,
}

impl AtomicFile {
    /// Starts a file that will be called as `output` says.
    ///
    /// # Errors
    /// `Exists` if something has the name that is not to be replaced, `Io` if no file can be
    /// created in its folder.
    pub fn create<'p>(output: impl Into<OutputPath<'p>>) -> Result<Self> {
        let OutputPath { path, replaces } = output.into();
        check_replaceable(path, replaces)?;
        match Listed::file_in(folder_of(path)) {
            Ok((file, listed)) => Ok(Self {
                path: path.to_owned(),
                replaces,
                listed,
                writer: BufWriter::with_capacity(1 << 20, file),
                position: 0,
                end: 0,
                reserved: 0,
            }),
            Err(error) => Err(FormatError::io(path, "create the file", error)),
        }
    }

    /// Reserves room for a file of `bytes` bytes. It may become smaller or larger.
    ///
    /// # Errors
    /// `NoSpace` or `FileTooLarge` if there is no room.
    pub fn reserve(&mut self, bytes: u64) -> Result<()> {
        let file = self.writer.get_ref().as_file();
        disk::reserve(file, folder_of(&self.path), bytes, &self.path, "the file takes")?;
        self.reserved = bytes;
        Ok(())
    }

    /// Brings the bytes to the disk and gives the file its name.
    ///
    /// # Errors
    /// As [`Self::commit_all`].
    pub fn commit(self) -> Result<()> {
        Self::commit_all([self])
    }

    /// Brings the bytes of files that belong together to the disk, and gives them their names. The
    /// first one gets its name last: where it is, all are.
    ///
    /// # Errors
    /// `Io` if bytes cannot be written or a file cannot be renamed, `Exists` if something has taken
    /// a name meanwhile that is not to be replaced; all of the files are removed.
    pub fn commit_all(files: impl IntoIterator<Item = Self>) -> Result<()> {
        let (mut finished, mut listed) = (Vec::new(), Vec::new());
        for file in files {
            let (file, temporary) = file.finish()?;
            finished.push(file);
            listed.push(temporary);
        }
        renamed(listed, || name_all(finished))
    }

    /// Brings the bytes to the disk.
    fn finish(mut self) -> Result<(Finished, Listed)> {
        let flushed = self.flush();
        let Self { path, replaces, writer, listed, end, .. } = self;
        let failed = |error| FormatError::io(&path, "write the file", error);
        flushed.map_err(failed)?;
        let file = writer.into_inner().map_err(|error| failed(error.into_error()))?;
        // What was reserved and not needed is given back.
        let written = file.as_file().set_len(end).and_then(|()| file.as_file().sync_all());
        written.map_err(failed)?;
        Ok((Finished { path, replaces, file }, listed))
    }

    /// An error of writing, with figures if the disk is full.
    fn explained(&self, error: io::Error) -> io::Error {
        if !disk::is_full(&error) {
            return error;
        }
        let error = FormatError::NoSpace {
            path: self.path.clone(),
            what: "the file takes",
            needed: self.reserved.max(self.position),
            free: free_bytes(folder_of(&self.path)).unwrap_or(0),
        };
        io::Error::new(ErrorKind::StorageFull, error)
    }
}

/// A file on the disk that lacks its name.
struct Finished {
    path: PathBuf,
    replaces: bool,
    file: NamedTempFile,
}

/// Gives files their names, the first one last; none if one cannot have its name.
fn name_all(files: Vec<Finished>) -> Result<()> {
    for Finished { path, replaces, .. } in &files {
        check_replaceable(path, *replaces)?;
    }
    let mut named: Vec<PathBuf> = Vec::new();
    for Finished { path, replaces, file } in files.into_iter().rev() {
        if let Err(error) = persist(file, &path, replaces) {
            // Files without the first of them are of no use.
            named.iter().for_each(|path| drop(fs::remove_file(path)));
            return Err(error);
        }
        // Makes the new name survive a power cut, where the system can do that; the file is whole
        // either way.
        let _ = File::open(folder_of(&path)).and_then(|folder| folder.sync_all());
        named.push(path);
    }
    Ok(())
}

/// Checks that nothing has the name `path`, or something that may be replaced.
fn check_replaceable(path: &Path, replaces: bool) -> Result<()> {
    match path.symlink_metadata() {
        Err(_) => Ok(()),
        Ok(found) if replaces && found.is_file() => Ok(()),
        Ok(_) => Err(FormatError::Exists { path: path.to_owned() }),
    }
}

/// Gives a file its name.
fn persist(file: NamedTempFile, path: &Path, replaces: bool) -> Result<()> {
    check_replaceable(path, replaces)?;
    let persisted = match replaces {
        true => file.persist(path),
        // Some file systems can only replace: nothing had the name a moment ago.
        false => file.persist_noclobber(path).or_else(|PersistError { error, file }| {
            match error.kind() {
                ErrorKind::AlreadyExists => Err(PersistError { error, file }),
                _ => file.persist(path),
            }
        }),
    };
    match persisted {
        Ok(_) => Ok(()),
        Err(PersistError { error, .. }) if error.kind() == ErrorKind::AlreadyExists => {
            Err(FormatError::Exists { path: path.to_owned() })
        }
        Err(PersistError { error, .. }) => Err(FormatError::io(path, "write the file", error)),
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.writer.write(bytes).map_err(|error| self.explained(error))?;
        self.position += written as u64;
        self.end = self.end.max(self.position);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush().map_err(|error| self.explained(error))
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.position = self.writer.seek(position)?;
        Ok(self.position)
    }

    /// Without writing what is buffered.
    fn stream_position(&mut self) -> io::Result<u64> {
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_in(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn commit_replaces_the_file_with_all_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        std::fs::write(&path, "before").unwrap();
        let mut file = AtomicFile::create(OutputPath { path: &path, replaces: true }).unwrap();
        file.reserve(10_000).unwrap();
        file.write_all(b"_fter, and more").unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(b"a").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"before");
        file.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"after, and more");
        assert_eq!(names_in(folder.path()), ["out"]);
    }

    #[test]
    fn file_that_is_there_or_comes_meanwhile_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"ours").unwrap();
        std::fs::write(&path, "theirs").unwrap();
        assert!(matches!(AtomicFile::create(&path), Err(FormatError::Exists { .. })));
        assert!(matches!(file.commit(), Err(FormatError::Exists { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"theirs");
        assert_eq!(names_in(folder.path()), ["out"]);
    }

    #[test]
    fn files_that_belong_together_get_their_names_or_none_does() {
        let folder = tempfile::tempdir().unwrap();
        let files = || {
            let path = |name: &str| folder.path().join(name);
            ["1", "2", "3"].map(|name| AtomicFile::create(&path(name)).unwrap())
        };
        let taken = files();
        std::fs::write(folder.path().join("2"), "theirs").unwrap();
        assert!(matches!(AtomicFile::commit_all(taken), Err(FormatError::Exists { .. })));
        assert_eq!(names_in(folder.path()), ["2"]);
        std::fs::remove_file(folder.path().join("2")).unwrap();
        AtomicFile::commit_all(files()).unwrap();
        assert_eq!(names_in(folder.path()).len(), 3);
    }

    #[cfg(unix)]
    #[test]
    fn link_and_folder_are_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (link, inner) = (folder.path().join("link"), folder.path().join("folder"));
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        std::fs::create_dir(&inner).unwrap();
        for path in [&link, &inner] {
            let created = AtomicFile::create(OutputPath { path, replaces: true });
            assert!(matches!(created, Err(FormatError::Exists { .. })), "{}", path.display());
        }
        // A link that takes the place of a file while it is written.
        let path = &folder.path().join("out");
        let file = AtomicFile::create(OutputPath { path, replaces: true }).unwrap();
        std::os::unix::fs::symlink("nowhere", path).unwrap();
        assert!(matches!(file.commit(), Err(FormatError::Exists { .. })));
        assert!(path.is_symlink());
    }

    #[test]
    fn drop_without_commit_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = AtomicFile::create(&folder.path().join("out")).unwrap();
        file.write_all(b"half").unwrap();
        drop(file);
        assert!(names_in(folder.path()).is_empty());
    }

    #[test]
    fn create_in_a_missing_folder_is_refused() {
        let error = AtomicFile::create("/no/such/folder/out").unwrap_err();
        assert!(matches!(error, FormatError::Io { .. }));
    }
}
