//! The weights in other engines' layouts, read back without a look at where they come from.

use std::path::Path;

use half::f16;
use safetensors::SafeTensors;
use serde_json::Value;
use slim_formats::{ModelSource, Weight, open_model, slim::SlimFile};
use slim_kernels::{FloatCpu, linalg::Precision, weight};

use crate::{
    command::{Answer, Dir, SHORT_TEXT, arg, fail, succeed, tiny_model},
    end_to_end,
};

const TINY: [&str; 3] = ["llama", "llama-tied-rope3", "mistral-swa"];

/// Converts a tiny model in no time, with the embedding in fp16.
fn convert(name: &str, target: &str, more: &[&str]) {
    let source = arg(&tiny_model(name));
    let fixed =
        ["convert", &source, "-o", target, "--force", "--method", "rtn", "--embed-bits", "16"];
    succeed(&[&fixed, more].concat());
}

/// Exports a model and gives the report.
fn export(model: &str, layout: &str, target: &str) -> Value {
    let fixed = ["export", model, "--to", layout, "--quiet", "--json", "--force"];
    succeed(&[&fixed[..], &["-o", target]].concat()).json()
}

fn layout_of(report: &Value, name: &str) -> String {
    layer(report, name)["layout"].as_str().unwrap().to_owned()
}

fn layer<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["layers"].as_array().unwrap().iter().find(|layer| layer["name"] == name).unwrap()
}

/// The logits of 40 tokens, with products in floats: rounded inputs would hide small differences of
/// weights.
fn logits(model: &str) -> Vec<f32> {
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 300).collect();
    let source = open_model(Path::new(model)).unwrap();
    end_to_end::logits(source.into(), &FloatCpu(Precision::Fine), &tokens).concat()
}

/// The norm of the difference, relative to that of `expected`.
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |value: f32| f64::from(value).powi(2);
    let difference: f64 = found.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    (difference / expected.iter().map(|&value| square(value)).sum::<f64>()).sqrt()
}

fn greedy_text(model: &str) -> String {
    let prompt = "The quick brown fox";
    succeed(&["run", model, "-p", prompt, "-n", "24", "--temperature", "0", "--device", "cpu"])
        .stdout
}

#[test]
fn gguf_of_every_coding_runs_like_the_slim_file() {
    let dir = Dir::new();
    let (slim, exported) = (&dir.arg("a.slim.gguf"), &dir.arg("a.gguf"));
    for (more, layout, most) in [
        (&["--bits", "3"][..], "Q4_1", 2e-3),
        (&["--bits", "1", "--scales", "paper"], "Q4_1", 2e-3),
        (&["--bits", "4", "--scales", "paper", "--group-size", "32"], "Q4_1", 2e-3),
        (&["--bits", "4", "--sub-group", "64", "--scale-bits", "6"], "Q4_1", 2e-3),
        (&["--bits", "5"], "Q5_1", 2e-3),
        (&["--bits", "2", "--scales", "trellis"], "Q8_0", 2e-2),
        (&["--bits", "6"], "Q8_0", 2e-2),
        // Blocks of 32 columns have two scales.
        (&["--bits", "3", "--sub-group", "16"], "Q8_0", 2e-2),
        (&["--bits", "3", "--group-size", "48"], "Q8_0", 2e-2),
    ] {
        for name in TINY {
            convert(name, slim, more);
            let report = export(slim, "gguf", exported);
            assert_eq!(layout_of(&report, "blk.1.attn_k.weight"), layout, "{more:?}");
            assert_eq!(layout_of(&report, "token_embd.weight"), "F16");
            assert_eq!(report["file_bytes"], std::fs::metadata(exported).unwrap().len());
            let error = relative_error(&logits(exported), &logits(slim));
            assert!(error < most, "{name} {more:?}: {error}");
        }
    }
}

#[test]
fn gguf_continues_a_text_like_the_slim_file() {
    let dir = Dir::new();
    let (slim, exported) = (&dir.arg("a.slim.gguf"), &dir.arg("a.gguf"));
    for name in TINY {
        convert(name, slim, &["--bits", "4"]);
        export(slim, "gguf", exported);
        // Its tokenizer comes from `tokenizer.json`, the export's from GGUF keys.
        assert_eq!(greedy_text(exported), greedy_text(slim), "{name}");
        let template =
            |model: &str| open_model(Path::new(model)).unwrap().chat_template().map(str::to_owned);
        assert_eq!(template(exported), template(slim));
    }
}

#[test]
fn gguf_of_a_dense_model_loses_nothing() {
    let dir = Dir::new();
    let exported = &dir.arg("a.gguf");
    for name in TINY {
        let source = arg(&tiny_model(name));
        let report = export(&source, "gguf", exported);
        assert_eq!(report["worst_error"], 0.0);
        assert_eq!(logits(exported), logits(&source), "{name}");
    }
}

#[test]
fn gguf_warns_of_a_sliding_window() {
    let dir = Dir::new();
    let report = export(&arg(&tiny_model("mistral-swa")), "gguf", &dir.arg("a.gguf"));
    let warning = report["warnings"][0].as_str().unwrap();
    assert!(warning.contains("llama.cpp attends to all tokens"), "{warning}");
}

#[test]
fn safetensors_run_like_the_slim_file() {
    let dir = Dir::new();
    let slim = &dir.arg("a.slim.gguf");
    for name in TINY {
        convert(name, slim, &["--bits", "3"]);
        let folder = &dir.arg(name);
        let report = export(slim, "safetensors", folder);
        assert_eq!(layout_of(&report, "blk.0.ffn_up.weight"), "F16");
        let error = relative_error(&logits(folder), &logits(slim));
        assert!(error < 2e-3, "{name}: {error}");

        let (found, expected) =
            (open_model(folder.as_ref()).unwrap(), open_model(slim.as_ref()).unwrap());
        let config = expected.config();
        assert_eq!(found.config().bos_token_id, config.bos_token_id);
        assert_eq!(found.config().eos_token_ids, config.eos_token_ids);
        assert_eq!(found.config().sliding_window, config.sliding_window);
        assert_eq!(found.config().tied_embeddings, config.tied_embeddings);
        assert!(relative_error(&found.config().rope.factors, &config.rope.factors) < 1e-5);
        assert_eq!(found.chat_template(), expected.chat_template());
        let mut sizes = std::fs::read_dir(folder).unwrap();
        let bytes: u64 = sizes.by_ref().map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert_eq!(report["file_bytes"], bytes);
    }
}

#[test]
fn safetensors_of_a_gguf_file_have_its_tokenizer() {
    let dir = Dir::new();
    let (gguf, folder) = (&dir.arg("a.gguf"), &dir.arg("folder"));
    export(&arg(&tiny_model("llama")), "gguf", gguf);
    export(gguf, "safetensors", folder);
    assert_eq!(logits(folder), logits(gguf));
    assert_eq!(greedy_text(folder), greedy_text(gguf));
}

/// `attn_q`, `ffn_gate` and `ffn_up` are stored in bands.
#[test]
fn matrices_in_bands_are_joined() {
    let dir = Dir::new();
    let slim = &dir.arg("a.slim.gguf");
    for name in TINY {
        let source = arg(&tiny_model(name));
        let fixed =
            ["convert", &source, "-o", slim, "--force", "--embed-bits", "16", "--bits", "2"];
        let quick = ["--samples", "2", "--context", "32", "--calibration", SHORT_TEXT];
        succeed(&[&fixed[..], &quick].concat());
        let file = SlimFile::open(slim.as_ref()).unwrap();
        assert!(matches!(file.tensor("blk.1.ffn_up.weight"), Ok(Some(Weight::Bands(_)))));
        let expected = logits(slim);
        let (file_name, folder_name) = (format!("{name}.gguf"), format!("{name}-float"));
        for (layout, exported) in [("gguf", file_name), ("safetensors", folder_name)] {
            let exported = &dir.arg(&exported);
            export(slim, layout, exported);
            let error = relative_error(&logits(exported), &expected);
            assert!(error < 2e-3, "{name}, {layout}: {error}");
        }
        let folder = dir.path(&format!("{name}.gptq"));
        export(slim, "gptq", &arg(&folder));
        let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
        let exported = SafeTensors::deserialize(&bytes).unwrap();
        let found = gptq_weights(&exported, "model.layers.1.mlp.up_proj", 8);
        let error = relative_error(&found, &weights(&file, "blk.1.ffn_up.weight"));
        assert!(error < 0.01, "{name}, gptq: {error}");
    }
}

/// The weights `[rows, cols]` of a layer, as the layout's own formula reads.
fn gptq_weights(file: &SafeTensors<'_>, module: &str, bits: usize) -> Vec<f32> {
    let part = |name: &str| file.tensor(&format!("{module}.{name}")).unwrap();
    let ints = |name: &str| -> Vec<i32> {
        part(name).data().as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes)).collect()
    };
    let (qweight, qzeros, g_idx) = (ints("qweight"), ints("qzeros"), ints("g_idx"));
    let scales: Vec<f16> =
        part("scales").data().as_chunks().0.iter().map(|&b| f16::from_le_bytes(b)).collect();
    let (cols, rows) = (g_idx.len(), part("scales").shape()[1]);
    let field = |word: i32, index: usize| (word >> (bits * index)) & ((1 << bits) - 1);
    let per_word = 32 / bits;
    assert_eq!(part("qweight").shape(), [cols / per_word, rows]);
    assert_eq!(part("qzeros").shape(), [cols / 32, rows / per_word]);
    let mut weights = Vec::new();
    for row in 0..rows {
        for (col, &group) in g_idx.iter().enumerate() {
            let group = group as usize;
            let code = field(qweight[col / per_word * rows + row], col % per_word);
            let zero = field(qzeros[group * (rows / per_word) + row / per_word], row % per_word);
            weights.push(scales[group * rows + row].to_f32() * (code - zero) as f32);
        }
    }
    weights
}

fn weights(model: &dyn ModelSource, name: &str) -> Vec<f32> {
    let found = model.tensor(name).unwrap().unwrap();
    let (rows, cols) = weight::shape(found);
    let mut values = vec![0.0; rows * cols];
    weight::dequantize_rows(found, 0..rows, &mut values).unwrap();
    values
}

#[test]
fn gptq_holds_the_weights_as_near_as_it_says() {
    let dir = Dir::new();
    let slim = &dir.arg("a.slim.gguf");
    for (index, (more, bits, most)) in [
        (&["--bits", "3", "--scales", "paper"][..], 4, 1e-6),
        (&["--bits", "4", "--scales", "paper", "--group-size", "32"], 4, 1e-6),
        (&["--bits", "2"], 8, 0.01),
        (&["--bits", "3"], 8, 0.01),
        (&["--bits", "4"], 8, 0.01),
        (&["--bits", "6", "--scales", "paper"], 8, 1e-6),
        (&["--bits", "2", "--scales", "trellis"], 8, 0.01),
    ]
    .into_iter()
    .enumerate()
    {
        convert("llama-tied-rope3", slim, more);
        let folder = dir.path(&format!("folder{index}"));
        let report = export(slim, "gptq", &arg(&folder));
        let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        let quantization = &config["quantization_config"];
        assert_eq!(quantization["bits"], bits);
        assert_eq!(quantization["group_size"], 32);
        assert_eq!(quantization["checkpoint_format"], "gptq_v2");

        let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let source = open_model(slim.as_ref()).unwrap();
        for (module, name) in [
            ("model.layers.0.self_attn.q_proj", "blk.0.attn_q.weight"),
            ("model.layers.1.mlp.down_proj", "blk.1.ffn_down.weight"),
        ] {
            let found = gptq_weights(&file, module, bits);
            let error = relative_error(&found, &weights(&*source, name));
            let reported = layer(&report, name)["error"].as_f64().unwrap();
            assert!((error - reported).abs() < 1e-6, "{name} {more:?}: {error}, {reported}");
            assert!(error < most, "{name} {more:?}: {error}");
        }
        let norm = file.tensor("model.layers.0.input_layernorm.weight").unwrap();
        assert_eq!((norm.dtype(), norm.shape()), (safetensors::Dtype::F16, &[64][..]));
    }
}

#[test]
fn targets_and_models_that_do_not_fit_are_refused() {
    let dir = Dir::new();
    let (slim, llama) = (&dir.arg("a.slim.gguf"), &arg(&tiny_model("llama")));
    convert("llama", slim, &[]);
    let taken = &dir.arg("taken");
    std::fs::create_dir(taken).unwrap();
    for (to, target, fragments) in [
        ("safetensors", taken.as_str(), &["`", "exists already", "hint: give a name"][..]),
        ("gptq", slim, &["exists already"]),
        ("gguf", taken, &["is a folder; `-o` takes the name of a file"]),
        ("gguf", slim, &["is a file of the source"]),
        ("safetensors", "/no/such/folder/out", &["there is no folder", "mkdir -p"]),
        ("awq", &dir.arg("out"), &["invalid value 'awq'", "gguf, gptq, onnx, safetensors"]),
    ] {
        fail(&["export", slim, "--to", to, "-o", target], fragments);
    }
    fail(
        &["export", llama, "--to", "gptq", "-o", &dir.arg("out")],
        &["tensor `blk.0.attn_q.weight`, which is not quantized, cannot be exported", "hint: "],
    );
    let mut names = dir.names();
    names.sort();
    assert_eq!(names, ["a.slim.gguf", "taken"]);
}

#[test]
fn report_says_what_was_lost() {
    let dir = Dir::new();
    let (slim, exported) = (&dir.arg("a.slim.gguf"), &dir.arg("a.gguf"));
    convert("llama", slim, &["--bits", "3"]);
    let answer = succeed(&["export", slim, "--to", "gguf", "-o", exported]);
    for fragment in ["written", "2 in F16, 14 in Q4_1", "loss", "at most", "size"] {
        assert!(answer.stdout.contains(fragment), "`{fragment}` in\n{}", answer.stdout);
    }
    assert!(answer.stderr.contains("block 1 of 2"), "{}", answer.stderr);
}

/// A program of that name that runs `script` in a shell, in a folder for the PATH.
#[cfg(unix)]
fn engine(dir: &Dir, name: &str, script: &str) -> String {
    use std::{fs::Permissions, os::unix::fs::PermissionsExt};

    let folder = dir.path(&format!("engine of {name}"));
    std::fs::create_dir_all(&folder).unwrap();
    let program = folder.join(name);
    std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    format!("{}:/usr/bin:/bin", folder.display())
}

/// What `llama-perplexity` saves of logits of 8 tokens, `[8, vocab]`: of those at positions 4 to 6.
fn saved_by_llama_cpp(tokens: &[u32], logits: &[f32]) -> Vec<u8> {
    let vocab = logits.len() / tokens.len();
    let mut bytes = b"_logits_".to_vec();
    let numbers = [tokens.len() as u32, vocab as u32, 1];
    bytes.extend(numbers.iter().chain(tokens).flat_map(|number| number.to_le_bytes()));
    for row in logits.chunks_exact(vocab).take(tokens.len() - 1).skip(tokens.len() / 2) {
        let [least, most] =
            [f32::min, f32::max].map(|pick| row.iter().copied().reduce(pick).unwrap());
        let step = (most - least) / 65535.0;
        bytes.extend([step, least].iter().flat_map(|number| number.to_le_bytes()));
        let codes = row.iter().map(|logit| ((logit - least) / step).round() as u16);
        bytes
            .extend(codes.chain((vocab % 2 == 1).then_some(0)).flat_map(|code| code.to_le_bytes()));
    }
    bytes
}

/// Engines that play llama.cpp and Python: one that agrees, one that computes something else, one
/// that fails, and none.
#[cfg(unix)]
#[test]
fn check_says_what_an_engine_makes_of_it() {
    let dir = Dir::new();
    let model = arg(&tiny_model("llama"));
    let source = open_model(Path::new(&model)).unwrap();
    // In place of the first, llama.cpp has the token that texts begin with, if there is one.
    let bos = source.config().bos_token_id.filter(|_| source.config().add_bos);
    let tokens = [bos.unwrap_or(9), 8, 7, 6, 5, 4, 3, 2];
    let logits = end_to_end::logits(source.into(), &FloatCpu(Precision::Fine), &tokens).concat();
    let right = dir.write("right", saved_by_llama_cpp(&tokens, &logits));
    let opposite: Vec<f32> = logits.iter().map(|logit| -logit).collect();
    let wrong = dir.write("wrong", saved_by_llama_cpp(&tokens, &opposite));
    let saves = |file: &str| {
        format!(
            "for a; do [ \"$last\" = --kl-divergence-base ] && cp '{file}' \"$a\"; last=$a; done; true"
        )
    };
    let check = |layout: &str, path: &str| {
        let out = dir.arg(&format!("{layout}.gguf"));
        // No folder is replaced.
        let _ = std::fs::remove_dir_all(&out);
        let mut command = dir.slimllm("export");
        command.args([&model, "--to", layout, "-o", &out, "--force", "--check", "--json"]);
        Answer::of(command.env("PATH", path))
    };
    let llama = |script: &str| check("gguf", &engine(&dir, "llama-perplexity", script));

    let agrees = llama(&saves(&right)).succeeds().json();
    let checked = &agrees["checked"];
    assert_eq!(checked["engine"], "llama.cpp");
    assert_eq!(checked["positions"], 3);
    assert!(checked["kl_mean"].as_f64().unwrap() < 1e-4, "{checked}");
    assert_eq!(checked["top1_agreement"], 1.0);
    llama(&saves(&wrong)).fails(&["gguf.gguf", "llama.cpp computes something else", "KL "]);
    llama("echo unknown architecture >&2; exit 1")
        .fails(&["llama.cpp cannot run it", "unknown architecture"]);
    llama("true").fails(&["llama.cpp saved logits of a kind that is not known"]);

    let no_engine = check("gguf", "/nowhere").succeeds().json();
    let reason = &no_engine["checked"]["not_run"];
    assert_eq!(reason, "there is no `llama-perplexity` on the PATH");
    let python = |script: &str| check("safetensors", &engine(&dir, "python3", script));
    let no_package = python("echo No module named torch >&2; exit 3").succeeds().json();
    let reason = no_package["checked"]["not_run"].as_str().unwrap();
    assert!(reason.contains("No module named torch"), "{reason}");
    python("exit 0").fails(&["transformers gave no logits"]);
}
