//! Memory maps: the only unsafe code of this crate.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapMut};

use crate::{FormatError, Result, disk::reserve, limits::open_regular};

/// A file's bytes, mapped read-only.
///
/// The file must not be shortened by another program while it is mapped: reading past its new end
/// ends the process. Files that this crate writes are replaced by renaming ([`crate::AtomicFile`]),
/// which leaves a map of the old file whole.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps a regular file; an empty one gives no bytes.
    ///
    /// # Errors
    /// `Io` if the file cannot be opened, is a folder or a device, or cannot be mapped.
    pub fn open(path: &Path) -> Result<Self> {
        open_regular(path)
            .and_then(|file| Self::map(path, &file))
            .map_err(|error| FormatError::io(path, "open the file", error))
    }

    /// Maps a file that is open.
    pub(crate) fn map(path: &Path, file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let map = (metadata.len() > 0).then(|| map_read_only(file)).transpose()?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives back the memory of the pages that reading has brought in. They are read again when
    /// they are needed, mostly from the system's cache. Does nothing on other systems than Unix.
    pub fn release_pages(&self) {
        #[cfg(unix)]
        if let Some(map) = &self.map {
            // SAFETY: the map is shared and never written to, so its pages hold nothing but what
            // the file has; whoever reads them at this moment finds the same bytes.
            let advised = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
            // Where the system does not follow the advice, pages stay.
            drop(advised);
        }
    }
}

fn map_read_only(file: &File) -> io::Result<Mmap> {
    // SAFETY: the map is private to `MappedFile` and only read. Another program that changes the
    // file can change the bytes between two reads, or end the process by shortening the file;
    // every user of the map takes bytes for untrusted input and copies what it validates.
    unsafe { Mmap::map(file) }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

/// Zeroed read-write memory backed by a nameless temporary file, for data that may not fit in
/// memory.
///
/// It starts on a page boundary. The file lies in the system's folder for temporary files
/// (`TMPDIR`) and is gone when this value is dropped or the process ends. Its room is reserved when
/// it is made: a full disk is an error then, not a signal that ends the process at the first write
/// that finds no room.
#[derive(Debug)]
pub struct ScratchFile {
    map: Option<MmapMut>,
}

impl ScratchFile {
    /// Maps a new temporary file of `bytes` zero bytes.
    ///
    /// # Errors
    /// `NoSpace` or `FileTooLarge` if there is no room, `Io` if the file cannot be created, sized
    /// or mapped.
    pub fn new(bytes: usize) -> Result<Self> {
        if bytes == 0 {
            return Ok(Self { map: None });
        }
        let folder = &std::env::temp_dir();
        let failed = |error| FormatError::io(folder, "create a temporary file", error);
        let mut file = tempfile::tempfile().map_err(failed)?;
        if !reserve(&file, folder, bytes as u64, folder, "a temporary file takes")? {
            io::copy(&mut io::repeat(0).take(bytes as u64), &mut file).map_err(failed)?;
        }
        Ok(Self { map: Some(map_read_write(&file).map_err(failed)?) })
    }
}

fn map_read_write(file: &File) -> io::Result<MmapMut> {
    // SAFETY: the file was just created without a name, so no other program can open or shorten it.
    unsafe { MmapMut::map_mut(file) }
}

impl Deref for ScratchFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

impl DerefMut for ScratchFile {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_file_gives_the_bytes_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        for content in ["", "some bytes"] {
            std::fs::write(&path, content).unwrap();
            let file = MappedFile::open(&path).unwrap();
            assert_eq!(&*file, content.as_bytes());
            file.release_pages();
            assert_eq!(&*file, content.as_bytes());
        }
        assert!(MappedFile::open(folder.path()).is_err());
        assert!(MappedFile::open(&folder.path().join("absent")).is_err());
    }

    #[test]
    fn scratch_file_is_zeroed_and_writable() {
        let mut scratch = ScratchFile::new(10_000).unwrap();
        assert!(scratch.iter().all(|&byte| byte == 0));
        scratch[9_999] = 7;
        assert_eq!(scratch[9_999], 7);
        assert!(ScratchFile::new(0).unwrap().is_empty());
    }
}
