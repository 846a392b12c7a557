//! GGUF models in several files.

use std::{fs, path::Path};

use slim_formats::gguf::{GgufFile, HeaderWriter, Metadata, NewTensor, TensorInfo, Value};

use crate::command::{Dir, fail, succeed, test_data};

const PARTS: usize = 3;

fn name(part: usize) -> String {
    format!("m-{part:05}-of-{PARTS:05}.gguf")
}

/// Splits a file as `llama-gguf-split` does: the first part has the metadata.
fn split(file: &Path, dir: &Dir) {
    let whole = GgufFile::open(file).unwrap();
    let tensors = whole.tensors();
    for (part, chunk) in tensors.chunks(tensors.len().div_ceil(PARTS)).enumerate() {
        let mut metadata = if part == 0 { whole.metadata().clone() } else { Metadata::new() };
        metadata.insert("split.no", Value::U16(part as u16)).unwrap();
        metadata.insert("split.count", Value::U16(PARTS as u16)).unwrap();
        metadata.insert("split.tensors.count", Value::I32(tensors.len() as i32)).unwrap();
        let new = |info: &TensorInfo| NewTensor {
            name: info.name.clone(),
            dtype: info.dtype,
            shape: info.shape.clone(),
        };
        let path = dir.path(&name(part + 1));
        let infos: Vec<_> = chunk.iter().map(new).collect();
        let header = HeaderWriter::new(&path, &metadata, &infos, 32).unwrap();
        let mut bytes = header.bytes().to_vec();
        bytes.resize(header.file_bytes() as usize, 0);
        for (info, &offset) in chunk.iter().zip(header.tensor_offsets()) {
            let data = whole.bytes_of(info);
            bytes[offset as usize..][..data.len()].copy_from_slice(data);
        }
        fs::write(path, bytes).unwrap();
    }
}

/// A split model in a folder.
fn model() -> Dir {
    let dir = Dir::new();
    split(&test_data("gguf").join("qwen2.gguf"), &dir);
    dir
}

#[test]
fn split_model_is_the_whole_one_whichever_part_is_given() {
    let dir = model();
    let whole = test_data("gguf").join("qwen2.gguf");
    let logits = |model: &str| {
        let out = dir.path("out.safetensors");
        let args = ["logits", model, "--tokens", "1,2,3", "--device", "cpu", "--force", "-o"];
        succeed(&[&args[..], &[out.to_str().unwrap()]].concat());
        fs::read(out).unwrap()
    };
    let expected = logits(whole.to_str().unwrap());
    for part in 1..=PARTS {
        assert!(logits(&dir.arg(&name(part))) == expected, "part {part}");
    }
    let inspect = |path: &str| succeed(&["inspect", path, "--json", "--verify"]).json();
    let (split, whole) = (inspect(&dir.arg(&name(2))), inspect(whole.to_str().unwrap()));
    assert_eq!(split["parameters"], whole["parameters"]);
    assert_eq!(split["tensors"], whole["tensors"]);
    assert_eq!(split["faults"], serde_json::json!([]));

    // Converted, its parts are its source.
    let out = &dir.arg("out.slim.gguf");
    succeed(&["convert", &dir.arg(&name(1)), "-o", out, "--method", "rtn", "--quiet"]);
    let metadata = succeed(&["inspect", out, "--json", "--metadata"]).json()["metadata"].clone();
    let names: Vec<String> = (1..=PARTS).map(name).collect();
    assert_eq!(metadata["slim.source.files"], serde_json::json!(names));
    assert!(succeed(&["reproduce", out, "--run"]).stdout.ends_with("the same bytes\n"));
}

#[test]
fn missing_doubled_and_foreign_parts_are_named() {
    let refused = |change: &dyn Fn(&Dir), fragments: &[&str]| {
        let dir = model();
        change(&dir);
        fail(&["run", &dir.arg(&name(1)), "-p", "a"], fragments);
    };
    let part = |dir: &Dir, number| dir.path(&name(number));
    refused(&|dir| fs::remove_file(part(dir, 2)).unwrap(), &[&name(2), "is in 3 files"]);
    let doubled = |dir: &Dir| {
        fs::copy(part(dir, 2), part(dir, 3)).unwrap();
    };
    refused(&doubled, &[&name(3), "key `split.no`: found 1, expected 2"]);
    let foreign = |dir: &Dir| {
        let other = Dir::new();
        split(&test_data("gguf").join("glm4.gguf"), &other);
        fs::copy(part(&other, 2), part(dir, 2)).unwrap();
    };
    refused(&foreign, &["tensor"]);
    let whole = |dir: &Dir| {
        fs::copy(test_data("gguf/qwen2.gguf"), part(dir, 2)).unwrap();
    };
    refused(&whole, &[&name(2), "key `split.no`: found none, expected 1"]);

    let dir = model();
    fs::rename(part(&dir, 1), dir.path("mine.gguf")).unwrap();
    fail(&["run", &dir.arg("mine.gguf"), "-p", "a"], &["one of 3 parts under a name of its own"]);
}
