//! The keys of a GGUF file.

use std::path::Path;

use super::{SpecialTokens, Vocabulary};
use crate::{
    FormatError, Result, TokenizerSource,
    gguf::{Metadata, Value},
};

/// The key of all end tokens; GGUF's own name one each.
pub(crate) const END_IDS_KEY: &str = "slim.eos_token_ids";

/// GGUF's keys of end tokens: of a text, of a turn, of a message.
pub(crate) const GGML_END_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// What llama.cpp takes where a file does not say it.
///
/// # Source
/// `llama_vocab::impl::load` in `src/llama-vocab.cpp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgmlDefaults {
    /// The token that starts a text.
    pub bos: Option<u32>,
    /// The token that ends a text.
    pub eos: Option<u32>,
    /// Whether `bos` is put in front of a text.
    pub add_bos: bool,
}

impl GgmlDefaults {
    /// Those for the kind of tokenizer that `metadata` names.
    pub fn of(metadata: &Metadata) -> Self {
        match metadata.str("tokenizer.ggml.model") {
            Some("llama") => {
                let has = |id: u32| {
                    let tokens = metadata.strings("tokenizer.ggml.tokens").unwrap_or_default();
                    (tokens.len() > id as usize).then_some(id)
                };
                Self { bos: has(1), eos: has(2), add_bos: true }
            }
            Some("gpt2") => {
                let pre = metadata.str("tokenizer.ggml.pre").unwrap_or_default();
                let adding = ["llama-bpe", "llama-v3", "llama3", "falcon3", "tekken"];
                Self { bos: None, eos: None, add_bos: adding.contains(&pre) }
            }
            _ => Self { bos: None, eos: None, add_bos: false },
        }
    }
}

impl SpecialTokens {
    /// Those of a GGUF or SliM file with `vocab_size` tokens.
    ///
    /// # Errors
    /// `Malformed` if a key has a value of the wrong kind, or one that is no token.
    pub fn from_gguf(path: &Path, metadata: &Metadata, vocab_size: usize) -> Result<Self> {
        let keys = Keys { path, metadata, vocab_size };
        let defaults = GgmlDefaults::of(metadata);
        let add_bos_key = "tokenizer.ggml.add_bos_token";
        let add_bos = match metadata.get(add_bos_key) {
            None => defaults.add_bos,
            Some(value) => value
                .as_bool()
                .ok_or_else(|| keys.malformed(add_bos_key, value, "a truth value".to_owned()))?,
        };
        let bos = keys.tokens("tokenizer.ggml.bos_token_id")?.first().copied();
        let mut tokens = Self { bos: bos.or(defaults.bos), ends: Vec::new(), add_bos };
        let main = keys.tokens(GGML_END_KEYS[0])?;
        for id in if main.is_empty() { defaults.eos.into_iter().collect() } else { main } {
            tokens.end(id);
        }
        for key in [END_IDS_KEY].iter().chain(&GGML_END_KEYS[1..]) {
            for id in keys.tokens(key)? {
                tokens.end(id);
            }
        }
        let vocabulary = Vocabulary::of(&TokenizerSource::from_gguf(metadata));
        tokens.end_as_well_known(&vocabulary, vocab_size);
        Ok(tokens)
    }
}

struct Keys<'a> {
    path: &'a Path,
    metadata: &'a Metadata,
    vocab_size: usize,
}

impl Keys<'_> {
    /// The ids that a key gives, one or an array; none if it is absent.
    fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.metadata.get(key) else { return Ok(Vec::new()) };
        let ids = match value.as_array() {
            Some(array) => array.to_u64s(),
            None => value.as_u64().map(|id| vec![id]),
        };
        let is_token = |&id: &u64| id < self.vocab_size as u64;
        match ids.filter(|ids| ids.iter().all(is_token)) {
            Some(ids) => Ok(ids.into_iter().map(|id| id as u32).collect()),
            None => {
                let expected = format!("a token id below {}", self.vocab_size);
                Err(self.malformed(key, value, expected))
            }
        }
    }

    fn malformed(&self, key: &str, found: &Value, expected: String) -> FormatError {
        FormatError::malformed(self.path, format!("key `{key}`"), "", found, expected)
    }
}
