//! `convert --max-kl`: the smallest file that keeps a promise.

use std::fs;

use serde_json::Value;

use crate::command::{Answer, Dir, arg, fail, short_text, succeed, tiny_model};

/// Converts a tiny model in a moment; gives the report.
fn convert(dir: &Dir, output: &str, more: &[&str]) -> Value {
    let (model, output) = (arg(&tiny_model("llama")), dir.arg(output));
    let args = ["convert", &model, "-o", &output, "--samples", "8", "--context", "64", "--json"];
    succeed(&[&args[..], short_text(&[]), more].concat()).json()
}

/// The mean divergence of a report over all tokens of all texts.
fn divergence(report: &Value) -> f64 {
    let texts = report["quality"].as_array().unwrap();
    let number = |text: &Value, key: &str| text[key].as_f64().unwrap();
    let tokens: f64 = texts.iter().map(|text| number(text, "tokens")).sum();
    texts.iter().map(|text| number(text, "tokens") * number(text, "kl_mean")).sum::<f64>() / tokens
}

#[test]
fn promise_is_kept_by_about_the_smallest_file() {
    let dir = Dir::new();
    let three_bits = convert(&dir, "3.gguf", &[]);
    let most = divergence(&three_bits);
    let report = convert(&dir, "kept.gguf", &["--max-kl", &most.to_string()]);
    let trials = report["trials"].as_array().unwrap();
    println!("{most}: {trials:?}");
    let kept = trials.last().unwrap();
    // What was measured is what the check of the file itself has found.
    assert!((kept["kl_measured"].as_f64().unwrap() - divergence(&report)).abs() < 1e-12);
    assert!(divergence(&report) <= most && kept["kl_predicted"].as_f64().unwrap() > 0.0);
    // The bits of embedding and blocks are shared out together, which three bits are not.
    let bytes = |report: &Value| report["file_bytes"].as_f64().unwrap();
    assert!(bytes(&report) <= bytes(kept));
    assert!(bytes(&report) <= 1.02 * bytes(&three_bits), "{report}");
    let is_smaller_and_breaks =
        |trial: &Value| bytes(trial) < bytes(kept) && trial["kl_measured"].as_f64().unwrap() > most;
    let is_close = divergence(&report) >= 0.9 * most;
    assert!(is_close || trials.iter().any(is_smaller_and_breaks), "{trials:?}");
    // A file of a given size, whoever found the size.
    let size = kept["file_bytes"].to_string();
    convert(&dir, "size.gguf", &["--target-size", &size]);
    assert!(fs::read(dir.path("kept.gguf")).unwrap() == fs::read(dir.path("size.gguf")).unwrap());
    let mut names = dir.names();
    names.sort();
    assert_eq!(names, ["3.gguf", "kept.gguf", "size.gguf"]);
}

#[test]
fn promise_that_no_width_keeps_is_refused_and_nothing_written() {
    let dir = Dir::new();
    let model = arg(&tiny_model("llama"));
    let args = ["convert", &model, "-o", &dir.arg("a.gguf"), "--samples", "4", "--context", "32"];
    let refused = |most: &str, more: &[&str], fragments: &[&str]| {
        fail(
            &[&args[..], short_text(&[]), &["--max-kl", most, "--quiet"], more].concat(),
            fragments,
        );
        assert_eq!(dir.names(), [""; 0]);
    };
    refused("1e-12", &[], &["found at most 0.000000000001", "8 bits everywhere lose"]);
    refused("0", &[], &["--max-kl", "above 0"]);
    refused("1", &["--bits", "4"], &["cannot be used with"]);
    refused("1", &["--target-size", "1MB"], &["cannot be used with"]);
    refused("1", &["--method", "gptq"], &["`--max-kl` belongs to `--method slim`"]);
    refused("1", &["--max-memory", "10kB"], &["--max-memory"]);
}

#[test]
fn any_promise_gives_the_smallest_file() {
    let dir = Dir::new();
    let report = convert(&dir, "a.gguf", &["--max-kl", "1000"]);
    assert_eq!(report["trials"].as_array().unwrap().len(), 1, "{report}");
    let is_lowest = |layer: &Value| {
        let bits = layer["bits"].as_array().unwrap();
        bits.iter().all(|bits| *bits == 1)
    };
    assert!(report["layers"].as_array().unwrap().iter().all(is_lowest), "{report}");
}

/// Every conversion of the search goes on where it was.
#[test]
fn interrupted_search_resumes_to_the_same_bytes() {
    let dir = Dir::new();
    convert(&dir, "expected.gguf", &["--max-kl", "0.05"]);
    let model = arg(&tiny_model("llama"));
    let started = |resume: &[&str]| {
        let mut command = dir.slimllm("convert");
        command.args([&model, "-o", "a.gguf", "--max-kl", "0.05", "--quiet"]);
        command.args(["--samples", "8", "--context", "64"]).args(short_text(&[])).args(resume);
        command
    };
    for records in [6, 30] {
        let mut child = started(&["--resume"]).spawn().unwrap();
        let found = || fs::read_dir(dir.path("a.gguf.work")).map_or(0, Iterator::count);
        while found() < records && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    Answer::of(&mut started(&["--resume", "--force"])).succeeds();
    assert!(fs::read(dir.path("a.gguf")).unwrap() == fs::read(dir.path("expected.gguf")).unwrap());
    assert!(!dir.path("a.gguf.work").exists());
}
