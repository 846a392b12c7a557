//! Where and on how many threads a command computes.

use anyhow::Context as _;
use clap::builder::RangedU64ValueParser;
use slim_kernels::{Backend, Cpu};

/// The flags of every command that computes.
#[derive(clap::Args)]
pub struct Compute {
    /// Threads to compute with [default: one per core]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    threads: Option<usize>,

    /// Where to compute: auto or cpu
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    device: Device,
}

/// A place to compute.
#[derive(Clone, Copy)]
enum Device {
    Cpu,
}

impl Compute {
    /// Starts the threads; call once, before anything is computed.
    pub fn start(&self) -> anyhow::Result<&'static dyn Backend> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.threads.unwrap_or(0));
        pool.build_global().context("cannot start the threads")?;
        Ok(match self.device {
            Device::Cpu => &Cpu,
        })
    }

    /// The name of the device.
    pub fn device(&self) -> &'static str {
        match self.device {
            Device::Cpu => "cpu",
        }
    }
}

fn parse_device(name: &str) -> Result<Device, String> {
    match name {
        "auto" | "cpu" => Ok(Device::Cpu),
        _ if name == "cuda" || name.starts_with("cuda:") => {
            Err("this build runs on the CPU; leave the option out".to_owned())
        }
        _ => Err("expected `auto` or `cpu`".to_owned()),
    }
}
