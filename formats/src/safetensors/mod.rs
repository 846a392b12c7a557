//! Hugging Face model directories: `config.json`, safetensors files, a tokenizer.

mod index;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use crate::{
    Decoder, DenseTensor, FormatError, Layout, ModelConfig, ModelSource, Part, Result,
    TokenizerSource, Weight,
    folder::{Description, Folder, missing},
};
use index::{Shards, StoredTensor};

/// A model in a Hugging Face directory.
#[derive(Debug)]
pub struct HfDirectory {
    path: PathBuf,
    config: ModelConfig,
    decoder: Decoder,
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
        let Description { mut config, tokenizer, chat_template } = folder.description()?;
        let (shards, stored) = match path.is_dir() {
            true => open_weights(&mut folder)?,
            false => Shards::open_one(path)?,
        };
        let (decoder, tensors) = arrange(path, stored, &mut config)?;
        let mut files = folder.into_read();
        files.extend(shards.paths());
        let names = tensors.iter().map(|(name, _)| name.clone());
        let by_name = names.zip(0..).collect();
        Ok(Self {
            path: path.to_owned(),
            config,
            decoder,
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

    fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn tensor_names(&self) -> Vec<&str> {
        self.tensors.iter().map(|(name, _)| name.as_str()).collect()
    }

    fn tensor(&self, name: &str) -> Result<Option<Weight<'_>>> {
        let Some(&index) = self.by_name.get(name) else { return Ok(None) };
        let stored = &self.tensors[index].1;
        let StoredTensor { dtype, rows, cols, .. } = *stored;
        let bytes = self.shards.bytes_of(stored);
        Ok(Some(Weight::Dense(DenseTensor { dtype, rows, cols, bytes, layout: Layout::AsStored })))
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

    fn release_pages(&self) {
        self.shards.release_pages();
    }
}

/// What the model computes, and its tensors under their GGUF names in the order of use.
///
/// An output projection that is tied to the embedding is left out, whether or not it is stored.
fn arrange(
    path: &Path,
    mut stored: HashMap<String, StoredTensor>,
    config: &mut ModelConfig,
) -> Result<(Decoder, Vec<(String, StoredTensor)>)> {
    let output = config.family.hf_name(Part::Output);
    if config.tied_embeddings {
        stored.remove(output);
    }
    config.tied_embeddings = !stored.contains_key(output);
    let decoder = Decoder::new(config);
    let mut tensors = Vec::with_capacity(stored.len());
    for tensor in decoder.tensors() {
        let found = stored.remove(&tensor.hf_name);
        tensors.extend(found.map(|stored| (tensor.name.clone(), stored)));
    }
    match stored.keys().filter(|name| !is_derived(name)).min() {
        Some(name) => {
            let what = format!("tensor `{name}` of a model with {} blocks", config.block_count);
            Err(FormatError::unsupported(path, what, ""))
        }
        None => Ok((decoder, tensors)),
    }
}

/// Whether a tensor follows from the configuration; old checkpoints store the RoPE frequencies of each block.
fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// Opens `model.safetensors`, or what its index names.
fn open_weights(folder: &mut Folder) -> Result<(Shards, HashMap<String, StoredTensor>)> {
    let root = folder.root().to_owned();
    let single = root.join("model.safetensors");
    if single.exists() {
        return Shards::open_one(&single);
    }
    let index_name = "model.safetensors.index.json";
    if let Some(index) = folder.json(index_name)? {
        return Shards::open_index(&root, &root.join(index_name), &index);
    }
    for (names, what, hint) in [
        (
            &["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"][..],
            "a model stored as PyTorch pickles",
            "load it with transformers and save it with `save_pretrained`, which writes safetensors",
        ),
        (&["model.onnx"], "a directory with weights in ONNX only", "name the `.onnx` file instead"),
    ] {
        if names.iter().any(|name| root.join(name).exists()) {
            return Err(FormatError::unsupported(&root, what, hint));
        }
    }
    Err(missing(&single))
}
