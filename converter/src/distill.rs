//! `slim+`: trains the scales and norms of a quantized model end to end, its codes fixed, towards
//! the distributions of its source.

mod layer;
mod parameters;
mod student;

use std::ops::Range;

use slim_formats::{
    DType, FormatError, ModelSource, OutputPath, Weight,
    gguf::Metadata,
    slim::{LayerInfo, Outline, SlimFile, SlimWriter, WrittenFile},
};
use slim_kernels::{instruction_path, linalg::Precision};

use self::student::Student;
use crate::{
    ConvertError, Job, LayerReport, Method, Progress, Report, Result, Settings, Work,
    backward::{Backward, Loss},
    calibration::Windows,
    provenance::{self, INSTRUCTIONS, SPLIT, STEPS},
    work,
};

/// Of the products of both models.
const PRECISION: Precision = Precision::Coarse;

/// Sequences that go through both models in one step.
const SEQUENCES: usize = 2;

/// Tokens of a sequence, at most.
const SEQUENCE_TOKENS: usize = 512;

/// Steps over which the rate rises to its full height.
const WARM_UP: f64 = 10.0;

/// Steps after which the training is recorded.
const STEPS_PER_RECORD: usize = 25;

/// The record of a training.
const TRAINING: &str = "training";

/// Trains `draft`, a SliM file of the source of `job`, for some steps on windows of the calibration
/// text, and writes the result as `target`, which appears when all is done.
///
/// Of the settings, steps, context and seed count.
///
/// # Memory
/// One linear layer in f32, and what `backward` needs for 1,024 tokens.
///
/// # Errors
/// A file or tensor that cannot be used, a draft of another model, or a divergence that is no
/// number; `Interrupted` if the caller wants it to stop.
pub fn distill<'p>(
    job: &Job<'_>,
    draft: &SlimFile,
    target: impl Into<OutputPath<'p>>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    let Job { source, calibration, settings, work } = *job;
    if draft.config() != source.config() {
        return Err(ConvertError::InvalidSetting {
            what: "draft",
            found: format!("`{}` with other hyperparameters", draft.path().display()),
            expected: format!("a SliM file of `{}`", source.path().display()),
        });
    }
    let instructions = instruction_path();
    let mut identity = provenance::metadata(source, calibration, settings, &instructions)?;
    // The header has the hashes of all tensors.
    let hash = draft.gguf().metadata().u64("slim.header.xxh3").unwrap_or_default();
    identity.insert("slim.draft.xxh3", hash)?;
    work.identify(&identity)?;
    let report = train(job, draft, target.into(), progress)?;
    work.remove();
    Ok(report)
}

/// [`distill`], once the work folder knows what it is for.
pub fn train(
    job: &Job<'_>,
    draft: &SlimFile,
    target: OutputPath<'_>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    let Job { source, calibration, settings, work } = *job;
    target.check_file()?;
    let mut student = Student::new(draft)?;
    let teacher = Backward::load(source, PRECISION)?;
    let first = work.get(TRAINING).and_then(|record| student.resume(&record)).unwrap_or(0);
    let tokens = settings.context.min(SEQUENCE_TOKENS);
    let work_of_step = work::step(source.decoder(), settings);
    let steps_left = settings.steps.saturating_sub(first);
    progress(Progress::Planned(Work::Steps, work_of_step * steps_left as f64));
    // Not in the order of the calibration samples.
    let mut windows = Windows::new(&calibration.text, tokens, !settings.seed);
    windows.by_ref().take(first * SEQUENCES).for_each(drop);
    for step in first..settings.steps {
        let sequences: Vec<&[u32]> = windows.by_ref().take(SEQUENCES).collect();
        let rate = rate(step, settings.steps);
        let loss = train_on(&teacher, &mut student, &sequences, rate, step + 1)?;
        if !loss.is_finite() {
            return Err(ConvertError::InvalidSetting {
                what: "divergence from the source while training",
                found: format!("{loss} in step {}", step + 1),
                expected: "a finite number; try fewer steps, or method `slim`".into(),
            });
        }
        let done = step + 1;
        progress(Progress::Worked(Work::Steps, work_of_step));
        progress(Progress::Step { done, of: settings.steps, loss });
        if done < settings.steps && (done.is_multiple_of(STEPS_PER_RECORD) || work.is_to_stop()) {
            work.put(TRAINING, &student.record(done))?;
            work.go_on()?;
        }
    }
    let written = write(draft, &student, settings, target)?;
    report(draft, written)
}

/// Tokens that a step trains on.
pub fn tokens_of_step(settings: &Settings) -> usize {
    SEQUENCES * settings.context.min(SEQUENCE_TOKENS)
}

/// The share of the full rate in step `step`, counted from 0: a linear rise, then half a cosine
/// down to zero.
fn rate(step: usize, steps: usize) -> f64 {
    let rise = ((step + 1) as f64 / WARM_UP).min(1.0);
    let fall = 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos());
    rise * fall
}

/// One step, number `step` counted from 1; gives the loss before it.
fn train_on(
    teacher: &Backward<'_>,
    student: &mut Student<'_>,
    sequences: &[&[u32]],
    rate: f64,
    step: usize,
) -> Result<f64> {
    let states = teacher.states(sequences)?;
    let width = teacher.decoder.embedding_size;
    let mut logits =
        |tokens: Range<usize>| teacher.logits(&states[tokens.start * width..tokens.end * width]);
    student.step(sequences, &mut Loss::Divergence(&mut logits), rate as f32, step)
}

/// Writes `file` with what `student` has of it after the steps of `settings`.
fn write(
    file: &SlimFile,
    student: &Student<'_>,
    settings: &Settings,
    target: OutputPath<'_>,
) -> Result<WrittenFile, FormatError> {
    let (outline, metadata) = (trained_outline(file, student)?, trained_metadata(file, settings)?);
    let bytes = outline.part_bytes(target.path, &metadata, None)?.iter().sum();
    let mut writer = SlimWriter::create(target, &outline, metadata)?;
    writer.reserve(bytes)?;
    if let Some(most) = settings.split_max_bytes {
        writer.split(most, &outline)?;
    }
    for info in file.gguf().tensors() {
        // Parts of layers are no tensors of the model; the first one stands for its layer.
        if let Some(Weight::Dense(tensor)) = file.tensor(&info.name)? {
            match student.norm(&info.name) {
                Some(values) => {
                    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                    writer.dense(&info.name, DType::F32, &info.shape, &bytes)?;
                }
                None => writer.dense(&info.name, info.dtype, &info.shape, tensor.bytes)?,
            }
        } else if let Some(name) = info.name.strip_suffix(".bits")
            && let Some(layer) = file.layer(name)
        {
            match student.layer(name) {
                Some(trained) => writer.layer(name, trained, None)?,
                None => writer.layer(name, &layer.to_layer(), None)?,
            }
        }
    }
    writer.finish()
}

/// The tensors of `file` once it is trained: those that it has, norms as F32.
fn trained_outline(file: &SlimFile, student: &Student<'_>) -> Result<Outline, FormatError> {
    let mut outline = Outline::default();
    for info in file.gguf().tensors() {
        if let Some(Weight::Dense(_)) = file.tensor(&info.name)? {
            let is_trained = student.norm(&info.name).is_some();
            let dtype = if is_trained { DType::F32 } else { info.dtype };
            outline.dense(&info.name, dtype, &info.shape);
        } else if let Some(name) = info.name.strip_suffix(".bits")
            && let Some(layer) = file.layer(name)
        {
            outline.layer(name, layer.layout(), None);
        }
    }
    Ok(outline)
}

/// The metadata of `file` after the steps of `settings`.
fn trained_metadata(file: &SlimFile, settings: &Settings) -> Result<Metadata, FormatError> {
    const METHOD: &str = "slim.quantization.method";
    let before = file.given_metadata();
    let steps = before.u64(STEPS).unwrap_or(0) + settings.steps as u64;
    let ours = instruction_path();
    let instructions = match before.str(INSTRUCTIONS) {
        // A device may have taken part in what was done on this processor.
        Some(theirs) if theirs.starts_with(&ours) => theirs.to_owned(),
        Some(theirs) => format!("{theirs}, {ours}"),
        None => ours,
    };
    let mut metadata = Metadata::new();
    let replaced = [METHOD, STEPS, INSTRUCTIONS, SPLIT];
    for (key, value) in before.iter().filter(|(key, _)| !replaced.contains(key)) {
        metadata.insert(key, value.clone())?;
    }
    metadata.insert(INSTRUCTIONS, instructions)?;
    metadata.insert(METHOD, Method::SlimPlus.name())?;
    metadata.insert(STEPS, u32::try_from(steps).unwrap_or(u32::MAX))?;
    if let Some(most) = settings.split_max_bytes {
        metadata.insert(SPLIT, most)?;
    }
    Ok(metadata)
}

/// What is told about `file` once it is trained. The errors of its layers were those of the codes
/// before.
fn report(file: &SlimFile, written: WrittenFile) -> Result<Report> {
    let layer = |info: &LayerInfo| LayerReport::new(&info.name, &info.layout, None);
    let layers = file.layers().iter().map(layer).collect();
    // Files of other writers, and our older ones, may have linear layers of 16 bits.
    let mut dense = Vec::new();
    for name in file.tensor_names().into_iter().filter(|name| name.starts_with("blk.")) {
        if let Some(Weight::Dense(tensor)) = file.tensor(name)?
            && tensor.rows > 1
        {
            dense.push(tensor);
        }
    }
    Ok(Report::new(layers, &dense, written, Vec::new()))
}
