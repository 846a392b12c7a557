//! The logits of tiny models against those of transformers, made by the scripts that
//! `tests/data/MANIFEST.md` names.

use std::path::Path;

use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::Value;
use slim_formats::{arch::by_model_type, open_model};
use slim_runtime::{Model, Turn};

use crate::command::{
    Dir, arg, files_in, golden_models, onnx_model, succeed, test_data, tiny_model,
};

/// The largest difference to allow, as a share of the spread of the expected logits: the reference
/// computes in f32 with other summation orders.
const LOGIT_TOLERANCE: f32 = 2e-3;

#[test]
fn logits_of_tiny_models_are_those_of_the_reference() {
    for folder in golden_models() {
        compare(&folder, &folder);
        compare_steps(&folder);
    }
    for exporter in ["script", "dynamo"] {
        let (dir, model) = onnx_model(exporter);
        compare(&model, dir.root());
    }
}

/// llama.cpp's converter made these files from the same models.
#[test]
fn logits_of_ggufs_are_those_of_the_reference() {
    for file in files_in(&test_data("gguf")) {
        let name = file.file_stem().unwrap().to_str().unwrap();
        compare(&file, &tiny_model(name));
    }
}

/// `SLIMLLM_GOLDEN` names a folder whose `archs/*` are more models with `expected.safetensors`;
/// those of families that are not described are left out.
#[test]
fn logits_of_more_models_are_those_of_the_reference() {
    let Some(golden) = std::env::var_os("SLIMLLM_GOLDEN") else {
        println!("skipped: SLIMLLM_GOLDEN is not set");
        return;
    };
    for folder in files_in(&Path::new(&golden).join("archs")) {
        match by_model_type(&model_type(&folder)) {
            Some(_) => compare(&folder, &folder),
            None => println!("skipped: {}", folder.display()),
        }
    }
}

fn model_type(folder: &Path) -> String {
    let config = std::fs::read(folder.join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    config["model_type"].as_str().unwrap().to_owned()
}

/// Runs each text of the folder's `expected.safetensors` from an empty cache, all at once; of a
/// model that lacks the embeddings of some of its tokens, one like them, through the folder, too.
fn compare(model: &Path, folder: &Path) {
    let known = open_model(model).unwrap().config().vocab_size;
    let texts = texts(folder);
    let is_known = |(ids, _): &(Vec<i32>, Vec<f32>)| ids.iter().all(|&id| (id as usize) < known);
    if !texts.iter().all(is_known) {
        let ids: Vec<i32> = texts[0].0.iter().map(|&id| id % known as i32).collect();
        return assert_close(model, &run_logits(model, &ids), &run_logits(folder, &ids), ids.len());
    }
    for (ids, expected) in texts {
        assert_close(model, &run_logits(model, &ids), &expected, ids.len());
    }
}

/// Runs each text token by token.
fn compare_steps(folder: &Path) {
    let model = Model::open(folder).unwrap();
    let workspace = &mut model.workspace().unwrap();
    for (ids, expected) in texts(folder) {
        let sequence = &mut model.sequence(ids.len()).unwrap();
        let step = |&id: &i32| {
            let tokens = &[id.cast_unsigned()];
            model.step(&mut [Turn { tokens, sequence }], workspace).unwrap()
        };
        let found: Vec<f32> = ids.iter().flat_map(step).collect();
        assert_close(folder, &found, &expected, ids.len());
    }
}

/// Tokens and logits of the texts of `expected.safetensors`.
fn texts(folder: &Path) -> Vec<(Vec<i32>, Vec<f32>)> {
    let expected = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let ids = expected.tensor("input_ids").unwrap();
    let (rows, tokens) = (ids.shape()[0], ids.shape()[1]);
    let logits = f32_values(&expected.tensor("logits").unwrap());
    let of_text = logits.len() / rows;
    let ids = i32_values(&ids);
    let texts = ids.chunks(tokens).zip(logits.chunks(of_text));
    texts.map(|(ids, logits)| (ids.to_vec(), logits.to_vec())).collect()
}

fn assert_close(model: &Path, found: &[f32], expected: &[f32], tokens: usize) {
    // llama.cpp leaves out rows of tokens that the tokenizer does not know.
    let (known, vocab) = (found.len() / tokens, expected.len() / tokens);
    let expected: Vec<f32> =
        expected.chunks(vocab).flat_map(|row| &row[..known]).copied().collect();
    let differences = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    let largest = differences.fold(0.0, f32::max) / spread(&expected);
    assert!(largest < LOGIT_TOLERANCE, "{}: {largest}", model.display());
    println!("{}: largest difference {largest:.1e} of the spread", model.display());
}

/// The standard deviation of logits.
fn spread(logits: &[f32]) -> f32 {
    let mean = logits.iter().sum::<f32>() / logits.len() as f32;
    let squares = logits.iter().map(|logit| (logit - mean).powi(2)).sum::<f32>();
    (squares / logits.len() as f32).sqrt()
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
