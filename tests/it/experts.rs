//! Mixtures of experts, where they are more than another family: layouts of files, experts that see
//! few tokens, what a token reads.

use std::path::Path;

use half::f16;
use safetensors::{Dtype, SafeTensors};
use slim_formats::{
    DType, Part,
    gguf::{GgufFile, HeaderWriter, NewTensor},
    open_model,
};
use slim_kernels::weight;
use slim_runtime::Model;

use crate::{
    command::{Dir, arg, fail, succeed, test_data, tiny_model},
    sources::copy_with_tensors,
};

fn logits(model: &str) -> Vec<u8> {
    let dir = Dir::new();
    let out = dir.arg("logits.safetensors");
    succeed(&["logits", model, "--tokens", "1,17,42,5,99,250,7,3", "-o", &out]);
    std::fs::read(out).unwrap()
}

/// As transformers may write them since its fifth version.
#[test]
fn experts_in_one_tensor_are_those_in_one_each() {
    let dir = Dir::new();
    let folder = dir.path("fused");
    copy_with_tensors("qwen3-moe", &folder, |tensors| {
        for block in 0..2 {
            let experts = format!("model.layers.{block}.mlp.experts");
            let mut take = |expert: usize, layer: &str| {
                let name = format!("{experts}.{expert}.{layer}_proj.weight");
                tensors.remove(&name).unwrap().1
            };
            let mut gate_up = Vec::new();
            let mut down = Vec::new();
            for expert in 0..4 {
                gate_up.extend(take(expert, "gate"));
                gate_up.extend(take(expert, "up"));
                down.extend(take(expert, "down"));
            }
            let of = |shape: [usize; 3], values| (shape.to_vec(), values, Dtype::F16);
            tensors.insert(format!("{experts}.gate_up_proj"), of([4, 128, 64], gate_up));
            tensors.insert(format!("{experts}.down_proj"), of([4, 64, 64], down));
        }
    });
    assert!(logits(&arg(&folder)) == logits(&arg(&tiny_model("qwen3-moe"))));
}

/// Sizes of the tiny gpt-oss.
const BLOCKS: usize = 4;
const EXPERTS: usize = 6;
const HIDDEN: usize = 64;
const NEURONS: usize = 96;

/// The 4-bit codes and the exponents, one for 32 codes, of `[rows, cols]` of an expert.
struct Mxfp4 {
    cols: usize,
    codes: Vec<u8>,
    exponents: Vec<u8>,
}

impl Mxfp4 {
    fn new(seed: usize, rows: usize, cols: usize) -> Self {
        let codes = (0..rows * cols).map(|i| ((i * 7 + i / 13 + 3 * seed) % 16) as u8).collect();
        let exponents = (0..rows * cols / 32).map(|i| 121 + ((i + seed) % 5) as u8).collect();
        Self { cols, codes, exponents }
    }

    fn value(&self, row: usize, col: usize) -> f32 {
        const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        let at = row * self.cols + col;
        let (code, exponent) = (self.codes[at], self.exponents[at / 32]);
        let sign = if code > 8 { -1.0 } else { 1.0 };
        sign * MAGNITUDES[usize::from(code % 8)] * 2f32.powi(i32::from(exponent) - 127)
    }

    /// Each row from the first to the last column, a byte for two columns.
    fn pairs(&self) -> Vec<u8> {
        self.codes.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect()
    }

    /// Rows from `first` on at a step, as ggml has them.
    fn blocks(&self, first: usize, step: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let blocks: Vec<_> = self.codes.chunks(32).zip(&self.exponents).collect();
        for row in blocks.chunks(self.cols / 32).skip(first).step_by(step) {
            for (codes, exponent) in row {
                bytes.push(**exponent);
                bytes.extend((0..16).map(|i| codes[i] | codes[i + 16] << 4));
            }
        }
        bytes
    }

    /// Column by column.
    fn halves(&self) -> Vec<u8> {
        let rows = self.codes.len() / self.cols;
        let values = (0..self.cols).flat_map(|col| (0..rows).map(move |row| self.value(row, col)));
        values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect()
    }
}

/// Gates and inputs in turns, and what leads back, of each expert of a block.
fn mxfp4_experts(block: usize) -> Vec<(Mxfp4, Mxfp4)> {
    let of_expert = |expert: usize| {
        let seed = block * EXPERTS + expert;
        (Mxfp4::new(seed, 2 * NEURONS, HIDDEN), Mxfp4::new(seed + 1, HIDDEN, NEURONS))
    };
    (0..EXPERTS).map(of_expert).collect()
}

/// Replaces the experts of a copy of the tiny gpt-oss, in MXFP4, or those that are plain by what
/// that is worth.
fn with_mxfp4_experts(folder: &Path, is_plain: impl Fn(&str) -> bool) {
    copy_with_tensors("gpt-oss", folder, |tensors| {
        for block in 0..BLOCKS {
            let experts = mxfp4_experts(block);
            let both = [("gate_up", 2 * NEURONS, HIDDEN), ("down", HIDDEN, NEURONS)];
            for (which, (name, rows, cols)) in both.into_iter().enumerate() {
                let name = format!("model.layers.{block}.mlp.experts.{name}_proj");
                let all = |of_expert: &dyn Fn(&Mxfp4) -> Vec<u8>| -> Vec<u8> {
                    let matrices = experts.iter().map(|pair| [&pair.0, &pair.1][which]);
                    matrices.flat_map(of_expert).collect()
                };
                if is_plain(&name) {
                    let plain = (vec![EXPERTS, cols, rows], all(&Mxfp4::halves), Dtype::F16);
                    tensors.insert(name, plain);
                    continue;
                }
                tensors.remove(&name).unwrap();
                let (blocks, scales) =
                    (vec![EXPERTS, rows, cols / 32, 16], vec![EXPERTS, rows, cols / 32]);
                let codes = (blocks, all(&Mxfp4::pairs), Dtype::U8);
                tensors.insert(format!("{name}_blocks"), codes);
                let exponents = (scales, all(&|matrix| matrix.exponents.clone()), Dtype::U8);
                tensors.insert(format!("{name}_scales"), exponents);
            }
        }
    });
}

/// The same in llama.cpp's file.
fn gguf_with_mxfp4_experts(path: &Path) {
    let whole = GgufFile::open(&test_data("gguf").join("gpt-oss.gguf")).unwrap();
    let experts: Vec<_> = (0..BLOCKS).map(mxfp4_experts).collect();
    let coded = |name: &str| -> Option<Vec<u8>> {
        let (block, name) = name.strip_prefix("blk.")?.split_once('.')?;
        let experts = experts[block.parse::<usize>().unwrap()].iter();
        Some(match name {
            "ffn_gate_exps.weight" => experts.flat_map(|pair| pair.0.blocks(0, 2)).collect(),
            "ffn_up_exps.weight" => experts.flat_map(|pair| pair.0.blocks(1, 2)).collect(),
            "ffn_down_exps.weight" => experts.flat_map(|pair| pair.1.blocks(0, 1)).collect(),
            _ => return None,
        })
    };
    let tensors = whole.tensors().iter().map(|info| {
        let coded = coded(&info.name);
        let dtype = if coded.is_some() { DType::MXFP4 } else { info.dtype };
        let new = NewTensor { name: info.name.clone(), dtype, shape: info.shape.clone() };
        (new, coded.unwrap_or_else(|| whole.bytes_of(info).to_vec()))
    });
    let (infos, data): (Vec<_>, Vec<_>) = tensors.unzip();
    let header = HeaderWriter::new(path, whole.metadata(), &infos, 32).unwrap();
    let mut bytes = header.bytes().to_vec();
    bytes.resize(header.file_bytes() as usize, 0);
    for (data, &offset) in data.iter().zip(header.tensor_offsets()) {
        bytes[offset as usize..][..data.len()].copy_from_slice(data);
    }
    std::fs::write(path, bytes).unwrap();
}

/// Checks that two models have the same tensors.
fn assert_same_weights(found: &Path, expected: &Path) {
    let [found, expected] = [found, expected].map(|path| open_model(path).unwrap());
    for name in expected.tensor_names() {
        let [found, expected] = [&found, &expected].map(|model| {
            let weight = model.require(name).unwrap();
            let (rows, cols) = weight::shape(weight);
            let mut values = vec![0.0; rows * cols];
            weight::dequantize_rows(weight, 0..rows, &mut values).unwrap();
            values
        });
        assert!(found == expected, "{name}");
    }
}

/// As OpenAI and llama.cpp publish gpt-oss.
#[test]
fn experts_in_mxfp4_are_what_their_codes_are_worth() {
    let dir = Dir::new();
    let [coded, plain, out] = ["coded", "plain", "out"].map(|name| dir.path(name));
    let gguf = dir.path("coded.gguf");
    with_mxfp4_experts(&coded, |_| false);
    with_mxfp4_experts(&plain, |_| true);
    gguf_with_mxfp4_experts(&gguf);
    for (model, kind) in [(&coded, "F4_E2M1"), (&gguf, "MXFP4")] {
        assert_same_weights(model, &plain);
        let model = &arg(model);
        assert!(succeed(&["inspect", model]).stdout.contains(kind));
        let answer = succeed(&["convert", model, "--dry-run", "-o", &dir.arg("a.slim.gguf")]);
        let warning = format!("the source's weights are already rounded ({kind}");
        assert!(answer.stderr.contains(&warning), "{}", answer.stderr);
    }
    // Column by column again.
    succeed(&["export", &arg(&coded), "--to", "safetensors", "-o", &arg(&out)]);
    assert_same_weights(&out, &plain);
    let [coded, out] = [coded, out].map(|folder| logits(&arg(&folder)));
    let [coded, out] = [&coded, &out].map(|file| {
        let file = SafeTensors::deserialize(file).unwrap();
        let logits = file.tensor("logits").unwrap().data().to_vec();
        let values = logits.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
        values.collect::<Vec<f32>>()
    });
    let pairs = coded.iter().zip(&out);
    let difference = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let largest = out.iter().map(|value| value.abs()).fold(0.0, f32::max);
    assert!(difference < 1e-4 * largest, "{difference} of {largest}");
}

/// Square matrices in MXFP4 would otherwise be read column by column, or plain ones row by row.
#[test]
fn experts_of_which_some_are_in_mxfp4_are_refused() {
    let dir = Dir::new();
    for (name, matrix, kind) in [
        ("a", "down_proj", "F16 in a model with experts in MXFP4"),
        ("b", "gate_up_proj", "F4_E2M1"),
    ] {
        let folder = dir.path(name);
        with_mxfp4_experts(&folder, |name| name.ends_with(matrix));
        let fragments = ["mlp.experts.down_proj` of type", kind];
        fail(&["logits", &arg(&folder), "--tokens", "1", "-o", &dir.arg("a.out")], &fragments);
    }
}

/// As GLM-4.5 has one.
#[test]
fn blocks_that_guess_further_tokens_are_left_out_and_named() {
    let dir = Dir::new();
    let folder = dir.path("model");
    copy_with_tensors("glm4-moe", &folder, |tensors| {
        let norm = tensors["model.norm.weight"].clone();
        tensors.insert("model.layers.4.enorm.weight".into(), norm);
    });
    let model = &arg(&folder);
    assert!(logits(model) == logits(&arg(&tiny_model("glm4-moe"))));
    let answer = succeed(&["inspect", model]);
    let warning = "blocks that guess further tokens are left out (1 tensors)";
    assert!(answer.stderr.contains(warning), "{}", answer.stderr);
}

#[test]
fn experts_of_another_number_than_the_configurations_are_refused() {
    let dir = Dir::new();
    let folder = dir.path("model");
    copy_with_tensors("granitemoe", &folder, |tensors| {
        let name = "model.layers.1.block_sparse_moe.input_linear.weight";
        let (shape, bytes, _) = tensors.get_mut(name).unwrap();
        shape[0] = 5;
        bytes.truncate(bytes.len() / 6 * 5);
    });
    let fragments = ["block_sparse_moe.input_linear.weight", "[960, 64]", "[1152, 64]"];
    fail(&["logits", &arg(&folder), "--tokens", "1", "-o", &dir.arg("a")], &fragments);
}

/// A correction keeps expert 5 of every block from being chosen: it is named, calibrated on all
/// tokens, and the others are none the worse for it.
#[test]
fn expert_that_never_fires_is_named_and_calibrated_on_all_tokens() {
    let dir = Dir::new();
    let (folder, out) = (dir.path("model"), dir.arg("a.slim.gguf"));
    copy_with_tensors("minimax-m2", &folder, |tensors| {
        for block in 0..4 {
            let name = format!("model.layers.{block}.block_sparse_moe.e_score_correction_bias");
            let (_, bytes, _) = tensors.get_mut(&name).unwrap();
            // -100 in f16.
            bytes[10..12].copy_from_slice(&0xd640u16.to_le_bytes());
        }
    });
    let convert = ["convert", &arg(&folder), "-o", &out, "--bits", "3", "--json"];
    let size = ["--group-size", "32", "--samples", "8", "--context", "64"];
    let answer = succeed(&[&convert[..], &size].concat());
    assert!(answer.stderr.contains("expert 5 of block 0 (0)"), "{}", answer.stderr);
    let report = answer.json();
    assert!(report["degenerate"]["seldom_experts"].as_u64().unwrap() >= 4, "{report}");
    let layers = report["layers"].as_array().unwrap();
    let of_expert = |layer: &&serde_json::Value| {
        layer["name"].as_str().unwrap().contains("ffn_down_exps.5.weight")
    };
    let errors: Vec<f64> =
        layers.iter().filter(of_expert).map(|layer| layer["error"].as_f64().unwrap()).collect();
    assert_eq!(errors.len(), 4);
    assert!(errors.iter().all(|&error| error < 0.1), "{errors:?}");
    for domain in report["quality"].as_array().unwrap() {
        assert!(domain["kl_mean"].as_f64().unwrap() < 0.1, "{domain}");
    }
}

#[test]
fn a_token_reads_the_experts_that_it_goes_through() {
    let model = Model::open(tiny_model("glm4-moe")).unwrap();
    let source = open_model(&tiny_model("glm4-moe")).unwrap();
    let bytes = |is_of_expert: bool| -> u64 {
        let tensors = source.decoder().tensors().iter().filter(|tensor| {
            let is_read = tensor.is_matrix() && tensor.part != Part::Embedding;
            is_read && matches!(tensor.part, Part::Expert(..)) == is_of_expert
        });
        tensors.map(|tensor| weight::stored_bytes(source.require(&tensor.name).unwrap())).sum()
    };
    assert_eq!(model.bytes_per_token(), bytes(false) + bytes(true) * 3 / 8);
}
