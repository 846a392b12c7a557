//! Help, errors, exit codes, and what each subcommand prints.

use std::process::Stdio;

use serde_json::Value;

use crate::command::{
    Dir, arg, command, fail, files_in, onnx_model, short_text, slimllm, succeed, tiny_model,
};

/// A tiny model of the repository, as an argument.
fn tiny(name: &str) -> String {
    arg(&tiny_model(name))
}

/// Converts the tiny Llama model in no time.
fn convert_tiny(target: &str, more: &[&str]) {
    let source = tiny("llama");
    let fixed = ["convert", &source, "-o", target, "--samples", "2", "--context", "32"];
    succeed(&[&fixed, short_text(more), more].concat());
}

/// A text of some hundred tokens.
fn text() -> String {
    "The quick brown fox jumps over the lazy dog. ".repeat(20)
}

#[test]
fn help_names_every_flag() {
    let compute = "--threads --device";
    for (subcommand, flags) in [
        (
            "convert",
            "--output --force --bits --target-bpw --target-size --group-size --scales --sub-group --scale-bits --method --reference --embed-bits \
             --calibration --samples --context --seed --max-memory --dry-run --quiet --json",
        ),
        (
            "run",
            "--prompt --chat -n --temperature --top-k --top-p --min-p --repeat-penalty --seed --context \
             --no-hash-check",
        ),
        ("inspect", "--tensors --bits --metadata --verify --json"),
        ("eval", "--text --context --windows --against --json --no-hash-check"),
        ("logits", "--tokens --output --force --no-hash-check"),
        ("bench", "--prompt --generate --context --batch --runs --kv-cache --json --no-hash-check"),
        ("reproduce", "--run --source --calibration --max-memory --json"),
        ("export", "--to --output --force --quiet --json --no-hash-check"),
        ("serve", "--host --port --api-key --parallel --context --queue --kv-cache"),
    ] {
        let help = succeed(&[subcommand, "--help"]).stdout;
        let computes = !["inspect", "export", "reproduce"].contains(&subcommand);
        let compute = if computes { compute } else { "" };
        for flag in flags.split_whitespace().chain(compute.split_whitespace()) {
            assert!(help.contains(flag), "`{flag}` in\n{help}");
        }
        assert!(succeed(&["--help"]).stdout.contains(subcommand));
    }
}

#[test]
fn bad_arguments_are_refused_with_a_sentence() {
    let llama = &tiny("llama");
    let dir = Dir::new();
    let out = &dir.arg("out.gguf");
    let convert = ["convert", llama, "-o", out];
    for (more, fragment) in [
        (["--bits", "9"], "9 is not in 1..=8"),
        (["--target-bpw", "65"], "target bits per weight: found 65, expected 1.2 to 64"),
        (
            ["--target-bpw", "1.2"],
            "target bits per weight: found 1.2, expected at least 1.681 with these",
        ),
        (["--target-size", "0"], "target size: found 0 bytes, expected 1 to 2^60 bytes"),
        (["--target-size", "40kB"], "target size: found 40.0 kB, expected at least "),
        (["--group-size", "100"], "group size: found 100, expected a multiple of 16"),
        (["--sub-group", "8"], "[possible values: 16, 32, 64]"),
        (["--steps", "5"], "`--steps` belongs to `--method slim+`"),
        (["--method", "best"], "expected `slim`, `slim+`, `gptq` or `rtn`"),
        (["--max-memory", "4potatoes"], "unknown unit `potatoes`"),
        (["--max-memory", "4KiB"], "the largest layer takes"),
        (["--device", "gpu"], "expected `auto`, `cpu`, `cuda`"),
        (["--device", "cuda:0,1"], "`convert` computes on one"),
        (["--threads", "0"], "0 is not in 1.."),
        (["--context", "100000000"], "is not in"),
        (["--calibration", "/no/such/text"], "`/no/such/text`: cannot read the text: No such file"),
    ] {
        fail(&[&convert[..], &more].concat(), &[fragment]);
    }
    fail(&[&convert[..], &["--reference", "--method", "gptq"]].concat(), &["cannot be used with"]);
    for other in [["--bits", "3"], ["--target-bpw", "3"]] {
        let both = [&convert[..], &["--target-size", "90kB"], &other].concat();
        fail(&both, &["cannot be used with"]);
    }
    let gptq = [&convert[..], &["--target-size", "90kB", "--method", "gptq"]].concat();
    fail(&gptq, &["method with a target: found `gptq`, expected `slim` or `slim+`"]);
    let paper = ["--scales", "paper", "--scale-bits", "6"];
    fail(&[&convert[..], &paper].concat(), &["belong to `--scales two-level`"]);
    let text = &dir.write("text", "words");
    let rounded = ["--method", "rtn", "--calibration", text];
    fail(&[&convert[..], &rounded].concat(), &["uses no calibration text"]);
    fail(&[&convert[..], &["--calibration", text]].concat(), &["context of a calibration sample"]);
    assert_eq!(dir.names(), ["text"]);

    fail(&["run", llama], &["--prompt"]);
    fail(&["run", llama, "-p", "a", "--top-p", "2"], &["top-p: found 2, expected 0 to 1"]);
    fail(&["run", llama, "-p", "a", "--context", "1000000"], &["a context of 512 tokens"]);
    fail(&["run", llama, "-p", &self::text(), "--context", "8"], &["holds 8", "raise `--context`"]);
    let out = &dir.arg("out.safetensors");
    fail(&["logits", llama, "--tokens", "1,x", "-o", out], &["invalid value 'x'"]);
    fail(&["logits", llama, "--tokens", "320", "-o", out], &["found 320, expected less than 320"]);
    fail(
        &["eval", llama, "--text", text],
        &["which is less than 1 window of 512 tokens", "hint: "],
    );
    fail(&["bench", llama, "--prompt", "513"], &["a context of 512 tokens, not 513"]);
    let long = ["bench", llama, "--generate", "3", "--context", "8,510"];
    fail(&long, &["a context of 512 tokens, not 513"]);
    fail(&["bench", llama, "--batch", "4,0"], &["invalid value '0'"]);
    fail(&["run", llama, "-p", "a", "--device", "cpu", "--gpu-layers", "1"], &["needs a GPU"]);
    fail(&[], &["Usage: slimllm <COMMAND>"]);
}

#[test]
fn unusable_files_are_refused_with_a_sentence() {
    let dir = Dir::new();
    let llama = &tiny("llama");
    let absent = &dir.arg("absent.gguf");
    let garbage = &dir.write("garbage.gguf", "PK\x03\x04 and more");
    let cut = &dir.write("cut.gguf", b"GGUF\x03\0\0\0\x01\0\0\0");
    for (file, fragments) in [
        (absent, ["absent.gguf`: cannot open the file: No such file", "error: "]),
        (
            garbage,
            ["garbage.gguf` is a zip archive, not a model", "hint: PyTorch checkpoints are such"],
        ),
        (
            cut,
            [
                "cut.gguf`: the number of tensors: found 4 bytes after byte 8",
                "hint: the file ends too early, as after a download or a copy that broke off",
            ],
        ),
    ] {
        fail(&["run", file, "-p", "a"], &fragments);
        fail(&["inspect", file], &fragments);
        fail(&["eval", llama, "--text", llama, "--against", file], &["cannot read the text"]);
        fail(&["convert", file, "-o", &dir.arg("out")], &fragments);
    }
    let hub_id = ["nor a whole model in the hub's cache", "hint: unset `HF_HUB_OFFLINE`"];
    fail(&["convert", "org/name@main", "-o", &dir.arg("out")], &hub_id);
    assert!(!dir.names().contains(&"out".to_owned()));
}

#[test]
fn targets_are_checked_before_the_work() {
    let dir = Dir::new();
    let model = &dir.arg("tiny.slim.gguf");
    convert_tiny(model, &[]);
    let before = std::fs::read(model).unwrap();
    for (out, fragments) in [
        (&dir.arg("no/such/out"), ["there is no folder", "hint: create it with `mkdir -p"]),
        (&dir.arg(""), ["is a folder", "error: "]),
        (model, ["is a file of the source", "overwritten"]),
    ] {
        fail(&["convert", model, "-o", out], &fragments);
        fail(&["logits", model, "--tokens", "1", "-o", out], &fragments);
    }
    assert_eq!(std::fs::read(model).unwrap(), before);
    assert_eq!(dir.names(), ["tiny.slim.gguf"]);
}

#[test]
fn reader_that_has_gone_is_no_error() {
    let mut child = command(&["inspect", &tiny("llama"), "--metadata"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn inspect_directory_describes_the_model() {
    let llama = &tiny("llama");
    let json = succeed(&["inspect", llama, "--json", "--metadata"]).json();
    assert_eq!(json["format"], "safetensors");
    assert_eq!(json["architecture"], "llama");
    assert_eq!(json["parameters"], 127_296);
    assert_eq!(json["bits_per_weight"], 16.0);
    assert!(json["file_bytes"].as_u64().unwrap() > 250_000);
    assert_eq!(json["metadata"]["llama.block_count"], 2);
    assert_eq!(json["tensors"].as_array().unwrap().len(), 21);
    let embedding = serde_json::json!(
        { "name": "token_embd.weight", "type": "F16", "shape": [320, 64], "bytes": 40_960 }
    );
    assert_eq!(json["tensors"][0], embedding);
    assert_eq!(json.get("layers"), None);

    let summary = succeed(&["inspect", llama, "--tensors", "--verify"]).stdout;
    for fragment in ["architecture     llama", "320 x 64", "127,296", "no faults"] {
        assert!(summary.contains(fragment), "`{fragment}` in\n{summary}");
    }
}

#[test]
fn inspect_onnx_model_describes_it_like_its_directory() {
    let directory = succeed(&["inspect", &tiny("llama"), "--json", "--metadata"]).json();
    for exporter in ["script", "dynamo"] {
        let (_folder, model) = onnx_model(exporter);
        let json = succeed(&["inspect", &arg(&model), "--json", "--metadata"]).json();
        assert_eq!(json["format"], "onnx");
        for key in ["architecture", "parameters", "bits_per_weight", "metadata", "tensors"] {
            assert_eq!(json[key], directory[key], "{exporter}: {key}");
        }
        assert!(succeed(&["inspect", &arg(&model), "--verify"]).stdout.contains("no faults"));
    }
}

#[test]
fn onnx_model_without_its_external_data_is_refused() {
    let (folder, model) = onnx_model("dynamo");
    std::fs::remove_file(folder.path("model.onnx.data")).unwrap();
    fail(
        &["run", &arg(&model), "-p", "x"],
        &["model.onnx.data`: there is no such file; `model.onnx` keeps weights in it"],
    );
    folder.write("model.onnx.data", [0; 5]);
    let fragments = ["initializer `m.model.embed_tokens.weight`", "in the 5 bytes of"];
    fail(&["convert", &arg(&model), "-o", &folder.arg("out")], &fragments);
}

#[test]
fn inspect_slim_file_describes_the_layers() {
    let dir = Dir::new();
    let model = &dir.arg("tiny.slim.gguf");
    convert_tiny(model, &["--group-size", "32"]);
    let json = succeed(&["inspect", model, "--json"]).json();
    assert_eq!(json["format"], "slim");
    assert_eq!(json["parameters"], 127_296);
    let bits_per_weight = json["bits_per_weight"].as_f64().unwrap();
    assert!((3.3..4.0).contains(&bits_per_weight), "{bits_per_weight}");
    assert_eq!(json.get("metadata"), None);

    let layers = json["layers"].as_array().unwrap();
    // 16 matrices: two blocks have `attn_q` in four bands, `ffn_gate` and `ffn_up` in six;
    // embedding and output layer in seven.
    assert_eq!(layers.len(), 54);
    let down = layers.iter().find(|layer| layer["name"] == "blk.1.ffn_down.weight").unwrap();
    assert_eq!((&down["rows"], &down["cols"]), (&Value::from(64), &Value::from(160)));
    assert_eq!(down["group_size"], 32);
    let bits: Vec<u64> =
        down["bits"].as_array().unwrap().iter().map(|bits| bits.as_u64().unwrap()).collect();
    assert_eq!(bits.len(), 5);
    assert!(bits.iter().all(|bits| (1..=8).contains(bits)), "{bits:?}");

    let map = succeed(&["inspect", model, "--bits"]).stdout;
    let digits: String = bits.iter().map(u64::to_string).collect();
    let line = map.lines().find(|line| line.starts_with("blk.1.ffn_down ")).unwrap();
    let mean = format!("{:.2} bits", bits.iter().sum::<u64>() as f64 / 5.0);
    assert!(line.contains(&mean) && line.ends_with(&format!("| {digits}")), "{line}");
}

#[test]
fn inspect_gguf_of_another_architecture_lists_what_is_there() {
    let dir = Dir::new();
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    let string = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    };
    string(&mut bytes, "general.architecture");
    bytes.extend(8u32.to_le_bytes());
    string(&mut bytes, "whisper");
    string(&mut bytes, "x");
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(32u64.to_le_bytes());
    bytes.extend(99u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(32) + 32, 0);
    let file = &dir.write("other.gguf", bytes);

    let json = succeed(&["inspect", file, "--json"]).json();
    assert_eq!((&json["format"], &json["architecture"]), (&"gguf".into(), &"whisper".into()));
    assert_eq!(json["tensors"][0]["type"], "unknown type 99");
    fail(&["run", file, "-p", "a"], &["architecture `whisper` is not supported"]);
}

#[test]
fn verify_says_no_to_a_damaged_file() {
    let dir = Dir::new();
    let model = &dir.arg("tiny.slim.gguf");
    convert_tiny(model, &[]);
    assert!(succeed(&["inspect", model, "--verify"]).stdout.contains("no faults"));
    assert_eq!(
        succeed(&["inspect", model, "--verify", "--json"]).json()["faults"],
        Value::Array(vec![])
    );

    let bytes = std::fs::read(model).unwrap();
    let mut changed = bytes.clone();
    // In the last tensor, `output_norm.weight`; the file ends with its padding.
    let norm = changed.len() - 100;
    changed[norm] ^= 1;
    let changed = &dir.write("changed.gguf", changed);
    let cut = &dir.write("cut.gguf", &bytes[..bytes.len() - 1000]);
    for (file, rule) in [(changed, "F18"), (cut, "")] {
        let answer = slimllm(&["inspect", file, "--verify", "--json"]);
        assert_eq!(answer.code, 1, "{}", answer.stderr);
        assert_eq!(answer.json()["faults"][0]["rule"], rule);
        let answer = slimllm(&["inspect", file, "--verify"]);
        assert_eq!(answer.code, 1, "{}", answer.stderr);
        assert!(answer.stdout.contains("1 fault\n"), "{}", answer.stdout);
        fail(&["run", file, "-p", "a"], &[file, "hint: "]);
    }
    succeed(&["run", changed, "-p", "a", "-n", "1", "--no-hash-check"]);
}

#[test]
fn convert_dry_run_writes_nothing() {
    let dir = Dir::new();
    let (llama, out) = (&tiny("llama"), &dir.arg("out"));
    let plan = succeed(&["convert", llama, "-o", out, "--dry-run", "--bits", "2"]);
    for fragment in
        ["2 per code, in groups of 64", "two-level", "14 linear layers in 2 blocks", "nothing"]
    {
        assert!(plan.stdout.contains(fragment), "`{fragment}` in\n{}", plan.stdout);
    }
    let gptq = ["convert", llama, "-o", out, "--method", "gptq", "--dry-run", "--json"];
    let planned = succeed(&gptq).json();
    let size = ["convert", llama, "-o", out, "--dry-run", "--target-size", "90KiB"];
    let plan = succeed(&size);
    for fragment in ["as many as fit into 90.0 KiB", "size             at most 90.0 KiB, from"] {
        assert!(plan.stdout.contains(fragment), "`{fragment}` in\n{}", plan.stdout);
    }
    let with_target = succeed(&[&size[..], &["--json"]].concat()).json();
    assert_eq!((&with_target["bits"], &with_target["file_bytes"]), (&Value::Null, &92160.into()));
    assert!(dir.names().is_empty());

    convert_tiny(out, &["--method", "gptq"]);
    let real = succeed(&["inspect", out, "--json"]).json();
    assert_eq!(planned["bits_per_weight"], real["bits_per_weight"]);
    assert_eq!(planned["file_bytes"], std::fs::metadata(out).unwrap().len());
}

#[test]
fn convert_reports_on_stdout_unless_quiet() {
    let dir = Dir::new();
    let (llama, out) = (&tiny("llama"), &dir.arg("out.slim.gguf"));
    let convert = ["convert", llama, "-o", out, "--samples", "2", "--context", "32", "--force"];
    let answer = succeed(&convert);
    for fragment in [
        "16 quantized layers, stored in 54 bands",
        "bits per weight",
        "times smaller",
        "slimllm run ",
    ] {
        assert!(answer.stdout.contains(fragment), "`{fragment}` in\n{}", answer.stdout);
    }
    assert!(answer.stderr.contains("block 2 of 2: 20 layers, error "), "{}", answer.stderr);

    let json = succeed(&[&convert[..], &["--json"]].concat()).json();
    assert_eq!(json["file_bytes"], std::fs::metadata(out).unwrap().len());
    assert_eq!(json["layers"].as_array().unwrap().len(), 54);

    let quiet = succeed(&[&convert[..], &["--quiet"]].concat());
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("", ""));
}

#[test]
fn convert_warns_of_a_source_that_is_quantized() {
    let dir = Dir::new();
    let (once, twice) = (&dir.arg("once.slim.gguf"), &dir.arg("twice.slim.gguf"));
    convert_tiny(once, &["--method", "rtn", "--bits", "4"]);
    let answer = succeed(&["convert", once, "-o", twice, "--method", "rtn", "--bits", "2"]);
    assert!(
        answer.stderr.contains("warning: the source's weights are already rounded"),
        "{}",
        answer.stderr
    );
}

#[test]
fn run_greedy_is_deterministic() {
    let dir = Dir::new();
    let model = &dir.arg("tiny.slim.gguf");
    convert_tiny(model, &[]);
    for model in [&tiny("llama"), model] {
        let run = |more: &[&str]| {
            let fixed = ["run", model, "-p", "The fox", "-n", "12", "--temperature", "0"];
            succeed(&[&fixed, more].concat())
        };
        let first = run(&["--threads", "1"]);
        assert_eq!(first.stdout, run(&["--seed", "7", "--threads", "2"]).stdout);
        assert!(first.stdout.len() > 1 && first.stdout.ends_with('\n'), "{:?}", first.stdout);
        assert!(
            first.stderr.contains("prefill") && first.stderr.contains("tokens/s"),
            "{}",
            first.stderr
        );
    }
}

#[test]
fn run_stops_where_the_context_ends() {
    let fixed = ["run", &tiny("llama"), "-p", "a", "-n", "50", "--temperature", "0"];
    let answer = succeed(&[&fixed[..], &["--context", "6"]].concat());
    assert!(
        answer.stderr.contains("stopped: the context of 6 tokens is full"),
        "{}",
        answer.stderr
    );
}

#[test]
fn chat_answers_each_message_until_exit() {
    let dir = Dir::new();
    let messages = dir.write("messages", "Hello\n\nAnd you?\n/exit\nNever read\n");
    let answer = command(&["run", &tiny("llama"), "--chat", "-n", "4", "--temperature", "0"])
        .stdin(std::fs::File::open(messages).unwrap())
        .output()
        .unwrap();
    assert_eq!(answer.status.code(), Some(0));
    let talk = String::from_utf8(answer.stderr).unwrap();
    assert_eq!(talk.matches("prefill").count(), 2, "{talk}");
}

#[test]
fn eval_prints_the_protocol_with_the_number() {
    let dir = Dir::new();
    let text = &dir.write("text.txt", text());
    let llama = &tiny("llama");
    let eval = ["eval", llama, "--text", text, "--context", "32", "--windows", "3"];
    let json = succeed(&[&eval[..], &["--json", "--against", llama]].concat()).json();
    assert_eq!(
        (&json["windows"], &json["context"], &json["tokens"]),
        (&3.into(), &32.into(), &96.into())
    );
    assert_eq!(json["text_sha256"].as_str().unwrap().len(), 64);
    let number = |key: &str| json[key].as_f64().unwrap();
    // An untrained model knows nothing: about as many choices as there are tokens.
    assert!((200.0..500.0).contains(&number("perplexity")), "{}", number("perplexity"));
    assert!(number("kl_mean").abs() < 1e-6 && number("kl_p99").abs() < 1e-6);
    assert_eq!(number("top1_agreement"), 1.0);

    // Line ends are read as Python reads them.
    let windows_text = &dir.write("windows.txt", self::text().replace(". ", ".\r\n"));
    let unix_text = &dir.write("unix.txt", self::text().replace(". ", ".\n"));
    let perplexity = |text: &str| {
        succeed(&["eval", llama, "--text", text, "--context", "32", "--json"]).json()["perplexity"]
            .clone()
    };
    assert_eq!(perplexity(windows_text), perplexity(unix_text));

    let profile = succeed(&["eval", llama, "--profile", "--against", llama, "--json"]).json();
    assert_eq!(profile["domains"].as_array().unwrap().len(), 9);
    let answer = succeed(&["eval", llama, "--profile", "--against", llama]);
    for fragment in ["chinese", "flipped", "where they differ most", "the source expects"] {
        assert!(answer.stdout.contains(fragment), "{fragment}: {}", answer.stdout);
    }
    fail(&["eval", llama, "--profile"], &["--against"]);

    let answer = succeed(&eval);
    for fragment in
        ["3 windows of 32 tokens that do not overlap", "tokens 2 to 32", "no token put in front"]
    {
        assert!(answer.stdout.contains(fragment), "`{fragment}` in\n{}", answer.stdout);
    }
    assert!(answer.stderr.contains("window 3 of 3: perplexity"), "{}", answer.stderr);
}

#[test]
fn bench_json_has_the_keys() {
    let llama = &tiny("llama");
    let bench =
        ["bench", llama, "--prompt", "16", "--generate", "4", "--runs", "2", "--threads", "2"];
    let json = succeed(&[&bench[..], &["--json"]].concat()).json();
    for key in ["prefill_tokens_per_s", "decode_tokens_per_s", "bandwidth_fraction"] {
        assert!(json[key].as_f64().unwrap() > 0.0, "{key} in {json}");
    }
    // All F16 but the input embedding, of which a token reads one row, and the norms.
    assert_eq!(json["bytes_per_token"], 2 * (127_296 - 320 * 64 - 5 * 64));
    assert!(json["peak_memory_bytes"].as_u64().is_none_or(|bytes| bytes > 1 << 20), "{json}");
    assert_eq!((&json["device"], &json["threads"]), (&"cpu".into(), &2.into()));
}

#[test]
fn bench_table_has_a_row_for_each_workload() {
    let llama = &tiny("llama");
    let bench = ["bench", llama, "--prompt", "4", "--generate", "3", "--runs", "1"];
    let workloads = |more: &[&str]| -> Vec<Value> {
        let json = succeed(&[&bench[..], more, &["--json"]].concat()).json();
        json["workloads"].as_array().unwrap().clone()
    };
    let sizes = |rows: &[Value]| -> Vec<[u64; 2]> {
        let size = |row: &Value| ["context", "batch"].map(|key| row[key].as_u64().unwrap());
        rows.iter().map(size).collect()
    };
    let lists = ["--context", "5,40", "--batch", "1,3"];
    let rows = workloads(&lists);
    assert_eq!(sizes(&rows), [[5, 1], [5, 3], [40, 1], [40, 3]]);
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap();
        let of_all = number("batch") * number("tokens_per_s_per_text");
        assert!(of_all > 0.0 && (number("tokens_per_s") / of_all - 1.0).abs() < 1e-9, "{row}");
        assert!(number("first_token_s") > 0.0, "{row}");
        assert!(row["peak_memory_bytes"].as_u64().is_none_or(|bytes| bytes > 1 << 20), "{row}");
    }
    assert_eq!(sizes(&workloads(&["--batch", "2"])), [[4, 2]]);
    assert_eq!(sizes(&workloads(&["--context", "7,6"])), [[7, 1], [6, 1]]);
    assert_eq!(workloads(&[]), Vec::<Value>::new());

    let text = succeed(&[&bench[..], &lists].concat()).stdout;
    let table: Vec<&str> = text.lines().skip_while(|line| !line.contains("first token")).collect();
    assert_eq!(table.len(), 5, "{text}");
    assert!(table[4].starts_with("     40      3"), "{text}");
}

#[test]
fn manual_has_a_page_for_each_command_and_replaces_nothing() {
    let dir = Dir::new();
    let folder = dir.arg("man");
    succeed(&["completions", "--man", &folder]);
    let mut pages: Vec<String> = files_in(&dir.path("man"))
        .iter()
        .map(|page| page.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    pages.retain(|page| page != "slimllm.1");
    assert!(pages.contains(&"slimllm-convert.1".to_owned()), "{pages:?}");
    assert!(!pages.iter().any(|page| page.contains("render-template")), "{pages:?}");
    let page = std::fs::read_to_string(dir.path("man/slimllm-convert.1")).unwrap();
    assert!(page.contains("target\\-bpw"), "{page}");
    fail(&["completions", "--man", &folder], &["cannot write the manual pages"]);
}
