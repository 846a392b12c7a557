use std::fs;

use half::{bf16, f16};
use serde_json::json;
use tempfile::TempDir;

use super::{
    encode::{Model, Node, Tensor, attribute, bytes, varint},
    *,
};
use crate::{open_model, safetensors::HfDirectory};

/// How an exporter writes a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Names as in PyTorch, `Transpose` before `MatMul`.
    Plain,
    /// Names as in PyTorch, `Gemm` with `transB`.
    Gemm,
    /// Names as in PyTorch, nodes that tell nothing.
    Opaque,
    /// Nameless weights, transposed ones for `MatMul`, paths in the names of nodes.
    Script,
    /// Nameless transposed weights, paths in metadata.
    Dynamo,
    /// The names of the ONNX Runtime GenAI builder.
    GenAi,
    /// The same with one matrix for queries, keys and values.
    GenAiFused,
}

impl Style {
    const ALL: [Self; 7] = [
        Self::Plain,
        Self::Gemm,
        Self::Opaque,
        Self::Script,
        Self::Dynamo,
        Self::GenAi,
        Self::GenAiFused,
    ];

    fn is_gen_ai(self) -> bool {
        matches!(self, Self::GenAi | Self::GenAiFused)
    }

    /// The module at one of Hugging Face's paths, as the exporter calls it.
    fn module(self, path: &str) -> String {
        match path {
            "model.norm" if self.is_gen_ai() => "model.layers.2.final_norm_layernorm".to_owned(),
            path if self.is_gen_ai() => path.replace("self_attn", "attn"),
            path => path.to_owned(),
        }
    }
}

/// A folder with the configuration of a tiny model: two blocks, hidden size 8 with square query and
/// output projections, unless the style cannot tell how those lie.
pub fn tiny_folder(style: Style) -> TempDir {
    tiny_folder_of("llama", style)
}

/// The same of a model of another type.
fn tiny_folder_of(model_type: &str, style: Style) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": model_type, "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 12,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
        "head_dim": if style == Style::Opaque { 6 } else { 4 },
        "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "attention_bias": false,
    });
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

pub fn config_of(folder: &TempDir) -> ModelConfig {
    Folder::around(folder.path()).description().unwrap().config
}

/// Row `row`, column `col` of the tensor with index `slot`.
fn value(slot: usize, row: usize, col: usize) -> f32 {
    (slot * 500 + row * 16 + col) as f32
}

/// The model in `folder` as an exporter writes it, with F32 weights.
pub fn export(style: Style, config: &ModelConfig) -> Model {
    let modules = Modules::new(config);
    let mut model = Model::default();
    let is_q = |path: &str| path.ends_with("q_proj");
    let is_fused = |path: &str| ["k_proj", "v_proj"].iter().any(|part| path.ends_with(part));
    for (index, slot) in modules.slots.iter().enumerate() {
        let (path, parameter) = slot.hf.name.rsplit_once('.').unwrap();
        let parts = modules.slots.iter().enumerate();
        let parts = parts.filter(|(_, part)| part.hf.name == slot.hf.name);
        let parts: Vec<usize> = parts.map(|(part, _)| part).collect();
        if parts[0] != index {
            continue;
        }
        let add = if parameter == "bias" { Model::add_bias } else { Model::add };
        match style {
            Style::GenAiFused if is_fused(path) => {}
            Style::GenAiFused if is_q(path) => {
                let path = path.replace("q_proj", "qkv_proj");
                let names = ["q", "k", "v"]
                    .map(|name| slot.hf.name.replace("q_proj", &format!("{name}_proj")));
                let parts = names.map(|name| {
                    modules.slots.iter().position(|slot| slot.hf.name == name).unwrap()
                });
                add(&mut model, style, &path, &parts, &modules);
            }
            _ => add(&mut model, style, path, &parts, &modules),
        }
    }
    model
}

impl Model {
    /// Adds the weight of the module at `path`, which holds `slots` one above the other, and the
    /// node that takes it.
    fn add(&mut self, style: Style, path: &str, slots: &[usize], modules: &Modules) {
        let rows_of = |slot: usize| match modules.slots[slot].dims[..] {
            [rows, _] => rows,
            _ => 1,
        };
        let cols = *modules.slots[slots[0]].dims.last().unwrap();
        let rows: Vec<Vec<f32>> = slots
            .iter()
            .flat_map(|&slot| (0..rows_of(slot)).map(move |row| (slot, row)))
            .map(|(slot, row)| (0..cols).map(|col| value(slot, row, col)).collect())
            .collect();
        let is_vector = path.ends_with("norm");
        let is_embedding = path.ends_with("embed_tokens");
        let rows_first = is_vector
            || is_embedding
            || matches!(style, Style::Plain | Style::Gemm)
            || (style == Style::Opaque && path.ends_with("up_proj"));
        let values: Vec<f32> = match rows_first {
            true => rows.concat(),
            false => (0..cols).flat_map(|col| rows.iter().map(move |row| row[col])).collect(),
        };
        let dims = match (is_vector, rows_first) {
            (true, _) => vec![cols],
            (_, true) => vec![rows.len(), cols],
            (_, false) => vec![cols, rows.len()],
        };

        let module = style.module(path);
        let scope = format!("/{}", module.replace('.', "/").replace("layers/", "layers."));
        let op = match (is_embedding, is_vector, style) {
            (_, _, Style::Opaque) => "Einsum",
            (true, ..) => "Gather",
            (_, true, style) if style.is_gen_ai() => "SkipSimplifiedLayerNormalization",
            (_, true, _) => "Mul",
            (_, _, Style::Gemm) => "Gemm",
            _ => "MatMul",
        };
        let is_anonymous = match style {
            Style::Script => true,
            Style::Dynamo => op == "MatMul",
            _ => false,
        };
        let name = match style {
            _ if is_anonymous => format!("onnx::{op}_{}", self.tensors.len()),
            style if style.is_gen_ai() && op == "MatMul" => format!("{module}.MatMul.weight"),
            _ => format!("{module}.weight"),
        };
        let tells_by_name = matches!(style, Style::Script) || style.is_gen_ai();
        let node_name =
            if tells_by_name { format!("{scope}/{op}") } else { format!("node_{path}") };
        let scopes = format!("['', 'model', '{module}', 'norm']");
        let mut weight = name.clone();
        if style == Style::Plain && op == "MatMul" {
            weight = format!("transposed {name}");
            self.nodes.push(Node {
                op: "Transpose".to_owned(),
                inputs: vec![name.clone()],
                outputs: vec![weight.clone()],
                attributes: attribute("perm", &bytes(8, &[1, 0])),
                ..Node::default()
            });
        }
        let inputs = match op {
            "Gather" => vec![weight, "ids".to_owned()],
            "SkipSimplifiedLayerNormalization" => vec!["x".to_owned(), "y".to_owned(), weight],
            _ => vec!["x".to_owned(), weight],
        };
        self.nodes.push(Node {
            op: op.to_owned(),
            name: node_name,
            inputs,
            outputs: vec![format!("out {path}")],
            scopes: (style == Style::Dynamo).then_some(scopes),
            attributes: if op == "Gemm" { attribute("transB", &varint(3, 1)) } else { Vec::new() },
        });
        let dims = dims.into_iter().map(|dim| dim as i64).collect();
        let raw = Some(values.iter().flat_map(|value| value.to_le_bytes()).collect());
        self.tensors.push(Tensor { name, dims, data_type: 1, raw, ..Tensor::default() });
    }

    /// Adds the bias of the module at `path`, whose weight is there, and the node that takes it.
    fn add_bias(&mut self, style: Style, path: &str, slots: &[usize], modules: &Modules) {
        let values = slots
            .iter()
            .flat_map(|&slot| (0..modules.slots[slot].dims[0]).map(move |col| value(slot, 0, col)));
        let values: Vec<f32> = values.collect();
        let module = style.module(path);
        let name = match style {
            Style::Script => format!("onnx::Add_{}", self.tensors.len()),
            style if style.is_gen_ai() => format!("{module}.Add.bias"),
            _ => format!("{module}.bias"),
        };
        let weighted = format!("out {path}");
        let of_weight = self.nodes.iter_mut().find(|node| node.outputs == [weighted.as_str()]);
        let of_weight = of_weight.expect("the weight comes first");
        match &*of_weight.op {
            "Gemm" => of_weight.inputs.push(name.clone()),
            "Mul" if style == Style::Dynamo => {
                of_weight.op = "LayerNormalization".to_owned();
                of_weight.inputs.push(name.clone());
            }
            op => {
                let mut node = of_weight.clone();
                node.op = if op == "Einsum" { "Einsum" } else { "Add" }.to_owned();
                node.name = node.name.replace(op, "Add");
                node.inputs = vec![name.clone(), weighted];
                node.outputs = vec![format!("biased {path}")];
                self.nodes.push(node);
            }
        }
        let dims = vec![values.len() as i64];
        let raw = Some(values.iter().flat_map(|value| value.to_le_bytes()).collect());
        self.tensors.push(Tensor { name, dims, data_type: 1, raw, ..Tensor::default() });
    }

    /// The tensor whose name ends in `suffix`.
    pub fn tensor(&mut self, suffix: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name.ends_with(suffix)).expect(suffix)
    }

    /// The node that takes the weight whose name ends in `suffix`.
    pub fn node(&mut self, suffix: &str) -> &mut Node {
        let takes = |node: &&mut Node| node.inputs.iter().any(|input| input.ends_with(suffix));
        self.nodes.iter_mut().rfind(takes).expect(suffix)
    }

    /// Moves the values of all tensors to one file; gives its bytes.
    pub fn move_out(&mut self, location: &str) -> Vec<u8> {
        let mut data = Vec::new();
        for tensor in &mut self.tensors {
            let raw = tensor.raw.take().unwrap();
            data.resize(data.len().next_multiple_of(64), 0xff);
            tensor.external = vec![
                ("location", location.to_owned()),
                ("offset", data.len().to_string()),
                ("length", raw.len().to_string()),
            ];
            data.extend(raw);
        }
        data
    }
}

pub fn open_in(folder: &TempDir, model: &Model) -> Result<OnnxModel> {
    let path = folder.path().join("model.onnx");
    fs::write(&path, model.encoded()).unwrap();
    OnnxModel::open(&path)
}

/// The values of a tensor in the order of use, `N` bytes each.
fn elements<const N: usize>(tensor: &DenseTensor<'_>) -> Vec<[u8; N]> {
    let stored = tensor.bytes.as_chunks::<N>().0;
    let at = |row: usize, col: usize| match tensor.layout {
        Layout::Transposed { stride, step } => stored[col * stride + row * step],
        _ => stored[row * tensor.cols + col],
    };
    let (rows, cols) = (tensor.rows, tensor.cols);
    (0..rows * cols).map(|i| at(i / cols, i % cols)).collect()
}

fn dense<'a>(source: &'a dyn ModelSource, name: &str) -> DenseTensor<'a> {
    match source.tensor(name).unwrap() {
        Some(Weight::Dense(tensor)) => tensor,
        _ => panic!("no {name}"),
    }
}

/// Checks that a model has all its tensors with the values that `export` gives them.
fn check_values(model: &OnnxModel) {
    let modules = Modules::new(model.config());
    assert_eq!(model.tensor_names().len(), modules.slots.len());
    for (index, slot) in modules.slots.iter().enumerate() {
        let tensor = dense(model, &slot.name);
        let found: Vec<f32> = elements(&tensor).into_iter().map(f32::from_le_bytes).collect();
        let expected: Vec<f32> = (0..tensor.rows)
            .flat_map(|row| (0..tensor.cols).map(move |col| value(index, row, col)))
            .collect();
        assert_eq!(found, expected, "{}", slot.name);
        assert_eq!(tensor.stored_bytes(), 4 * expected.len() as u64, "{}", slot.name);
    }
}

/// A golden export beside the files of the model that it was made from.
fn golden(name: &str) -> TempDir {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
    let folder = tempfile::tempdir().unwrap();
    for source in [data.join("archs/llama"), data.join("onnx").join(name)] {
        for entry in fs::read_dir(source).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "safetensors") {
                fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
            }
        }
    }
    folder
}

#[test]
fn golden_exports_are_the_model_that_they_were_made_from() {
    let llama = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/archs/llama");
    let original = HfDirectory::open(&llama).unwrap();
    for (name, files) in [("script", 6), ("dynamo", 7)] {
        let folder = golden(name);
        let model = open_model(&folder.path().join("model.onnx")).unwrap();
        assert_eq!(model.format(), "onnx");
        assert_eq!(model.config(), original.config(), "{name}");
        assert_eq!(model.chat_template(), original.chat_template(), "{name}");
        assert_eq!(model.files().len(), files, "{name}");
        assert_eq!(model.tensor_names(), original.tensor_names(), "{name}");
        for tensor in original.tensor_names() {
            let (found, expected) = (dense(&*model, tensor), dense(&original, tensor));
            assert_eq!((found.rows, found.cols), (expected.rows, expected.cols), "{tensor}");
            assert_eq!(elements::<2>(&found), elements::<2>(&expected), "{name}: {tensor}");
        }
    }
}

#[test]
fn every_style_of_export_gives_the_same_weights() {
    for style in Style::ALL {
        let folder = tiny_folder(style);
        let model = open_in(&folder, &export(style, &config_of(&folder)));
        check_values(&model.unwrap_or_else(|error| panic!("{style:?}: {error}")));
    }
}

#[test]
fn biases_are_found_in_every_style() {
    for style in Style::ALL {
        for model_type in ["qwen2", "starcoder2"] {
            if model_type == "starcoder2" && style.is_gen_ai() {
                continue;
            }
            let folder = tiny_folder_of(model_type, style);
            let model = export(style, &config_of(&folder));
            assert!(
                model.tensors.iter().any(|tensor| tensor.name.ends_with("bias"))
                    || style == Style::Script
            );
            let found = open_in(&folder, &model);
            check_values(&found.unwrap_or_else(|error| panic!("{model_type}, {style:?}: {error}")));
        }
    }
}

#[test]
fn rows_of_neighbours_are_served_in_order_or_refused() {
    for (style, is_read) in [(Style::Plain, true), (Style::Gemm, true), (Style::Dynamo, false)] {
        let folder = tiny_folder_of("glm4", style);
        let model = open_in(&folder, &export(style, &config_of(&folder)));
        if !is_read {
            let error = model.unwrap_err().to_string();
            assert!(error.contains("whose rows stand in the order of neighbours"), "{error}");
            continue;
        }
        let model = model.unwrap();
        check_values(&model);
        let order = Layout::Interleaved { head_dim: 4, first: 0, rotated: 2 };
        for (part, layout) in [("q", order), ("k", order), ("v", Layout::AsStored)] {
            assert_eq!(dense(&model, &format!("blk.1.attn_{part}.weight")).layout, layout);
        }
    }
}

#[test]
fn norms_that_lack_1_are_refused_unless_it_has_been_added() {
    for style in [Style::Plain, Style::Dynamo] {
        let folder = tiny_folder_of("gemma3_text", style);
        let mut model = export(style, &config_of(&folder));
        check_values(&open_in(&folder, &model).unwrap());
        // As in a graph that adds 1 to it before it is multiplied with.
        let name = "layers.1.input_layernorm.weight";
        if style == Style::Plain {
            model.node(name).op = "Add".to_owned();
            let error = open_in(&folder, &model).unwrap_err().to_string();
            assert!(error.contains("no node tells whether 1 is added"), "{error}");
        }
    }
}

#[test]
fn fused_weight_is_served_where_it_lies() {
    let folder = tiny_folder(Style::GenAiFused);
    let model = export(Style::GenAiFused, &config_of(&folder));
    let model = open_in(&folder, &model).unwrap();
    let [q, k, v] = ["q", "k", "v"].map(|part| dense(&model, &format!("blk.1.attn_{part}.weight")));
    assert_eq!([q, k, v].map(|part| part.layout), [Layout::Transposed { stride: 16, step: 1 }; 3]);
    let start = q.bytes.as_ptr().addr();
    let offsets = [k, v].map(|part| part.bytes.as_ptr().addr() - start);
    assert_eq!(offsets, [4 * 8, 4 * 12]);
}

#[test]
fn fused_weight_of_a_gemm_is_cut_into_rows() {
    let folder = tiny_folder(Style::GenAiFused);
    let mut model = export(Style::GenAiFused, &config_of(&folder));
    let weight = model.tensor("layers.1.attn.qkv_proj.MatMul.weight");
    let columns: Vec<[u8; 4]> = weight.raw.take().unwrap().as_chunks().0.to_vec();
    weight.raw = Some((0..16 * 8).flat_map(|i| columns[i % 8 * 16 + i / 8]).collect());
    weight.dims = vec![16, 8];
    let node = model.node("layers.1.attn.qkv_proj.MatMul.weight");
    node.op = "Gemm".to_owned();
    node.attributes = attribute("transB", &varint(3, 1));
    let model = open_in(&folder, &model).unwrap();
    check_values(&model);
    assert_eq!(dense(&model, "blk.1.attn_v.weight").layout, Layout::AsStored);
}

#[test]
fn weights_in_other_files_and_half_precision_are_read() {
    for style in [Style::Script, Style::GenAiFused] {
        let folder = tiny_folder(style);
        let mut model = export(style, &config_of(&folder));
        fs::create_dir_all(folder.path().join("data")).unwrap();
        let data = model.move_out("data/weights.bin");
        fs::write(folder.path().join("data/weights.bin"), data).unwrap();
        let model = open_in(&folder, &model).unwrap();
        check_values(&model);
        assert!(model.files().iter().any(|path| path.ends_with("data/weights.bin")));
        assert_eq!(model.files().len(), 3);
    }
    let folder = tiny_folder(Style::Dynamo);
    let mut model = export(Style::Dynamo, &config_of(&folder));
    let wide = model.tensor("model.norm.weight").raw.clone().unwrap();
    let wide = wide.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes) / 1000.0);
    for (data_type, dtype, narrow) in [
        (
            10,
            DType::F16,
            wide.clone().flat_map(|x| f16::from_f32(x).to_le_bytes()).collect::<Vec<_>>(),
        ),
        (16, DType::BF16, wide.clone().flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect()),
    ] {
        let norm = model.tensor("model.norm.weight");
        (norm.data_type, norm.raw) = (data_type, Some(narrow.clone()));
        let opened = open_in(&folder, &model).unwrap();
        let found = dense(&opened, "output_norm.weight");
        assert_eq!((found.dtype, found.bytes), (dtype, &narrow[..]));
    }
}

#[test]
fn packed_float_data_is_served_like_raw_data() {
    let folder = tiny_folder(Style::Plain);
    let mut model = export(Style::Plain, &config_of(&folder));
    for tensor in &mut model.tensors {
        tensor.more = bytes(4, &tensor.raw.take().unwrap());
    }
    check_values(&open_in(&folder, &model).unwrap());
}

#[test]
fn weight_behind_casts_and_two_transposes_is_found() {
    let folder = tiny_folder(Style::Script);
    let mut model = export(Style::Script, &config_of(&folder));
    let node = model.nodes.iter_mut().find(|node| node.name.ends_with("q_proj/MatMul")).unwrap();
    let weight = std::mem::replace(&mut node.inputs[1], "four".to_owned());
    for (op, from, to) in [
        ("Transpose", &*weight, "one"),
        ("Cast", "one", "two"),
        ("Transpose", "two", "three"),
        ("Identity", "three", "four"),
    ] {
        let (inputs, outputs) = (vec![from.to_owned()], vec![to.to_owned()]);
        let at =
            model.nodes.iter().position(|node| node.inputs.contains(&"four".to_owned())).unwrap();
        model.nodes.insert(at, Node { op: op.to_owned(), inputs, outputs, ..Node::default() });
    }
    check_values(&open_in(&folder, &model).unwrap());
}

#[test]
fn one_initializer_for_norms_of_equal_values_is_found_by_its_nodes() {
    let folder = tiny_folder(Style::Dynamo);
    let mut model = export(Style::Dynamo, &config_of(&folder));
    model.node("layers.1.input_layernorm.weight").inputs[1] =
        "model.layers.0.input_layernorm.weight".to_owned();
    model.tensors.retain(|tensor| !tensor.name.ends_with("layers.1.input_layernorm.weight"));
    let model = open_in(&folder, &model).unwrap();
    let [first, second] =
        [0, 1].map(|block| dense(&model, &format!("blk.{block}.attn_norm.weight")).bytes);
    assert_eq!(first.as_ptr(), second.as_ptr());
}

#[test]
fn output_projection_that_is_the_embedding_is_left_out() {
    // By the graph: the embedding, transposed, is the output projection.
    let folder = tiny_folder(Style::Plain);
    let mut model = export(Style::Plain, &config_of(&folder));
    model.tensors.retain(|tensor| tensor.name != "lm_head.weight");
    let transpose = model.nodes.iter_mut().find(|node| node.inputs[0] == "lm_head.weight").unwrap();
    transpose.inputs[0] = "model.embed_tokens.weight".to_owned();
    model.nodes.last_mut().unwrap().name = "/lm_head/MatMul".to_owned();
    let opened = open_in(&folder, &model).unwrap();
    assert!(opened.config().tied_embeddings && !opened.tensor_names().contains(&"output.weight"));

    // By the configuration: a transposed copy of its own is in the file, or none. Another matrix
    // counts, whatever the configuration says.
    let path = folder.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["tie_word_embeddings"] = true.into();
    fs::write(&path, config.to_string()).unwrap();
    let mut model = export(Style::GenAi, &config_of(&folder));
    let opened = open_in(&folder, &model).unwrap();
    assert!(!opened.config().tied_embeddings && opened.tensor_names().contains(&"output.weight"));
    assert!(
        opened.warnings()[0].contains("the graph has another matrix"),
        "{:?}",
        opened.warnings()
    );

    let values_of = |model: &Model, name: &str| {
        let tensor = model.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        tensor.raw.clone().unwrap()
    };
    let embedding = values_of(&model, "model.embed_tokens.weight");
    let transposed: Vec<u8> = (0..8)
        .flat_map(|col| (0..10).map(move |row| 4 * (8 * row + col)))
        .flat_map(|at| embedding[at..at + 4].to_vec())
        .collect();
    let is_output = |tensor: &Tensor| tensor.name == "lm_head.MatMul.weight";
    model.tensors.iter_mut().find(|tensor| is_output(tensor)).unwrap().raw = Some(transposed);
    for _ in 0..2 {
        let opened = open_in(&folder, &model).unwrap();
        assert!(opened.config().tied_embeddings && opened.warnings().is_empty());
        assert!(!opened.tensor_names().contains(&"output.weight"));
        model.tensors.retain(|tensor| !is_output(tensor));
    }
}
