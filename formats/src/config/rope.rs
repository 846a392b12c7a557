//! Rotary position embedding, and how it is stretched to longer texts.

use std::{borrow::Cow, f64::consts::TAU};

/// Rotary position embedding of the first `2 * factors.len()` channels of each head.
///
/// Pair `k` of `n / 2` turns by `theta^(-2 k / n) / factors[k]` per token.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f32,
    /// What frequencies are divided by, one for each pair of channels. All 1 without scaling.
    pub factors: Vec<f32>,
    /// What cosines and sines are multiplied by.
    pub amplitude: f32,
    /// Where the factors come from, for files, and for kinds that depend on the text.
    pub scaling: Scaling,
}

/// The factor of a pair that does not turn; llama.cpp's files have it, too.
const UNTURNED: f32 = 1e30;

/// A kind of scaling.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaling {
    /// The factors say all: none, `linear`, `llama3`.
    Factors,
    /// `yarn`.
    Yarn(Yarn),
    /// `longrope`: the factors are those of short texts.
    Long(LongRope),
    /// `dynamic`: the base grows with texts longer than `context`.
    Dynamic {
        /// `factor`.
        factor: f32,
        /// Tokens that the model was made for.
        context: usize,
    },
}

/// The parameters of YaRN, as `rope_scaling` of `config.json` has them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// `factor`: what long wavelengths are stretched by.
    pub factor: f64,
    /// `original_max_position_embeddings`.
    pub context: usize,
    /// Turns within the context from which on a frequency is kept.
    pub beta_fast: f64,
    /// Turns up to which it is divided by the factor.
    pub beta_slow: f64,
    /// Whether the pairs between which the kind changes are whole numbers.
    pub truncate: bool,
}

/// The parameters of `longrope`.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRope {
    /// The factors of texts longer than `context`.
    pub factors: Vec<f32>,
    /// `original_max_position_embeddings`.
    pub context: usize,
}

impl Rope {
    /// One whose factors say all.
    pub fn new(theta: f32, factors: Vec<f32>) -> Self {
        Self { theta, factors, amplitude: 1.0, scaling: Scaling::Factors }
    }

    /// One that turns a part of `pairs`, the first, as fast as if it turned all (Gemma 4).
    pub fn proportional(theta: f32, pairs: usize, part: f64) -> Self {
        let turned = (part * pairs as f64) as usize;
        let factor = |pair| if pair < turned { 1.0 } else { UNTURNED };
        Self::new(theta, (0..pairs).map(factor).collect())
    }

    /// How many pairs are turned, if that is all that the factors say.
    pub(super) fn proportion(&self) -> Option<usize> {
        let turned = self.factors.iter().take_while(|&&factor| factor == 1.0).count();
        let rest = self.factors[turned..].iter();
        let says_all = self.scaling == Scaling::Factors && self.amplitude == 1.0;
        (says_all && rest.into_iter().all(|&factor| factor == UNTURNED)).then_some(turned)
    }

    /// YaRN for `pairs` pairs of channels.
    ///
    /// # Source
    /// Peng et al. 2023, equations 18 to 23, as `_compute_yarn_parameters` of transformers has it.
    pub fn yarn(theta: f32, pairs: usize, yarn: Yarn, amplitude: f32) -> Self {
        let channels = 2.0 * pairs as f64;
        // The pair that turns so often within the context.
        let pair_of = |turns: f64| {
            let wavelength = yarn.context as f64 / (TAU * turns);
            channels * wavelength.ln() / (2.0 * f64::from(theta).ln())
        };
        let (mut low, mut high) = (pair_of(yarn.beta_fast), pair_of(yarn.beta_slow));
        if yarn.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(channels - 1.0));
        if low == high {
            high += 0.001;
        }
        let factor = |pair: usize| {
            let stretched = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / (stretched / yarn.factor + 1.0 - stretched)) as f32
        };
        let factors = (0..pairs).map(factor).collect();
        Self { theta, factors, amplitude, scaling: Scaling::Yarn(yarn) }
    }

    /// The factors for texts of up to `context` tokens. Those of `longrope` and `dynamic` depend on
    /// it; one text has one set, since its keys are kept as they were turned.
    pub fn factors_for(&self, context: usize) -> Cow<'_, [f32]> {
        match &self.scaling {
            Scaling::Long(long) if context > long.context => Cow::Borrowed(&long.factors),
            Scaling::Dynamic { factor, context: made_for } if context > *made_for => {
                let (n, stretch) = (2.0 * self.factors.len() as f64, f64::from(*factor));
                let growth = stretch * context as f64 / *made_for as f64 - (stretch - 1.0);
                // `(theta growth^(n / (n - 2)))^(-2 k / n)`, as factors of `theta^(-2 k / n)`.
                let of_pair = |pair: usize| growth.powf(2.0 * pair as f64 / (n - 2.0)) as f32;
                Cow::Owned((0..self.factors.len()).map(of_pair).collect())
            }
            _ => Cow::Borrowed(&self.factors),
        }
    }

    /// What all frequencies are divided by, if that is one number and all that scaling does.
    pub fn linear_factor(&self) -> Option<f32> {
        let first = *self.factors.first()?;
        let is_linear = self.scaling == Scaling::Factors && self.amplitude == 1.0;
        (is_linear && self.factors.iter().all(|&factor| factor == first)).then_some(first)
    }

    /// Whether there is no scaling.
    pub fn is_unscaled(&self) -> bool {
        self.linear_factor() == Some(1.0)
    }
}

/// YaRN's `0.1 mscale ln(factor) + 1`.
pub(crate) fn yarn_amplitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
