use slim_formats::gguf::{Metadata, Value};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::*;

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// A token text, its score, its type.
type Entry = (String, f32, i32);

fn metadata(entries: &[Entry], more: &[(&str, Value)]) -> Metadata {
    let mut metadata = Metadata::new();
    let mut insert = |key: &str, value: Value| {
        metadata.insert(format!("tokenizer.ggml.{key}"), value).unwrap();
    };
    insert("tokens", entries.iter().map(|entry| entry.0.clone()).collect::<Vec<_>>().into());
    insert("scores", entries.iter().map(|entry| entry.1).collect::<Vec<_>>().into());
    insert("token_type", entries.iter().map(|entry| entry.2).collect::<Vec<_>>().into());
    for (key, value) in more {
        insert(key, value.clone());
    }
    metadata
}

fn build(metadata: Metadata) -> Result<Tokenizer> {
    Tokenizer::new(&TokenizerSource::Ggml(metadata))
}

fn refusal(metadata: Metadata) -> String {
    build(metadata).err().expect("a refusal").to_string()
}

const MERGES: &[&str] = &["Ġ t", "h e", "Ġt he", "1 2", "Ã ©"];

/// All bytes, the results of [`MERGES`], then `<|end|>` (id 261) and `<tool>` (id 262).
fn byte_level_metadata(pre: &str, more: &[(&str, Value)]) -> Metadata {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let bytes = alphabet.into_iter().map(String::from);
    let merged = MERGES.iter().map(|merge| merge.replace(' ', ""));
    let mut entries: Vec<Entry> = bytes.chain(merged).map(|text| (text, 0.0, NORMAL)).collect();
    entries.push(("<|end|>".to_owned(), 0.0, CONTROL));
    entries.push(("<tool>".to_owned(), 0.0, USER_DEFINED));
    let merges = MERGES.iter().map(|merge| merge.to_string()).collect::<Vec<_>>();
    let own: [(&str, Value); 3] =
        [("model", "gpt2".into()), ("pre", pre.into()), ("merges", merges.into())];
    metadata(&entries, &[&own[..], more].concat())
}

fn byte_level(pre: &str) -> Tokenizer {
    build(byte_level_metadata(pre, &[("bos_token_id", 261u32.into())])).unwrap()
}

/// `<unk>`, `<s>`, `</s>`, all bytes, then pieces (from id 259).
fn sentence_piece_metadata(more: &[(&str, Value)]) -> Metadata {
    let special = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)];
    let bytes = (0..=255).map(|byte| (format!("<0x{byte:02X}>"), 0.0, BYTE));
    let pieces = ["▁he", "he", "▁h", "llo", "lo", "ll", "▁", "h", "e", "l", "o"];
    let pieces = (0..).zip(pieces).map(|(rank, text)| (text.to_owned(), -(rank as f32), NORMAL));
    let special = special.map(|(text, token_type)| (text.to_owned(), 0.0, token_type));
    let entries: Vec<Entry> = special.into_iter().chain(bytes).chain(pieces).collect();
    let own: [(&str, Value); 3] = [
        ("model", "llama".into()),
        ("bos_token_id", 1u32.into()),
        ("unknown_token_id", 0u32.into()),
    ];
    metadata(&entries, &[&own[..], more].concat())
}

fn golden() -> Tokenizer {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/archs/llama/tokenizer.json");
    Tokenizer::new(&TokenizerSource::HuggingFace(std::fs::read_to_string(path).unwrap())).unwrap()
}

/// The vocabulary texts of a text's tokens.
fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let tokens = tokenizer.encode(text).unwrap();
    tokens.iter().map(|&token| tokenizer.token_text(token).unwrap()).collect()
}

/// Texts that tokenizers get wrong: control characters, joined and combining characters, the ends
/// of the planes, spaces of several kinds.
const HARD_TEXTS: &[&str] = &[
    "",
    " ",
    "the  the\n\n\tthe \r\n",
    "naïve é e\u{301} 日本語 עברית",
    "👩‍👩‍👧‍👦 🇩🇪 \u{10FFFF} \u{FFFD}\u{0}\u{7F}",
    "\u{A0}x\u{3000}y\u{200B}z",
    "2024-11-22 ½ ٣ Ⅷ 12345",
    "it's IT'S we'll <|end| <tool",
];

/// What a stream returns for each token, and at the end.
fn streamed(tokenizer: &Tokenizer, tokens: &[u32]) -> (Vec<Option<String>>, String) {
    let mut stream = TextStream::new(tokenizer, &[]);
    let texts = tokens.iter().map(|&token| stream.push(token).unwrap()).collect();
    (texts, stream.finish().unwrap())
}

#[test]
fn hard_texts_survive_the_round_trip_and_the_stream() {
    let all_names = ["default", "gpt-2", "smollm", "falcon", "llama-bpe", "tekken", "gpt-4o"];
    let mut tokenizers: Vec<Tokenizer> = all_names.map(byte_level).into();
    tokenizers.push(golden());
    tokenizers.push(build(sentence_piece_metadata(&[])).unwrap());
    for (index, tokenizer) in tokenizers.iter().enumerate() {
        for text in HARD_TEXTS {
            let tokens = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&tokens).unwrap(), *text, "tokenizer {index}");
            let (texts, rest) = streamed(tokenizer, &tokens);
            let text_of_stream = texts.into_iter().flatten().collect::<String>() + &rest;
            assert_eq!(text_of_stream, *text, "tokenizer {index}");
        }
    }
}

#[test]
fn byte_level_merges_within_words() {
    assert_eq!(pieces(&byte_level("gpt-2"), "the the"), ["t", "he", "Ġthe"]);
    assert_eq!(pieces(&byte_level("gpt-2"), "é"), ["Ã©"]);
}

#[test]
fn byte_level_pre_tokenizers_differ_where_their_models_do() {
    assert_eq!(pieces(&byte_level("gpt-2"), "1212"), ["12", "12"]);
    assert_eq!(pieces(&byte_level("smollm"), "1212"), ["1", "2", "1", "2"]);
    assert_eq!(pieces(&byte_level("qwen2"), "1212"), ["1", "2", "1", "2"]);
    assert_eq!(pieces(&byte_level("llama-bpe"), "1112"), ["1", "1", "1", "2"]);
    assert_eq!(pieces(&byte_level("qwen2"), "e\u{301}"), ["Ã©"]);
}

#[test]
fn byte_level_unknown_pre_tokenizer_is_refused() {
    let message = refusal(byte_level_metadata("brand-new", &[]));
    assert_eq!(message, "tokenizer: key `tokenizer.ggml.pre`: `brand-new` is not supported");
    assert_eq!(
        refusal(metadata(&[], &[("model", "gpt2".into())])),
        "tokenizer: key `tokenizer.ggml.pre` is missing or has a wrong type"
    );
}

#[test]
fn special_texts_become_tokens_and_leave_no_text() {
    let tokenizer = byte_level("smollm");
    let tokens = tokenizer.encode("the<|end|><tool>").unwrap();
    assert_eq!(tokens[2..], [261, 262]);
    assert_eq!(tokenizer.decode(&tokens).unwrap(), "the<tool>");
    assert_eq!(streamed(&tokenizer, &tokens).0[2..], [None, Some("<tool>".to_owned())]);
    assert_eq!(tokenizer.decode(&[261, 999_999]).unwrap(), "");
}

#[test]
fn lookups_go_both_ways() {
    let tokenizer = byte_level("smollm");
    assert_eq!(tokenizer.vocab_size(), 263);
    assert_eq!(tokenizer.token_id("<|end|>"), Some(261));
    assert_eq!(tokenizer.token_text(261).as_deref(), Some("<|end|>"));
    assert_eq!(tokenizer.token_id("absent"), None);
    assert_eq!(tokenizer.token_text(263), None);
}

#[test]
fn document_gets_the_tokens_that_the_file_asks_for() {
    let document = |pre, more: &[(&str, Value)]| {
        build(byte_level_metadata(pre, more)).unwrap().encode_document("he").unwrap()
    };
    let he = byte_level("smollm").token_id("he").unwrap();
    let ids = [("bos_token_id", 261u32.into()), ("eos_token_id", 262u32.into())];
    let flags = |bos: bool, eos: bool| {
        let flags = [("add_bos_token", bos.into()), ("add_eos_token", eos.into())];
        [&ids[..], &flags[..]].concat()
    };
    assert_eq!(document("smollm", &ids), [he]);
    assert_eq!(document("llama-bpe", &ids), [261, he]);
    assert_eq!(document("llama-bpe", &flags(false, true)), [he, 262]);
    assert_eq!(document("smollm", &flags(true, true)), [261, he, 262]);
}

#[test]
fn document_token_outside_the_vocabulary_is_refused() {
    let more = [("add_bos_token", true.into()), ("bos_token_id", 9_999u32.into())];
    let message = refusal(byte_level_metadata("smollm", &more));
    assert_eq!(
        message,
        "tokenizer: key `tokenizer.ggml.bos_token_id`: 9999 is not one of 263 tokens"
    );
}

#[test]
fn sentence_piece_merges_by_score() {
    let tokenizer = build(sentence_piece_metadata(&[])).unwrap();
    assert_eq!(pieces(&tokenizer, "hello he"), ["▁he", "llo", "▁he"]);
    assert_eq!(tokenizer.encode_document("he").unwrap(), [1, 259]);
}

#[test]
fn sentence_piece_spells_unknown_characters_as_bytes() {
    let tokenizer = build(sentence_piece_metadata(&[])).unwrap();
    assert_eq!(pieces(&tokenizer, "hé"), ["▁h", "<0xC3>", "<0xA9>"]);
}

#[test]
fn sentence_piece_puts_a_space_in_front_where_the_file_says_so() {
    let with = build(sentence_piece_metadata(&[])).unwrap();
    let without = build(sentence_piece_metadata(&[("add_space_prefix", false.into())])).unwrap();
    assert_eq!(pieces(&with, "he"), ["▁he"]);
    assert_eq!(pieces(&with, "</s>he"), ["</s>", "▁he"]);
    assert_eq!(pieces(&without, "he"), ["he"]);
    assert_eq!(with.decode(&[259, 259]).unwrap(), "he he");
    assert_eq!(without.decode(&[259, 259]).unwrap(), " he he");
}

#[test]
fn keys_that_contradict_each_other_are_refused() {
    let entries = [("a".to_owned(), 0.0, NORMAL)];
    let merges: Value = vec!["a b".to_owned()].into();
    let own = [("model", "gpt2".into()), ("pre", "gpt-2".into()), ("merges", merges)];
    assert_eq!(refusal(metadata(&entries, &own)), "tokenizer: merge `a b` does not give a token");

    let mut short = Metadata::new();
    short.insert("tokenizer.ggml.tokens", vec!["a".to_owned(), "b".to_owned()]).unwrap();
    short.insert("tokenizer.ggml.token_type", vec![NORMAL]).unwrap();
    assert_eq!(
        refusal(short),
        "tokenizer: key `tokenizer.ggml.token_type`: 1 entries for 2 tokens"
    );

    let message = refusal(metadata(&entries, &[("model", "bert".into())]));
    assert_eq!(message, "tokenizer: key `tokenizer.ggml.model`: `bert` is not supported");
    let message = Tokenizer::new(&TokenizerSource::Missing).err().unwrap().to_string();
    assert_eq!(message, "tokenizer: the model has none");
}

#[test]
fn golden_tokenizer_matches_hugging_face() {
    let tokenizer = golden();
    assert_eq!(tokenizer.vocab_size(), 271);
    // tokenizers 0.23, Python: encode("the man and the end<|im_end|>", add_special_tokens=False).
    let expected = [83, 257, 220, 76, 64, 77, 266, 259, 220, 68, 265, 270];
    assert_eq!(tokenizer.encode("the man and the end<|im_end|>").unwrap(), expected);
}

#[test]
fn hugging_face_truncation_is_ignored() {
    let json = r#"{"version": "1.0", "added_tokens": [],
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
    let tokenizer = Tokenizer::new(&TokenizerSource::HuggingFace(json.to_owned())).unwrap();
    assert_eq!(tokenizer.encode("aaaa").unwrap(), [0, 0, 0, 0]);
}

#[test]
fn hugging_face_files_that_would_panic_the_library_are_refused() {
    let refusal = |vocab: &str, model: &str, processor: &str| {
        let json = format!(
            r#"{{"version": "1.0", "added_tokens": [], "post_processor": {processor},
                "model": {{"type": "BPE", "vocab": {vocab}, {model}}}}}"#
        );
        let tokenizer = Tokenizer::new(&TokenizerSource::HuggingFace(json));
        tokenizer.err().expect("a refusal").to_string()
    };
    let vocab = r#"{"a": 0, "b": 1, "#;
    let no_merge = r#""merges": []"#;
    for merges in [r#""merges": ["a b"]"#, r#""merges": [["a", "b"]]"#, r#""merges": [[]]"#] {
        let message = refusal(r#"{"a": 0, "b": 1}"#, merges, "null");
        assert!(message.contains("does not give a token"), "{message}");
    }
    let prefixed = r#""merges": [["a", "b"]], "continuing_subword_prefix": "longer""#;
    assert!(refusal(r#"{"a": 0, "b": 1}"#, prefixed, "null").contains("does not give a token"));
    for piece in [
        r###"{"SpecialToken": {"id": "<s>", "type_id": 0}}"###,
        r###"{"Sequence": {"id": "B", "type_id": 0}}"###,
    ] {
        let template = format!(
            r#"{{"type": "TemplateProcessing", "single": [{piece}], "pair": [], "special_tokens": {{}}}}"#
        );
        let nested = format!(r#"{{"type": "Sequence", "processors": [{template}]}}"#);
        for processor in [template, nested] {
            let message = refusal(r#"{"a": 0}"#, no_merge, &processor);
            assert!(message.contains("is not defined"), "{message}");
        }
    }
    let message = refusal(vocab, no_merge, "null");
    assert_eq!(message, "tokenizer: `tokenizer.json` cannot be read");
}

#[test]
fn stream_waits_for_whole_characters() {
    let tokenizer = byte_level("smollm");
    let tokens = tokenizer.encode("a日b").unwrap();
    let (texts, rest) = streamed(&tokenizer, &tokens);
    let texts: Vec<_> = texts.iter().map(Option::as_deref).collect();
    assert_eq!(texts, [Some("a"), None, None, Some("日"), Some("b")]);
    assert_eq!(rest, "");
}

#[test]
fn stream_gives_broken_characters_at_the_end() {
    let tokenizer = byte_level("smollm");
    let tokens = tokenizer.encode("日").unwrap();
    let (texts, rest) = streamed(&tokenizer, &tokens[..2]);
    assert_eq!((texts, rest.as_str()), (vec![None, None], "\u{FFFD}"));
}

#[test]
fn stream_does_not_wait_for_ever() {
    let tokenizer = byte_level("smollm");
    let continuation = tokenizer.encode("日").unwrap()[1];
    let (texts, rest) = streamed(&tokenizer, &[continuation; 1_000]);
    let returned: String = texts.into_iter().flatten().collect();
    assert_eq!(returned.len() + rest.len(), "\u{FFFD}".len() * 1_000);
    assert!(rest.len() < returned.len());
}

#[test]
fn stream_keeps_the_space_between_tokens() {
    let tokenizer = build(sentence_piece_metadata(&[])).unwrap();
    let he = tokenizer.token_id("▁he").unwrap();
    assert_eq!(streamed(&tokenizer, &[he, he]).0, [Some("he".to_owned()), Some(" he".to_owned())]);
    let mut continued = TextStream::new(&tokenizer, &[he, 2]);
    assert_eq!(continued.push(he).unwrap().as_deref(), Some(" he"));
}

#[test]
fn stream_survives_broken_bytes_after_a_whole_character() {
    let tokenizer = build(sentence_piece_metadata(&[])).unwrap();
    let byte = |byte: u8| tokenizer.token_id(&format!("<0x{byte:02X}>")).unwrap();
    let h = tokenizer.token_id("h").unwrap();
    let (texts, rest) = streamed(&tokenizer, &[byte(0xC3), byte(0xA9), byte(0xFF), h]);
    let texts: Vec<_> = texts.iter().map(Option::as_deref).collect();
    assert_eq!(texts, [None, Some("é"), None, Some("\u{FFFD}h")]);
    assert_eq!(rest, "");
}

/// The keys of a tokenizer, after a way through the text of a `tokenizer.json`.
fn keys_of(tokenizer: &Tokenizer) -> Result<Metadata> {
    ggml_keys(&tokenizer.to_json()?, 300, false)
}

#[test]
fn ggml_keys_give_the_tokens_of_the_json() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/archs/llama/tokenizer.json");
    let json = std::fs::read_to_string(path).unwrap();
    let keys = ggml_keys(&json, 320, false).unwrap();
    assert_eq!(keys.strings("tokenizer.ggml.tokens").unwrap().len(), 320);
    assert_eq!(keys.bool("tokenizer.ggml.add_bos_token"), Some(false));
    let (expected, found) = (golden(), build(keys).unwrap());
    for text in HARD_TEXTS.iter().chain(&["<s>the<|im_start|>user"]) {
        let tokens = expected.encode(text).unwrap();
        assert_eq!(found.encode(text).unwrap(), tokens, "{text}");
        assert_eq!(found.decode(&tokens).unwrap(), expected.decode(&tokens).unwrap());
    }
    // Unused ids have no text.
    assert_eq!(found.decode(&[300, 301]).unwrap(), "");
    let token_type = keys_of(&expected).unwrap();
    let types = token_type.get("tokenizer.ggml.token_type").unwrap().as_array().unwrap();
    let types = types.to_u64s().unwrap();
    assert_eq!([types[0], types[267], types[299]], [1, 3, 5]);
}

#[test]
fn ggml_keys_name_every_pre_tokenizer_that_is_read() {
    for (name, found) in [
        ("default", "default"),
        ("gpt-2", "gpt-2"),
        ("mpt", "gpt-2"),
        ("smollm", "smollm"),
        ("falcon", "falcon"),
        ("llama3", "llama-bpe"),
        ("dbrx", "dbrx"),
        ("qwen2", "qwen2"),
        ("stablelm2", "stablelm2"),
        ("tekken", "tekken"),
        ("gpt-4o", "gpt-4o"),
    ] {
        let keys = keys_of(&byte_level(name)).unwrap();
        assert_eq!(keys.str("tokenizer.ggml.pre"), Some(found));
    }
}

#[test]
fn ggml_keys_keep_the_tokens_around_a_document() {
    for (bos, eos) in [(false, false), (true, false), (true, true)] {
        let flags: [(&str, Value); 4] = [
            ("add_bos_token", bos.into()),
            ("add_eos_token", eos.into()),
            ("bos_token_id", 261u32.into()),
            ("eos_token_id", 262u32.into()),
        ];
        let keys = keys_of(&build(byte_level_metadata("gpt-2", &flags)).unwrap()).unwrap();
        assert_eq!(keys.bool("tokenizer.ggml.add_bos_token"), Some(bos));
        assert_eq!(keys.u64("tokenizer.ggml.bos_token_id"), bos.then_some(261));
        assert_eq!(keys.bool("tokenizer.ggml.add_eos_token"), Some(eos));
        assert_eq!(keys.u64("tokenizer.ggml.eos_token_id"), eos.then_some(262));
    }
}

#[test]
fn ggml_keys_that_would_give_other_tokens_are_refused() {
    let json: serde_json::Value = serde_json::from_str(&golden().to_json().unwrap()).unwrap();
    let refusal = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut json = json.clone();
        change(&mut json);
        ggml_keys(&json.to_string(), 320, false).expect_err("a refusal").to_string()
    };
    for (change, message) in [
        (
            &(|json: &mut serde_json::Value| json["added_tokens"][0]["lstrip"] = true.into())
                as &dyn Fn(&mut serde_json::Value),
            "`lstrip` of token `<s>`",
        ),
        (&|json| json["pre_tokenizer"]["add_prefix_space"] = true.into(), "the pre-tokenizer"),
        (&|json| json["normalizer"] = serde_json::json!({"type": "NFKC"}), "the normalizer"),
        (&|json| json["pre_tokenizer"] = serde_json::Value::Null, "not byte-level"),
    ] {
        let found = refusal(change);
        assert!(found.contains(message), "`{message}` in {found}");
    }
    let sentence_piece = build(sentence_piece_metadata(&[])).unwrap();
    assert!(keys_of(&sentence_piece).is_err());
    let too_small = ggml_keys(&json.to_string(), 100, false).err().unwrap().to_string();
    assert!(too_small.contains("of a model with 100 tokens"), "{too_small}");
}
