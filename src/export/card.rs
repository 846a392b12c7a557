//! The model card of an export.

use std::path::Path;

use anyhow::Result;
use slim_exporter::{LayerLoss, Report, Target};
use slim_formats::{ModelSource, gguf::GgufFile};

use super::{Checked, layouts, mean_error, worst};
use crate::{
    card::{code, front_matter},
    output::size,
    reproduce::command_of,
};

/// What a hub asks of what `source` became under the name `output`, what the layout has lost, and
/// the commands that made it, as Markdown.
pub fn card(
    output: &Path,
    target: Target,
    source: &dyn ModelSource,
    report: &Report,
    checked: Option<&Checked>,
) -> Result<String> {
    let engine = Engine::of(target);
    let plain = |path: &Path| code(&path.file_name().unwrap_or_default().to_string_lossy());
    let (written, from) = (plain(output), plain(source.path()));
    let name = source.config().name.as_deref().map_or_else(|| from.clone(), code);
    let container = match source.format() {
        "slim" => Some(GgufFile::open(source.path())?),
        _ => None,
    };
    let metadata = container.as_ref().map(|container| container.metadata());
    let repository = metadata.and_then(|metadata| metadata.str("slim.source.repository"));
    // A file of an early build does not say how it was made.
    let converted = metadata
        .and_then(|metadata| command_of(source.path(), metadata).ok())
        .map_or_else(String::new, |command| command + "\n");
    let front = front_matter(repository, engine.library);
    let (written_as, layout) = (written.trim_matches('`'), engine.layout);
    Ok(format!(
        "{front}\n\
         # {name} for {engine}\n\n\
         {written} has the weights of {from}, {layout}. It takes {bytes}. The licence is that of \
         the source.\n\n\
         {losses}\
         {verdict}\
         ## Run it\n\n\
         ```sh\n{run}\n```\n\n\
         ## How it was made\n\n\
         ```sh\n{converted}slimllm export {source} --to {to} -o {written_as}\n```\n",
        engine = engine.name,
        bytes = size(report.file_bytes),
        losses = losses(&report.layers),
        verdict = verdict(checked),
        run = engine.run.replace("OUT", written_as),
        source = from.trim_matches('`'),
        to = engine.option,
    ))
}

/// What reads a layout.
struct Engine {
    name: &'static str,
    /// As hubs call it.
    library: &'static str,
    /// The layout, in words.
    layout: &'static str,
    /// What `--to` calls it.
    option: &'static str,
    /// A command that runs `OUT`.
    run: &'static str,
}

impl Engine {
    fn of(target: Target) -> Self {
        match target {
            Target::Gguf => Self {
                name: "llama.cpp",
                library: "gguf",
                layout: "in blocks of ggml",
                option: "gguf",
                run: "llama-cli -m OUT -p \"Once upon a time\"",
            },
            Target::Gptq => Self {
                name: "GPTQ's engines",
                library: "transformers",
                layout: "packed as GPTQ does",
                option: "gptq",
                run: "pip install gptqmodel\ntransformers chat ./OUT",
            },
            Target::Onnx => Self {
                name: "ONNX Runtime",
                library: "onnxruntime",
                layout: "in blocks of ONNX Runtime",
                option: "onnx",
                run: "# of the examples of onnxruntime-genai\npython model-qa.py -m OUT -e cpu",
            },
            Target::Safetensors => Self {
                name: "transformers",
                library: "transformers",
                layout: "as plain fp16",
                option: "safetensors",
                run: "transformers chat ./OUT",
            },
        }
    }
}

/// What an engine makes of it, if one was asked.
fn verdict(checked: Option<&Checked>) -> String {
    match checked {
        Some(checked @ Checked::Agrees(_)) => {
            format!("## What an engine makes of it\n\n{}.\n\n", checked.describe())
        }
        Some(Checked::NotRun(_)) | None => String::new(),
    }
}

/// What the layout has lost, if that was measured.
fn losses(layers: &[LayerLoss]) -> String {
    let (Some(mean), Some(worst)) = (mean_error(layers), worst(layers)) else {
        return String::new();
    };
    let layouts = layouts(layers).into_iter().map(|(layout, count)| format!("{count} in {layout}"));
    format!(
        "## What the layout has lost\n\n\
         Matrices: {}. Their relative error is {mean:.6} in the mean, at most {:.6}, in {}.\n\n",
        layouts.collect::<Vec<_>>().join(", "),
        worst.error,
        code(&worst.name),
    )
}
