//! Choosing the next token from the logits.

use std::collections::BTreeSet;

use slim_formats::Generation;

use crate::{Result, RuntimeError, SplitMix64};

/// How the next token is chosen. The defaults are llama.cpp's.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerSettings {
    /// Divides the logits before the draw: below 1 sharper, above 1 flatter, 0 always the most
    /// likely token.
    pub temperature: f32,
    /// Keeps this many most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most likely tokens until their probabilities add up to this; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Makes the recent tokens less likely: positive logits are divided by it, negative ones
    /// multiplied; 1 changes nothing.
    pub repeat_penalty: f32,
    /// How many of the recent tokens the penalty looks at.
    pub repeat_window_tokens: usize,
    /// Start of the random numbers: the same seed and logits give the same tokens on every machine.
    pub seed: u64,
}

impl Default for SamplerSettings {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_window_tokens: 64,
            seed: 0,
        }
    }
}

impl SamplerSettings {
    /// For a model whose makers say nothing. A small model at few bits per weight gets into loops,
    /// or begins with what has a percent or two: here the tail is cut off and repetition costs.
    pub fn cautious() -> Self {
        Self { temperature: 0.6, min_p: 0.25, repeat_penalty: 1.1, ..Self::default() }
    }

    /// What the makers of a model recommend; of what they leave open, the defaults, or all of
    /// [`Self::cautious`] if they say nothing.
    pub fn recommended(model: &Generation) -> Self {
        let ours = if model.is_empty() { Self::cautious() } else { Self::default() };
        Self {
            temperature: model.temperature.unwrap_or(ours.temperature),
            top_k: model.top_k.unwrap_or(ours.top_k),
            top_p: model.top_p.unwrap_or(ours.top_p),
            min_p: model.min_p.unwrap_or(ours.min_p),
            repeat_penalty: model.repeat_penalty.unwrap_or(ours.repeat_penalty),
            repeat_window_tokens: model.repeat_window_tokens.unwrap_or(ours.repeat_window_tokens),
            seed: ours.seed,
        }
    }

    /// What goes with a temperature that a user asks for: what the makers of a model recommend, or
    /// [`Self::greedy`] for 0 if they say nothing. Without luck there is nothing to be cautious
    /// about.
    pub fn at(temperature: Option<f32>, model: &Generation) -> Self {
        let base = match temperature {
            Some(0.0) if model.is_empty() => Self::greedy(),
            _ => Self::recommended(model),
        };
        Self { temperature: temperature.unwrap_or(base.temperature), ..base }
    }

    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    fn validate(&self) -> Result<()> {
        let numbers = [
            ("temperature", self.temperature, 0.0..=f32::MAX, "0 or more"),
            ("top-p", self.top_p, 0.0..=1.0, "0 to 1"),
            ("min-p", self.min_p, 0.0..=1.0, "0 to 1"),
            ("repeat penalty", self.repeat_penalty, f32::MIN_POSITIVE..=f32::MAX, "above 0"),
        ];
        for (name, value, range, expected) in numbers {
            if !range.contains(&value) {
                return Err(RuntimeError::invalid_argument(name, value, expected));
            }
        }
        Ok(())
    }
}

/// Draws tokens.
///
/// One draw goes through these steps, each on what the one before left: repeat penalty, top-k,
/// top-p, min-p, temperature. Top-p and min-p look at probabilities at temperature 1.
#[derive(Debug, Clone)]
pub struct Sampler {
    settings: SamplerSettings,
    random: SplitMix64,
    /// Tokens from this one on have no text and are never drawn ...
    known: u32,
    /// ... of which the model has so many.
    unknown: usize,
}

/// A token that may still be drawn.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    logit: f32,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    /// `InvalidArgument` for a setting outside its range.
    pub fn new(settings: SamplerSettings) -> Result<Self> {
        settings.validate()?;
        let random = SplitMix64::new(settings.seed);
        Ok(Self { random, settings, known: u32::MAX, unknown: 0 })
    }

    /// That never draws the rows of a vocabulary of `rows` that lie behind the `known` tokens:
    /// many models have more rows than their tokenizers have tokens.
    #[must_use]
    pub fn limited_to(mut self, known: usize, rows: usize) -> Self {
        self.known = u32::try_from(known).unwrap_or(u32::MAX);
        self.unknown = rows.saturating_sub(known);
        self
    }

    /// Draws the next token. `logits`: one per token of the vocabulary; `recent`: the tokens so
    /// far, oldest first.
    ///
    /// Of equally likely tokens the lowest id comes first. A logit of minus infinity rules its
    /// token out.
    ///
    /// # Errors
    /// `InvalidArgument` if a logit is NaN or plus infinity, or if every token is ruled out.
    pub fn sample(&mut self, logits: &[f32], recent: &[u32]) -> Result<u32> {
        let mut candidates = candidates((0..).zip(logits.iter().copied()))?;
        self.penalize(&mut candidates, recent);
        self.choose(candidates)
    }

    /// How many of the most likely tokens decide the draw, if that is a number known before.
    pub fn deciding_tokens(&self) -> Option<usize> {
        let settings = &self.settings;
        let kept = if settings.temperature == 0.0 { 1 } else { settings.top_k };
        let lowered = match settings.repeat_penalty {
            1.0 => 0,
            // Each token that is lowered makes room for one behind.
            penalty if penalty > 1.0 => settings.repeat_window_tokens,
            _ => return None,
        };
        let spare = lowered.saturating_add(self.unknown);
        Some(kept).filter(|&kept| kept > 0).map(|kept| kept.saturating_add(spare))
    }

    /// Draws the next token as [`Self::sample`] does, from the [`Self::deciding_tokens`] most
    /// likely ones: token and logit.
    ///
    /// # Errors
    /// As [`Self::sample`].
    pub fn sample_top(&mut self, top: &[(u32, f32)], recent: &[u32]) -> Result<u32> {
        let mut candidates = candidates(top.iter().copied())?;
        self.penalize(&mut candidates, recent);
        self.choose(candidates)
    }

    /// Draws from all candidates, in any order.
    fn choose(&mut self, mut candidates: Vec<Candidate>) -> Result<u32> {
        candidates.retain(|candidate| {
            candidate.logit > f32::NEG_INFINITY && candidate.token < self.known
        });
        if candidates.is_empty() {
            return Err(RuntimeError::invalid_argument("logits", "no token possible", "one"));
        }
        let keep = if self.settings.temperature == 0.0 { 1 } else { self.settings.top_k };
        keep_top_k(&mut candidates, keep);
        keep_top_p(&mut candidates, self.settings.top_p.into());
        keep_min_p(&mut candidates, self.settings.min_p.into());
        Ok(self.draw(&candidates))
    }

    /// Lowers the logit of each recent token once, however often it occurred.
    ///
    /// # Source
    /// Section 4.1 of arXiv:1909.05858, with the sign rule that Hugging Face and llama.cpp added.
    fn penalize(&self, candidates: &mut [Candidate], recent: &[u32]) {
        let penalty = self.settings.repeat_penalty;
        if penalty == 1.0 {
            return;
        }
        let start = recent.len().saturating_sub(self.settings.repeat_window_tokens);
        for token in recent[start..].iter().collect::<BTreeSet<_>>() {
            // Of a whole vocabulary, a token stands at its own place.
            let place = match candidates.get(*token as usize) {
                Some(candidate) if candidate.token == *token => Some(*token as usize),
                _ => candidates.iter().position(|candidate| candidate.token == *token),
            };
            if let Some(place) = place {
                let logit = &mut candidates[place].logit;
                let lowered = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                *logit = lowered.min(f32::MAX);
            }
        }
    }

    /// Draws from sorted candidates, of which there is at least one.
    fn draw(&mut self, candidates: &[Candidate]) -> u32 {
        let [first, rest @ ..] = candidates else { unreachable!("top-k keeps one candidate") };
        if rest.is_empty() {
            return first.token;
        }
        let weights = weights(candidates, self.settings.temperature.into());
        let mut left = self.random.unit() * weights.iter().sum::<f64>();
        for (candidate, weight) in candidates.iter().zip(weights) {
            left -= weight;
            if left < 0.0 {
                return candidate.token;
            }
        }
        // Only rounding leads here.
        first.token
    }
}

/// Tokens with their logits, in the order given.
fn candidates(logits: impl Iterator<Item = (u32, f32)>) -> Result<Vec<Candidate>> {
    let check = |(token, logit): (u32, f32)| match logit < f32::INFINITY {
        true => Ok(Candidate { token, logit }),
        false => {
            let what = format!("logit of token {token}");
            Err(RuntimeError::invalid_argument(what, logit, "a number below infinity"))
        }
    };
    logits.map(check).collect()
}

/// Sorts by falling logit and drops all after the first `k`.
fn keep_top_k(candidates: &mut Vec<Candidate>, k: usize) {
    let order = |a: &Candidate, b: &Candidate| {
        let by_logit = b.logit.partial_cmp(&a.logit).expect("`candidates` refuses NaN");
        by_logit.then_with(|| a.token.cmp(&b.token))
    };
    if (1..candidates.len()).contains(&k) {
        candidates.select_nth_unstable_by(k - 1, order);
        candidates.truncate(k);
    }
    candidates.sort_unstable_by(order);
}

/// Drops the least likely candidates once the others hold the share `p` of the probability.
fn keep_top_p(candidates: &mut Vec<Candidate>, p: f64) {
    if p == 1.0 {
        return;
    }
    let weights = weights(candidates, 1.0);
    let mut missing = p * weights.iter().sum::<f64>();
    let enough = weights.iter().position(|weight| {
        missing -= weight;
        missing <= 0.0
    });
    candidates.truncate(enough.map_or(candidates.len(), |last| last + 1));
}

/// Drops candidates less likely than `p` times the first.
fn keep_min_p(candidates: &mut Vec<Candidate>, p: f64) {
    let weights = weights(candidates, 1.0);
    candidates.truncate(weights.partition_point(|&weight| weight >= p));
}

/// Unnormalized probabilities of sorted candidates; the first is 1.
fn weights(candidates: &[Candidate], temperature: f64) -> Vec<f64> {
    let Some(first) = candidates.first() else { return Vec::new() };
    let highest = f64::from(first.logit);
    let weight = |candidate: &Candidate| {
        exp_of_negative((f64::from(candidate.logit) - highest) / temperature)
    };
    candidates.iter().map(weight).collect()
}

/// `exp(x)` for `x <= 0`, within 4 units in the last place.
///
/// `f64::exp` is the platform's and differs in the last bit between machines; this one uses only
/// operations that IEEE 754 fixes: `exp(x) = 2^k exp(r)`, `|r| <= ln 2 / 2`, and a Taylor series.
fn exp_of_negative(x: f64) -> f64 {
    use std::f64::consts::{LN_2, LOG2_E};
    const TERMS: u32 = 14;

    let k = (x * LOG2_E).round();
    if k < f64::from(f64::MIN_EXP) {
        return 0.0;
    }
    let r = x - k * LN_2;
    let series = (1..TERMS).rev().fold(1.0, |sum, n| 1.0 + sum * r / f64::from(n));
    let exponent_bits = (k as i64 + 1023) as u64;
    series * f64::from_bits(exponent_bits << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every filter off, temperature 1.
    fn plain() -> SamplerSettings {
        SamplerSettings {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            ..SamplerSettings::default()
        }
    }

    fn sample(settings: SamplerSettings, logits: &[f32], recent: &[u32]) -> Result<u32> {
        Sampler::new(settings).unwrap().sample(logits, recent)
    }

    /// The tokens that 1,000 draws gave.
    fn drawn(settings: SamplerSettings, logits: &[f32]) -> BTreeSet<u32> {
        let mut sampler = Sampler::new(settings).unwrap();
        (0..1_000).map(|_| sampler.sample(logits, &[]).unwrap()).collect()
    }

    #[test]
    fn rows_without_a_token_are_never_drawn() {
        let logits = [1.0, 3.0, 2.0, 9.0, 8.0];
        let greedy = Sampler::new(SamplerSettings::greedy()).unwrap();
        assert_eq!(greedy.clone().sample(&logits, &[]).unwrap(), 3);
        let mut limited = greedy.limited_to(3, 5);
        assert_eq!(limited.sample(&logits, &[]).unwrap(), 1);
        assert_eq!(limited.deciding_tokens(), Some(3));
    }

    #[test]
    fn exp_agrees_with_the_platform() {
        for step in 0..7_000 {
            let x = f64::from(step) * -0.1;
            let (ours, theirs) = (exp_of_negative(x), x.exp());
            assert!((ours - theirs).abs() <= 1e-13 * theirs, "exp({x}): {ours} against {theirs}");
        }
        assert_eq!(exp_of_negative(-0.0), 1.0);
        assert_eq!(exp_of_negative(-800.0), 0.0);
        assert_eq!(exp_of_negative(f64::NEG_INFINITY), 0.0);
    }

    #[test]
    fn deciding_tokens_alone_give_the_same_draws() {
        let logits: Vec<f32> =
            (0..200).map(|token| ((token * 37) % 200) as f32 * 0.1 - 5.0).collect();
        let recent: Vec<u32> = (0..70).map(|index| (index * 27) % 200).collect();
        let penalty = SamplerSettings { repeat_penalty: 1.5, ..SamplerSettings::default() };
        let greedy_penalty = SamplerSettings { temperature: 0.0, ..penalty.clone() };
        for settings in
            [SamplerSettings::default(), SamplerSettings::greedy(), penalty, greedy_penalty]
        {
            let [mut of_all, mut of_top] = [0, 1].map(|_| Sampler::new(settings.clone()).unwrap());
            let count = of_top.deciding_tokens().unwrap();
            let mut top: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
            top.sort_by(|a, b| b.1.total_cmp(&a.1));
            top.truncate(count);
            for _ in 0..100 {
                let expected = of_all.sample(&logits, &recent).unwrap();
                assert_eq!(of_top.sample_top(&top, &recent).unwrap(), expected, "{settings:?}");
            }
        }
        assert_eq!(Sampler::new(plain()).unwrap().deciding_tokens(), None);
        // A token that becomes more likely may come from anywhere.
        let reward = SamplerSettings { repeat_penalty: 0.9, ..SamplerSettings::default() };
        assert_eq!(Sampler::new(reward).unwrap().deciding_tokens(), None);
    }

    #[test]
    fn greedy_takes_the_highest_and_of_equals_the_lowest_id() {
        assert_eq!(sample(SamplerSettings::greedy(), &[0.5, 2.0, -1.0, 2.0], &[]).unwrap(), 1);
        assert_eq!(sample(SamplerSettings::greedy(), &[-0.0, 0.0], &[]).unwrap(), 0);
        assert_eq!(
            sample(SamplerSettings::greedy(), &[f32::MIN, f32::NEG_INFINITY], &[]).unwrap(),
            0
        );
    }

    #[test]
    fn top_k_keeps_k_and_of_equals_the_lowest_ids() {
        let logits = [1.0, 3.0, 1.0, 2.0, 1.0];
        assert_eq!(drawn(SamplerSettings { top_k: 1, ..plain() }, &logits), [1].into());
        assert_eq!(drawn(SamplerSettings { top_k: 3, ..plain() }, &logits), [0, 1, 3].into());
        assert_eq!(drawn(SamplerSettings { top_k: 9, ..plain() }, &logits).len(), 5);
    }

    #[test]
    fn top_p_keeps_the_token_that_crosses_the_share() {
        let logits = [0.5f32, 0.3, 0.15, 0.05].map(f32::ln);
        assert_eq!(drawn(SamplerSettings { top_p: 0.0, ..plain() }, &logits), [0].into());
        assert_eq!(drawn(SamplerSettings { top_p: 0.1, ..plain() }, &logits), [0].into());
        assert_eq!(drawn(SamplerSettings { top_p: 0.7, ..plain() }, &logits), [0, 1].into());
        assert_eq!(drawn(SamplerSettings { top_p: 0.9, ..plain() }, &logits), [0, 1, 2].into());
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely() {
        let logits = [0.5f32, 0.3, 0.15, 0.05].map(f32::ln);
        assert_eq!(drawn(SamplerSettings { min_p: 0.2, ..plain() }, &logits), [0, 1, 2].into());
        assert_eq!(drawn(SamplerSettings { min_p: 1.0, ..plain() }, &logits), [0].into());
    }

    #[test]
    fn draws_follow_the_probabilities() {
        const DRAWS: u32 = 100_000;
        let expected = [0.5f32, 0.3, 0.15, 0.05];
        let mut sampler = Sampler::new(SamplerSettings { seed: 7, ..plain() }).unwrap();
        let mut counts = [0u32; 4];
        for _ in 0..DRAWS {
            counts[sampler.sample(&expected.map(f32::ln), &[]).unwrap() as usize] += 1;
        }
        for (count, share) in counts.into_iter().zip(expected) {
            let found = count as f32 / DRAWS as f32;
            assert!((found - share).abs() < 0.005, "{found} against {share}");
        }
    }

    #[test]
    fn temperature_sharpens_and_flattens() {
        let share_of_first = |temperature| {
            let mut sampler = Sampler::new(SamplerSettings { temperature, ..plain() }).unwrap();
            (0..10_000).filter(|_| sampler.sample(&[1.0, 0.0], &[]).unwrap() == 0).count()
        };
        let [cold, warm, hot] = [0.2, 1.0, 50.0].map(share_of_first);
        assert!(
            cold > 9_850 && (7_150..7_450).contains(&warm) && hot < 5_200,
            "{cold} {warm} {hot}"
        );
        assert_eq!(share_of_first(f32::MIN_POSITIVE), 10_000);
    }

    #[test]
    fn same_seed_gives_the_same_tokens() {
        let draws = |seed| {
            let mut sampler = Sampler::new(SamplerSettings { seed, ..plain() }).unwrap();
            let logits: Vec<f32> = (0..50).map(|token| (token % 7) as f32).collect();
            (0..20).map(|_| sampler.sample(&logits, &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn repeat_penalty_lowers_both_signs_once_and_within_the_window() {
        let settings = SamplerSettings { repeat_penalty: 2.0, ..SamplerSettings::greedy() };
        assert_eq!(sample(settings.clone(), &[3.0, 2.0], &[0]).unwrap(), 1);
        assert_eq!(sample(settings.clone(), &[-1.5, -2.0], &[0]).unwrap(), 1);
        assert_eq!(sample(settings.clone(), &[3.0, 1.0], &[0, 0, 0]).unwrap(), 0);
        assert_eq!(sample(settings.clone(), &[3.0, 2.0], &[99]).unwrap(), 0);
        let short = SamplerSettings { repeat_window_tokens: 1, ..settings };
        assert_eq!(sample(short, &[3.0, 2.0], &[0, 5]).unwrap(), 0);
    }

    #[test]
    fn logits_without_a_possible_token_are_refused() {
        let message = |logits: &[f32]| sample(plain(), logits, &[]).unwrap_err().to_string();
        assert_eq!(
            message(&[0.0, f32::NAN]),
            "logit of token 1: found NaN, expected a number below infinity"
        );
        assert_eq!(
            message(&[f32::INFINITY]),
            "logit of token 0: found inf, expected a number below infinity"
        );
        let nothing = "logits: found no token possible, expected one";
        assert_eq!(message(&[f32::NEG_INFINITY; 3]), nothing);
        assert_eq!(message(&[]), nothing);
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let refused = [
            SamplerSettings { temperature: -0.1, ..plain() },
            SamplerSettings { temperature: f32::INFINITY, ..plain() },
            SamplerSettings { top_p: -0.1, ..plain() },
            SamplerSettings { top_p: f32::NAN, ..plain() },
            SamplerSettings { min_p: 1.1, ..plain() },
            SamplerSettings { repeat_penalty: 0.0, ..plain() },
        ];
        for settings in refused {
            let error = Sampler::new(settings.clone()).unwrap_err();
            assert!(matches!(error, RuntimeError::InvalidArgument { .. }), "{settings:?}");
        }
        let error = Sampler::new(SamplerSettings { top_p: 2.0, ..plain() }).unwrap_err();
        assert_eq!(error.to_string(), "top-p: found 2, expected 0 to 1");
    }
}
