//! `export --check`: the model as written, run by an engine that it is for.

use std::{
    fs,
    io::{ErrorKind, Write},
    path::Path,
    process::{Command, Output, Stdio},
    sync::Arc,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value as Json, json};
use slim_converter::BUILT_IN_CALIBRATION;
use slim_exporter::Target;
use slim_formats::ModelSource;
use slim_kernels::{FloatCpu, kl_divergence, linalg::Precision, log_softmax};
use slim_runtime::{InBatches, Model, NextTokens};

use crate::{failure::advised, open::tokenizer};

/// Tokens of a window, and windows of the text. llama.cpp tells the second half of each.
const CONTEXT: usize = 128;
const WINDOWS: usize = 2;
/// The beginning of the built-in calibration text, in bytes: more than all windows take.
const TEXT_BYTES: usize = 8 << 10;
/// The mean divergence, in nats per token, from which on an engine computes something else. Engines
/// round weights and activations: llama.cpp diverges by thousandths.
const MOST_KL: f64 = 0.05;

/// What an engine makes of the model.
pub enum Checked {
    /// It computes the same.
    Agrees(Agreement),
    /// It was not asked; why.
    NotRun(String),
}

/// How close an engine is.
pub struct Agreement {
    engine: &'static str,
    positions: usize,
    /// Mean of KL(engine || model), in nats per token.
    kl: f64,
    /// Share of positions with the same most likely token.
    same: f64,
}

impl Checked {
    /// As a line of the report.
    pub fn describe(&self) -> String {
        match self {
            Self::Agrees(Agreement { engine, positions, kl, same }) => format!(
                "{engine} computes the same: KL {kl:.4} nats per token, same top token {:.0} % (of \
                 {positions})",
                100.0 * same
            ),
            Self::NotRun(reason) => format!("not run: {reason}"),
        }
    }

    pub fn to_json(&self) -> Json {
        match self {
            Self::Agrees(Agreement { engine, positions, kl, same }) => {
                json!({"engine": engine, "positions": positions, "kl_mean": kl, "top1_agreement": same})
            }
            Self::NotRun(reason) => json!({"not_run": reason}),
        }
    }
}

/// Logits that an engine gave for some positions of a window.
struct Window {
    tokens: Vec<u32>,
    /// The first of the positions; they go up to the last but one.
    first: usize,
    /// `[positions, vocab]`, or these less a number for each position.
    logits: Vec<f32>,
}

/// What asking an engine leads to.
enum Answer {
    Windows(Vec<Window>),
    NotThere(String),
}

/// Runs what `source` has become at `output` in an engine for its layout, if there is one.
///
/// # Errors
/// The engine refuses it, or computes something else.
pub fn check(source: &Arc<dyn ModelSource>, target: Target, output: &Path) -> Result<Checked> {
    let (engine, answer) = match target {
        Target::Gguf => ("llama.cpp", llama_cpp(&**source, output)?),
        Target::Onnx => ("ONNX Runtime", onnx_runtime(&**source, output)?),
        Target::Safetensors | Target::Gptq => ("transformers", transformers(&**source, output)?),
    };
    let windows = match answer {
        Answer::Windows(windows) => windows,
        Answer::NotThere(reason) => return Ok(Checked::NotRun(reason)),
    };
    let agreement = compare(engine, source, windows)?;
    // Logits that are no numbers are not close.
    let is_close = agreement.kl <= MOST_KL;
    if !is_close {
        let message = format!(
            "`{}`: {engine} computes something else: KL {:.4} nats per token, same top token {:.0} %",
            output.display(),
            agreement.kl,
            100.0 * agreement.same
        );
        return Err(advised(message, "another version of the engine may know the model better"));
    }
    Ok(Checked::Agrees(agreement))
}

/// Compares an engine with the source as it is, in f32.
fn compare(
    engine: &'static str,
    source: &Arc<dyn ModelSource>,
    windows: Vec<Window>,
) -> Result<Agreement> {
    let model = Model::load(Arc::clone(source), &FloatCpu(Precision::Fine))?;
    let vocab = model.config().vocab_size;
    let (mut kl, mut same, mut positions) = (0.0, 0, 0);
    for Window { tokens, first, logits: mut theirs } in windows {
        let of_engine = theirs.len() / (tokens.len() - 1 - first);
        ensure!(of_engine == vocab, "{engine} has {of_engine} tokens, the model {vocab}");
        let mut ours = InBatches { model: &model, batch: CONTEXT };
        let mut ours = ours.run(&tokens)?(first..tokens.len() - 1)?;
        for (ours, theirs) in ours.chunks_exact_mut(vocab).zip(theirs.chunks_exact_mut(vocab)) {
            log_softmax(ours);
            log_softmax(theirs);
            kl += kl_divergence(theirs, ours);
            same += usize::from(largest(ours) == largest(theirs));
            positions += 1;
        }
    }
    let mean = |sum: f64| sum / positions as f64;
    Ok(Agreement { engine, positions, kl: mean(kl), same: mean(same as f64) })
}

fn largest(values: &[f32]) -> Option<usize> {
    values.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(index, _)| index)
}

fn text() -> &'static str {
    &BUILT_IN_CALIBRATION[..BUILT_IN_CALIBRATION.floor_char_boundary(TEXT_BYTES)]
}

/// The windows of the text, as the model's tokenizer cuts it.
fn windows(source: &dyn ModelSource) -> Result<Vec<Vec<u32>>> {
    let tokens = tokenizer(source)?.encode(text())?;
    Ok(tokens.chunks_exact(CONTEXT).take(WINDOWS).map(<[u32]>::to_vec).collect())
}

/// Runs a program; `None` if there is none of the name.
fn run(command: &mut Command, input: &[u8]) -> Result<Option<Output>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match piped.spawn() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        child => child.with_context(|| format!("cannot start `{name}`"))?,
    };
    // One that ends without a look at it says why in what it prints.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input));
    Ok(Some(child.wait_with_output().with_context(|| format!("cannot run `{name}`"))?))
}

/// The last words of a program that failed.
fn last_words(output: &Output) -> String {
    const LINES: usize = 5;
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

// ---- llama.cpp ----

const PERPLEXITY: &str = "llama-perplexity";

/// By the file of logits that `llama-perplexity` saves for comparisons.
fn llama_cpp(source: &dyn ModelSource, output: &Path) -> Result<Answer> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let [prompt, saved] = ["text", "logits"].map(|name| folder.path().join(name));
    fs::write(&prompt, text()).with_context(|| format!("cannot write `{}`", prompt.display()))?;
    let (context, windows) = (CONTEXT.to_string(), WINDOWS.to_string());
    let mut command = Command::new(PERPLEXITY);
    command.arg("-m").arg(output).arg("-f").arg(&prompt).args(["-c", &context, "-b", &context]);
    command.args(["--chunks", &windows, "-ngl", "0"]).arg("--kl-divergence-base").arg(&saved);
    let Some(done) = run(&mut command, &[])? else {
        return Ok(Answer::NotThere(format!("there is no `{PERPLEXITY}` on the PATH")));
    };
    if !done.status.success() {
        let (file, words) = (output.display(), last_words(&done));
        bail!("`{file}`: llama.cpp cannot run it:\n{words}");
    }
    let add_bos = source.config().add_bos.then_some(source.config().bos_token_id).flatten();
    let windows = fs::read(&saved).ok().and_then(|bytes| saved_logits(&bytes, add_bos));
    windows.map(Answer::Windows).context("llama.cpp saved logits of a kind that is not known")
}

/// What `llama-perplexity` saves: `_logits_`, the context, vocabulary and number of windows, the
/// tokens; then, for each position of the second half of each window but the last, a step and the
/// least logarithm in f32, and 16 bits for each token of the vocabulary, made an even number. A
/// window begins with the token for that, `bos`, whatever is saved.
fn saved_logits(bytes: &[u8], bos: Option<u32>) -> Option<Vec<Window>> {
    let mut rest = bytes.strip_prefix(b"_logits_")?;
    let mut words = |count: usize| -> Option<Vec<u32>> {
        let (words, after) = rest.split_at_checked(count.checked_mul(4)?)?;
        rest = after;
        Some(words.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
    };
    let [context, vocab, count] = words(3)?.try_into().ok()?;
    let [context, vocab, count] = [context, vocab, count].map(|number: u32| number as usize);
    let tokens = words(context.checked_mul(count)?)?;
    let first = context / 2;
    let row_bytes = 4 + vocab.div_ceil(2) * 2 * 2 + 4;
    let positions = context.checked_sub(first + 1).filter(|&positions| positions > 0)?;
    let mut rows = rest.chunks_exact(row_bytes);
    let mut window = |tokens: &[u32]| {
        let mut logits = Vec::with_capacity(positions * vocab);
        for row in rows.by_ref().take(positions) {
            let number =
                |at: usize| f32::from_le_bytes([row[at], row[at + 1], row[at + 2], row[at + 3]]);
            let (step, least) = (number(0), number(4));
            let codes = row[8..].as_chunks::<2>().0.iter().take(vocab);
            logits.extend(codes.map(|code| least + step * f32::from(u16::from_le_bytes(*code))));
        }
        let mut tokens = tokens.to_vec();
        if let Some(bos) = bos {
            tokens[0] = bos;
        }
        (logits.len() == positions * vocab).then_some(Window { tokens, first, logits })
    };
    tokens.chunks_exact(context).map(&mut window).collect()
}

// ---- ONNX Runtime ----

#[cfg(feature = "onnx-run")]
fn onnx_runtime(source: &dyn ModelSource, output: &Path) -> Result<Answer> {
    let mut graph = match crate::eval::open_graph(&output.join("model.onnx")) {
        Ok(graph) => graph,
        Err(error) => match error.downcast_ref() {
            Some(slim_runtime::RuntimeError::OnnxLibrary { .. }) => {
                return Ok(Answer::NotThere(format!("{error:#}")));
            }
            _ => return Err(error),
        },
    };
    let answers = windows(source)?.into_iter().map(|tokens| {
        let logits = graph.run(&tokens)?(0..tokens.len() - 1)?;
        Ok(Window { tokens, first: 0, logits })
    });
    Ok(Answer::Windows(answers.collect::<Result<_>>()?))
}

#[cfg(not(feature = "onnx-run"))]
fn onnx_runtime(_: &dyn ModelSource, _: &Path) -> Result<Answer> {
    Ok(Answer::NotThere("this build cannot run ONNX graphs".into()))
}

// ---- transformers ----

const PYTHON: &str = "python3";
/// That of the script if a package is missing.
const NO_PACKAGE: i32 = 3;

fn transformers(source: &dyn ModelSource, output: &Path) -> Result<Answer> {
    let windows = windows(source)?;
    let line = |tokens: &Vec<u32>| {
        tokens.iter().map(|token| format!("{token} ")).collect::<String>() + "\n"
    };
    let mut command = Command::new(PYTHON);
    command.args(["-c", include_str!("transformers.py")]).arg(output);
    let Some(done) = run(&mut command, windows.iter().map(line).collect::<String>().as_bytes())?
    else {
        return Ok(Answer::NotThere(format!("there is no `{PYTHON}` on the PATH")));
    };
    if done.status.code() == Some(NO_PACKAGE) {
        return Ok(Answer::NotThere(format!("`{PYTHON}` says: {}", last_words(&done))));
    }
    if !done.status.success() {
        let (folder, words) = (output.display(), last_words(&done));
        bail!("`{folder}`: transformers cannot run it:\n{words}");
    }
    let floats: Vec<f32> =
        done.stdout.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let tokens: usize = windows.iter().map(Vec::len).sum();
    let vocab = floats.len() / tokens.max(1);
    ensure!(vocab > 0 && floats.len() == vocab * tokens, "transformers gave no logits");
    let logits = floats.chunks_exact(CONTEXT * vocab);
    let window = |(tokens, logits): (Vec<u32>, &[f32])| {
        let logits = logits[..(CONTEXT - 1) * vocab].to_vec();
        Window { tokens, first: 0, logits }
    };
    Ok(Answer::Windows(windows.into_iter().zip(logits).map(window).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_logits_are_those_of_the_second_half() {
        let mut bytes = b"_logits_".to_vec();
        bytes.extend([4_u32, 3, 1].iter().flat_map(|number| number.to_le_bytes()));
        bytes.extend([7_u32, 8, 9, 10].iter().flat_map(|token| token.to_le_bytes()));
        // Position 2, whose vocabulary is filled up to 4 tokens.
        bytes.extend([0.5_f32, -3.0].iter().flat_map(|number| number.to_le_bytes()));
        bytes.extend([0_u16, 2, 4, 999].iter().flat_map(|code| code.to_le_bytes()));
        let windows = saved_logits(&bytes, Some(1)).unwrap();
        assert_eq!(windows.len(), 1);
        assert_eq!((&*windows[0].tokens, windows[0].first), (&[1, 8, 9, 10][..], 2));
        assert_eq!(windows[0].logits, [-3.0, -2.0, -1.0]);
        for end in [0, 8, 19, 35, bytes.len() - 1] {
            assert!(saved_logits(&bytes[..end], None).is_none(), "{end}");
        }
    }
}
