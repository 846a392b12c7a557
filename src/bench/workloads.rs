//! Prompts of several lengths, each as one text and as several texts at a time.

use std::fs;

use anyhow::Result;
use serde_json::{Value, json};
use slim_runtime::Model;

use super::{Texts, device_memory_bytes, median, peak_memory_bytes};
use crate::{
    args::BenchArgs,
    output::{size, table},
};

/// Texts that are read and continued together.
#[derive(Clone, Copy)]
pub struct Workload {
    /// Tokens of each prompt.
    context: usize,
    /// Texts.
    batch: usize,
}

/// What a workload takes.
pub struct Measured {
    workload: Workload,
    /// Until every prompt is read.
    first_token_s: f64,
    /// Of each text, from then on.
    tokens_per_s_per_text: f64,
    /// As for the whole command, but of this workload alone where the system lets a process start
    /// over.
    peak_memory_bytes: Option<u64>,
    device_memory_bytes: Option<u64>,
}

impl Workload {
    /// Every context with every batch; nothing if neither was asked for.
    pub fn all(args: &BenchArgs) -> Vec<Self> {
        let given = |numbers: &[usize], usual| match numbers {
            [] => vec![usual],
            numbers => numbers.to_vec(),
        };
        if args.context.is_empty() && args.batch.is_empty() {
            return Vec::new();
        }
        let batches = given(&args.batch, 1);
        let with_batches = |context| batches.iter().map(move |&batch| Self { context, batch });
        given(&args.context, args.prompt).into_iter().flat_map(with_batches).collect()
    }

    /// Tokens of each text once `generate` have been generated.
    pub fn text_tokens(&self, generate: usize) -> usize {
        self.context + generate
    }

    /// Tokens of all texts.
    pub fn total_tokens(&self, generate: usize) -> usize {
        self.batch * self.text_tokens(generate)
    }

    /// Reads the prompts and continues them, as often as asked for.
    pub fn measure(self, model: &Model, args: &BenchArgs) -> Result<Measured> {
        forget_peak_memory();
        let mut texts = Texts::new(model, self.batch, self.text_tokens(args.generate))?;
        let (mut first_token, mut speeds) = (Vec::new(), Vec::new());
        for _ in 0..args.runs {
            texts.clear();
            first_token.push(texts.seconds_at_once(self.context)?);
            speeds.push(args.generate as f64 / texts.seconds_one_by_one(args.generate)?);
        }
        Ok(Measured {
            workload: self,
            first_token_s: median(first_token),
            tokens_per_s_per_text: median(speeds),
            peak_memory_bytes: peak_memory_bytes(),
            device_memory_bytes: device_memory_bytes(model)?,
        })
    }
}

impl Measured {
    /// Of all texts together.
    fn tokens_per_s(&self) -> f64 {
        self.workload.batch as f64 * self.tokens_per_s_per_text
    }

    pub fn to_json(&self) -> Value {
        json!({
            "context": self.workload.context,
            "batch": self.workload.batch,
            "first_token_s": self.first_token_s,
            "tokens_per_s_per_text": self.tokens_per_s_per_text,
            "tokens_per_s": self.tokens_per_s(),
            "peak_memory_bytes": self.peak_memory_bytes,
            "device_memory_bytes": self.device_memory_bytes,
        })
    }
}

/// A row for each workload.
pub fn describe(measured: &[Measured]) -> String {
    let memory = |bytes: Option<u64>| bytes.map_or("-".to_owned(), size);
    let rows = measured.iter().map(|measured| {
        [
            measured.workload.context.to_string(),
            measured.workload.batch.to_string(),
            format!("{:.3} s", measured.first_token_s),
            format!("{:.1}", measured.tokens_per_s_per_text),
            format!("{:.1}", measured.tokens_per_s()),
            memory(measured.peak_memory_bytes),
            memory(measured.device_memory_bytes),
        ]
    });
    let head = [
        "context",
        "batch",
        "first token",
        "tokens/s per text",
        "tokens/s in all",
        "peak memory",
        "GPU memory",
    ];
    table(0, head, rows)
}

/// Lets the peak of memory start over; where the system does not, it stays that of the process.
fn forget_peak_memory() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}
