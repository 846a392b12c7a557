//! `slimllm export`: a model's weights in the layout of another engine.

mod card;
mod check;

use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value as Json, json};
use slim_exporter::{LayerLoss, Report, Target, export};

use self::{
    card::card,
    check::{Checked, check},
};
use crate::{
    args::{ExportArgs, Layout},
    card::CARD,
    interrupt::clean_up_when_interrupted,
    output::{facts, plural, print, print_json, size, warn},
    progress::{Progress, duration},
    target::{Kind, TargetArgs},
};

pub fn run(args: &ExportArgs) -> Result<()> {
    clean_up_when_interrupted()?;
    let start = Instant::now();
    let source = match args.quiet {
        true => args.model.open_quietly(),
        false => args.model.open(),
    }?;
    let target = match args.to {
        Layout::Gguf => Target::Gguf,
        Layout::Gptq => Target::Gptq,
        Layout::Onnx => Target::Onnx,
        Layout::Safetensors => Target::Safetensors,
    };
    let kind = match target {
        Target::Gguf => Kind::File("gguf"),
        Target::Gptq | Target::Onnx | Target::Safetensors => Kind::Folder,
    };
    let inputs = source.files();
    let page = args.card();
    // In a folder that is new, nothing stands in its way.
    let is_inside = |page: &&TargetArgs| page.output.parent() == Some(&args.target.output);
    if let Some(page) = page.as_ref().filter(|page| !is_inside(page)) {
        page.check(CARD, &inputs)?;
    }
    let output = args.target.prepare(kind, &inputs)?;
    let blocks = source.config().block_count;
    let mut progress = if args.quiet { Progress::silent() } else { Progress::new("block", blocks) };
    let mut done = 0;
    let report = export(&*source, target, output, &mut |tensor| {
        progress.detail(tensor);
        let block = block_of(tensor).unwrap_or(done);
        if block > done {
            done = block;
            progress.step(done, tensor);
        }
    });
    if let Ok(report) = &report {
        progress.step(blocks, plural(report.tensors, "tensor"));
    }
    progress.finish();
    let report = report?;
    for warning in &report.warnings {
        warn(warning);
    }
    let checked = args.check.then(|| check(&source, target, &args.target.output)).transpose()?;
    if let Some(page) = page {
        let text = card(&args.target.output, target, &*source, &report, checked.as_ref())?;
        page.write(CARD, &inputs, text.as_bytes())?;
    }
    if args.json {
        print_json(report_json(&report, checked.as_ref(), args, start.elapsed()))?;
    } else if !args.quiet {
        print(&describe(&report, checked.as_ref(), args, start.elapsed()))?;
    }
    Ok(())
}

/// The number of the block that a tensor belongs to.
fn block_of(tensor: &str) -> Option<usize> {
    tensor.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// How many matrices each layout holds, in the order of their first.
fn layouts(layers: &[LayerLoss]) -> Vec<(&'static str, usize)> {
    let mut layouts: Vec<(&'static str, usize)> = Vec::new();
    for layer in layers {
        match layouts.iter_mut().find(|(layout, _)| *layout == layer.layout) {
            Some((_, count)) => *count += 1,
            None => layouts.push((layer.layout, 1)),
        }
    }
    layouts
}

/// `None` where no losses were measured.
fn mean_error(layers: &[LayerLoss]) -> Option<f64> {
    let sum = layers.iter().map(|layer| layer.error).sum::<f64>();
    (!layers.is_empty()).then(|| sum / layers.len() as f64)
}

fn worst(layers: &[LayerLoss]) -> Option<&LayerLoss> {
    layers.iter().max_by(|a, b| a.error.total_cmp(&b.error))
}

fn describe(
    report: &Report,
    checked: Option<&Checked>,
    args: &ExportArgs,
    time: Duration,
) -> String {
    let mut lines = vec![
        ("written", args.target.output.display().to_string()),
        ("tensors", plural(report.tensors, "tensor")),
    ];
    if let (Some(mean), Some(worst)) = (mean_error(&report.layers), worst(&report.layers)) {
        let layouts = layouts(&report.layers);
        let layouts = layouts.iter().map(|(layout, count)| format!("{count} in {layout}"));
        lines.push(("matrices", layouts.collect::<Vec<_>>().join(", ")));
        let loss = format!(
            "{mean:.6} (relative to the norm of the weights, mean over matrices)\nat most {:.6}, in {}",
            worst.error, worst.name
        );
        lines.push(("loss", loss));
    }
    if let Some(checked) = checked {
        lines.push(("checked", checked.describe()));
    }
    lines.push(("size", size(report.file_bytes)));
    lines.push(("time", duration(time)));
    facts(&lines)
}

fn report_json(
    report: &Report,
    checked: Option<&Checked>,
    args: &ExportArgs,
    time: Duration,
) -> Json {
    let layer = |layer: &LayerLoss| json!({"name": layer.name, "layout": layer.layout, "error": layer.error});
    json!({
        "output": args.target.output.to_string_lossy(),
        "file_bytes": report.file_bytes,
        "tensors": report.tensors,
        "mean_error": mean_error(&report.layers),
        "worst_error": worst(&report.layers).map(|layer| layer.error),
        "checked": checked.map(Checked::to_json),
        "seconds": time.as_secs_f64(),
        "layers": report.layers.iter().map(layer).collect::<Json>(),
    })
}
