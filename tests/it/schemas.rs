//! Every JSON document, against its schema in `docs/schemas`.

use std::{collections::BTreeSet, path::PathBuf};

use serde_json::{Map, Value, json};

use crate::command::{Dir, arg, onnx_model, slimllm, succeed, tiny_model};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/schemas")
}

/// A JSON Schema of the keywords that ours are made of. The crate `jsonschema` would rebuild half
/// of our dependencies with other features.
struct Schema {
    root: Value,
}

impl Schema {
    fn of(name: &str) -> Self {
        let text = std::fs::read_to_string(folder().join(format!("{name}.json"))).unwrap();
        let root: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(root["$schema"], "https://json-schema.org/draft/2020-12/schema");
        Self { root }
    }

    /// What is wrong with a document; nothing if it is valid.
    fn faults(&self, document: &Value) -> Vec<String> {
        self.faults_of(&self.root, document, "")
    }

    fn faults_of(&self, schema: &Value, value: &Value, place: &str) -> Vec<String> {
        let none = Map::new();
        let object = value.as_object().unwrap_or(&none);
        let fault = |fine: bool, what: &str| match fine {
            true => Vec::new(),
            false => vec![format!("{place}: {value} breaks {what}")],
        };
        let matches = |schemas: &Value| {
            let schemas = schemas.as_array().unwrap().iter();
            schemas.filter(|schema| self.faults_of(schema, value, place).is_empty()).count()
        };
        let number = |limit: &Value| value.as_f64().zip(limit.as_f64());
        let keyword = |(keyword, rule): (&String, &Value)| match keyword.as_str() {
            "$schema" | "$id" | "$defs" | "title" | "description" => Vec::new(),
            "$ref" => {
                let target = rule.as_str().unwrap().strip_prefix('#').unwrap();
                self.faults_of(self.root.pointer(target).unwrap(), value, place)
            }
            "type" => {
                let types = rule.as_array().cloned().unwrap_or_else(|| vec![rule.clone()]);
                let fits = types.iter().any(|name| is_of_type(value, name.as_str().unwrap()));
                fault(fits, &format!("type {rule}"))
            }
            "enum" => fault(rule.as_array().unwrap().contains(value), &format!("enum {rule}")),
            "minimum" => fault(number(rule).is_none_or(|(n, least)| n >= least), "minimum"),
            "maximum" => fault(number(rule).is_none_or(|(n, most)| n <= most), "maximum"),
            "pattern" => {
                assert_eq!(rule, "^[0-9a-f]{64}$", "the one pattern of ours");
                let is_hex = |c: char| matches!(c, '0'..='9' | 'a'..='f');
                let text = value.as_str().unwrap_or_default();
                fault(text.len() == 64 && text.chars().all(is_hex), "pattern")
            }
            "required" => {
                let mut keys = rule.as_array().unwrap().iter();
                let has_all = keys.all(|key| object.contains_key(key.as_str().unwrap()));
                fault(!value.is_object() || has_all, &format!("required {rule}"))
            }
            "dependentRequired" => {
                let mut keys = rule.as_object().unwrap().iter();
                let fits = keys.all(|(key, others)| {
                    let mut others = others.as_array().unwrap().iter();
                    !object.contains_key(key)
                        || others.all(|other| object.contains_key(other.as_str().unwrap()))
                });
                fault(fits, &format!("dependentRequired {rule}"))
            }
            "properties" => {
                let known =
                    object.iter().filter_map(|(key, value)| Some((rule.get(key)?, key, value)));
                known
                    .flat_map(|(rule, key, value)| {
                        self.faults_of(rule, value, &format!("{place}/{key}"))
                    })
                    .collect()
            }
            "additionalProperties" => {
                let others =
                    object.iter().filter(|(key, _)| schema["properties"].get(key).is_none());
                others
                    .flat_map(|(key, value)| match rule {
                        Value::Bool(false) => vec![format!("{place}: unknown key `{key}`")],
                        _ => self.faults_of(rule, value, &format!("{place}/{key}")),
                    })
                    .collect()
            }
            "items" => {
                let items = value.as_array().into_iter().flatten().enumerate();
                items
                    .flat_map(|(i, item)| self.faults_of(rule, item, &format!("{place}/{i}")))
                    .collect()
            }
            "anyOf" => fault(matches(rule) > 0, "anyOf"),
            "oneOf" => fault(matches(rule) == 1, "oneOf"),
            other => panic!("{place}: a schema with the keyword `{other}`"),
        };
        schema.as_object().unwrap().iter().flat_map(keyword).collect()
    }
}

fn is_of_type(value: &Value, name: &str) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("no type `{other}`"),
    }
}

/// Checks a document, and that the schema would find a key too many and one too few.
fn check(name: &str, document: &Value) {
    let schema = Schema::of(name);
    assert_eq!(schema.faults(document), [""; 0], "{name}: {document}");
    let mut more = document.clone();
    more["another"] = json!(1);
    assert!(!schema.faults(&more).is_empty(), "{name}: a key too many");
    let mut less = document.clone();
    less.as_object_mut().unwrap().remove("warnings");
    assert!(!schema.faults(&less).is_empty(), "{name}: a key too few");
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
    document("reproduce", &["reproduce", slim, "--json"]);
    document("reproduce", &["reproduce", slim, "--json", "--run", "--source", llama]);
    for target in [["--target-bpw", "3"], ["--target-size", "90kB"]] {
        let planned = ["convert", llama, "-o", out, "--json", "--dry-run"];
        document("convert-dry-run", &[&planned[..], &target].concat());
    }
    let requantized =
        document("convert-dry-run", &["convert", slim, "-o", out, "--json", "--dry-run"]);
    assert_eq!(requantized["warnings"].as_array().unwrap().len(), 1, "{requantized}");

    let (_folder, onnx) = onnx_model("script");
    for file in [llama, &arg(&onnx), &arg(&tiny_model("llama").join("model.safetensors"))] {
        document("inspect", &["inspect", file, "--json", "--verify", "--metadata"]);
    }
    let eval = ["eval", slim, "--text", text, "--context", "32", "--windows", "2", "--json"];
    document("eval", &eval);
    document("eval", &[&eval[..], &["--against", llama]].concat());
    document("eval-profile", &["eval", slim, "--profile", "--against", llama, "--json"]);
    let bench = ["bench", slim, "--prompt", "4", "--generate", "2", "--runs", "1", "--json"];
    document("bench", &bench);
    document("bench", &[&bench[..], &["--context", "3,5", "--batch", "2"]].concat());
    document("diff", &["diff", slim, slim, "--json"]);
    check("diff", &slimllm(&["diff", slim, llama, "--json"]).json());
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
