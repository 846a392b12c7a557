//! What the caller decides about a conversion.

use slim_formats::slim::ScaleCoding;

use crate::coder::Coder;

/// How layers are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// SliM-LLM: bit-widths by salience (SBA), salience-weighted scales, GPTQ sweep.
    Slim,
    /// One bit-width, GPTQ sweep.
    Gptq,
    /// One bit-width, every weight rounded by itself; needs no calibration.
    RoundToNearest,
}

impl Method {
    /// The name in commands and metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::Slim => "slim",
            Self::Gptq => "gptq",
            Self::RoundToNearest => "rtn",
        }
    }
}

/// Everything that decides the bytes of the result, besides the source and the calibration text.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Mean bits per code of the linear layers, 1 to 8.
    pub bits: u8,
    /// Columns that share a bit-width: a multiple of 16.
    pub group_size: usize,
    /// How scales are stored.
    pub coding: ScaleCoding,
    /// How layers are quantized.
    pub method: Method,
    /// The published algorithm to the letter (`slim` in the paper coding).
    pub reference: bool,
    /// Bits of the embedding and the output layer: 16 keeps f16, 1 to 8 rounds to nearest.
    pub embed_bits: u8,
    /// Calibration samples.
    pub samples: usize,
    /// Tokens per calibration sample.
    pub context: usize,
    /// Seed of the choice of samples.
    pub seed: u64,
}

impl Settings {
    /// The coder of the linear layers.
    pub(crate) fn coder(&self) -> Coder {
        if self.reference { Coder::Published } else { Coder::Best(self.coding) }
    }
}

/// How a conversion reads and writes, which does not decide the bytes of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    /// Bytes of activations to hold in memory; the rest goes to a temporary file.
    pub activation_bytes: u64,
}
