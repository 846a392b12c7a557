//! What a path leads to: the weights of a Hugging Face folder, and what lies there instead of them.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use crate::{FormatError, Limits, Result, json, limits::read_text};

const SINGLE: &str = "model.safetensors";
/// The file that says which tensor is in which file.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Entries of a folder that are looked at, and names that a message lists.
const MAX_ENTRIES: usize = 4096;
const SHOWN_NAMES: usize = 6;

/// Where the weights of a folder are.
pub(crate) enum Weights {
    /// In one file.
    Single(PathBuf),
    /// In the files that this index names.
    Index(PathBuf),
}

/// The snapshot of `refs/main` if `path` is the root of a model in a hub's cache, else `None`.
///
/// # Errors
/// `Unsupported` if the cache does not tell which snapshot is meant.
pub(crate) fn snapshot(path: &Path) -> Result<Option<PathBuf>> {
    let snapshots = path.join("snapshots");
    if !snapshots.is_dir() || path.join("config.json").exists() {
        return Ok(None);
    }
    let limits = Limits { string_bytes: 256, ..Limits::default() };
    let commit = read_text(&path.join("refs").join("main"), &limits)?.unwrap_or_default();
    let commit = commit.trim();
    let is_name = !commit.is_empty() && commit.chars().all(|c| c.is_ascii_alphanumeric());
    let snapshot = snapshots.join(commit);
    if is_name && snapshot.is_dir() {
        return Ok(Some(snapshot));
    }
    let names = Entries::of(&snapshots).folders;
    let hint = match names.is_empty() {
        true => "download the model again".to_owned(),
        false => format!("give one of the folders in `{}`: {}", snapshots.display(), list(&names)),
    };
    let what = "a hub's cache whose `refs/main` names no snapshot";
    Err(FormatError::unsupported(path, what, hint))
}

/// Which commit of which model of a hub a folder is.
pub struct HubCommit {
    /// `ORG/NAME`.
    pub repository: String,
    /// As Git spells it.
    pub commit: String,
}

impl HubCommit {
    /// That of a model which lies in a hub's cache, `models--ORG--NAME/snapshots/COMMIT`.
    pub fn of(path: &Path) -> Option<Self> {
        // Its files are links out of the snapshot: the folder counts.
        let folder = if path.is_dir() { path } else { path.parent()? };
        let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let folder = here.canonicalize().ok()?;
        let is_snapshot =
            |folder: &&Path| folder.parent().is_some_and(|p| p.ends_with("snapshots"));
        let snapshot = folder.ancestors().find(is_snapshot)?;
        let commit = snapshot.file_name()?.to_str()?.to_owned();
        let root = snapshot.ancestors().nth(2)?.file_name()?.to_str()?;
        let repository = root.strip_prefix("models--")?.replacen("--", "/", 1);
        let is_commit = commit.len() == 40 && commit.bytes().all(|b| b.is_ascii_hexdigit());
        is_commit.then_some(Self { repository, commit })
    }
}

/// The weights in a folder.
///
/// # Errors
/// `OtherKind`, `Unsupported` or `Missing`, by what lies there instead.
pub(crate) fn weights_in(root: &Path) -> Result<Weights> {
    let (single, index) = (root.join(SINGLE), root.join(INDEX));
    if single.exists() {
        return Ok(Weights::Single(single));
    }
    if index.exists() {
        return Ok(Weights::Index(index));
    }
    let entries = Entries::of(root);
    let of = |extensions: &[&str]| entries.with_extension(extensions);
    let other = |found: String, hint: String| {
        Err(FormatError::other_kind(root, found, "a folder with a model", hint))
    };
    if entries.has("adapter_config.json") {
        return Err(adapter(root));
    }
    let safetensors = of(&["safetensors"]);
    if let Some(part) = safetensors.iter().find_map(|name| NumberedFile::of(name)) {
        return Err(FormatError::missing(
            index,
            format!("it says which tensor is in which of the {} parts", part.count),
            format!("download it{}", part.missing_sentence(root)),
        ));
    }
    if !safetensors.is_empty() {
        let hint = format!("give the file instead: {}", list(&safetensors));
        return Err(FormatError::missing(single, "it holds the weights of a folder", hint));
    }
    let gguf = of(&["gguf"]);
    if !gguf.is_empty() {
        let hint = format!("give one of them instead: {}", list(&gguf));
        return other(format!("a folder with {}", files(&gguf, "GGUF file")), hint);
    }
    let mut onnx = of(&["onnx"]);
    let below = Entries::of(&root.join("onnx")).with_extension(&["onnx"]);
    onnx.extend(below.iter().map(|name| format!("onnx/{name}")));
    if !onnx.is_empty() {
        let hint = format!("give the `.onnx` file instead: {}", list(&onnx));
        return other(format!("a folder with {}", files(&onnx, "ONNX file")), hint);
    }
    let pickles = of(&["bin", "pt", "pth", "ckpt"]);
    if !pickles.is_empty() {
        let what = format!("a model stored as PyTorch pickles ({})", list(&pickles));
        let hint = "load it with transformers and save it with `save_pretrained`, which writes \
                    safetensors";
        return Err(FormatError::unsupported(root, what, hint));
    }
    let weights = of(&["h5", "msgpack"]);
    if !weights.is_empty() {
        let what = format!("a model stored for TensorFlow or Flax ({})", list(&weights));
        let hint = "load it with transformers and save it with `save_pretrained`, which writes \
                    safetensors";
        return Err(FormatError::unsupported(root, what, hint));
    }
    if entries.has("config.json") {
        let needed_for =
            format!("it, or `{INDEX}` with the files that it names, holds the weights");
        return Err(FormatError::missing(single, needed_for, "download the weights, too"));
    }
    let is_model = |name: &&String| {
        let folder = root.join(name);
        folder.join("config.json").exists() || folder.join("snapshots").is_dir()
    };
    let models: Vec<String> = entries.folders.iter().filter(is_model).cloned().collect();
    match (entries.files.is_empty() && entries.folders.is_empty(), models.is_empty()) {
        (true, _) => other("an empty folder".to_owned(), "download the model into it".to_owned()),
        (_, false) => {
            other("a folder of models".to_owned(), format!("give one of them: {}", list(&models)))
        }
        _ => other(
            "a folder without `config.json` and weights".to_owned(),
            "give the folder that holds them".to_owned(),
        ),
    }
}

/// Refuses a safetensors file that is one part of several.
pub(crate) fn refuse_part(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let root = path.parent().unwrap_or(Path::new(""));
    if name.starts_with("adapter_model.") && root.join("adapter_config.json").exists() {
        return Err(adapter(root));
    }
    let Some(part) = NumberedFile::of(&name) else { return Ok(()) };
    let found = format!("part {} of {}", part.number, part.count);
    let missing = part.missing_sentence(root);
    let hint = match root.join(INDEX).exists() {
        true => format!("give the folder, whose `{INDEX}` names all parts{missing}"),
        false => format!("download `{INDEX}` and give the folder{missing}"),
    };
    Err(FormatError::other_kind(path, found, "a whole model", hint))
}

/// The error for an index that names files which are not there, if there are any.
pub(crate) fn missing_shards(folder: &Path, names: &BTreeSet<&str>) -> Option<FormatError> {
    let missing = names.iter().filter(|name| !folder.join(name).exists());
    let missing: Vec<String> = missing.map(|&name| name.to_owned()).collect();
    let first = missing.first()?;
    let needed_for = format!(
        "`{INDEX}` names {}, of which {} missing: {}",
        files(&names.iter().collect::<Vec<_>>(), "file"),
        if missing.len() == 1 { "1 is".to_owned() } else { format!("{} are", missing.len()) },
        list(&missing)
    );
    Some(FormatError::missing(folder.join(first), needed_for, "download what is missing"))
}

/// The error for a LoRA adapter.
fn adapter(root: &Path) -> FormatError {
    let text = read_text(&root.join("adapter_config.json"), &Limits::default());
    let config = text.ok().flatten().and_then(|text| json::parse(&text).ok()).unwrap_or_default();
    let base = config["base_model_name_or_path"].as_str();
    let of_base = base.map(|base| format!(" of `{base}`")).unwrap_or_default();
    let hint = "merge it into its base model with PEFT: `merge_and_unload()`, then \
                `save_pretrained(FOLDER)`, and give that folder";
    FormatError::other_kind(root, format!("a LoRA adapter{of_base}"), "a whole model", hint)
}

/// A file of several that are numbered: `NAME-00001-of-00003.EXTENSION`.
pub struct NumberedFile<'a> {
    stem: &'a str,
    extension: &'a str,
    /// From 1 to `count`.
    pub number: usize,
    /// How many there are.
    pub count: usize,
}

impl<'a> NumberedFile<'a> {
    /// By its name.
    pub fn of(name: &'a str) -> Option<Self> {
        let (name, extension) = name.rsplit_once('.')?;
        let (rest, count) = name.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let is_number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        if !is_number(number) || !is_number(count) {
            return None;
        }
        let (number, count): (usize, usize) = (number.parse().ok()?, count.parse().ok()?);
        let is_one = count > 1 && (1..=count).contains(&number);
        is_one.then_some(Self { stem, extension, number, count })
    }

    /// The first of `count` files.
    pub(crate) fn first(stem: &'a str, extension: &'a str, count: usize) -> Self {
        Self { stem, extension, number: 1, count }
    }

    /// What the names of all files begin with.
    pub fn stem(&self) -> &'a str {
        self.stem
    }

    /// The name of file `number`.
    pub fn name_of(&self, number: usize) -> String {
        let Self { stem, extension, count, .. } = self;
        format!("{stem}-{number:05}-of-{count:05}.{extension}")
    }

    /// The names that a folder lacks.
    pub(crate) fn missing_in(&self, folder: &Path) -> Vec<String> {
        let names = (1..=self.count).map(|number| self.name_of(number));
        names.filter(|name| !folder.join(name).exists()).collect()
    }

    /// Which files a folder lacks, as the end of a hint; nothing if it has them all.
    fn missing_sentence(&self, root: &Path) -> String {
        let missing = self.missing_in(root);
        match missing.is_empty() {
            true => String::new(),
            false => format!("; missing beside it: {}", list(&missing)),
        }
    }
}

/// The names in a folder, sorted.
#[derive(Default)]
struct Entries {
    files: BTreeSet<String>,
    folders: Vec<String>,
}

impl Entries {
    /// None of a folder that cannot be read.
    fn of(folder: &Path) -> Self {
        let mut found = Self::default();
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().take(MAX_ENTRIES);
        for entry in entries {
            let Ok(name) = entry.file_name().into_string() else { continue };
            match entry.path().is_dir() {
                true => found.folders.push(name),
                false => _ = found.files.insert(name),
            }
        }
        found.folders.sort();
        found
    }

    fn has(&self, name: &str) -> bool {
        self.files.contains(name)
    }

    fn with_extension(&self, extensions: &[&str]) -> Vec<String> {
        let has_extension = |name: &&String| {
            name.rsplit_once('.').is_some_and(|(_, found)| extensions.contains(&found))
        };
        self.files.iter().filter(has_extension).cloned().collect()
    }
}

/// A count with its noun.
fn files<T>(names: &[T], noun: &str) -> String {
    match names.len() {
        1 => format!("1 {noun}"),
        count => format!("{count} {noun}s"),
    }
}

/// The first names of a list, and how many there are besides.
pub(crate) fn list(names: &[String]) -> String {
    let shown = names.iter().take(SHOWN_NAMES).map(|name| format!("`{name}`"));
    let shown = shown.collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN_NAMES) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn parts_are_told_by_their_names() {
        let part = NumberedFile::of("model-00002-of-00003.safetensors").unwrap();
        assert_eq!((part.stem, part.number, part.count), ("model", 2, 3));
        for name in ["model.safetensors", "a-1-of-2.gguf", "model-00001-of-00001.gguf", "x"] {
            assert!(NumberedFile::of(name).is_none(), "{name}");
        }
    }

    #[test]
    fn snapshot_of_main_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        assert_eq!(snapshot(root).unwrap(), None);
        fs::create_dir_all(root.join("snapshots/abc123")).unwrap();
        fs::create_dir_all(root.join("refs")).unwrap();
        let error = snapshot(root).unwrap_err();
        assert!(error.hint().unwrap().ends_with("`abc123`"), "{error}");
        fs::write(root.join("refs/main"), "abc123\n").unwrap();
        assert_eq!(snapshot(root).unwrap(), Some(root.join("snapshots/abc123")));
        fs::write(root.join("refs/main"), "../abc123").unwrap();
        assert!(snapshot(root).is_err());
    }
}
