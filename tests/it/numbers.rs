//! Numbers on their way into files: held, or named before the work begins.

use std::path::Path;

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use slim_formats::{DType, ModelSource, Weight, open_model, slim::SlimFile};
use slim_kernels::weight::dequantize_rows;

use crate::command::{Dir, SHORT_TEXT, arg, fail, short_text, slimllm, succeed, tiny_model};

const EMBEDDING: &str = "model.embed_tokens.weight";
const VALUES: &str = "model.layers.0.self_attn.v_proj.weight";
const OUTPUTS: &str = "model.layers.0.self_attn.o_proj.weight";
const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

/// The tiny Llama model in F32 or BF16, some of its tensors changed.
fn model_with(dtype: Dtype, change: impl Fn(&str, &mut [f32])) -> Dir {
    let (dir, llama) = (Dir::new(), tiny_model("llama"));
    for entry in std::fs::read_dir(&llama).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path(path.file_name().unwrap().to_str().unwrap())).unwrap();
    }
    let bytes = std::fs::read(llama.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let changed: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let halves = tensor.data().as_chunks().0.iter();
            let mut values: Vec<f32> =
                halves.map(|&half| f16::from_le_bytes(half).to_f32()).collect();
            change(name, &mut values);
            let bytes = match dtype {
                Dtype::BF16 => {
                    values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()
                }
                _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            };
            (name.to_owned(), tensor.shape().to_vec(), bytes)
        })
        .collect();
    let views = changed
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.path("model.safetensors")).unwrap();
    dir
}

/// Converts in no time; gives what was said.
fn convert(source: &Dir, target: &str, more: &[&str]) -> (String, Vec<String>) {
    let source = arg(source.root());
    let quick = ["--samples", "2", "--context", "32", "--json"];
    let fixed = [&["convert", &source, "-o", target, "--force"][..], &quick].concat();
    let answer = succeed(&[&fixed[..], short_text(more), more].concat());
    let warnings = answer.json()["warnings"].as_array().unwrap().clone();
    let warnings = warnings.iter().map(|warning| warning.as_str().unwrap().to_owned());
    (answer.stderr.clone(), warnings.collect())
}

/// Type and values of a tensor of a SliM file that no rule finds fault with.
fn tensor(file: &str, name: &str) -> (Option<DType>, Vec<f32>) {
    let file = SlimFile::open(Path::new(file)).unwrap();
    let faults = file.verify();
    assert!(faults.is_empty(), "{faults:?}");
    let found = file.require(name).unwrap();
    let (rows, cols) = slim_kernels::weight::shape(found);
    let mut values = vec![0.0; rows * cols];
    dequantize_rows(found, 0..rows, &mut values).unwrap();
    let dtype = match found {
        Weight::Dense(dense) => Some(dense.dtype),
        Weight::Packed(_) | Weight::Bands(_) => None,
    };
    (dtype, values)
}

fn source_values(dir: &Dir, name: &str) -> Vec<f32> {
    let source = open_model(dir.root()).unwrap();
    let found = source.require(name).unwrap();
    let (rows, cols) = slim_kernels::weight::shape(found);
    let mut values = vec![0.0; rows * cols];
    dequantize_rows(found, 0..rows, &mut values).unwrap();
    values
}

#[test]
fn kept_matrix_beyond_f16_is_kept_in_a_type_that_holds_it() {
    for (value, dtype, kept) in [
        (1e5, Dtype::BF16, DType::BF16),
        (-3e38, Dtype::BF16, DType::BF16),
        (70_000.0, Dtype::F32, DType::F32),
    ] {
        let source = model_with(dtype, |name, values| {
            if name == EMBEDDING {
                values[64 * 7 + 3] = value;
            }
        });
        let out = &source.arg("out.gguf");
        for more in [&["--embed-bits", "16", "--method", "rtn"][..], &["--reference"]] {
            if value < 0.0 && more == ["--reference"] {
                // No calibration survives this one.
                continue;
            }
            let (said, warnings) = convert(&source, out, more);
            let (found, values) = tensor(out, "token_embd.weight");
            assert_eq!(found, Some(kept));
            assert_eq!(values, source_values(&source, "token_embd.weight"));
            let warning = &warnings[0];
            assert!(warning.starts_with("`token_embd.weight` is kept as"), "{warning}");
            assert!(warning.ends_with(" in row 7") && said.contains(warning), "{said}");
        }
    }
}

#[test]
fn kept_matrix_that_f16_would_lose_is_kept_in_a_type_that_holds_it() {
    let source = model_with(Dtype::F32, |name, values| {
        if name == EMBEDDING {
            values.iter_mut().for_each(|value| *value *= 1e-9);
        }
    });
    let out = &source.arg("out.gguf");
    let (_, warnings) = convert(&source, out, &["--embed-bits", "16"]);
    let (dtype, values) = tensor(out, "token_embd.weight");
    assert_eq!(dtype, Some(DType::F32));
    assert_eq!(values, source_values(&source, "token_embd.weight"));
    assert!(warnings[0].contains("values as small as its own"), "{warnings:?}");
}

#[test]
fn layer_whose_scales_f16_does_not_reach_is_not_quantized() {
    for scale in [1e-20, 1e-8, 1e7, 1e30] {
        let source = model_with(Dtype::F32, |name, values| {
            if name == VALUES {
                values.iter_mut().for_each(|value| *value *= scale);
            }
        });
        let out = &source.arg("out.gguf");
        for more in [["--bits", "1"], ["--bits", "8"], ["--scales", "paper"]] {
            let (_, warnings) = convert(&source, out, &[&["--method", "rtn"][..], &more].concat());
            let (dtype, values) = tensor(out, "blk.0.attn_v.weight");
            assert_eq!((warnings.len(), dtype), (1, Some(DType::F32)), "{scale}: {warnings:?}");
            assert_eq!(values, source_values(&source, "blk.0.attn_v.weight"));
            assert!(warnings[0].starts_with("`blk.0.attn_v.weight` is kept as F32: f16 scales"));
        }
    }
}

/// Every scale between those of a usual layer and those that f16 does not reach.
#[test]
fn layer_of_any_size_is_neither_lost_nor_infinite() {
    for scale in [1e-6, 1e-5, 1e-4, 1e-2, 1e2, 1e4, 1e5, 1e6] {
        let source = model_with(Dtype::F32, |name, values| {
            if name == VALUES {
                values.iter_mut().for_each(|value| *value *= scale);
            }
        });
        let out = &source.arg("out.gguf");
        let expected = source_values(&source, "blk.0.attn_v.weight");
        for scales in ["two-level", "trellis", "paper"] {
            for bits in ["4", "8"] {
                convert(&source, out, &["--method", "rtn", "--scales", scales, "--bits", bits]);
                let (_, values) = tensor(out, "blk.0.attn_v.weight");
                let square = |values: &mut dyn Iterator<Item = f32>| {
                    values.map(|value| f64::from(value).powi(2)).sum::<f64>()
                };
                let error = square(&mut values.iter().zip(&expected).map(|(a, b)| a - b));
                let loss = error / square(&mut expected.iter().copied());
                assert!(loss < 0.02, "{scale}, {scales}, {bits} bits: {loss}");
            }
        }
    }
}

#[test]
fn value_that_is_no_number_is_named_before_the_work_begins() {
    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let source = model_with(Dtype::F32, |name, values| {
            if name == DOWN {
                values[160 * 5 + 1] = value;
            }
        });
        let (model, out) = (&arg(source.root()), &source.arg("out"));
        let fragment = format!("tensor `blk.1.ffn_down.weight`: found {shown} in row 5, expected");
        for more in
            [&["--method", "slim"][..], &["--method", "rtn"], &["--reference"], &["--dry-run"]]
        {
            let answer = slimllm(&[&["convert", model, "-o", out, "--force"][..], more].concat());
            answer.fails(&[&fragment]);
            assert!(!answer.stderr.contains("survey"), "{}", answer.stderr);
        }
        for layout in ["gguf", "safetensors", "onnx"] {
            fail(&["export", model, "--to", layout, "-o", out], &[&fragment]);
        }
        assert!(!source.path("out").exists());
        let answer = slimllm(&["inspect", model, "--verify", "--json"]);
        assert_eq!(answer.code, 1);
        let fault = &answer.json()["faults"][0];
        assert_eq!(
            (&fault["place"], &fault["found"]),
            (&"tensor `blk.1.ffn_down.weight`, row 5".into(), &shown.into())
        );
        let file = &source.arg("model.safetensors");
        assert_eq!(slimllm(&["inspect", file, "--verify"]).code, 1);
    }
}

#[test]
fn export_beyond_fp16_names_tensor_and_row() {
    let source = model_with(Dtype::F32, |name, values| {
        if name == DOWN {
            values[160 * 9] = -70_000.0;
        }
    });
    let (model, out) = (&arg(source.root()), &source.arg("out"));
    let fragment = "tensor `blk.1.ffn_down.weight`: found -70000 in row 9, expected what fp16 can";
    fail(&["export", model, "--to", "safetensors", "-o", out], &[fragment]);
    assert!(!source.path("out").exists());
    // A llama.cpp file keeps F32.
    succeed(&["export", model, "--to", "gguf", "-o", out, "--quiet"]);
}

#[test]
fn activations_out_of_range_are_named_with_what_to_try() {
    let source = model_with(Dtype::F32, |name, values| {
        if [VALUES, OUTPUTS].contains(&name) {
            values.iter_mut().for_each(|value| *value *= 1e20);
        }
    });
    let (model, out) = (&arg(source.root()), &source.arg("out"));
    let convert = ["convert", model, "-o", out, "--force", "--samples", "2", "--context", "32"];
    let convert = [&convert[..], &["--calibration", SHORT_TEXT]].concat();
    for (method, place) in [("slim", "`blk.0`: found"), ("gptq", "`blk.0.ffn_gate.weight`: found")]
    {
        let fragments =
            [place, "on the calibration text", "hint: try more `--samples`", "`--method rtn`"];
        fail(&[&convert[..], &["--method", method]].concat(), &fragments);
    }
    assert!(!source.path("out").exists());
    let text = &source.write("text", "words ".repeat(200));
    let eval = ["eval", model, "--text", text, "--context", "32", "--windows", "1"];
    fail(&eval, &["its logits are no finite numbers"]);
}

#[test]
fn file_names_the_instruction_path_that_decided_its_bytes() {
    let dir = Dir::new();
    let (model, out) = (&arg(&tiny_model("llama")), &dir.arg("out.gguf"));
    let version = succeed(&["--version"]).stdout;
    let path = slim_kernels::instruction_path();
    assert!(version.starts_with("slimllm 0.1.0 ("), "{version}");
    assert!(version.contains("commit") && version.ends_with(&format!(", {path})\n")), "{version}");
    let convert = ["convert", model, "-o", out, "--force", "--samples", "2", "--context", "32"];
    for (method, recorded) in [("slim", true), ("gptq", true), ("slim+", true), ("rtn", false)] {
        let more = ["--method", method, "--device", "cpu", "--quiet"];
        let steps: &[&str] = if method == "slim+" { &["--steps", "2"] } else { &[] };
        succeed(&[&convert[..], &more, short_text(&more), steps].concat());
        let metadata = &succeed(&["inspect", out, "--json", "--metadata"]).json()["metadata"];
        let found = metadata.get("slim.quantization.instructions");
        assert_eq!(found.and_then(|found| found.as_str()), recorded.then_some(path.as_str()));
        std::fs::remove_file(out).unwrap();
    }
}
