//! Files that appear whole or not at all.

use std::fs::{File, Permissions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::{FormatError, Result};

/// A buffered file that takes its name only when [`commit`](Self::commit) is called.
///
/// Until then the bytes go to a temporary file in the same folder, which is removed if this value
/// is dropped. A file that had the name before stays whole until it is replaced.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    writer: BufWriter<NamedTempFile>,
}

impl AtomicFile {
    /// Starts a file that will be called `path`.
    ///
    /// # Errors
    /// `Io` if no file can be created in the folder of `path`.
    pub fn create(path: &Path) -> Result<Self> {
        let temporary = new_file_options().tempfile_in(folder_of(path));
        match temporary {
            Ok(file) => {
                Ok(Self { path: path.to_owned(), writer: BufWriter::with_capacity(1 << 20, file) })
            }
            Err(error) => Err(FormatError::io(path, "create the file", error)),
        }
    }

    /// Brings the bytes to the disk and gives the file its name.
    ///
    /// # Errors
    /// `Io` if the bytes cannot be written or the file cannot be renamed; the temporary file is removed.
    pub fn commit(self) -> Result<()> {
        let Self { path, writer } = self;
        let rename = || {
            let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|error| error.error)
        };
        rename().map_err(|error| FormatError::io(&path, "write the file", error))?;
        // Makes the new name survive a power cut, where the system can do that; the file is whole either way.
        let _ = File::open(folder_of(&path)).and_then(|folder| folder.sync_all());
        Ok(())
    }
}

/// Temporary files are private by default; this one becomes the user's file, with the usual access.
fn new_file_options() -> tempfile::Builder<'static, 'static> {
    let mut options = tempfile::Builder::new();
    options.prefix(".slimllm-").suffix(".tmp");
    #[cfg(unix)]
    options.permissions(<Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666));
    options
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.writer.seek(position)
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
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"_fter, and more").unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(b"a").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"before");
        file.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"after, and more");
        assert_eq!(names_in(folder.path()), ["out"]);
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
        let error = AtomicFile::create(Path::new("/no/such/folder/out")).unwrap_err();
        assert!(matches!(error, FormatError::Io { .. }));
    }
}
