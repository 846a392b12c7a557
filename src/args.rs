//! What users type.

use std::{ops::RangeBounds, path::PathBuf, str::FromStr, sync::LazyLock};

use clap::{
    Parser, Subcommand, ValueEnum,
    builder::{
        NonEmptyStringValueParser, PossibleValuesParser, RangedU64ValueParser, TypedValueParser,
    },
};
use slim_converter::{COMMIT, Method};
use slim_kernels::instruction_path;

use crate::{
    compute::{Compute, Execution},
    open::ModelArgs,
    run::PromptArgs,
    target::{Kind, TargetArgs},
};

/// The command line.
#[derive(Parser)]
#[command(name = "slimllm", version = version(), about)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

/// Version, commit, and what the processor computes with.
fn version() -> &'static str {
    static VERSION: LazyLock<String> = LazyLock::new(|| {
        let commit = COMMIT.map_or("no commit".to_owned(), |commit| format!("commit {commit}"));
        format!("{} ({commit}, {})", env!("CARGO_PKG_VERSION"), instruction_path())
    });
    &VERSION
}

/// The subcommands, each in its own module.
#[derive(Subcommand)]
pub enum Command {
    /// Quantize a model
    Convert(Box<ConvertArgs>),
    /// Generate text with a model
    Run(RunArgs),
    /// Show what a model file holds, and check it
    Inspect(InspectArgs),
    /// Show what differs between two models
    Diff(DiffArgs),
    /// Measure perplexity on a text, and the divergence from another model
    Eval(EvalArgs),
    /// Write the logits of each position of a token sequence
    Logits(LogitsArgs),
    /// Measure the speed of a model on this machine
    Bench(BenchArgs),
    /// Write a model's weights in the layout of another engine
    Export(ExportArgs),
    /// Print the command that made a SliM file, and check that it makes the same bytes
    Reproduce(ReproduceArgs),
    /// Serve a model over HTTP, as OpenAI's API does
    Serve(ServeArgs),
    /// Print the completions of a shell, or write the manual pages
    Completions(CompletionsArgs),
    /// Render a chat template for the process that asks for it
    #[command(hide = true)]
    RenderTemplate,
}

#[derive(clap::Args)]
pub struct ConvertArgs {
    /// A Hugging Face directory, an ONNX file with its `config.json` beside it, a GGUF file, or a
    /// hub id: org/name or org/name@revision, with :Q4_K_M for a GGUF of a repository
    pub source: PathBuf,

    #[command(flatten)]
    pub target: TargetArgs,

    /// Mean bits per code of the linear layers, 1 to 8
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub bits: u8,

    /// Bits per weight of the linear layers, everything counted, instead of those that --bits would
    /// take; 1.2 to 64
    #[arg(long, value_name = "BITS", conflicts_with_all = ["bits", "reference"])]
    pub target_bpw: Option<f64>,

    /// Size of the whole file, such as 60MB or 1.5GiB, instead of --bits; it is met from below
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["bits", "target_bpw", "reference"], value_parser = parse_size)]
    pub target_size: Option<u64>,

    /// The smallest file whose mean KL divergence from the source is at most F nats per token,
    /// measured on held-back prose, code and a chat, instead of --bits; it takes a few conversions
    #[arg(long, value_name = "F", conflicts_with_all = ["bits", "target_bpw", "target_size", "reference", "dry_run"], value_parser = parse_divergence)]
    pub max_kl: Option<f64>,

    /// Split the file into numbered parts, NAME-00001-of-00003.gguf and so on, if it takes more
    /// than SIZE; no tensor is cut, so a part takes more only if it holds a single one. With
    /// --force it replaces all parts of an earlier file of this name
    #[arg(long, value_name = "SIZE", conflicts_with = "reference", value_parser = parse_size)]
    pub split_max_size: Option<u64>,

    /// Columns that share a bit-width, a multiple of 16
    #[arg(long, value_name = "COLUMNS", default_value_t = 64)]
    pub group_size: usize,

    /// How scales are stored: as small codes under an fp16 pair per row, the same with codes that
    /// share bits (trellis: better below 4 bits, slower), or as in the paper
    #[arg(long, value_enum, default_value_t = Scales::TwoLevel)]
    pub scales: Scales,

    /// Columns that share a scale code [default: 32]
    #[arg(long, value_name = "COLUMNS", value_parser = one_of(["16", "32", "64"]))]
    pub sub_group: Option<usize>,

    /// Bits of a two-level scale code [default: 4]
    #[arg(long, value_name = "BITS", value_parser = one_of(["4", "6"]))]
    pub scale_bits: Option<usize>,

    /// How layers are quantized: slim, slim+ (trained end to end afterwards), gptq or rtn
    #[arg(long, default_value = "slim", value_parser = parse_method)]
    pub method: Method,

    /// Steps of training, with --method slim+ [default: 300]
    #[arg(long, value_name = "N", value_parser = range(1..=1 << 20))]
    pub steps: Option<usize>,

    /// A SliM file of the source to train further, with --method slim+, instead of converting first
    #[arg(long, value_name = "FILE", conflicts_with_all = ["bits", "target_bpw", "target_size", "max_kl", "group_size", "scales", "sub_group", "scale_bits", "embed_bits", "dry_run"])]
    pub draft: Option<PathBuf>,

    /// Follow the published algorithm to the letter, in the paper coding
    #[arg(long, conflicts_with_all = ["scales", "sub_group", "scale_bits", "method"])]
    pub reference: bool,

    /// Mean bits of the embedding and the output layer; 16 keeps them as f16 [default: 4, with
    /// --target-size and --max-kl what is best; 6 with methods gptq and rtn, 16 with --reference]
    #[arg(long, value_name = "BITS", value_parser = one_of(["2", "3", "4", "5", "6", "8", "16"]))]
    pub embed_bits: Option<usize>,

    /// Text to calibrate on; `self` for one that the model writes [default: a built-in one]
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<CalibrationText>,

    /// Calibration samples
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = range(1..=1 << 16))]
    pub samples: usize,

    /// Tokens per calibration sample [default: 2048, or as many as the model was made for]
    #[arg(long, value_name = "TOKENS", value_parser = range(2..=1 << 24))]
    pub context: Option<usize>,

    /// Seed of the choice of samples
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Memory to use, such as 512MiB; what does not fit goes to temporary files where it can
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = parse_size)]
    pub max_memory: u64,

    /// Go on where an earlier conversion with the same arguments has stopped, if one has
    #[arg(long)]
    pub resume: bool,

    /// Show what would be done, and write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Also write a model card for a hub, such as README.md: what was measured, and the command
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    pub card: Option<PathBuf>,

    /// Print only warnings and errors
    #[arg(long)]
    pub quiet: bool,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub compute: Compute,
}

impl ConvertArgs {
    /// Where the model card goes, if one is asked for.
    pub fn card(&self) -> Option<TargetArgs> {
        let output = self.card.clone()?;
        Some(TargetArgs { output, force: self.target.force })
    }
}

/// How scales are stored.
#[derive(Clone, Copy, ValueEnum)]
pub enum Scales {
    TwoLevel,
    Trellis,
    Paper,
}

#[derive(clap::Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub prompt: PromptArgs,

    /// Chat: messages are read from the terminal, or from stdin, a line each; /help lists commands
    #[arg(long)]
    pub chat: bool,

    /// The system prompt of a chat
    #[arg(long, alias = "system-prompt", value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,

    /// Tokens to generate at most, per answer; -1 for as many as the model and the context give
    #[arg(
        short = 'n',
        long,
        alias = "n-predict",
        value_name = "N",
        default_value = "256",
        allow_negative_numbers = true
    )]
    pub tokens: TokenLimit,

    /// Tokens that the context holds [default: as the model was made for, 4096 at most]
    #[arg(short, long, alias = "ctx-size", value_name = "TOKENS", value_parser = range(1..))]
    pub context: Option<usize>,

    #[command(flatten)]
    pub execution: Execution,

    // The last, since flags that follow would stand under its heading, too.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// Tokens of an answer at most; `None` for any number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenLimit(pub Option<usize>);

/// What a model is calibrated on.
#[derive(Debug, Clone)]
pub enum CalibrationText {
    /// What it writes itself.
    OfModel,
    File(PathBuf),
}

impl CalibrationText {
    /// The file that it is in, if it is in one.
    pub fn file(&self) -> Option<&PathBuf> {
        match self {
            Self::OfModel => None,
            Self::File(path) => Some(path),
        }
    }
}

impl From<std::ffi::OsString> for CalibrationText {
    fn from(value: std::ffi::OsString) -> Self {
        if value == "self" { Self::OfModel } else { Self::File(value.into()) }
    }
}

impl FromStr for TokenLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("-1", _) => Ok(Self(None)),
            (_, Ok(limit)) => Ok(Self(Some(limit))),
            _ => Err("expected a whole number, or -1 for no limit".to_owned()),
        }
    }
}

/// What is not given is the model's to say, and ours where it says nothing.
#[derive(clap::Args)]
#[command(next_help_heading = "Sampling (default: the model's own settings)")]
pub struct SamplingArgs {
    /// Randomness of the choice; 0 always takes the most likely token
    #[arg(long, alias = "temp", value_name = "T")]
    pub temperature: Option<f32>,

    /// Choose among the K most likely tokens; 0 for all
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,

    /// Choose among the most likely tokens that together have probability P
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,

    /// Choose among tokens at least P times as likely as the most likely one
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,

    /// Make recent tokens less likely; 1 changes nothing
    #[arg(long, value_name = "X")]
    pub repeat_penalty: Option<f32>,

    /// Seed of the random choice, to repeat a text [default: another one each time, which is told]
    #[arg(short, long)]
    pub seed: Option<u64>,
}

#[derive(clap::Args)]
pub struct InspectArgs {
    /// A SliM, GGUF, ONNX or safetensors file, a Hugging Face directory, or a hub id
    pub file: PathBuf,

    /// List the tensors
    #[arg(long)]
    pub tensors: bool,

    /// Show the bit-width of each group of each layer
    #[arg(long)]
    pub bits: bool,

    /// List the metadata
    #[arg(long)]
    pub metadata: bool,

    /// Check every rule of the format and every checksum
    #[arg(long)]
    pub verify: bool,

    /// Print one JSON document with tensors and layers
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub page: PageArgs,
}

#[derive(clap::Args)]
pub struct DiffArgs {
    /// A SliM, GGUF, ONNX or safetensors file, a Hugging Face directory, or a hub id
    pub a: PathBuf,

    /// Another one, such as the source of the first
    pub b: PathBuf,

    /// Print one JSON document
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub page: PageArgs,
}

/// The page that a command also writes.
#[derive(clap::Args)]
pub struct PageArgs {
    /// Also write a page that needs nothing else; of `inspect` with what `--verify` finds
    #[arg(long, value_name = "REPORT")]
    pub html: Option<PathBuf>,

    /// Replace the page if it exists
    #[arg(long, requires = "html")]
    pub force: bool,
}

impl PageArgs {
    /// Writes the page about `inputs`, if the user asks for one.
    pub fn write(&self, inputs: &[PathBuf], page: impl FnOnce() -> String) -> anyhow::Result<()> {
        let Some(output) = self.html.clone() else { return Ok(()) };
        let target = TargetArgs { output, force: self.force };
        target.write(Kind::File("html"), inputs, page().as_bytes())
    }
}

#[derive(clap::Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(required_unless_present = "man")]
    pub shell: Option<clap_complete::Shell>,

    /// Write the manual pages into this new folder instead
    #[arg(long, value_name = "DIR", conflicts_with = "shell")]
    pub man: Option<PathBuf>,
}

#[derive(clap::Args)]
pub struct EvalArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// The text to measure on
    #[arg(long, value_name = "FILE", required_unless_present = "profile")]
    pub text: Option<PathBuf>,

    /// Compare with --against on built-in texts instead, of several kinds and languages, and show
    /// where the two differ most
    #[arg(long, requires = "against", conflicts_with_all = ["text", "windows", "batch"])]
    pub profile: bool,

    /// Tokens per window [default: 2048, or as many as the model was made for]
    #[arg(long, value_name = "TOKENS", value_parser = range(2..))]
    pub context: Option<usize>,

    /// Tokens that go through the model at a time [default: a window]; with 1, what generating text
    /// computes is measured
    #[arg(long, value_name = "TOKENS", value_parser = range(1..))]
    pub batch: Option<usize>,

    /// Measure the first N windows only [default: all]
    #[arg(long, value_name = "N", value_parser = range(1..))]
    pub windows: Option<usize>,

    /// Also measure the divergence from this model, usually the unquantized source; the graph of an
    /// .onnx file is run by ONNX Runtime, from the library that ORT_DYLIB_PATH names or the
    /// system's
    #[arg(long, value_name = "SOURCE")]
    pub against: Option<PathBuf>,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub execution: Execution,
}

#[derive(clap::Args)]
pub struct LogitsArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// Token ids, such as 1,2,3
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
    pub tokens: Vec<u32>,

    #[command(flatten)]
    pub target: TargetArgs,

    #[command(flatten)]
    pub execution: Execution,
}

#[derive(clap::Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// Tokens of the prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = range(1..))]
    pub prompt: usize,

    /// Tokens to generate
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = range(1..))]
    pub generate: usize,

    /// Also measure prompts of these lengths, such as 128,1024,4096, each continued by `--generate`
    /// tokens; prints a table, with a row for each of `--batch`
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', value_parser = range(1..))]
    pub context: Vec<usize>,

    /// Also measure so many texts at a time, such as 1,4,8 [default: 1; prompts as `--context` or
    /// else `--prompt`]
    #[arg(long, value_name = "TEXTS", value_delimiter = ',', value_parser = range(1..))]
    pub batch: Vec<usize>,

    /// Runs, of which the median counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = range(1..))]
    pub runs: usize,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub execution: Execution,
}

#[derive(clap::Args)]
pub struct ExportArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// The layout
    #[arg(long, value_enum, value_name = "LAYOUT")]
    pub to: Layout,

    #[command(flatten)]
    pub target: TargetArgs,

    /// Also run what was written, in llama.cpp, ONNX Runtime or transformers, whichever is for it
    /// and installed; an error if that computes something else
    #[arg(long)]
    pub check: bool,

    /// Also write a model card for a hub, such as OUT/README.md: what the layout has lost, and the
    /// commands
    #[arg(long, value_name = "FILE")]
    pub card: Option<PathBuf>,

    /// Print only warnings and errors
    #[arg(long)]
    pub quiet: bool,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

impl ExportArgs {
    /// Where the model card goes, if one is asked for.
    pub fn card(&self) -> Option<TargetArgs> {
        let output = self.card.clone()?;
        Some(TargetArgs { output, force: self.target.force })
    }
}

#[derive(clap::Args)]
pub struct ReproduceArgs {
    /// A SliM file
    pub file: PathBuf,

    /// Run the command into a temporary file, and compare; exit code 1 if bytes differ
    #[arg(long)]
    pub run: bool,

    /// The source [default: what has its name beside the file or in the current folder]
    #[arg(long, value_name = "SOURCE")]
    pub source: Option<PathBuf>,

    /// The calibration text, if it is not the built-in one
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,

    /// Memory to use, with --run
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = parse_size)]
    pub max_memory: u64,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// A layout that other engines read.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// A llama.cpp file
    Gguf,
    /// A Hugging Face folder with linear layers as GPTQ packs them, in 4 bits where that loses
    /// nothing, otherwise in 8
    Gptq,
    /// A folder that ONNX Runtime and ONNX Runtime GenAI run
    Onnx,
    /// A Hugging Face folder in fp16
    Safetensors,
}

#[derive(clap::Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// Name or address to listen at
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,

    /// Port to listen at; 0 for a free one, which is told
    #[arg(long, default_value_t = 8080)]
    pub port: u16,

    /// Key that clients must send; SLIMLLM_API_KEY keeps it from other users of the machine
    #[arg(long, value_name = "KEY", value_parser = NonEmptyStringValueParser::new())]
    pub api_key: Option<String>,

    /// Texts to write at a time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = range(1..=1024))]
    pub parallel: usize,

    /// Tokens of each text, prompt included [default: as the model was made for, 4096 at most]
    #[arg(short, long, alias = "ctx-size", value_name = "TOKENS", value_parser = range(2..))]
    pub context: Option<usize>,

    /// Texts that may wait
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = range(0..=1 << 16))]
    pub queue: usize,

    #[command(flatten)]
    pub execution: Execution,
}

/// Takes whole numbers of a range.
fn range(numbers: impl RangeBounds<u64>) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(numbers)
}

/// Takes one of some whole numbers.
fn one_of<const N: usize>(numbers: [&'static str; N]) -> impl TypedValueParser<Value = usize> {
    PossibleValuesParser::new(numbers).try_map(|number| number.parse::<usize>())
}

fn parse_method(name: &str) -> Result<Method, String> {
    match name {
        "slim" => Ok(Method::Slim),
        "gptq" => Ok(Method::Gptq),
        "rtn" => Ok(Method::RoundToNearest),
        "slim+" => Ok(Method::SlimPlus),
        _ => Err("expected `slim`, `slim+`, `gptq` or `rtn`".to_owned()),
    }
}

/// Reads a divergence in nats per token.
fn parse_divergence(text: &str) -> Result<f64, String> {
    let divergence: Option<f64> = text.parse().ok();
    let divergence = divergence.filter(|nats| nats.is_finite() && *nats > 0.0);
    divergence.ok_or_else(|| "expected nats per token, a number above 0".to_owned())
}

/// Reads a size such as `512MiB`, `1.2GiB`, `4GB`; without a unit, bytes.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let bytes = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return Err(format!("unknown unit `{unit}`; use MiB, GiB, MB or GB")),
    };
    let number: f64 = number.parse().map_err(|_| "expected a number and a unit".to_owned())?;
    Ok((number * f64::from(bytes)) as u64)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn token_limits_are_read() {
        for (text, limit) in [("0", Some(0)), ("256", Some(256)), ("-1", None)] {
            assert_eq!(text.parse(), Ok(TokenLimit(limit)), "{text}");
        }
        for text in ["-2", "gl", "", "1.5"] {
            assert!(text.parse::<TokenLimit>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_read_with_their_units() {
        for (text, bytes) in [
            ("512MiB", 512 << 20),
            ("1.2GiB", 1_288_490_188),
            ("4GB", 4_000_000_000),
            ("4 gib", 4 << 30),
            ("100", 100),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "1.2.3GiB", "4 GiBs", "-1GiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
