//! The files that Hugging Face puts beside the weights: configuration, tokenizer, chat template.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{
    FormatError, Generation, Limits, ModelConfig, Result, TokenizerSource,
    limits::read_text,
    special_tokens::{SpecialTokens, TokenFiles, Vocabulary, with_added_tokens},
};

/// What the files beside the weights say about a model.
pub(crate) struct Description {
    pub config: ModelConfig,
    pub tokenizer: TokenizerSource,
    pub chat_template: Option<String>,
}

/// A model directory, and which of its files were read.
pub(crate) struct Folder {
    root: PathBuf,
    limits: Limits,
    read: Vec<PathBuf>,
}

impl Folder {
    /// The directory itself, or the one that holds a file.
    pub fn around(path: &Path) -> Self {
        let root = match path.parent() {
            Some(parent) if !path.is_dir() => parent,
            _ => path,
        };
        Self { root: root.to_owned(), limits: Limits::default(), read: Vec::new() }
    }

    pub fn text(&mut self, name: &str) -> Result<Option<String>> {
        let path = self.root.join(name);
        let text = read_text(&path, &self.limits)?;
        self.read.extend(text.is_some().then_some(path));
        Ok(text)
    }

    /// A file that holds a JSON object.
    pub fn json(&mut self, name: &str) -> Result<Option<Value>> {
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

    /// Reads `config.json`, which must be there, and what else there is of
    /// `generation_config.json`, `tokenizer.json`, the files that name special tokens, and those that
    /// may hold the chat template.
    pub fn description(&mut self) -> Result<Description> {
        let config_path = self.root.join("config.json");
        let config_json = self.json("config.json")?.ok_or_else(|| missing(&config_path))?;
        let generation_config = self.json("generation_config.json")?;
        let tokenizer_config = self.json("tokenizer_config.json")?.unwrap_or_default();
        let special_tokens_map = self.json("special_tokens_map.json")?.unwrap_or_default();
        let added_tokens = self.json("added_tokens.json")?.unwrap_or_default();
        let mut config =
            ModelConfig::from_hugging_face(&config_path, &config_json, generation_config.as_ref())?;
        if let Some(json) = &generation_config {
            let path = self.root.join("generation_config.json");
            config.generation = Generation::from_hugging_face(&path, json)?;
        }
        let token_files = TokenFiles {
            tokenizer: &tokenizer_config,
            special_tokens_map: &special_tokens_map,
            added_tokens: &added_tokens,
            ..TokenFiles::of_model(&config_json, generation_config.as_ref())
        };
        let mut tokenizer = match self.text("tokenizer.json")? {
            Some(text) => TokenizerSource::HuggingFace(text),
            None => TokenizerSource::Missing,
        };
        let mut vocabulary = Vocabulary::of(&tokenizer);
        if let TokenizerSource::HuggingFace(text) = &tokenizer
            && let Some(whole) = with_added_tokens(text, &token_files, &vocabulary)
        {
            tokenizer = TokenizerSource::HuggingFace(whole);
            vocabulary = Vocabulary::of(&tokenizer);
        }
        let vocab_size = config.vocab_size;
        SpecialTokens::from_hugging_face(&config_path, &token_files, &vocabulary, vocab_size)?
            .describe(&mut config);
        let chat_template = self.chat_template(&tokenizer_config)?;
        Ok(Description { config, tokenizer, chat_template })
    }

    /// The chat template called `default`: a file of its own counts more than the settings.
    ///
    /// # Source
    /// `PreTrainedTokenizerBase._from_pretrained` of transformers; `chat_template.json` as in
    /// `gguf-py/gguf/vocab.py` of llama.cpp.
    fn chat_template(&mut self, tokenizer_config: &Value) -> Result<Option<String>> {
        for name in ["chat_template.jinja", "additional_chat_templates/default.jinja"] {
            if let Some(template) = self.text(name)? {
                return Ok(Some(template));
            }
        }
        match template_of(tokenizer_config) {
            Some(template) => Ok(Some(template)),
            None => Ok(self.json("chat_template.json")?.as_ref().and_then(template_of)),
        }
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The files that were read.
    pub fn into_read(self) -> Vec<PathBuf> {
        self.read
    }
}

/// The template in a JSON file: a string, or the one called `default` of a list.
fn template_of(tokenizer_config: &Value) -> Option<String> {
    let template = match &tokenizer_config["chat_template"] {
        Value::Array(named) => &named.iter().find(|entry| entry["name"] == "default")?["template"],
        template => template,
    };
    template.as_str().map(str::to_owned)
}

/// The error for a file that has to be there.
pub(crate) fn missing(path: &Path) -> FormatError {
    FormatError::io(path, "open the file", std::io::ErrorKind::NotFound.into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn template_of_a_list_is_the_default_one() {
        let list = json!({"chat_template": [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "plain"},
        ]});
        assert_eq!(template_of(&list).as_deref(), Some("plain"));
        assert_eq!(template_of(&json!({"chat_template": "text"})).as_deref(), Some("text"));
        assert_eq!(template_of(&Value::Null), None);
    }
}
