//! What commands say of their results: warnings in both places, contexts, figures over everything.

use crate::command::{Dir, SHORT_TEXT, arg, fail, succeed, tiny_model};

fn llama() -> String {
    arg(&tiny_model("llama"))
}

#[test]
fn every_warning_that_is_printed_is_in_the_document() {
    let dir = Dir::new();
    let (llama, slim, out) = (&llama(), &dir.arg("a.slim.gguf"), &dir.arg("b.slim.gguf"));
    let quick = ["--samples", "2", "--context", "32", "--bits", "4", "--json"];
    let quick = [&quick[..], &["--calibration", SHORT_TEXT]].concat();
    succeed(&[&["convert", llama, "-o", slim][..], &quick].concat());
    for more in [&["--dry-run"][..], &[], &["--quiet"]] {
        let answer = succeed(&[&["convert", slim, "-o", out][..], &quick, more].concat());
        let printed: Vec<_> =
            answer.stderr.lines().filter_map(|line| line.strip_prefix("warning: ")).collect();
        assert_eq!(answer.json()["warnings"], serde_json::json!(printed));
        // Of all layers, not of the first one.
        let bits = succeed(&["inspect", slim, "--json"]).json()["bits_per_weight"].clone();
        let bits = format!("(SliM, {:.1} bits per weight)", bits.as_f64().unwrap());
        assert!(printed.len() == 1 && printed[0].contains(&bits), "{printed:?} for {bits}");
        let _ = std::fs::remove_file(out);
    }
}

#[test]
fn context_is_what_the_model_was_made_for() {
    let dir = Dir::new();
    let (llama, out) = (&llama(), &dir.arg("out.slim.gguf"));
    let text = &dir.write("text", "The quick brown fox jumps over the lazy dog. ".repeat(200));
    let refusal = "the model was made for a context of 512 tokens, not 513";
    fail(&["convert", llama, "-o", out, "--context", "513"], &[refusal]);
    fail(&["eval", llama, "--text", text, "--context", "513"], &[refusal]);
    fail(&["convert", llama, "-o", out, "--context", "513", "--dry-run"], &[refusal]);
    let note = "context of 512 tokens, for which the model was made, in place of 2048";
    let eval = succeed(&["eval", llama, "--text", text, "--windows", "1", "--json"]);
    assert_eq!(eval.json()["context"], 512);
    assert!(eval.stderr.contains(note), "{}", eval.stderr);
    let plan = succeed(&["convert", llama, "-o", out, "--dry-run"]);
    assert!(plan.stdout.contains("samples of 512 tokens"), "{}", plan.stdout);
    assert!(plan.stderr.contains(note), "{}", plan.stderr);
}

#[test]
fn export_without_losses_prints_none() {
    let dir = Dir::new();
    let (llama, out) = (&llama(), &dir.arg("out"));
    let shown = succeed(&["export", llama, "--to", "onnx", "-o", out]).stdout;
    assert!(!shown.contains("matrices") && !shown.contains("loss"), "{shown}");
    std::fs::remove_dir_all(out).unwrap();
    let answer = succeed(&["export", llama, "--to", "onnx", "-o", out, "--json"]);
    assert!(!answer.stdout.contains("-0.0"), "{}", answer.stdout);
    assert_eq!(answer.json()["mean_error"], serde_json::Value::Null);
}

#[test]
fn gpu_named_twice_is_refused() {
    let llama = &llama();
    for device in ["cuda:0,0", "cuda:0,1,0"] {
        fail(&["run", llama, "-p", "a", "--device", device], &["GPU 0 twice, expected each once"]);
    }
}
