//! The metadata that llama.cpp reads.

use slim_formats::{
    DType, Decoder, ModelSource, TokenizerSource,
    arch::Tensor,
    gguf::{Metadata, NewTensor},
};
use slim_runtime::ggml_keys;

use crate::Result;

const ADD_BOS_KEY: &str = "tokenizer.ggml.add_bos_token";

/// The version of ggml's block types.
const QUANTIZATION_VERSION: u32 = 2;

/// The keys of GGUF that name a second and a third token that ends a text.
const MORE_EOS_KEYS: [&str; 2] = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// The metadata of a file with these tensors.
pub fn of(model: &dyn ModelSource, tensors: &[NewTensor]) -> Result<Metadata> {
    let config = model.config();
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
    if let Some(file_type) = file_type(model.decoder(), tensors) {
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

/// llama.cpp's number for files that are mostly of the type of the first linear layer.
fn file_type(decoder: &Decoder, tensors: &[NewTensor]) -> Option<u32> {
    let is_linear = |name: &str| decoder.find(name).is_some_and(Tensor::is_linear);
    match tensors.iter().find(|tensor| is_linear(&tensor.name))?.dtype {
        DType::F32 => Some(0),
        DType::F16 => Some(1),
        DType::Q4_0 => Some(2),
        DType::Q4_1 => Some(3),
        DType::Q8_0 => Some(7),
        DType::Q5_0 => Some(8),
        DType::Q5_1 => Some(9),
        DType::BF16 => Some(32),
        _ => None,
    }
}
