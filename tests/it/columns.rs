//! Matrices whose columns are no multiple of 16: quantized, run, exported, and counted.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use half::f16;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use slim_formats::{
    DType, Decoder, Layout, ModelConfig, ModelSource, Weight, open_model,
    slim::{Outline, SlimFile, SlimWriter},
};
use slim_kernels::{FloatCpu, Scalar, linalg::Precision, weight};

use crate::{
    command::{Answer, Dir, arg, command, fail, onnx_runtime, short_text, succeed, tiny_model},
    end_to_end::{Dequantized, ROUNDED_TOLERANCE, assert_runs_like, logits},
};

/// The sizes of a model.
struct Sizes {
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    ffn: usize,
    tied: bool,
}

/// Those of `stories260K`, whose `ffn_down` has 172 columns.
const STORIES: Sizes =
    Sizes { hidden: 64, heads: 8, kv_heads: 4, head_dim: 8, ffn: 172, tied: true };
/// No matrix fills its last unit.
const RAGGED: Sizes =
    Sizes { hidden: 72, heads: 3, kv_heads: 1, head_dim: 24, ffn: 100, tied: false };
/// Fewer columns than a group, a sub-group or a unit have.
const NARROW: Sizes = Sizes { hidden: 12, heads: 3, kv_heads: 3, head_dim: 6, ffn: 1, tied: true };
/// One column past a unit.
const ODD: Sizes = Sizes { hidden: 34, heads: 2, kv_heads: 2, head_dim: 10, ffn: 17, tied: false };

const ALL: [&Sizes; 4] = [&STORIES, &RAGGED, &NARROW, &ODD];

/// Numbers with about the bell shape of weights, the same on every run.
fn noise(len: usize, seed: u32) -> impl Iterator<Item = f32> {
    let mut state = seed;
    let mut uniform = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..len).map(move |_| (0..4).map(|_| uniform()).sum())
}

/// A model of fewer columns than a group has.
pub fn narrow_model(dir: &Dir) -> PathBuf {
    model(dir, &NARROW)
}

/// The tiny model `llama` with other sizes and random weights.
fn model(dir: &Dir, sizes: &Sizes) -> PathBuf {
    let (llama, folder) = (tiny_model("llama"), dir.path("model"));
    std::fs::create_dir_all(&folder).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(llama.join(name), folder.join(name)).unwrap();
    }
    let config = std::fs::read_to_string(llama.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    for (key, value) in [
        ("hidden_size", json!(sizes.hidden)),
        ("num_attention_heads", json!(sizes.heads)),
        ("num_key_value_heads", json!(sizes.kv_heads)),
        ("head_dim", json!(sizes.head_dim)),
        ("intermediate_size", json!(sizes.ffn)),
        ("tie_word_embeddings", json!(sizes.tied)),
    ] {
        config[key] = value;
    }
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let source = open_model(&llama).unwrap();
    let (config, blocks) = (config_of(source.config(), sizes), source.config().block_count);
    let decoder = Decoder::new(&config);
    let mut names = vec!["token_embd.weight".to_owned(), "output_norm.weight".to_owned()];
    names.extend((!sizes.tied).then(|| "output.weight".to_owned()));
    for block in 0..blocks {
        names.extend(HF_NAMES[3..].iter().map(|(name, _)| format!("blk.{block}.{name}")));
    }
    let tensors = names.iter().enumerate().map(|(seed, name)| {
        let dims = decoder.find(name).unwrap().dims.clone();
        let (len, cols) = (dims.iter().product(), *dims.last().unwrap() as f32);
        // Norms about 1, products about as large as their inputs.
        let (mean, size) = if dims.len() == 1 { (1.0, 0.1) } else { (0.0, 1.7 / cols.sqrt()) };
        let values = noise(len, seed as u32 + 1).map(|value| mean + size * value);
        let bytes: Vec<u8> = values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect();
        (hf_name(name), dims, bytes)
    });
    let tensors: Vec<_> = tensors.collect();
    let views = tensors.iter().map(|(name, dims, bytes)| {
        (name, TensorView::new(Dtype::F16, dims.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
    folder
}

fn config_of(llama: &ModelConfig, sizes: &Sizes) -> ModelConfig {
    ModelConfig {
        hidden_size: sizes.hidden,
        head_count: sizes.heads,
        kv_head_count: sizes.kv_heads,
        head_dim: sizes.head_dim,
        ffn_size: sizes.ffn,
        ..llama.clone()
    }
}

/// GGUF's names with Hugging Face's, of a block from the fourth on.
const HF_NAMES: [(&str, &str); 12] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
];

fn hf_name(name: &str) -> String {
    let (block, part) = match name.strip_prefix("blk.") {
        Some(rest) => {
            let (block, part) = rest.split_once('.').unwrap();
            (format!("model.layers.{block}."), part)
        }
        None => (String::new(), name),
    };
    let (_, hf) = HF_NAMES.iter().find(|(gguf, _)| *gguf == part).unwrap();
    block + hf
}

/// Converts on little text; gives the file.
fn convert(dir: &Dir, model: &Path, more: &[&str]) -> String {
    let (model, file) = (&arg(model), dir.arg("a.slim.gguf"));
    let fixed = ["convert", model, "-o", &file, "--force"];
    succeed(&[&fixed[..], QUICK, short_text(more), more].concat());
    file
}

const QUICK: &[&str] = &["--samples", "4", "--context", "32", "--quiet", "--device", "cpu"];

/// One of each method, coding and kind of group.
const WAYS: [&[&str]; 9] = [
    &["--bits", "3"],
    &["--bits", "2", "--scales", "trellis"],
    &["--method", "slim+", "--steps", "2", "--scales", "trellis", "--group-size", "48"],
    &["--method", "slim+", "--steps", "2", "--bits", "2", "--group-size", "16"],
    &["--method", "gptq", "--bits", "4", "--sub-group", "16", "--scale-bits", "6"],
    &["--method", "gptq", "--bits", "2", "--sub-group", "64", "--group-size", "256"],
    &["--method", "rtn", "--bits", "5", "--scales", "paper"],
    &["--method", "rtn", "--bits", "1", "--scales", "paper", "--embed-bits", "3"],
    &["--reference", "--bits", "2"],
];

const TOKENS: [u32; 12] = [267, 17, 300, 5, 99, 42, 7, 3, 128, 64, 32, 200];

#[test]
fn packed_models_of_any_columns_compute_with_their_own_weights() {
    let dir = Dir::new();
    for sizes in ALL {
        let source = model(&dir, sizes);
        for way in WAYS {
            let file = convert(&dir, &source, way);
            let what = format!("{} and {} columns, {way:?}", sizes.hidden, sizes.ffn);
            let packed = SlimFile::open(Path::new(&file)).unwrap();
            assert!(packed.verify().is_empty(), "{what}: {:?}", packed.verify());
            let version = if way.contains(&"trellis") { 3 } else { 2 };
            assert_eq!(
                packed.gguf().metadata().u64("slim.format.version"),
                Some(version),
                "{what}"
            );
            for block in 0..packed.config().block_count {
                let name = format!("blk.{block}.ffn_down.weight");
                let down = packed.layer(&name).unwrap_or_else(|| panic!("{what}: `{name}`"));
                assert_eq!(down.layout().cols(), sizes.ffn);
            }
            let dequantized = Dequantized::open(Path::new(&file));
            let expected = logits(Arc::new(dequantized), &Scalar, &TOKENS);
            assert!(expected[1].iter().all(|logit| logit.is_finite()), "{what}");
            assert_runs_like(&what, Path::new(&file), &TOKENS, &expected);
        }
    }
}

#[test]
fn models_of_whole_units_stay_in_the_first_version() {
    let dir = Dir::new();
    let file = convert(&dir, &tiny_model("llama"), &["--method", "rtn"]);
    let file = SlimFile::open(Path::new(&file)).unwrap();
    assert_eq!(file.gguf().metadata().u64("slim.format.version"), Some(1));
}

/// Quantizing knows nothing of the columns that are only stored: more bits, less error.
#[test]
fn error_of_ragged_layers_is_that_of_their_bits() {
    let dir = Dir::new();
    let source = model(&dir, &RAGGED);
    for bits in ["2", "4", "8"] {
        let file = convert(&dir, &source, &["--method", "gptq", "--bits", bits]);
        let file = SlimFile::open(Path::new(&file)).unwrap();
        let most = [0.3, 0.02, 1e-3][bits.parse::<usize>().unwrap().ilog2() as usize - 1];
        for layer in file.layers().iter().filter(|layer| layer.name.starts_with("blk.")) {
            let error = layer.error.expect("measured by the sweep");
            assert!(error < most, "{} at {bits} bits: {error}", layer.name);
        }
    }
}

#[test]
fn dry_run_foretells_what_comes_out() {
    let dir = Dir::new();
    for sizes in [&STORIES, &RAGGED, &NARROW] {
        let source = model(&dir, sizes);
        for way in WAYS {
            let model = &arg(&source);
            let file = dir.arg("a.slim.gguf");
            let dry = &["convert", model, "-o", &file, "--force", "--dry-run", "--json"];
            let plan = succeed(&[&dry[..], QUICK, short_text(way), way].concat()).json();
            convert(&dir, &source, way);
            let found = succeed(&["inspect", &file, "--json"]).json();
            let what = format!("{} and {} columns, {way:?}", sizes.hidden, sizes.ffn);
            let [disk, bytes] = ["disk_bytes", "file_bytes"].map(|key| plan[key].as_u64());
            assert!(disk > bytes && plan["seconds"].as_f64() > Some(0.0), "{what}: {plan}");
            if plan["is_exact"] == true {
                for key in ["file_bytes", "bits_per_weight"] {
                    assert_eq!(plan[key], found[key], "{what}: {key}");
                }
            } else {
                let [plan, found] = [&plan, &found].map(|of| of["bits_per_weight"].as_f64());
                let (plan, found) = (plan.unwrap(), found.unwrap());
                assert!((found / plan - 1.0).abs() < 0.25, "{what}: {found} for {plan}");
            }
            assert_eq!(found["bits_per_weight"], found["linear_bits_per_weight"], "{what}");
            let figure = found["bits_per_weight"].as_f64().unwrap();
            assert!((figure - stored_bits(&file)).abs() < 1e-9, "{what}: {figure}");
        }
    }
}

/// Bytes of everything that belongs to the matrices of the blocks, over their weights.
fn stored_bits(file: &str) -> f64 {
    let file = SlimFile::open(Path::new(file)).unwrap();
    let (mut bits, mut weights) = (0, 0);
    for tensor in file.gguf().tensors() {
        if tensor.name.starts_with("blk.") && !tensor.name.contains("norm") {
            bits += 8 * tensor.bytes;
        }
    }
    for name in file.tensor_names() {
        if name.starts_with("blk.") && !name.contains("norm") {
            let (rows, cols) = weight::shape(file.require(name).unwrap());
            weights += rows * cols;
        }
    }
    bits as f64 / weights as f64
}

#[test]
fn targets_are_met_or_refused_with_what_is_possible() {
    let dir = Dir::new();
    for sizes in ALL {
        let source = model(&dir, sizes);
        let (model, file) = (&arg(&source), dir.arg("b.slim.gguf"));
        let start = [&["convert", model, "-o", &file][..], QUICK, short_text(&[])].concat();
        for (flag, low) in [("--target-bpw", "1.2"), ("--target-size", "1KiB")] {
            let refused = crate::command::slimllm(&[&start[..], &[flag, low]].concat());
            refused.fails(&["expected at least "]);
            assert!(!Path::new(&file).exists());
            // What is told to be possible is.
            let (_, least) = refused.stderr.split_once("expected at least ").unwrap();
            let (least, _) = least.split_once(" with").unwrap();
            let least = &least.replace(' ', "");
            succeed(&[&start[..], &[flag, least]].concat());
            let found = succeed(&["inspect", &file, "--json"]).json();
            if flag == "--target-bpw" {
                let found = found["linear_bits_per_weight"].as_f64().unwrap();
                assert!(found <= least.parse().unwrap(), "{found} for {least}");
            }
            std::fs::remove_file(&file).unwrap();
        }
    }
}

/// Files of other writers may keep linear layers at 16 bits.
#[test]
fn layers_that_stay_at_16_bits_are_counted() {
    let dir = Dir::new();
    let file = convert(&dir, &model(&dir, &STORIES), &["--method", "rtn", "--bits", "3"]);
    let packed = SlimFile::open(Path::new(&file)).unwrap();
    let kept = dir.path("kept.slim.gguf");
    let is_kept = |name: &str| name.contains("ffn_down");
    let shape = |found| {
        let (rows, cols) = weight::shape(found);
        if rows == 1 { vec![cols as u64] } else { vec![rows as u64, cols as u64] }
    };
    let mut planned = Outline::default();
    for name in packed.tensor_names() {
        let found = packed.require(name).unwrap();
        match found {
            Weight::Packed(_) if is_kept(name) => planned.dense(name, DType::F16, &shape(found)),
            Weight::Packed(layer) => planned.layer(name, layer.layout(), None),
            Weight::Dense(dense) => planned.dense(name, dense.dtype, &shape(found)),
            Weight::Bands(_) => unreachable!("of `rtn`"),
        }
    }
    let mut writer = SlimWriter::create(&*kept, &planned, packed.given_metadata()).unwrap();
    for name in packed.tensor_names() {
        let found = packed.require(name).unwrap();
        let shape = shape(found);
        match found {
            Weight::Packed(_) if is_kept(name) => {
                let zeros = vec![0; 2 * shape.iter().product::<u64>() as usize];
                writer.dense(name, DType::F16, &shape, &zeros).unwrap();
            }
            Weight::Packed(layer) => writer.layer(name, &layer.to_layer(), None).unwrap(),
            Weight::Dense(dense) => {
                assert_eq!(dense.layout, Layout::AsStored);
                writer.dense(name, dense.dtype, &shape, dense.bytes).unwrap();
            }
            Weight::Bands(_) => unreachable!("of `rtn`"),
        }
    }
    writer.finish().unwrap();
    let found = succeed(&["inspect", &arg(&kept), "--json"]).json();
    let [quantized, all] =
        ["bits_per_weight", "linear_bits_per_weight"].map(|key| found[key].as_f64().unwrap());
    let expected = stored_bits(&arg(&kept));
    assert!((all - expected).abs() < 1e-9 && quantized < 5.0 && all > 6.0, "{quantized}, {all}");
    let text = succeed(&["inspect", &arg(&kept)]).stdout;
    let figure = format!("{all:.3} in 14 linear layers of the blocks, everything counted");
    assert!(text.contains(&figure), "{text}");
    assert!(text.contains(&format!("{quantized:.3} in the 12 quantized ones")), "{text}");
}

#[test]
fn exports_of_any_columns_compute_what_the_file_does() {
    let dir = Dir::new();
    for sizes in [&STORIES, &RAGGED, &ODD] {
        let source = model(&dir, sizes);
        let file = convert(&dir, &source, &["--bits", "4"]);
        let of = |path: &str| logits(open_model(Path::new(path)).unwrap().into(), &Scalar, &TOKENS);
        let expected = of(&file);
        let gguf = dir.arg("a.gguf");
        let report = export(&file, "gguf", &gguf);
        for layer in report["layers"].as_array().unwrap() {
            let name = layer["name"].as_str().unwrap();
            let (_, cols) =
                weight::shape(open_model(Path::new(&gguf)).unwrap().require(name).unwrap());
            assert_eq!(layer["layout"] == "F16", !cols.is_multiple_of(32), "{layer}");
        }
        let folder = dir.arg("hf");
        export(&file, "safetensors", &folder);
        for (what, path) in [("gguf", &gguf), ("safetensors", &folder)] {
            let found = of(path);
            for (found, expected) in found.iter().zip(&expected) {
                let error = relative_error(found, expected);
                // Q8_0 rounds anew.
                assert!(error < 2e-2, "{what} of {} columns: {error}", sizes.ffn);
            }
        }
        let gptq = &dir.arg("gptq");
        fail(
            &["export", &file, "--to", "gptq", "-o", gptq],
            &["columns", "no multiples of 8 and 32"],
        );
        assert!(!Path::new(gptq).exists());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

fn export(file: &str, layout: &str, target: &str) -> Value {
    succeed(&["export", file, "--to", layout, "-o", target, "--force", "--quiet", "--json"]).json()
}

/// The norm of the difference, relative to that of `expected`.
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let square = |value: f32| f64::from(value).powi(2);
    let difference: f64 = found.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    (difference / expected.iter().map(|&value| square(value)).sum::<f64>()).sqrt()
}

/// `GroupQueryAttention` takes heads of a multiple of 16 channels.
const FOR_ONNX: [Sizes; 2] = [
    Sizes { hidden: 100, heads: 2, kv_heads: 1, head_dim: 16, ffn: 172, tied: true },
    Sizes { hidden: 72, heads: 3, kv_heads: 3, head_dim: 16, ffn: 33, tied: false },
];

#[test]
fn onnx_graph_of_any_columns_computes_what_the_file_does() {
    let dir = Dir::new();
    for sizes in &FOR_ONNX {
        let source = model(&dir, sizes);
        for bits in ["2", "4", "8"] {
            let file = convert(&dir, &source, &["--bits", bits, "--embed-bits", bits]);
            let folder = dir.arg("onnx");
            export(&file, "onnx", &folder);
            if let Some(library) = onnx_runtime() {
                let text = dir
                    .write("text.txt", "The quick brown fox jumps over the lazy dog. ".repeat(20));
                let graph = dir.path("onnx").join("model.onnx");
                let measure = ["eval", &file, "--text", &text, "--context", "16", "--windows", "4"];
                let mut command = command(&measure);
                command.args(["--against", &arg(&graph), "--json"]).env("ORT_DYLIB_PATH", library);
                let found = Answer::of(&mut command).succeeds().json();
                println!("{bits} bits: {found}");
                assert!(found["kl_mean"].as_f64().unwrap() < 2e-3, "{bits} bits: {found}");
            }
            std::fs::remove_dir_all(&folder).unwrap();
        }
    }
}

/// `make test-cuda` runs it in the emulated driver.
#[test]
fn packed_models_of_any_columns_agree_on_a_device() {
    if std::env::var_os("SLIMLLM_TEST_CUDA").is_none() {
        eprintln!("skipped: SLIMLLM_TEST_CUDA is not set, `make test-cuda` sets it");
        return;
    }
    let dir = Dir::new();
    let out = dir.path("logits.safetensors");
    let logits_on = |file: &str, device: &[&str]| -> Vec<f32> {
        let tokens = TOKENS.map(|token| token.to_string()).join(",");
        let fixed = ["logits", file, "--tokens", &tokens, "-o", &arg(&out), "--force"];
        succeed(&[&fixed[..], device].concat());
        let bytes = std::fs::read(&out).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let values = tensors.tensor("logits").unwrap().data().as_chunks().0.to_vec();
        values.into_iter().map(f32::from_le_bytes).collect()
    };
    for sizes in [&STORIES, &RAGGED] {
        let source = model(&dir, sizes);
        for way in WAYS {
            let file = convert(&dir, &source, way);
            let source = open_model(Path::new(&file)).unwrap();
            let expected = logits(source.into(), &FloatCpu(Precision::Fine), &TOKENS).concat();
            // The CPU rounds the inputs of its block to 8 bits.
            for (device, bound) in [
                (&["--device", "cuda"][..], 4e-3),
                (&["--device", "cuda", "--gpu-layers", "1"], ROUNDED_TOLERANCE),
            ] {
                let error = relative_error(&logits_on(&file, device), &expected);
                assert!(error < bound, "{} columns, {way:?}, {device:?}: {error}", sizes.ffn);
            }
        }
    }
}
