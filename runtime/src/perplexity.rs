//! Perplexity and divergence from another model, over windows of a text.

use std::ops::Range;

use rayon::prelude::*;
use slim_kernels::{kl_divergence, log_softmax};

use crate::{Model, Result};

/// Positions whose logits are held at a time.
const POSITIONS: usize = 128;

/// How [`evaluate`] measures.
#[derive(Debug, Clone, Copy)]
pub struct Protocol {
    /// Tokens per window.
    pub context: usize,
    /// Windows, the first ones of the text; they do not overlap.
    pub windows: usize,
    /// Tokens that go through the model at a time; 1 computes what generating text does.
    pub batch: usize,
}

/// What [`evaluate`] measures.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// `exp` of the mean over windows of the mean negative log-likelihood of tokens 2 .. context.
    pub perplexity: f64,
    /// Windows scored.
    pub windows: usize,
    /// Tokens in those windows.
    pub tokens: usize,
    /// The comparison with the other model, if there was one.
    pub divergence: Option<Divergence>,
}

/// How the next-token distributions of two models differ, over all scored positions.
#[derive(Debug, Clone, PartialEq)]
pub struct Divergence {
    /// Mean of KL(other || model), in nats.
    pub kl_mean: f64,
    /// Median.
    pub kl_p50: f64,
    /// 99th percentile.
    pub kl_p99: f64,
    /// Share of positions with the same most likely token.
    pub top1_agreement: f64,
}

/// Runs `model` over windows of `tokens`, and `other` over the same, whole windows at a time; calls `progress` with the number of
/// windows done and the perplexity so far.
///
/// # Errors
/// As [`Model::forward`].
pub fn evaluate(
    model: &Model<'_>,
    other: Option<&Model<'_>>,
    tokens: &[u32],
    protocol: Protocol,
    mut progress: impl FnMut(usize, f64),
) -> Result<Evaluation> {
    let Protocol { context, windows, batch } = protocol;
    let chosen: Vec<&[u32]> = tokens.chunks_exact(context).take(windows).collect();
    let (mut total, mut positions) = (0.0, Vec::new());
    for (done, window) in chosen.iter().enumerate() {
        let other = other.map(|other| Pass::of(other, window, context)).transpose()?;
        let scores = score_window(&Pass::of(model, window, batch)?, other.as_ref(), window)?;
        total +=
            scores.iter().map(|s| s.negative_log_likelihood).sum::<f64>() / scores.len() as f64;
        positions.extend(scores.into_iter().filter_map(|s| s.against));
        progress(done + 1, (total / (done + 1) as f64).exp());
    }
    Ok(Evaluation {
        perplexity: (total / chosen.len() as f64).exp(),
        windows: chosen.len(),
        tokens: chosen.len() * context,
        divergence: (!positions.is_empty()).then(|| summarize(positions)),
    })
}

/// A window that went through a model, `batch` tokens at a time.
struct Pass<'m> {
    model: &'m Model<'m>,
    batch: usize,
    /// `[window, hidden]`.
    hidden: Vec<f32>,
}

impl<'m> Pass<'m> {
    fn of(model: &'m Model<'m>, window: &[u32], batch: usize) -> Result<Self> {
        let mut cache = model.new_cache(window.len())?;
        let mut hidden = Vec::with_capacity(window.len() * model.config().hidden_size);
        for tokens in window.chunks(batch) {
            hidden.extend(model.forward(tokens, &mut cache)?);
        }
        Ok(Self { model, batch, hidden })
    }

    /// `[positions, vocab]`: what the model expects after each position.
    fn log_probabilities(&self, positions: Range<usize>) -> Result<Vec<f32>> {
        let config = self.model.config();
        let hidden =
            &self.hidden[positions.start * config.hidden_size..positions.end * config.hidden_size];
        let mut logits = Vec::with_capacity(positions.len() * config.vocab_size);
        for hidden in hidden.chunks(self.batch * config.hidden_size) {
            logits.extend(self.model.logits(hidden)?);
        }
        logits.par_chunks_mut(config.vocab_size).for_each(log_softmax);
        Ok(logits)
    }
}

struct Score {
    negative_log_likelihood: f64,
    /// KL from the other model, and whether both prefer the same token.
    against: Option<(f64, bool)>,
}

/// The scores of tokens 2 .. of a window.
fn score_window(ours: &Pass<'_>, theirs: Option<&Pass<'_>>, window: &[u32]) -> Result<Vec<Score>> {
    let vocab = ours.model.config().vocab_size;
    let mut scores = Vec::with_capacity(window.len() - 1);
    for first in (0..window.len() - 1).step_by(POSITIONS) {
        let positions = first..(first + POSITIONS).min(window.len() - 1);
        let ours = ours.log_probabilities(positions.clone())?;
        let theirs = theirs.map(|pass| pass.log_probabilities(positions.clone())).transpose()?;
        scores.par_extend(positions.clone().into_par_iter().map(|position| {
            let row = (position - first) * vocab..(position - first + 1) * vocab;
            let ours = &ours[row.clone()];
            Score {
                negative_log_likelihood: -f64::from(ours[window[position + 1] as usize]),
                against: theirs.as_ref().map(|theirs| {
                    let theirs = &theirs[row];
                    (kl_divergence(theirs, ours), argmax(theirs) == argmax(ours))
                }),
            }
        }));
    }
    Ok(scores)
}

fn summarize(positions: Vec<(f64, bool)>) -> Divergence {
    let n = positions.len();
    let agreeing = positions.iter().filter(|(_, same)| *same).count();
    let mut kl: Vec<f64> = positions.into_iter().map(|(kl, _)| kl).collect();
    kl.sort_by(f64::total_cmp);
    let percentile = |p: usize| kl[(n - 1) * p / 100];
    Divergence {
        kl_mean: kl.iter().sum::<f64>() / n as f64,
        kl_p50: percentile(50),
        kl_p99: percentile(99),
        top1_agreement: agreeing as f64 / n as f64,
    }
}

/// The lowest index of the largest value.
fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    best
}
