//! Calibration samples: runs of tokens at random places of a text.

use sha2::{Digest, Sha256};
use slim_runtime::{SplitMix64, Tokenizer};

use crate::{ConvertError, Result, Settings};

/// The text that is used when the caller gives none: three quarters encyclopedia, a tenth novel, the rest code and notes
/// (`data/README.md`).
pub const BUILT_IN_CALIBRATION: &str = concat!(
    include_str!("../data/wikitext-2-valid.txt"),
    include_str!("../data/alice.txt"),
    include_str!("../data/repository.txt"),
);

/// What a conversion is calibrated on.
#[derive(Debug, Clone)]
pub struct Calibration {
    /// Equally long runs of tokens.
    pub samples: Vec<Vec<u32>>,
    /// SHA-256 of the text, in hex.
    pub text_sha256: String,
    /// The tokens of the whole text.
    pub text: Vec<u32>,
}

impl Calibration {
    /// Takes `settings.samples` runs of `settings.context` tokens from the text, which is tokenized whole, without BOS.
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
        let starts = (tokens.len() - context + 1) as u64;
        let mut random = SplitMix64::new(settings.seed);
        let samples = (0..settings.samples)
            .map(|_| {
                let start = random.below(starts) as usize;
                tokens[start..start + context].to_vec()
            })
            .collect();
        Ok(Self { samples, text_sha256: hex(&Sha256::digest(text)), text: tokens })
    }
}

/// Bytes as lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
