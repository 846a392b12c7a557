//! What is counted, in Prometheus' text format.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Upper ends of the classes of the time to the first token, in seconds.
const SECONDS: [f64; 10] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Counters of a server since it began.
#[derive(Debug, Default)]
pub struct Metrics {
    /// By path and status.
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    /// By reason.
    dropped: Mutex<BTreeMap<&'static str, u64>>,
    prompt_tokens: AtomicU64,
    reused_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    rounds: AtomicU64,
    running: AtomicU64,
    first_token: Mutex<Histogram>,
}

#[derive(Debug, Default)]
struct Histogram {
    /// Of each class of [`SECONDS`], and of what lies beyond.
    counts: [u64; SECONDS.len() + 1],
    sum: f64,
}

impl Metrics {
    /// A request was answered.
    pub fn count_request(&self, path: &'static str, status: u16) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry((path, status)).or_default() += 1;
    }

    /// A text was dropped.
    pub fn count_dropped(&self, reason: &'static str) {
        let mut dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
        *dropped.entry(reason).or_default() += 1;
    }

    /// A text got a slot.
    pub fn count_prompt(&self, tokens: usize, reused: usize) {
        self.prompt_tokens.fetch_add(tokens as u64, Relaxed);
        self.reused_tokens.fetch_add(reused as u64, Relaxed);
    }

    /// A token was drawn; the first of a text after so long.
    pub fn count_token(&self, first: Option<Duration>) {
        self.generated_tokens.fetch_add(1, Relaxed);
        if let Some(waited) = first {
            let seconds = waited.as_secs_f64();
            let mut histogram = self.first_token.lock().unwrap_or_else(PoisonError::into_inner);
            histogram.counts[SECONDS.partition_point(|&end| end < seconds)] += 1;
            histogram.sum += seconds;
        }
    }

    /// A step of the model was taken.
    pub fn count_round(&self) {
        self.rounds.fetch_add(1, Relaxed);
    }

    /// So many texts have slots.
    pub fn set_running(&self, texts: usize) {
        self.running.store(texts as u64, Relaxed);
    }

    /// All of it, and how many texts wait.
    pub fn text(&self, waiting: usize) -> String {
        let mut out = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: Vec<(String, String)>| {
            let _ = writeln!(out, "# HELP slimllm_{name} {help}\n# TYPE slimllm_{name} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(out, "slimllm_{name}{labels} {value}");
            }
        };
        let one = |value: u64| vec![(String::new(), value.to_string())];
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let requests = requests.iter().map(|((path, status), count)| {
            (format!("{{path=\"{path}\",status=\"{status}\"}}"), count.to_string())
        });
        family("requests_total", "counter", "Requests answered.", requests.collect());
        for (name, help, value) in [
            ("prompt_tokens_total", "Tokens of prompts.", &self.prompt_tokens),
            ("reused_tokens_total", "Tokens of prompts not computed again.", &self.reused_tokens),
            ("generated_tokens_total", "Tokens written.", &self.generated_tokens),
            ("rounds_total", "Rounds of the scheduler.", &self.rounds),
        ] {
            family(name, "counter", help, one(value.load(Relaxed)));
        }
        let dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
        let dropped = dropped
            .iter()
            .map(|(reason, count)| (format!("{{reason=\"{reason}\"}}"), count.to_string()));
        let help = "Texts that did not end by themselves.";
        family("texts_dropped_total", "counter", help, dropped.collect());
        family("texts_running", "gauge", "Texts in slots.", one(self.running.load(Relaxed)));
        family("texts_waiting", "gauge", "Texts that wait.", one(waiting as u64));
        let first_token = self.first_token.lock().unwrap_or_else(PoisonError::into_inner);
        let help = "Seconds from a text's arrival to its first token.";
        family("first_token_seconds", "histogram", help, Vec::new());
        let mut total = 0;
        let ends = SECONDS.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
        for (end, count) in ends.zip(first_token.counts) {
            total += count;
            let _ = writeln!(out, "slimllm_first_token_seconds_bucket{{le=\"{end}\"}} {total}");
        }
        let _ = writeln!(out, "slimllm_first_token_seconds_sum {}", first_token.sum);
        let _ = writeln!(out, "slimllm_first_token_seconds_count {total}");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_written_as_prometheus_reads_them() {
        let metrics = Metrics::default();
        metrics.count_request("/health", 200);
        metrics.count_request("/health", 200);
        metrics.count_prompt(12, 8);
        metrics.count_token(Some(Duration::from_millis(300)));
        metrics.count_token(None);
        metrics.count_dropped("gone");
        let text = metrics.text(3);
        for line in [
            "slimllm_requests_total{path=\"/health\",status=\"200\"} 2",
            "slimllm_prompt_tokens_total 12",
            "slimllm_reused_tokens_total 8",
            "slimllm_generated_tokens_total 2",
            "slimllm_texts_dropped_total{reason=\"gone\"} 1",
            "slimllm_texts_waiting 3",
            "slimllm_first_token_seconds_bucket{le=\"0.25\"} 0",
            "slimllm_first_token_seconds_bucket{le=\"0.5\"} 1",
            "slimllm_first_token_seconds_bucket{le=\"+Inf\"} 1",
            "slimllm_first_token_seconds_sum 0.3",
        ] {
            assert!(text.lines().any(|found| found == line), "`{line}` in\n{text}");
        }
    }
}
