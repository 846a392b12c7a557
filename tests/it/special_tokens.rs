//! Start, stop and chat tokens: the same from every container, wherever a model's files name them.

use std::path::Path;

use serde_json::{Value, json};
use slim_formats::{ModelSource, open_model};
use slim_runtime::{ChatFormat, Message, Tokenizer, document_tokens, end_tokens};

use crate::command::{Dir, arg, succeed, tiny_model};

/// Ids of the tiny models.
const BOS: u32 = 267;
const EOS: u32 = 268;
const IM_END: u32 = 270;

/// A JSON file, by name, and what is changed in it.
type Edit<'a> = (&'a str, &'a dyn Fn(&mut Value));

/// The tiny model `llama` in a folder of its own, with edited files.
fn edited(edits: &[Edit<'_>]) -> Dir {
    let dir = Dir::new();
    for entry in std::fs::read_dir(tiny_model("llama")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path(path.file_name().unwrap().to_str().unwrap())).unwrap();
    }
    for (name, edit) in edits {
        let text = std::fs::read_to_string(dir.path(name)).unwrap_or_else(|_| "{}".to_owned());
        let mut json = serde_json::from_str(&text).unwrap();
        edit(&mut json);
        dir.write(name, json.to_string());
    }
    dir
}

/// A SliM file of a model, and a GGUF file of that.
fn converted(dir: &Dir, source: &Path) -> [String; 2] {
    let (slim, gguf) = (dir.arg("out.slim.gguf"), dir.arg("out.gguf"));
    succeed(&["convert", &arg(source), "-o", &slim, "--method", "rtn", "--group-size", "16"]);
    succeed(&["export", &slim, "--to", "gguf", "-o", &gguf]);
    [slim, gguf]
}

/// What a model's text begins with and ends at: tokens of a prompt, of a chat, and the ends.
fn behaviour(model: &str) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let source = open_model(Path::new(model)).unwrap();
    let source: &dyn ModelSource = &*source;
    let tokenizer = Tokenizer::new(source.tokenizer()).unwrap();
    let prompt = document_tokens(&tokenizer, source.config(), "the cat").unwrap();
    let template = source.chat_template().unwrap();
    let (format, _) = ChatFormat::new(template, source.config(), &tokenizer).unwrap();
    let chat = format.tokens(&[Message::new("user", "the cat")], &[]).unwrap();
    (prompt, chat, end_tokens(source, &tokenizer))
}

/// Checks that a folder and what is made of it behave the same, and gives how.
fn same_everywhere(dir: &Dir) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let expected = behaviour(&arg(dir.root()));
    for file in converted(dir, dir.root()) {
        assert_eq!(behaviour(&file), expected, "{file}");
    }
    expected
}

/// Gives the end of a turn a text that nobody knows.
fn rename_turn_end(json: &mut Value) {
    json["added_tokens"][3]["content"] = "<turn-end>".into();
}

#[test]
fn turn_end_of_the_tokenizers_settings_stops_everywhere() {
    let dir = edited(&[
        ("tokenizer.json", &rename_turn_end),
        ("tokenizer_config.json", &|json| json["eos_token"] = "<turn-end>".into()),
    ]);
    dir.write("chat_template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}");
    assert_eq!(same_everywhere(&dir).2, [IM_END, EOS]);
}

#[test]
fn turn_end_that_only_the_template_writes_stops_everywhere() {
    let dir = edited(&[("tokenizer.json", &rename_turn_end)]);
    dir.write(
        "chat_template.jinja",
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<turn-end>\n{% endfor %}",
    );
    assert_eq!(same_everywhere(&dir).2, [EOS, IM_END]);
}

#[test]
fn added_tokens_of_the_settings_are_found_everywhere() {
    let dir = edited(&[
        ("tokenizer.json", &|json| json["added_tokens"].as_array_mut().unwrap().truncate(2)),
        ("tokenizer_config.json", &|json| {
            json["added_tokens_decoder"] = json!({
                "269": {"content": "<|im_start|>", "special": true},
                "270": {"content": "<|im_end|>", "special": true},
            });
        }),
    ]);
    let whole = edited(&[]);
    assert_eq!(same_everywhere(&dir), behaviour(&arg(whole.root())));
}

#[test]
fn bos_is_the_same_everywhere() {
    let post_processor = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
    });
    let none = |_: &mut Value| {};
    let by_settings = |json: &mut Value| json["add_bos_token"] = true.into();
    let by_tokenizer = |json: &mut Value| json["post_processor"] = post_processor.clone();
    type Edit<'a> = &'a dyn Fn(&mut Value);
    let cases: [(Edit<'_>, Edit<'_>, bool); 3] =
        [(&none, &none, false), (&none, &by_settings, true), (&by_tokenizer, &none, true)];
    for (tokenizer, settings, adds) in cases {
        for template in ["", "{{ bos_token }}"] {
            let dir = edited(&[("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)]);
            let rest = std::fs::read_to_string(dir.path("chat_template.jinja")).unwrap();
            dir.write("chat_template.jinja", format!("{template}{rest}"));
            let (prompt, chat, _) = same_everywhere(&dir);
            let count = |tokens: &[u32]| tokens.iter().filter(|&&token| token == BOS).count();
            assert_eq!(count(&prompt), usize::from(adds), "{template}");
            assert_eq!(count(&chat), usize::from(adds || !template.is_empty()), "{template}");
        }
    }
}

#[test]
fn chat_templates_are_found_where_transformers_keeps_them() {
    let template = |dir: &Dir| open_model(dir.root()).unwrap().chat_template().map(str::to_owned);
    let list = json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
    let dir = edited(&[("tokenizer_config.json", &|json| json["chat_template"] = list.clone())]);
    std::fs::remove_file(dir.path("chat_template.jinja")).unwrap();
    assert_eq!(template(&dir).as_deref(), Some("d"));
    std::fs::create_dir(dir.path("additional_chat_templates")).unwrap();
    dir.write("additional_chat_templates/tool_use.jinja", "other");
    assert_eq!(template(&dir).as_deref(), Some("d"));
    dir.write("additional_chat_templates/default.jinja", "folder");
    assert_eq!(template(&dir).as_deref(), Some("folder"));
    dir.write("chat_template.jinja", "file");
    assert_eq!(template(&dir).as_deref(), Some("file"));
}

/// The story: unsloth#5070, a GGUF file that types the tokens of its own template as ordinary text.
#[test]
fn gguf_with_template_tokens_typed_as_text_is_mended_and_says_so() {
    let dir = edited(&[]);
    let expected = behaviour(&arg(dir.root()));
    let [_, gguf] = converted(&dir, dir.root());
    let mut bytes = std::fs::read(&gguf).unwrap();
    // The types of the tokens are an array of i32 behind its key; 269 and 270 are the turns'.
    let key = b"tokenizer.ggml.token_type";
    let start = bytes.windows(key.len()).position(|window| window == key).unwrap();
    let types = start + key.len() + 4 + 4 + 8;
    for id in [269, 270] {
        let place = types + 4 * id..types + 4 * id + 4;
        assert_eq!(bytes[place.clone()], [3, 0, 0, 0]);
        bytes[place].copy_from_slice(&[1, 0, 0, 0]);
    }
    let broken = dir.write("broken.gguf", bytes);
    assert_eq!(behaviour(&broken), expected);
    let answer = succeed(&["run", &broken, "--chat", "-p", "hi", "-n", "1"]);
    for text in ["warning: ", "`<|im_start|>`", "`<|im_end|>`"] {
        assert!(answer.stderr.contains(text), "no {text} in\n{}", answer.stderr);
    }
}
