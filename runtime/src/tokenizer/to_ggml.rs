//! `tokenizer.json` as the `tokenizer.ggml.*` keys of a GGUF file.

use std::collections::HashMap;

use serde_json::Value as Json;
use slim_formats::gguf::{Metadata, Value};

use super::{
    Tokenizer, hugging_face,
    pre_tokenizer::{DIGIT, GPT_2, PreTokenizer},
    token_type,
};
use crate::{Result, RuntimeError};

/// The keys by which llama.cpp finds the tokens of a text where the `tokenizer.json` text `json`
/// finds them.
///
/// There are `vocab_size` tokens, as many as the embedding has rows: ids that the tokenizer leaves
/// out are unused tokens. With `add_bos` the first token of a text is BOS even where the tokenizer
/// does not put it there.
///
/// # Errors
/// `Tokenizer` for what is broken, and for what the keys cannot say.
pub fn ggml_keys(json: &str, vocab_size: usize, add_bos: bool) -> Result<Metadata> {
    let tokenizer = Tokenizer::from_inner(hugging_face::build(json)?);
    let json: Json = serde_json::from_str(json).expect("the tokenizer was built from it");
    check_kind(&json)?;
    let vocabulary = Vocabulary::read(&json, vocab_size)?;
    let frame = Frame::of(&tokenizer)?;

    let mut keys = Metadata::new();
    let mut insert = |key: &str, value: Value| keys.insert(format!("tokenizer.ggml.{key}"), value);
    insert("model", "gpt2".into())?;
    insert("pre", pre_tokenizer(&json)?.into())?;
    insert("tokens", vocabulary.tokens.into())?;
    insert("token_type", vocabulary.types.into())?;
    insert("merges", merges(&json)?.into())?;
    insert("add_bos_token", (add_bos || frame.bos.is_some()).into())?;
    insert("add_eos_token", frame.eos.is_some().into())?;
    for (key, id) in [("bos_token_id", frame.bos), ("eos_token_id", frame.eos)] {
        if let Some(id) = id {
            insert(key, id.into())?;
        }
    }
    Ok(keys)
}

fn unsupported(what: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::tokenizer(format!("GGUF keys cannot say {what}"))
}

/// Refuses all but byte-level BPE.
fn check_kind(json: &Json) -> Result<()> {
    let model = &json["model"];
    if model["type"].as_str().is_some_and(|kind| kind != "BPE") || model["merges"].is_null() {
        return Err(unsupported(format_args!("the model {}", model["type"])));
    }
    let is_set = |key: &str| match &model[key] {
        Json::Null | Json::Bool(false) => false,
        Json::String(text) => !text.is_empty(),
        Json::Number(number) => number.as_f64() != Some(0.0),
        _ => true,
    };
    let changes = ["dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"];
    match changes.into_iter().find(|key| is_set(key)) {
        Some(key) => Err(unsupported(format_args!("`{key}` of the BPE model"))),
        None => Ok(()),
    }
}

/// Token texts by id, and what each is for.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i32>,
}

impl Vocabulary {
    fn read(json: &Json, vocab_size: usize) -> Result<Self> {
        let mut entries: HashMap<u64, (&str, u64)> = HashMap::new();
        for (text, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
            entries.insert(id.as_u64().unwrap_or(u64::MAX), (text, token_type::NORMAL));
        }
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            let (Some(id), Some(text)) = (token["id"].as_u64(), token["content"].as_str()) else {
                continue;
            };
            for key in ["single_word", "lstrip", "rstrip"] {
                if token[key] == true {
                    return Err(unsupported(format_args!("`{key}` of token `{text}`")));
                }
            }
            let is_special = token["special"] == true;
            let token_type =
                if is_special { token_type::CONTROL } else { token_type::USER_DEFINED };
            entries.insert(id, (text, token_type));
        }
        if let Some(&id) = entries.keys().max().filter(|&&id| id >= vocab_size as u64) {
            let reason = format!("token {id} of a model with {vocab_size} tokens");
            return Err(RuntimeError::tokenizer(reason));
        }
        let entry = |id| match entries.get(&id) {
            Some(&(text, token_type)) => (text.to_owned(), token_type as i32),
            None => (format!("[PAD{id}]"), token_type::UNUSED as i32),
        };
        let (tokens, types) = (0..vocab_size as u64).map(entry).unzip();
        Ok(Self { tokens, types })
    }
}

/// The merges, each as its two parts with a space between.
fn merges(json: &Json) -> Result<Vec<String>> {
    let merge = |merge: &Json| match merge {
        Json::String(merge) => Ok(merge.clone()),
        pair => match (pair[0].as_str(), pair[1].as_str()) {
            (Some(left), Some(right)) if !left.contains(' ') && !right.contains(' ') => {
                Ok(format!("{left} {right}"))
            }
            _ => Err(unsupported(format_args!("the merge {pair}"))),
        },
    };
    json["model"]["merges"].as_array().into_iter().flatten().map(merge).collect()
}

/// GGUF's name of how a text is cut into words, told by the steps of the pre-tokenizer.
fn pre_tokenizer(json: &Json) -> Result<&'static str> {
    let steps = steps(&json["pre_tokenizer"], "pretokenizers");
    let mut splits = Vec::new();
    let mut is_byte_level = false;
    for step in &steps {
        let split = match (step["type"].as_str(), step["pattern"]["Regex"].as_str()) {
            (Some("Split"), Some(regex)) if keeps_all(step) => regex,
            (Some("Digits"), _) if step["individual_digits"] == true => DIGIT,
            (Some("ByteLevel"), _) if step["add_prefix_space"] != true => {
                is_byte_level = true;
                match step["use_regex"] != false {
                    true => GPT_2,
                    false => continue,
                }
            }
            _ => return Err(unsupported(format_args!("the pre-tokenizer {step}"))),
        };
        splits.push(split);
    }
    if !is_byte_level {
        return Err(unsupported("a pre-tokenizer that is not byte-level"));
    }
    let normalize_nfc = normalizes_nfc(json)?;
    let ignore_merges = json["model"]["ignore_merges"] == true;
    let name = PreTokenizer::name_of(&splits, ignore_merges, normalize_nfc);
    name.ok_or_else(|| unsupported(format_args!("the pre-tokenizer {}", json["pre_tokenizer"])))
}

/// Whether a split leaves nothing of the text out and cuts at both ends of a match.
fn keeps_all(split: &Json) -> bool {
    split["behavior"] == "Isolated" && split["invert"] != true
}

/// Whether the text is brought to Unicode form NFC, the one normalizer that is known here.
fn normalizes_nfc(json: &Json) -> Result<bool> {
    let normalizers = steps(&json["normalizer"], "normalizers");
    match normalizers.iter().find(|normalizer| normalizer["type"] != "NFC") {
        Some(other) => Err(unsupported(format_args!("the normalizer {other}"))),
        None => Ok(!normalizers.is_empty()),
    }
}

/// The steps of a sequence, or the one step that is there; `key` is what a sequence calls them.
fn steps<'a>(step: &'a Json, key: &str) -> Vec<&'a Json> {
    match step {
        Json::Null => Vec::new(),
        sequence if sequence["type"] == "Sequence" => {
            sequence[key].as_array().into_iter().flatten().collect()
        }
        step => vec![step],
    }
}

/// The tokens that are put around a document.
struct Frame {
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Frame {
    /// Finds them by trying: post-processors have many spellings.
    fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let text = tokenizer.encode("a")?;
        let document = tokenizer.encode_document("a")?;
        let around = |before: usize| document.get(before..before + text.len()) == Some(&text[..]);
        let after = |before: usize| document.len() - before - text.len();
        match (0..=1).find(|&before| around(before) && after(before) <= 1) {
            Some(before) => Ok(Self {
                bos: document[..before].first().copied(),
                eos: document[before + text.len()..].first().copied(),
            }),
            None => Err(unsupported("more than one token before or after a text")),
        }
    }
}
