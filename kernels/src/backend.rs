//! The operations of a forward pass.

use slim_formats::{Weight, arch::Activation};

use crate::{KvCache, Result};

/// A way to compute the operations of a forward pass on activations in host memory.
///
/// All matrices are row-major f32; `m` is the number of tokens. Implementations give the same
/// result for any number of threads. [`crate::Scalar`] is the oracle, [`crate::Cpu`] is what runs.
pub trait Backend: Send + Sync {
    /// `out[m, rows] = x[m, cols] * w^T`.
    ///
    /// # Errors
    /// `ShapeMismatch` if `x` or `out` do not fit `w` and `m`; `UnsupportedType` for a weight that
    /// is not a number.
    fn matmul(&self, w: Weight<'_>, x: &[f32], m: usize, out: &mut [f32]) -> Result<()>;

    /// [`Self::matmul`] of each weight, all of which have `cols` columns, with the same `x`.
    ///
    /// # Errors
    /// As there.
    fn matmul_each(
        &self,
        weights: &[Weight<'_>],
        x: &[f32],
        m: usize,
        outs: &mut [&mut [f32]],
    ) -> Result<()> {
        one_by_one(self, weights, x, m, outs)
    }

    /// `out[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * weight`, token by token; `x`, `out`: [m,
    /// weight.len()].
    fn rms_norm(&self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]);

    /// `out[t] = (x[t] - mean) / sqrt(variance + epsilon) * weight + bias`, token by token; `x`,
    /// `out`: [m, weight.len()].
    fn layer_norm(&self, x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]);

    /// Rotates `x: [m, heads * head_dim]` in place: channel `i` of the first `n` of each head with
    /// channel `i + n / 2`.
    fn rope(&self, x: &mut [f32], heads: usize, angles: &RopeAngles);

    /// Causal attention of several texts, each over its own keys and values.
    ///
    /// # Errors
    /// Those of the device that computes.
    fn attention(&self, calls: &mut [AttentionCall<'_>]) -> Result<()>;

    /// `gate = activation(gate) * input(up)`, element by element; `input(up)` is `up` itself but
    /// for [`Activation::ClampedSwish`].
    fn gated(&self, activation: Activation, gate: &mut [f32], up: &[f32]);

    /// `x = activation(x)`, element by element.
    fn activate(&self, activation: Activation, x: &mut [f32]);
}

/// [`Backend::matmul_each`] by [`Backend::matmul`].
pub(crate) fn one_by_one<B: Backend + ?Sized>(
    backend: &B,
    weights: &[Weight<'_>],
    x: &[f32],
    m: usize,
    outs: &mut [&mut [f32]],
) -> Result<()> {
    let mut products = weights.iter().zip(outs);
    products.try_for_each(|(w, out)| backend.matmul(*w, x, m, out))
}

/// Cosines and sines of the rotation at consecutive positions.
#[derive(Debug, Clone)]
pub struct RopeAngles {
    /// Channels of a head.
    pub head_dim: usize,
    /// Pairs of channels that are turned.
    pub pairs: usize,
    /// [m, pairs].
    pub cos: Vec<f32>,
    /// [m, pairs].
    pub sin: Vec<f32>,
}

impl RopeAngles {
    /// The angles of positions `start .. start + m`: `position / (theta^(i / pairs) * factors[i])`.
    pub fn new(head_dim: usize, theta: f32, factors: &[f32], start: usize, m: usize) -> Self {
        let pairs = factors.len();
        let inverse_frequencies: Vec<f32> = factors
            .iter()
            .enumerate()
            .map(|(i, factor)| 1.0 / theta.powf((2 * i) as f32 / (2 * pairs) as f32) / factor)
            .collect();
        let angles = (start..start + m).flat_map(|position| {
            inverse_frequencies.iter().map(move |frequency| position as f32 * frequency)
        });
        let (sin, cos) = angles.map(f32::sin_cos).unzip();
        Self { head_dim, pairs, cos, sin }
    }

    /// With cosines and sines multiplied by `amplitude`.
    #[must_use]
    pub fn scaled(mut self, amplitude: f32) -> Self {
        self.cos.iter_mut().chain(&mut self.sin).for_each(|value| *value *= amplitude);
        self
    }
}

/// The attention of one text.
pub struct AttentionCall<'a> {
    /// Its sizes.
    pub shape: AttentionShape,
    /// The queries, [m, heads, head_dim].
    pub q: &'a [f32],
    /// The text's keys and values.
    pub kv: &'a KvCache,
    /// A score of each head that takes its share in the softmax and has no value, `[heads]`.
    pub sinks: Option<&'a [f32]>,
    /// [m, heads, head_dim].
    pub out: &'a mut [f32],
}

/// The sizes of an attention call.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Position of the first query; the cache holds every position up to the last query's.
    pub start: usize,
    /// Queries.
    pub m: usize,
    /// How many positions a query sees, its own included; `None` for all.
    pub window: Option<usize>,
    /// What scores are multiplied by.
    pub scale: f32,
    /// `c * tanh(score / c)` in place of a score.
    pub softcap: Option<f32>,
}

impl AttentionShape {
    /// The positions that query `t` sees.
    pub fn visible(&self, t: usize) -> std::ops::Range<usize> {
        let end = self.start + t + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// Query heads that share a key.
    pub fn heads_per_kv_head(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Floats from one query to the next.
    pub fn query_stride(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Floats from one key to the next, as a layer gives them.
    pub fn kv_stride(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}
