//! Operations on a CUDA device: the kernels of `kernels/cuda`, and what they need around them.
//!
//! [`Device`] opens a device and launches every kernel; [`Buffer`] is memory on it, [`Matrix`] a
//! weight, [`Operands`] the input of a product, [`KvCache`] the keys and values of a block. Work
//! goes to one stream, in the order of the calls, and calls return before it is done: only
//! [`View::read`] and [`Device::synchronize`] wait. [`CudaBackend`] computes the operations of a
//! [`crate::Backend`] on activations in host memory.
//!
//! Nothing here links to CUDA: the driver is looked up when a device is opened. What the driver
//! cannot check is written in `driver.rs` and `launch`; the rest is safe code.

mod arguments;
mod attention;
mod backend;
mod buffer;
mod device;
mod driver;
mod experts;
mod launch;
mod matrix;
mod operands;
mod timing;
mod top_k;

pub use attention::{
    Attention, HeadNorms, KvCache, Position, RopeTables, Rotation, Scores, Tokens,
};
pub use backend::{CudaBackend, Gram, Held};
pub use buffer::{Buffer, View, ViewMut};
pub use device::{Device, Graph};
pub use experts::{ExpertWeights, Experts, Routed};
pub use launch::{Neurons, Next, Norm, Strided};
pub use matrix::Matrix;
pub use operands::Operands;
pub use top_k::TopK;

use crate::{KernelError, Result};

fn check_equal(what: &'static str, found: usize, expected: usize) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => Err(KernelError::ShapeMismatch { what, found, expected }),
    }
}

fn check_limit(what: &'static str, found: usize, limit: usize) -> Result<()> {
    match found <= limit {
        true => Ok(()),
        false => Err(KernelError::TooLarge { what, found, limit }),
    }
}
