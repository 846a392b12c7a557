//! The logits of tiny models against those of transformers, made by the scripts that
//! `tests/data/MANIFEST.md` names.

use std::path::{Path, PathBuf};

use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::Value;

use crate::command::{Dir, arg, onnx_model, succeed, tiny_model};

/// The largest difference to allow: the reference computes in f32 with other summation orders.
const LOGIT_TOLERANCE: f32 = 2e-3;

const SUPPORTED: [&str; 2] = ["llama", "mistral"];

#[test]
fn logits_of_tiny_models_are_those_of_the_reference() {
    for name in ["llama", "llama-tied-rope3", "mistral-swa"] {
        compare(&tiny_model(name), &tiny_model(name));
    }
    for exporter in ["script", "dynamo"] {
        let (dir, model) = onnx_model(exporter);
        compare(&model, dir.root());
    }
}

/// `SLIMLLM_GOLDEN` names a folder whose `archs/*` are more models with `expected.safetensors`.
#[test]
fn logits_of_more_models_are_those_of_the_reference() {
    let Some(golden) = std::env::var_os("SLIMLLM_GOLDEN") else {
        println!("skipped: SLIMLLM_GOLDEN is not set");
        return;
    };
    let entries = std::fs::read_dir(Path::new(&golden).join("archs")).unwrap();
    let folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    for folder in folders {
        match model_type(&folder) {
            supported if SUPPORTED.contains(&supported.as_str()) => compare(&folder, &folder),
            other => println!("skipped: {}: `{other}` is not supported yet", folder.display()),
        }
    }
}

fn model_type(folder: &Path) -> String {
    let config = std::fs::read(folder.join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    config["model_type"].as_str().unwrap().to_owned()
}

/// Runs each row of `input_ids` of the folder's `expected.safetensors` from an empty cache.
fn compare(model: &Path, folder: &Path) {
    let expected = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let ids = expected.tensor("input_ids").unwrap();
    let (rows, tokens) = (ids.shape()[0], ids.shape()[1]);
    let logits = f32_values(&expected.tensor("logits").unwrap());
    let vocab = logits.len() / (rows * tokens);
    for (ids, expected) in i32_values(&ids).chunks(tokens).zip(logits.chunks(tokens * vocab)) {
        let found = run_logits(model, ids);
        assert_eq!(found.len(), expected.len());
        let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
        let largest = differences.fold(0.0, f32::max);
        assert!(largest < LOGIT_TOLERANCE, "{}: {largest}", model.display());
        println!("{}: largest difference {largest:.1e}", model.display());
    }
}

/// What `slimllm logits` writes.
fn run_logits(model: &Path, ids: &[i32]) -> Vec<f32> {
    let dir = Dir::new();
    let out = dir.arg("logits.safetensors");
    let tokens = ids.iter().map(i32::to_string).collect::<Vec<_>>().join(",");
    succeed(&["logits", &arg(model), "--tokens", &tokens, "-o", &out]);
    let file = std::fs::read(out).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let tensor = file.tensor("logits").unwrap();
    assert_eq!(tensor.shape()[0], ids.len());
    f32_values(&tensor)
}

fn f32_values(tensor: &TensorView<'_>) -> Vec<f32> {
    assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
    tensor.data().as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn i32_values(tensor: &TensorView<'_>) -> Vec<i32> {
    assert_eq!(tensor.dtype(), safetensors::Dtype::I32);
    tensor.data().as_chunks::<4>().0.iter().map(|&bytes| i32::from_le_bytes(bytes)).collect()
}
