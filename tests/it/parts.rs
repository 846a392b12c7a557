//! SliM files in several parts: what writes them, and every command that reads them back.

use std::{collections::BTreeSet, fs, path::PathBuf};

use serde_json::{Value, json};

use crate::command::{Answer, Dir, arg, fail, slimllm, succeed, tiny_model};

/// What a part may take: a tiny model needs a few.
const MOST: &str = "40kB";
const MOST_BYTES: u64 = 40_000;
const SPLIT: [&str; 2] = ["--split-max-size", MOST];

const WHOLE: &str = "whole.slim.gguf";

/// A folder with a tiny model in parts and the same in one file, and the paths of the parts.
struct Model {
    dir: Dir,
    parts: Vec<String>,
}

impl Model {
    fn new() -> Self {
        let dir = Dir::new();
        convert(&dir, WHOLE, &[]);
        let parts = files(&convert(&dir, "parts.slim.gguf", &SPLIT));
        assert!(parts.len() > 2, "{parts:?}");
        Self { dir, parts }
    }

    fn whole(&self) -> String {
        self.dir.arg(WHOLE)
    }
}

/// Converts a tiny model in a moment; gives the report.
fn convert(dir: &Dir, output: &str, more: &[&str]) -> Value {
    let (model, output) = (arg(&tiny_model("llama")), dir.arg(output));
    let method = if more.contains(&"--method") { &[][..] } else { &["--method", "rtn"] };
    let args = ["convert", &model, "-o", &output, "--json"];
    succeed(&[&args[..], method, more].concat()).json()
}

/// The files that a report names.
fn files(report: &Value) -> Vec<String> {
    let files = report["files"].as_array().unwrap().iter();
    files.map(|path| path.as_str().unwrap().to_owned()).collect()
}

fn sizes(parts: &[String]) -> Vec<u64> {
    parts.iter().map(|path| fs::metadata(path).unwrap().len()).collect()
}

/// The names of parts in a folder.
fn part_names(dir: &Dir) -> BTreeSet<String> {
    dir.names().into_iter().filter(|name| name.contains("-of-")).collect()
}

#[test]
fn conversion_writes_the_parts_that_its_plan_tells() {
    let Model { dir, parts } = Model::new();
    let expected: BTreeSet<_> = (1..=parts.len())
        .map(|n| format!("parts.slim-{n:05}-of-{:05}.gguf", parts.len()))
        .collect();
    assert_eq!(part_names(&dir), expected);
    assert!(sizes(&parts).iter().all(|&bytes| bytes <= MOST_BYTES), "{:?}", sizes(&parts));
    let options = [&SPLIT[..], &["--force"]].concat();
    let report = convert(&dir, "parts.slim.gguf", &options);
    let plan = convert(&dir, "parts.slim.gguf", &[&options[..], &["--dry-run"]].concat());
    assert_eq!(report["output"], json!(parts[0]));
    assert_eq!(report["file_bytes"], json!(sizes(&parts).iter().sum::<u64>()));
    assert_eq!((&plan["file_bytes"], &plan["parts"]), (&report["file_bytes"], &json!(parts.len())));
    // What takes no more stays one file.
    let report = convert(&dir, "small.slim.gguf", &["--split-max-size", "1GB"]);
    assert_eq!(files(&report), [dir.arg("small.slim.gguf")]);
    let model = arg(&tiny_model("llama"));
    let args = ["convert", &model, "-o", &dir.arg("c.gguf"), "--split-max-size", "1kB"];
    fail(&args, &["parts of at most 1000 bytes", "bytes of metadata"]);
}

#[test]
fn every_command_reads_parts_as_it_reads_the_whole_file() {
    let model = Model::new();
    let (dir, whole) = (&model.dir, model.whole());
    // Whichever part is given.
    for part in [&model.parts[0], &model.parts[2]] {
        let same = |args: &dyn Fn(&str) -> Vec<String>, told: &dyn Fn(Answer) -> Value| {
            let run = |model: &str| {
                let args = args(model);
                told(succeed(&args.iter().map(String::as_str).collect::<Vec<_>>()))
            };
            assert_eq!(run(part), run(&whole), "{:?}", args(part));
        };
        let words = |line: &'static str| {
            move |model: &str| line.split(' ').map(|word| word.replace("MODEL", model)).collect()
        };
        let text = |answer: Answer| Value::from(answer.stdout);
        let keys = |keys: &'static [&'static str]| {
            move |answer: Answer| keys.iter().map(|&key| answer.json()[key].clone()).collect()
        };
        same(&words("run MODEL -p a -n 8 --temperature 0 --device cpu"), &text);
        same(
            &words("inspect MODEL --verify --json"),
            &keys(&["faults", "tensors", "layers", "parameters", "bits_per_weight"]),
        );
        let line = "bench MODEL --prompt 4 --generate 2 --runs 1 --json --device cpu";
        same(&words(line), &keys(&["bytes_per_token"]));
        let tokens = "1,2,3,4,5,6,7";
        let out = dir.arg("out");
        let written = |answer: Answer| {
            drop(answer);
            let bytes = fs::read(dir.path("out")).unwrap();
            fs::remove_file(dir.path("out")).unwrap();
            Value::from(bytes)
        };
        let to_out = |line: &'static str| {
            let out = out.clone();
            move |model: &str| {
                let line = line.replace("TOKENS", tokens);
                let words = line.split(' ');
                words.map(|word| word.replace("MODEL", model).replace("OUT", &out)).collect()
            }
        };
        same(&to_out("logits MODEL --tokens TOKENS -o OUT --device cpu"), &written);
        same(&to_out("export MODEL --to gguf -o OUT --quiet"), &written);
        let profile = succeed(&["eval", part, "--profile", "--against", &whole, "--json"]).json();
        let domains = profile["domains"].as_array().unwrap();
        assert!(!domains.is_empty() && domains.iter().all(|domain| domain["kl_mean"] == 0.0));
        let difference = slimllm(&["diff", part, &whole, "--json"]).json();
        assert_eq!((&difference["weights"], &difference["layers"]), (&json!([]), &json!([])));
    }
}

#[test]
fn parts_are_a_source_a_draft_and_can_be_reproduced() {
    let model = Model::new();
    let (dir, part) = (&model.dir, &model.parts[1]);
    let llama = &arg(&tiny_model("llama"));
    let out = &dir.arg("again.slim.gguf");
    succeed(&["convert", part, "-o", out, "--method", "rtn", "--quiet"]);
    let metadata = succeed(&["inspect", out, "--json", "--metadata"]).json()["metadata"].clone();
    let names: Vec<_> = part_names(dir).into_iter().collect();
    assert_eq!(metadata["slim.source.files"], json!(names));
    // The source's parts are no longer what an output may replace.
    fail(
        &["convert", part, "-o", &dir.arg("parts.slim.gguf"), "--split-max-size", MOST, "--force"],
        &["parts.slim-00001-of-", "is a file of the source"],
    );
    let trained = dir.arg("trained.slim.gguf");
    let train = ["convert", llama, "-o", &trained, "--method", "slim+", "--draft", part, "--json"];
    let quick = ["--samples", "2", "--context", "32", "--steps", "2"];
    let whole = succeed(&[&train[..], &quick].concat()).json();
    assert_eq!(files(&whole), [trained.as_str()]);
    let split = [&train[..], &quick, &["--force", "--split-max-size", MOST]].concat();
    let split = files(&succeed(&split).json());
    assert!(split.len() > 2 && !dir.path("trained.slim.gguf").exists());
    let verified = succeed(&["inspect", &split[0], "--verify", "--json"]).json();
    assert_eq!(verified["faults"], json!([]));
    let printed = succeed(&["reproduce", part]).stdout;
    let expected = "-o parts.slim.gguf --method rtn --bits 3 --split-max-size 40000 ";
    assert!(printed.contains(expected), "{printed}");
    let again = succeed(&["reproduce", part, "--run", "--source", llama]).stdout;
    assert!(again.ends_with("\nthe same bytes\n"), "{again}");
}

#[test]
fn target_size_counts_the_headers_of_all_parts() {
    let dir = Dir::new();
    let model = arg(&tiny_model("llama"));
    let quick = ["--samples", "2", "--context", "32", "--json"];
    for method in ["slim", "slim+"] {
        let out = dir.arg(&format!("{method}.gguf"));
        let args = ["convert", &model, "-o", &out, "--method", method, "--target-size", "110kB"];
        let args = [&args[..], &quick, &["--split-max-size", "30kB"]].concat();
        let steps = if method == "slim+" { &["--steps", "2"][..] } else { &[] };
        let files = files(&succeed(&[&args[..], steps].concat()).json());
        let total = sizes(&files).iter().sum::<u64>();
        assert!(files.len() > 3 && total <= 110_000 && total > 105_000, "{method}: {total}");
        assert!(sizes(&files).iter().all(|&bytes| bytes <= 30_000), "{:?}", sizes(&files));
    }
}

#[test]
fn what_has_the_name_of_a_part_stays_unless_it_may_be_replaced() {
    let Model { dir, parts } = Model::new();
    let model = arg(&tiny_model("llama"));
    let stale = dir.write("parts.slim-00002-of-00009.gguf", "an earlier one");
    let output = dir.arg("parts.slim.gguf");
    let args = ["convert", &model, "-o", &output, "--method", "rtn", "--split-max-size", MOST];
    fail(&args, &["parts.slim-00001-of-", "exists already", "`--force`"]);
    let before = dir.names().len();
    succeed(&[&args[..], &["--force"]].concat());
    assert_eq!((dir.names().len(), PathBuf::from(&stale).exists()), (before - 1, false));
    assert_eq!(part_names(&dir).len(), parts.len());
    // Written whole, with leave to split it, it takes the place of the parts.
    convert(&dir, "parts.slim.gguf", &["--split-max-size", "1GB", "--force"]);
    assert_eq!((part_names(&dir).len(), dir.path("parts.slim.gguf").exists()), (0, true));
}

#[test]
fn missing_foreign_and_damaged_parts_are_named() {
    let refused = |change: &dyn Fn(&Dir, &[String]), fragments: &[&str]| {
        let Model { dir, parts } = Model::new();
        change(&dir, &parts);
        fail(&["run", &parts[0], "-p", "a"], fragments);
    };
    let second = "parts.slim-00002-of-";
    refused(&|_, parts| fs::remove_file(&parts[1]).unwrap(), &[second, "the model is in"]);
    let swapped = |_: &Dir, parts: &[String]| {
        fs::copy(&parts[2], &parts[1]).unwrap();
    };
    refused(&swapped, &[second, "key `split.no`: found 2, expected 1"]);
    // Of the same model and the same widths, by another method.
    let foreign = |dir: &Dir, parts: &[String]| {
        let options = ["--method", "gptq", "--samples", "2", "--context", "32"];
        let other = files(&convert(dir, "other.slim.gguf", &[&SPLIT[..], &options].concat()));
        fs::copy(&other[1], &parts[1]).unwrap();
    };
    refused(&foreign, &[second, "F27", "as the part before it says", "another conversion"]);
    let damaged = |_: &Dir, parts: &[String]| {
        let mut bytes = fs::read(&parts[1]).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&parts[1], bytes).unwrap();
    };
    refused(&damaged, &["F18", second]);
    let Model { parts, .. } = &Model::new();
    damaged(&Dir::new(), parts);
    let answer = slimllm(&["inspect", &parts[0], "--verify"]);
    assert!(answer.code == 1 && answer.stdout.contains(second), "{}", answer.stdout);
}
