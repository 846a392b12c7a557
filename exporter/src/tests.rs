//! Every family in every layout: what is read back is what was exported.

use std::path::{Path, PathBuf};

use slim_formats::{ModelConfig, ModelSource, open_model};
use slim_kernels::weight;

use crate::{Target, export};

/// The tiny models of all families.
fn models() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/archs");
    let entries = std::fs::read_dir(folder).unwrap();
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
        if target.lacks(model.decoder()).is_some() {
            continue;
        }
        let parent = tempfile::tempdir().unwrap();
        let found = differences(&*model, target, parent.path());
        all.extend(found.into_iter().map(|found| format!("{}: {found}", path.display())));
        count += 1;
    }
    assert!(count > 0 && all.is_empty(), "{all:#?}");
}

#[test]
fn safetensors_of_every_family_is_the_same_model() {
    check(Target::Safetensors);
}

#[test]
fn gguf_of_every_family_is_the_same_model() {
    check(Target::Gguf);
}
