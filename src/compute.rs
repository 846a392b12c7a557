//! Where and on how many threads a command computes.

use std::{collections::HashSet, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use clap::{ValueEnum, builder::RangedU64ValueParser};
use slim_formats::ModelSource;
use slim_kernels::{Cpu, KernelError, KvType, cuda::Device};
use slim_runtime::{CudaSettings, Model};

use crate::output::{note, plural, warn};

/// The flags of every command that computes.
#[derive(clap::Args)]
pub struct Compute {
    /// Threads to compute with [default: one per core]
    #[arg(short = 't', long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    threads: Option<usize>,

    /// Where to compute: auto (an NVIDIA GPU if there is one), cpu, cuda, or cuda:0,1,... for some
    /// of the GPUs
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    pub device: Choice,
}

/// The flags of every command that runs a model.
#[derive(clap::Args)]
pub struct Execution {
    #[command(flatten)]
    compute: Compute,

    /// Blocks to run on the GPU, the last ones of the model [default: as many as fit]
    #[arg(long, alias = "n-gpu-layers", value_name = "N")]
    gpu_layers: Option<usize>,

    /// How keys and values are stored: as 16-bit numbers, or as 8-bit codes in half the memory
    /// [default: 32-bit numbers on the CPU, f16 on GPUs]
    #[arg(long, value_enum, value_name = "TYPE")]
    kv_cache: Option<KvCacheType>,
}

/// A place to compute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// On GPUs if there are any that work.
    Auto,
    Cpu,
    /// On the GPUs with these numbers; on as many as the model needs if there are none.
    Cuda(Vec<usize>),
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum KvCacheType {
    F16,
    Q8,
}

impl From<KvCacheType> for KvType {
    fn from(kv_cache: KvCacheType) -> Self {
        match kv_cache {
            KvCacheType::F16 => Self::F16,
            KvCacheType::Q8 => Self::Q8,
        }
    }
}

impl Compute {
    /// Starts the threads; call once, before anything is computed.
    pub fn start(&self) -> Result<()> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.threads.unwrap_or(0));
        pool.build_global().context("cannot start the threads")
    }
}

impl Execution {
    /// Starts the threads; call once, before anything is computed.
    pub fn start(&self) -> Result<()> {
        self.compute.start()
    }

    /// Loads a model for texts of up to `context` tokens, and says what runs where unless all is on
    /// the CPU.
    pub fn load(&self, source: &Arc<dyn ModelSource>, context: usize) -> Result<Model> {
        let model = match &self.compute.device {
            Choice::Cpu => self.load_on_cpu(source)?,
            Choice::Cuda(numbers) => self.load_on_cuda(source, context, numbers)?,
            // Without a GPU there is nothing to say.
            Choice::Auto if matches!(Device::count(), Ok(0) | Err(KernelError::NoDriver)) => {
                self.load_on_cpu(source)?
            }
            Choice::Auto => match self.load_on_cuda(source, context, &[]) {
                Ok(model) => model,
                Err(error) if self.gpu_layers.is_some() => return Err(error),
                Err(error) => {
                    warn(&format!("computing on the CPU: {error:#}"));
                    self.load_on_cpu(source)?
                }
            },
        };
        let places = model.placement();
        if places.iter().any(|(device, _)| device != "cpu") {
            let blocks = |(device, range): &(String, std::ops::Range<usize>)| {
                format!("{} on {device}", plural(range.len(), "block"))
            };
            note(places.iter().map(blocks).collect::<Vec<_>>().join(", "));
        }
        Ok(model)
    }

    fn load_on_cpu(&self, source: &Arc<dyn ModelSource>) -> Result<Model> {
        ensure!(self.gpu_layers.unwrap_or(0) == 0, "`--gpu-layers` needs a GPU");
        let model = Model::load(Arc::clone(source), &Cpu)?;
        Ok(match self.kv_cache {
            Some(kv_cache) => model.with_kv_type(kv_cache.into()),
            None => model,
        })
    }

    fn load_on_cuda(
        &self,
        source: &Arc<dyn ModelSource>,
        context: usize,
        numbers: &[usize],
    ) -> Result<Model> {
        let open = |&number: &usize| anyhow::Ok((number, Device::open(number)?));
        let mut settings = CudaSettings {
            devices: vec![open(numbers.first().unwrap_or(&0))?],
            blocks: self.gpu_layers,
            kv_type: self.kv_cache.map_or(KvType::F16, KvType::from),
            context,
        };
        let others = match numbers {
            [] if settings.holds_all(&**source)? => Vec::new(),
            [] => (1..Device::count()?).collect(),
            [_, others @ ..] => others.to_vec(),
        };
        for number in &others {
            settings.devices.push(open(number)?);
        }
        Ok(Model::load_on_cuda(Arc::clone(source), &settings)?)
    }
}

/// What computes, in one word or a few: the devices of a model.
pub fn device_names(model: &Model) -> String {
    model.placement().into_iter().map(|(device, _)| device).collect::<Vec<_>>().join(", ")
}

fn parse_device(name: &str) -> Result<Choice, String> {
    let expected = "expected `auto`, `cpu`, `cuda`, or `cuda:` and numbers such as `0,1`";
    match (name, name.strip_prefix("cuda:")) {
        ("auto", _) => Ok(Choice::Auto),
        ("cpu", _) => Ok(Choice::Cpu),
        ("cuda", _) => Ok(Choice::Cuda(Vec::new())),
        (_, Some(numbers)) => {
            let numbers = numbers.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>();
            let numbers = numbers.map_err(|_| expected)?;
            let mut seen = HashSet::new();
            match numbers.iter().find(|number| !seen.insert(**number)) {
                None => Ok(Choice::Cuda(numbers)),
                Some(twice) => Err(format!("GPU {twice} twice, expected each once")),
            }
        }
        _ => Err(expected.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_named_once() {
        assert_eq!(parse_device("cuda:1,0,2"), Ok(Choice::Cuda(vec![1, 0, 2])));
        for twice in ["cuda:0,0", "cuda:0,1,0", "cuda:2,1,0,1"] {
            assert!(parse_device(twice).unwrap_err().contains("twice"), "{twice}");
        }
    }
}
