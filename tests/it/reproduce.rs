//! The command that made a file, and whether it makes the same bytes again.

use std::{fs, path::Path};

use crate::{
    command::{Dir, arg, fail, slimllm, succeed, tiny_model},
    sources::copy_folder,
};

const QUICK: [&str; 4] = ["--samples", "4", "--context", "32"];

/// Converts a tiny model; gives the file.
fn converted(dir: &Dir, more: &[&str]) -> String {
    let file = dir.arg("a.slim.gguf");
    let model = arg(&tiny_model("llama"));
    let _ = fs::remove_file(&file);
    succeed(&[&["convert", &model, "-o", &file, "--quiet"][..], more].concat());
    file
}

#[test]
fn command_of_each_method_makes_the_same_bytes_again() {
    let dir = Dir::new();
    let text = &dir.write("text", "What it is calibrated on, again and again. ".repeat(100));
    let model = &arg(&tiny_model("llama"));
    // The built-in text once: it takes longer to tokenize than the rest.
    let (built_in, of_its_own) = (&[][..], &["--calibration", text][..]);
    for (calibration, more, expected) in [
        (built_in, &["--target-bpw", "3.3"][..], "--method slim --target-bpw 3.3 --group-size 64"),
        (of_its_own, &["--target-size", "95kB", "--seed", "7"], "--seed 7"),
        (of_its_own, &["--method", "gptq", "--embed-bits", "8"], "--embed-bits 8"),
        (of_its_own, &["--method", "slim+", "--steps", "2"], "--steps 2"),
        (of_its_own, &["--scales", "trellis"], "--scales trellis --sub-group 32 --embed-bits"),
        (of_its_own, &["--reference", "--group-size", "32"], "--device cpu --reference"),
    ] {
        let file = &converted(&dir, &[&QUICK, calibration, more].concat());
        let printed = succeed(&["reproduce", file]).stdout;
        assert!(printed.starts_with("slimllm convert SOURCE -o a.slim.gguf"), "{printed}");
        assert!(printed.contains(expected), "{printed}");
        let mut again = vec!["reproduce", file, "--run", "--source", model];
        if !calibration.is_empty() {
            assert!(printed.contains("--calibration TEXT"), "{printed}");
            fail(&again, &["a text of its own", "`--calibration FILE`"]);
            again.extend(calibration);
        }
        let answer = succeed(&again);
        assert!(answer.stdout.ends_with("\nthe same bytes\n"), "{}", answer.stdout);
    }
    let file = &converted(&dir, &["--method", "rtn"]);
    succeed(&["reproduce", file, "--run", "--source", model]);
    let mut names = dir.names();
    names.sort();
    assert_eq!(names, ["a.slim.gguf", "text"]);
}

#[test]
fn text_that_the_model_draws_is_drawn_again() {
    let dir = Dir::new();
    let model = &arg(&tiny_model("llama"));
    let drawn = |more: &[&str]| {
        let file = converted(&dir, &[&QUICK, &["--calibration", "self"][..], more].concat());
        let answer = succeed(&["reproduce", &file]);
        assert!(answer.stdout.contains("--calibration self"), "{}", answer.stdout);
        let found = answer.stderr.lines().find(|line| line.contains("drawn from the source"));
        (file, found.unwrap().to_owned())
    };
    let (_, first) = drawn(&[]);
    let (file, second) = drawn(&["--seed", "1", "--threads", "1"]);
    assert_ne!(first, second);
    let answer = succeed(&["reproduce", &file, "--run", "--source", model]);
    assert!(answer.stdout.ends_with("\nthe same bytes\n"), "{}", answer.stdout);
}

#[test]
fn source_is_found_by_its_names_and_told_from_another() {
    let dir = Dir::new();
    copy_folder(&tiny_model("llama"), dir.root());
    let (file, model) = (&dir.arg("a.slim.gguf"), &arg(dir.root()));
    succeed(&["convert", model, "-o", file, "--method", "rtn", "--quiet"]);
    succeed(&["reproduce", file, "--run"]);
    // Another one under the same name.
    let config = fs::read_to_string(dir.path("config.json")).unwrap();
    dir.write("config.json", config + "\n");
    let answer = succeed(&["reproduce", file]);
    assert!(answer.stdout.contains("convert SOURCE -o"), "{}", answer.stdout);
    assert!(answer.stderr.contains("is named as the source is"), "{}", answer.stderr);
    fail(&["reproduce", file, "--run"], &["was not found", "`--source PATH`"]);
    fail(&["reproduce", file, "--source", model], &["is another source", "slim.source."]);
}

/// Replaces a text in a file by one of equal length.
fn replace(file: &Path, from: &str, to: &str) {
    let mut bytes = fs::read(file).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    fs::write(file, bytes).unwrap();
}

#[test]
fn other_bytes_are_named_and_end_with_1() {
    let dir = Dir::new();
    let file = converted(&dir, &["--method", "rtn"]);
    replace(Path::new(&file), "slimllm 0.1", "slimllm 9.9");
    let bytes = fs::read(&file).unwrap();
    let mut damaged = bytes.clone();
    // The last tensor is a norm or a scale.
    let last = damaged.iter().rposition(|&byte| byte != 0).unwrap();
    damaged[last] ^= 1;
    fs::write(&file, damaged).unwrap();
    let model = arg(&tiny_model("llama"));
    let answer = slimllm(&["reproduce", &file, "--run", "--source", &model]);
    assert_eq!(answer.code, 1, "{}", answer.stderr);
    assert!(
        answer.stderr.contains("`slim.quantization.tool` is `slimllm 9.9"),
        "{}",
        answer.stderr
    );
    for fragment in ["other bytes", "`slim.quantization.tool`: `slimllm 9.9", "1 of"] {
        assert!(answer.stdout.contains(fragment), "{fragment}: {}", answer.stdout);
    }
}

#[test]
fn files_without_provenance_are_refused() {
    let dir = Dir::new();
    let (out, llama) = (dir.arg("a.gguf"), arg(&tiny_model("llama")));
    succeed(&["export", &llama, "--to", "gguf", "-o", &out, "--quiet"]);
    fail(&["reproduce", &out], &["slim.source.files", "hint: only files that `slimllm convert`"]);
}
