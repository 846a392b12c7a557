//! What a conversion has finished so far, in a folder beside its output: so that one that ended
//! early goes on where it was.
//!
//! Each finished step is a [`Record`] in a file of its own, which is there whole or not at all. The
//! conversion itself knows nothing of steps: it runs from its beginning, and takes from here what
//! was worked out before. What decides the bytes of the result is written beside the records, and
//! with anything else they are refused.

use std::{
    cell::OnceCell,
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytemuck::Pod;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use slim_formats::{
    AtomicFile, FormatError, OutputPath,
    gguf::{Metadata, Value},
    remove_leftovers,
};
use xxhash_rust::xxh3::Xxh3Default;

use crate::{ConvertError, Result};

/// What decides the bytes of the result.
const IDENTITY: &str = "conversion.json";

/// The record's entry that has the hash of all others.
const HASH: &str = "xxh3";

/// What becomes of a folder that an earlier conversion has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// There may be none.
    New,
    /// It is removed.
    Anew,
    /// The conversion goes on with what is in it.
    Resume,
}

/// The folder of a conversion, called as its output with `.work` behind. It is made with the first
/// record, and removed when all is done.
pub struct WorkFolder {
    path: PathBuf,
    /// Of the folder, since it is there: no two conversions write the same output.
    lock: OnceCell<File>,
    /// As text, since [`Self::identify`].
    identity: OnceCell<BTreeMap<String, String>>,
    stop: Arc<AtomicBool>,
}

impl WorkFolder {
    /// That of the conversion to `output`. Once `stop` is set, the next step that is finished is
    /// the last one.
    ///
    /// # Errors
    /// `WorkFolder` if an earlier conversion has left one and `begin` does not say what becomes of
    /// it, if another conversion works in it, or if it is something else; `Format` if it cannot be
    /// read or removed.
    pub fn beside(output: &Path, begin: Begin, stop: Arc<AtomicBool>) -> Result<Self> {
        let mut path = output.as_os_str().to_owned();
        path.push(".work");
        let path = PathBuf::from(path);
        let mut folder = Self { path, lock: OnceCell::new(), identity: OnceCell::new(), stop };
        let path = &folder.path;
        let Ok(found) = path.symlink_metadata() else { return Ok(folder) };
        if !found.is_dir() || !is_work(path) {
            return Err(folder.refused("something that is no conversion's", "a name that is free"));
        }
        folder.lock()?;
        remove_leftovers(path);
        match begin {
            Begin::Resume => {}
            Begin::Anew => {
                remove(path).map_err(|error| FormatError::io(path, "remove the folder", error))?;
                folder.lock = OnceCell::new();
            }
            Begin::New if !has_records(path) => {}
            Begin::New => {
                let found = "what an unfinished conversion has left";
                return Err(
                    folder.refused(found, "`--resume` to go on, or `--force` to begin anew")
                );
            }
        }
        Ok(folder)
    }

    /// Where it is, or will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tells what decides the bytes of the result, of which `metadata` has all; before anything is
    /// read or written.
    ///
    /// # Errors
    /// `WorkFolder` if what is there belongs to another result; `Format` if it cannot be read.
    pub fn identify(&self, metadata: &Metadata) -> Result<()> {
        let ours = metadata.iter().filter(|(key, _)| key.starts_with("slim."));
        let ours: BTreeMap<String, String> =
            ours.map(|(key, value)| (key.to_owned(), as_text(value))).collect();
        if let Ok(text) = fs::read(self.path.join(IDENTITY)) {
            let theirs: BTreeMap<String, String> =
                serde_json::from_slice(&text).unwrap_or_default();
            let keys = theirs.keys().chain(ours.keys());
            let differs = |key: &&String| theirs.get(*key) != ours.get(*key);
            if let Some(key) = keys.into_iter().find(differs) {
                let shown = |of: &BTreeMap<String, String>| {
                    of.get(key).map_or("nothing".to_owned(), |value| format!("`{value}`"))
                };
                let found = format!("`{key}` is {} now", shown(&ours));
                let expected =
                    format!("{}, as it was begun, or `--force` to begin anew", shown(&theirs));
                return Err(self.refused(&found, &expected));
            }
        }
        self.identity.set(ours).expect("a conversion has one identity");
        Ok(())
    }

    /// What was recorded under a name; nothing if that is damaged.
    pub fn get(&self, name: &str) -> Option<Record> {
        Record::from_bytes(&fs::read(self.file(name)).ok()?)
    }

    /// Whether something was recorded under a name.
    pub fn has(&self, name: &str) -> bool {
        self.file(name).is_file()
    }

    /// Records a result; when this returns, it survives the end of the machine.
    ///
    /// # Errors
    /// `Format` if it cannot be written.
    pub fn put(&self, name: &str, record: &Record) -> Result<()> {
        self.create()?;
        self.write(&self.file(name), &record.to_bytes())
    }

    /// Makes the folder, if it is not there yet.
    ///
    /// # Errors
    /// `Format` if it cannot be made.
    pub fn create(&self) -> Result<()> {
        let identity = self.path.join(IDENTITY);
        if self.lock.get().is_some() && identity.exists() {
            return Ok(());
        }
        if let Err(error) = fs::create_dir(&self.path)
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(FormatError::io(&self.path, "create the folder", error).into());
        }
        if self.lock.get().is_none() {
            self.lock()?;
        }
        let text = serde_json::to_string_pretty(&self.identity.get()).expect("text is JSON");
        self.write(&identity, text.as_bytes())
    }

    /// Whether the caller wants the conversion to stop.
    pub fn is_to_stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Goes on to the next step.
    ///
    /// # Errors
    /// `Interrupted` if the caller wants it to stop.
    pub fn go_on(&self) -> Result<()> {
        match self.is_to_stop() {
            true => Err(ConvertError::Interrupted),
            false => Ok(()),
        }
    }

    /// Removes it with all that is in it, once the result is in its place.
    pub(crate) fn remove(&self) {
        // What stays is told by the next conversion.
        let _ = remove(&self.path);
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.safetensors"))
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let mut file = AtomicFile::create(OutputPath { path, replaces: true })?;
        file.write_all(bytes).map_err(|error| FormatError::io(path, "write the file", error))?;
        Ok(file.commit()?)
    }

    fn lock(&self) -> Result<()> {
        let open = |error| FormatError::io(&self.path, "open the folder", error);
        let lock = File::open(&self.path).map_err(open)?;
        // Where there are no locks, the user sees to it.
        if let Err(fs::TryLockError::WouldBlock) = lock.try_lock() {
            return Err(self.refused("another conversion at work in it", "one at a time"));
        }
        self.lock.set(lock).expect("it is locked once");
        Ok(())
    }

    fn refused(&self, found: &str, expected: &str) -> ConvertError {
        ConvertError::WorkFolder {
            path: self.path.clone(),
            found: found.to_owned(),
            expected: expected.to_owned(),
        }
    }
}

/// One that has failed before anything was recorded leaves nothing.
impl Drop for WorkFolder {
    fn drop(&mut self) {
        if self.lock.get().is_some() && !has_records(&self.path) {
            let _ = remove(&self.path);
        }
    }
}

/// Removes the folder of a conversion. Last goes what says that it is one, so that what is left of
/// it at any moment can be removed, too.
fn remove(folder: &Path) -> std::io::Result<()> {
    let identity = folder.join(IDENTITY);
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path != identity {
            fs::remove_file(path)?;
        }
    }
    // It may not be there yet.
    let _ = fs::remove_file(identity);
    fs::remove_dir(folder)
}

/// Whether the work folder of a conversion, at [`WorkFolder::path`], has something to go on with.
pub fn has_records(folder: &Path) -> bool {
    finished(folder).any(|name| name != IDENTITY)
}

/// Whether a folder is a conversion's: it says what it is of, or has nothing in it yet.
fn is_work(folder: &Path) -> bool {
    folder.join(IDENTITY).is_file() || finished(folder).next().is_none()
}

/// What is in a folder, but for temporary files.
fn finished(folder: &Path) -> impl Iterator<Item = OsString> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name());
    names.filter(|name| !name.to_string_lossy().starts_with(".slimllm-"))
}

/// What a value of the metadata says.
fn as_text(value: &Value) -> String {
    format!("{value:?}")
}

/// Numbers by name.
#[derive(Debug, Default, PartialEq)]
pub struct Record(BTreeMap<String, Vec<u8>>);

impl Record {
    /// Adds numbers.
    pub fn put<T: Pod>(&mut self, name: impl Into<String>, values: &[T]) {
        self.0.insert(name.into(), bytemuck::cast_slice(values).to_vec());
    }

    /// As [`Self::put`].
    #[must_use]
    pub fn with<T: Pod>(mut self, name: impl Into<String>, values: &[T]) -> Self {
        self.put(name, values);
        self
    }

    /// The numbers of a name, if they are there and of that type.
    pub fn get<T: Pod>(&self, name: &str) -> Option<Vec<T>> {
        let bytes = self.0.get(name)?;
        let numbers = bytes.chunks_exact(size_of::<T>());
        numbers.remainder().is_empty().then(|| numbers.map(bytemuck::pod_read_unaligned).collect())
    }

    /// The names that begin with `prefix`, without it.
    pub fn names<'r>(&'r self, prefix: &'r str) -> impl Iterator<Item = &'r str> {
        self.0.keys().filter_map(move |name| name.strip_prefix(prefix))
    }

    fn hash(&self) -> [u8; 8] {
        let mut hasher = Xxh3Default::new();
        for (name, bytes) in &self.0 {
            hasher.update(name.as_bytes());
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        }
        hasher.digest().to_le_bytes()
    }

    fn to_bytes(&self) -> Vec<u8> {
        let hash = self.hash();
        let view = |bytes| TensorView::new(Dtype::U8, vec![<[u8]>::len(bytes)], bytes);
        let all = self.0.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()));
        let all = all.chain([(HASH, &hash[..])]);
        let views = all.map(|(name, bytes)| (name, view(bytes).expect("a byte is a U8")));
        safetensors::serialize(views, None).expect("names are unique")
    }

    /// `None` for anything but what [`Self::to_bytes`] gives.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let tensors = SafeTensors::deserialize(bytes).ok()?;
        let named = tensors.iter().map(|(name, tensor)| (name.to_owned(), tensor.data().to_vec()));
        let mut record = Self(named.collect());
        let hash = record.0.remove(HASH)?;
        (hash == record.hash()).then_some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beside(output: &Path, begin: Begin) -> Result<WorkFolder> {
        WorkFolder::beside(output, begin, Arc::default())
    }

    fn metadata(seed: u32) -> Metadata {
        let mut metadata = Metadata::new();
        metadata.insert("slim.quantization.seed", seed).unwrap();
        metadata.insert("general.name", "not part of it").unwrap();
        metadata
    }

    #[test]
    fn records_outlive_their_folder_and_damaged_ones_count_for_none() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out.gguf");
        let record = Record::default().with("a", &[1.5f32, -2.0]).with("b", &[7u64]);
        {
            let work = beside(&output, Begin::New).unwrap();
            work.identify(&metadata(0)).unwrap();
            assert!(!work.path().exists());
            work.put("step", &record).unwrap();
        }
        assert!(matches!(beside(&output, Begin::New), Err(ConvertError::WorkFolder { .. })));
        let work = beside(&output, Begin::Resume).unwrap();
        // Nobody else may work in it meanwhile.
        assert!(matches!(beside(&output, Begin::Resume), Err(ConvertError::WorkFolder { .. })));
        assert!(work.identify(&metadata(1)).unwrap_err().to_string().contains("seed"));
        work.identify(&metadata(0)).unwrap();
        let found = work.get("step").unwrap();
        assert_eq!(found, record);
        assert_eq!(
            (found.get::<f32>("a").unwrap(), found.get::<u64>("b").unwrap()),
            (vec![1.5, -2.0], vec![7])
        );
        let path = work.file("step");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(work.get("step"), None);
        drop(work);

        let work = beside(&output, Begin::Anew).unwrap();
        assert!(!work.path().exists());
        work.identify(&metadata(1)).unwrap();
        work.create().unwrap();
        assert!(work.path().exists());
        // Nothing was recorded.
        drop(work);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn folder_of_someone_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out.gguf");
        fs::create_dir(dir.path().join("out.gguf.work")).unwrap();
        fs::write(dir.path().join("out.gguf.work/diary"), "").unwrap();
        for begin in [Begin::New, Begin::Anew, Begin::Resume] {
            assert!(matches!(beside(&output, begin), Err(ConvertError::WorkFolder { .. })));
        }
        assert!(dir.path().join("out.gguf.work/diary").exists());
    }
}
