//! Mixtures of experts, where they are more than another family: layouts of files, experts that see
//! few tokens, what a token reads.

use std::{collections::HashMap, path::Path};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use slim_formats::{Part, open_model};
use slim_kernels::weight;
use slim_runtime::Model;

use crate::{
    command::{Dir, arg, fail, succeed, tiny_model},
    sources::copy_folder,
};

/// A tensor of a copy: its shape, and f16 values.
type Tensor = (Vec<usize>, Vec<u8>);

/// Copies a tiny model with other tensors.
fn with_tensors(name: &str, folder: &Path, change: impl Fn(&mut HashMap<String, Tensor>)) {
    copy_folder(&tiny_model(name), folder);
    let file = folder.join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: HashMap<String, Tensor> = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name, TensorView::new(Dtype::F16, shape.clone(), bytes).unwrap())
    });
    std::fs::remove_file(&file).unwrap();
    safetensors::serialize_to_file(views, None, &file).unwrap();
}

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
    with_tensors("qwen3-moe", &folder, |tensors| {
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
            tensors.insert(format!("{experts}.gate_up_proj"), (vec![4, 128, 64], gate_up));
            tensors.insert(format!("{experts}.down_proj"), (vec![4, 64, 64], down));
        }
    });
    assert!(logits(&arg(&folder)) == logits(&arg(&tiny_model("qwen3-moe"))));
}

/// As GLM-4.5 has one.
#[test]
fn blocks_that_guess_further_tokens_are_left_out_and_named() {
    let dir = Dir::new();
    let folder = dir.path("model");
    with_tensors("glm4-moe", &folder, |tensors| {
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
    with_tensors("granitemoe", &folder, |tensors| {
        let name = "model.layers.1.block_sparse_moe.input_linear.weight";
        let (shape, bytes) = tensors.get_mut(name).unwrap();
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
    with_tensors("minimax-m2", &folder, |tensors| {
        for block in 0..4 {
            let name = format!("model.layers.{block}.block_sparse_moe.e_score_correction_bias");
            let (_, bytes) = tensors.get_mut(&name).unwrap();
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
