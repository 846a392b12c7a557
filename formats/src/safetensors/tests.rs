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

fn write_shard(path: &Path, tensors: &[(&str, Dtype, &[usize])]) {
    let zeros = [0; 64];
    let views: BTreeMap<&str, TensorView<'_>> = tensors
        .iter()
        .map(|&(name, dtype, shape)| {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (name, TensorView::new(dtype, shape.to_vec(), &zeros[..bytes]).unwrap())
        })
        .collect();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A directory with the golden configuration and two shards of one tensor each.
fn two_shards(index: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    fs::copy(golden("llama").join("config.json"), file("config.json")).unwrap();
    fs::write(file("model.safetensors.index.json"), index.to_string()).unwrap();
    write_shard(&file("a.safetensors"), &[("model.norm.weight", Dtype::BF16, &[4])]);
    write_shard(&file("b.safetensors"), &[("model.embed_tokens.weight", Dtype::F32, &[2, 4])]);
    folder
}

fn good_index() -> Value {
    json!({"weight_map": {"model.norm.weight": "a.safetensors", "model.embed_tokens.weight": "b.safetensors"}})
}

#[test]
fn shards_are_joined() {
    let folder = two_shards(&good_index());
    let model = HfDirectory::open(folder.path()).unwrap();
    assert_eq!(model.tensor_names(), ["token_embd.weight", "output_norm.weight"]);
    assert!(model.config().tied_embeddings);
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
        (shard("absent.safetensors"), "cannot open the file"),
        (shard("b.safetensors"), "tensor `model.norm.weight`: found none"),
    ];
    for (index, fragment) in cases {
        let error = HfDirectory::open(two_shards(&index).path()).expect_err(fragment);
        assert!(error.to_string().contains(fragment), "{index}: {error}");
    }
}

#[test]
fn shards_bad_tensors_are_refused() {
    type Tensor<'a> = (&'a str, Dtype, &'a [usize]);
    let cases: [(Tensor<'_>, &str); 6] = [
        (("model.norm.weight", Dtype::I32, &[4]), "element type I32"),
        (("model.norm.weight", Dtype::F16, &[1, 2, 2]), "shape [1, 2, 2]"),
        (("model.norm.weight", Dtype::F16, &[0]), "shape [0]"),
        (
            ("model.layers.0.self_attn.q_proj.bias", Dtype::F16, &[4]),
            "`model.layers.0.self_attn.q_proj.bias`",
        ),
        (("model.layers.2.mlp.up_proj.weight", Dtype::F16, &[4, 4]), "of a model with 2 blocks"),
        (("model.embed_tokens.weight", Dtype::F16, &[4]), "a second tensor"),
    ];
    for (tensor, fragment) in cases {
        let index = json!({"weight_map": {tensor.0: "a.safetensors", "model.embed_tokens.weight": "b.safetensors"}});
        let folder = two_shards(&index);
        write_shard(&folder.path().join("a.safetensors"), &[tensor]);
        if fragment == "a second tensor" {
            let both = json!({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}});
            fs::write(folder.path().join("model.safetensors.index.json"), both.to_string())
                .unwrap();
        }
        let error = HfDirectory::open(folder.path()).expect_err(fragment);
        assert!(error.to_string().contains(fragment), "{error}");
    }
}

#[test]
fn directory_derived_tensors_are_left_out() {
    let folder = two_shards(&good_index());
    let frequencies: (&str, Dtype, &[usize]) =
        ("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::F32, &[4]);
    write_shard(
        &folder.path().join("a.safetensors"),
        &[("model.norm.weight", Dtype::F16, &[4]), frequencies],
    );
    assert_eq!(HfDirectory::open(folder.path()).unwrap().tensor_names().len(), 2);
}

#[test]
fn directory_bad_files_are_refused() {
    let cases: [(&str, Option<&str>, &str); 5] = [
        ("config.json", None, "cannot open the file"),
        ("config.json", Some("{"), "expected a JSON object"),
        ("config.json", Some("[]"), "another JSON value"),
        ("a.safetensors", Some("\x08\0\0\0\0\0\0\0{}      tail"), "the header"),
        ("model.safetensors.index.json", None, "cannot open the file"),
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
fn directory_of_pickles_or_onnx_is_refused_with_a_hint() {
    let folder = two_shards(&good_index());
    fs::remove_file(folder.path().join("model.safetensors.index.json")).unwrap();
    for (name, hint) in
        [("model.onnx", "the `.onnx` file"), ("pytorch_model.bin", "save_pretrained")]
    {
        fs::write(folder.path().join(name), "").unwrap();
        let error = HfDirectory::open(folder.path()).unwrap_err();
        assert!(error.hint().unwrap().contains(hint), "{error}");
    }
}

#[test]
fn directory_add_bos_token_is_read() {
    let folder = two_shards(&good_index());
    assert!(!HfDirectory::open(folder.path()).unwrap().config().add_bos);
    fs::write(folder.path().join("tokenizer_config.json"), r#"{"add_bos_token": true}"#).unwrap();
    assert!(HfDirectory::open(folder.path()).unwrap().config().add_bos);
}
