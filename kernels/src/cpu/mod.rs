//! The CPU backend: loops that the compiler vectorises, in versions for AVX-512, AVX2 and NEON that
//! are chosen once at run time (`multiversion`), and parallel over pieces of fixed size.

mod attention;
mod dequantize;
mod elementwise;
pub mod matvec;
mod recurrent;
mod unpack;

pub use attention::attention;
pub use elementwise::{cap, exp, input_with_slope, kl_divergence, log_softmax, with_slope};
pub use recurrent::{DeltaCall, convolve, delta_net, delta_step, sigmoid, softplus, split, unit};

use std::ops::Range;

use matvec::Method;
use rayon::prelude::*;
use slim_formats::{Weight, arch::Activation, slim::TILE_ROWS};

use crate::{
    AttentionCall, Backend, Result, RopeAngles,
    backend::one_by_one,
    check_matmul,
    linalg::{Layout, Left, Mat, Panel, Precision, Store},
    weight::{dequantize_rows, shape},
};

/// What runs on this machine's processor.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

impl Backend for Cpu {
    fn matmul(&self, w: Weight<'_>, x: &[f32], m: usize, out: &mut [f32]) -> Result<()> {
        check_matmul(w, x, m, out)?;
        if m > 1 {
            let product = matvec::batch::multiply_by(Method::fastest(), w, x, m, out);
            return product.map_or_else(|| matmul(Precision::Fine, w, x, m, out), Ok);
        }
        match w {
            Weight::Dense(matrix) => matvec::dense_by(Method::fastest(), &matrix, x, out),
            Weight::Packed(layer) => {
                matvec::matvec_by(Method::fastest(), layer, x, out);
                Ok(())
            }
            Weight::Bands(bands) => {
                matvec::matvec_by(Method::fastest(), bands, x, out);
                Ok(())
            }
        }
    }

    fn matmul_each(
        &self,
        weights: &[Weight<'_>],
        x: &[f32],
        m: usize,
        outs: &mut [&mut [f32]],
    ) -> Result<()> {
        for (w, out) in weights.iter().zip(&*outs) {
            check_matmul(*w, x, m, out)?;
        }
        match matvec::batch::multiply_each_by(Method::fastest(), weights, x, m, outs) {
            Some(()) => Ok(()),
            None => one_by_one(self, weights, x, m, outs),
        }
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        let n = weight.len();
        out.par_chunks_mut(n)
            .zip(x.par_chunks(n))
            .for_each(|(out, x)| elementwise::rms_norm(x, weight, epsilon, out));
    }

    fn layer_norm(&self, x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
        let n = weight.len();
        out.par_chunks_mut(n)
            .zip(x.par_chunks(n))
            .for_each(|(out, x)| elementwise::layer_norm(x, weight, bias, epsilon, out));
    }

    fn rope(&self, x: &mut [f32], heads: usize, angles: &RopeAngles) {
        let pairs = angles.pairs;
        x.par_chunks_mut(heads * angles.head_dim).enumerate().for_each(|(t, token)| {
            let (cos, sin) = (&angles.cos[t * pairs..][..pairs], &angles.sin[t * pairs..][..pairs]);
            token
                .chunks_exact_mut(angles.head_dim)
                .for_each(|head| elementwise::rotate(head, cos, sin));
        });
    }

    fn attention(&self, calls: &mut [AttentionCall<'_>]) -> Result<()> {
        attention(Precision::Fine, calls);
        Ok(())
    }

    fn gated(&self, activation: Activation, gate: &mut [f32], up: &[f32]) {
        gate.par_chunks_mut(PIECE)
            .zip(up.par_chunks(PIECE))
            .for_each(|(gate, up)| elementwise::gated(activation, gate, up));
    }

    fn activate(&self, activation: Activation, x: &mut [f32]) {
        x.par_chunks_mut(PIECE).for_each(|x| elementwise::activate(activation, x));
    }
}

/// Values per task of what is done element by element.
const PIECE: usize = 1 << 12;

/// [`Cpu`] with products in floats of this precision, whose inputs are not rounded to 8 bits: what
/// models are calibrated in.
#[derive(Debug, Clone, Copy)]
pub struct FloatCpu(pub Precision);

impl Backend for FloatCpu {
    fn matmul(&self, w: Weight<'_>, x: &[f32], m: usize, out: &mut [f32]) -> Result<()> {
        matmul(self.0, w, x, m, out)
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        Cpu.rms_norm(x, weight, epsilon, out);
    }

    fn layer_norm(&self, x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
        Cpu.layer_norm(x, weight, bias, epsilon, out);
    }

    fn rope(&self, x: &mut [f32], heads: usize, angles: &RopeAngles) {
        Cpu.rope(x, heads, angles);
    }

    fn attention(&self, calls: &mut [AttentionCall<'_>]) -> Result<()> {
        attention(self.0, calls);
        Ok(())
    }

    fn gated(&self, activation: Activation, gate: &mut [f32], up: &[f32]) {
        Cpu.gated(activation, gate, up);
    }

    fn activate(&self, activation: Activation, x: &mut [f32]) {
        Cpu.activate(activation, x);
    }
}

/// [`Backend::matmul`] of [`Cpu`] for many tokens, with a product of this precision; rows of `w`
/// are dequantized a panel at a time.
///
/// # Errors
/// As there.
pub fn matmul(
    precision: Precision,
    w: Weight<'_>,
    x: &[f32],
    m: usize,
    out: &mut [f32],
) -> Result<()> {
    check_matmul(w, x, m, out)?;
    let (rows, cols) = shape(w);
    let panel = |rows: Range<usize>| {
        let n = rows.len();
        if let Some(bands) = w.bands() {
            let tiles = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
            let stride = tiles.len() * TILE_ROWS;
            let weights = dequantize::columns(bands, tiles);
            Ok(Panel::of(precision, weights, Layout::strided(cols, n, stride)))
        } else {
            let mut weights = vec![0.0; n * cols];
            dequantize_rows(w, rows, &mut weights)?;
            Ok(Panel::of(precision, weights, Layout::strided(n, cols, cols).transposed()))
        }
    };
    Left::of(precision, Mat::new(x, m, cols)).multiply(rows, panel, out, rows, Store::REPLACE)
}
