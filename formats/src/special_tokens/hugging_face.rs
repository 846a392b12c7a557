//! The files of a Hugging Face folder.

use std::path::Path;

use serde_json::Value;

use super::{SpecialTokens, Vocabulary, vocabulary::as_token_id};
use crate::{FormatError, Result};

/// Keys of tokens that end a turn or a message, beside `eos_token`.
const MORE_ENDS: [&str; 3] = ["eot_token", "end_of_turn_token", "eom_token"];

/// The files that name tokens; `null` stands for one that is not there.
#[derive(Debug)]
pub(crate) struct TokenFiles<'a> {
    /// `config.json`.
    pub config: &'a Value,
    /// `generation_config.json`.
    pub generation: &'a Value,
    /// `tokenizer_config.json`.
    pub tokenizer: &'a Value,
    /// `special_tokens_map.json`.
    pub special_tokens_map: &'a Value,
    /// `added_tokens.json`.
    pub added_tokens: &'a Value,
}

impl<'a> TokenFiles<'a> {
    /// The two that describe the model, without those of a tokenizer.
    pub fn of_model(config: &'a Value, generation: Option<&'a Value>) -> Self {
        let none = &Value::Null;
        let generation = generation.unwrap_or(none);
        Self { config, generation, tokenizer: none, special_tokens_map: none, added_tokens: none }
    }

    /// What the files call a token: `bos_token`, ... `None` if none says it, `Some(None)` if they
    /// say that there is none.
    ///
    /// # Source
    /// `PreTrainedTokenizerBase._from_pretrained` of transformers: the older
    /// `special_tokens_map.json` counts more, unless the settings list the added tokens.
    pub fn text(&self, key: &str) -> Option<Option<&'a str>> {
        let older = match self.tokenizer["added_tokens_decoder"].is_object() {
            true => None,
            false => self.special_tokens_map.get(key),
        };
        let token = older.or_else(|| self.tokenizer.get(key))?;
        Some(text_of(token))
    }

    /// Every text that the files call a special token: by a name, or in a list of further ones.
    pub fn special_texts(&self) -> impl Iterator<Item = &'a str> {
        const LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];
        let files = [self.tokenizer, self.special_tokens_map];
        let keys = files.into_iter().filter_map(Value::as_object).flat_map(serde_json::Map::keys);
        let named = keys.filter(|key| key.ends_with("_token")).filter_map(|key| self.text(key)?);
        let lists = files.into_iter().flat_map(|file| LISTS.map(|list| &file[list]));
        let listed = lists.flat_map(|list| list.as_array().into_iter().flatten());
        named.chain(listed.filter_map(text_of))
    }
}

/// A token's text, written as such or as an object.
fn text_of(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

impl SpecialTokens {
    /// Those of a folder with this vocabulary, whose model has `vocab_size` tokens; `path` is that
    /// of `config.json`.
    ///
    /// # Errors
    /// `Malformed` if an id is none of a token.
    pub fn from_hugging_face(
        path: &Path,
        files: &TokenFiles<'_>,
        vocabulary: &Vocabulary,
        vocab_size: usize,
    ) -> Result<Self> {
        let ids = |name: &str, object: &Value, key: &str| -> Result<Vec<u32>> {
            let as_ids = |value: &Value| match value {
                Value::Null => Some(Vec::new()),
                Value::Array(ids) => ids.iter().map(as_token_id).collect(),
                id => as_token_id(id).map(|id| vec![id]),
            };
            let is_token = |&id: &u32| (id as usize) < vocab_size;
            let found = as_ids(&object[key]).filter(|ids| ids.iter().all(is_token));
            found.ok_or_else(|| {
                let expected = format!("token ids below {vocab_size}");
                let path = path.with_file_name(name);
                FormatError::malformed(&path, format!("key `{key}`"), "", &object[key], expected)
            })
        };
        let generation = |key| ids("generation_config.json", files.generation, key);
        let config = |key| ids("config.json", files.config, key);
        let token = |text: &str| vocabulary.id(text).filter(|&id| (id as usize) < vocab_size);

        let bos = match files.text("bos_token") {
            Some(None) => None,
            named => match named.flatten().and_then(token) {
                Some(bos) => Some(bos),
                None => {
                    let ids = [generation("bos_token_id")?, config("bos_token_id")?].concat();
                    ids.first().copied()
                }
            },
        };
        let add_bos = files.tokenizer["add_bos_token"] == true;
        let mut tokens = Self { bos, ends: Vec::new(), add_bos };
        if let Some(id) = files.text("eos_token").flatten().and_then(token) {
            tokens.end(id);
        }
        let generation_ends = generation("eos_token_id")?;
        // Of two lists transformers takes the first. What the other one has besides is often a
        // leftover: it may not be a token of ordinary text.
        let config_ends = config("eos_token_id")?.into_iter();
        let is_left_over = |id| !generation_ends.is_empty() && !vocabulary.is_control(id);
        let config_ends: Vec<_> = config_ends.filter(|&id| !is_left_over(id)).collect();
        for id in generation_ends.iter().chain(&config_ends) {
            tokens.end(*id);
        }
        for id in MORE_ENDS.iter().filter_map(|key| files.text(key)?).filter_map(token) {
            tokens.end(id);
        }
        tokens.end_as_well_known(vocabulary, vocab_size);
        Ok(tokens)
    }
}
