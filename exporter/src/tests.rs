//! Every family in every layout: what is read back is what was exported.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use slim_formats::{ModelConfig, ModelSource, open_model};
use slim_kernels::weight;

use crate::{Target, export};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/archs")
}

/// The tiny models of all families.
fn models() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(data()).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

fn values(model: &dyn ModelSource, name: &str) -> Vec<f32> {
    let weight = model.require(name).unwrap();
    let (rows, cols) = weight::shape(weight);
    let mut values = vec![0.0; rows * cols];
    weight::dequantize_rows(weight, 0..rows, &mut values).unwrap();
    values
}

/// Without the name, which is no part of the computation, and with the RoPE factors of `original`
/// where they are these but for what rounding makes of their description.
fn computed(config: &ModelConfig, original: &ModelConfig) -> ModelConfig {
    let mut config = ModelConfig { name: None, ..config.clone() };
    // What nothing uses is not exported.
    config.features.guessing_blocks = 0;
    let factors = || config.rope.factors.iter().zip(&original.rope.factors);
    if factors().all(|(found, expected)| (found - expected).abs() < 1e-4 * expected) {
        config.rope.factors.clone_from(&original.rope.factors);
    }
    config
}

/// How what an export reads as differs from the model.
fn differences(model: &dyn ModelSource, target: Target, parent: &Path) -> Vec<String> {
    let path = parent.join("out");
    if let Err(error) = export(model, target, &path, &mut |_| {}) {
        return vec![error.to_string()];
    }
    let found = match open_model(&path) {
        Ok(found) => found,
        Err(error) => return vec![error.to_string()],
    };
    let mut differences = found.warnings().to_vec();
    let [expected, config] =
        [model.config(), found.config()].map(|config| computed(config, model.config()));
    if config != expected {
        differences.push(format!("found {config:?}, expected {expected:?}"));
    }
    let names = model.decoder().tensors().iter().map(|tensor| &tensor.name);
    let changed = names.filter(|name| values(&*found, name) != values(model, name));
    differences.extend(changed.cloned());
    differences
}

fn check(target: Target) {
    let mut all = Vec::new();
    let mut count = 0;
    for path in models() {
        let model = open_model(&path).unwrap();
        if target.lacks(&*model).is_some() {
            continue;
        }
        let parent = tempfile::tempdir().unwrap();
        let found = differences(&*model, target, parent.path());
        all.extend(found.into_iter().map(|found| format!("{}: {found}", path.display())));
        count += 1;
    }
    assert!(count > 0 && all.is_empty(), "{all:#?}");
}

/// A copy of a tiny model with another value of a key of `config.json`.
fn changed(name: &str, key: &str, value: Value, parent: &Path) -> Box<dyn ModelSource> {
    let folder = parent.join(name);
    std::fs::create_dir(&folder).unwrap();
    for entry in std::fs::read_dir(data().join(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let config = folder.join("config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    json[key] = value;
    std::fs::write(&config, json.to_string()).unwrap();
    open_model(&folder).unwrap()
}

#[test]
fn safetensors_of_every_family_is_the_same_model() {
    check(Target::Safetensors);
}

#[test]
fn gguf_of_every_family_is_the_same_model() {
    check(Target::Gguf);
}

/// llama.cpp has no key for the scale of attention: it takes that of the head size.
#[test]
fn gguf_of_gemma_is_the_same_model_or_refused() {
    for (name, head_dim) in [("gemma2", 16), ("gemma3", 16), ("gemma3-linear", 32)] {
        let parent = tempfile::tempdir().unwrap();
        let found = Target::Gguf.lacks(&*open_model(&data().join(name)).unwrap()).unwrap();
        assert!(found.starts_with("attention scaled by 0.2236"), "{found}");
        let model = changed(name, "query_pre_attn_scalar", json!(head_dim), parent.path());
        assert_eq!(Target::Gguf.lacks(&*model), None);
        assert_eq!(differences(&*model, Target::Gguf, parent.path()), [""; 0]);
    }
}

/// llama.cpp has the limit of gpt-oss in its code.
#[test]
fn gguf_of_gpt_oss_is_the_same_model_or_refused() {
    let parent = tempfile::tempdir().unwrap();
    let found = Target::Gguf.lacks(&*open_model(&data().join("gpt-oss")).unwrap()).unwrap();
    assert_eq!(found, "block 0, whose neurons are clamped at other numbers,");
    let model = changed("gpt-oss", "swiglu_limit", json!(7.0), parent.path());
    assert_eq!(Target::Gguf.lacks(&*model), None);
    assert_eq!(differences(&*model, Target::Gguf, parent.path()), [""; 0]);
}

#[test]
fn gguf_of_what_llama_cpp_does_not_compute_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    let llama3 = json!({
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    });
    for (name, key, value, expected) in [
        ("opt", "dropout", json!(0.0), "an `opt` model"),
        ("smollm3", "no_rope_layers", json!([0, 1, 1, 0]), "block 0, which lacks"),
        ("qwen2", "rope_parameters", llama3, "a RoPE factor for each pair"),
    ] {
        let found = Target::Gguf.lacks(&*changed(name, key, value, parent.path())).unwrap();
        assert!(found.contains(expected), "{found}");
    }
}

/// llama.cpp refuses a Granite without the key, and transformers takes 1 for absent multipliers.
#[test]
fn gguf_of_granite_says_the_scale_of_logits_even_if_it_is_1() {
    let parent = tempfile::tempdir().unwrap();
    let model = changed("granite", "logits_scaling", json!(1.0), parent.path());
    let target = parent.path().join("model.gguf");
    export(&*model, Target::Gguf, &target, &mut |_| {}).unwrap();
    let found = open_model(&target).unwrap();
    assert_eq!(found.config().features, model.config().features);
    let file = std::fs::read(&target).unwrap();
    let key = b"granite.logit_scale";
    assert!(file.windows(key.len()).any(|bytes| bytes == key));

    let parent = tempfile::tempdir().unwrap();
    changed("granite", "attention_multiplier", json!(0.5), parent.path());
    let json = parent.path().join("granite/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("attention_multiplier");
    std::fs::write(&json, config.to_string()).unwrap();
    let model = open_model(json.parent().unwrap()).unwrap();
    assert_eq!(model.config().features.attention_scale, Some(1.0));
}

#[test]
fn gguf_warns_of_what_llama_cpp_computes_otherwise_for_long_texts() {
    let warnings = |model: &dyn ModelSource| {
        let parent = tempfile::tempdir().unwrap();
        export(model, Target::Gguf, &parent.path().join("out"), &mut |_| {}).unwrap().warnings
    };
    let parent = tempfile::tempdir().unwrap();
    for (name, key, value, expected) in [
        ("mistral-swa", "sliding_window", json!(16), "sliding window of 16 tokens"),
        ("phi3", "sliding_window", json!(16), "sliding window of 16 tokens"),
        (
            "llama",
            "rope_parameters",
            json!({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
            "texts longer than 512 tokens",
        ),
        (
            "olmo3",
            "rope_parameters",
            json!({
                "full_attention": {
                    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "truncate": false,
                    "original_max_position_embeddings": 32,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }),
            "limits of YaRN",
        ),
    ] {
        let found = warnings(&*changed(name, key, value, parent.path()));
        assert!(found.len() == 1 && found[0].contains(expected), "{found:?}");
    }
    for name in ["olmo3", "qwen3", "glm4"] {
        assert_eq!(warnings(&*open_model(&data().join(name)).unwrap()), [""; 0], "{name}");
    }
}
