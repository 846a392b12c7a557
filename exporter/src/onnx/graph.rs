//! An ONNX model in the making: `model.onnx` holds the graph, `model.onnx.data` the bytes of its
//! tensors.
//!
//! Field numbers are those of `onnx.proto` (ONNX 1.20).

use std::collections::HashSet;

use super::protobuf::Message;
use crate::{Result, folder::NewFile};

/// The file of the data, beside the model.
pub const DATA_FILE: &str = "model.onnx.data";

/// ONNX 1.18, the first with opset 23.
const IR_VERSION: i64 = 11;
/// The first with `RMSNormalization`.
const OPSET: i64 = 23;
const CONTRIB_DOMAIN: &str = "com.microsoft";

/// Tensors start at multiples of a page, so that they can be mapped one by one.
pub const ALIGNMENT: u64 = 4096;

/// Element types of tensors, with their numbers in `TensorProto.DataType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    F32 = 1,
    U8 = 2,
    I32 = 6,
    I64 = 7,
    F16 = 10,
}

/// A dimension of an input or output.
#[derive(Debug, Clone, Copy)]
pub enum Dim {
    Fixed(usize),
    /// The same in every place that has this name.
    Named(&'static str),
}

/// An attribute of a node.
#[derive(Debug, Clone, Copy)]
pub enum Attribute {
    Int(i64),
    Float(f32),
}

/// The graph so far, and the file of its data.
pub struct Graph {
    /// A `GraphProto`.
    graph: Message,
    data: NewFile,
    /// Of nodes.
    outputs: HashSet<String>,
}

impl Graph {
    /// An empty graph; the data of its tensors goes to `data`.
    pub fn new(data: NewFile) -> Self {
        let mut graph = Message::default();
        graph.text(graph_proto::NAME, "model");
        Self { graph, data, outputs: HashSet::new() }
    }

    /// Declares an input.
    pub fn input(&mut self, name: &str, element: Element, dims: &[Dim]) {
        self.graph.message(graph_proto::INPUT, &value_info(name, element, dims));
    }

    /// Declares an output.
    pub fn output(&mut self, name: &str, element: Element, dims: &[Dim]) {
        self.graph.message(graph_proto::OUTPUT, &value_info(name, element, dims));
    }

    /// Adds a node of a standard operator, called as its first output.
    pub fn node(
        &mut self,
        operator: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: &[(&str, Attribute)],
    ) {
        self.add_node("", operator, inputs, outputs, attributes);
    }

    /// Adds a node of an operator that ONNX Runtime has beside the standard ones.
    pub fn contrib_node(
        &mut self,
        operator: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: &[(&str, Attribute)],
    ) {
        self.add_node(CONTRIB_DOMAIN, operator, inputs, outputs, attributes);
    }

    fn add_node(
        &mut self,
        domain: &str,
        operator: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: &[(&str, Attribute)],
    ) {
        let mut node = Message::default();
        for input in inputs {
            node.text(node_proto::INPUT, input);
        }
        for &output in outputs {
            let is_new = output.is_empty() || self.outputs.insert(output.to_owned());
            assert!(is_new, "two nodes give `{output}`");
            node.text(node_proto::OUTPUT, output);
        }
        node.text(node_proto::NAME, outputs[0]).text(node_proto::OP_TYPE, operator);
        for (name, value) in attributes {
            node.message(node_proto::ATTRIBUTE, &attribute(name, *value));
        }
        node.text(node_proto::DOMAIN, domain);
        self.graph.message(graph_proto::NODE, &node);
    }

    /// Adds a small tensor of integers: a shape, axes. It has no dimensions if it is a `scalar`.
    pub fn integers(&mut self, name: &str, values: &[i64], scalar: bool) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let dims = if scalar { &[][..] } else { &[values.len()] };
        let mut tensor = tensor(name, Element::I64, dims);
        tensor.bytes(tensor_proto::RAW_DATA, &bytes);
        self.graph.message(graph_proto::INITIALIZER, &tensor);
    }

    /// Adds a number.
    pub fn float(&mut self, name: &str, value: f32) {
        let mut tensor = tensor(name, Element::F32, &[]);
        tensor.bytes(tensor_proto::RAW_DATA, &value.to_le_bytes());
        self.graph.message(graph_proto::INITIALIZER, &tensor);
    }

    /// Adds a tensor whose little-endian bytes `pieces` gives in row-major order.
    pub fn tensor(
        &mut self,
        name: &str,
        element: Element,
        dims: &[usize],
        pieces: impl IntoIterator<Item = Result<Vec<u8>>>,
    ) -> Result<()> {
        let offset = self.data.bytes().next_multiple_of(ALIGNMENT);
        self.data.append(&vec![0; (offset - self.data.bytes()) as usize])?;
        for piece in pieces {
            self.data.append(&piece?)?;
        }
        let length = self.data.bytes() - offset;
        let mut tensor = tensor(name, element, dims);
        for (key, value) in [
            ("location", DATA_FILE),
            ("offset", &offset.to_string()),
            ("length", &length.to_string()),
        ] {
            let mut entry = Message::default();
            entry.text(string_entry_proto::KEY, key).text(string_entry_proto::VALUE, value);
            tensor.message(tensor_proto::EXTERNAL_DATA, &entry);
        }
        tensor.int(tensor_proto::DATA_LOCATION, tensor_proto::EXTERNAL);
        self.graph.message(graph_proto::INITIALIZER, &tensor);
        Ok(())
    }

    /// Writes what is left of the data; gives the model that refers to it.
    pub fn finish(self) -> Result<Vec<u8>> {
        self.data.finish()?;
        let mut model = Message::default();
        model
            .int(model_proto::IR_VERSION, IR_VERSION)
            .text(model_proto::PRODUCER_NAME, "slimllm")
            .text(model_proto::PRODUCER_VERSION, env!("CARGO_PKG_VERSION"))
            .message(model_proto::GRAPH, &self.graph)
            .message(model_proto::OPSET_IMPORT, &opset("", OPSET))
            .message(model_proto::OPSET_IMPORT, &opset(CONTRIB_DOMAIN, 1));
        Ok(model.as_bytes().to_vec())
    }
}

fn opset(domain: &str, version: i64) -> Message {
    let mut opset = Message::default();
    opset.text(opset_id_proto::DOMAIN, domain).int(opset_id_proto::VERSION, version);
    opset
}

fn value_info(name: &str, element: Element, dims: &[Dim]) -> Message {
    let mut shape = Message::default();
    for dim in dims {
        let mut dimension = Message::default();
        match dim {
            Dim::Fixed(size) => dimension.int(dimension_proto::DIM_VALUE, *size as i64),
            Dim::Named(name) => dimension.text(dimension_proto::DIM_PARAM, name),
        };
        shape.message(tensor_shape_proto::DIM, &dimension);
    }
    let mut tensor_type = Message::default();
    tensor_type
        .int(tensor_type_proto::ELEM_TYPE, element as i64)
        .message(tensor_type_proto::SHAPE, &shape);
    let mut value_type = Message::default();
    value_type.message(type_proto::TENSOR_TYPE, &tensor_type);
    let mut info = Message::default();
    info.text(value_info_proto::NAME, name).message(value_info_proto::TYPE, &value_type);
    info
}

fn attribute(name: &str, value: Attribute) -> Message {
    let mut attribute = Message::default();
    attribute.text(attribute_proto::NAME, name);
    match value {
        Attribute::Float(value) => attribute
            .float(attribute_proto::F, value)
            .int(attribute_proto::TYPE, attribute_proto::FLOAT),
        Attribute::Int(value) => attribute
            .int(attribute_proto::I, value)
            .int(attribute_proto::TYPE, attribute_proto::INT),
    };
    attribute
}

/// A tensor without its data.
fn tensor(name: &str, element: Element, dims: &[usize]) -> Message {
    let mut tensor = Message::default();
    for &dim in dims {
        tensor.int(tensor_proto::DIMS, dim as i64);
    }
    tensor.int(tensor_proto::DATA_TYPE, element as i64).text(tensor_proto::NAME, name);
    tensor
}

mod model_proto {
    pub const IR_VERSION: u32 = 1;
    pub const PRODUCER_NAME: u32 = 2;
    pub const PRODUCER_VERSION: u32 = 3;
    pub const GRAPH: u32 = 7;
    pub const OPSET_IMPORT: u32 = 8;
}

mod opset_id_proto {
    pub const DOMAIN: u32 = 1;
    pub const VERSION: u32 = 2;
}

mod graph_proto {
    pub const NODE: u32 = 1;
    pub const NAME: u32 = 2;
    pub const INITIALIZER: u32 = 5;
    pub const INPUT: u32 = 11;
    pub const OUTPUT: u32 = 12;
}

mod node_proto {
    pub const INPUT: u32 = 1;
    pub const OUTPUT: u32 = 2;
    pub const NAME: u32 = 3;
    pub const OP_TYPE: u32 = 4;
    pub const ATTRIBUTE: u32 = 5;
    pub const DOMAIN: u32 = 7;
}

mod attribute_proto {
    pub const NAME: u32 = 1;
    pub const F: u32 = 2;
    pub const I: u32 = 3;
    pub const TYPE: u32 = 20;
    /// Values of `TYPE`.
    pub const FLOAT: i64 = 1;
    pub const INT: i64 = 2;
}

mod tensor_proto {
    pub const DIMS: u32 = 1;
    pub const DATA_TYPE: u32 = 2;
    pub const NAME: u32 = 8;
    pub const RAW_DATA: u32 = 9;
    pub const EXTERNAL_DATA: u32 = 13;
    pub const DATA_LOCATION: u32 = 14;
    /// A value of `DATA_LOCATION`.
    pub const EXTERNAL: i64 = 1;
}

mod string_entry_proto {
    pub const KEY: u32 = 1;
    pub const VALUE: u32 = 2;
}

mod value_info_proto {
    pub const NAME: u32 = 1;
    pub const TYPE: u32 = 2;
}

mod type_proto {
    pub const TENSOR_TYPE: u32 = 1;
}

mod tensor_type_proto {
    pub const ELEM_TYPE: u32 = 1;
    pub const SHAPE: u32 = 2;
}

mod tensor_shape_proto {
    pub const DIM: u32 = 1;
}

mod dimension_proto {
    pub const DIM_VALUE: u32 = 1;
    pub const DIM_PARAM: u32 = 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether `bytes` holds `part`.
    fn holds(bytes: &[u8], part: &[u8]) -> bool {
        bytes.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn tensors_start_at_pages_and_the_graph_says_where() {
        let folder = tempfile::tempdir().unwrap();
        let data = NewFile::create(folder.path(), folder.path(), DATA_FILE, 0).unwrap();
        let mut graph = Graph::new(data);
        graph.tensor("a", Element::U8, &[3], [Ok(vec![1, 2]), Ok(vec![3])]).unwrap();
        graph.tensor("b", Element::F16, &[1, 2], [Ok(vec![4; 4])]).unwrap();
        let model = graph.finish().unwrap();

        let data = std::fs::read(folder.path().join(DATA_FILE)).unwrap();
        assert_eq!(data.len(), 4096 + 4);
        assert_eq!(data[..4], [1, 2, 3, 0]);
        assert_eq!(data[4096..], [4; 4]);

        // dims 1, dims 2, data_type FLOAT16, name "b".
        assert!(holds(&model, b"\x08\x01\x08\x02\x10\x0a\x42\x01b"));
        // external_data { key: "offset" value: "4096" }, { key: "length" value: "4" },
        // data_location EXTERNAL.
        assert!(holds(
            &model,
            b"\x6a\x0e\x0a\x06offset\x12\x044096\x6a\x0b\x0a\x06length\x12\x014\x70\x01"
        ));
    }

    #[test]
    fn nodes_name_operator_domain_and_attributes() {
        let folder = tempfile::tempdir().unwrap();
        let data = NewFile::create(folder.path(), folder.path(), DATA_FILE, 0).unwrap();
        let mut graph = Graph::new(data);
        let attributes = [("n", Attribute::Int(3)), ("f", Attribute::Float(1.0))];
        graph.contrib_node("Op", &["x"], &["y"], &attributes);
        let model = graph.finish().unwrap();
        let node = b"\x0a\x01x\x12\x01y\x1a\x01y\x22\x02Op\
            \x2a\x08\x0a\x01n\x18\x03\xa0\x01\x02\
            \x2a\x0b\x0a\x01f\x15\x00\x00\x80\x3f\xa0\x01\x01\
            \x3a\x0dcom.microsoft";
        assert!(holds(&model, node));
    }
}
