//! What is read of a source, what is refused, what is warned of: by whole sentences.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use half::f16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use crate::command::{Dir, arg, fail, onnx_model, slimllm, succeed, tiny_model};

const LFS: &str =
    "version https://example.org/spec/v1\noid sha256:4d7a214614ab2935\nsize 134515008\n";

/// A copy of a tiny model of the repository in the folder `m` of a temporary one.
fn model() -> (Dir, PathBuf) {
    let dir = Dir::new();
    let folder = dir.path("m");
    copy_folder(&tiny_model("llama"), &folder);
    (dir, folder)
}

pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        // Logits, not weights.
        if !path.ends_with("expected.safetensors") {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// A tensor of a copy: its shape, its values, and their type.
pub type StoredTensor = (Vec<usize>, Vec<u8>, Dtype);

/// Copies a tiny model with other tensors.
pub fn copy_with_tensors(
    name: &str,
    folder: &Path,
    change: impl Fn(&mut HashMap<String, StoredTensor>),
) {
    copy_folder(&tiny_model(name), folder);
    let file = folder.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let copied = |(name, view): (String, TensorView<'_>)| {
        (name, (view.shape().to_vec(), view.data().to_vec(), view.dtype()))
    };
    let mut tensors: HashMap<String, StoredTensor> =
        tensors.tensors().into_iter().map(copied).collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, (shape, bytes, dtype))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::remove_file(&file).unwrap();
    safetensors::serialize_to_file(views, None, &file).unwrap();
}

/// Changes keys of a JSON file.
fn change(path: &Path, changes: Value) {
    let mut json: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    fs::write(path, json.to_string()).unwrap();
}

/// Changes the values of an F16 tensor of a safetensors file.
pub fn change_tensor(file: &Path, name: &str, change: impl FnOnce(&mut [f16])) {
    let mut bytes = fs::read(file).unwrap();
    let (header_bytes, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let info = header.info(name).unwrap();
    assert_eq!(info.dtype, Dtype::F16, "{name}");
    let start = 8 + header_bytes;
    let bytes_of = &mut bytes[start + info.data_offsets.0..start + info.data_offsets.1];
    let values = bytes_of.chunks_exact(2).map(|value| f16::from_le_bytes([value[0], value[1]]));
    let mut values: Vec<f16> = values.collect();
    change(&mut values);
    for (bytes, value) in bytes_of.chunks_exact_mut(2).zip(values) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
    fs::write(file, bytes).unwrap();
}

/// What `run` says when it refuses a model, with the folder of the test as `DIR`.
fn refusal(dir: &Dir, model: &Path) -> String {
    let answer = slimllm(&["run", &arg(model), "-p", "a"]);
    assert_eq!(answer.code, 2, "{}{}", answer.stdout, answer.stderr);
    answer.stderr.replace(&arg(dir.root()), "DIR").trim_end().to_owned()
}

#[test]
fn what_is_no_model_is_refused_with_the_way_to_one() {
    type Make = fn(&Path);
    const PAGE: &str = "download the file itself, not the page about it; a server that wants a \
                        login or does not find the file answers with such a page";
    const PULL: &str =
        "run `git lfs pull` in the folder of the repository, or download the file itself";
    const PICKLE: &str =
        "load it with transformers and save it with `save_pretrained`, which writes safetensors";
    let cases: [(&str, Make, String); 22] = [
        (
            "x.gguf",
            |dir| fs::write(dir.join("x.gguf"), LFS).unwrap(),
            format!(
                "`DIR/x.gguf` is a Git LFS pointer to 134515008 bytes, not a model\n\nhint: {PULL}"
            ),
        ),
        (
            "x.gguf",
            |dir| fs::write(dir.join("x.gguf"), "<!doctype html>\n<html>").unwrap(),
            format!("`DIR/x.gguf` is an HTML page, not a model\n\nhint: {PAGE}"),
        ),
        (
            "x.gguf",
            |dir| fs::write(dir.join("x.gguf"), "Entry not found").unwrap(),
            format!(
                "`DIR/x.gguf` is a text of 15 bytes (`Entry not found`), not a model\n\nhint: {PAGE}"
            ),
        ),
        (
            "x.gguf",
            |dir| fs::write(dir.join("x.gguf"), "").unwrap(),
            "`DIR/x.gguf` is an empty file, not a model\n\nhint: download the file again".into(),
        ),
        (
            "m",
            |dir| fs::write(dir.join("m/model.safetensors"), LFS).unwrap(),
            format!(
                "`DIR/m/model.safetensors` is a Git LFS pointer to 134515008 bytes, not a \
                 safetensors file\n\nhint: {PULL}"
            ),
        ),
        (
            "m",
            |dir| fs::write(dir.join("m/tokenizer.json"), LFS).unwrap(),
            format!(
                "`DIR/m/tokenizer.json` is a Git LFS pointer to 134515008 bytes, not a JSON file\
                 \n\nhint: {PULL}"
            ),
        ),
        (
            "m/x.onnx",
            |dir| fs::write(dir.join("m/x.onnx"), LFS).unwrap(),
            format!(
                "`DIR/m/x.onnx` is a Git LFS pointer to 134515008 bytes, not an ONNX model\
                 \n\nhint: {PULL}"
            ),
        ),
        (
            "m",
            |dir| fs::remove_file(dir.join("m/config.json")).unwrap(),
            "`DIR/m/config.json`: there is no such file; it says what the model computes\n\n\
             hint: copy the `config.json` of the model's repository into this folder"
                .into(),
        ),
        (
            "m",
            |dir| change(&dir.join("m/config.json"), json!({"rms_norm_eps": null})),
            "`DIR/m/config.json`: key `rms_norm_eps`: found none, expected a number\n\n\
             hint: copy the file from the model's repository again, or add the key"
                .into(),
        ),
        (
            "m",
            |dir| fs::remove_file(dir.join("m/tokenizer.json")).unwrap(),
            "`DIR/m/tokenizer.json`: there is no such file; it says which tokens a text has\n\n\
             hint: copy the `tokenizer.json` of the model's repository into this folder"
                .into(),
        ),
        (
            "m",
            |dir| fs::rename(dir.join("m/tokenizer.json"), dir.join("m/tokenizer.model")).unwrap(),
            "`DIR/m/tokenizer.json`: there is no such file; it says which tokens a text has\n\n\
             hint: the folder has `tokenizer.model`, from which transformers makes \
             `tokenizer.json`: `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`"
                .into(),
        ),
        (
            "m/model-00002-of-00003.safetensors",
            |dir| {
                let from = dir.join("m/model.safetensors");
                fs::rename(from, dir.join("m/model-00002-of-00003.safetensors")).unwrap();
            },
            "`DIR/m/model-00002-of-00003.safetensors` is part 2 of 3, not a whole model\n\n\
             hint: download `model.safetensors.index.json` and give the folder; missing beside \
             it: `model-00001-of-00003.safetensors`, `model-00003-of-00003.safetensors`"
                .into(),
        ),
        (
            "m",
            |dir| {
                let from = dir.join("m/model.safetensors");
                fs::rename(from, dir.join("m/model-00002-of-00002.safetensors")).unwrap();
            },
            "`DIR/m/model.safetensors.index.json`: there is no such file; it says which tensor is \
             in which of the 2 parts\n\n\
             hint: download it; missing beside it: `model-00001-of-00002.safetensors`"
                .into(),
        ),
        (
            "m",
            |dir| {
                fs::remove_file(dir.join("m/model.safetensors")).unwrap();
                let index = json!({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}});
                fs::write(dir.join("m/model.safetensors.index.json"), index.to_string()).unwrap();
                fs::write(dir.join("m/a.safetensors"), "").unwrap();
            },
            "`DIR/m/b.safetensors`: there is no such file; `model.safetensors.index.json` names 2 \
             files, of which 1 is missing: `b.safetensors`\n\nhint: download what is missing"
                .into(),
        ),
        (
            "m",
            |dir| {
                fs::remove_file(dir.join("m/model.safetensors")).unwrap();
                fs::write(dir.join("m/pytorch_model.bin"), "").unwrap();
            },
            format!(
                "`DIR/m`: a model stored as PyTorch pickles (`pytorch_model.bin`) is not supported\
                 \n\nhint: {PICKLE}"
            ),
        ),
        (
            "m",
            |dir| {
                fs::remove_file(dir.join("m/model.safetensors")).unwrap();
                fs::write(dir.join("m/b.Q8_0.gguf"), "").unwrap();
                fs::write(dir.join("m/a.Q4_0.gguf"), "").unwrap();
            },
            "`DIR/m` is a folder with 2 GGUF files, not a folder with a model\n\n\
             hint: give one of them instead: `a.Q4_0.gguf`, `b.Q8_0.gguf`"
                .into(),
        ),
        (
            "m",
            |dir| {
                fs::remove_file(dir.join("m/model.safetensors")).unwrap();
                fs::create_dir(dir.join("m/onnx")).unwrap();
                fs::write(dir.join("m/onnx/model.onnx"), "").unwrap();
            },
            "`DIR/m` is a folder with 1 ONNX file, not a folder with a model\n\n\
             hint: give the `.onnx` file instead: `onnx/model.onnx`"
                .into(),
        ),
        (
            "lora",
            |dir| {
                fs::create_dir(dir.join("lora")).unwrap();
                let config = json!({"base_model_name_or_path": "org/base", "r": 8});
                fs::write(dir.join("lora/adapter_config.json"), config.to_string()).unwrap();
                fs::write(dir.join("lora/adapter_model.safetensors"), "").unwrap();
            },
            "`DIR/lora` is a LoRA adapter of `org/base`, not a whole model\n\n\
             hint: merge it into its base model with PEFT: `merge_and_unload()`, then \
             `save_pretrained(FOLDER)`, and give that folder"
                .into(),
        ),
        (
            "empty",
            |dir| fs::create_dir(dir.join("empty")).unwrap(),
            "`DIR/empty` is an empty folder, not a folder with a model\n\n\
             hint: download the model into it"
                .into(),
        ),
        (
            "",
            |_| {},
            "`DIR/` is a folder of models, not a folder with a model\n\n\
             hint: give one of them: `m`"
                .into(),
        ),
        (
            "cache",
            |dir| {
                fs::create_dir_all(dir.join("cache/snapshots/abc123")).unwrap();
                fs::create_dir_all(dir.join("cache/blobs")).unwrap();
            },
            "`DIR/cache`: a hub's cache whose `refs/main` names no snapshot is not supported\n\n\
             hint: give one of the folders in `DIR/cache/snapshots`: `abc123`"
                .into(),
        ),
        (
            "m/config.json",
            |_| {},
            "`DIR/m/config.json`: this kind of file is not supported\n\n\
             hint: give the folder that it lies in"
                .into(),
        ),
    ];
    for (name, make, expected) in cases {
        let (dir, _) = model();
        make(dir.root());
        assert_eq!(refusal(&dir, &dir.path(name)), format!("error: {expected}"), "{name}");
    }
}

#[test]
fn keys_that_change_the_computation_are_refused_or_warned_of() {
    let (dir, folder) = model();
    let config = folder.join("config.json");
    let original = fs::read(&config).unwrap();
    for (changes, what) in [
        (json!({"qk_layernorm": true}), "key `qk_layernorm` of true in a llama model"),
        (json!({"logits_scaling": 8.0}), "key `logits_scaling` of 8.0 in a llama model"),
        (
            json!({"rope_parameters": null, "rope_scaling": {"factor": 4.0}}),
            "key `factor` of `rope_scaling` with RoPE scaling `default`: 4.0",
        ),
        (json!({"rope_fraction": 0.5}), "key `rope_fraction` of 0.5 in a llama model"),
    ] {
        change(&config, changes);
        let expected = format!("error: `DIR/m/config.json`: {what} is not supported");
        assert_eq!(refusal(&dir, &folder), expected);
        fs::write(&config, &original).unwrap();
    }
    change(&config, json!({"wavelet_gate": 3}));
    let answer = succeed(&["run", &arg(&folder), "-p", "a", "-n", "1"]);
    let warning =
        "config.json`: key `wavelet_gate` of 3 is not read: it is unknown in a llama model\n";
    assert_eq!(answer.stderr.matches(warning).count(), 1, "{}", answer.stderr);
    assert!(answer.stderr.starts_with("warning: "), "{}", answer.stderr);
}

/// The text model of one that also sees, as transformers and older releases store it.
#[test]
fn text_model_of_a_wrapper_is_taken_and_the_rest_is_named() {
    for (prefix, head) in
        [("language_model.", "language_model."), ("", ""), ("model.language_model.", "")]
    {
        let dir = Dir::new();
        let folder = dir.path("m");
        copy_folder(&tiny_model("gemma3"), &folder);
        let config = folder.join("config.json");
        let text: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        let wrapper = json!({
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
            "text_config": text, "vision_config": {"hidden_size": 8},
        });
        fs::write(&config, wrapper.to_string()).unwrap();
        let rename = |name: &str| match name.strip_prefix("model.") {
            Some(rest) if prefix == "model.language_model." => format!("{prefix}{rest}"),
            _ => format!("{}{name}", if name.starts_with("lm_head") { head } else { prefix }),
        };
        with_tensors(
            &folder.join("model.safetensors"),
            rename,
            &[("vision_tower.p", vec![2, 3, 2])],
        );
        let logits = |model: &Path| {
            let out = dir.arg("logits");
            let args = ["logits", &arg(model), "--tokens", "1,2,3", "-o", &out, "--force"];
            (succeed(&args).stderr, fs::read(&out).unwrap())
        };
        let (talk, found) = logits(&folder);
        assert!(found == logits(&tiny_model("gemma3")).1, "{prefix}");
        let expected = "only the text model is used; left out: `vision_tower` (1 tensors)";
        assert!(talk.contains(expected), "{talk}");
    }
}

/// Codes of 8 bits with a scale per block, per row or per tensor compute what the same weights do
/// in f32.
#[test]
fn weights_in_fp8_are_read_with_their_scales() {
    let logits = |dir: &Dir, folder: &Path| {
        let out = dir.arg("logits");
        succeed(&["logits", &arg(folder), "--tokens", "1,2,3", "-o", &out, "--force"]);
        fs::read(&out).unwrap()
    };
    type ScaleShape = fn(usize, usize) -> Vec<usize>;
    let kinds: [(&str, ScaleShape); 4] = [
        ("weight_scale_inv", |rows, cols| vec![rows.div_ceil(32), cols.div_ceil(32)]),
        ("weight_scale", |rows, _| vec![rows, 1]),
        ("weight_scale", |_, _| vec![]),
        ("qscale_weight", |_, _| vec![1]),
    ];
    // Phi-3 has fused matrices, parts of which begin within the blocks.
    for ((suffix, shape), model) in kinds.into_iter().zip(["llama", "phi3", "phi3", "llama"]) {
        let dir = Dir::new();
        let [fp8, plain] = ["fp8", "plain"].map(|name| {
            copy_folder(&tiny_model(model), &dir.path(name));
            dir.path(name)
        });
        to_fp8(&fp8.join("model.safetensors"), &plain.join("model.safetensors"), suffix, shape);
        let quantization = json!({"quantization_config": {"quant_method": "fp8"}});
        change(&fp8.join("config.json"), quantization);
        assert!(logits(&dir, &fp8) == logits(&dir, &plain), "{suffix}, {model}");
        let answer = succeed(&["inspect", &arg(&fp8)]);
        assert!(answer.stdout.contains("F8_E4M3"), "{}", answer.stdout);
        let gguf = dir.path("m.gguf");
        succeed(&["export", &arg(&fp8), "--to", "gguf", "-o", &arg(&gguf)]);
        assert!(logits(&dir, &gguf) == logits(&dir, &plain), "{suffix}, {model}");
    }
}

/// Replaces the matrices of the blocks in two copies of a model: in one by random codes and
/// scales, in the other by what they are worth.
fn to_fp8(fp8: &Path, plain: &Path, suffix: &str, shape: impl Fn(usize, usize) -> Vec<usize>) {
    let value = |code: u8| {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
        let sign = if code < 128 { 1.0 } else { -1.0 };
        match exponent {
            0 => sign * mantissa * 2f32.powi(-6),
            _ => sign * (1.0 + mantissa) * 2f32.powi(exponent - 7),
        }
    };
    let bytes = fs::read(fp8).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (mut coded, mut worth) = (Vec::new(), Vec::new());
    for (name, view) in file.tensors() {
        let dims = view.shape().to_vec();
        if dims.len() != 2 || !name.contains(".layers.") {
            let kept = (name, view.dtype(), dims, view.data().to_vec());
            coded.push(kept.clone());
            worth.push(kept);
            continue;
        }
        let (rows, cols) = (dims[0], dims[1]);
        // All codes but those that are not numbers.
        let codes: Vec<u8> =
            (0..rows * cols).map(|i| (i * 151 % 126) as u8 | ((i % 2) as u8 * 128)).collect();
        let of_scales = shape(rows, cols);
        let (down, across) = match of_scales[..] {
            [down, across] => (down, across),
            _ => (1, 1),
        };
        let block =
            (rows.div_ceil(down).next_power_of_two(), cols.div_ceil(across).next_power_of_two());
        let scales: Vec<f32> = (0..down * across).map(|i| 0.001 * (1 + i % 5) as f32).collect();
        let weights = codes.iter().enumerate().map(|(i, &code)| {
            let (row, col) = (i / cols, i % cols);
            value(code) * scales[row / block.0 * across + col / block.1]
        });
        let weights: Vec<u8> = weights.flat_map(f32::to_le_bytes).collect();
        let scales: Vec<u8> = scales.into_iter().flat_map(f32::to_le_bytes).collect();
        worth.push((name.clone(), Dtype::F32, dims.clone(), weights));
        coded.push((
            format!("{}.{suffix}", name.trim_end_matches(".weight")),
            Dtype::F32,
            of_scales,
            scales,
        ));
        coded.push((name, Dtype::F8_E4M3, dims, codes));
    }
    for (path, tensors) in [(fp8, coded), (plain, worth)] {
        let views = tensors.iter().map(|(name, dtype, dims, bytes)| {
            (name.clone(), TensorView::new(*dtype, dims.clone(), bytes).unwrap())
        });
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }
}

/// Writes a safetensors file again, its tensors under other names, with more of zeros.
fn with_tensors(path: &Path, rename: impl Fn(&str) -> String, more: &[(&str, Vec<usize>)]) {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let zeros = [0; 1024];
    let renamed = file.tensors().into_iter().map(|(name, view)| (rename(&name), view));
    let more = more.iter().map(|(name, shape)| {
        let bytes = &zeros[..2 * shape.iter().product::<usize>()];
        ((*name).to_owned(), TensorView::new(Dtype::F16, shape.clone(), bytes).unwrap())
    });
    let written = safetensors::serialize(renamed.chain(more), None).unwrap();
    fs::write(path, written).unwrap();
}

#[test]
fn tied_flag_does_not_drop_what_is_stored() {
    let dir = Dir::new();
    let logits = |model: &Path, name: &str| {
        let out = dir.arg(name);
        let answer = succeed(&["logits", &arg(model), "--tokens", "1,2,3", "-o", &out]);
        (fs::read(out).unwrap(), answer.stderr)
    };
    let (expected, silence) = logits(&tiny_model("llama"), "plain");
    assert!(!silence.contains("warning"), "{silence}");

    let (_model, folder) = model();
    change(&folder.join("config.json"), json!({"tie_word_embeddings": true}));
    let (found, talk) = logits(&folder, "folder");
    assert!(found == expected);
    let warning = "`tie_word_embeddings` is true, but the stored `lm_head.weight` is another matrix, \
                   which is used";
    assert!(talk.contains(warning), "{talk}");

    let (onnx, path) = onnx_model("script");
    change(&onnx.path("config.json"), json!({"tie_word_embeddings": true}));
    let (_, talk) = logits(&path, "onnx");
    let warning = "`tie_word_embeddings` is true, but the graph has another matrix for the output";
    assert!(talk.contains(warning), "{talk}");
    assert_eq!(succeed(&["inspect", &arg(&path), "--json"]).json()["parameters"], 127_296);
}

#[test]
fn hub_cache_opens_the_snapshot_of_main() {
    let dir = Dir::new();
    let root = dir.path("models--org--name");
    copy_folder(&tiny_model("llama"), &root.join("snapshots/abc123"));
    fs::create_dir_all(root.join("refs")).unwrap();
    fs::write(root.join("refs/main"), "abc123").unwrap();
    assert_eq!(succeed(&["inspect", &arg(&root), "--json"]).json()["parameters"], 127_296);
}

#[test]
fn onnx_companions_are_found_in_the_folder_above() {
    let (beside, _) = onnx_model("dynamo");
    let dir = Dir::new();
    fs::create_dir(dir.path("onnx")).unwrap();
    for name in beside.names() {
        let folder = if name.starts_with("model.onnx") { dir.path("onnx") } else { dir.path("") };
        fs::copy(beside.path(&name), folder.join(&name)).unwrap();
    }
    let model = dir.path("onnx/model.onnx");
    assert_eq!(succeed(&["inspect", &arg(&model), "--json"]).json()["parameters"], 127_296);
    succeed(&["run", &arg(&model), "-p", "a", "-n", "1"]);

    // Only a folder of that name, and no links out of it.
    fs::rename(dir.path("onnx"), dir.path("other")).unwrap();
    fail(
        &["inspect", &dir.arg("other/model.onnx")],
        &["other/config.json`: there is no such file"],
    );
    #[cfg(unix)]
    {
        fs::rename(dir.path("other"), dir.path("onnx")).unwrap();
        fs::rename(dir.path("config.json"), beside.path("moved.json")).unwrap();
        std::os::unix::fs::symlink(beside.path("moved.json"), dir.path("config.json")).unwrap();
        let fragment = "`config.json`, a link in the folder above, is not supported";
        fail(&["inspect", &arg(&model)], &[fragment]);
    }
}

#[test]
fn rounding_needs_a_tokenizer_too() {
    let (dir, folder) = model();
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    let out = dir.arg("out.slim.gguf");
    let convert = ["convert", &arg(&folder), "-o", &out, "--method", "rtn"];
    fail(&convert, &["tokenizer.json`: there is no such file", "hint: copy the `tokenizer.json`"]);
    assert_eq!(dir.names(), ["m"]);
}

#[test]
fn token_text_twice_is_a_fault_of_the_file() {
    let dir = Dir::new();
    let gguf = dir.path("x.gguf");
    succeed(&["export", &arg(&tiny_model("llama")), "--to", "gguf", "-o", &arg(&gguf)]);
    assert_eq!(slimllm(&["inspect", &arg(&gguf), "--verify"]).code, 0);
    // Two tokens of one byte each, `!` and `"`: the second becomes the first.
    let mut bytes = fs::read(&gguf).unwrap();
    let entry = [&1u64.to_le_bytes()[..], b"!", &1u64.to_le_bytes(), b"\""].concat();
    let at = bytes.windows(entry.len()).position(|window| window == entry).unwrap();
    bytes[at + entry.len() - 1] = b'!';
    fs::write(&gguf, bytes).unwrap();
    let answer = slimllm(&["inspect", &arg(&gguf), "--verify"]);
    let fault = "the text \"!\" of token 0 again as token 1";
    assert!(answer.code == 1 && answer.stdout.contains(fault), "{}", answer.stdout);
    let answer = succeed(&["run", &arg(&gguf), "-p", "!", "-n", "1"]);
    assert!(answer.stderr.contains(&format!("warning: `{}`", arg(&gguf))), "{}", answer.stderr);
    assert!(answer.stderr.contains(fault), "{}", answer.stderr);

    let slim = dir.arg("x.slim.gguf");
    succeed(&["convert", &arg(&gguf), "-o", &slim, "--method", "rtn"]);
    let answer = slimllm(&["inspect", &slim, "--verify", "--json"]);
    assert_eq!((answer.code, &answer.json()["faults"][0]["rule"]), (1, &"F23".into()));
}

#[test]
fn hints_to_verify_are_for_files_where_it_finds_something() {
    let dir = Dir::new();
    let slim = dir.path("x.slim.gguf");
    let source = arg(&tiny_model("llama"));
    succeed(&["convert", &source, "-o", &arg(&slim), "--method", "rtn"]);
    let mut bytes = fs::read(&slim).unwrap();
    let last = bytes.len() - 100;
    bytes[last] ^= 1;
    fs::write(&slim, bytes).unwrap();
    let hint = "hint: `slimllm inspect --verify DIR/x.slim.gguf` lists what is wrong with the file";
    assert!(refusal(&dir, &slim).ends_with(hint));
    assert_eq!(slimllm(&["inspect", "--verify", &arg(&slim)]).code, 1);
}
