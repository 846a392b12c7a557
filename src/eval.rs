//! `slimllm eval`: perplexity, and divergence from another model.

use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::json;
use sha2::{Digest, Sha256};
use slim_runtime::{Evaluation, Protocol, evaluate};

use crate::{
    args::EvalArgs,
    failure::advised,
    open::{open, read_text, tokenizer},
    output::{count, facts, plural, print, print_json},
    progress::Progress,
};

pub fn run(args: &EvalArgs) -> Result<()> {
    args.execution.start()?;
    let start = Instant::now();
    let text = read_text(&args.text)?;
    let source = args.model.open()?;
    let model = args.execution.load(&*source, args.context)?;
    let other_source = args.against.as_deref().map(open).transpose()?;
    let other = match &other_source {
        Some(source) => Some(args.execution.load(&**source, args.context)?),
        None => None,
    };
    if let Some(other) = &other {
        let (ours, theirs) = (model.config().vocab_size, other.config().vocab_size);
        ensure!(ours == theirs, "the models have vocabularies of {ours} and {theirs} tokens");
    }
    // As Python reads a text file, which is how published figures are made.
    let tokens = tokenizer(&*source)?.encode(&text.replace("\r\n", "\n"))?;
    let windows = choose_windows(tokens.len(), args)?;

    let progress = Progress::new("window", windows);
    let show = |done, perplexity| progress.step(done, format_args!("perplexity {perplexity:.4}"));
    let protocol =
        Protocol { context: args.context, windows, batch: args.batch.unwrap_or(args.context) };
    let evaluation = evaluate(&model, other.as_ref(), &tokens, protocol, show)?;
    progress.finish();

    let text_sha256: String =
        Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect();
    let seconds = start.elapsed().as_secs_f64();
    match args.json {
        true => print_result_json(&evaluation, args.context, &text_sha256, seconds)?,
        false => print(&describe(&evaluation, args, &text_sha256, seconds))?,
    }
    Ok(())
}

/// How many windows to measure of a text of `tokens` tokens.
fn choose_windows(tokens: usize, args: &EvalArgs) -> Result<usize> {
    let available = tokens / args.context;
    let wanted = args.windows.unwrap_or(available.max(1));
    if wanted > available {
        let message = format!(
            "`{}` has {}, which is less than {} of {}",
            args.text.display(),
            plural(tokens, "token"),
            plural(wanted, "window"),
            plural(args.context, "token"),
        );
        return Err(advised(
            message,
            "give a longer text, fewer `--windows` or a smaller `--context`",
        ));
    }
    Ok(wanted)
}

fn print_result_json(
    evaluation: &Evaluation,
    context: usize,
    text_sha256: &str,
    seconds: f64,
) -> std::io::Result<()> {
    let mut result = json!({
        "perplexity": evaluation.perplexity,
        "tokens": evaluation.tokens,
        "windows": evaluation.windows,
        "context": context,
        "text_sha256": text_sha256,
        "seconds": seconds,
    });
    if let Some(divergence) = &evaluation.divergence {
        result["kl_mean"] = divergence.kl_mean.into();
        result["kl_p50"] = divergence.kl_p50.into();
        result["kl_p99"] = divergence.kl_p99.into();
        result["top1_agreement"] = divergence.top1_agreement.into();
    }
    print_json(&result)
}

/// The result, with the protocol in words: a perplexity says nothing without it.
fn describe(evaluation: &Evaluation, args: &EvalArgs, text_sha256: &str, seconds: f64) -> String {
    let mut lines = vec![("perplexity", format!("{:.4}", evaluation.perplexity))];
    if let (Some(divergence), Some(other)) = (&evaluation.divergence, &args.against) {
        let kl = format!(
            "mean {:.5}, median {:.5}, 99th percentile {:.5} nats per token, from `{}`",
            divergence.kl_mean,
            divergence.kl_p50,
            divergence.kl_p99,
            other.display()
        );
        lines.push(("KL divergence", kl));
        let agreement = format!("{:.2} % of tokens", 100.0 * divergence.top1_agreement);
        lines.push(("same top token", agreement));
    }
    let protocol = format!(
        "exp of the mean, over {} of {} tokens that do not overlap, of the mean negative\n\
         log-likelihood of tokens 2 to {} of each; text tokenized whole, with line ends as \\n,\n\
         no token put in front",
        plural(evaluation.windows, "window"),
        args.context,
        args.context,
    );
    lines.push(("protocol", protocol));
    let text = args.text.file_name().unwrap_or_default().display();
    lines.push(("text", format!("{text}, sha256 {text_sha256}")));
    lines.push(("tokens", count(evaluation.tokens as u64)));
    lines.push(("seconds", format!("{seconds:.1}")));
    facts(&lines)
}
