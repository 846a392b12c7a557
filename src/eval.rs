//! `slimllm eval`: perplexity, and divergence from another model.

mod profile;

use std::{path::Path, time::Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use slim_runtime::{Evaluation, InBatches, NextTokens, Protocol, evaluate};

use crate::{
    args::EvalArgs,
    failure::advised,
    open::{check_context, is_onnx, open, read_text, resolve_context, tokenizer},
    output::{count, facts, plural, print, print_json, sha256},
    progress::Progress,
};

pub fn run(args: &EvalArgs) -> Result<()> {
    args.execution.start()?;
    let Some(path) = &args.text else {
        let against = args.against.as_deref().expect("a profile is against a model");
        return profile::run(args, against);
    };
    let start = Instant::now();
    let text = read_text(path)?;
    let source = args.model.open()?;
    let context = resolve_context(source.config(), args.context)?;
    let model = args.execution.load(&source, context)?;
    let other_model;
    let mut other: Option<Box<dyn NextTokens>> = match &args.against {
        None => None,
        Some(path) if is_onnx(path) => Some(open_graph(path)?),
        Some(path) => {
            let other_source = open(path)?;
            check_context(other_source.config(), context)?;
            other_model = args.execution.load(&other_source, context)?;
            Some(Box::new(InBatches { model: &other_model, batch: context }))
        }
    };
    // As Python reads a text file, which is how published figures are made.
    let tokens = tokenizer(&*source)?.encode(&text.replace("\r\n", "\n"))?;
    let windows = choose_windows(tokens.len(), context, path, args.windows)?;

    let mut progress = Progress::new("window", windows);
    let show = |done, perplexity| progress.step(done, format_args!("perplexity {perplexity:.4}"));
    let mut model = InBatches { model: &model, batch: args.batch.unwrap_or(context) };
    let protocol = Protocol { context, windows };
    let evaluation = evaluate(&mut model, other.as_deref_mut(), &tokens, protocol, show)?;
    progress.finish();
    ensure!(
        evaluation.perplexity.is_finite(),
        "`{}`: the perplexity is {}: its logits are no finite numbers",
        source.path().display(),
        evaluation.perplexity
    );

    let text_sha256 = sha256(text.as_bytes());
    let seconds = start.elapsed().as_secs_f64();
    match args.json {
        true => print_result_json(&evaluation, context, &text_sha256, seconds)?,
        false => print(&describe(&evaluation, args, context, &text_sha256, seconds))?,
    }
    Ok(())
}

/// Opens a graph in ONNX Runtime: the library that ORT_DYLIB_PATH names, or the system's.
#[cfg(feature = "onnx-run")]
pub fn open_graph(path: &Path) -> Result<Box<dyn NextTokens>> {
    use std::env::{
        self,
        consts::{DLL_PREFIX, DLL_SUFFIX},
    };

    let system = || format!("{DLL_PREFIX}onnxruntime{DLL_SUFFIX}").into();
    let library = env::var_os("ORT_DYLIB_PATH").filter(|path| !path.is_empty());
    let runtime = slim_runtime::OnnxRuntime::load(library.unwrap_or_else(system).as_ref())?;
    Ok(Box::new(runtime.open(path)?))
}

/// A build without ONNX Runtime has nothing to run a graph with.
#[cfg(not(feature = "onnx-run"))]
fn open_graph(path: &Path) -> Result<Box<dyn NextTokens>> {
    let message = format!("`{}`: this build cannot run ONNX graphs", path.display());
    Err(advised(message, "build slimllm with its default features"))
}

/// How many windows of `context` tokens to measure of a text of `tokens` tokens.
fn choose_windows(
    tokens: usize,
    context: usize,
    text: &Path,
    wanted: Option<usize>,
) -> Result<usize> {
    let available = tokens / context;
    let wanted = wanted.unwrap_or(available.max(1));
    if wanted > available {
        let message = format!(
            "`{}` has {}, which is less than {} of {}",
            text.display(),
            plural(tokens, "token"),
            plural(wanted, "window"),
            plural(context, "token"),
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
        result["kl_p90"] = divergence.kl_p90.into();
        result["kl_p99"] = divergence.kl_p99.into();
        result["kl_p999"] = divergence.kl_p999.into();
        result["top1_agreement"] = divergence.top1_agreement.into();
    }
    print_json(result)
}

/// The result, with the protocol in words: a perplexity says nothing without it.
fn describe(
    evaluation: &Evaluation,
    args: &EvalArgs,
    context: usize,
    text_sha256: &str,
    seconds: f64,
) -> String {
    let mut lines = vec![("perplexity", format!("{:.4}", evaluation.perplexity))];
    if let (Some(divergence), Some(other)) = (&evaluation.divergence, &args.against) {
        let kl = format!(
            "mean {}; percentiles 50: {}, 90: {}, 99: {}, 99.9: {} nats per token, from `{}`{}",
            nats(divergence.kl_mean),
            nats(divergence.kl_p50),
            nats(divergence.kl_p90),
            nats(divergence.kl_p99),
            nats(divergence.kl_p999),
            other.display(),
            if is_onnx(other) { " in ONNX Runtime" } else { "" }
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
        context,
        context,
    );
    lines.push(("protocol", protocol));
    let text = args.text.as_deref().and_then(Path::file_name).unwrap_or_default().display();
    lines.push(("text", format!("{text}, sha256 {text_sha256}")));
    lines.push(("tokens", count(evaluation.tokens as u64)));
    lines.push(("seconds", format!("{seconds:.1}")));
    facts(&lines)
}

/// A divergence; where it comes from rounding alone, how small it is.
fn nats(kl: f64) -> String {
    match kl == 0.0 || kl.abs() >= 1e-4 {
        true => format!("{kl:.5}"),
        false => format!("{kl:.0e}"),
    }
}
