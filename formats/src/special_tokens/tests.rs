use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::{
    TokenizerSource,
    gguf::{Metadata, token_type},
};

/// A `tokenizer.json` with ordinary tokens from id 0, then added ones, of which those are special
/// that `is_special` says.
fn tokenizer_json(ordinary: &[&str], added: &[(&str, bool)]) -> String {
    let vocab: Value = ordinary.iter().zip(0..).map(|(text, id)| (text.to_string(), id)).collect();
    let ids = ordinary.len()..;
    let added = added
        .iter()
        .zip(ids)
        .map(|(&(content, special), id)| json!({"id": id, "content": content, "special": special}));
    let added: Vec<Value> = added.collect();
    json!({"added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": []}})
        .to_string()
}

/// The files of a folder, by name, as one object.
fn read(files: &Value, tokenizer: &str) -> crate::Result<SpecialTokens> {
    let vocabulary = Vocabulary::of(&TokenizerSource::HuggingFace(tokenizer.to_owned()));
    let files = token_files(files);
    SpecialTokens::from_hugging_face(Path::new("config.json"), &files, &vocabulary, 100)
}

fn token_files(files: &Value) -> TokenFiles<'_> {
    TokenFiles {
        tokenizer: &files["tokenizer_config"],
        special_tokens_map: &files["special_tokens_map"],
        added_tokens: &files["added_tokens"],
        ..TokenFiles::of_model(&files["config"], files.get("generation_config"))
    }
}

/// Ids 0 `a`, 1 `</s>`, then special: 2 `<s>`, 3 `<|endoftext|>`, 4 `<turn-end>`.
fn vocabulary() -> String {
    let special = ["<s>", "<|endoftext|>", "<turn-end>"].map(|text| (text, true));
    tokenizer_json(&["a", "</s>"], &special)
}

#[test]
fn turn_end_of_the_tokenizers_settings_is_the_main_one() {
    let plain =
        json!({"config": {"eos_token_id": 3}, "tokenizer_config": {"eos_token": "<turn-end>"}});
    let object = json!({"config": {"eos_token_id": 3},
        "tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": "<turn-end>"}}});
    let map = json!({"config": {"eos_token_id": 3},
        "special_tokens_map": {"eos_token": {"content": "<turn-end>"}}});
    let more =
        json!({"config": {"eos_token_id": 3}, "tokenizer_config": {"eot_token": "<turn-end>"}});
    for (files, ends) in [(plain, [4, 3]), (object, [4, 3]), (map, [4, 3]), (more, [3, 4])] {
        assert_eq!(read(&files, &vocabulary()).unwrap().ends, ends, "{files}");
    }
}

#[test]
fn older_map_counts_more_unless_the_settings_list_the_added_tokens() {
    let files = |settings: Value| json!({"special_tokens_map": {"eos_token": "<turn-end>"}, "tokenizer_config": settings});
    let main = |files: Value| read(&files, &vocabulary()).unwrap().ends[0];
    assert_eq!(main(files(json!({"eos_token": "<s>"}))), 4);
    assert_eq!(main(files(json!({"eos_token": "<s>", "added_tokens_decoder": {}}))), 2);
}

#[test]
fn ends_of_all_files_come_together_once_each() {
    let files = json!({
        "config": {"eos_token_id": [3, 2], "bos_token_id": 2},
        "generation_config": {"eos_token_id": [4, 3]},
        "tokenizer_config": {"eos_token": "<|endoftext|>", "add_bos_token": true},
    });
    let found = read(&files, &vocabulary()).unwrap();
    assert_eq!(found, SpecialTokens { bos: Some(2), ends: vec![3, 4, 2], add_bos: true });
}

#[test]
fn left_over_id_of_ordinary_text_ends_nothing() {
    let files = json!({"config": {"eos_token_id": 0}, "generation_config": {"eos_token_id": 4}});
    assert_eq!(read(&files, &vocabulary()).unwrap().ends, [4, 3]);
    // Nothing else says it: transformers stops there.
    let alone = json!({"config": {"eos_token_id": 0}});
    assert_eq!(read(&alone, &vocabulary()).unwrap().ends, [0, 3]);
}

#[test]
fn settings_without_a_first_token_are_believed() {
    let files = json!({"config": {"bos_token_id": 3}, "tokenizer_config": {"bos_token": null}});
    assert_eq!(read(&files, &vocabulary()).unwrap().bos, None);
    let silent = json!({"config": {"bos_token_id": 3}, "tokenizer_config": {}});
    assert_eq!(read(&silent, &vocabulary()).unwrap().bos, Some(3));
}

#[test]
fn id_that_is_no_token_is_refused_with_its_file() {
    for (file, id) in [("config", json!(100)), ("generation_config", json!([1, -1]))] {
        let files = json!({file: {"eos_token_id": id}});
        let message = read(&files, &vocabulary()).unwrap_err().to_string();
        let expected =
            format!("`{file}.json`: key `eos_token_id`: found {id}, expected token ids below 100");
        assert_eq!(message, expected);
    }
}

#[test]
fn well_known_texts_end_as_the_tokens_that_they_are() {
    let ends = |ordinary: &[&str], added: &[(&str, bool)]| {
        read(&Value::Null, &tokenizer_json(ordinary, added)).unwrap().ends
    };
    for text in
        ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|eom_id|>"]
    {
        assert_eq!(ends(&["a"], &[(text, true)]), [1], "{text}");
        // A file that types them as ordinary text is wrong.
        assert_eq!(ends(&["a", text], &[]), [1], "{text}");
    }
    for text in ["</s>", "<EOT>", "<|END_OF_TURN_TOKEN|>"] {
        assert_eq!(ends(&["a"], &[(text, true)]), [1], "{text}");
        // These may be text, as `</s>` is for Gemma.
        assert_eq!(ends(&["a", text], &[(text, false)]), [] as [u32; 0], "{text}");
        assert_eq!(ends(&["a", text], &[]), [] as [u32; 0], "{text}");
    }
    // Here `<|end|>` ends a part of a message.
    let parts = ["<|return|>", "<|end|>", "<|call|>"].map(|text| (text, true));
    assert_eq!(ends(&["a"], &parts), [1, 3]);
}

/// The keys of a file with the tokens of [`vocabulary()`], and more.
fn ggml(more: &[(&str, crate::gguf::Value)]) -> Metadata {
    let mut metadata = Metadata::new();
    let tokens = ["a", "</s>", "<s>", "<|endoftext|>", "<turn-end>", "<|im_end|>"];
    let (normal, control) = (token_type::NORMAL as i32, token_type::CONTROL as i32);
    let types = vec![normal, normal, control, control, control, normal];
    metadata.insert("tokenizer.ggml.model", "gpt2").unwrap();
    metadata.insert("tokenizer.ggml.pre", "gpt-2").unwrap();
    metadata.insert("tokenizer.ggml.tokens", tokens.map(str::to_owned).to_vec()).unwrap();
    metadata.insert("tokenizer.ggml.token_type", types).unwrap();
    for (key, value) in more {
        metadata.insert(format!("tokenizer.ggml.{key}"), value.clone()).unwrap();
    }
    metadata
}

fn from_ggml(more: &[(&str, crate::gguf::Value)]) -> crate::Result<SpecialTokens> {
    SpecialTokens::from_gguf(Path::new("m.gguf"), &ggml(more), 6)
}

#[test]
fn ggml_eos_that_is_not_the_turn_end_is_joined_by_it() {
    let found = from_ggml(&[("eos_token_id", 3u32.into())]).unwrap();
    assert_eq!(found, SpecialTokens { bos: None, ends: vec![3, 5], add_bos: false });
    let keys = [
        ("eos_token_id", 3u32.into()),
        ("eot_token_id", 4u32.into()),
        ("eom_token_id", 2u32.into()),
    ];
    assert_eq!(from_ggml(&keys).unwrap().ends, [3, 4, 2, 5]);
}

#[test]
fn ggml_id_that_is_no_token_is_refused() {
    let message = from_ggml(&[("eos_token_id", 6u32.into())]).unwrap_err().to_string();
    let key = "key `tokenizer.ggml.eos_token_id`";
    assert_eq!(message, format!("`m.gguf`: {key}: found 6, expected a token id below 6"));
}

#[test]
fn ggml_defaults_are_those_of_llama_cpp() {
    let mut metadata = Metadata::new();
    metadata.insert("tokenizer.ggml.model", "llama").unwrap();
    metadata.insert("tokenizer.ggml.tokens", vec!["a".to_owned(); 6]).unwrap();
    let found = SpecialTokens::from_gguf(Path::new("m.gguf"), &metadata, 6).unwrap();
    assert_eq!(found, SpecialTokens { bos: Some(1), ends: vec![2], add_bos: true });
    for (pre, add_bos) in [("llama-bpe", true), ("tekken", true), ("qwen2", false)] {
        let mut metadata = Metadata::new();
        metadata.insert("tokenizer.ggml.model", "gpt2").unwrap();
        metadata.insert("tokenizer.ggml.pre", pre).unwrap();
        assert_eq!(GgmlDefaults::of(&metadata).add_bos, add_bos, "{pre}");
    }
}

#[test]
fn slim_file_that_lists_one_end_gets_those_of_its_tokenizer() {
    let mut metadata = Metadata::new();
    metadata.insert("tokenizer.ggml.eos_token_id", 3u32).unwrap();
    let json = tokenizer_json(&["a", "</s>"], &[("<|endoftext|>", true), ("<|im_end|>", true)]);
    metadata.insert("tokenizer.huggingface.json", json.as_str()).unwrap();
    let found = SpecialTokens::from_gguf(Path::new("m.gguf"), &metadata, 6).unwrap();
    assert_eq!(found.ends, [3, 2]);
}

/// Id, text and whether it is special of the added tokens that `files` complete a tokenizer with.
fn completed(files: &Value) -> Option<Vec<(u64, String, bool)>> {
    let json = tokenizer_json(&["a", "</s>"], &[("<s>", true)]);
    let vocabulary = Vocabulary::of(&TokenizerSource::HuggingFace(json.clone()));
    let whole = with_added_tokens(&json, &token_files(files), &vocabulary)?;
    let whole: Value = serde_json::from_str(&whole).unwrap();
    let added = whole["added_tokens"].as_array().unwrap().iter().skip(1).map(|token| {
        let text = token["content"].as_str().unwrap().to_owned();
        (token["id"].as_u64().unwrap(), text, token["special"] == true)
    });
    Some(added.collect())
}

#[test]
fn added_tokens_of_the_settings_complete_the_tokenizer() {
    let decoder = json!({"tokenizer_config": {"added_tokens_decoder": {
        "2": {"content": "<s>", "special": true},
        "3": {"content": "<|im_end|>", "special": true},
        "1": {"content": "</s>"},
        "9": {"content": "<far>"},
    }}});
    let found = completed(&decoder).unwrap();
    assert_eq!(found, [(1, "</s>".to_owned(), false), (3, "<|im_end|>".to_owned(), true)]);
    let older = json!({"added_tokens": {"<|im_end|>": 3}, "special_tokens_map": {"eos_token": "<|im_end|>"}});
    assert_eq!(completed(&older).unwrap(), [(3, "<|im_end|>".to_owned(), true)]);
    let named = json!({"tokenizer_config": {"eos_token": "</s>", "pad_token": "<nowhere>"}});
    assert_eq!(completed(&named).unwrap(), [(1, "</s>".to_owned(), true)]);
    assert_eq!(completed(&json!({"tokenizer_config": {"bos_token": "<s>"}})), None);
}
