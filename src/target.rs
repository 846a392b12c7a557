//! Outputs, checked before any work is done for them.

use std::{
    fs::{FileType, Metadata},
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Error, Result, ensure};
use slim_formats::{AtomicFile, OutputPath, TemporaryFolder};

use crate::{failure::advised, interrupt::clear_leftovers, output::note};

/// What a command writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file whose name ends with this extension, if it has any.
    File(&'static str),
    /// A folder.
    Folder,
}

/// Where the output of a command goes.
#[derive(clap::Args)]
pub struct TargetArgs {
    /// The output: NAME.slim.gguf of `convert`, NAME.safetensors of `logits`, of `export` a .gguf
    /// file or a new folder
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,

    /// Replace the file if it exists
    #[arg(long)]
    pub force: bool,
}

impl TargetArgs {
    /// Checks that the output can be written and is none of `inputs`, and removes what killed
    /// commands have left beside it.
    pub fn prepare(&self, kind: Kind, inputs: &[PathBuf]) -> Result<OutputPath<'_>> {
        self.check(kind, inputs)?;
        let output = OutputPath { path: self.path(), replaces: self.force };
        let parent = parent_of(output.path);
        clear_leftovers(parent);
        let created = match kind {
            Kind::File(_) => output.check_file(),
            Kind::Folder => TemporaryFolder::beside(output.path).map(drop),
        };
        created.with_context(|| format!("`{}`: it cannot be written to", parent.display()))?;
        Ok(output)
    }

    /// Writes a file whole, or none.
    pub fn write(&self, kind: Kind, inputs: &[PathBuf], bytes: &[u8]) -> Result<()> {
        let output = self.prepare(kind, inputs)?;
        let mut out = AtomicFile::create(output)?;
        out.write_all(bytes)
            .with_context(|| format!("`{}`: cannot write", output.path.display()))?;
        Ok(out.commit()?)
    }

    /// Checks what can be seen without writing anything.
    pub fn check(&self, kind: Kind, inputs: &[PathBuf]) -> Result<()> {
        let (path, shown) = (self.path(), self.output.display());
        check_name(&self.output, kind)?;
        check_parent(path)?;
        let found = match path.symlink_metadata() {
            Ok(found) => found,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return check_extension(path, kind);
            }
            Err(error) => return Err(Error::new(error).context(format!("`{shown}`"))),
        };
        match kind {
            Kind::File(_) => self.check_file(&found, inputs)?,
            Kind::Folder => self.check_folder(&found)?,
        }
        check_extension(path, kind)
    }

    /// Without a slash at the end, which would lead through a symbolic link.
    fn path(&self) -> &Path {
        self.output.components().as_path()
    }

    /// Checks that a file may take the place of what was found.
    fn check_file(&self, found: &Metadata, inputs: &[PathBuf]) -> Result<()> {
        let (path, shown) = (self.path(), self.output.display());
        ensure!(!found.is_dir(), "`{shown}` is a folder; `-o` takes the name of a file");
        if !found.is_file() {
            let message = format!("`{shown}` is {}", kind_of(found.file_type(), path));
            return Err(advised(message, "only a regular file is replaced; give another name"));
        }
        let is_input = inputs.iter().any(|input| is_same_file(input, path));
        ensure!(!is_input, "`{shown}` is a file of the source, which would be overwritten");
        if !self.force {
            let message = format!("`{shown}` exists already");
            return Err(advised(message, "give another name, or replace it with `--force`"));
        }
        if !may_be_written(path, found) {
            let message = format!("`{shown}` is write-protected, and `--force` does not lift that");
            return Err(advised(message, "give another name, or change its permissions first"));
        }
        Ok(())
    }

    /// Checks that a folder may take the place of what was found.
    fn check_folder(&self, found: &Metadata) -> Result<()> {
        let (path, shown) = (self.path(), self.output.display());
        let hint = "give a name that is free, or remove it";
        if !self.force {
            return Err(advised(format!("`{shown}` exists already"), hint));
        }
        if !found.is_dir() {
            let what = match found.is_file() {
                true => "a file".to_owned(),
                false => kind_of(found.file_type(), path),
            };
            let message = format!("`{shown}` is {what}, of which `--force` makes no folder");
            return Err(advised(message, hint));
        }
        if path.read_dir().map_or(true, |mut entries| entries.next().is_some()) {
            let message = format!("`{shown}` is a folder that is not empty");
            return Err(advised(message, "`--force` does not remove folders; do it yourself"));
        }
        if is_mount_point(path) {
            let message = format!("`{shown}` is a mount point, which nothing can replace");
            return Err(advised(message, format!("write to a folder in it: `{shown}/NAME`")));
        }
        Ok(())
    }
}

/// Checks that a path is a name.
fn check_name(path: &Path, kind: Kind) -> Result<()> {
    let shown = path.display();
    if path.as_os_str() == "-" {
        let message = "`-`: the output is not written from its beginning to its end, as stdout is";
        return Err(advised(message, "give the name of a file; `./-` is one"));
    }
    if path.is_dir() {
        return Ok(());
    }
    ensure!(path.file_name().is_some(), "`{shown}` ends with `..`, which is no name of an output");
    if let Kind::File(extension) = kind
        && path.as_os_str().as_encoded_bytes().ends_with(b"/")
    {
        let message = format!("`{shown}` is the name of a folder, which does not exist");
        let hint = format!("`-o` takes the name of a file, such as `{shown}NAME.{extension}`");
        return Err(advised(message, hint));
    }
    Ok(())
}

/// Checks that a name does not end as those of other kinds of files do.
fn check_extension(path: &Path, kind: Kind) -> Result<()> {
    let shown = path.display();
    let Some(found) = path.extension().and_then(|extension| extension.to_str()) else {
        return Ok(());
    };
    // A name may end with a version, `model-3.2`.
    let is_one = found.starts_with(|c: char| c.is_ascii_alphabetic());
    match kind {
        Kind::File(expected) if is_one && !found.eq_ignore_ascii_case(expected) => {
            let message = format!(
                "`{shown}`: found a name that ends with `.{found}`, expected `.{expected}`"
            );
            let name = path.with_extension(expected);
            Err(advised(message, format!("call it `{}`", name.display())))
        }
        Kind::Folder if ["gguf", "onnx", "safetensors"].contains(&found) => {
            note(format_args!("warning: `{shown}` becomes a folder, in spite of its name"));
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Checks that the folder is there in which `path` is to be written.
fn check_parent(path: &Path) -> Result<()> {
    let folder = parent_of(path);
    let (shown, folder_shown) = (path.display(), folder.display());
    ensure!(
        folder.is_dir() || !folder.exists(),
        "`{shown}`: `{folder_shown}` is a file, no folder"
    );
    if !folder.is_dir() {
        return Err(advised(
            format!("`{shown}`: there is no folder `{folder_shown}`"),
            format!("create it with `mkdir -p {folder_shown}`"),
        ));
    }
    Ok(())
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Whether two names are of one file, by whatever links. Neither is opened: a pipe would wait.
fn is_same_file(one: &Path, other: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let identity = |path: &Path| path.metadata().ok().map(|found| (found.dev(), found.ino()));
        identity(one).is_some_and(|one| identity(other) == Some(one))
    }
    #[cfg(not(unix))]
    {
        one.canonicalize().is_ok_and(|one| other.canonicalize().is_ok_and(|other| one == other))
    }
}

/// What something is that is neither a file nor a folder.
fn kind_of(found: FileType, path: &Path) -> String {
    if found.is_symlink() {
        let target = std::fs::read_link(path).unwrap_or_default();
        return format!("a symbolic link to `{}`, which is not followed", target.display());
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let kinds = [
            (found.is_fifo(), "a pipe"),
            (found.is_socket(), "a socket"),
            (found.is_char_device() || found.is_block_device(), "a device"),
        ];
        if let Some((_, kind)) = kinds.into_iter().find(|(is_it, _)| *is_it) {
            return kind.to_owned();
        }
    }
    "no regular file".to_owned()
}

/// Whether the user, who may be root, is meant to write to a file.
fn may_be_written(path: &Path, found: &Metadata) -> bool {
    #[cfg(unix)]
    let is_writable = {
        use rustix::fs::{Access, AtFlags, CWD, accessat};
        accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS).is_ok()
    };
    #[cfg(not(unix))]
    let is_writable = path.exists();
    is_writable && !found.permissions().readonly()
}

/// Whether another file system, or a folder of one, lies over a folder.
fn is_mount_point(path: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
        let found = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty());
        found.is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = path;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_say_something_else_are_refused() {
        let gguf = Kind::File("gguf");
        let check = |name: &str, kind| {
            check_name(Path::new(name), kind).and_then(|()| check_extension(Path::new(name), kind))
        };
        for (name, kind) in [
            ("-", gguf),
            ("-", Kind::Folder),
            ("absent/..", gguf),
            ("absent/..", Kind::Folder),
            ("absent/", gguf),
            ("a.safetensors", gguf),
            ("a.slim", gguf),
            ("a.gguf", Kind::File("safetensors")),
        ] {
            assert!(check(name, kind).is_err(), "`{name}`");
        }
        for (name, kind) in [
            ("a.slim.gguf", gguf),
            ("a.GGUF", gguf),
            ("a", gguf),
            ("Llama-3.2-1B", gguf),
            ("a", Kind::Folder),
            ("a/", Kind::Folder),
            ("Llama-3.2.Instruct", Kind::Folder),
        ] {
            assert!(check(name, kind).is_ok(), "`{name}`");
        }
    }
}
