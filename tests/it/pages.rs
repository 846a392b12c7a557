//! Looking into a file, and at what differs between two: HTML pages, `diff`.

use std::path::Path;

use serde_json::Value;
use slim_formats::{
    ModelSource as _, Weight,
    slim::{BitWidth, LayerLayout, Outline, PackedLayer, SlimFile, SlimWriter},
};

use crate::command::{Dir, arg, fail, short_text, slimllm, succeed, tiny_model};

const QUICK: &[&str] = &["--samples", "4", "--context", "32", "--quiet", "--device", "cpu"];

fn convert(model: &str, file: &str, more: &[&str]) {
    let fixed = ["convert", &arg(&tiny_model(model)), "-o", file];
    succeed(&[&fixed[..], QUICK, short_text(more), more].concat());
}

/// Checks that a page is whole, and fetches nothing.
fn page(file: &str) -> String {
    let page = std::fs::read_to_string(file).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    for fetched in ["http:", "https:", "src=", "@import", "url("] {
        assert!(!page.contains(fetched), "{fetched}");
    }
    page
}

#[test]
fn page_about_a_file_has_a_map_of_every_matrix() {
    let dir = Dir::new();
    let (slim, report) = (&dir.arg("a.slim.gguf"), &dir.arg("a.html"));
    convert("llama", slim, &["--bits", "3"]);
    succeed(&["inspect", slim, "--html", report]);
    let found = page(report);
    let layers = SlimFile::open(Path::new(slim)).unwrap().layers().len();
    assert!(found.contains("no faults") && found.contains("slim.quantization.method"));
    // Seven matrices in each of two blocks, embedding and output, each with all of its layers.
    assert_eq!(found.matches("<svg class=\"map\"").count(), 2 * 7 + 2);
    assert_eq!(found.matches("In the layer: ").count(), layers);

    fail(&["inspect", slim, "--html", report], &["exists already", "--force"]);
    fail(&["inspect", slim, "--html", slim, "--force"], &["would be overwritten"]);
    succeed(&["inspect", slim, "--html", report, "--force"]);
}

#[test]
fn page_says_what_is_wrong_with_a_file() {
    let dir = Dir::new();
    let (slim, report) = (&dir.arg("a.slim.gguf"), &dir.arg("a.html"));
    convert("llama", slim, &["--method", "rtn"]);
    let mut bytes = std::fs::read(slim).unwrap();
    let last = bytes.len() - 100;
    bytes[last] ^= 1;
    std::fs::write(slim, bytes).unwrap();
    assert_eq!(slimllm(&["inspect", slim, "--html", report]).code, 1);
    assert!(page(report).contains("1 fault"));
}

#[test]
fn page_about_a_source_lists_what_is_there() {
    let dir = Dir::new();
    let report = &dir.arg("a.html");
    succeed(&["inspect", &arg(&tiny_model("llama")), "--html", report]);
    let found = page(report);
    assert!(found.contains("blk.0.attn_q.weight") && !found.contains("<svg"));
}

#[test]
fn folder_of_an_unknown_model_is_a_list_of_tensors() {
    let dir = Dir::new();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(tiny_model("llama").join(file), dir.path(file)).unwrap();
    }
    let config = std::fs::read_to_string(dir.path("config.json")).unwrap();
    dir.write("config.json", config.replace("\"llama\"", "\"novel\""));
    let found = succeed(&["inspect", &arg(dir.root()), "--tensors", "--verify"]);
    assert!(found.stderr.contains("model type `novel` is not supported"), "{}", found.stderr);
    assert!(found.stdout.contains("model.layers.0.mlp.up_proj.weight"), "{}", found.stdout);
}

/// `file` with another width, and other codes, in group `group` of a layer.
fn with_width(file: &str, name: &str, group: usize, copy: &str) {
    let file = SlimFile::open(Path::new(file)).unwrap();
    let changed = |layout: &LayerLayout| {
        let mut widths: Vec<_> = layout.groups().iter().map(|group| group.bit_width).collect();
        widths[group] = BitWidth::new(if widths[group].bits() == 5 { 6 } else { 5 }).unwrap();
        let (rows, cols) = (layout.rows(), layout.cols());
        LayerLayout::new(rows, cols, layout.group_size(), layout.coding(), &widths).unwrap()
    };
    let mut outline = Outline::default();
    let mut layers = Vec::new();
    for info in file.gguf().tensors() {
        if let Some(Weight::Dense(_)) = file.tensor(&info.name).unwrap() {
            outline.dense(&info.name, info.dtype, &info.shape);
        } else if let Some(layer) = info.name.strip_suffix(".bits") {
            let found = file.layer(layer).unwrap();
            let packed = match layer == name {
                true => PackedLayer::zeroed(changed(found.layout())),
                false => found.to_layer(),
            };
            outline.layer(layer, packed.view().layout(), None);
            layers.push((layer, packed));
        }
    }
    let mut writer = SlimWriter::create(Path::new(copy), &outline, file.given_metadata()).unwrap();
    for info in file.gguf().tensors() {
        if let Some(Weight::Dense(tensor)) = file.tensor(&info.name).unwrap() {
            writer.dense(&info.name, info.dtype, &info.shape, tensor.bytes).unwrap();
        } else if let Some(layer) = info.name.strip_suffix(".bits") {
            let (_, packed) = layers.iter().find(|(name, _)| *name == layer).unwrap();
            writer.layer(layer, packed, None).unwrap();
        }
    }
    writer.finish().unwrap();
}

#[test]
fn diff_names_the_group_whose_width_differs() {
    let dir = Dir::new();
    let (a, b, report) = (&dir.arg("a.slim.gguf"), &dir.arg("b.slim.gguf"), &dir.arg("d.html"));
    convert("llama", a, &["--method", "gptq", "--bits", "3", "--group-size", "32"]);
    let same = succeed(&["diff", a, a]);
    assert_eq!(same.stdout, "no difference\n");
    let layer = "blk.1.attn_k.weight";
    with_width(a, layer, 1, b);
    let found = slimllm(&["diff", a, b, "--html", report]);
    assert_eq!(found.code, 1);
    let line = found.stdout.lines().find(|line| line.contains("1 (columns 32 to 63)"));
    let line = line.unwrap_or_else(|| panic!("{}", found.stdout));
    assert!(
        line.starts_with(layer) && line.contains("3 bits") && line.contains("5 bits"),
        "{line}"
    );
    assert!(found.stdout.contains("weights: 1 of "), "{}", found.stdout);
    assert!(page(report).contains("1 (columns 32 to 63)"));

    let json = slimllm(&["diff", a, b, "--json"]).json();
    let group: Value = serde_json::json!({
        "group": 1, "first_column": 32, "last_column": 63, "a": 3, "b": 5
    });
    assert_eq!(json["layers"], serde_json::json!([{ "name": layer, "groups": [group] }]));
    assert_eq!(json["weights"][0]["name"], layer);
    assert_eq!((&json["same"], &json["metadata"]), (&false.into(), &serde_json::json!([])));
}

/// Neurons of a converted model may stand in another order than those of its source.
#[test]
fn diff_from_the_source_is_what_quantizing_costs() {
    let dir = Dir::new();
    let (source, slim) = (&arg(&tiny_model("llama")), &dir.arg("a.slim.gguf"));
    convert("llama", slim, &["--bits", "4"]);
    let found = slimllm(&["diff", slim, source, "--json"]).json();
    let weights = found["weights"].as_array().unwrap();
    assert!(weights.len() >= 2 * 7);
    for weight in weights {
        let error = weight["relative_error"].as_f64().unwrap();
        // The embedding has half of its rows in fewer bits.
        let most = if weight["name"] == "token_embd.weight" { 0.3 } else { 0.1 };
        assert!(error > 0.0 && error < most, "{weight}");
    }
    let names: Vec<_> = weights.iter().map(|weight| weight["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"blk.0.ffn_up.weight") && names.contains(&"blk.0.ffn_down.weight"));
}

#[test]
fn diff_of_other_models_says_what_only_one_of_them_has() {
    let (a, b) = (&arg(&tiny_model("llama")), &arg(&tiny_model("qwen3")));
    let found = slimllm(&["diff", a, b]);
    assert_eq!(found.code, 1);
    assert!(found.stdout.contains("only in one"), "{}", found.stdout);
    fail(&["diff", a, "nowhere"], &["nowhere"]);
}
