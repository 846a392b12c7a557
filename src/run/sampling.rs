//! The sampling settings of a run: flags win over the model's own, which win over ours.

use std::fmt;

use slim_formats::Generation;
use slim_runtime::{SamplerSettings, random_seed};

use crate::args::SamplingArgs;

/// The settings of a run, and where each of them comes from.
pub struct Sampling {
    pub settings: SamplerSettings,
    text: String,
}

impl Sampling {
    pub fn new(flags: &SamplingArgs, model: &Generation) -> Self {
        let base = SamplerSettings::at(flags.temperature, model);
        let mut choice = Choice::default();
        let settings = SamplerSettings {
            temperature: choice.of(
                "temperature",
                flags.temperature,
                model.temperature,
                base.temperature,
            ),
            top_k: choice.of("top-k", flags.top_k, model.top_k, base.top_k),
            top_p: choice.of("top-p", flags.top_p, model.top_p, base.top_p),
            min_p: choice.of("min-p", flags.min_p, model.min_p, base.min_p),
            repeat_penalty: choice.of(
                "repeat penalty",
                flags.repeat_penalty,
                model.repeat_penalty,
                base.repeat_penalty,
            ),
            seed: flags.seed.unwrap_or_else(random_seed),
            ..base
        };
        let text = format!("sampling: {}; seed {}", choice.0.join(", "), settings.seed);
        Self { settings, text }
    }
}

/// `sampling: temperature 0.6 (the model's), top-k 40, top-p 0.9 (given), ...; seed 123`.
impl fmt::Display for Sampling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The values that were chosen, and where they come from.
#[derive(Default)]
struct Choice(Vec<String>);

impl Choice {
    /// The flag, or else `base`, which is the model's if `model` is there.
    fn of<T: fmt::Display>(&mut self, name: &str, flag: Option<T>, model: Option<T>, base: T) -> T {
        let (value, origin) = match (flag, model) {
            (Some(value), _) => (value, " (given)"),
            (None, Some(_)) => (base, " (the model's)"),
            (None, None) => (base, ""),
        };
        self.0.push(format!("{name} {value}{origin}"));
        value
    }
}
