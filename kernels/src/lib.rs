//! Packed-group math: what a weight is worth, and the operations of a forward pass.
//!
//! [`Backend`] lists the operations; [`Scalar`] is the oracle, [`Cpu`] is what runs.

mod backend;
mod cpu;
mod error;
pub mod ggml;
pub mod linalg;
mod reference;
#[cfg(test)]
mod tests;
pub mod weight;

pub use backend::{AttentionShape, Backend, KvView, RopeAngles};
pub use cpu::{Cpu, kl_divergence, log_softmax};
pub use error::{KernelError, Result};
pub use reference::Scalar;

use slim_formats::Weight;

/// The checks that every `matmul` makes.
fn check_matmul(w: Weight<'_>, x: &[f32], m: usize, out: &[f32]) -> Result<()> {
    let (rows, cols) = weight::shape(w);
    for (what, found, expected) in [("inputs", x.len(), m * cols), ("outputs", out.len(), m * rows)]
    {
        if found != expected {
            return Err(KernelError::ShapeMismatch { what, found, expected });
        }
    }
    Ok(())
}
