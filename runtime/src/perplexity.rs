//! Perplexity and divergence from another model, over windows of a text.

use rayon::prelude::*;
use slim_kernels::{kl_divergence, log_softmax};

use crate::{Model, Result};

/// Positions whose logits are held at a time.
const POSITIONS: usize = 128;

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

/// Runs `model` (and `other`) over the first `windows` non-overlapping windows of `context` tokens; calls `progress` with
/// the number of windows done and the perplexity so far.
///
/// # Errors
/// As [`Model::forward`].
pub fn evaluate(
    model: &Model<'_>,
    other: Option<&Model<'_>>,
    tokens: &[u32],
    context: usize,
    windows: usize,
    mut progress: impl FnMut(usize, f64),
) -> Result<Evaluation> {
    let chosen: Vec<&[u32]> = tokens.chunks_exact(context).take(windows).collect();
    let (mut total, mut positions) = (0.0, Vec::new());
    for (done, window) in chosen.iter().enumerate() {
        let scores = score_window(model, other, window)?;
        total +=
            scores.iter().map(|s| s.negative_log_likelihood).sum::<f64>() / scores.len() as f64;
        positions.extend(scores.into_iter().filter_map(|s| s.against));
        progress(done + 1, (total / (done + 1) as f64).exp());
    }
    Ok(Evaluation {
        perplexity: (total / chosen.len() as f64).exp(),
        windows: chosen.len(),
        tokens: chosen.len() * context,
        divergence: other.map(|_| summarize(positions)),
    })
}

struct Score {
    negative_log_likelihood: f64,
    /// KL from the other model, and whether both prefer the same token.
    against: Option<(f64, bool)>,
}

/// The scores of tokens 2 .. of a window.
fn score_window(
    model: &Model<'_>,
    other: Option<&Model<'_>>,
    window: &[u32],
) -> Result<Vec<Score>> {
    let hidden_states = |model: &Model<'_>| -> Result<Vec<f32>> {
        model.forward(window, &mut model.new_cache(window.len())?)
    };
    let hidden = hidden_states(model)?;
    let other = match other {
        Some(other) => Some((other, hidden_states(other)?)),
        None => None,
    };
    let mut scores = Vec::with_capacity(window.len() - 1);
    for first in (0..window.len() - 1).step_by(POSITIONS) {
        let positions = first..(first + POSITIONS).min(window.len() - 1);
        let log_probabilities = |model: &Model<'_>, hidden: &[f32]| -> Result<Vec<f32>> {
            let size = model.config().hidden_size;
            let mut logits = model.logits(&hidden[positions.start * size..positions.end * size])?;
            logits.par_chunks_mut(model.config().vocab_size).for_each(log_softmax);
            Ok(logits)
        };
        let ours = log_probabilities(model, &hidden)?;
        let theirs = match &other {
            Some((other, hidden)) => Some(log_probabilities(other, hidden)?),
            None => None,
        };
        let vocab = model.config().vocab_size;
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
