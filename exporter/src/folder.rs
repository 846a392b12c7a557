//! A Hugging Face folder: configuration, tokenizer, and safetensors files that are written tensor
//! by tensor.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use slim_formats::{
    FormatError, ModelSource, OutputPath, TemporaryFolder, TokenizerSource, reserve,
};
use slim_runtime::Tokenizer;

use crate::Result;

/// Bytes of tensors in one file, as the hub has them at most.
const SHARD_BYTES: u64 = 5_000_000_000;

/// A folder that takes its name only when [`finish`](Self::finish) is called; before, it is a
/// temporary one beside it.
pub struct Folder {
    target: PathBuf,
    temporary: TemporaryFolder,
}

/// A file of the folder, with room that is reserved for it.
pub struct NewFile {
    /// In the folder by its last name.
    path: PathBuf,
    out: BufWriter<File>,
    bytes: u64,
}

/// A tensor to be written.
pub struct PlannedTensor {
    /// Hugging Face's name.
    pub name: String,
    /// Element type.
    pub dtype: Element,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

/// Element types that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    F16,
    I32,
}

impl Folder {
    /// Starts a folder that will be called as `output` says.
    ///
    /// # Errors
    /// `Exists`, or `Io` if no folder can be created beside it.
    pub fn create(output: OutputPath<'_>) -> Result<Self> {
        let OutputPath { path, replaces } = output;
        let is_empty = || path.read_dir().is_ok_and(|mut entries| entries.next().is_none());
        match path.symlink_metadata() {
            Ok(found) if !(replaces && found.is_dir() && is_empty()) => {
                Err(FormatError::Exists { path: path.to_owned() }.into())
            }
            _ => Ok(Self { target: path.to_owned(), temporary: TemporaryFolder::beside(path)? }),
        }
    }

    /// Writes the configuration, with `more` keys, and the tokenizer.
    pub fn describe(&self, model: &dyn ModelSource, more: Value) -> Result<()> {
        let (mut config, generation_config) = model.config().to_hugging_face(model.path())?;
        config["torch_dtype"] = "float16".into();
        let more = more.as_object().cloned().unwrap_or_default();
        config.as_object_mut().expect("it was made as one").extend(more);
        self.json("config.json", &config)?;
        self.json("generation_config.json", &generation_config)?;
        let tokenizer = match model.tokenizer() {
            TokenizerSource::Missing => return Ok(()),
            source => Tokenizer::new(source)?,
        };
        let text = match model.tokenizer() {
            TokenizerSource::HuggingFace(json) => json.clone(),
            _ => tokenizer.to_json()?,
        };
        self.file("tokenizer.json", text.as_bytes())?;
        self.json("tokenizer_config.json", &tokenizer_config(model, &tokenizer))
    }

    /// Writes the tensors, whose bytes `encoded` gives one after the other.
    pub fn tensors(
        &self,
        tensors: &[PlannedTensor],
        encoded: impl IntoIterator<Item = Result<Vec<u8>>>,
    ) -> Result<()> {
        self.shards(tensors, SHARD_BYTES, &mut encoded.into_iter())
    }

    /// Brings the files to the disk, gives the folder its name and tells how many bytes its files
    /// have.
    pub fn finish(self) -> Result<u64> {
        let Self { target, temporary } = self;
        let sync = || -> std::io::Result<u64> {
            let mut bytes = 0;
            for entry in std::fs::read_dir(temporary.path())? {
                let file = File::open(entry?.path())?;
                file.sync_all()?;
                bytes += file.metadata()?.len();
            }
            Ok(bytes)
        };
        let bytes = sync().map_err(|error| FormatError::io(&target, "write the folder", error))?;
        temporary.rename(&target)?;
        Ok(bytes)
    }

    /// Starts a file of at most `bytes` bytes.
    pub fn new_file(&self, name: &str, bytes: u64) -> Result<NewFile> {
        NewFile::create(self.temporary.path(), &self.target, name, bytes)
    }

    fn shards(
        &self,
        tensors: &[PlannedTensor],
        shard_bytes: u64,
        encoded: &mut dyn Iterator<Item = Result<Vec<u8>>>,
    ) -> Result<()> {
        let shards = split(tensors, shard_bytes);
        let name_of = |index: usize| match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        // Room for all of them, before the first is written.
        let files: Vec<NewFile> = shards
            .iter()
            .enumerate()
            .map(|(index, shard)| self.new_file(&name_of(index), shard_bytes_of(shard)))
            .collect::<Result<_>>()?;
        let mut weight_map = Map::new();
        for (index, (shard, file)) in shards.iter().zip(files).enumerate() {
            let name = name_of(index);
            weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(name))));
            write_shard(file, shard, encoded)?;
        }
        if shards.len() > 1 {
            let total: u64 = tensors.iter().map(PlannedTensor::bytes).sum();
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            self.json("model.safetensors.index.json", &index)?;
        }
        Ok(())
    }

    /// Writes a JSON file.
    pub fn json(&self, name: &str, value: &Value) -> Result<()> {
        self.file(name, format!("{value:#}\n").as_bytes())
    }

    /// Writes a small file.
    pub fn file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = self.new_file(name, bytes.len() as u64)?;
        file.append(bytes)?;
        file.finish()
    }
}

impl NewFile {
    /// Starts the file `name` in `folder`, which will be called `target`.
    pub fn create(folder: &Path, target: &Path, name: &str, bytes: u64) -> Result<Self> {
        let path = target.join(name);
        let file = File::create_new(folder.join(name))
            .map_err(|error| FormatError::io(&path, "create the file", error))?;
        reserve(&file, folder, bytes, &path, "the file takes")?;
        Ok(Self { path, out: BufWriter::with_capacity(1 << 20, file), bytes: 0 })
    }

    /// Writes `bytes` behind those that it has.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        let written = self.out.write_all(bytes);
        Ok(written.map_err(|error| FormatError::io(&self.path, "write the file", error))?)
    }

    /// How many bytes it has.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes what is left, and gives back what was reserved and not needed.
    pub fn finish(mut self) -> Result<()> {
        let finished = self.out.flush().and_then(|()| self.out.get_ref().set_len(self.bytes));
        Ok(finished.map_err(|error| FormatError::io(&self.path, "write the file", error))?)
    }
}

/// Writes one safetensors file: the length of the header, the header, the tensors.
fn write_shard(
    mut file: NewFile,
    tensors: &[PlannedTensor],
    encoded: &mut dyn Iterator<Item = Result<Vec<u8>>>,
) -> Result<()> {
    let header = header(tensors);
    file.append(&(header.len() as u64).to_le_bytes())?;
    file.append(header.as_bytes())?;
    for tensor in tensors {
        let bytes = encoded.next().expect("as many as tensors")?;
        assert_eq!(bytes.len() as u64, tensor.bytes(), "bytes of `{}`", tensor.name);
        file.append(&bytes)?;
    }
    file.finish()
}

/// The size of a safetensors file.
fn shard_bytes_of(tensors: &[PlannedTensor]) -> u64 {
    let tensor_bytes: u64 = tensors.iter().map(PlannedTensor::bytes).sum();
    8 + header(tensors).len() as u64 + tensor_bytes
}

impl PlannedTensor {
    fn bytes(&self) -> u64 {
        let size = match self.dtype {
            Element::F16 => 2,
            Element::I32 => 4,
        };
        size * self.shape.iter().map(|&dimension| dimension as u64).product::<u64>()
    }
}

/// Cuts the tensors into runs of at most `limit` bytes; a larger tensor is alone.
fn split(tensors: &[PlannedTensor], limit: u64) -> Vec<&[PlannedTensor]> {
    let mut bytes = 0;
    tensors
        .chunk_by(|before, tensor| {
            bytes = if bytes == 0 { before.bytes() } else { bytes } + tensor.bytes();
            let fits = bytes <= limit;
            if !fits {
                bytes = 0;
            }
            fits
        })
        .collect()
}

/// The header of a file with these tensors, padded to 8 bytes.
fn header(tensors: &[PlannedTensor]) -> String {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes();
        let dtype = match tensor.dtype {
            Element::F16 => "F16",
            Element::I32 => "I32",
        };
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        entries.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut text = Value::Object(entries).to_string();
    let padding = text.len().next_multiple_of(8) - text.len();
    text.extend(std::iter::repeat_n(' ', padding));
    text
}

/// `tokenizer_config.json`.
fn tokenizer_config(model: &dyn ModelSource, tokenizer: &Tokenizer) -> Value {
    let config = model.config();
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id));
    let mut object = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text(config.bos_token_id),
        "eos_token": text(config.eos_token_ids.first().copied()),
        "model_max_length": config.context_length,
        "clean_up_tokenization_spaces": false,
    });
    if config.add_bos {
        object["add_bos_token"] = true.into();
    }
    if let Some(template) = model.chat_template() {
        object["chat_template"] = template.into();
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(count: usize) -> Vec<PlannedTensor> {
        let plan = |index: usize| PlannedTensor {
            name: format!("t{index}"),
            dtype: Element::F16,
            shape: vec![index + 1, 4],
        };
        (0..count).map(plan).collect()
    }

    #[test]
    fn tensors_above_the_limit_go_to_shards_that_an_index_names() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("out");
        let folder = Folder::create((&target).into()).unwrap();
        let mut encoded = [8, 16, 24, 32].into_iter().map(|bytes| Ok(vec![7; bytes]));
        folder.shards(&planned(4), 24, &mut encoded).unwrap();
        let bytes = folder.finish().unwrap();

        let mut sizes = 0;
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&target).unwrap() {
            let entry = entry.unwrap();
            sizes += entry.metadata().unwrap().len();
            names.push(entry.file_name().into_string().unwrap());
        }
        assert_eq!(sizes, bytes);
        names.sort();
        let shard = |index| format!("model-0000{index}-of-00003.safetensors");
        assert_eq!(names, [shard(1), shard(2), shard(3), "model.safetensors.index.json".into()]);
        let index = std::fs::read_to_string(target.join("model.safetensors.index.json")).unwrap();
        let index: Value = serde_json::from_str(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], 80);
        for (tensor, file) in [("t0", 1), ("t1", 1), ("t2", 2), ("t3", 3)] {
            assert_eq!(index["weight_map"][tensor], shard(file));
            let bytes = std::fs::read(target.join(shard(file))).unwrap();
            let read = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
            assert!(read.tensor(tensor).unwrap().data().iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn folder_that_fails_or_exists_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("out");
        let folder = Folder::create((&target).into()).unwrap();
        folder.file("config.json", b"{}").unwrap();
        drop(folder);
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);

        std::fs::create_dir(&target).unwrap();
        let exists = |created: Result<Folder>| {
            matches!(created, Err(crate::ExportError::Format(FormatError::Exists { .. })))
        };
        let may_replace = OutputPath { path: &target, replaces: true };
        assert!(exists(Folder::create((&target).into())));
        Folder::create(may_replace).unwrap().finish().unwrap();
        std::fs::write(target.join("precious"), "kept").unwrap();
        assert!(exists(Folder::create(may_replace)));
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1);
        assert!(target.join("precious").exists());
    }
}
