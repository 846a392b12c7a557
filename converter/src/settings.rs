//! What the caller decides about a conversion.

use slim_formats::slim::ScaleCoding;
use slim_kernels::linalg::Precision;

use crate::{ConvertError, Engine, Result, coder::Coder};

/// How layers are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// SliM-LLM: bit-widths by salience (SBA), salience-weighted scales, GPTQ sweep.
    Slim,
    /// [`Self::Slim`], then scales and norms trained towards the distributions of the source.
    SlimPlus,
    /// One bit-width, GPTQ sweep.
    Gptq,
    /// One bit-width, every weight rounded by itself; needs no calibration.
    RoundToNearest,
    /// SliM-LLM as its published code computes it, to the letter; in the paper coding.
    Reference,
}

impl Method {
    /// The name in commands and metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::Slim => "slim",
            Self::SlimPlus => "slim+",
            Self::Gptq => "gptq",
            Self::RoundToNearest => "rtn",
            Self::Reference => "reference",
        }
    }
}

/// What a result may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// Bits per weight of the linear layers: codes, scales, bit-widths and the padding of their
    /// rows; not the embedding.
    BitsPerWeight(f64),
    /// Bytes of the whole file, from header and tokenizer to the padding of its last tensor.
    FileBytes(u64),
}

/// Everything that decides the bytes of the result, besides the source, the calibration text and
/// the [`Engine`].
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Mean bits per code of the linear layers, 1 to 8; not used with a target.
    pub bits: u8,
    /// What methods `slim` and `slim+` may take; `None` for as many bits as `bits` everywhere
    /// would.
    pub target: Option<Target>,
    /// Columns that share a bit-width: a multiple of 16.
    pub group_size: usize,
    /// How scales are stored.
    pub coding: ScaleCoding,
    /// How layers are quantized.
    pub method: Method,
    /// Mean bits per code of the embedding and the output layer, 1 to 8, or 16, which keeps f16;
    /// `None` for as many as are worth it within a target size of the file.
    pub embed_bits: Option<u8>,
    /// Calibration samples.
    pub samples: usize,
    /// Tokens per calibration sample.
    pub context: usize,
    /// Seed of the choice of samples.
    pub seed: u64,
    /// Steps of training, for [`Method::SlimPlus`].
    pub steps: usize,
    /// Whether the calibration text is drawn from the model.
    pub draws_text: bool,
    /// Bytes that a part of the file may take, if it is to be split into parts where it takes more;
    /// not for [`Method::Reference`], which finds its widths as it goes.
    pub split_max_bytes: Option<u64>,
}

impl Settings {
    /// Checks what no type can.
    ///
    /// # Errors
    /// `InvalidSetting` with the first setting that is out of range or contradicts another.
    pub fn validate(&self) -> Result<()> {
        let check = |fine: bool, what, found: String, expected: &str| match fine {
            true => Ok(()),
            false => Err(ConvertError::InvalidSetting { what, found, expected: expected.into() }),
        };
        let (bits, embed_bits, group_size) = (self.bits, self.embed_bits, self.group_size);
        check((1..=8).contains(&bits), "bits", bits.to_string(), "1 to 8")?;
        let (found, embed_fits, expected) = match (embed_bits, self.target) {
            (None, Some(Target::FileBytes(_))) => (String::new(), true, ""),
            (None, _) => ("none".into(), false, "some without a target size"),
            (Some(bits), _) => {
                let fits = (1..=8).contains(&bits) || bits == 16;
                (bits.to_string(), fits, "1 to 8, or 16 for f16")
            }
        };
        check(embed_fits, "embed bits", found, expected)?;
        let group_fits = group_size > 0 && group_size.is_multiple_of(16);
        check(group_fits, "group size", group_size.to_string(), "a multiple of 16")?;
        // Caps that keep every product of sizes within 64 bits.
        let samples_fit = (1..=1 << 16).contains(&self.samples);
        check(samples_fit, "samples", self.samples.to_string(), "1 to 65536")?;
        let context_fits = (2..=1 << 24).contains(&self.context);
        check(context_fits, "context", self.context.to_string(), "2 to 16777216")?;
        if let Some((sub_group, scale_bits)) = self.coding.sub_groups() {
            let fits = matches!(sub_group, 16 | 32 | 64);
            check(fits, "sub-group", sub_group.to_string(), "16, 32 or 64")?;
            let fits = matches!(scale_bits, 4 | 6);
            check(fits, "scale bits", scale_bits.to_string(), "4 or 6")?;
        }
        if let Some(target) = self.target {
            match target {
                Target::BitsPerWeight(bits) => {
                    // Narrow matrices take far more than the 8 bits of a code.
                    let fits = (1.2..=64.0).contains(&bits);
                    check(fits, "target bits per weight", bits.to_string(), "1.2 to 64")?;
                }
                Target::FileBytes(bytes) => {
                    let fits = (1..=1 << 60).contains(&bytes);
                    check(fits, "target size", format!("{bytes} bytes"), "1 to 2^60 bytes")?;
                }
            }
            let fits = self.has_budget();
            let method = format!("`{}`", self.method.name());
            check(fits, "method with a target", method, "`slim` or `slim+`")?;
        }
        if self.method == Method::SlimPlus {
            let fits = self.coding != ScaleCoding::Paper;
            check(fits, "scales of method `slim+`", "`paper`".into(), "`two-level` or `trellis`")?;
            let fits = (1..=1 << 20).contains(&self.steps);
            check(fits, "steps", self.steps.to_string(), "1 to 1048576")?;
        }
        if self.method == Method::Reference {
            let fits = self.coding == ScaleCoding::Paper;
            check(fits, "scales of method `reference`", "`two-level`".into(), "`paper`")?;
            let fits = (2..=7).contains(&bits);
            check(fits, "bits of method `reference`", bits.to_string(), "2 to 7")?;
            let fits = self.split_max_bytes.is_none();
            check(fits, "parts of method `reference`", "a size".into(), "one file")?;
        }
        Ok(())
    }

    /// The settings of the embedding and the output layer; of the least bits if a target decides.
    ///
    /// Two-level scales of many bits get 6-bit codes: a 4-bit minimum code would shift a grid of
    /// 256 steps by up to 8 of them (`docs/notes/accuracy.md` has the effect).
    pub fn for_embedding(&self) -> Self {
        let bits = self.embed_bits.unwrap_or(1);
        let coding = match self.coding {
            ScaleCoding::TwoLevel { sub_group, .. } if bits >= 6 => {
                ScaleCoding::TwoLevel { sub_group, scale_bits: 6 }
            }
            coding => coding,
        };
        Self { bits, coding, ..self.clone() }
    }

    /// Whether one budget of bits for the whole model decides the widths.
    pub fn has_budget(&self) -> bool {
        matches!(self.method, Method::Slim | Method::SlimPlus)
    }

    /// Whether the float model runs along in the calibration, so that layers make up for what those
    /// before them changed.
    pub fn follows_float(&self) -> bool {
        self.has_budget()
    }

    /// What the record of a matrix is called: one work folder may have those of conversions to
    /// different sizes.
    pub(crate) fn record_of(&self, matrix: &str) -> String {
        match self.target {
            Some(Target::FileBytes(bytes)) => format!("{bytes}.{matrix}"),
            _ => matrix.to_owned(),
        }
    }

    /// Of the calibration's products on the processor.
    pub(crate) fn precision(&self) -> Precision {
        match self.method {
            Method::Reference => Precision::Fine,
            _ => Precision::Coarse,
        }
    }

    /// The coder of the linear layers.
    pub(crate) fn coder(&self) -> Coder {
        match self.method {
            Method::Reference => Coder::Published,
            _ => Coder::Best(self.coding),
        }
    }
}

/// What a conversion works with.
pub struct Resources {
    /// What computes the calibration.
    pub engine: Engine,
    /// Bytes of output Hessians and activations to hold in memory; the rest goes to temporary
    /// files. They do not decide the bytes of the result.
    pub float_bytes: u64,
}
