//! Room on disks: how much is free, and its reservation.

use std::{
    fs::File,
    io::{self, ErrorKind},
    path::Path,
};

use crate::{FormatError, Result};

/// Bytes that are free on the disk of `folder`; `None` where the system does not tell.
pub fn free_bytes(folder: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let disk = rustix::fs::statvfs(folder).ok()?;
        Some(disk.f_bavail.saturating_mul(disk.f_frsize))
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        None
    }
}

/// Reserves room for the first `bytes` bytes of `file` in `folder`, and tells whether it could:
/// some file systems cannot, of which only the free bytes are asked then. `what` is the subject of
/// [`FormatError::NoSpace`], with `path` as the file.
///
/// # Errors
/// `NoSpace`, or `FileTooLarge` for more than the process may write to a file.
pub fn reserve(
    file: &File,
    folder: &Path,
    bytes: u64,
    path: &Path,
    what: &'static str,
) -> Result<bool> {
    // Asked before: a reservation that fails may have filled the disk until then.
    let free = free_bytes(folder).unwrap_or(u64::MAX);
    let no_space = |free| FormatError::NoSpace { path: path.to_owned(), what, needed: bytes, free };
    if free < bytes {
        return Err(no_space(free));
    }
    match allocate(file, bytes) {
        Ok(()) => Ok(true),
        Err(error) if is_full(&error) => {
            let _ = file.set_len(0);
            Err(no_space(free_bytes(folder).unwrap_or(0)))
        }
        Err(error) if error.kind() == ErrorKind::FileTooLarge => {
            let limit = largest_file().unwrap_or(0);
            Err(FormatError::FileTooLarge { path: path.to_owned(), needed: bytes, limit })
        }
        Err(_) => Ok(false),
    }
}

/// Whether an error says that no room is left.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    use rustix::{
        fs::{FallocateFlags, fallocate},
        io::retry_on_intr,
    };
    if bytes > 0 {
        retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, bytes))?;
    }
    Ok(())
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn allocate(_: &File, _: u64) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// The most bytes that the process may write to a file, if there is a limit.
fn largest_file() -> Option<u64> {
    #[cfg(unix)]
    return rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
    #[cfg(not(unix))]
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_disk_has_is_refused_with_both_figures() {
        let folder = tempfile::tempdir().unwrap();
        let file = tempfile::tempfile_in(folder.path()).unwrap();
        let path = folder.path().join("out");
        let error = reserve(&file, folder.path(), 1 << 60, &path, "the file takes").unwrap_err();
        let text = error.to_string();
        assert!(text.contains("the file takes 1152921504606.8 MB, but "), "{text}");
        assert!(text.contains(" MB are free on its disk"), "{text}");
        assert_eq!(file.metadata().unwrap().len(), 0);
        assert!(error.hint().is_some());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn reservation_takes_room() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let file = tempfile::tempfile_in(folder.path()).unwrap();
        if reserve(&file, folder.path(), 1 << 20, folder.path(), "").unwrap() {
            assert!(file.metadata().unwrap().blocks() * 512 >= 1 << 20);
        }
    }
}
