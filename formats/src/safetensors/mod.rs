//! Hugging Face model directories: `config.json`, safetensors files, a tokenizer.

mod index;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    DenseTensor, FormatError, Limits, ModelConfig, ModelSource, Result, RowOrder, TokenizerSource,
    Weight, limits::read_text, names,
};
use index::{Shards, StoredTensor};

/// A `llama` or `mistral` model in a Hugging Face directory.
#[derive(Debug)]
pub struct HfDirectory {
    path: PathBuf,
    config: ModelConfig,
    shards: Shards,
    /// GGUF name and place of each tensor, in the order of use.
    tensors: Vec<(String, StoredTensor)>,
    by_name: HashMap<String, usize>,
    tokenizer: TokenizerSource,
    chat_template: Option<String>,
    files: Vec<PathBuf>,
}

impl HfDirectory {
    /// Opens a directory, or one `.safetensors` file with the `config.json` and the tokenizer beside it.
    ///
    /// `model.safetensors` is preferred to the shards of `model.safetensors.index.json`. Links are
    /// followed, since the hub's cache consists of them; a shard's name cannot leave the directory.
    ///
    /// # Errors
    /// `Io`, `Malformed` if a file contradicts its format or the others, `Unsupported` if the model
    /// needs what this program does not compute, or holds a tensor that it does not know.
    pub fn open(path: &Path) -> Result<Self> {
        let mut folder = Folder::around(path);
        let config_path = folder.root.join("config.json");
        let config_json = folder.json("config.json")?.ok_or_else(|| missing(&config_path))?;
        let generation_config = folder.json("generation_config.json")?;
        let tokenizer_config = folder.json("tokenizer_config.json")?.unwrap_or_default();
        let mut config =
            ModelConfig::from_hugging_face(&config_path, &config_json, generation_config.as_ref())?;
        config.add_bos = tokenizer_config["add_bos_token"].as_bool().unwrap_or(false);

        let (shards, stored) = match path.is_dir() {
            true => folder.open_weights()?,
            false => Shards::open_one(path)?,
        };
        let tensors = arrange(path, stored, &mut config)?;
        let tokenizer = match folder.text("tokenizer.json")? {
            Some(text) => TokenizerSource::HuggingFace(text),
            None => TokenizerSource::Missing,
        };
        let chat_template = match folder.text("chat_template.jinja")? {
            Some(template) => Some(template),
            None => template_of(&tokenizer_config),
        };
        let mut files = folder.read;
        files.extend(shards.paths());
        let names = tensors.iter().map(|(name, _)| name.clone());
        let by_name = names.zip(0..).collect();
        Ok(Self {
            path: path.to_owned(),
            config,
            shards,
            tensors,
            by_name,
            tokenizer,
            chat_template,
            files,
        })
    }
}

impl ModelSource for HfDirectory {
    fn path(&self) -> &Path {
        &self.path
    }

    fn format(&self) -> &'static str {
        "safetensors"
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tensor_names(&self) -> Vec<&str> {
        self.tensors.iter().map(|(name, _)| name.as_str()).collect()
    }

    fn tensor(&self, name: &str) -> Result<Option<Weight<'_>>> {
        let Some(&index) = self.by_name.get(name) else { return Ok(None) };
        let stored = &self.tensors[index].1;
        let StoredTensor { dtype, rows, cols, .. } = *stored;
        let bytes = self.shards.bytes_of(stored);
        Ok(Some(Weight::Dense(DenseTensor {
            dtype,
            rows,
            cols,
            bytes,
            row_order: RowOrder::AsStored,
        })))
    }

    fn tokenizer(&self) -> &TokenizerSource {
        &self.tokenizer
    }

    fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    fn files(&self) -> Vec<PathBuf> {
        self.files.clone()
    }
}

/// Brings the tensors under their GGUF names and into the order of use.
///
/// An output projection that is tied to the embedding is left out, whether or not it is stored.
fn arrange(
    path: &Path,
    mut stored: HashMap<String, StoredTensor>,
    config: &mut ModelConfig,
) -> Result<Vec<(String, StoredTensor)>> {
    let mut tensors = Vec::with_capacity(stored.len());
    for (hf_name, name) in names::tensor_names(config.block_count) {
        if let Some(tensor) = stored.remove(&hf_name)
            && !(config.tied_embeddings && name == names::OUTPUT)
        {
            tensors.push((name, tensor));
        }
    }
    config.tied_embeddings = tensors.last().is_none_or(|(name, _)| name != names::OUTPUT);
    match stored.keys().filter(|name| !is_derived(name)).min() {
        Some(name) => {
            let what = format!("tensor `{name}` of a model with {} blocks", config.block_count);
            Err(FormatError::unsupported(path, what, ""))
        }
        None => Ok(tensors),
    }
}

/// Whether a tensor follows from the configuration; old checkpoints store the RoPE frequencies of each block.
fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// The template in `tokenizer_config.json`: a string, or the one called `default` of a list.
fn template_of(tokenizer_config: &Value) -> Option<String> {
    let template = match &tokenizer_config["chat_template"] {
        Value::Array(named) => &named.iter().find(|entry| entry["name"] == "default")?["template"],
        template => template,
    };
    template.as_str().map(str::to_owned)
}

/// A model directory, and which of its files were read.
struct Folder {
    root: PathBuf,
    limits: Limits,
    read: Vec<PathBuf>,
}

impl Folder {
    /// The directory itself, or the one that holds a file.
    fn around(path: &Path) -> Self {
        let root = match path.parent() {
            Some(parent) if !path.is_dir() => parent,
            _ => path,
        };
        Self { root: root.to_owned(), limits: Limits::default(), read: Vec::new() }
    }

    fn text(&mut self, name: &str) -> Result<Option<String>> {
        let path = self.root.join(name);
        let text = read_text(&path, &self.limits)?;
        self.read.extend(text.is_some().then_some(path));
        Ok(text)
    }

    /// A file that holds a JSON object.
    fn json(&mut self, name: &str) -> Result<Option<Value>> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let malformed = |found: String| {
            FormatError::malformed(&self.root.join(name), "the text", "", found, "a JSON object")
        };
        match serde_json::from_str(&text) {
            Ok(object @ Value::Object(_)) => Ok(Some(object)),
            Ok(_) => Err(malformed("another JSON value".to_owned())),
            Err(error) => Err(malformed(error.to_string())),
        }
    }

    fn open_weights(&mut self) -> Result<(Shards, HashMap<String, StoredTensor>)> {
        let single = self.root.join("model.safetensors");
        if single.exists() {
            return Shards::open_one(&single);
        }
        let index_name = "model.safetensors.index.json";
        if let Some(index) = self.json(index_name)? {
            return Shards::open_index(&self.root, &self.root.join(index_name), &index);
        }
        let pickles = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"];
        if pickles.iter().any(|name| self.root.join(name).exists()) {
            let hint = "load it with transformers and save it with `save_pretrained`, which writes safetensors";
            return Err(FormatError::unsupported(
                &self.root,
                "a model stored as PyTorch pickles",
                hint,
            ));
        }
        Err(missing(&single))
    }
}

fn missing(path: &Path) -> FormatError {
    FormatError::io(path, "open the file", std::io::ErrorKind::NotFound.into())
}
