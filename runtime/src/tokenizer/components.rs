//! Parts of a `tokenizer.json` that would take the library's memory or never end. What makes it
//! panic is caught where it is called (`guard.rs`).

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Map, Value as Json};

use crate::{Result, RuntimeError};

/// How much longer than a text its normal form may be, or than its tokens what they are decoded to.
/// SentencePiece's space is three times as long as a space.
const MAX_GROWTH: u64 = 1024;

/// Refuses what no text can be used with.
pub(super) fn check_components(tokenizer: &Json) -> Result<()> {
    for section in ["normalizer", "pre_tokenizer", "decoder"] {
        let mut growth = 1;
        check(section, &tokenizer[section], &mut growth)?;
    }
    Ok(())
}

/// Checks a component and those in it; multiplies `growth` by what it makes of a text. Components
/// are known by their fields: the library also takes them without a type.
fn check(section: &str, component: &Json, growth: &mut u64) -> Result<()> {
    let refused = |what: String| Err(RuntimeError::tokenizer(format!("{section}: {what}")));
    if let Json::Array(components) = component {
        return components.iter().try_for_each(|component| check(section, component, growth));
    }
    let Json::Object(fields) = component else { return Ok(()) };
    if fields.get("length").is_some_and(|length| length == 0) {
        return refused("pieces of no characters".to_owned());
    }
    if fields.get("pattern").is_some_and(|pattern| pattern["String"] == "") {
        return refused("a pattern without a character".to_owned());
    }
    let factor = match fields.get("precompiled_charsmap").and_then(Json::as_str) {
        Some(text) => match longest_replacement(text) {
            Some(longest) => longest,
            None => return refused("a `precompiled_charsmap` that is cut short".to_owned()),
        },
        None => replacement_growth(fields),
    };
    *growth = growth.saturating_mul(factor.max(1));
    if *growth > MAX_GROWTH {
        return refused(format!("it makes a text more than {MAX_GROWTH} times as long"));
    }
    fields.values().try_for_each(|field| check(section, field, growth))
}

/// How many times as long as what it stands for a replacement is, at most.
fn replacement_growth(fields: &Map<String, Json>) -> u64 {
    let (Some(pattern), Some(content)) = (fields.get("pattern"), fields.get("content")) else {
        return 1;
    };
    // An expression may match a single byte.
    let matched = pattern["String"].as_str().map_or(1, str::len).max(1);
    content.as_str().map_or(0, str::len).div_ceil(matched) as u64
}

/// The longest replacement of a SentencePiece normalizer: the bytes of a trie, the trie, and texts
/// that end with a zero. `None` if the trie is longer than all.
fn longest_replacement(charsmap: &str) -> Option<u64> {
    let bytes = BASE64_STANDARD.decode(charsmap).ok()?;
    let (size, rest) = bytes.split_first_chunk::<4>()?;
    let texts = rest.get(u32::from_le_bytes(*size) as usize..)?;
    texts.split(|&byte| byte == 0).map(|text| text.len() as u64).max()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(section: &str, component: Json) -> String {
        check_components(&json!({ section: component })).unwrap_err().to_string()
    }

    fn replace(pattern: Json, content: &str) -> Json {
        json!({ "type": "Replace", "pattern": pattern, "content": content })
    }

    #[test]
    fn components_of_real_tokenizers_pass() {
        let text = BASE64_STANDARD.encode(b"\x04\0\0\0trieab\0c\0");
        let normalizer = json!({ "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            replace(json!({ "String": " " }), "▁"),
            replace(json!({ "Regex": " {2,}" }), " "),
            { "type": "Precompiled", "precompiled_charsmap": text },
        ] });
        let pre_tokenizer = json!({ "type": "FixedLength", "length": 3 });
        let tokenizer = json!({ "normalizer": normalizer, "pre_tokenizer": pre_tokenizer });
        check_components(&tokenizer).unwrap();
    }

    #[test]
    fn components_that_take_memory_or_never_end_are_refused() {
        assert!(refusal("pre_tokenizer", json!({ "length": 0 })).contains("no characters"));
        let empty = replace(json!({ "String": "" }), "x");
        assert!(refusal("decoder", json!({ "decoders": [empty] })).contains("without a character"));
        let ten = replace(json!({ "Regex": "." }), "aaaaaaaaaa");
        let chain = json!({ "type": "Sequence", "normalizers": [ten, ten, ten, ten] });
        assert!(refusal("normalizer", chain).contains("1024 times"));
        for (bytes, reason) in [
            (b"\xff\xff\xff\xff".to_vec(), "cut short"),
            (b"\0\0".to_vec(), "cut short"),
            ([&[0; 4][..], &[b'a'; 2000]].concat(), "1024 times"),
        ] {
            let component = json!({ "precompiled_charsmap": BASE64_STANDARD.encode(bytes) });
            assert!(refusal("normalizer", component).contains(reason), "{reason}");
        }
    }
}
