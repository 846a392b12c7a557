//! Tokens that the files beside `tokenizer.json` add to it.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{TokenFiles, Vocabulary, vocabulary::as_token_id};

/// The text of a `tokenizer.json` with the tokens that only the files beside it list, as
/// transformers adds them: so they are found in a text, and the tokenizer is whole wherever it is
/// copied to. `None` if it lacks none.
///
/// A token is added under the id that it has: in the vocabulary, or as the next one behind it. One
/// that would get another id is left out.
///
/// # Source
/// `TokenizersBackend.__init__` of transformers.
pub(crate) fn with_added_tokens(
    tokenizer_json: &str,
    files: &TokenFiles<'_>,
    vocabulary: &Vocabulary,
) -> Option<String> {
    let mut missing: BTreeMap<u32, Value> = BTreeMap::new();
    let listed = files.tokenizer["added_tokens_decoder"].as_object().into_iter().flatten();
    for (id, token) in listed {
        if let (Ok(id), true) = (id.parse(), token.is_object()) {
            missing.insert(id, token.clone());
        }
    }
    let specials: Vec<&str> = files.special_texts().collect();
    if missing.is_empty() {
        for (text, id) in files.added_tokens.as_object().into_iter().flatten() {
            if let Some(id) = as_token_id(id) {
                let special = specials.contains(&text.as_str());
                missing.insert(id, json!({"content": text, "special": special}));
            }
        }
    }
    for text in specials {
        if let Some(id) = vocabulary.id(text) {
            missing.entry(id).or_insert_with(|| json!({"content": text, "special": true}));
        }
    }
    let mut next = vocabulary.end_of_ids();
    missing.retain(|&id, token| {
        let Some(text) = token["content"].as_str() else { return false };
        let is_next = id == next && vocabulary.id(text).is_none();
        next += u32::from(is_next);
        is_next || (vocabulary.id(text) == Some(id) && !vocabulary.is_added(text))
    });
    if missing.is_empty() {
        return None;
    }
    let mut json: Value = serde_json::from_str(tokenizer_json).ok()?;
    if json["added_tokens"].is_null() {
        json["added_tokens"] = json!([]);
    }
    let added = json["added_tokens"].as_array_mut()?;
    for (id, token) in missing {
        let flag = |key: &str, default: bool| token[key].as_bool().unwrap_or(default);
        let special = flag("special", false);
        added.push(json!({
            "id": id,
            "content": token["content"],
            "single_word": flag("single_word", false),
            "lstrip": flag("lstrip", false),
            "rstrip": flag("rstrip", false),
            "normalized": flag("normalized", !special),
            "special": special,
        }));
    }
    Some(json.to_string())
}
