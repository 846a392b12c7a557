//! Tiny ONNX files, written field by field.

/// A model of one graph.
#[derive(Debug, Clone, Default)]
pub struct Model {
    pub tensors: Vec<Tensor>,
    pub nodes: Vec<Node>,
    /// Encoded fields that the graph has besides.
    pub more: Vec<u8>,
}

/// A `TensorProto`.
#[derive(Debug, Clone, Default)]
pub struct Tensor {
    pub name: String,
    pub dims: Vec<i64>,
    pub data_type: u64,
    pub raw: Option<Vec<u8>>,
    pub external: Vec<(&'static str, String)>,
    /// Encoded fields that it has besides.
    pub more: Vec<u8>,
}

/// A `NodeProto`.
#[derive(Debug, Clone, Default)]
pub struct Node {
    pub op: String,
    pub name: String,
    pub inputs: Vec<String>,
    pub outputs: Vec<String>,
    pub scopes: Option<String>,
    /// Encoded `attribute` fields.
    pub attributes: Vec<u8>,
}

impl Model {
    pub fn encoded(&self) -> Vec<u8> {
        [varint(1, 10), bytes(7, &self.graph())].concat()
    }

    /// The `GraphProto`.
    pub fn graph(&self) -> Vec<u8> {
        let nodes = self.nodes.iter().flat_map(|node| bytes(1, &node.encoded()));
        let tensors = self.tensors.iter().flat_map(|tensor| bytes(5, &tensor.encoded()));
        nodes.chain(tensors).chain(self.more.iter().copied()).collect()
    }
}

impl Tensor {
    fn encoded(&self) -> Vec<u8> {
        let mut out = bytes(8, self.name.as_bytes());
        out.extend(self.dims.iter().flat_map(|&dim| varint(1, dim.cast_unsigned())));
        out.extend(varint(2, self.data_type));
        out.extend(self.raw.iter().flat_map(|raw| bytes(9, raw)));
        out.extend(self.external.iter().flat_map(|(key, value)| bytes(13, &entry(key, value))));
        if !self.external.is_empty() {
            out.extend(varint(14, 1));
        }
        out.extend(&self.more);
        out
    }
}

impl Node {
    fn encoded(&self) -> Vec<u8> {
        let inputs = self.inputs.iter().flat_map(|name| bytes(1, name.as_bytes()));
        let outputs = self.outputs.iter().flat_map(|name| bytes(2, name.as_bytes()));
        let mut out: Vec<u8> = inputs.chain(outputs).collect();
        out.extend(bytes(3, self.name.as_bytes()));
        out.extend(bytes(4, self.op.as_bytes()));
        out.extend(&self.attributes);
        let scopes = self.scopes.iter().map(|scopes| entry("pkg.torch.onnx.name_scopes", scopes));
        out.extend(scopes.flat_map(|entry| bytes(9, &entry)));
        out
    }
}

/// An attribute of a node with one encoded field as its value.
pub fn attribute(name: &str, value: &[u8]) -> Vec<u8> {
    bytes(5, &[&bytes(1, name.as_bytes()), value].concat())
}

fn entry(key: &str, value: &str) -> Vec<u8> {
    [bytes(1, key.as_bytes()), bytes(2, value.as_bytes())].concat()
}

/// A field with a varint.
pub fn varint(field: u64, value: u64) -> Vec<u8> {
    [number(field << 3), number(value)].concat()
}

/// A field with a `float`.
pub fn float(field: u64, value: f32) -> Vec<u8> {
    [number(field << 3 | 5), value.to_le_bytes().to_vec()].concat()
}

/// A field with bytes.
pub fn bytes(field: u64, value: &[u8]) -> Vec<u8> {
    [number(field << 3 | 2), number(value.len() as u64), value.to_vec()].concat()
}

fn number(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}
