//! `eval --against` a graph that ONNX Runtime runs.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use slim_converter::BUILT_IN_CALIBRATION;

use crate::command::{Answer, Dir, arg, command, onnx_model, onnx_runtime, tiny_model};

/// The tokens that the graph of the `script` export takes, which was made for one length.
const CONTEXT: &str = "16";

/// Measures `model` against a graph, 8 windows of a text.
fn eval(library: &Path, model: &Path, graph: &Path, context: &str) -> Answer {
    let dir = Dir::new();
    let text = dir.write("text.txt", &BUILT_IN_CALIBRATION[..2_000]);
    let (model, graph) = (arg(model), arg(graph));
    let measure = ["eval", &model, "--text", &text, "--context", context, "--windows", "8"];
    let mut command = command(&measure);
    Answer::of(command.args(["--against", &graph, "--json"]).env("ORT_DYLIB_PATH", library))
}

/// The dynamo export with every `from` in its graph replaced, which is as long.
fn changed_graph(from: &str, to: &str) -> (Dir, PathBuf) {
    assert_eq!(from.len(), to.len());
    let (dir, path) = onnx_model("dynamo");
    let mut graph = std::fs::read(&path).unwrap();
    let places = |graph: &[u8]| graph.windows(from.len()).position(|w| w == from.as_bytes());
    assert!(places(&graph).is_some(), "no `{from}`");
    while let Some(place) = places(&graph) {
        graph[place..place + to.len()].copy_from_slice(to.as_bytes());
    }
    std::fs::write(&path, graph).unwrap();
    (dir, path)
}

/// The dynamo export with one more input, which its graph does not use; -1 stands for a dimension
/// that is open.
fn graph_with_input(name: &str, element_type: u8, dims: &[i8]) -> (Dir, PathBuf) {
    // Fields of `onnx.proto`: a key, then a number below 128 or that many bytes.
    let number = |field: u8, value: u8| vec![field << 3, value];
    let bytes = |field: u8, value: &[u8]| [&[field << 3 | 2, value.len() as u8], value].concat();
    let dim = |&dim: &i8| match u8::try_from(dim) {
        Ok(fixed) => bytes(1, &number(1, fixed)),
        Err(_) => bytes(1, &bytes(2, b"n")),
    };
    let shape: Vec<u8> = dims.iter().flat_map(dim).collect();
    let tensor = [number(1, element_type), bytes(2, &shape)].concat();
    let input = [bytes(1, name.as_bytes()), bytes(2, &bytes(1, &tensor))].concat();
    let (dir, path) = onnx_model("dynamo");
    let mut model = std::fs::read(&path).unwrap();
    // A second run of fields of the graph: protocol buffers merge them.
    model.extend(bytes(7, &bytes(11, &input)));
    std::fs::write(&path, model).unwrap();
    (dir, path)
}

#[test]
fn golden_graphs_in_onnx_runtime_compute_what_we_do() {
    let Some(library) = onnx_runtime() else { return };
    for exporter in ["script", "dynamo"] {
        let (_dir, graph) = onnx_model(exporter);
        for model in [&graph, &tiny_model("llama")] {
            let found = eval(&library, model, &graph, CONTEXT).succeeds().json();
            println!("{exporter}: {found}");
            // Measured: 5e-8; the exports compute in fp16.
            assert!(found["kl_mean"].as_f64().unwrap().abs() < 1e-6, "{exporter}: {found}");
            assert!(found["kl_p99"].as_f64().unwrap().abs() < 1e-5, "{exporter}: {found}");
            assert_eq!(found["top1_agreement"], Value::from(1.0), "{exporter}: {found}");
        }
    }
}

#[test]
fn graph_that_takes_a_cache_is_run_from_an_empty_one() {
    let Some(library) = onnx_runtime() else { return };
    const FLOAT: u8 = 1;
    const INT64: u8 = 7;
    const FLOAT16: u8 = 10;
    let llama = &tiny_model("llama");
    for (name, element_type, dims) in [
        ("past_key_values.0.key", FLOAT, &[-1, 2, -1, 16][..]),
        ("past_key_values.11.value", FLOAT16, &[1, 2, 0, 16]),
        ("position_ids", INT64, &[-1, -1]),
        ("attention_mask", INT64, &[1, 16]),
    ] {
        let (_dir, graph) = graph_with_input(name, element_type, dims);
        let found = eval(&library, llama, &graph, CONTEXT).succeeds().json();
        assert!(found["kl_mean"].as_f64().unwrap().abs() < 1e-6, "{name}: {found}");
    }
    let cache = "expected f32 or f16 [?, heads, ?, head size]";
    for (name, element_type, dims, found, expected) in [
        ("past_key_values.0.key", INT64, &[-1, 2, -1, 16][..], "i64 [?, 2, ?, 16]", cache),
        ("past_key_values.0.key", FLOAT, &[-1, -1, -1, 16], "f32 [?, ?, ?, 16]", cache),
        ("past_key_values.0.key", FLOAT, &[1, 2, 3, 16], "f32 [1, 2, 3, 16]", cache),
        ("past_key_values.0.key", FLOAT, &[], "f32 []", cache),
        ("position_ids", FLOAT, &[1, -1], "f32 [1, ?]", "expected i64 [1, 16]"),
        ("attention_mask", INT64, &[2, -1], "i64 [2, ?]", "expected i64 [1, 16]"),
    ] {
        let (_dir, graph) = graph_with_input(name, element_type, dims);
        let found = format!("input `{name}`: found {found}");
        eval(&library, llama, &graph, CONTEXT).fails(&[&found, expected]);
    }
}

#[test]
fn graph_with_other_weights_diverges() {
    let Some(library) = onnx_runtime() else { return };
    let (dir, graph) = onnx_model("dynamo");
    let data = dir.path("model.onnx.data");
    let mut weights = std::fs::read(&data).unwrap();
    let quarter = weights.len() / 4;
    weights[quarter..2 * quarter].fill(0);
    std::fs::write(&data, weights).unwrap();
    let found = eval(&library, &tiny_model("llama"), &graph, CONTEXT).succeeds().json();
    assert!(found["kl_mean"].as_f64().unwrap() > 1e-3, "{found}");
}

#[test]
fn graphs_that_cannot_be_compared_are_refused_with_a_sentence() {
    let Some(library) = onnx_runtime() else { return };
    let llama = &tiny_model("llama");
    let (_dir, graph) = onnx_model("script");
    let expected = "input `attention_mask`: found i64 [1, 16], expected i64 [1, 32]";
    eval(&library, llama, &graph, "32").fails(&[expected, "the context has 32 tokens"]);

    for (from, to, fragment) in [
        ("input_ids", "token_ids", "input of the graph: found `token_ids`, expected `input_ids`,"),
        ("logits", "scores", "outputs of the graph: found `scores`, expected `logits` among them"),
        ("MatMul", "MadMul", "ONNX Runtime cannot load the graph: "),
        ("model.onnx.data", "../el.onnx.data", "location of its external data: found `../el"),
        ("model.onnx.data", "*/_ORT_MEM_/*/*", "location of its external data: found `*/_ORT"),
    ] {
        let (_dir, graph) = changed_graph(from, to);
        eval(&library, llama, &graph, CONTEXT).fails(&["model.onnx`: ", fragment]);
    }
}

#[test]
fn damaged_graphs_are_refused() {
    let Some(library) = onnx_runtime() else { return };
    let (_dir, path) = onnx_model("script");
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 1, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        eval(&library, &tiny_model("llama"), &path, CONTEXT).fails(&["model.onnx`: "]);
    }
}

#[test]
fn missing_library_is_refused_with_a_hint() {
    let (dir, graph) = onnx_model("dynamo");
    let no_library = dir.write("library.so", "text");
    for library in ["/no/such/library.so", &no_library] {
        let fragments = ["library.so`: cannot load ONNX Runtime: ", "library.so: "];
        let answer = eval(library.as_ref(), &tiny_model("llama"), &graph, CONTEXT);
        answer.fails(&fragments);
        answer.fails(&["hint: run `pip install 'onnxruntime>=1.24'` and set ORT_DYLIB_PATH to"]);
    }
}

/// ONNX Runtime 1.22.1, for one, ends the process when it is asked for what it does not have.
#[cfg(unix)]
#[test]
fn library_that_is_too_old_is_refused_before_use() {
    let (dir, graph) = onnx_model("dynamo");
    // The start of `onnxruntime_c_api.h`: `GetApi`, which is not to be called, and
    // `GetVersionString`.
    let source = dir.write(
        "library.c",
        "static const char *version(void) { return \"1.23.2\"; }\n\
         static const struct { void *api; const char *(*version)(void); } base = {0, version};\n\
         const void *OrtGetApiBase(void) { return &base; }\n",
    );
    let library = dir.path("library.so");
    let compile =
        Command::new("cc").args(["-shared", "-fPIC", "-o", &arg(&library), &source]).status();
    assert!(compile.unwrap().success());
    let answer = eval(&library, &tiny_model("llama"), &graph, CONTEXT);
    answer.fails(&[
        "cannot load ONNX Runtime: found version 1.23.2, expected 1.24 or later",
        "hint: ",
    ]);
}
