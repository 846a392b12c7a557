//! What a conversion will take, found out before it: a little of each kind of its work is done, and
//! nothing is written.

use std::time::{Duration, Instant};

use slim_formats::{Decoder, ModelSource, Weight, arch::Tensor};
use slim_kernels::weight;
use slim_runtime::Block;

use crate::{
    Contents, Engine, Method, Progress, Resources, Result, Settings, Work,
    activations::StageInputs,
    backward::{BATCH_TOKENS, sensitivities},
    budget::try_fits,
    calibrator::{Calibrator, Layer, Visitor, scratch_bytes},
    finite::finite_rows,
    hessian::Hessian,
    layer::{FactoredHessian, LayerInputs, try_layer},
    quality::CHECKED_TOKENS,
    rows::{OutputHessian, Targets, output_hessian_sizes},
    work,
};

/// Seconds that the longest trial of the reverse pass takes on a usual machine, and its tokens.
const PASS_SECONDS: f64 = 20.0;
const FEWEST_TOKENS: usize = 64;
const MOST_TOKENS: usize = 512;
/// Tokens that the first block is calibrated on.
const BLOCK_TOKENS: usize = 1024;

/// What a conversion takes.
#[derive(Debug, Clone, Copy)]
pub struct Foretold {
    /// From the first step to the last, with the check of the result; without a text that the model
    /// writes.
    pub time: Duration,
    /// On the disk of the output while it runs: the output, what is kept in case that it ends
    /// early, and what the memory does not hold.
    pub disk_bytes: u64,
}

/// Tries a conversion of `source` out, which will have `contents`.
///
/// # Errors
/// As the first steps of a conversion: a tensor that cannot be used, a device that fails.
pub fn foretell(
    source: &dyn ModelSource,
    contents: &Contents,
    settings: &Settings,
    resources: &Resources,
) -> Result<Foretold> {
    settings.validate()?;
    let decoder = source.decoder();
    let method = if settings.method == Method::SlimPlus { Method::Slim } else { settings.method };
    let tried = &Settings { method, ..settings.clone() };
    let mut stopwatch = Stopwatch::start();
    if settings.has_budget() {
        stopwatch.of_kind[Work::Sensitivities as usize] =
            try_reverse_pass(source, tried, resources)?;
    }
    try_rounding(source, tried, &mut |step| stopwatch.take(&step))?;
    if settings.method != Method::RoundToNearest {
        try_block(source, tried, resources, &mut stopwatch)?;
    }
    let planned = |kind: Work| {
        let checked = if kind == Work::Forward { check(decoder) } else { 0.0 };
        (kind, kind.planned(decoder, contents, settings, None) + checked)
    };
    let file_bytes = contents.expected_file_bytes(settings.target)?;
    let outputs = output_hessian_sizes(decoder).filter(|_| settings.has_budget()).sum::<u64>();
    let scratch = scratch_bytes(decoder, settings, resources.float_bytes) as u64;
    let draft = if settings.method == Method::SlimPlus { file_bytes } else { 0 };
    Ok(Foretold {
        time: stopwatch.time_of(Work::ALL.map(planned)),
        disk_bytes: 2 * file_bytes + draft + outputs + scratch,
    })
}

/// The multiplications of the check of a result, in source and result.
fn check(decoder: &Decoder) -> f64 {
    let matrices = decoder.tensors().iter().filter(|tensor| tensor.is_matrix());
    let weights: f64 = matrices.map(|tensor| work::weights(tensor.shape())).sum();
    2.0 * CHECKED_TOKENS as f64 * weights
}

/// What each kind of work has taken so far.
struct Stopwatch {
    last: Instant,
    /// Units and seconds.
    of_kind: [(f64, f64); Work::ALL.len()],
}

impl Stopwatch {
    fn start() -> Self {
        Self { last: Instant::now(), of_kind: [(0.0, 0.0); Work::ALL.len()] }
    }

    fn take(&mut self, step: &Progress<'_>) {
        let now = Instant::now();
        if let Progress::Worked(kind, units) = *step {
            let (all, seconds) = &mut self.of_kind[kind as usize];
            *all += units;
            *seconds += (now - self.last).as_secs_f64();
        }
        if matches!(step, Progress::Worked(..) | Progress::Begun) {
            self.last = now;
        }
    }

    /// Seconds of a unit: as measured, or else by what other work has taken, that of the kind's
    /// family first.
    fn cost(&self, kind: Work) -> f64 {
        let (units, seconds) = self.of_kind[kind as usize];
        if units > 0.0 {
            return seconds / units;
        }
        let slowness = |is_like: &dyn Fn(Work) -> bool| {
            let tried = Work::ALL.into_iter().filter(|&other| is_like(other));
            let tried = tried.map(|other| (other, self.of_kind[other as usize]));
            let (usual, found) = tried.fold((0.0, 0.0), |(usual, found), (kind, of_kind)| {
                (usual + of_kind.0 * kind.usual_cost(), found + of_kind.1)
            });
            (usual > 0.0).then(|| found / usual)
        };
        let of_family = slowness(&|other| other.is_rounding() == kind.is_rounding());
        of_family.or_else(|| slowness(&|_| true)).unwrap_or(1e-12) * kind.usual_cost()
    }

    fn time_of(&self, planned: [(Work, f64); Work::ALL.len()]) -> Duration {
        let seconds = planned.into_iter().map(|(kind, units)| units * self.cost(kind));
        Duration::from_secs_f64(seconds.sum())
    }
}

/// Samples of some tokens of the vocabulary.
fn samples(decoder: &Decoder, settings: &Settings, tokens: usize) -> Vec<Vec<u32>> {
    const STRIDE: usize = 7919;
    let context = settings.context.min(tokens).max(1);
    let token = |index: usize| (index * STRIDE % decoder.vocab_size) as u32;
    let sample = |first: usize| (first * context..(first + 1) * context).map(token).collect();
    (0..settings.samples.min(tokens / context).max(1)).map(sample).collect()
}

/// Units and seconds of the reverse pass of a batch, by two with fewer tokens: a part of the time
/// does not depend on their number.
fn try_reverse_pass(
    source: &dyn ModelSource,
    settings: &Settings,
    resources: &Resources,
) -> Result<(f64, f64)> {
    let decoder = source.decoder();
    let of_token = work::sensitivities(decoder, 1) * Work::Sensitivities.usual_cost() * 1e-12;
    let tokens = ((PASS_SECONDS / of_token) as usize).clamp(FEWEST_TOKENS, MOST_TOKENS);
    let seconds = |tokens: usize| -> Result<f64> {
        let samples = &samples(decoder, settings, tokens)[..1];
        let (start, mut seconds) = (Instant::now(), 0.0);
        sensitivities(source, samples, &mut { resources.float_bytes }, &mut |_| {
            seconds = start.elapsed().as_secs_f64();
        })?;
        Ok(seconds)
    };
    let of_batch = samples(decoder, settings, BATCH_TOKENS).concat().len();
    let tokens = tokens.min(settings.context).min(of_batch);
    let few = tokens.div_ceil(4);
    // The first pass finds the weights on the disk.
    seconds(few)?;
    let (of_few, of_all) = (seconds(few)?, seconds(tokens)?);
    source.release_pages();
    let of_more = (of_all - of_few).max(0.0) / (tokens - few).max(1) as f64;
    let seconds = of_all + of_more * (of_batch - tokens) as f64;
    Ok((work::sensitivities(decoder, of_batch), seconds))
}

/// The first block, as it is calibrated; its layers stay as they are.
fn try_block(
    source: &dyn ModelSource,
    settings: &Settings,
    resources: &Resources,
    stopwatch: &mut Stopwatch,
) -> Result<()> {
    let decoder = source.decoder();
    let samples = samples(decoder, settings, BLOCK_TOKENS);
    let (count, context) = (samples.len(), samples[0].len());
    let settings = &Settings { samples: count, context, ..settings.clone() };
    let embedding = source.require(&decoder.embedding().name)?;
    let mut memory_left = resources.float_bytes;
    let engine = &resources.engine;
    let mut calibrator =
        Calibrator::new(source, embedding, &samples, settings, engine, &mut memory_left)?;
    stopwatch.take(&Progress::Begun);
    let mut trial = Trial { decoder, settings, stopwatch };
    calibrator.pass_block(0, &Block::load(source, 0)?, &mut trial)?;
    stopwatch.take(&Progress::Worked(Work::Forward, work::forward(decoder, 0, settings)));
    source.release_pages();
    Ok(())
}

/// Computes the Hessians of a block, and leaves its layers as they are.
struct Trial<'t> {
    decoder: &'t Decoder,
    settings: &'t Settings,
    stopwatch: &'t mut Stopwatch,
}

impl Visitor for Trial<'_> {
    fn stage(
        &mut self,
        layers: &[(&Tensor, Weight<'_>)],
        inputs: StageInputs<'_>,
        engine: &Engine,
    ) -> Result<Vec<Layer>> {
        self.stopwatch.take(&Progress::Worked(Work::Forward, 0.0));
        if let Some((first, _)) = layers.iter().find(|(tensor, _)| !tensor.part.stays_precise()) {
            let inputs = LayerInputs::new(inputs, self.settings, engine);
            inputs.map_err(|error| error.of_layer(&first.name))?;
            let units = work::hessian(first, self.decoder, self.settings);
            self.stopwatch.take(&Progress::Worked(Work::Hessians, units));
        }
        Ok(layers.iter().map(|_| Layer::Kept).collect())
    }

    fn expert(&mut self, _: usize, _: u16, _: usize) {}
}

/// Does a little of what comes late, so that it is known early how long that takes on this
/// machine.
pub fn try_rounding(
    source: &dyn ModelSource,
    settings: &Settings,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<()> {
    const ROWS: usize = 512;
    const COLS: usize = 1024;
    let tensors = source.decoder().tensors();
    let Some(Tensor { name, .. }) = tensors.iter().find(|tensor| tensor.is_linear()) else {
        return Ok(());
    };
    let found = source.require(name)?;
    let (rows, cols) = weight::shape(found);
    let (rows, cols_tried) = (rows.min(ROWS), cols.min(COLS) / 16 * 16);
    if cols_tried == 0 {
        return Ok(());
    }
    let weights = finite_rows(name, found, 0..rows)?;
    let of_row = |row: &[f32]| row[..cols_tried].to_vec();
    let weights: Vec<f32> = weights.chunks_exact(cols).flat_map(of_row).collect();
    // Inputs that hang together, as inputs do: how many codes a refinement changes, and so how
    // long it takes, depends on it.
    let correlation = |(i, j): (usize, usize)| 0.9f32.powi(i.abs_diff(j) as i32);
    let places = (0..cols_tried).flat_map(|i| (0..cols_tried).map(move |j| (i, j)));
    let hessian = Hessian::new(places.map(correlation).collect(), cols_tried);
    let hessian = FactoredHessian::new(hessian, settings)?;
    let outputs = OutputHessian::zeros(rows, &mut { u64::MAX })?;

    for _ in 0..3 {
        progress(Progress::Begun);
        try_fits(&weights, cols_tried, settings);
        progress(Progress::Worked(Work::Fits, work::weights((rows, cols_tried))));
        for (outputs, kind) in [(None, Work::Sweeps), (Some(&outputs), Work::LinkedSweeps)] {
            let strip = settings.coding.strip_rows();
            let mut targets = Targets::new(weights.clone(), cols_tried, outputs, strip)?;
            try_layer(&mut targets, settings, &hessian);
            progress(Progress::Worked(kind, work::sweep((rows, cols_tried))));
        }
    }
    Ok(())
}
