//! Tests the CUDA kernels against the scalar reference, and measures them: one program for a
//! machine that has a driver and nothing else. The last lines of its output are the summary.

mod bench;
mod cublas;
mod parity;
mod perplexity;
mod report;
mod source;
mod weights;

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use slim_kernels::cuda::Device;

use crate::{bench::Scale, report::Report};

/// Tests the CUDA kernels of slimllm on this machine's device, then measures them.
///
/// Fails if a result differs from the reference by more than its bound; a measurement that misses
/// its bound is only marked.
#[derive(Parser)]
struct Args {
    /// Test, but do not measure
    #[arg(long)]
    parity: bool,
    /// Measure, but do not test: for a profiler
    #[arg(long, conflicts_with = "parity")]
    bench: bool,
    /// Measure products of one token alone (`scripts/mvbench`)
    #[arg(long, conflicts_with_all = ["parity", "bench"])]
    matvec: bool,
    /// Measure tiny shapes: proves that the program runs
    #[arg(long)]
    smoke: bool,
    /// Number of the device
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// Instead compare the perplexity of this model on the device and on the CPU
    #[arg(long, requires = "text")]
    model: Option<PathBuf>,
    /// Text to evaluate
    #[arg(long, requires = "model")]
    text: Option<PathBuf>,
    /// Windows of 512 tokens of it
    #[arg(long, default_value_t = 4)]
    windows: usize,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether every test has passed.
fn run(args: &Args) -> Result<bool> {
    let device = Device::open(args.device)?;
    let mut report = Report::default();
    let (major, minor) = device.compute_capability();
    let gigabytes = device.total_memory() as f64 / 1e9;
    let about = format!(
        "sm_{major}{minor}, {} multiprocessors, {gigabytes:.1} GB",
        device.multiprocessors()
    );
    report.fact(device.name(), about);
    report.fact("NVIDIA driver", driver_version());
    if let (Some(model), Some(text)) = (&args.model, &args.text) {
        perplexity::compare(&device, model, text, args.windows, &mut report)?;
        return Ok(report.finish());
    }
    let scale = if args.smoke { Scale::SMOKE } else { Scale::FULL };
    if args.matvec {
        bench::one_token(&device, &scale, &mut report)?;
        return Ok(report.finish());
    }
    if !args.bench {
        parity::run(&device, &mut report);
    }
    if !args.parity {
        // What was found until then is worth more than the rest.
        if let Err(error) = bench::run(&device, &scale, &mut report) {
            report.stopped(&error);
        }
    }
    Ok(report.finish())
}

/// The version that the kernel module tells, if there is one.
fn driver_version() -> String {
    let text = fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let is_version =
        |word: &&str| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit());
    text.split_whitespace().find(is_version).unwrap_or("unknown").to_owned()
}
