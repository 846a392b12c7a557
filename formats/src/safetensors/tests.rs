use std::{collections::BTreeMap, fs};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::DType;

/// A model of the test data; `MANIFEST.md` there says where it comes from.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/archs").join(name)
}

#[test]
fn golden_models_are_opened() {
    for (name, is_tied, window) in
        [("llama", false, None), ("llama-tied-rope3", true, None), ("mistral-swa", false, Some(16))]
    {
        let model = HfDirectory::open(&golden(name)).unwrap();
        let config = model.config();
        assert_eq!((config.tied_embeddings, config.sliding_window), (is_tied, window), "{name}");
        assert_eq!(config.rope.is_unscaled(), !is_tied, "{name}");
        assert_eq!(
            (config.bos_token_id, &config.eos_token_ids[..]),
            (Some(267), &[268, 270][..]),
            "{name}"
        );
        assert!(
            matches!(model.tokenizer(), TokenizerSource::HuggingFace(text) if text.len() == 6584),
            "{name}"
        );
        assert!(model.chat_template().unwrap().starts_with("{% for m in messages %}"), "{name}");
        assert_eq!(model.files().len(), 6, "{name}");

        let names = model.tensor_names();
        assert_eq!(names.len(), 1 + 2 * 9 + 1 + usize::from(!is_tied), "{name}");
        assert_eq!((names[0], names[1]), ("token_embd.weight", "blk.0.attn_norm.weight"), "{name}");
        for (tensor, rows, cols) in [
            ("token_embd.weight", 320, 64),
            ("blk.1.attn_k.weight", 32, 64),
            ("blk.1.ffn_down.weight", 64, 160),
            ("output_norm.weight", 1, 64),
        ] {
            let Some(Weight::Dense(weight)) = model.tensor(tensor).unwrap() else {
                panic!("{name}: no {tensor}")
            };
            assert_eq!(
                (weight.dtype, weight.rows, weight.cols),
                (DType::F16, rows, cols),
                "{name}: {tensor}"
            );
            assert_eq!(weight.bytes.len(), 2 * rows * cols, "{name}: {tensor}");
        }
    }
}

#[test]
fn golden_file_gives_the_model_of_its_directory() {
    let model = HfDirectory::open(&golden("llama").join("model.safetensors")).unwrap();
    assert_eq!(model.tensor_names().len(), 21);
}

type Tensor<'a> = (&'a str, Dtype, &'a [usize]);

fn write_shard(path: &Path, tensors: &[Tensor<'_>]) {
    let zeros = [0; 512];
    let views: BTreeMap<&str, TensorView<'_>> = tensors
        .iter()
        .map(|&(name, dtype, shape)| {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (name, TensorView::new(dtype, shape.to_vec(), &zeros[..bytes]).unwrap())
        })
        .collect();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The model of [`config`] but for its norm, all zeros.
const REST: [Tensor<'static>; 10] = [
    ("model.embed_tokens.weight", Dtype::F32, &[3, 4]),
    ("model.layers.0.input_layernorm.weight", Dtype::F16, &[4]),
    ("model.layers.0.self_attn.q_proj.weight", Dtype::F16, &[4, 4]),
    ("model.layers.0.self_attn.k_proj.weight", Dtype::F16, &[2, 4]),
    ("model.layers.0.self_attn.v_proj.weight", Dtype::F16, &[2, 4]),
    ("model.layers.0.self_attn.o_proj.weight", Dtype::F16, &[4, 4]),
    ("model.layers.0.post_attention_layernorm.weight", Dtype::F16, &[4]),
    ("model.layers.0.mlp.gate_proj.weight", Dtype::F16, &[6, 4]),
    ("model.layers.0.mlp.up_proj.weight", Dtype::F16, &[6, 4]),
    ("model.layers.0.mlp.down_proj.weight", Dtype::F16, &[4, 6]),
];

/// A model of one block whose output projection is tied to the embedding.
fn config() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 3,
        "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
    })
}

/// A directory with that model in two shards, the norm in the first.
fn two_shards(index: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    fs::write(file("config.json"), config().to_string()).unwrap();
    fs::write(file("model.safetensors.index.json"), index.to_string()).unwrap();
    write_shard(&file("a.safetensors"), &[("model.norm.weight", Dtype::BF16, &[4])]);
    write_shard(&file("b.safetensors"), &REST);
    folder
}

/// The same model in one file, with keys of its configuration and tensors put in or in place.
fn one_file(changes: Value, tensors: &[Tensor<'_>]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let norm: Tensor<'_> = ("model.norm.weight", Dtype::BF16, &[4]);
    let mut all: Vec<Tensor<'_>> = REST.into_iter().chain([norm]).collect();
    all.retain(|(name, ..)| tensors.iter().all(|(other, ..)| other != name));
    all.extend(tensors);
    write_shard(&folder.path().join("model.safetensors"), &all);
    folder
}

fn good_index() -> Value {
    json!({"weight_map": {"model.norm.weight": "a.safetensors", "model.embed_tokens.weight": "b.safetensors"}})
}

#[test]
fn shards_are_joined() {
    let folder = two_shards(&good_index());
    let model = HfDirectory::open(folder.path()).unwrap();
    assert_eq!(model.tensor_names().len(), 11);
    assert!(model.config().tied_embeddings);
    assert!(model.warnings().is_empty(), "{:?}", model.warnings());
    assert!(matches!(model.tokenizer(), TokenizerSource::Missing));
    assert_eq!(model.files().len(), 4);
}

#[test]
fn index_bad_entries_are_refused() {
    let shard = |name: &str| json!({"weight_map": {"model.norm.weight": name}});
    let cases = [
        (json!({}), "key `weight_map`"),
        (json!({"weight_map": {"t": 1}}), "tensor `t`: found 1"),
        (shard("../a.safetensors"), "in the same directory"),
        (shard("sub/a.safetensors"), "in the same directory"),
        (shard("/etc/a.safetensors"), "in the same directory"),
        (shard("..\\a.safetensors"), "in the same directory"),
        (shard("c:a.safetensors"), "in the same directory"),
        (shard(".."), "in the same directory"),
        (shard(""), "in the same directory"),
        (shard("config.json"), "in the same directory"),
        (
            shard("absent.safetensors"),
            "there is no such file; `model.safetensors.index.json` names 1 file, of which 1 is missing",
        ),
        (shard("b.safetensors"), "tensor `model.norm.weight`: found none"),
    ];
    for (index, fragment) in cases {
        let error = HfDirectory::open(two_shards(&index).path()).expect_err(fragment);
        assert!(error.to_string().contains(fragment), "{index}: {error}");
    }
}

#[test]
fn bad_tensors_are_refused() {
    let cases: [(Tensor<'_>, &str); 10] = [
        (("model.norm.weight", Dtype::I32, &[4]), "element type I32"),
        (("model.norm.weight", Dtype::F16, &[1, 1, 2, 2]), "shape [1, 1, 2, 2]"),
        (("model.norm.weight", Dtype::F16, &[1, 2, 2]), "found [2, 2], expected [4]"),
        (("model.norm.weight", Dtype::F16, &[0]), "shape [0]"),
        (
            ("model.layers.0.self_attn.q_proj.bias", Dtype::F16, &[4]),
            "tensor `model.layers.0.self_attn.q_proj.bias` of a model with 1 blocks is not supported",
        ),
        (("model.layers.1.mlp.up_proj.weight", Dtype::F16, &[4, 4]), "of a model with 1 blocks"),
        (
            ("model.embed_tokens.weight", Dtype::F16, &[5, 4]),
            "tensor `model.embed_tokens.weight`: found [5, 4], expected [3, 4] by `vocab_size` 3, \
             `hidden_size` 4",
        ),
        (
            ("model.layers.0.mlp.up_proj.weight", Dtype::F16, &[7, 4]),
            "found [7, 4], expected [6, 4] by `intermediate_size` 6, `hidden_size` 4",
        ),
        (
            ("model.layers.0.self_attn.k_proj.weight", Dtype::F16, &[4, 4]),
            "expected [2, 4] by `num_key_value_heads` 1, `head_dim` 2, `hidden_size` 4",
        ),
        (("model.norm.weight", Dtype::F16, &[5]), "found [5], expected [4] by `hidden_size` 4"),
    ];
    for (tensor, fragment) in cases {
        let error = HfDirectory::open(one_file(json!({}), &[tensor]).path()).expect_err(fragment);
        assert!(error.to_string().contains(fragment), "{error}");
    }
    let folder = two_shards(&good_index());
    write_shard(&folder.path().join("a.safetensors"), &REST);
    let error = HfDirectory::open(folder.path()).unwrap_err();
    assert!(error.to_string().contains("a second tensor of this name"), "{error}");
}

#[test]
fn scales_of_a_matrix_that_is_not_in_fp8_are_not_dropped() {
    for suffix in ["weight_scale", "weight_scale_inv", "input_scale"] {
        let name = format!("model.layers.0.self_attn.q_proj.{suffix}");
        let folder = one_file(json!({}), &[(&name, Dtype::F32, &[1])]);
        let error = HfDirectory::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("tensor `{name}` of a model")), "{error}");
    }
}

#[test]
fn missing_tensors_are_named() {
    let folder = one_file(json!({}), &[]);
    write_shard(&folder.path().join("model.safetensors"), &REST[..9]);
    let error = HfDirectory::open(folder.path()).unwrap_err().to_string();
    let expected = "tensor `model.layers.0.mlp.down_proj.weight`: found none, and none of 1 more, \
                    expected the tensors of 1 blocks";
    assert!(error.ends_with(expected), "{error}");
}

#[test]
fn quantized_weights_are_refused_by_their_method() {
    let said = json!({"quantization_config": {"quant_method": "awq", "bits": 4}});
    let q_proj = "model.layers.0.self_attn.q_proj";
    for (changes, suffix, dtype, method) in [
        (json!({}), "qweight", Dtype::I32, "GPTQ or AWQ"),
        (said.clone(), "qweight", Dtype::I32, "awq"),
        (json!({}), "weight.absmax", Dtype::F32, "bitsandbytes"),
        (json!({}), "weight", Dtype::F8_E5M2, "FP8 with 5 bits of exponent"),
        (json!({}), "weight_packed", Dtype::I32, "compressed-tensors"),
        (json!({}), "weight", Dtype::U8, "8-bit or 4-bit integers"),
    ] {
        let name = format!("{q_proj}.{suffix}");
        let folder = one_file(changes, &[(&name, dtype, &[4, 4])]);
        let error = HfDirectory::open(folder.path()).expect_err(method).to_string();
        let expected = format!("a model quantized by {method} (tensor `{name}`) is not supported");
        assert!(error.ends_with(&expected), "{error}");
    }
    let folder = one_file(said, &[]);
    let model = HfDirectory::open(folder.path()).unwrap();
    let [warning] = model.warnings() else { panic!("{:?}", model.warnings()) };
    let expected = "config.json`: `quantization_config` (awq) is left over: the weights are stored \
                    plainly, and read as they are";
    assert!(warning.ends_with(expected), "{warning}");
}

#[test]
fn mxfp4_scales_must_fill_their_matrix() {
    let name = "model.layers.0.mlp.experts.down_proj";
    let [blocks, scales] = ["blocks", "scales"].map(|kind| format!("{name}_{kind}"));
    let of = |shape: &'static [usize]| (&*scales, Dtype::U8, shape);
    let matrix: Tensor<'_> = (&blocks, Dtype::U8, &[2, 2, 2, 16]);
    for (tensors, expected) in [
        (vec![matrix], format!("found no scales, expected `{scales}`")),
        (
            vec![matrix, of(&[2, 2, 1])],
            "found scales [4, 1] of F8_E8M0, expected [4, 2], one byte for 32 columns".to_owned(),
        ),
        (
            vec![matrix, of(&[2, 2, 2]), (name, Dtype::F32, &[2, 2, 2])],
            format!("found `{name}` beside it, expected one of them"),
        ),
        (
            vec![of(&[2, 2, 2])],
            format!("tensor `{scales}` of a model with 1 blocks is not supported"),
        ),
    ] {
        let folder = one_file(json!({}), &tensors);
        let error = HfDirectory::open(folder.path()).unwrap_err().to_string();
        assert!(error.ends_with(&expected), "{error}");
    }
}

#[test]
fn stored_output_projection_counts() {
    let output: Tensor<'_> = ("lm_head.weight", Dtype::F32, &[3, 4]);
    let open = |is_tied: bool, tensors: &[Tensor<'_>], differs: bool| {
        let folder = one_file(json!({"tie_word_embeddings": is_tied}), tensors);
        if differs {
            let path = folder.path().join("model.safetensors");
            let mut bytes = fs::read(&path).unwrap();
            // The first of the tensors by name, after the header.
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            bytes[8 + header] = 1;
            fs::write(path, bytes).unwrap();
        }
        let model = HfDirectory::open(folder.path()).unwrap();
        let has_output = model.tensor("output.weight").unwrap().is_some();
        (model.config().tied_embeddings, has_output, model.warnings().first().cloned())
    };
    assert_eq!(open(true, &[], false), (true, false, None));
    assert_eq!(open(true, &[output], false), (true, false, None));
    assert_eq!(open(false, &[output], false), (false, true, None));
    let (is_tied, has_output, warning) = open(true, &[output], true);
    assert_eq!((is_tied, has_output), (false, true));
    let expected = "is true, but the stored `lm_head.weight` is another matrix, which is used";
    assert!(warning.unwrap().ends_with(expected));
    let (is_tied, has_output, warning) = open(false, &[], false);
    assert_eq!((is_tied, has_output), (true, false));
    assert!(warning.unwrap().contains("the embedding is used for it"));
}

#[test]
fn directory_derived_tensors_must_agree_and_are_left_out() {
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    let folder = one_file(json!({}), &[(name, Dtype::F32, &[1])]);
    let error = HfDirectory::open(folder.path()).unwrap_err().to_string();
    let expected =
        "found other frequencies, expected those of the RoPE base 10000 in `config.json`";
    assert!(error.contains(name) && error.ends_with(expected), "{error}");

    // Heads of two channels have one frequency, 1; linear scaling makes it 0.5.
    let path = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let info: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let start = 8 + header + info[name]["data_offsets"][0].as_u64().unwrap() as usize;
    for (frequency, is_right) in [(1f32, true), (0.5, false)] {
        bytes[start..start + 4].copy_from_slice(&frequency.to_le_bytes());
        fs::write(&path, &bytes).unwrap();
        assert_eq!(HfDirectory::open(folder.path()).is_ok(), is_right, "{frequency}");
    }
    let mut scaled = config();
    scaled["rope_scaling"] = json!({"type": "linear", "factor": 2});
    fs::write(folder.path().join("config.json"), scaled.to_string()).unwrap();
    assert_eq!(HfDirectory::open(folder.path()).unwrap().tensor_names().len(), 11);
}

#[test]
fn directory_bad_files_are_refused() {
    let twice = r#"{"model_type": "llama", "model_type": "mistral"}"#;
    let cases: [(&str, Option<&str>, &str); 8] = [
        ("config.json", None, "there is no such file; it says what the model computes"),
        ("config.json", Some("{"), "expected a JSON object"),
        ("config.json", Some("[]"), "another JSON value"),
        ("config.json", Some(twice), "a second entry of the key `model_type`"),
        (
            "model.safetensors.index.json",
            Some(r#"{"weight_map": {"t": "a.safetensors", "t": "b.safetensors"}}"#),
            "a second entry of the key `t`",
        ),
        ("tokenizer.json", Some(r#"{"model": {"vocab": {"a": 0, "a": 1}}}"#), "the key `a`"),
        ("a.safetensors", Some("\x08\0\0\0\0\0\0\0{}      tail"), "the header"),
        (
            "model.safetensors.index.json",
            None,
            "model.safetensors`: there is no such file; it holds the weights of a folder",
        ),
    ];
    for (name, content, fragment) in cases {
        let folder = two_shards(&good_index());
        let path = folder.path().join(name);
        match content {
            Some(content) => fs::write(path, content).unwrap(),
            None => fs::remove_file(path).unwrap(),
        }
        let error = HfDirectory::open(folder.path()).expect_err(fragment);
        assert!(error.to_string().contains(fragment), "{name}: {error}");
    }
}

#[test]
fn header_that_names_a_tensor_twice_is_refused() {
    let folder = one_file(json!({}), &[]);
    let entry = r#""x":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}"#;
    let header = format!("{{{entry},{entry}}}");
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 2]].concat();
    fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    let error = HfDirectory::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("`x`") || error.contains("key x"), "{error}");
}

#[test]
fn directory_of_pickles_or_onnx_is_refused_with_a_hint() {
    let folder = two_shards(&good_index());
    for name in ["model.safetensors.index.json", "a.safetensors", "b.safetensors"] {
        fs::remove_file(folder.path().join(name)).unwrap();
    }
    for (name, hint) in
        [("model.onnx", "the `.onnx` file"), ("pytorch_model.bin", "save_pretrained")]
    {
        fs::write(folder.path().join(name), "").unwrap();
        let error = HfDirectory::open(folder.path()).unwrap_err();
        assert!(error.hint().unwrap().contains(hint), "{error}");
        fs::remove_file(folder.path().join(name)).unwrap();
    }
}

#[test]
fn directory_add_bos_token_is_read() {
    let folder = two_shards(&good_index());
    assert!(!HfDirectory::open(folder.path()).unwrap().config().add_bos);
    fs::write(folder.path().join("tokenizer_config.json"), r#"{"add_bos_token": true}"#).unwrap();
    assert!(HfDirectory::open(folder.path()).unwrap().config().add_bos);
}
