//! Which layouts hold which family: the table of `docs/models.md`.

use std::path::Path;

use slim_exporter::Target;
use slim_formats::{
    ModelSource,
    arch::{FAMILIES, Family},
    open_model,
};
use slim_runtime::CudaSettings;

use crate::command::golden_models;

#[test]
fn families_by_layout() {
    let models: Vec<_> = golden_models().iter().map(|path| open_model(path).unwrap()).collect();
    let mut table =
        "| GGUF's name | Hugging Face's types | `--device cuda` | `export --to` |\n|---|---|---|---|\n"
            .to_owned();
    for family in FAMILIES {
        for (kinds, engines) in rows(family, &models) {
            let kinds: Vec<_> = kinds.iter().map(|kind| format!("`{kind}`")).collect();
            let name = family.architecture();
            table += &format!("| `{name}` | {} | {engines} |\n", kinds.join(", "));
        }
    }
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/models.md");
    let text = std::fs::read_to_string(&page).unwrap();
    assert!(text.contains(&table), "{} should have\n\n{table}", page.display());
}

/// Hugging Face's types of a family, those together that the same engines have. One without a
/// golden is like the one before it.
fn rows(
    family: &'static dyn Family,
    models: &[Box<dyn ModelSource>],
) -> Vec<(Vec<&'static str>, String)> {
    let mut rows: Vec<(Vec<&str>, String)> = Vec::new();
    for kind in family.hf_types() {
        let is_of_kind = |model: &&dyn ModelSource| {
            let config = model.config();
            config.family == family && family.hf_type(config) == *kind
        };
        let of_kind: Vec<_> = models.iter().map(|model| &**model).filter(is_of_kind).collect();
        match rows.last_mut() {
            Some((kinds, found)) if of_kind.is_empty() || *found == engines(&of_kind) => {
                kinds.push(kind.model_type);
            }
            _ => {
                assert!(!of_kind.is_empty(), "no golden of {}", kind.model_type);
                rows.push((vec![kind.model_type], engines(&of_kind)));
            }
        }
    }
    rows
}

/// What all of some models run on, and may be exported to, as the cells of a row.
fn engines(models: &[&dyn ModelSource]) -> String {
    let layouts = [
        ("safetensors", Target::Safetensors),
        ("gguf", Target::Gguf),
        ("onnx", Target::Onnx),
        ("gptq", Target::Gptq),
    ];
    let has = |target: Target| models.iter().all(|model| target.lacks(*model).is_none());
    let layouts = layouts.into_iter().filter(|&(_, target)| has(target)).map(|(name, _)| name);
    let runs = models.iter().all(|model| CudaSettings::lacks(model.decoder()).is_none());
    format!("{} | {}", if runs { "yes" } else { "no" }, layouts.collect::<Vec<_>>().join(", "))
}
