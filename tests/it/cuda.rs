//! The command on a CUDA device: the emulator of `kernels/cuda/emulator` in `LD_LIBRARY_PATH`.
//!
//! `make test-cuda` builds it and sets `SLIMLLM_TEST_CUDA=1`; without that these tests are skipped.

use std::{path::Path, process::Command, sync::Arc};

use safetensors::SafeTensors;
use serde_json::Value;
use slim_formats::{ModelSource, open_model};
use slim_kernels::{FloatCpu, KvType, Scalar, cuda::Device, linalg::Precision};
use slim_runtime::{CudaSettings, Model, Turn};

use crate::{
    command::{Dir, SHORT_TEXT, arg, fail, golden_models, tiny_model},
    end_to_end,
};

/// Whole models, with weights and inputs of products rounded to fp16: measured 1.2e-3 at most.
const LOGITS_ERROR: f64 = 2e-3;
/// Those of each token of every family, of up to twice as many blocks: measured 5.6e-3 at worst,
/// OLMo 3 packed.
const FAMILIES_ERROR: f64 = 8e-3;
/// Those of a token that goes through another expert on the device, where two are about as good.
const TIE_ERROR: f64 = 0.3;
/// The same with keys and values of 8 bits: measured 3.4e-3 at most.
const Q8_LOGITS_ERROR: f64 = 6e-3;

const TOKENS: &str = "1,17,42,5,99,250,7,3,128,64,32,200,11,90";

/// Skips a test on a machine that has not been asked to run it.
macro_rules! need_device {
    () => {
        if std::env::var_os("SLIMLLM_TEST_CUDA").is_none() {
            eprintln!("skipped: SLIMLLM_TEST_CUDA is not set, `make test-cuda` sets it");
            return;
        }
    };
}

/// A packed tiny model, `attn_q`, `ffn_gate` and `ffn_up` in bands.
fn packed(dir: &Dir, name: &str) -> String {
    let file = dir.arg("model.slim.gguf");
    let source = arg(&tiny_model(name));
    run(dir.slimllm("convert").args([&source, "-o", &file]).args([
        "--bits",
        "2",
        "--group-size",
        "32",
        "--samples",
        "4",
        "--context",
        "64",
        "--calibration",
        SHORT_TEXT,
        "--device",
        "cpu",
    ]));
    file
}

/// Runs a command that must succeed; gives what it wrote to stdout and stderr.
fn run(command: &mut Command) -> (String, String) {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let stderr = text(output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    (text(output.stdout), stderr)
}

/// The logits of `model` with some flags, and what the command said.
fn logits(dir: &Dir, model: &str, flags: &[&str]) -> (Vec<f64>, String) {
    let file = dir.path("logits.safetensors");
    let command = &mut dir.slimllm("logits");
    command.args([model, "--tokens", TOKENS, "--force", "-o"]).arg(&file).args(flags);
    let (_, stderr) = run(command);
    (read_logits(&file), stderr)
}

fn read_logits(file: &Path) -> Vec<f64> {
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let (values, _) = tensors.tensor("logits").unwrap().data().as_chunks::<4>();
    values.iter().map(|value| f64::from(f32::from_le_bytes(*value))).collect()
}

/// The logits of `model` on the CPU, with products in floats: a device does not round inputs to 8
/// bits.
fn logits_in_floats(model: &str) -> Vec<f64> {
    let tokens: Vec<u32> = TOKENS.split(',').map(|token| token.parse().unwrap()).collect();
    let source = open_model(Path::new(model)).unwrap();
    widened(end_to_end::logits(source.into(), &FloatCpu(Precision::Fine), &tokens).concat())
}

/// `||found - expected|| / ||expected||`.
fn error(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let difference: f64 = found.iter().zip(expected).map(|(f, e)| (f - e).powi(2)).sum();
    (difference / expected.iter().map(|e| e * e).sum::<f64>()).sqrt()
}

#[track_caller]
fn assert_close(what: &str, found: &[f64], expected: &[f64], bound: f64) {
    let error = error(found, expected);
    assert!(error <= bound, "{what}: relative error {error:e}");
}

#[test]
fn logits_on_the_device_are_those_of_the_cpu() {
    need_device!();
    for name in ["llama", "llama-tied-rope3", "mistral-swa"] {
        let dir = Dir::new();
        for model in [arg(&tiny_model(name)), packed(&dir, name)] {
            let expected = logits_in_floats(&model);
            let (found, said) = logits(&dir, &model, &["--device", "cuda"]);
            assert!(said.contains("on cuda:0 ("), "{said}");
            assert_close(&model, &found, &expected, LOGITS_ERROR);
            let (found, _) = logits(&dir, &model, &["--device", "cuda", "--kv-cache", "q8"]);
            assert_close(&model, &found, &expected, Q8_LOGITS_ERROR);
        }
    }
}

/// The reference is no `Cpu`, which rounds inputs to 8 bits.
#[test]
fn every_tiny_model_on_the_device_agrees_with_the_reference() {
    need_device!();
    let device = Device::open(0).unwrap();
    for folder in golden_models() {
        let name = folder.file_name().unwrap().to_str().unwrap();
        let dir = Dir::new();
        if let Some(lack) = CudaSettings::lacks(open_model(&folder).unwrap().decoder()) {
            let args = ["logits", &arg(&folder), "--tokens", TOKENS, "--device", "cuda", "-o"];
            fail(&[&args[..], &[&dir.arg("a")]].concat(), &[&lack, "CUDA device"]);
            continue;
        }
        for (kind, model) in [("dense", arg(&folder)), ("packed", packed(&dir, name))] {
            let source = open_model(Path::new(&model)).unwrap();
            let has_experts = source.decoder().blocks.iter().any(|block| block.experts.is_some());
            for (way, errors) in errors_on_the_device(&device, source.into()) {
                let [most, worst] = [9 * errors.len() / 10, errors.len()].map(|n| errors[n - 1]);
                println!("{name}, {kind}, {way}: {most:.1e}, at worst {worst:.1e}");
                let bound = if has_experts { TIE_ERROR } else { FAMILIES_ERROR };
                assert!(most <= FAMILIES_ERROR && worst <= bound, "{name}, {kind}, {way}");
            }
        }
    }
}

/// Errors of the logits of each token, the smallest first: of all tokens at once; and of some
/// together, then one by one.
fn errors_on_the_device(
    device: &Arc<Device>,
    source: Arc<dyn ModelSource>,
) -> [(&'static str, Vec<f64>); 2] {
    const PROMPT: usize = 5;
    // Past windows, and past what the short factors of rotary embeddings are for.
    let tokens: Vec<u32> = (0..24).map(|i| (i * i + 7 * i) % 300).collect();
    let devices = vec![(0, Arc::clone(device))];
    let (kv_type, context) = (KvType::F16, tokens.len());
    let vocab = source.config().vocab_size;
    let settings = CudaSettings { devices, blocks: None, kv_type, context };
    let on_device = Model::load_on_cuda(Arc::clone(&source), &settings).unwrap();
    let logits = |model: &Model| {
        let sequence = &mut model.sequence(context).unwrap();
        let turn = Turn { tokens: &tokens, sequence };
        let hidden = model.forward(turn, &mut model.workspace().unwrap()).unwrap();
        widened(model.logits(&hidden).unwrap())
    };
    let expected = logits(&Model::load(source, &Scalar).unwrap());
    let errors = |found: &[f64], expected: &[f64]| {
        let tokens = found.chunks_exact(vocab).zip(expected.chunks_exact(vocab));
        let mut errors: Vec<_> = tokens.map(|(found, expected)| error(found, expected)).collect();
        errors.sort_by(f64::total_cmp);
        errors
    };
    let prefill = errors(&logits(&on_device), &expected);

    let sequence = &mut on_device.sequence(context).unwrap();
    let workspace = &mut on_device.workspace().unwrap();
    let mut step = |tokens| on_device.step(&mut [Turn { tokens, sequence }], workspace).unwrap();
    let (prompt, others) = tokens.split_at(PROMPT);
    let mut decoded = step(prompt);
    for token in others.chunks(1) {
        decoded.extend(step(token));
    }
    let decode = errors(&widened(decoded), &expected[(PROMPT - 1) * vocab..]);
    [("prefill", prefill), ("decode", decode)]
}

/// One token's graph holds addresses of a text and of a workspace.
#[test]
fn texts_take_turns_on_the_device_in_any_workspace() {
    need_device!();
    let devices = vec![(0, Device::open(0).unwrap())];
    let settings = CudaSettings { devices, blocks: None, kv_type: KvType::F16, context: 16 };
    let source = open_model(&tiny_model("llama")).unwrap();
    let model = Model::load_on_cuda(source.into(), &settings).unwrap();
    let texts = [[1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]];
    let alone = texts.map(|text| {
        let sequence = &mut model.sequence(16).unwrap();
        let workspace = &mut model.workspace().unwrap();
        let mut step = |tokens| model.step(&mut [Turn { tokens, sequence }], workspace).unwrap();
        text.chunks(1).map(&mut step).collect::<Vec<_>>()
    });
    let [mut first, mut second] = texts.map(|_| model.sequence(16).unwrap());
    let mut workspaces = [model.workspace().unwrap(), model.workspace().unwrap()];
    for index in 0..texts[0].len() {
        let turns = &mut [
            Turn { tokens: &texts[0][index..=index], sequence: &mut first },
            Turn { tokens: &texts[1][index..=index], sequence: &mut second },
        ];
        let logits = model.step(turns, &mut workspaces[index / 2 % 2]).unwrap();
        assert!(logits == [&alone[0][index][..], &alone[1][index]].concat(), "token {index}");
    }
}

fn widened(values: Vec<f32>) -> Vec<f64> {
    values.into_iter().map(f64::from).collect()
}

#[test]
fn blocks_split_between_cpu_and_device_give_the_same_logits() {
    need_device!();
    let dir = Dir::new();
    // Not packed: there the CPU rounds inputs to 8 bits, and the device does not.
    let model = arg(&tiny_model("llama"));
    let expected = logits_in_floats(&model);
    let (found, said) = logits(&dir, &model, &["--device", "cuda", "--gpu-layers", "1"]);
    assert!(said.contains("1 block on cpu, 1 block on cuda:0 ("), "{said}");
    assert_close("one block on the device", &found, &expected, LOGITS_ERROR);
}

#[test]
fn two_devices_share_the_blocks() {
    need_device!();
    let dir = Dir::new();
    let model = packed(&dir, "llama");
    let expected = logits_in_floats(&model);
    let command = &mut dir.slimllm("logits");
    let file = dir.path("two.safetensors");
    command.args([&model, "--tokens", TOKENS, "--device", "cuda:0,1", "-o"]).arg(&file);
    let (_, said) = run(command.env("SLIMLLM_EMULATOR_DEVICES", "2"));
    assert!(said.contains("1 block on cuda:0 (") && said.contains("1 block on cuda:1 ("), "{said}");
    assert_close("two devices", &read_logits(&file), &expected, LOGITS_ERROR);
}

/// The text that a model makes of a prompt.
fn text(dir: &Dir, model: &str, flags: &[&str]) -> String {
    run(dir.slimllm("run").args([model, "-p", "the quick brown", "-n", "24"]).args(flags)).0
}

#[test]
fn greedy_text_on_the_device_is_that_of_the_cpu() {
    need_device!();
    let dir = Dir::new();
    // Not packed, as above.
    let model = arg(&tiny_model("llama"));
    let greedy = |device| text(&dir, &model, &["--temperature", "0", "--device", device]);
    assert_eq!(greedy("cuda"), greedy("cpu"));
}

#[test]
fn draws_from_tokens_sorted_by_the_device_are_those_from_all_logits() {
    need_device!();
    let dir = Dir::new();
    let model = packed(&dir, "llama");
    // Next to nothing, but where repetition is rewarded the host wants all logits.
    let drawn = |penalty| {
        let fixed = ["--top-k", "5", "--device", "cuda", "--seed", "7", "--repeat-penalty"];
        text(&dir, &model, &[&fixed[..], &[penalty]].concat())
    };
    let expected = drawn("0.9999999");
    assert_eq!(drawn("1"), expected);
    assert_eq!(drawn("1.0000001"), expected);
}

#[test]
fn eval_on_the_device_gives_the_perplexity_of_the_cpu() {
    need_device!();
    let dir = Dir::new();
    let model = packed(&dir, "llama");
    let text = dir.write("text", "It was a bright cold day in April. ".repeat(40));
    let perplexity = |device: &str| {
        let command = &mut dir.slimllm("eval");
        command.args([&model, "--text", &text, "--context", "128", "--json", "--device", device]);
        let json: Value = serde_json::from_str(&run(command).0).unwrap();
        json["perplexity"].as_f64().unwrap()
    };
    let ratio = perplexity("cuda") / perplexity("cpu");
    assert!((ratio - 1.0).abs() < 2e-3, "{ratio}");
}

#[test]
fn bench_on_the_device_names_it() {
    need_device!();
    let dir = Dir::new();
    let model = packed(&dir, "llama");
    let command = &mut dir.slimllm("bench");
    command.args([&model, "--prompt", "8", "--generate", "4", "--runs", "1", "--device", "cuda"]);
    let json: Value = serde_json::from_str(&run(command.arg("--json")).0).unwrap();
    assert!(json["device"].as_str().unwrap().starts_with("cuda:0 ("), "{json}");
    assert!(json["decode_tokens_per_s"].as_f64().unwrap() > 0.0);
    assert!(json["device_memory_bytes"].as_u64().unwrap() > 0);
}

/// Runs a command that must fail; gives what it said.
#[track_caller]
fn refusal(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{command:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn devices_that_are_not_there_are_refused() {
    need_device!();
    let dir = Dir::new();
    let model = arg(&tiny_model("llama"));
    let command = |device: &str| {
        let mut command = dir.slimllm("logits");
        command.args([&model, "--tokens", "1,2", "-o", "out", "--force", "--device", device]);
        command
    };
    let said = refusal(&mut command("cuda:7"));
    assert!(said.contains("there is no CUDA device 7: this machine has one"), "{said}");
    let said = refusal(command("cuda").env("SLIMLLM_EMULATOR_DEVICES", "0"));
    assert!(said.contains("this machine has none") && said.contains("hint:"), "{said}");
    let said = refusal(command("cuda").env("SLIMLLM_EMULATOR_MEMORY", (64 << 20).to_string()));
    assert!(said.contains("free device memory: found 6"), "{said}");
    let said = refusal(command("cuda").env("SLIMLLM_EMULATOR_CUDA", "11080"));
    assert!(said.contains("supports CUDA 11.8") && said.contains("525 or later"), "{said}");
    let said = refusal(command("cuda").env("SLIMLLM_EMULATOR_COMPUTE", "75"));
    assert!(said.contains("compute capability 7.5") && said.contains("Ampere"), "{said}");
    let said = refusal(command("cuda").env_remove("LD_LIBRARY_PATH"));
    assert!(said.contains("no NVIDIA driver was found") && said.contains("hint:"), "{said}");
    let said = refusal(command("cuda").args(["--gpu-layers", "3"]));
    assert!(said.contains("found 3, expected at most 2"), "{said}");

    // `auto` goes on without them, and says why if there is something to mend.
    let said = run(command("auto").env("SLIMLLM_EMULATOR_DEVICES", "0")).1;
    assert_eq!(said, "");
    let said = run(command("auto").env("SLIMLLM_EMULATOR_CUDA", "11080")).1;
    assert!(said.contains("computing on the CPU: the NVIDIA driver supports CUDA 11.8"), "{said}");
}
