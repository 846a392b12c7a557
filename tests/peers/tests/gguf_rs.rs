//! The crate `gguf-rs` must find in a SliM file what `slimllm inspect --json --metadata` says.
//!
//! Sizes are left out: version 0.1.8 computes wrong ones for BF16, I8, I16, I32, I64 and F64.

use gguf_rs::{GGMLType, GGUFModel, get_gguf_container_array_size};
use serde_json::Value;

#[test]
fn slim_file_reads_the_same_with_gguf_rs() {
    let (Ok(file), Ok(json)) =
        (std::env::var("SLIMLLM_PEER_FILE"), std::env::var("SLIMLLM_PEER_JSON"))
    else {
        println!(
            "skipped: SLIMLLM_PEER_FILE and SLIMLLM_PEER_JSON are not set; run `make test-peers`"
        );
        return;
    };
    let json = std::fs::read(json).unwrap();
    let inspected: Value = serde_json::from_slice(&json).unwrap();
    let model = get_gguf_container_array_size(&file, u64::MAX).unwrap().decode().unwrap();
    compare_tensors(&model, inspected["tensors"].as_array().unwrap());
    compare_metadata(&model, inspected["metadata"].as_object().unwrap());
}

fn compare_tensors(model: &GGUFModel, inspected: &[Value]) {
    assert_eq!(model.tensors().len(), inspected.len(), "number of tensors");
    for (found, expected) in model.tensors().iter().zip(inspected) {
        let name = expected["name"].as_str().unwrap();
        assert_eq!(found.name, name);
        let dtype = format!("{:?}", GGMLType::try_from(found.kind).unwrap());
        assert_eq!(dtype, expected["type"].as_str().unwrap(), "type of `{name}`");
        // GGUF stores the innermost dimension first, `inspect` prints the outermost first.
        let shape: Vec<u64> = found.shape.iter().rev().copied().collect();
        assert_eq!(Value::from(shape), expected["shape"], "shape of `{name}`");
    }
}

fn compare_metadata(model: &GGUFModel, inspected: &serde_json::Map<String, Value>) {
    let mut keys: Vec<&String> = inspected.keys().collect();
    keys.sort();
    assert_eq!(model.metadata().keys().collect::<Vec<_>>(), keys, "metadata keys");
    for (key, found) in model.metadata() {
        assert!(
            same_value(found, &inspected[key]),
            "`{key}`: found {found}, expected {}",
            inspected[key]
        );
    }
}

/// Equality of JSON values, where real numbers need to agree as f32 only: GGUF stores most of them
/// so.
fn same_value(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_value(a, b))
        }
        (Value::Number(a), Value::Number(b)) => {
            a == b
                || (a.is_f64() || b.is_f64())
                    && a.as_f64().map(|a| a as f32) == b.as_f64().map(|b| b as f32)
        }
        _ => a == b,
    }
}
