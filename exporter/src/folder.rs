//! A Hugging Face folder: configuration, tokenizer, and safetensors files that are written tensor
//! by tensor.

use std::{
    fs::{File, Permissions},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use slim_formats::{FormatError, ModelSource, TokenizerSource};
use slim_runtime::Tokenizer;
use tempfile::TempDir;

use crate::{ExportError, Result};

/// Bytes of tensors in one file, as the hub has them at most.
const SHARD_BYTES: u64 = 5_000_000_000;

/// A folder that takes its name only when [`finish`](Self::finish) is called; before, it is a
/// temporary one beside it.
pub struct Folder {
    target: PathBuf,
    temporary: TempDir,
}

/// A tensor to be written.
pub struct PlannedTensor {
    /// Hugging Face's name.
    pub name: String,
    /// The GGUF name of the tensor that it is made of.
    pub source: String,
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
    /// Starts a folder that will be called `target`.
    ///
    /// # Errors
    /// `TargetExists`, or `Io` if no folder can be created beside it.
    pub fn create(target: &Path) -> Result<Self> {
        if target.symlink_metadata().is_ok() {
            return Err(ExportError::TargetExists { path: target.to_owned() });
        }
        let parent = match target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let mut options = tempfile::Builder::new();
        options.prefix(".slimllm-").suffix(".tmp");
        // Temporary folders are private by default; this one becomes the user's, with the usual
        // access.
        #[cfg(unix)]
        options.permissions(<Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o777));
        let temporary = options.tempdir_in(parent);
        let temporary =
            temporary.map_err(|error| FormatError::io(target, "create the folder", error))?;
        Ok(Self { target: target.to_owned(), temporary })
    }

    /// Where its files are until then.
    pub fn path(&self) -> &Path {
        self.temporary.path()
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

    /// Writes the tensors; `bytes_of` is called for each in order.
    pub fn tensors(
        &self,
        tensors: &[PlannedTensor],
        bytes_of: &mut dyn FnMut(&PlannedTensor) -> Result<Vec<u8>>,
    ) -> Result<()> {
        self.shards(tensors, SHARD_BYTES, bytes_of)
    }

    /// Brings the files to the disk, gives the folder its name and tells how many bytes its files have.
    pub fn finish(self) -> Result<u64> {
        let Self { target, temporary } = self;
        let rename = || {
            let mut bytes = 0;
            for entry in std::fs::read_dir(temporary.path())? {
                let file = File::open(entry?.path())?;
                file.sync_all()?;
                bytes += file.metadata()?.len();
            }
            std::fs::rename(temporary.path(), &target)?;
            Ok(bytes)
        };
        let bytes =
            rename().map_err(|error| FormatError::io(&target, "write the folder", error))?;
        // It has its new name now: there is nothing to remove.
        let _ = temporary.keep();
        Ok(bytes)
    }

    fn shards(
        &self,
        tensors: &[PlannedTensor],
        shard_bytes: u64,
        bytes_of: &mut dyn FnMut(&PlannedTensor) -> Result<Vec<u8>>,
    ) -> Result<()> {
        let shards = split(tensors, shard_bytes);
        let name_of = |index: usize| match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let mut weight_map = Map::new();
        for (index, shard) in shards.iter().enumerate() {
            let name = name_of(index);
            weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(name))));
            self.shard(&name, shard, bytes_of)?;
        }
        if shards.len() > 1 {
            let total: u64 = tensors.iter().map(PlannedTensor::bytes).sum();
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            self.json("model.safetensors.index.json", &index)?;
        }
        Ok(())
    }

    /// Writes one safetensors file: the length of the header, the header, the tensors.
    fn shard(
        &self,
        name: &str,
        tensors: &[PlannedTensor],
        bytes_of: &mut dyn FnMut(&PlannedTensor) -> Result<Vec<u8>>,
    ) -> Result<()> {
        let header = header(tensors);
        let target = self.target.join(name);
        let failed = |error| FormatError::io(&target, "write the file", error);
        let file = File::create_new(self.temporary.path().join(name)).map_err(failed)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
        out.write_all(header.as_bytes()).map_err(failed)?;
        for tensor in tensors {
            let bytes = bytes_of(tensor)?;
            assert_eq!(bytes.len() as u64, tensor.bytes(), "bytes of `{}`", tensor.name);
            out.write_all(&bytes).map_err(failed)?;
        }
        Ok(out.flush().map_err(failed)?)
    }

    /// Writes a JSON file.
    pub fn json(&self, name: &str, value: &Value) -> Result<()> {
        self.file(name, format!("{value:#}\n").as_bytes())
    }

    fn file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let written = std::fs::write(self.temporary.path().join(name), bytes);
        let path = self.target.join(name);
        Ok(written.map_err(|error| FormatError::io(&path, "write the file", error))?)
    }
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
            source: String::new(),
            dtype: Element::F16,
            shape: vec![index + 1, 4],
        };
        (0..count).map(plan).collect()
    }

    #[test]
    fn tensors_above_the_limit_go_to_shards_that_an_index_names() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("out");
        let folder = Folder::create(&target).unwrap();
        // 8, 16, 24, 32 bytes.
        let bytes_of = &mut |tensor: &PlannedTensor| Ok(vec![7; tensor.bytes() as usize]);
        folder.shards(&planned(4), 24, bytes_of).unwrap();
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
        let folder = Folder::create(&target).unwrap();
        folder.file("config.json", b"{}").unwrap();
        drop(folder);
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);

        std::fs::create_dir(&target).unwrap();
        let error = Folder::create(&target).err().unwrap();
        assert!(matches!(error, ExportError::TargetExists { .. }), "{error}");
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1);
    }
}
