//! The files that Hugging Face puts beside the weights: configuration, tokenizer, chat template.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{
    FormatError, Generation, Limits, ModelConfig, ModelSource, Result, TokenizerSource,
    arch::by_model_type,
    json,
    limits::read_text,
    special_tokens::{SpecialTokens, TokenFiles, Vocabulary, with_added_tokens},
    stand_in,
    vocabulary::vocabulary_faults,
};

/// The configuration of the text model in that of one that also sees or hears, with what the whole
/// says for it; `None` if it is no such configuration, or if the text model is of no known family.
fn text_model(whole: &Value) -> Option<Value> {
    const OF_THE_WHOLE: [&str; 4] =
        ["tie_word_embeddings", "bos_token_id", "eos_token_id", "quantization_config"];
    let mut text = whole.get("text_config")?.as_object()?.clone();
    by_model_type(text.get("model_type")?.as_str()?)?;
    for key in OF_THE_WHOLE {
        let said = whole.get(key).filter(|value| !value.is_null());
        if let Some(value) = said.filter(|_| text.get(key).is_none_or(Value::is_null)) {
            text.insert(key.to_owned(), value.clone());
        }
    }
    // The class in it is that of a part, or none.
    text.remove("architectures");
    Some(Value::Object(text))
}

/// What the files beside the weights say about a model.
pub(crate) struct Description {
    pub config: ModelConfig,
    pub tokenizer: TokenizerSource,
    pub chat_template: Option<String>,
    /// The method of `quantization_config`, which the weights may or may not bear out.
    pub quantization: Option<String>,
    /// Whether it is the text model of a model that also sees or hears.
    pub is_part: bool,
    /// What is odd in these files.
    pub warnings: Vec<String>,
}

/// A model directory, and which of its files were read.
pub(crate) struct Folder {
    root: PathBuf,
    /// Where a file is looked for that is not in `root`.
    parent: Option<PathBuf>,
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
        Self { root: root.to_owned(), parent: None, limits: Limits::default(), read: Vec::new() }
    }

    /// The directory that holds an ONNX file. If it is called `onnx`, as where transformers.js
    /// looks for graphs, what is not in it is looked for in its parent.
    pub fn around_onnx(path: &Path) -> Self {
        let mut folder = Self::around(path);
        let is_here = folder.root.as_os_str().is_empty();
        let named =
            if is_here { Path::new(".").canonicalize().ok() } else { Some(folder.root.clone()) };
        folder.parent = named
            .filter(|root| {
                root.file_name().is_some_and(|name| name == "onnx") && !root.is_symlink()
            })
            .and_then(|root| Some(root.parent()?.to_owned()));
        folder
    }

    /// A text file, `None` if there is none of this name.
    ///
    /// # Errors
    /// `Io`, `LimitExceeded`, `OtherKind` for a stand-in, `Unsupported` for a link out of an ONNX
    /// folder.
    pub fn text(&mut self, name: &str) -> Result<Option<String>> {
        let mut path = self.root.join(name);
        let mut text = read_text(&path, &self.limits)?;
        if let (None, Some(parent)) = (&text, &self.parent) {
            path = parent.join(name);
            if path.is_symlink() {
                let what = format!("`{name}`, a link in the folder above,");
                let hint = "put a copy of the file in its place";
                return Err(FormatError::unsupported(&path, what, hint));
            }
            text = read_text(&path, &self.limits)?;
        }
        if let Some(text) = text.as_ref().filter(|_| name.ends_with(".json")) {
            stand_in::refuse_for_json(&path, text)?;
        }
        self.read.extend(text.is_some().then_some(path));
        Ok(text)
    }

    /// A file that holds a JSON object.
    pub fn json(&mut self, name: &str) -> Result<Option<Value>> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let malformed = |found: String, hint: &str| {
            let path = self.read.last().expect("it was just read");
            FormatError::malformed(path, "the text", "", found, "a JSON object").with_hint(hint)
        };
        match json::parse(&text) {
            Ok(object @ Value::Object(_)) => Ok(Some(object)),
            Ok(_) => Err(malformed("another JSON value".to_owned(), "")),
            Err(error) if error.is_eof() => Err(malformed(error.to_string(), CUT_SHORT)),
            Err(error) => Err(malformed(error.to_string(), "")),
        }
    }

    /// Reads `config.json`, which must be there, and what else there is of
    /// `generation_config.json`, `tokenizer.json`, the files that name special tokens, and those
    /// that may hold the chat template.
    pub fn description(&mut self) -> Result<Description> {
        let config_json = self.json("config.json")?.ok_or_else(|| self.no_config())?;
        let config_path = self.config_path().to_owned();
        let (config_json, is_part) = match text_model(&config_json) {
            Some(text_model) => (text_model, true),
            None => (config_json, false),
        };
        let generation_config = self.json("generation_config.json")?;
        let generation = match &generation_config {
            Some(json) => {
                let path = self.read.last().expect("it was just read");
                Generation::from_hugging_face(path, json)?
            }
            None => Generation::default(),
        };
        let tokenizer_config = self.json("tokenizer_config.json")?.unwrap_or_default();
        let special_tokens_map = self.json("special_tokens_map.json")?.unwrap_or_default();
        let added_tokens = self.json("added_tokens.json")?.unwrap_or_default();
        let mut warnings = Vec::new();
        let mut config = ModelConfig::from_hugging_face(
            &config_path,
            &config_json,
            generation_config.as_ref(),
            &mut warnings,
        )?;
        config.generation = generation;
        let token_files = TokenFiles {
            tokenizer: &tokenizer_config,
            special_tokens_map: &special_tokens_map,
            added_tokens: &added_tokens,
            ..TokenFiles::of_model(&config_json, generation_config.as_ref())
        };
        let mut tokenizer = self.tokenizer(config.vocab_size, &mut warnings)?;
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
        let quantization = quantization_of(&config_json);
        Ok(Description { config, tokenizer, chat_template, quantization, is_part, warnings })
    }

    /// `tokenizer.json`, if it is there.
    fn tokenizer(
        &mut self,
        vocab_size: usize,
        warnings: &mut Vec<String>,
    ) -> Result<TokenizerSource> {
        let Some(text) = self.text("tokenizer.json")? else { return Ok(TokenizerSource::Missing) };
        let path = self.read.last().expect("it was just read");
        if let Err(error) = json::parse(&text) {
            let error = FormatError::malformed(path, "the text", "", &error, "a JSON object")
                .with_hint(if error.is_eof() { CUT_SHORT } else { "" });
            return Err(error);
        }
        let tokenizer = TokenizerSource::HuggingFace(text);
        warnings.extend(tokenizer_warnings(path, &tokenizer, vocab_size));
        Ok(tokenizer)
    }

    /// The error for a folder without `config.json`.
    fn no_config(&self) -> FormatError {
        let has = |name: &str| self.root.join(name).exists();
        let hint = if has("genai_config.json") {
            "`genai_config.json` says neither the RoPE base nor the epsilon of the norms; copy the \
             `config.json` of the model that was exported into this folder"
        } else if has("params.json") {
            "`params.json` belongs to the layout of the model's authors; use the model's folder in \
             the layout of transformers"
        } else {
            "copy the `config.json` of the model's repository into this folder"
        };
        let path = self.root.join("config.json");
        FormatError::missing(path, "it says what the model computes", hint)
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

    /// Where `config.json` was read.
    pub fn config_path(&self) -> &Path {
        let is_config = |path: &&PathBuf| path.ends_with("config.json");
        self.read.iter().find(is_config).unwrap_or(&self.root)
    }

    /// The files that were read.
    pub fn into_read(self) -> Vec<PathBuf> {
        self.read
    }
}

/// What is wrong with a file that ends too early.
pub(crate) const CUT_SHORT: &str =
    "the file ends too early, as after a download or a copy that broke off; fetch it again";

/// The template in a JSON file: a string, or the one called `default` of a list.
fn template_of(tokenizer_config: &Value) -> Option<String> {
    let template = match &tokenizer_config["chat_template"] {
        Value::Array(named) => &named.iter().find(|entry| entry["name"] == "default")?["template"],
        template => template,
    };
    template.as_str().map(str::to_owned)
}

/// The method of `quantization_config`, or of what MLX calls `quantization`.
fn quantization_of(config: &Value) -> Option<String> {
    let found = ["quantization_config", "quantization"].map(|key| &config[key]);
    let found = found.into_iter().find(|found| found.is_object())?;
    let method = ["quant_method", "quant_algo"].iter().find_map(|key| found[*key].as_str());
    let is_bits_and_bytes = ["load_in_4bit", "load_in_8bit"].iter().any(|key| found[*key] == true);
    Some(method.unwrap_or(if is_bits_and_bytes { "bitsandbytes" } else { "unnamed" }).to_owned())
}

/// The broken rules of a tokenizer in the file `path`, as sentences.
pub(crate) fn tokenizer_warnings(
    path: &Path,
    tokenizer: &TokenizerSource,
    vocab_size: usize,
) -> impl Iterator<Item = String> {
    let faults = vocabulary_faults(tokenizer, vocab_size, "").into_iter();
    let path = path.display().to_string();
    faults.map(move |fault| {
        format!("`{path}`: {}: found {}, expected {}", fault.place, fault.found, fault.expected)
    })
}

/// The error for a model without a tokenizer, to be given where one is needed.
pub fn missing_tokenizer(source: &dyn ModelSource) -> FormatError {
    let path = source.path();
    if matches!(source.format(), "gguf" | "slim") {
        let place = "key `tokenizer.ggml.tokens`";
        let hint = "convert the model again from a folder that has its tokenizer";
        return FormatError::malformed(path, place, "", "none", "the tokens of a tokenizer")
            .with_hint(hint);
    }
    let folder = Folder::around(path);
    let has = |name: &str| folder.root.join(name).exists();
    let others = ["tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt"];
    let hint = match others.into_iter().find(|name| has(name)) {
        Some(other) => format!(
            "the folder has `{other}`, from which transformers makes `tokenizer.json`: \
             `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`"
        ),
        None => "copy the `tokenizer.json` of the model's repository into this folder".to_owned(),
    };
    let path = folder.root.join("tokenizer.json");
    FormatError::missing(path, "it says which tokens a text has", hint)
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
