//! Packed-group math: what a weight is worth, and the operations of a forward pass.
//!
//! [`Backend`] lists the operations; [`Scalar`] is the oracle, [`Cpu`] is what runs.

/// Compiles a function once for each instruction set below and picks among them at run time.
///
/// Closures that are not inlined into the function lose its instruction set: write hot loops out.
#[macro_export]
macro_rules! per_isa {
    ($function:item) => {
        #[$crate::multiversion::multiversion(targets(
            "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma+f16c",
            "x86_64+avx2+fma+f16c",
            "aarch64+neon"
        ))]
        $function
    };
}

mod backend;
mod cpu;
pub mod cuda;
mod error;
pub mod ggml;
mod instructions;
mod kv;
pub mod linalg;
pub mod narrow;
mod reference;
#[cfg(test)]
mod tests;
pub mod weight;

#[doc(hidden)]
pub use multiversion;

pub use backend::{AttentionCall, AttentionShape, Backend, RopeAngles};
#[doc(hidden)]
pub use cpu::matvec;
pub use cpu::{
    Cpu, DeltaCall, FloatCpu, attention, cap, convolve, delta_net, delta_step, exp,
    input_with_slope, kl_divergence, log_softmax, matmul, sigmoid, softplus, split, unit,
    with_slope,
};
pub use error::{KernelError, Result};
pub use instructions::instruction_path;
pub use kv::{KvCache, KvRows, KvType};
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
