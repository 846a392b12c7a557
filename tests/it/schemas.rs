//! Every JSON document, against its schema in `docs/schemas`.

use std::{collections::BTreeSet, path::PathBuf};

use jsonschema::Validator;
use serde_json::{Value, json};

use crate::command::{Dir, arg, onnx_model, slimllm, succeed, tiny_model};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/schemas")
}

fn schema(name: &str) -> Validator {
    let text = std::fs::read_to_string(folder().join(format!("{name}.json"))).unwrap();
    let schema: Value = serde_json::from_str(&text).unwrap();
    jsonschema::meta::validate(&schema).unwrap_or_else(|error| panic!("{name}: {error}"));
    jsonschema::draft202012::new(&schema).unwrap()
}

/// Checks a document, and that the schema would find a key too many and each one too few.
fn check(name: &str, document: &Value) {
    let schema = schema(name);
    let errors: Vec<String> = schema
        .iter_errors(document)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{name}: {errors:?}\n{document}");
    let mut more = document.clone();
    more["another"] = json!(1);
    assert!(!schema.is_valid(&more), "{name}: a key too many");
    let mut less = document.clone();
    less.as_object_mut().unwrap().remove("warnings");
    assert!(!schema.is_valid(&less), "{name}: a key too few");
}

#[test]
fn documents_of_all_commands_are_as_their_schemas_say() {
    let dir = Dir::new();
    let (llama, slim, out) = (&arg(&tiny_model("llama")), &dir.arg("a.slim.gguf"), &dir.arg("b"));
    let text = &dir.write("text", "The quick brown fox jumps over the lazy dog. ".repeat(20));
    let quick = ["--samples", "2", "--context", "32", "--json"];
    let mut checked = BTreeSet::new();
    let mut document = |name: &'static str, args: &[&str]| {
        checked.insert(format!("{name}.json"));
        let document = succeed(args).json();
        check(name, &document);
        document
    };

    let paper = ["--scales", "paper", "--embed-bits", "16", "--bits", "1"];
    for more in [&["--method", "rtn"][..], &paper, &[]] {
        let convert = [&["convert", llama, "-o", slim][..], &quick, more].concat();
        let planned = [&convert[..], &["--dry-run"]].concat();
        document("convert-dry-run", &planned);
        document("convert", &convert);
        for more in [&[][..], &["--metadata", "--verify"]] {
            document("inspect", &[&["inspect", slim, "--json"][..], more].concat());
        }
        std::fs::remove_file(slim).unwrap();
    }
    succeed(&[&["convert", llama, "-o", slim][..], &quick].concat());
    for target in [["--target-bpw", "3"], ["--target-size", "90kB"]] {
        let planned = ["convert", llama, "-o", out, "--json", "--dry-run"];
        document("convert-dry-run", &[&planned[..], &target].concat());
    }
    let requantized = document("convert-dry-run", &["convert", slim, "-o", out, "--json", "--dry-run"]);
    assert_eq!(requantized["warnings"].as_array().unwrap().len(), 1, "{requantized}");

    let (_folder, onnx) = onnx_model("script");
    for file in [llama, &arg(&onnx), &arg(&tiny_model("llama").join("model.safetensors"))] {
        document("inspect", &["inspect", file, "--json", "--verify", "--metadata"]);
    }
    let eval = ["eval", slim, "--text", text, "--context", "32", "--windows", "2", "--json"];
    document("eval", &eval);
    document("eval", &[&eval[..], &["--against", llama]].concat());
    let bench = ["bench", slim, "--prompt", "4", "--generate", "2", "--runs", "1", "--json"];
    document("bench", &bench);
    for layout in ["gguf", "safetensors", "gptq", "onnx"] {
        let out = &dir.arg(layout);
        document("export", &["export", slim, "--to", layout, "-o", out, "--json"]);
        if layout == "gguf" {
            document("inspect", &["inspect", out, "--json", "--verify", "--metadata"]);
        }
    }

    let cut = &dir.write("cut.gguf", b"GGUF\x03\0\0\0\x01\0\0\0");
    check("inspect", &slimllm(&["inspect", cut, "--verify", "--json"]).json());

    let files = std::fs::read_dir(folder()).unwrap();
    let files: BTreeSet<String> =
        files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(files, checked, "a schema of no command, or a command without one");
}
