//! `slimllm bench`: how fast a model runs, and how close that is to what the memory allows.

mod workloads;

use std::{hint::black_box, sync::Arc, time::Instant};

use anyhow::Result;
use rayon::prelude::*;
use serde_json::json;
use slim_kernels::cuda::Device;
use slim_runtime::{Model, Sequence, Turn, Workspace};
use workloads::{Measured, Workload};

use crate::{
    args::BenchArgs,
    compute::device_names,
    open::check_context,
    output::{facts, plural, print, print_json, size},
};

/// Read to measure the memory bandwidth: several times what the caches of a server hold.
const BANDWIDTH_WORDS: usize = (1 << 30) / size_of::<u64>();
/// Passes over it, of which the fastest counts.
const BANDWIDTH_PASSES: usize = 5;

/// What is measured.
struct Measurement {
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    bytes_per_token: u64,
    bandwidth_bytes_per_s: f64,
    /// `None` where the system does not tell.
    peak_memory_bytes: Option<u64>,
    /// In use on the GPUs, by everybody; `None` without them.
    device_memory_bytes: Option<u64>,
    /// What computes.
    device: String,
    workloads: Vec<Measured>,
}

impl Measurement {
    /// The share of the memory bandwidth that decoding uses.
    fn bandwidth_fraction(&self) -> f64 {
        self.decode_tokens_per_s * self.bytes_per_token as f64 / self.bandwidth_bytes_per_s
    }
}

pub fn run(args: &BenchArgs) -> Result<()> {
    args.execution.start()?;
    let source = args.model.open()?;
    let workloads = Workload::all(args);
    let context = args.prompt.max(args.generate);
    let longest = workloads.iter().map(|workload| workload.text_tokens(args.generate));
    check_context(source.config(), longest.fold(context, usize::max))?;
    // A GPU keeps room for the keys and values of so many.
    let total = workloads.iter().map(|workload| workload.total_tokens(args.generate));
    let model = args.execution.load(&source, total.fold(context, usize::max))?;
    let measurement = measure(&model, context, workloads, args)?;
    match args.json {
        true => print_result_json(&measurement, args)?,
        false => print(&describe(&measurement, args))?,
    }
    Ok(())
}

fn measure(
    model: &Model,
    context: usize,
    workloads: Vec<Workload>,
    args: &BenchArgs,
) -> Result<Measurement> {
    let mut text = Texts::new(model, 1, context)?;
    // Brings the weights into memory.
    text.seconds_at_once(1)?;
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for _ in 0..args.runs {
        text.clear();
        prefill.push(args.prompt as f64 / text.seconds_at_once(args.prompt)?);
        text.clear();
        decode.push(args.generate as f64 / text.seconds_one_by_one(args.generate)?);
    }
    drop(text);
    Ok(Measurement {
        prefill_tokens_per_s: median(prefill),
        decode_tokens_per_s: median(decode),
        bytes_per_token: model.bytes_per_token(),
        // Before the bandwidth is measured, which takes memory of its own.
        peak_memory_bytes: peak_memory_bytes(),
        device_memory_bytes: device_memory_bytes(model)?,
        workloads: workloads
            .into_iter()
            .map(|workload| workload.measure(model, args))
            .collect::<Result<_>>()?,
        bandwidth_bytes_per_s: match model.devices().next() {
            Some(device) => device.copy_bandwidth(BANDWIDTH_WORDS * size_of::<u64>())?,
            None => bandwidth_bytes_per_s(),
        },
        device: device_names(model),
    })
}

/// Texts that are continued together, and what the model computes in.
struct Texts<'m> {
    model: &'m Model,
    sequences: Vec<Sequence>,
    workspace: Workspace,
}

impl<'m> Texts<'m> {
    /// So many empty ones with room for `capacity` tokens each.
    fn new(model: &'m Model, count: usize, capacity: usize) -> Result<Self> {
        let sequences = (0..count).map(|_| model.sequence(capacity)).collect::<Result<_, _>>()?;
        Ok(Self { model, sequences, workspace: model.workspace()? })
    }

    fn clear(&mut self) {
        self.sequences.iter_mut().for_each(|sequence| sequence.truncate(0));
    }

    /// Seconds to continue each text by `count` tokens in one step.
    fn seconds_at_once(&mut self, count: usize) -> Result<f64> {
        self.seconds(&tokens(self.model, count), count)
    }

    /// Seconds to continue each text by `count` tokens, one in a step.
    fn seconds_one_by_one(&mut self, count: usize) -> Result<f64> {
        self.seconds(&tokens(self.model, count), 1)
    }

    fn seconds(&mut self, tokens: &[u32], in_a_step: usize) -> Result<f64> {
        let start = Instant::now();
        for tokens in tokens.chunks(in_a_step) {
            let turns = self.sequences.iter_mut().map(|sequence| Turn { tokens, sequence });
            black_box(self.model.step(&mut turns.collect::<Vec<_>>(), &mut self.workspace)?);
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Tokens from all over the vocabulary.
fn tokens(model: &Model, count: usize) -> Vec<u32> {
    const STRIDE: usize = 7919;
    (0..count).map(|index| (index * STRIDE % model.config().vocab_size) as u32).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The speed of a plain read by all threads.
fn bandwidth_bytes_per_s() -> f64 {
    let words: Vec<u64> = (0..BANDWIDTH_WORDS as u64).into_par_iter().collect();
    let share = words.len().div_ceil(rayon::current_num_threads());
    let seconds = (0..BANDWIDTH_PASSES).map(|_| {
        let start = Instant::now();
        let sum = |part: &[u64]| part.iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
        black_box(words.par_chunks(share).map(sum).reduce(|| 0, u64::wrapping_add));
        start.elapsed().as_secs_f64()
    });
    size_of_val(words.as_slice()) as f64 / seconds.fold(f64::INFINITY, f64::min)
}

fn device_memory_bytes(model: &Model) -> Result<Option<u64>> {
    let used = |device: &Arc<Device>| Ok(device.total_memory() - device.free_memory()?);
    let used: Vec<u64> = model.devices().map(used).collect::<Result<_>>()?;
    Ok((!used.is_empty()).then(|| used.iter().sum()))
}

/// The most memory that this process has had at a time, mapped files included.
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

fn print_result_json(measurement: &Measurement, args: &BenchArgs) -> std::io::Result<()> {
    print_json(json!({
        "prefill_tokens_per_s": measurement.prefill_tokens_per_s,
        "decode_tokens_per_s": measurement.decode_tokens_per_s,
        "bytes_per_token": measurement.bytes_per_token,
        "bandwidth_bytes_per_s": measurement.bandwidth_bytes_per_s,
        "bandwidth_fraction": measurement.bandwidth_fraction(),
        "peak_memory_bytes": measurement.peak_memory_bytes,
        "device_memory_bytes": measurement.device_memory_bytes,
        "device": measurement.device,
        "threads": rayon::current_num_threads(),
        "prompt": args.prompt,
        "generate": args.generate,
        "runs": args.runs,
        "workloads": measurement.workloads.iter().map(Measured::to_json).collect::<Vec<_>>(),
    }))
}

fn describe(measurement: &Measurement, args: &BenchArgs) -> String {
    let speed = |tokens_per_s, tokens, how| {
        let runs = plural(args.runs, "run");
        format!("{tokens_per_s:.1} tokens/s ({tokens} tokens {how}, median of {runs})")
    };
    let bandwidth = format!(
        "{:.1} GB/s measured, {:.1} % used by decoding",
        measurement.bandwidth_bytes_per_s / 1e9,
        100.0 * measurement.bandwidth_fraction()
    );
    let threads = plural(rayon::current_num_threads(), "thread");
    let mut lines = vec![
        ("prefill", speed(measurement.prefill_tokens_per_s, args.prompt, "at once")),
        ("decode", speed(measurement.decode_tokens_per_s, args.generate, "one by one")),
        ("per token", format!("{} of weights", size(measurement.bytes_per_token))),
        ("bandwidth", bandwidth),
        ("peak memory", measurement.peak_memory_bytes.map_or("unknown".to_owned(), size)),
    ];
    lines.extend(measurement.device_memory_bytes.map(|bytes| ("GPU memory", size(bytes))));
    lines.push(("device", format!("{}, {threads}", measurement.device)));
    match &measurement.workloads[..] {
        [] => facts(&lines),
        workloads => format!("{}\n{}", facts(&lines), workloads::describe(workloads)),
    }
}
