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
        let of_family: Vec<&dyn ModelSource> =
            models.iter().map(|model| &**model).filter(|m| m.config().family == family).collect();
        assert!(!of_family.is_empty(), "no golden of {}", family.architecture());
        table += &row(family, &of_family);
    }
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/models.md");
    let text = std::fs::read_to_string(&page).unwrap();
    assert!(text.contains(&table), "{} should have\n\n{table}", page.display());
}

fn row(family: &dyn Family, models: &[&dyn ModelSource]) -> String {
    let types: Vec<_> =
        family.hf_types().iter().map(|kind| format!("`{}`", kind.model_type)).collect();
    let layouts = [
        ("safetensors", Target::Safetensors),
        ("gguf", Target::Gguf),
        ("onnx", Target::Onnx),
        ("gptq", Target::Gptq),
    ];
    let has = |target: Target| models.iter().all(|model| target.lacks(*model).is_none());
    let layouts = layouts.into_iter().filter(|&(_, target)| has(target)).map(|(name, _)| name);
    let runs = models.iter().all(|model| CudaSettings::lacks(model.decoder()).is_none());
    format!(
        "| `{}` | {} | {} | {} |\n",
        family.architecture(),
        types.join(", "),
        if runs { "yes" } else { "no" },
        layouts.collect::<Vec<_>>().join(", ")
    )
}
