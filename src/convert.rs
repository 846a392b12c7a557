//! `slimllm convert`: quantizes a model.

mod card;
mod check;
mod draw;
mod plan;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use serde_json::{Value as Json, json};
use slim_converter::{
    BUILT_IN_CALIBRATION, Begin, Calibration, Degenerate, Engine, Job, LayerReport, MOST_BYTES,
    Method, Progress as Step, Report, Resources, Ruler, Settings, Target, Trial, WorkFolder,
    convert, convert_within, distill, quality_bytes,
};
use slim_formats::{
    ModelConfig, ModelSource,
    slim::{ScaleCoding, SlimFile, parts_beside},
};
use slim_kernels::{
    KernelError,
    cuda::{CudaBackend, Device},
};

use self::{card::card, check::Check, draw::draw, plan::Plan};
use crate::{
    args::{CalibrationText, ConvertArgs, Scales},
    card::CARD,
    compute::Choice,
    failure::advised,
    fetch::locate,
    interrupt::{keep, stop_when_interrupted},
    open::{USUAL_CONTEXT, open, read_text, resolve_context, tokenizer},
    output::{count, facts, plural, print, print_json, size, warn},
    progress::{Planned, Progress, duration},
    target::{Kind, TargetArgs},
};

const DEFAULT_SUB_GROUP: usize = 32;
const DEFAULT_SCALE_BITS: usize = 4;
const DEFAULT_STEPS: usize = 300;

/// What is written.
const MODEL: Kind = Kind::File("gguf");

pub fn run(args: &ConvertArgs) -> Result<()> {
    if !args.source.exists() && !args.dry_run {
        // Before a download that takes long.
        check_target(args, &[])?;
    }
    let stop = stop_when_interrupted()?;
    let path = locate(&args.source, args.quiet)?;
    args.compute.start()?;
    let source = open(&path)?;
    let settings = settings(args, source.config())?;
    let mut inputs = source.files();
    let text = args.calibration.as_ref().and_then(CalibrationText::file);
    inputs.extend(args.draft.iter().chain(text).cloned());
    if args.dry_run {
        // What stands in the way of the output is worth a word, not the plan.
        if let Err(error) = check_target(args, &inputs) {
            warn(&error.to_string());
        }
    }
    let plan = Plan::new(&*source, &settings)?;
    let float_bytes = float_bytes(&plan, args.max_memory)?;
    if let Some(warning) = plan.quantized_source_warning() {
        warn(&warning);
    }
    if args.dry_run {
        plan.warnings().iter().for_each(|warning| warn(warning));
        let (engine, _) = engine(&settings, &args.compute.device)?;
        let foretold = plan.foretell(&*source, &Resources { engine, float_bytes })?;
        match args.json {
            true => print_json(plan.to_json(&foretold))?,
            false => print(&plan.describe(args.max_memory, &foretold))?,
        }
        return Ok(());
    }
    if let Some(target) = args.card() {
        target.check(CARD, &inputs)?;
    }
    check_target(args, &inputs)?;
    let target = args.target.prepare(MODEL, &inputs)?;
    let begin = match args.target.force {
        _ if args.resume => Begin::Resume,
        true => Begin::Anew,
        false => Begin::New,
    };
    let work = WorkFolder::beside(target.path, begin, Arc::clone(&stop))?;
    keep(work.path());

    let start = Instant::now();
    let (engine, device) = engine(&settings, &args.compute.device)?;
    let mut progress =
        if args.quiet { Progress::silent() } else { Progress::new("block", plan.blocks) };
    let calibration = calibration(&source, &settings, args, &work, &mut progress)?;
    let mut block = Vec::new();
    let mut show = |step: Step<'_>| show(&mut progress, step, &mut block);
    let resources = Resources { engine, float_bytes };
    let job = Job { source: &*source, calibration: &calibration, settings: &settings, work: &work };
    let report = match (&args.draft, args.max_kl) {
        (Some(draft), _) => distill(&job, &SlimFile::open(draft)?, target, &mut show),
        (None, None) => convert(&job, &resources, target, &mut show),
        (None, Some(most)) => {
            let (needed, granted) = (quality_bytes(source.config()), args.max_memory);
            ensure!(
                needed <= granted,
                "`--max-kl`: the logits of both models take {}, of which `--max-memory` grants {}",
                size(needed),
                size(granted)
            );
            let ruler = Ruler::new(Arc::clone(&source))?;
            convert_within(&job, most, &ruler, &resources, target, &mut show)
        }
    };
    progress.finish();
    let (report, time) = (report?, start.elapsed());
    let check = Check::of(&report.paths[0], &source, &settings, args.max_memory)?;
    if let Some(page) = args.card() {
        let text = card(&report.paths[0], &*source, plan.source_bytes, &report, &check)?;
        page.write(CARD, &inputs, text.as_bytes())?;
    }
    if args.json {
        print_json(report_json(&report, &check, &device, time))?;
    } else if !args.quiet {
        print(&describe(&report, &check, &plan, device, args, time))?;
    }
    Ok(())
}

/// Checks the output, and what has the name of a part that may take its place.
fn check_target(args: &ConvertArgs, inputs: &[PathBuf]) -> Result<()> {
    args.target.check(MODEL, inputs)?;
    let TargetArgs { output, force } = &args.target;
    let parts = args.split_max_size.map(|_| parts_beside(output)).unwrap_or_default();
    parts
        .into_iter()
        .try_for_each(|output| TargetArgs { output, force: *force }.check(MODEL, inputs))
}

/// The settings that the arguments resolve to.
fn settings(args: &ConvertArgs, config: &ModelConfig) -> Result<Settings> {
    let sub_group = args.sub_group.unwrap_or(DEFAULT_SUB_GROUP);
    let method = if args.reference { Method::Reference } else { args.method };
    let coding = match args.scales {
        _ if args.reference => ScaleCoding::Paper,
        Scales::Paper => {
            ensure!(
                args.sub_group.is_none() && args.scale_bits.is_none(),
                "`--sub-group` and `--scale-bits` belong to `--scales two-level`"
            );
            ScaleCoding::Paper
        }
        Scales::Trellis => {
            ensure!(args.scale_bits.is_none(), "`--scale-bits` belongs to `--scales two-level`");
            ScaleCoding::Trellis { sub_group }
        }
        Scales::TwoLevel => ScaleCoding::TwoLevel {
            sub_group,
            scale_bits: args.scale_bits.unwrap_or(DEFAULT_SCALE_BITS) as u8,
        },
    };
    let is_trained = method == Method::SlimPlus;
    ensure!(args.steps.is_none() || is_trained, "`--steps` belongs to `--method slim+`");
    ensure!(args.draft.is_none() || is_trained, "`--draft` belongs to `--method slim+`");
    ensure!(
        args.max_kl.is_none() || method == Method::Slim,
        "`--max-kl` belongs to `--method slim`"
    );
    let context = match method {
        // Not used, whatever it is.
        Method::RoundToNearest => args.context.unwrap_or(USUAL_CONTEXT),
        _ => resolve_context(config, args.context)?,
    };
    let target_bpw = args.target_bpw.map(Target::BitsPerWeight);
    // Which size it will be is found out later.
    let any_size = args.max_kl.map(|_| Target::FileBytes(MOST_BYTES));
    let settings = Settings {
        bits: args.bits,
        target: target_bpw.or(args.target_size.map(Target::FileBytes)).or(any_size),
        group_size: args.group_size,
        coding,
        method,
        embed_bits: embed_bits(args, method),
        samples: args.samples,
        context,
        seed: args.seed,
        steps: args.steps.unwrap_or(DEFAULT_STEPS),
        draws_text: matches!(args.calibration, Some(CalibrationText::OfModel)),
        split_max_bytes: args.split_max_size,
    };
    settings.validate()?;
    Ok(settings)
}

/// The resolved bits of embedding and output layer.
fn embed_bits(args: &ConvertArgs, method: Method) -> Option<u8> {
    let has_joint_budget = args.target_size.is_some() || args.max_kl.is_some();
    let default = match method {
        Method::Reference => Some(16),
        Method::Gptq | Method::RoundToNearest => Some(6),
        Method::Slim | Method::SlimPlus if has_joint_budget => None,
        Method::Slim | Method::SlimPlus => Some(4),
    };
    args.embed_bits.map(|bits| bits as u8).or(default)
}

/// Leaves to activations and output Hessians what the rest of the work does not take.
fn float_bytes(plan: &Plan, max_memory: u64) -> Result<u64> {
    match max_memory.checked_sub(plan.working_bytes) {
        Some(float_bytes) => Ok(float_bytes),
        None => {
            let (found, needed) = (size(max_memory), size(plan.working_bytes));
            let message =
                format!("`--max-memory`: found {found}, but the largest layer takes {needed}");
            Err(advised(
                message,
                "activations and output Hessians go to temporary files, a layer's weights do not",
            ))
        }
    }
}

/// The calibration samples; none for a method that uses none.
fn calibration(
    source: &Arc<dyn ModelSource>,
    settings: &Settings,
    args: &ConvertArgs,
    work: &WorkFolder,
    progress: &mut Progress,
) -> Result<Calibration> {
    // Without one, what is written could not be run.
    let tokenizer = tokenizer(&**source)?;
    let of_text = |text: &str| Ok(Calibration::from_text(text, &tokenizer, settings)?);
    match (settings.method, &args.calibration) {
        (Method::RoundToNearest, None) => Ok(Calibration::drawn(Vec::new())),
        (Method::RoundToNearest, Some(_)) => {
            bail!("`--calibration`: round to nearest uses no calibration text")
        }
        (_, None) => of_text(BUILT_IN_CALIBRATION),
        (_, Some(CalibrationText::File(path))) => of_text(&read_text(path)?),
        (_, Some(CalibrationText::OfModel)) => draw(source, &tokenizer, settings, work, progress),
    }
}

/// What computes the calibration, and its name.
fn engine(settings: &Settings, choice: &Choice) -> Result<(Engine, String)> {
    let on_cpu = || (Engine::Cpu, "cpu".to_owned());
    let on_cuda = |number| -> Result<_, KernelError> {
        let device = Device::open(number)?;
        let name = format!("cuda:{number} ({})", device.name());
        Ok((Engine::Cuda(CudaBackend::new(device)), name))
    };
    let is_calibrated = settings.method != Method::RoundToNearest;
    match choice {
        Choice::Cpu => Ok(on_cpu()),
        Choice::Cuda(_) if !is_calibrated => {
            bail!("`--device`: round to nearest computes on the CPU")
        }
        Choice::Cuda(numbers) => match numbers[..] {
            [] => Ok(on_cuda(0)?),
            [number] => Ok(on_cuda(number)?),
            _ => bail!("`--device`: found {} GPUs, `convert` computes on one", numbers.len()),
        },
        // The result of `--reference` does not depend on the machine.
        Choice::Auto if settings.method == Method::Reference || !is_calibrated => Ok(on_cpu()),
        Choice::Auto => Ok(match Device::count() {
            // Without a GPU there is nothing to say.
            Ok(0) | Err(KernelError::NoDriver) => on_cpu(),
            _ => on_cuda(0).unwrap_or_else(|error| {
                warn(&format!("computing on the CPU: {error}"));
                on_cpu()
            }),
        }),
    }
}

/// Shows a step of the conversion; `block` are the errors of the block's layers so far.
fn show(progress: &mut Progress, step: Step<'_>, block: &mut Vec<Option<f32>>) {
    let shown = |error: Option<f32>| error.map_or(String::new(), |e| format!(", error {e:.5}"));
    match step {
        Step::Planned(work, units) => {
            let (usual_cost, family) = (work.usual_cost(), usize::from(work.is_rounding()));
            progress.plan(work as usize, Planned { units, usual_cost, family });
        }
        Step::Begun => progress.begin_work(),
        Step::Worked(work, units) => progress.worked(work as usize, units),
        Step::Survey { done, of } => {
            progress.begin("survey", of);
            progress.step(done, "what bits are worth");
        }
        Step::Layer(layer) => {
            block.push(layer.error);
            progress.detail(format_args!("{}{}", layer.name, shown(layer.error)));
        }
        Step::Block { done, of } => {
            progress.begin("block", of);
            let layers = plural(block.len(), "layer");
            progress.step(done, format_args!("{layers}{}", shown(mean(block.drain(..)))));
        }
        Step::Step { done, of, loss } => {
            progress.begin("step", of);
            progress.step(done, format_args!("divergence {loss:.4}"));
        }
        Step::Warning(warning) => progress.warn(warning),
    }
}

/// The mean of the errors that were measured.
fn mean(errors: impl Iterator<Item = Option<f32>>) -> Option<f32> {
    let errors: Vec<f32> = errors.flatten().collect();
    (!errors.is_empty()).then(|| errors.iter().sum::<f32>() / errors.len() as f32)
}

fn describe(
    report: &Report,
    check: &Check,
    plan: &Plan,
    device: String,
    args: &ConvertArgs,
    time: Duration,
) -> String {
    let mut layers = plural(report.matrices(), "quantized layer");
    if report.layers.len() > report.matrices() {
        layers += &format!(", stored in {} bands", report.layers.len());
    }
    let paths: Vec<_> = report.paths.iter().map(|path| path.display().to_string()).collect();
    let mut lines = vec![
        ("written", paths.join("\n")),
        ("layers", layers),
        (
            "bits per weight",
            format!("{:.3} in the blocks, everything counted", report.bits_per_weight),
        ),
    ];
    lines.push(("scales", plan.scales(report.bits_per_weight)));
    if let Some(error) = mean(report.layers.iter().map(|layer| layer.error)) {
        lines.push(("output error", format!("{error:.5} (relative, mean over layers)")));
    }
    lines.extend(report.degenerate.map(degenerate).filter(|(_, found)| !found.is_empty()));
    lines.extend(check.facts());
    if let (Some(most), [.., kept]) = (args.max_kl, &report.trials[..]) {
        lines.push(("promise", promise(most, kept, report.trials.len())));
    }
    let ratio = plan.source_bytes as f64 / report.file_bytes as f64;
    let (before, after) = (size(plan.source_bytes), size(report.file_bytes));
    lines.push(("size", format!("{after}, from {before}: {ratio:.2} times smaller")));
    lines.push(("device", device));
    lines.push(("time", duration(time)));
    let output = &paths[0];
    facts(&lines)
        + &format!("\ntry it:  slimllm run {output} -p \"Once upon a time\"\n")
        + &format!("look in: slimllm inspect {output} --bits\n")
}

/// How a promised divergence was kept.
fn promise(most: f64, kept: &Trial, conversions: usize) -> String {
    let Trial { predicted, measured, .. } = kept;
    format!(
        "KL {measured:.4} of at most {most} nats per token, mean over the texts above; \
         {predicted:.4} were predicted; {} tried",
        plural(conversions, "size")
    )
}

/// What was degenerate; empty if nothing was.
fn degenerate(found: Degenerate) -> (&'static str, String) {
    let Degenerate { dead_inputs, rank_deficient, zero_groups, seldom_experts } = found;
    let lines = [
        (dead_inputs, "columns whose inputs were 0 on every calibration token"),
        (rank_deficient, "matrices with fewer calibration tokens than columns"),
        (zero_groups, "groups of nothing but zeros"),
        (seldom_experts, "experts that few calibration tokens went through"),
    ];
    let lines = lines.into_iter().filter(|(found, _)| *found > 0);
    let lines = lines.map(|(found, what)| format!("{what}: {}", count(found as u64)));
    ("degenerate", lines.collect::<Vec<_>>().join("\n"))
}

fn report_json(report: &Report, check: &Check, device: &str, time: Duration) -> Json {
    let layer = |layer: &LayerReport| {
        json!({
            "name": layer.name,
            "rows": layer.rows,
            "cols": layer.cols,
            "bits": layer.bits,
            "bytes": layer.stored_bits / 8,
            "error": layer.error,
        })
    };
    let trial = |trial: &Trial| {
        json!({
            "file_bytes": trial.file_bytes,
            "kl_predicted": trial.predicted,
            "kl_measured": trial.measured,
        })
    };
    json!({
        "output": report.paths[0].to_string_lossy(),
        "files": report.paths.iter().map(|path| path.to_string_lossy()).collect::<Json>(),
        "file_bytes": report.file_bytes,
        "bits_per_weight": report.bits_per_weight,
        "device": device,
        "seconds": time.as_secs_f64(),
        "quality": check.to_json(),
        "trials": report.trials.iter().map(trial).collect::<Json>(),
        "degenerate": report.degenerate.map(|found| {
            json!({
                "dead_inputs": found.dead_inputs,
                "rank_deficient": found.rank_deficient,
                "zero_groups": found.zero_groups,
                "seldom_experts": found.seldom_experts,
            })
        }),
        "layers": report.layers.iter().map(layer).collect::<Json>(),
    })
}
