//! The model card of a conversion: a `README.md` for a hub.

use std::path::Path;

use anyhow::Result;
use slim_converter::{Quality, Report};
use slim_formats::{ModelSource, gguf::GgufFile};

use super::check::Check;
use crate::{
    card::{code, front_matter},
    output::size,
    reproduce,
};

/// What a hub asks of the file `output`, what was measured, and the command that made it, as
/// Markdown.
pub fn card(
    output: &Path,
    source: &dyn ModelSource,
    source_bytes: u64,
    report: &Report,
    check: &Check,
) -> Result<String> {
    let file = code(&output.file_name().unwrap_or_default().to_string_lossy());
    let name = source.config().name.as_deref().map(code);
    let name = name.unwrap_or_else(|| code(&source.path().to_string_lossy()));
    let container = GgufFile::open(output)?;
    let repository = container.metadata().str("slim.source.repository");
    let bits = format!("{:.2}", report.bits_per_weight);
    let (after, before) = (size(report.file_bytes), size(source_bytes));
    let command = reproduce::command_of(output, container.metadata())?;
    let measured = measured(check);
    let front = front_matter(repository, "slimllm");
    Ok(format!(
        "{front}\n\
         # {name} at {bits} bits per weight\n\n\
         {file} is {name}, quantized by [SliM-LLM](https://arxiv.org/abs/2405.14917): {bits} bits \
         per weight of its linear layers, everything counted, with a bit-width per group of \
         weights. It takes {after}; the source takes {before}. The licence is that of the source.\n\n\
         {measured}\
         ## Run it\n\n\
         ```sh\nslimllm run {plain} -p \"Once upon a time\"\nslimllm serve {plain}\n```\n\n\
         ## How it was made\n\n\
         ```sh\n{command}\n```\n\n\
         `slimllm reproduce {plain}` prints this command, and with `--run` checks that it makes the \
         same bytes.\n",
        plain = file.trim_matches('`'),
    ))
}

/// The table of the divergence from the source, if it was measured.
fn measured(check: &Check) -> String {
    let Some(quality) = check.quality() else { return String::new() };
    let row = |Quality { domain, tokens, divergence, .. }: &Quality| {
        let agreement = 100.0 * divergence.top1_agreement;
        let (mean, p99) = (divergence.kl_mean, divergence.kl_p99);
        format!("| {} | {tokens} | {mean:.4} | {p99:.4} | {agreement:.0} % |\n", domain.name())
    };
    let rows: String = quality.iter().map(row).collect();
    format!(
        "## Against the source\n\n\
         | text | tokens | KL divergence, mean, nats per token | 99 % of tokens below | same top token |\n\
         |---|---|---|---|---|\n{rows}\n\
         Measured on texts that it was not calibrated on, on the file as it runs.\n\n"
    )
}
