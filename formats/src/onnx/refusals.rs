//! Files that are damaged, hostile, or of models that are not read.

use std::{fs, path::Path};

use proptest::prelude::*;
use tempfile::TempDir;

use super::{
    Graph, Modules, OnnxModel,
    encode::{Model, Node, Tensor, attribute, bytes, float, varint},
    find_weights,
    tests::{Style, config_of, export, open_in, tiny_folder},
};
use crate::{FormatError, Limits, ModelSource, Result, Weight};

/// A model with its weights in `weights.bin`.
fn with_external_data() -> (TempDir, Model) {
    let folder = tiny_folder(Style::Script);
    let mut model = export(Style::Script, &config_of(&folder));
    let data = model.move_out("weights.bin");
    fs::write(folder.path().join("weights.bin"), data).unwrap();
    open_in(&folder, &model).unwrap();
    (folder, model)
}

fn refusal(result: Result<OnnxModel>, what: &str) -> FormatError {
    result.err().unwrap_or_else(|| panic!("{what} is opened"))
}

fn expect_refusal(result: Result<OnnxModel>, fragment: &str) {
    let error = refusal(result, fragment).to_string();
    assert!(error.contains(fragment), "no `{fragment}` in {error}");
}

#[test]
fn external_data_location_outside_the_folder_is_refused() {
    let (folder, model) = with_external_data();
    let secret = tempfile::tempdir().unwrap();
    fs::copy(folder.path().join("weights.bin"), secret.path().join("weights.bin")).unwrap();
    let absolute = secret.path().join("weights.bin").to_str().unwrap().to_owned();
    let beside = secret.path().file_name().unwrap().to_str().unwrap();
    fs::create_dir(folder.path().join("a")).unwrap();
    for location in [
        &*absolute,
        &format!("../{beside}/weights.bin"),
        "a/../weights.bin",
        &format!("a/../../{beside}/weights.bin"),
        "..",
        ".",
        "",
        "..\\weights.bin",
        "c:weights.bin",
        "*/_ORT_MEM_ADDR_/*",
        "weights.bin\0",
    ] {
        let mut changed = model.clone();
        changed.tensors[3].external[0].1 = location.to_owned();
        expect_refusal(open_in(&folder, &changed), "location of its external data");
    }
    let mut changed = model.clone();
    changed.tensors[3].external.remove(0);
    expect_refusal(open_in(&folder, &changed), "location of its external data: found ``");
    changed.tensors[3].external.push(("location", "./weights.bin".to_owned()));
    open_in(&folder, &changed).unwrap();
}

#[cfg(unix)]
#[test]
fn external_data_behind_links_is_refused() {
    use std::os::unix::fs::symlink;

    let (folder, model) = with_external_data();
    let secret = tempfile::tempdir().unwrap();
    let target = secret.path().join("weights.bin");
    fs::copy(folder.path().join("weights.bin"), &target).unwrap();
    let file = |name: &str| folder.path().join(name);
    symlink(&target, file("symlink")).unwrap();
    symlink(file("weights.bin"), file("symlink within")).unwrap();
    symlink(secret.path(), file("folder")).unwrap();
    fs::hard_link(&target, file("hard link")).unwrap();
    fs::create_dir(file("not a file")).unwrap();
    for location in ["symlink", "symlink within", "folder/weights.bin", "hard link", "not a file"] {
        let mut changed = model.clone();
        changed.tensors[3].external[0].1 = location.to_owned();
        let error = refusal(open_in(&folder, &changed), location);
        let expected = format!("external data in `{location}`, a link or not a regular file,");
        assert!(error.to_string().contains(&expected), "{error}");
        assert!(error.hint().unwrap().contains("put a copy"));
    }
    let mut changed = model;
    changed.tensors[3].external[0].1 = "absent".to_owned();
    expect_refusal(
        open_in(&folder, &changed),
        "there is no such file; `model.onnx` keeps weights in it",
    );

    // A link to the model's folder is the user's own business.
    let link = secret.path().join("link");
    symlink(folder.path(), &link).unwrap();
    fs::write(file("model.onnx"), with_external_data().1.encoded()).unwrap();
    OnnxModel::open(&link.join("model.onnx")).unwrap();
}

#[test]
fn external_data_ranges_outside_the_file_are_refused() {
    let (folder, model) = with_external_data();
    let length = fs::metadata(folder.path().join("weights.bin")).unwrap().len();
    let most = u64::MAX.to_string();
    for (key, value, fragment) in [
        ("offset", &*(length - 1).to_string(), "expected a range in the"),
        ("offset", &(length + 1).to_string(), "expected a range in the"),
        ("offset", &most, "expected a range in the"),
        ("offset", &(u64::MAX - 8).to_string(), "expected a range in the"),
        ("offset", "-1", "expected a whole number"),
        ("offset", "18446744073709551616", "expected a whole number"),
        ("offset", "", "expected a whole number"),
        ("length", "0", "as its shape and type say"),
        ("length", &most, "as its shape and type say"),
        ("length", "four", "expected a whole number"),
    ] {
        let mut changed = model.clone();
        let entry = changed.tensors[3].external.iter_mut().find(|(found, _)| *found == key);
        entry.unwrap().1 = value.to_owned();
        expect_refusal(open_in(&folder, &changed), fragment);
    }
    let mut changed = model.clone();
    changed.tensors[3].external.push(("offset", "0".to_owned()));
    expect_refusal(open_in(&folder, &changed), "a second one");
    let mut changed = model.clone();
    changed.tensors[3].raw = Some(vec![0; 4]);
    expect_refusal(open_in(&folder, &changed), "values in more than one form");
    let mut changed = model;
    changed.tensors.iter_mut().for_each(|tensor| tensor.external.truncate(2));
    open_in(&folder, &changed).unwrap();
    fs::write(folder.path().join("weights.bin"), [0]).unwrap();
    expect_refusal(open_in(&folder, &changed), "in the 1 bytes");
    fs::write(folder.path().join("weights.bin"), "").unwrap();
    let fragment = "is an empty file, not the external data of a model";
    expect_refusal(open_in(&folder, &changed), fragment);
}

#[test]
fn initializers_that_contradict_themselves_are_refused() {
    let folder = tiny_folder(Style::GenAi);
    let model = export(Style::GenAi, &config_of(&folder));
    let change = |change: &dyn Fn(&mut Tensor)| {
        let mut changed = model.clone();
        change(changed.tensor("layers.1.attn.q_proj.MatMul.weight"));
        open_in(&folder, &changed)
    };
    let cut = |tensor: &mut Tensor| tensor.raw.as_mut().unwrap().truncate(255);
    expect_refusal(change(&cut), "found 255 bytes, expected 256 for [8, 8] F32");
    expect_refusal(change(&|tensor| tensor.raw = None), "found 0 bytes");
    expect_refusal(change(&|tensor| tensor.dims = vec![8, 9]), "found `model.layers.1.attn");
    expect_refusal(change(&|tensor| tensor.dims = vec![8]), "[8] as an input of node");
    expect_refusal(change(&|tensor| tensor.dims = vec![]), "MatMul.weight` [], expected [8, 8]");
    expect_refusal(change(&|tensor| tensor.dims = vec![-8, -8]), "found dimension -8");
    expect_refusal(change(&|tensor| tensor.dims = vec![i64::MAX, 8]), "9223372036854775807, 8]");
    expect_refusal(change(&|tensor| tensor.dims = vec![1; 65]), "dimensions of a tensor");
    expect_refusal(change(&|tensor| tensor.data_type = 7), "element type 7");
    expect_refusal(change(&|tensor| tensor.data_type = 11), "element type 11");
    expect_refusal(change(&|tensor| tensor.data_type = 10), "found 256 bytes, expected 128");
    expect_refusal(change(&|tensor| tensor.more = varint(3, 1)), "more than one form");
    expect_refusal(change(&|tensor| tensor.more = bytes(4, &[0; 256])), "more than one form");
    let typed = |tensor: &mut Tensor| {
        tensor.raw = None;
        tensor.more = bytes(5, &[1; 64]);
    };
    expect_refusal(change(&typed), "a typed list in place of `raw_data`");
    let two_runs = |tensor: &mut Tensor| {
        tensor.raw = None;
        tensor.more = [bytes(4, &[0; 128]), bytes(4, &[0; 128])].concat();
    };
    expect_refusal(change(&two_runs), "several runs of `float_data`");
    expect_refusal(
        change(&|tensor| tensor.name.push_str(".lost")),
        "is found to be `model.layers.1",
    );
    let other_name = "model.norm.weight".to_owned();
    expect_refusal(change(&|tensor| tensor.name = other_name.clone()), "none of 21 initializers");
    let twice = "model.embed_tokens.weight".to_owned();
    expect_refusal(change(&|tensor| tensor.name = twice.clone()), "a second definition");
}

#[test]
fn graphs_that_do_not_tell_are_refused() {
    let style = Style::Script;
    let folder = tiny_folder(style);
    let model = export(style, &config_of(&folder));
    let change = |change: &dyn Fn(&mut Model)| {
        let mut changed = model.clone();
        change(&mut changed);
        open_in(&folder, &changed)
    };
    let query = "/model/layers.1/self_attn/q_proj/MatMul";
    let find = |model: &Model| model.nodes.iter().position(|node| node.name == query).unwrap();

    let nameless = |model: &mut Model| {
        let at = find(model);
        model.nodes[at].name.clear();
    };
    let error = refusal(change(&nameless), "a nameless node");
    let text = error.to_string();
    assert!(text.contains("is found to be `model.layers.1.self_attn.q_proj.weight`"), "{text}");
    assert!(text.contains("onnx::MatMul_11` [8, 8] of node `` is not known either"), "{text}");
    assert!(error.hint().unwrap().contains("name_scopes"));

    let adapter = |model: &mut Model| {
        let mut node = model.nodes[find(model)].clone();
        (node.name, node.inputs[1]) = ("/adapter/MatMul".to_owned(), "adapter".to_owned());
        node.outputs.clear();
        model.nodes.push(node);
        let tensor = Tensor { name: "adapter".to_owned(), dims: vec![8, 2], ..Tensor::default() };
        model.tensors.push(tensor);
    };
    expect_refusal(
        change(&adapter),
        "the matrix `adapter` [8, 2] of node `/adapter/MatMul` is not",
    );

    let unknown = |model: &mut Model| {
        let name = "model.layers.1.self_attn.q_norm.weight".to_owned();
        model.tensors.push(Tensor { name, dims: vec![4], data_type: 1, ..Tensor::default() });
    };
    expect_refusal(change(&unknown), "q_norm.weight` [4] of a model with 2 blocks");

    let bias = |model: &mut Model| {
        let (name, op) = (query.replace("MatMul", "Add"), "Add".to_owned());
        let inputs = vec!["bias".to_owned(), "x".to_owned()];
        model.nodes.push(Node { name, op, inputs, ..Node::default() });
        let (name, dims) = ("bias".to_owned(), vec![8]);
        model.tensors.push(Tensor { name, dims, data_type: 1, ..Tensor::default() });
    };
    expect_refusal(change(&bias), "(`Add`) in the module `model.layers.1.self_attn.q_proj`");

    let two = |model: &mut Model| {
        let mut node = model.nodes[find(model)].clone();
        node.inputs[1] = "onnx::MatMul_2".to_owned();
        node.outputs.clear();
        model.nodes.push(node);
    };
    expect_refusal(change(&two), "`onnx::MatMul_11` [8, 8] and `onnx::MatMul_2` [8, 8], taken");

    let shadowed = |model: &mut Model| {
        let at = find(model);
        model.nodes[at].outputs = vec!["onnx::MatMul_2".to_owned()];
    };
    expect_refusal(change(&shadowed), "value `onnx::MatMul_2`: found a second definition");

    let quantized = |model: &mut Model| model.nodes[5].op = "MatMulNBits".to_owned();
    let error = refusal(change(&quantized), "a quantized graph");
    assert!(error.to_string().contains("a quantized graph (node `"), "{error}");
    assert!(error.hint().unwrap().contains("fp16"));

    let factor = |model: &mut Model| {
        let at = find(model);
        model.nodes[at].op = "Gemm".to_owned();
        model.nodes[at].attributes = attribute("alpha", &float(2, 0.5));
    };
    expect_refusal(change(&factor), "a factor in the product");
    expect_refusal(change(&|model| model.more = bytes(15, &[])), "a sparse initializer");

    // Only what the weights are taken by is asked, so these are ignored.
    let cycle = |model: &mut Model| {
        for op in ["Identity", "Transpose", "MatMul"] {
            let names = vec![format!("self {op}")];
            let (inputs, outputs) = (names.clone(), names);
            model.nodes.push(Node { op: op.to_owned(), inputs, outputs, ..Node::default() });
        }
        let (op, inputs) = ("Transpose".to_owned(), vec!["onnx::MatMul_2".to_owned()]);
        let attributes = attribute("perm", &bytes(8, &[0, 1]));
        model.nodes.push(Node { op, inputs, attributes, ..Node::default() });
    };
    change(&cycle).unwrap();
}

#[test]
fn square_weight_that_no_node_takes_is_refused() {
    // The weights of the style `Opaque` are square in this configuration.
    let folder = tiny_folder(Style::Plain);
    let model = export(Style::Opaque, &config_of(&folder));
    expect_refusal(open_in(&folder, &model), "of which no node tells whether it is transposed");
}

#[test]
fn files_that_are_no_models_are_refused() {
    let folder = tiny_folder(Style::Plain);
    let path = folder.path().join("model.onnx");
    let nodes = vec![bytes(1, &[]); 1 << 20].concat();
    let inputs = vec![bytes(1, &[]); (1 << 16) + 1].concat();
    let tensors = vec![bytes(5, &bytes(8, b"")); (1 << 18) + 1].concat();
    for (content, fragment) in [
        (Vec::new(), "is an empty file, not an ONNX model"),
        (vec![0x08, 0x09], "found no graph"),
        (b"version https://example.org/spec/v1\n\x01".to_vec(), "wire type 6"),
        (varint(7, 1), "expected a message"),
        ([bytes(7, &[]), bytes(7, &[])].concat(), "found two graphs"),
        (bytes(7, &[nodes, bytes(1, &[])].concat()), "nodes: found 1048577"),
        (bytes(7, &bytes(1, &inputs)), "fields of a node: found 65537"),
        (bytes(7, &tensors), "initializers: found 262145"),
        (bytes(7, &bytes(1, &bytes(4, &[0xff]))), "expected a text in UTF-8"),
        (bytes(7, &[]), "none of 0 initializers is found to be `model.embed_tokens.weight`"),
    ] {
        fs::write(&path, content).unwrap();
        expect_refusal(OnnxModel::open(&path), fragment);
    }
    fs::remove_file(folder.path().join("config.json")).unwrap();
    expect_refusal(OnnxModel::open(&path), "config.json`: there is no such file");
}

/// The whole file, and the graph in a file that knows how long it is.
#[test]
fn every_truncation_is_refused() {
    let folder = tiny_folder(Style::GenAiFused);
    let config = config_of(&folder);
    let (modules, limits) = (Modules::new(&config), Limits::default());
    let recognise = |bytes: &[u8]| {
        let path = Path::new("model.onnx");
        let graph = Graph::read(path, bytes, &limits)?;
        find_weights(path, &graph, &modules, &mut config.clone()).map(|places| places.len())
    };
    let mut model = export(Style::GenAiFused, &config);
    model.move_out("w");
    let (file, graph) = (model.encoded(), model.graph());
    assert_eq!(recognise(&file).unwrap(), modules.slots.len());
    for length in 0..file.len() {
        assert!(recognise(&file[..length]).is_err(), "{length} bytes");
    }
    for length in 0..graph.len() {
        assert!(recognise(&bytes(7, &graph[..length])).is_err(), "{length} bytes of the graph");
    }
}

proptest! {
    #[test]
    fn changed_bytes_give_an_error_or_a_model(
        style in prop::sample::select(vec![Style::Dynamo, Style::GenAiFused, Style::Gemm]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let folder = tiny_folder(style);
        let mut model = export(style, &config_of(&folder));
        fs::write(folder.path().join("w"), model.move_out("w")).unwrap();
        let mut encoded = model.encoded();
        for (at, byte) in changes {
            let at = at.index(encoded.len());
            encoded[at] = byte;
        }
        let path = folder.path().join("model.onnx");
        fs::write(&path, encoded).unwrap();
        if let Ok(model) = OnnxModel::open(&path) {
            for name in model.tensor_names() {
                let Ok(Some(Weight::Dense(tensor))) = model.tensor(name) else { panic!("{name}") };
                prop_assert!(tensor.stored_bytes() <= tensor.bytes.len() as u64);
            }
        }
    }
}
