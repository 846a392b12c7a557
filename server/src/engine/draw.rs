//! The next token of a text: penalties, form, draw, log probabilities.

use std::collections::HashMap;

use slim_runtime::{Result, RuntimeError, Sampler};

use crate::grammar::Grammar;

/// How the tokens of a text are drawn.
pub struct Draw {
    pub sampler: Sampler,
    pub penalties: Penalties,
    /// The form of the text, if it is to have one.
    pub grammar: Option<Grammar>,
    /// How many of the most likely tokens are told with each; `None` if none are, nor its own
    /// probability.
    pub likely: Option<usize>,
    /// Tokens from this one on have no text, and are never drawn.
    pub known: usize,
}

/// What changes the logits before a draw.
#[derive(Debug, Clone, Default)]
pub struct Penalties {
    /// Taken off the logit of a token that was written.
    pub presence: f32,
    /// Taken off the logit of a token for each time that it was written.
    pub frequency: f32,
    /// Added to logits: token and what.
    pub bias: Vec<(u32, f32)>,
}

/// A token with its probability.
#[derive(Debug, Clone)]
pub struct Weighed {
    pub token: u32,
    /// The natural logarithm of its probability by the model, before penalties and form.
    pub logprob: f32,
    /// The most likely tokens in its place.
    pub likely: Vec<Likely>,
}

/// A token that might have been drawn.
#[derive(Debug, Clone, Copy)]
pub struct Likely {
    pub token: u32,
    pub logprob: f32,
}

/// What was drawn.
pub struct Drawn {
    pub token: u32,
    /// Where log probabilities are told.
    pub weighed: Option<Weighed>,
}

impl Draw {
    /// Draws from logits, which it changes; `None` if the form has ended. `recent` are the tokens
    /// so far, `written` those of them that were drawn, with their number.
    ///
    /// # Errors
    /// Those of [`Sampler::sample`]; a sentence of the grammar.
    pub fn next(
        &mut self,
        logits: &mut [f32],
        recent: &[u32],
        written: &HashMap<u32, u32>,
    ) -> Result<Option<Drawn>, String> {
        let known = &logits[..self.known.min(logits.len())];
        let plain = self.likely.map(|count| (most_likely(known, count), log_of_sum(known)));
        let raw = self.likely.map(|_| known.to_vec());
        self.penalties.apply(logits, written);
        if let Some(grammar) = &mut self.grammar
            && !grammar.mask(logits)?
        {
            return Ok(None);
        }
        let told = |error: RuntimeError| error.to_string();
        let token = self.sampler.sample(logits, recent).map_err(told)?;
        let weighed = raw.zip(plain).map(|(raw, (likely, sum))| Weighed {
            token,
            logprob: raw[token as usize] - sum,
            likely: likely
                .into_iter()
                .map(|token| Likely { token, logprob: raw[token as usize] - sum })
                .collect(),
        });
        Ok(Some(Drawn { token, weighed }))
    }
}

impl Penalties {
    fn apply(&self, logits: &mut [f32], written: &HashMap<u32, u32>) {
        let penalties = written
            .iter()
            .map(|(&token, &times)| (token, -self.presence - self.frequency * times as f32));
        for (token, change) in self.bias.iter().copied().chain(penalties) {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += change;
            }
        }
    }
}

/// `ln(sum(exp(logit)))`.
fn log_of_sum(logits: &[f32]) -> f32 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - highest).exp()).sum();
    highest + sum.ln() as f32
}

/// The tokens of the highest logits, highest first.
fn most_likely(logits: &[f32], count: usize) -> Vec<u32> {
    let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
    let order = |a: &u32, b: &u32| {
        logits[*b as usize].total_cmp(&logits[*a as usize]).then_with(|| a.cmp(b))
    };
    if (1..tokens.len()).contains(&count) {
        tokens.select_nth_unstable_by(count - 1, order);
    }
    tokens.truncate(count);
    tokens.sort_unstable_by(order);
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn penalties_and_bias_change_logits() {
        let penalties = Penalties { presence: 1.0, frequency: 0.5, bias: vec![(0, 2.0), (9, 1.0)] };
        let mut logits = [1.0, 1.0, 1.0];
        penalties.apply(&mut logits, &HashMap::from([(1, 2)]));
        assert_eq!(logits, [3.0, -1.0, 1.0]);
    }

    #[test]
    fn probabilities_add_up() {
        let logits = [0.5, 2.0, -1.0, 2.0];
        let sum = log_of_sum(&logits);
        let total: f32 = logits.iter().map(|logit| (logit - sum).exp()).sum();
        assert!((total - 1.0).abs() < 1e-6, "{total}");
        assert_eq!(most_likely(&logits, 3), [1, 3, 0]);
        assert!(most_likely(&logits, 0).is_empty());
    }
}
