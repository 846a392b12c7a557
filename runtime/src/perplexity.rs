//! Perplexity and divergence from another model, over windows of a text.

use std::ops::Range;

use rayon::prelude::*;
use slim_kernels::{kl_divergence, log_softmax};

use crate::{Model, Result, RuntimeError, Turn};

/// Positions whose logits are held at a time.
const POSITIONS: usize = 128;

/// Positions that are named as the worst.
const WORST: usize = 5;

/// How [`evaluate`] measures.
#[derive(Debug, Clone, Copy)]
pub struct Protocol {
    /// Tokens per window.
    pub context: usize,
    /// Windows, the first ones of the text; they do not overlap.
    pub windows: usize,
}

/// What can be asked which token comes next.
pub trait NextTokens {
    /// Runs a window from an empty cache.
    ///
    /// # Errors
    /// Those of what runs.
    fn run(&mut self, window: &[u32]) -> Result<Logits<'_>>;
}

/// What tells the logits that follow some positions of a window, `[positions, vocab]`; those of all
/// at once may take gigabytes.
pub type Logits<'a> = Box<dyn Fn(Range<usize>) -> Result<Vec<f32>> + 'a>;

/// A model that runs `batch` tokens at a time; with 1 it computes what generating text does.
pub struct InBatches<'m> {
    /// The model.
    pub model: &'m Model,
    /// Tokens.
    pub batch: usize,
}

impl NextTokens for InBatches<'_> {
    fn run(&mut self, window: &[u32]) -> Result<Logits<'_>> {
        let (model, batch, width) = (self.model, self.batch, self.model.decoder().embedding_size);
        let (mut sequence, mut workspace) = (model.sequence(window.len())?, model.workspace()?);
        let mut states = Vec::with_capacity(window.len() * width);
        for tokens in window.chunks(batch) {
            let turn = Turn { tokens, sequence: &mut sequence };
            states.extend(model.forward(turn, &mut workspace)?);
        }
        Ok(Box::new(move |positions| {
            let states = &states[positions.start * width..positions.end * width];
            let mut logits = Vec::with_capacity(positions.len() * model.config().vocab_size);
            for states in states.chunks(batch * width) {
                logits.extend(model.logits(states)?);
            }
            Ok(logits)
        }))
    }
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
    /// Where the two differ most, the worst first, at most five.
    pub worst: Vec<Difference>,
}

/// How the next-token distributions of two models differ at a position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// Which of the tokens of the text it is that follows.
    pub token: usize,
    /// KL(other || model), in nats.
    pub kl: f64,
    /// What the other model finds most likely.
    pub theirs: u32,
    /// What the model does.
    pub ours: u32,
}

/// How the next-token distributions of two models differ, over all scored positions.
#[derive(Debug, Clone, PartialEq)]
pub struct Divergence {
    /// Mean of KL(other || model), in nats.
    pub kl_mean: f64,
    /// Median.
    pub kl_p50: f64,
    /// 90th percentile.
    pub kl_p90: f64,
    /// 99th percentile.
    pub kl_p99: f64,
    /// 99.9th percentile.
    pub kl_p999: f64,
    /// Share of positions with the same most likely token.
    pub top1_agreement: f64,
}

/// Runs `model` over windows of `tokens`, and `other` over the same; calls `progress` with the
/// number of windows done and the perplexity so far.
///
/// # Errors
/// Those of the models; `InvalidArgument` if they have vocabularies of different sizes.
pub fn evaluate(
    model: &mut dyn NextTokens,
    mut other: Option<&mut (dyn NextTokens + '_)>,
    tokens: &[u32],
    protocol: Protocol,
    mut progress: impl FnMut(usize, f64),
) -> Result<Evaluation> {
    let Protocol { context, windows } = protocol;
    let chosen: Vec<&[u32]> = tokens.chunks_exact(context).take(windows).collect();
    let (mut total, mut differences) = (0.0, Vec::new());
    for (done, window) in chosen.iter().enumerate() {
        let theirs = other.as_mut().map(|other| other.run(window)).transpose()?;
        let scores = score_window(&model.run(window)?, theirs.as_ref(), window)?;
        total +=
            scores.iter().map(|s| s.negative_log_likelihood).sum::<f64>() / scores.len() as f64;
        let first = done * context;
        let in_text =
            |difference: Difference| Difference { token: first + difference.token, ..difference };
        differences.extend(scores.into_iter().filter_map(|s| s.against).map(in_text));
        progress(done + 1, (total / (done + 1) as f64).exp());
    }
    Ok(Evaluation {
        perplexity: (total / chosen.len() as f64).exp(),
        windows: chosen.len(),
        tokens: chosen.len() * context,
        divergence: (!differences.is_empty()).then(|| summarize(&mut differences)),
        worst: differences.into_iter().rev().take(WORST).collect(),
    })
}

struct Score {
    negative_log_likelihood: f64,
    /// From the other model; its token is counted through the window.
    against: Option<Difference>,
}

/// The scores of tokens 2 .. of a window.
fn score_window(
    ours: &Logits<'_>,
    theirs: Option<&Logits<'_>>,
    window: &[u32],
) -> Result<Vec<Score>> {
    let mut scores = Vec::with_capacity(window.len() - 1);
    for first in (0..window.len() - 1).step_by(POSITIONS) {
        let positions = first..(first + POSITIONS).min(window.len() - 1);
        let mut ours = ours(positions.clone())?;
        let mut theirs = theirs.map(|theirs| theirs(positions.clone())).transpose()?;
        let vocab = ours.len() / positions.len();
        for logits in [Some(&mut ours), theirs.as_mut()].into_iter().flatten() {
            check_vocab(logits.len() / positions.len(), vocab)?;
            logits.par_chunks_mut(vocab).for_each(log_softmax);
        }
        scores.par_extend(positions.clone().into_par_iter().map(|position| {
            let row = (position - first) * vocab..(position - first + 1) * vocab;
            let ours = &ours[row.clone()];
            Score {
                negative_log_likelihood: -f64::from(ours[window[position + 1] as usize]),
                against: theirs.as_ref().map(|theirs| {
                    let theirs = &theirs[row];
                    let kl = kl_divergence(theirs, ours);
                    let [theirs, ours] = [theirs, ours].map(argmax);
                    Difference { token: position + 1, kl, theirs, ours }
                }),
            }
        }));
    }
    Ok(scores)
}

fn check_vocab(found: usize, expected: usize) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => Err(RuntimeError::invalid_argument(
            "vocabulary of the model to compare with",
            format!("{found} tokens"),
            format!("{expected}, as the model's own"),
        )),
    }
}

/// Sorts the positions by how much the models differ.
fn summarize(differences: &mut [Difference]) -> Divergence {
    let n = differences.len();
    let agreeing = differences.iter().filter(|found| found.theirs == found.ours).count();
    differences.sort_by(|a, b| a.kl.total_cmp(&b.kl));
    let per_mille = |p: usize| differences[(n - 1) * p / 1000].kl;
    Divergence {
        kl_mean: differences.iter().map(|found| found.kl).sum::<f64>() / n as f64,
        kl_p50: per_mille(500),
        kl_p90: per_mille(900),
        kl_p99: per_mille(990),
        kl_p999: per_mille(999),
        top1_agreement: agreeing as f64 / n as f64,
    }
}

/// The lowest index of the largest value.
fn argmax(values: &[f32]) -> u32 {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    // Tokens are counted in 32 bits.
    best as u32
}
