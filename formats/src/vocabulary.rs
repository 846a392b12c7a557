//! The rules of a vocabulary: one text per token, one token per text, nothing that leads nowhere.

use std::collections::{HashMap, HashSet};

use serde_json::Value as Json;

use crate::{
    TokenizerSource,
    gguf::{Metadata, Value},
    json,
    slim::Fault,
};

/// GGUF's number of tokens that no text has.
const UNUSED: u64 = 5;

/// The broken rules of a tokenizer for a model with `vocab_size` rows in its embedding, one of each
/// kind with the number of the others. Each is of rule `rule`.
pub fn vocabulary_faults(
    tokenizer: &TokenizerSource,
    vocab_size: usize,
    rule: &'static str,
) -> Vec<Fault> {
    let mut faults = Faults { rule, found: Vec::new() };
    match tokenizer {
        TokenizerSource::HuggingFace(text) => match json::parse(text) {
            Ok(json) => faults.of_json(&json, vocab_size as u64),
            Err(error) => faults.add("`tokenizer.json`", error.to_string(), "JSON"),
        },
        TokenizerSource::Ggml(metadata) => faults.of_gguf(metadata, vocab_size as u64),
        TokenizerSource::Missing => {}
    }
    faults.found
}

struct Faults {
    rule: &'static str,
    found: Vec<Fault>,
}

/// A token and its text.
type Token<'a> = (u64, &'a str);

impl Faults {
    fn add(&mut self, place: &str, found: impl Into<String>, expected: &str) {
        let (place, expected) = (place.to_owned(), expected.to_owned());
        self.found.push(Fault { rule: self.rule, place, found: found.into(), expected });
    }

    /// Adds the first of several faults of a kind, if there are any.
    fn add_first(&mut self, place: &str, found: impl IntoIterator<Item = String>, expected: &str) {
        let mut found = found.into_iter();
        if let Some(first) = found.next() {
            let more = match found.count() {
                0 => String::new(),
                more => format!(", and {more} more"),
            };
            self.add(place, first + &more, expected);
        }
    }

    fn of_json(&mut self, json: &Json, vocab_size: u64) {
        let model = &json["model"];
        let tokens: Vec<Token<'_>> = match &model["vocab"] {
            Json::Object(vocab) => {
                vocab.iter().filter_map(|(text, id)| Some((id.as_u64()?, text.as_str()))).collect()
            }
            Json::Array(pieces) => {
                (0..).zip(pieces.iter().filter_map(|piece| piece[0].as_str())).collect()
            }
            _ => return,
        };
        let added: Vec<Token<'_>> = json["added_tokens"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|token| Some((token["id"].as_u64()?, token["content"].as_str()?)))
            .collect();
        self.of_texts("`vocab`", &tokens);
        self.of_ids("`vocab`", &tokens);
        self.of_texts("`added_tokens`", &added);
        self.of_ids("`added_tokens`", &added);
        self.of_contradictions(&tokens, &added);
        self.beyond(&[tokens.as_slice(), &added].concat(), vocab_size);
        let texts: HashSet<&str> = tokens.iter().chain(&added).map(|(_, text)| *text).collect();
        let prefix = model["continuing_subword_prefix"].as_str().unwrap_or("");
        let merges = model["merges"].as_array().into_iter().flatten().map(|merge| match merge {
            Json::String(merge) => merge.split_once(' '),
            pair => pair[0].as_str().zip(pair[1].as_str()),
        });
        self.of_merges("`merges`", merges, prefix, &texts);
    }

    fn of_gguf(&mut self, metadata: &Metadata, vocab_size: u64) {
        let name = |key: &str| format!("`tokenizer.ggml.{key}`");
        let get = |key: &str| metadata.get(&format!("tokenizer.ggml.{key}"));
        let Some(texts) = metadata.strings("tokenizer.ggml.tokens") else { return };
        for key in ["token_type", "scores"] {
            let Some(array) = get(key).and_then(Value::as_array) else { continue };
            if array.len() != texts.len() {
                let expected = format!("{}, one per token", texts.len());
                self.add(&name(key), format!("{} entries", array.len()), &expected);
            }
        }
        let types = get("token_type").and_then(Value::as_array).and_then(|types| types.to_u64s());
        let is_used = |&(id, _): &Token<'_>| {
            types.as_ref().is_none_or(|types| types.get(id as usize) != Some(&UNUSED))
        };
        let all = || (0..).zip(texts.iter().map(String::as_str));
        let used: Vec<Token<'_>> = all().filter(is_used).collect();
        self.of_texts(&name("tokens"), &used);
        self.beyond(&all().collect::<Vec<_>>(), vocab_size);
        for (key, value) in metadata.iter() {
            let is_id = key.starts_with("tokenizer.ggml.") && key.ends_with("_token_id");
            let is_token = || value.as_u64().is_some_and(|id| id < texts.len() as u64);
            if is_id && !is_token() {
                let expected = format!("one of {} tokens", texts.len());
                self.add(&format!("`{key}`"), value.to_string(), &expected);
            }
        }
        if let Some(merges) = metadata.strings("tokenizer.ggml.merges") {
            let texts = texts.iter().map(String::as_str).collect();
            let merges = merges.iter().map(|merge| {
                // A part may begin with a space of its own.
                let middle = merge.char_indices().skip(1).find(|&(_, c)| c == ' ')?.0;
                Some((&merge[..middle], &merge[middle + 1..]))
            });
            self.of_merges(&name("merges"), merges, "", &texts);
        }
    }

    /// Texts of several tokens.
    fn of_texts(&mut self, place: &str, tokens: &[Token<'_>]) {
        let mut first = HashMap::new();
        let twice = tokens.iter().filter_map(|&(id, text)| match first.insert(text, id) {
            Some(other) if other != id => {
                Some(format!("the text {text:?} of token {other} again as token {id}"))
            }
            _ => None,
        });
        self.add_first(place, twice.collect::<Vec<_>>(), "one token of each text");
    }

    /// Tokens of several texts.
    fn of_ids(&mut self, place: &str, tokens: &[Token<'_>]) {
        let mut first = HashMap::new();
        let twice = tokens.iter().filter_map(|&(id, text)| match first.insert(id, text) {
            Some(other) if other != text => {
                Some(format!("token {id} as {other:?} and as {text:?}"))
            }
            _ => None,
        });
        self.add_first(place, twice.collect::<Vec<_>>(), "one text of each token");
    }

    /// Added tokens that the vocabulary knows otherwise.
    fn of_contradictions(&mut self, tokens: &[Token<'_>], added: &[Token<'_>]) {
        let id_of: HashMap<&str, u64> = tokens.iter().map(|&(id, text)| (text, id)).collect();
        let text_of: HashMap<u64, &str> = tokens.iter().copied().collect();
        let contradictions = added.iter().filter_map(|&(id, text)| {
            let (other_id, other_text) = (id_of.get(text), text_of.get(&id));
            match (other_id, other_text) {
                (Some(&other), _) if other != id => {
                    Some(format!("token {id} as {text:?}, which `vocab` has as token {other}"))
                }
                (_, Some(&other)) if other != text => {
                    Some(format!("token {id} as {text:?}, which `vocab` has as {other:?}"))
                }
                _ => None,
            }
        });
        let expected = "what `vocab` says";
        self.add_first("`added_tokens`", contradictions.collect::<Vec<_>>(), expected);
    }

    /// Tokens that the embedding has no row for.
    fn beyond(&mut self, tokens: &[Token<'_>], vocab_size: u64) {
        let beyond: HashMap<u64, &str> =
            tokens.iter().copied().filter(|&(id, _)| id >= vocab_size).collect();
        let mut beyond: Vec<_> = beyond.into_iter().collect();
        beyond.sort_unstable();
        let beyond = beyond.iter().map(|(id, text)| format!("token {id} ({text:?})"));
        let expected = format!("ids below {vocab_size}, the rows of the embedding");
        self.add_first("the tokenizer", beyond, &expected);
    }

    /// Merges of or to what is no token; `None` is one that cannot be read.
    fn of_merges<'a>(
        &mut self,
        place: &str,
        merges: impl Iterator<Item = Option<(&'a str, &'a str)>>,
        prefix: &str,
        texts: &HashSet<&str>,
    ) {
        let broken = merges.enumerate().filter_map(|(index, merge)| {
            let Some((left, right)) = merge else {
                return Some(format!("entry {index} that is no pair"));
            };
            let result = format!("{left}{}", right.strip_prefix(prefix).unwrap_or(right));
            let unknown = [left, right, &result].into_iter().find(|text| !texts.contains(text))?;
            Some(format!("entry {index} of {left:?} and {right:?}, where {unknown:?} is no token"))
        });
        self.add_first(place, broken.collect::<Vec<_>>(), "merges of tokens to tokens");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The faults in words.
    fn found(tokenizer: &TokenizerSource, vocab_size: usize) -> Vec<String> {
        let faults = vocabulary_faults(tokenizer, vocab_size, "");
        faults.into_iter().map(|fault| format!("{}: {}", fault.place, fault.found)).collect()
    }

    #[test]
    fn json_broken_rules_are_found() {
        let vocab = json!({"a": 0, "b": 1, "ab": 2});
        let of = |vocab: &Json, merges: Json, added: Json| {
            let model = json!({"type": "BPE", "vocab": vocab, "merges": merges});
            TokenizerSource::HuggingFace(json!({"model": model, "added_tokens": added}).to_string())
        };
        let sound = of(&vocab, json!(["a b"]), json!([{"id": 3, "content": "<s>"}]));
        assert!(found(&sound, 4).is_empty());
        for (tokenizer, size, expected) in [
            (&sound, 3, "the tokenizer: token 3 (\"<s>\")"),
            (
                &of(&json!({"a": 0, "b": 0}), json!([]), json!([])),
                9,
                "token 0 as \"a\" and as \"b\"",
            ),
            (&of(&vocab, json!([["a", "c"]]), json!([])), 9, "where \"c\" is no token"),
            (&of(&vocab, json!(["a b", "b a"]), json!([])), 9, "entry 1 of \"b\" and \"a\""),
            (&of(&vocab, json!([1]), json!([])), 9, "entry 0 that is no pair"),
            (
                &of(&vocab, json!([]), json!([{"id": 1, "content": "a"}])),
                9,
                "token 1 as \"a\", which `vocab` has as token 0",
            ),
            (
                &of(&vocab, json!([]), json!([{"id": 1, "content": "c"}])),
                9,
                "token 1 as \"c\", which `vocab` has as \"b\"",
            ),
            (
                &TokenizerSource::HuggingFace(r#"{"model": {"vocab": {"a": 0, "a": 1}}}"#.into()),
                9,
                "a second entry of the key `a`",
            ),
        ] {
            let faults = found(tokenizer, size);
            assert!(faults.len() == 1 && faults[0].contains(expected), "{expected}: {faults:?}");
        }
    }

    #[test]
    fn gguf_broken_rules_are_found() {
        let of = |changes: &[(&str, Value)]| {
            let mut keys: Vec<(&str, Value)> = vec![
                ("tokens", ["a", "b", "ab", "x"].map(str::to_owned).to_vec().into()),
                ("token_type", vec![1i32; 4].into()),
                ("scores", vec![0f32; 4].into()),
                ("merges", vec!["a b".to_owned()].into()),
                ("bos_token_id", 3u32.into()),
            ];
            keys.retain(|(key, _)| changes.iter().all(|(other, _)| other != key));
            keys.extend(changes.iter().cloned());
            let mut metadata = Metadata::new();
            for (key, value) in keys {
                metadata.insert(format!("tokenizer.ggml.{key}"), value).unwrap();
            }
            TokenizerSource::Ggml(metadata)
        };
        let twice = || ("tokens", ["a", "b", "ab", "a"].map(str::to_owned).to_vec().into());
        assert!(found(&of(&[]), 4).is_empty());
        assert!(found(&of(&[twice(), ("token_type", vec![1i32, 1, 1, 5].into())]), 4).is_empty());
        for (changes, size, expected) in [
            (vec![twice()], 4, "the text \"a\" of token 0 again as token 3"),
            (
                vec![("token_type", vec![1i32; 3].into())],
                4,
                "`tokenizer.ggml.token_type`: 3 entries",
            ),
            (vec![("scores", vec![1f32; 5].into())], 4, "`tokenizer.ggml.scores`: 5 entries"),
            (vec![("eos_token_id", 4u32.into())], 4, "`tokenizer.ggml.eos_token_id`: 4"),
            (vec![("padding_token_id", (-1i32 as u32).into())], 4, "padding_token_id`: 4294967295"),
            (vec![("merges", vec!["b a".to_owned()].into())], 4, "where \"ba\" is no token"),
            (vec![], 3, "the tokenizer: token 3 (\"x\")"),
        ] {
            let faults = found(&of(&changes), size);
            assert!(faults.len() == 1 && faults[0].contains(expected), "{expected}: {faults:?}");
        }
    }
}
