//! Calibration samples: windows of a text, in random order.

use sha2::{Digest, Sha256};
use slim_runtime::{SplitMix64, Tokenizer};

use crate::{ConvertError, Result, Settings};

/// The text that is used when the caller gives none: speeches, a dictionary of slang, novels,
/// declarations in five more languages, code and notes (`data/README.md`).
pub const BUILT_IN_CALIBRATION: &str = concat!(
    include_str!("../data/speeches.txt"),
    include_str!("../data/jargon.txt"),
    include_str!("../data/whale.txt"),
    include_str!("../data/alice.txt"),
    include_str!("../data/declarations.txt"),
    include_str!("../data/repository.txt"),
);

/// What a conversion is calibrated on.
#[derive(Debug, Clone)]
pub struct Calibration {
    /// Windows of equal length.
    pub samples: Vec<Vec<u32>>,
    /// SHA-256 of the text, in hex; of one that was drawn, of its tokens as u32.
    pub text_sha256: String,
    /// The tokens of the whole text.
    pub text: Vec<u32>,
}

impl Calibration {
    /// Takes `settings.samples` windows of `settings.context` tokens from the text, which is
    /// tokenized whole, without BOS. None is taken twice before all have been.
    ///
    /// # Errors
    /// `InvalidSetting` if the text is shorter than one sample.
    pub fn from_text(text: &str, tokenizer: &Tokenizer, settings: &Settings) -> Result<Self> {
        let tokens = tokenizer.encode(text)?;
        let context = settings.context;
        if tokens.len() < context {
            return Err(ConvertError::InvalidSetting {
                what: "context of a calibration sample",
                found: format!("{context} tokens"),
                expected: format!("at most {}, the tokens of the calibration text", tokens.len()),
            });
        }
        let windows = Windows::new(&tokens, context, settings.seed);
        let samples = windows.take(settings.samples).map(<[u32]>::to_vec).collect();
        Ok(Self { samples, text_sha256: hex(&Sha256::digest(text)), text: tokens })
    }

    /// Takes samples that a model has drawn.
    pub fn drawn(samples: Vec<Vec<u32>>) -> Self {
        let text = samples.concat();
        let bytes: Vec<u8> = text.iter().flat_map(|token| token.to_le_bytes()).collect();
        Self { samples, text_sha256: hex(&Sha256::digest(bytes)), text }
    }
}

/// Windows of a text that do not overlap, without end, in random order: none again before all have
/// been there.
pub struct Windows<'t> {
    text: &'t [u32],
    /// Of a window.
    tokens: usize,
    random: SplitMix64,
    /// Where those start that are still to come.
    starts: Vec<usize>,
}

impl<'t> Windows<'t> {
    /// Windows of `tokens` tokens; of as many as the text has, if it has fewer.
    ///
    /// # Panics
    /// If that is none.
    pub fn new(text: &'t [u32], tokens: usize, seed: u64) -> Self {
        let tokens = tokens.min(text.len());
        assert!(tokens > 0, "windows without tokens");
        Self { text, tokens, random: SplitMix64::new(seed), starts: Vec::new() }
    }
}

impl<'t> Iterator for Windows<'t> {
    type Item = &'t [u32];

    fn next(&mut self) -> Option<&'t [u32]> {
        let Self { text, tokens, random, starts } = self;
        if starts.is_empty() {
            let last = text.len() - *tokens;
            let first = random.below(last.min(*tokens - 1) as u64 + 1) as usize;
            starts.extend((first..=last).step_by(*tokens));
        }
        let start = starts.swap_remove(random.below(starts.len() as u64) as usize);
        Some(&text[start..][..*tokens])
    }
}

/// Bytes as lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_pass_through_all_of_the_text_before_any_comes_again() {
        let text: Vec<u32> = (0..1000).collect();
        let mut windows = Windows::new(&text, 30, 0);
        for _ in 0..3 {
            let first = windows.next().unwrap();
            let all = windows.starts.len() + 1;
            let mut seen: Vec<u32> = windows.by_ref().take(all - 1).flatten().copied().collect();
            seen.extend(first);
            seen.sort_unstable();
            // In windows that do not overlap, and with less than a window left at either end.
            assert!(seen.windows(2).all(|pair| pair[1] == pair[0] + 1));
            assert!(seen.len() == all * 30 && seen.len() > 1000 - 2 * 30);
        }
    }

    #[test]
    fn windows_of_a_text_as_short_as_one_are_that_text() {
        let text: Vec<u32> = (0..30).collect();
        for tokens in [30, 100] {
            let mut windows = Windows::new(&text, tokens, 0);
            assert!((0..3).all(|_| windows.next() == Some(&text)));
        }
    }
}
