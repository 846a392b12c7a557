//! Tensors that lie in files beside the model: the one place that opens what a model file names.
//!
//! A model comes from strangers, and so do the names in it. A name must be that of a regular file
//! in the model's folder or below it, reached through no link of any kind: `..`, symbolic links
//! (also of folders on the way) and hard links have each led out of the folder in other readers
//! (CVE-2022-25882, CVE-2024-27318, CVE-2026-27489, CVE-2026-34447).

use std::{
    fs::{File, Metadata},
    io,
    ops::Range,
    path::{Component, Path, PathBuf},
};

use super::graph::External;
use crate::{FormatError, MappedFile, Result, stand_in};

/// The files beside a model that hold its tensors, each mapped once.
#[derive(Debug)]
pub struct ExternalFiles {
    /// For messages.
    model: PathBuf,
    /// The model's folder as the user named it.
    folder: PathBuf,
    /// The same without links.
    real_folder: PathBuf,
    /// With their names in the model file.
    files: Vec<(PathBuf, MappedFile)>,
}

impl ExternalFiles {
    /// Those of a model in `folder`; none is open yet.
    ///
    /// # Errors
    /// `Io` if the folder cannot be found.
    pub fn new(model: &Path, folder: &Path) -> Result<Self> {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let real_folder = folder
            .canonicalize()
            .map_err(|error| FormatError::io(folder, "find the folder", error))?;
        let (model, folder) = (model.to_owned(), folder.to_owned());
        Ok(Self { model, folder, real_folder, files: Vec::new() })
    }

    /// The file and the range of it that hold the `bytes` bytes of the initializer `name`.
    ///
    /// # Errors
    /// `Malformed` for a name that is not allowed, or a range that is not in the file or not of
    /// `bytes` bytes; `Unsupported` for a link; `Io`.
    pub fn find(
        &mut self,
        name: &str,
        external: &External<'_>,
        bytes: u64,
    ) -> Result<(usize, Range<usize>)> {
        let index = self.file(name, external)?;
        let number = |what, text: &str| {
            text.parse::<u64>()
                .map_err(|_| self.malformed(name, what, text, "a whole number".to_owned()))
        };
        let offset = number("offset", external.offset.unwrap_or("0"))?;
        if let Some(text) = external.length
            && number("length", text)? != bytes
        {
            let expected = format!("{bytes}, as its shape and type say");
            return Err(self.malformed(name, "length", text, expected));
        }
        let (location, file) = &self.files[index];
        let file_bytes = file.len() as u64;
        match offset.checked_add(bytes) {
            // Both fit in `usize`, as the length of a map does.
            Some(end) if end <= file_bytes => Ok((index, offset as usize..end as usize)),
            _ => {
                let place = format!("initializer `{name}`: its external data");
                let found = format!("{bytes} bytes from {offset} on");
                let location = location.display();
                let expected = format!("a range in the {file_bytes} bytes of `{location}`");
                Err(FormatError::malformed(&self.model, place, "", found, expected))
            }
        }
    }

    /// The file that holds the values of the tensor `name`.
    ///
    /// # Errors
    /// `Malformed` for a name that is not allowed, `Unsupported` for a link, `Io`.
    pub fn file(&mut self, name: &str, external: &External<'_>) -> Result<usize> {
        let location = external.location.unwrap_or_default();
        let relative = plain_path(location).ok_or_else(|| {
            let expected = "a path below the model's folder, without `..`".to_owned();
            self.malformed(name, "location", location, expected)
        })?;
        if let Some(index) = self.files.iter().position(|(path, _)| *path == relative) {
            return Ok(index);
        }
        let file = self.open(location, &relative)?;
        self.files.push((relative, file));
        Ok(self.files.len() - 1)
    }

    /// The mapped files.
    pub fn into_maps(self) -> Vec<MappedFile> {
        self.files.into_iter().map(|(_, file)| file).collect()
    }

    fn malformed(&self, name: &str, what: &str, found: &str, expected: String) -> FormatError {
        let place = format!("initializer `{name}`: {what} of its external data");
        FormatError::malformed(&self.model, place, "", format!("`{found}`"), expected)
    }

    /// Opens a file, then checks that it is what its path led to without links.
    fn open(&self, location: &str, relative: &Path) -> Result<MappedFile> {
        let shown = self.folder.join(relative);
        let real = self.real_folder.join(relative);
        let open = || {
            if regular_file_without_links(&real)?.is_none() {
                return Ok(None);
            }
            let file = File::open(&real)?;
            let opened = file.metadata()?;
            let is_same = regular_file_without_links(&real)?
                .is_some_and(|found| is_same_file(&found, &opened));
            is_same.then(|| MappedFile::map(&shown, &file)).transpose()
        };
        match open() {
            Ok(Some(file)) => {
                stand_in::refuse(&shown, &file, "the external data of a model")?;
                Ok(file)
            }
            Ok(None) => Err(FormatError::unsupported(
                &self.model,
                format!("external data in `{location}`, a link or not a regular file,"),
                "put a copy of the file in its place; `hf download --local-dir` makes no links",
            )),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let model = self.model.file_name().unwrap_or_default().display();
                let needed_for = format!("`{model}` keeps weights in it");
                let hint = "download it, too, into the same folder and under this name";
                Err(FormatError::missing(shown, needed_for, hint))
            }
            Err(error) => Err(FormatError::io(&shown, "open the external data", error)),
        }
    }
}

/// A relative path of plain names, `None` for any other, on any system.
///
/// No name has a `*`: in memory ONNX Runtime writes `*/_ORT_MEM_ADDR_/*` for values at an address.
fn plain_path(location: &str) -> Option<PathBuf> {
    if location.contains(['\\', ':', '*', '\0']) {
        return None;
    }
    let mut path = PathBuf::new();
    for component in Path::new(location).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::CurDir => {}
            Component::Prefix(_) | Component::RootDir | Component::ParentDir => return None,
        }
    }
    (!path.as_os_str().is_empty()).then_some(path)
}

/// What is known of the regular file at `path` (absolute, its folder without links), `None` if it
/// is something else or if a link leads to it.
fn regular_file_without_links(path: &Path) -> io::Result<Option<Metadata>> {
    if path.canonicalize()? != path {
        return Ok(None);
    }
    let metadata = path.symlink_metadata()?;
    Ok((metadata.is_file() && has_one_name(&metadata)).then_some(metadata))
}

#[cfg(unix)]
fn has_one_name(metadata: &Metadata) -> bool {
    std::os::unix::fs::MetadataExt::nlink(metadata) == 1
}

#[cfg(unix)]
fn is_same_file(a: &Metadata, b: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// The standard library does not tell on other systems.
#[cfg(not(unix))]
fn has_one_name(_: &Metadata) -> bool {
    true
}

#[cfg(not(unix))]
fn is_same_file(_: &Metadata, _: &Metadata) -> bool {
    true
}
