//! Texts from files, from names and from arguments never reach a terminal as what it would obey.

use serde_json::Value;

use crate::command::{Answer, Dir, slimllm};

/// Colours, a title, a C1 control, a line of its own, and a change of direction.
const HOSTILE: &str =
    "a\u{1b}[31m\u{1b}]0;b\u{7}\u{9b}2J\r\u{7f}c\nno faults\u{202e}d\u{2066}e\u{2028}";

/// Whether all that was printed can be shown, in as many lines as were to be.
fn assert_tame(answer: &Answer) {
    for text in [&answer.stdout, &answer.stderr] {
        let obeyed = text.chars().find(|&c| {
            c.is_control() && c != '\n'
                || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        });
        assert_eq!(obeyed, None, "{text:?}");
        assert!(!text.lines().any(|line| line.starts_with("no faults\\")), "{text:?}");
    }
}

fn string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// A GGUF file with hostile texts wherever there are any; its tensor holds `value`.
fn hostile_gguf(dir: &Dir, value: f32) -> String {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(3u64.to_le_bytes());
    for key in ["general.architecture", "general.name", HOSTILE] {
        string(&mut bytes, key);
        bytes.extend(8u32.to_le_bytes());
        string(&mut bytes, HOSTILE);
    }
    string(&mut bytes, HOSTILE);
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.extend(value.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    dir.write("hostile.gguf", bytes)
}

#[test]
fn texts_of_a_file_are_made_visible() {
    let dir = Dir::new();
    for (value, code) in [(1.0, 0), (f32::NAN, 1)] {
        let file = &hostile_gguf(&dir, value);
        let shown = slimllm(&["inspect", file, "--tensors", "--metadata", "--bits", "--verify"]);
        assert_tame(&shown);
        assert_eq!(shown.code, code);
        assert!(shown.stdout.contains("a\\u{1b}[31m"), "{}", shown.stdout);
        let json = slimllm(&["inspect", file, "--metadata", "--verify", "--json"]);
        assert_tame(&json);
        let document = json.json();
        assert_eq!(document["architecture"], HOSTILE);
        assert_eq!(document["tensors"][0]["name"], HOSTILE);
        assert_eq!(document["metadata"][HOSTILE], HOSTILE);
        let refused = slimllm(&["run", file, "-p", "a"]);
        assert_tame(&refused);
        assert_eq!(refused.code, 2);
    }
}

#[test]
fn texts_of_a_safetensors_file_are_made_visible() {
    let dir = Dir::new();
    let header = serde_json::json!({
        "__metadata__": { HOSTILE: HOSTILE },
        HOSTILE: { "dtype": "F32", "shape": [1], "data_offsets": [0, 4] },
    });
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(f32::NAN.to_le_bytes());
    let file = &dir.write("hostile.safetensors", bytes);
    for more in
        [&["--tensors", "--metadata", "--verify"][..], &["--json", "--metadata", "--verify"]]
    {
        let shown = slimllm(&[&["inspect", file][..], more].concat());
        assert_tame(&shown);
        assert_eq!(shown.code, 1, "{}", shown.stderr);
    }
}

#[test]
fn names_and_arguments_are_made_visible() {
    // Lines are the user's own here.
    let name = HOSTILE.replace(['/', '\n'], "");
    for args in [
        &["inspect", &name][..],
        &["run", "--device", &name, "x"],
        &[&name],
        &["convert", &name, "-o", &name],
        &["convert", "x", "-o", &name, "--bits", &name],
    ] {
        let refused = slimllm(args);
        assert_tame(&refused);
        assert_eq!(refused.code, 2);
    }
}

#[test]
fn texts_of_a_configuration_are_made_visible() {
    let dir = Dir::new();
    let config = serde_json::json!({ "model_type": HOSTILE, "architectures": [HOSTILE] });
    dir.write("config.json", config.to_string());
    dir.write("model.safetensors", [8u64.to_le_bytes().as_slice(), b"{}      "].concat());
    let folder = &crate::command::arg(dir.root());
    let refused = slimllm(&["eval", folder, "--text", folder]);
    assert_tame(&refused);
    assert_eq!(refused.code, 2);
    // A model of an unknown family is a list of tensors, and the talk says why.
    let listed = slimllm(&["inspect", folder]);
    assert_tame(&listed);
    assert_eq!(listed.code, 0);
    assert!(listed.stderr.contains("a\\u{1b}[31m"), "{}", listed.stderr);
    let listed = slimllm(&["inspect", folder, "--json", "--verify"]);
    assert_tame(&listed);
    assert!(matches!(listed.json(), Value::Object(_)));
    // Its weights cannot be compared, which is not to say that they are the same.
    let compared = slimllm(&["diff", folder, folder]);
    assert_tame(&compared);
    assert_eq!(compared.code, 2);
}
