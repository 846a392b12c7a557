//! What a conversion says of its result: verified, run, and compared with its source.

use std::fs;

use half::f16;
use serde_json::json;

use crate::{
    columns::narrow_model,
    command::{Dir, arg, fail, real_model, succeed, tiny_model},
    sources::{change_tensor, copy_folder},
};

const QUICK: [&str; 4] = ["--samples", "4", "--context", "64"];

#[test]
fn every_kind_of_text_is_compared_and_more_bits_are_closer() {
    let dir = Dir::new();
    let (llama, out) = (&arg(&tiny_model("llama")), &dir.arg("a.slim.gguf"));
    let quality = |bits| {
        let args = ["convert", llama, "-o", out, "--force", "--json", "--bits", bits];
        let document = succeed(&[&args[..], &QUICK].concat()).json();
        let quality = document["quality"].as_array().unwrap();
        let domains: Vec<_> = quality.iter().map(|quality| &quality["domain"]).collect();
        assert_eq!(domains, ["prose", "code", "chat"]);
        let kl = |index: usize| quality[index]["kl_mean"].as_f64().unwrap();
        [kl(0), kl(1), kl(2)]
    };
    let (coarse, fine) = (quality("2"), quality("6"));
    assert!(coarse.iter().zip(&fine).all(|(coarse, fine)| coarse > fine), "{coarse:?} {fine:?}");
    let report = succeed(&[&["convert", llama, "-o", out, "--force"][..], &QUICK].concat()).stdout;
    for fragment in ["verified", "against source   prose  KL 0.", "it writes        Once upon"] {
        assert!(report.contains(fragment), "{fragment}: {report}");
    }
}

/// A model whose largest layer takes less memory than the logits of 256 positions.
#[test]
fn comparison_that_has_no_memory_is_left_out_with_a_warning() {
    let dir = Dir::new();
    let (model, out) = (&arg(&narrow_model(&dir)), &dir.arg("a.slim.gguf"));
    let args = ["convert", model, "-o", out, "--method", "rtn", "--max-memory", "300KiB", "--json"];
    let answer = succeed(&args);
    assert_eq!(answer.json()["quality"], json!([]));
    assert!(
        answer.stderr.contains("the logits of both models take 320.0 KiB"),
        "{}",
        answer.stderr
    );
}

/// A norm that is 0 in a column makes inputs that are 0.
#[test]
fn what_is_degenerate_is_counted_and_converted() {
    let dir = Dir::new();
    copy_folder(&tiny_model("llama"), dir.root());
    let file = dir.path("model.safetensors");
    // The inputs of the first stage of each block, and of its feed-forward network.
    for name in ["input_layernorm", "post_attention_layernorm"] {
        for block in 0..2 {
            let name = format!("model.layers.{block}.{name}.weight");
            change_tensor(&file, &name, |values| values[3] = f16::ZERO);
        }
    }
    // The first 32 columns of every row.
    let cols = 64;
    change_tensor(&file, "model.layers.0.mlp.gate_proj.weight", |values| {
        values.chunks_exact_mut(cols).for_each(|row| row[..32].fill(f16::ZERO));
    });
    let (model, out) = (&arg(dir.root()), &dir.arg("a.slim.gguf"));
    for (method, dead, zeros) in [("gptq", 10, 1), ("rtn", 0, 1)] {
        let args = ["convert", model, "-o", out, "--force", "--json", "--group-size", "32"];
        let more = ["--samples", "1", "--context", "48", "--method", method];
        let document = succeed(&[&args[..], &more].concat()).json();
        let degenerate = &document["degenerate"];
        assert_eq!(degenerate["dead_inputs"], dead, "{method}: {degenerate}");
        assert_eq!(degenerate["zero_groups"], zeros, "{method}: {degenerate}");
        // One sample of 48 tokens, and 64 columns or more everywhere.
        let rank_deficient = if method == "rtn" { 0 } else { 14 };
        assert_eq!(degenerate["rank_deficient"], rank_deficient, "{degenerate}");
        fs::remove_file(out).unwrap();
    }
}

#[test]
fn result_that_is_likely_useless_earns_a_warning_with_a_better_setting() {
    let Some(model) = real_model() else { return };
    let (dir, model) = (Dir::new(), arg(&model));
    let out = &dir.arg("a.slim.gguf");
    let args = ["convert", &model, "-o", out, "--method", "rtn", "--bits", "2", "--json"];
    let answer = succeed(&args);
    let quality = &answer.json()["quality"];
    assert!(quality.as_array().unwrap().iter().all(|q| q["is_useless"] == true), "{quality}");
    for fragment in ["the result is likely useless for", "try `--method slim`"] {
        assert!(answer.stderr.contains(fragment), "{fragment}: {}", answer.stderr);
    }
}

#[test]
fn card_of_an_export_says_what_was_lost_and_the_commands() {
    let dir = Dir::new();
    let (llama, slim) = (&arg(&tiny_model("llama")), &dir.arg("a.slim.gguf"));
    let quick = ["--samples", "2", "--context", "32", "--quiet"];
    succeed(&[&["convert", llama, "-o", slim][..], &quick].concat());
    let made = succeed(&["reproduce", slim]).stdout;
    for (to, out, card, library) in [
        ("gguf", "a.gguf", "README.md", "gguf"),
        ("safetensors", "folder", "folder/README.md", "transformers"),
    ] {
        let (out, card) = (&dir.arg(out), &dir.arg(card));
        let export = ["export", slim, "--to", to, "-o", out, "--card", card, "--json"];
        let report = succeed(&export).json();
        let text = std::fs::read_to_string(card).unwrap();
        assert!(text.starts_with(&format!("---\nlibrary_name: {library}\n")), "{text}");
        let worst = format!("at most {:.6}", report["worst_error"].as_f64().unwrap());
        for expected in [made.trim(), &format!("slimllm export a.slim.gguf --to {to}"), &worst] {
            assert!(text.contains(expected), "no `{expected}` in\n{text}");
        }
    }
    // Nothing is exported if the card cannot be written.
    let (other, card) = (&dir.arg("b.gguf"), &dir.arg("README.md"));
    let args = ["export", slim, "--to", "gguf", "-o", other, "--card", card];
    fail(&args, &["README.md` exists already", "`--force`"]);
    assert!(!dir.path("b.gguf").exists());
}

#[test]
fn card_says_what_was_measured_and_the_command() {
    let dir = Dir::new();
    let (llama, out, card) =
        (&arg(&tiny_model("llama")), &dir.arg("a.slim.gguf"), &dir.arg("README.md"));
    let convert = ["convert", llama, "-o", out, "--card", card, "--json"];
    let args = [&convert[..], &["--samples", "2", "--context", "32"]].concat();
    let report = succeed(&args).json();
    let text = std::fs::read_to_string(card).unwrap();
    assert!(text.starts_with("---\nlibrary_name: slimllm\n"), "{text}");
    for domain in report["quality"].as_array().unwrap() {
        let (name, kl) = (domain["domain"].as_str().unwrap(), domain["kl_mean"].as_f64().unwrap());
        let row = format!("| {name} | {} | {kl:.4} |", domain["tokens"]);
        assert!(text.contains(&row), "no `{row}` in\n{text}");
    }
    let command = succeed(&["reproduce", out]).stdout;
    let made_from = command.lines().next().unwrap().split_once(" -o ").unwrap().1;
    assert!(text.contains(made_from), "no `{made_from}` in\n{text}");
    // Nothing is converted if the card cannot be written.
    let other = &dir.arg("b.slim.gguf");
    let args = ["convert", llama, "-o", other, "--card", card];
    fail(&args, &["README.md` exists already", "`--force`"]);
    assert!(!dir.path("b.slim.gguf").exists());
}
