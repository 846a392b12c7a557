//! What is done with a file that was just written: it is verified, run, and compared with its
//! source.

use std::{path::Path, sync::Arc};

use anyhow::{Result, ensure};
use serde_json::{Value as Json, json};
use slim_converter::{
    Method, Quality, Settings, Target, USELESS_KL, predict_quality, quality_bytes,
};
use slim_formats::{ModelSource, slim::SlimFile};
use slim_kernels::Cpu;
use slim_runtime::{Event, Model, SamplerSettings, Settings as Generation};

use crate::output::{plural, size, warn};

const PROMPT: &str = "Once upon a time";
const TOKENS: usize = 12;

/// The rule of the format that a source may break, and its result then breaks, too.
const VOCABULARY_RULE: &str = "F23";

/// What a file was found to be.
pub struct Check {
    /// Whether it has a vocabulary with faults, those of its source.
    has_faulty_vocabulary: bool,
    /// How it continues [`PROMPT`].
    continuation: String,
    /// By kind of text; `None` if there is no memory for it.
    quality: Option<Vec<Quality>>,
}

impl Check {
    /// Verifies `file`, which was made of `source` by `settings`, continues a prompt with it, and
    /// compares it with its source. What is likely useless is warned of.
    ///
    /// # Memory
    /// `max_memory` besides the mapped files.
    pub fn of(
        file: &Path,
        source: &Arc<dyn ModelSource>,
        settings: &Settings,
        max_memory: u64,
    ) -> Result<Self> {
        let written = SlimFile::open(file)?;
        // What is odd about the vocabulary is the source's, and was warned of when it was opened.
        let (inherited, faults): (Vec<_>, Vec<_>) =
            written.verify().into_iter().partition(|fault| fault.rule == VOCABULARY_RULE);
        let shown = file.display();
        ensure!(
            faults.is_empty(),
            "`{shown}` was written, but breaks {} of its format: its disk may be failing; \
             `slimllm inspect --verify {shown}` lists them",
            plural(faults.len(), "rule")
        );
        let needed = quality_bytes(source.config());
        let result = Model::load(Arc::new(written), &Cpu)?;
        let continuation = continuation(&result)?;
        let quality = match needed <= max_memory {
            true => Some(predict_quality(&Model::load(Arc::clone(source), &Cpu)?, &result)?),
            false => {
                warn(&format!(
                    "its quality was not measured: the logits of both models take {}, of which \
                     `--max-memory` grants {}",
                    size(needed),
                    size(max_memory)
                ));
                None
            }
        };
        let check = Self { has_faulty_vocabulary: !inherited.is_empty(), continuation, quality };
        if let Some(worst) = check.worst().filter(|worst| worst.is_useless()) {
            warn(&format!(
                "the result is likely useless for {}: it diverges from the source by {:.2} nats \
                 per token, expected {USELESS_KL} at most; try {}",
                worst.domain.name(),
                worst.divergence.kl_mean,
                better(settings)
            ));
        }
        Ok(check)
    }

    /// How far the file is from its source, by kind of text, if that was measured.
    pub fn quality(&self) -> Option<&[Quality]> {
        self.quality.as_deref()
    }

    fn worst(&self) -> Option<&Quality> {
        let kl = |quality: &Quality| quality.divergence.kl_mean;
        self.quality.iter().flatten().max_by(|a, b| kl(a).total_cmp(&kl(b)))
    }

    /// Label and value of each line of the report.
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        let verified = match self.has_faulty_vocabulary {
            true => "every hash, and every rule of the format but that of the vocabulary",
            false => "every rule of the format, and every hash",
        };
        let mut facts = vec![("verified", verified.to_owned())];
        let divergence = |quality: &Quality| {
            let Quality { domain, divergence, .. } = quality;
            let agreement = 100.0 * divergence.top1_agreement;
            let name = domain.name();
            let kl = divergence.kl_mean;
            format!("{name:5}  KL {kl:.3} nats per token, same top token {agreement:.0} %")
        };
        if let Some(quality) = &self.quality {
            let lines: Vec<_> = quality.iter().map(divergence).collect();
            facts.push(("against source", lines.join("\n")));
        }
        facts.push(("it writes", format!("{PROMPT}{}", self.continuation)));
        facts
    }

    /// By kind of text.
    pub fn to_json(&self) -> Json {
        let entry = |quality: &Quality| {
            json!({
                "domain": quality.domain.name(),
                "tokens": quality.tokens,
                "kl_mean": quality.divergence.kl_mean,
                "kl_p99": quality.divergence.kl_p99,
                "top1_agreement": quality.divergence.top1_agreement,
                "is_useless": quality.is_useless(),
            })
        };
        self.quality.iter().flatten().map(entry).collect()
    }
}

/// The most likely tokens behind [`PROMPT`], on one line.
fn continuation(model: &Model) -> Result<String> {
    let sampler = SamplerSettings { temperature: 0.0, ..SamplerSettings::default() };
    let (context, limit, sampler) = (Some(64), Some(TOKENS), Some(sampler));
    let settings = Generation { context, limit, sampler };
    let mut text = String::new();
    for event in model.generate(PROMPT, settings)? {
        match event? {
            Event::Token { text: more, .. } | Event::End { text: more, .. } => text += &more,
            _ => {}
        }
    }
    Ok(text.replace(['\n', '\r', '\t'], " "))
}

/// The setting that is likely to help most.
fn better(settings: &Settings) -> String {
    match (settings.method, settings.target) {
        (Method::RoundToNearest | Method::Gptq | Method::Reference, _) => "`--method slim`".into(),
        (_, Some(Target::BitsPerWeight(bits))) => format!("`--target-bpw {:.2}`", bits + 0.5),
        (_, Some(Target::FileBytes(bytes))) => {
            format!("`--target-size {}MB`", (bytes + bytes / 5).div_ceil(1_000_000))
        }
        (_, None) if settings.bits < 8 => format!("`--bits {}`", settings.bits + 1),
        (_, None) => "more `--samples`".into(),
    }
}
