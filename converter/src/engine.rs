//! What calibration is computed with: the forward passes, and the sums that Hessians are made of.

use slim_formats::Weight;
use slim_kernels::{
    Backend, FloatCpu,
    cuda::{CudaBackend, Held},
    instruction_path,
    linalg::{self, Precision},
};

use crate::{Activations, Result};

/// The processor or a CUDA device. Each gives the same bytes every time, but not those of the
/// other.
pub enum Engine {
    /// The processor.
    Cpu,
    /// A CUDA device.
    Cuda(CudaBackend),
}

impl Engine {
    /// What decides in which order sums are rounded: that of the processor
    /// ([`instruction_path`]), and the architecture of a device that takes part.
    pub fn instruction_path(&self) -> String {
        let processor = instruction_path();
        match self {
            Self::Cpu => processor,
            Self::Cuda(backend) => {
                let (major, minor) = backend.device().compute_capability();
                format!("{processor}+cuda_sm{major}{minor}")
            }
        }
    }

    /// Where the operations of the forward passes run; a device has a precision of its own.
    pub(crate) fn backend(&self, precision: Precision) -> &dyn Backend {
        match (self, precision) {
            (Self::Cpu, Precision::Fine) => &FloatCpu(Precision::Fine),
            (Self::Cpu, Precision::Coarse) => &FloatCpu(Precision::Coarse),
            (Self::Cuda(backend), _) => backend,
        }
    }

    /// Keeps weights on the device, so that they need not be copied to it for each sample.
    pub(crate) fn hold<'w>(&self, weights: &[Weight<'w>]) -> Result<Vec<Held<'w>>> {
        match self {
            Self::Cpu => Ok(Vec::new()),
            Self::Cuda(backend) => {
                Ok(weights.iter().map(|&weight| backend.hold(weight)).collect::<Result<_, _>>()?)
            }
        }
    }

    /// Calls `f` with each task; on the processor with two at a time, so that what one of them does
    /// in one thread leaves no other thread idle.
    pub(crate) fn for_each<T: Send>(
        &self,
        mut tasks: impl Iterator<Item = T>,
        f: impl Fn(T) -> Result<()> + Sync,
    ) -> Result<()> {
        if let Self::Cuda(_) = self {
            return tasks.try_for_each(f);
        }
        while let Some(task) = tasks.next() {
            match tasks.next() {
                Some(next) => {
                    let (first, second) = rayon::join(|| f(task), || f(next));
                    first.and(second)?;
                }
                None => f(task)?,
            }
        }
        Ok(())
    }

    /// The sum of `x^T x` over all samples, `[n, n]`. What is below the diagonal is undefined. A
    /// device has a precision of its own.
    pub(crate) fn gram(&self, inputs: &Activations, precision: Precision) -> Result<Vec<f32>> {
        let n = inputs.width();
        let batches = inputs.batches().map(|batch| inputs.batch(batch));
        match self {
            Self::Cpu => {
                let mut sum = vec![0.0; n * n];
                batches.for_each(|x| linalg::add_gram(precision, &mut sum, x, n));
                Ok(sum)
            }
            Self::Cuda(backend) => {
                let mut sum = backend.gram(n)?;
                for x in batches {
                    sum.add(x)?;
                }
                Ok(sum.read()?)
            }
        }
    }
}
