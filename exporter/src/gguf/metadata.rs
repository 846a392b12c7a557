//! The metadata that llama.cpp reads.

use slim_formats::{ModelSource, Scaling, TokenizerSource, gguf::Metadata};
use slim_runtime::ggml_keys;

use crate::Result;

const ADD_BOS_KEY: &str = "tokenizer.ggml.add_bos_token";

/// The version of ggml's block types.
const QUANTIZATION_VERSION: u32 = 2;

/// The keys of GGUF that name a second and a third token that ends a text.
const MORE_EOS_KEYS: [&str; 2] = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// The metadata of a file; `file_type` is llama.cpp's number for the types of its tensors.
pub fn of(model: &dyn ModelSource, file_type: Option<u32>) -> Result<Metadata> {
    let mut config = model.config().clone();
    if let Scaling::Dynamic { .. } = config.rope.scaling {
        // llama.cpp would not load it.
        config.rope.scaling = Scaling::Factors;
    }
    let tokenizer = match model.tokenizer() {
        TokenizerSource::Ggml(keys) => keys.clone(),
        TokenizerSource::HuggingFace(json) => ggml_keys(json, config.vocab_size, config.add_bos)?,
        TokenizerSource::Missing => Metadata::new(),
    };
    let mut metadata = Metadata::new();
    for (key, value) in config.to_gguf().iter() {
        // What is added to a text is the tokenizer's to say; keys of our own mean nothing to
        // llama.cpp.
        let is_tokenizers = tokenizer.contains(key) || key == ADD_BOS_KEY;
        if !is_tokenizers && !key.starts_with("slim.") {
            metadata.insert(key, value.clone())?;
        }
    }
    if let Some(file_type) = file_type {
        metadata.insert("general.file_type", file_type)?;
    }
    metadata.insert("general.quantization_version", QUANTIZATION_VERSION)?;
    for (key, value) in tokenizer.iter() {
        metadata.insert(key, value.clone())?;
    }
    for (key, &id) in MORE_EOS_KEYS.iter().zip(config.eos_token_ids.iter().skip(1)) {
        if !metadata.contains(key) {
            metadata.insert(*key, id)?;
        }
    }
    if let Some(template) = model.chat_template()
        && !metadata.contains("tokenizer.chat_template")
    {
        metadata.insert("tokenizer.chat_template", template)?;
    }
    Ok(metadata)
}
