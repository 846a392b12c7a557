//! What this project needs of an ONNX graph: its initializers, and which node takes which of them.
//!
//! Graphs inside of attributes (the branches of an `If`), functions and training information are
//! not looked into: what lies there is not found, which is an error where a weight is missing.
//!
//! # Source
//! Field numbers and meanings: `onnx/onnx.proto` of github.com/onnx/onnx, version 1.21.

use std::{ops::Range, path::Path};

use super::wire::{Field, Message};
use crate::{DType, FormatError, Limits, Result, limits::check};

/// Dimensions of a tensor; weights have one or two.
const MAX_DIMENSIONS: u64 = 64;
/// Inputs and outputs of a node, and its attributes.
const MAX_NODE_FIELDS: u64 = 1 << 16;

/// The main graph of a model.
#[derive(Debug)]
pub struct Graph<'a> {
    message: Message<'a>,
    path: &'a Path,
    limits: &'a Limits,
    /// In the order of the file.
    pub initializers: Vec<Initializer<'a>>,
}

/// A constant tensor.
#[derive(Debug)]
pub struct Initializer<'a> {
    /// Its name, under which nodes take it.
    pub name: &'a str,
    /// Outermost first.
    pub dims: Vec<u64>,
    /// `TensorProto.DataType`.
    pub data_type: u64,
    /// Where its values are.
    pub data: Data<'a>,
}

/// Where the values of a tensor are.
#[derive(Debug)]
pub enum Data<'a> {
    /// In these bytes of the model file, little endian.
    Inline(Range<usize>),
    /// In another file.
    External(External<'a>),
    /// In a form that no exporter gives weights.
    Other(&'static str),
}

/// Values in another file, as the model file says it.
#[derive(Debug, Clone, Copy, Default)]
pub struct External<'a> {
    /// The path of the file, relative to the folder of the model.
    pub location: Option<&'a str>,
    /// The first byte, a decimal number; 0 if none is given.
    pub offset: Option<&'a str>,
    /// How many bytes, a decimal number; as many as the values take if none is given.
    pub length: Option<&'a str>,
}

/// An operation.
#[derive(Debug)]
pub struct Node<'a> {
    /// Its name, empty if it has none.
    pub name: &'a str,
    /// The operator: `MatMul`.
    pub op: &'a str,
    /// Names of the values that it takes; an empty one stands for an input that is left out.
    pub inputs: Vec<&'a str>,
    /// Names of the values that it gives.
    pub outputs: Vec<&'a str>,
    /// Its `pkg.torch.onnx.name_scopes`, if it has them.
    pub name_scopes: Option<&'a str>,
    message: Message<'a>,
}

impl<'a> Graph<'a> {
    /// Reads the initializers of a model; the bytes of their values are not touched.
    ///
    /// # Errors
    /// `Malformed` if the file is not a model or a name is taken twice, `Unsupported` for sparse
    /// initializers, `LimitExceeded`.
    pub fn read(path: &'a Path, bytes: &'a [u8], limits: &'a Limits) -> Result<Self> {
        let mut graph = None;
        for field in Message::new(path, "ModelProto", bytes).fields() {
            let field = field?;
            if field.number == 7 && graph.replace(field.message("GraphProto")?).is_some() {
                return Err(FormatError::malformed(path, "the model", "", "two graphs", "one"));
            }
        }
        let message = graph
            .ok_or_else(|| FormatError::malformed(path, "the model", "", "no graph", "one"))?;
        let mut initializers = Vec::new();
        for field in message.fields() {
            let field = field?;
            match field.number {
                5 => {
                    let count = initializers.len() as u64 + 1;
                    check(path, "initializers", count, limits.tensor_count)?;
                    initializers.push(Initializer::read(path, field.message("TensorProto")?)?);
                }
                15 => return Err(FormatError::unsupported(path, "a sparse initializer", "")),
                _ => {}
            }
        }
        Ok(Self { message, path, limits, initializers })
    }

    /// The nodes in the order of the file.
    ///
    /// # Errors
    /// `Malformed`, `LimitExceeded`; nothing follows an error of the graph itself.
    pub fn nodes(&self) -> impl Iterator<Item = Result<Node<'a>>> {
        let (path, limit) = (self.path, self.limits.node_count);
        let is_node =
            |field: &Result<Field<'_>>| field.as_ref().map_or(true, |field| field.number == 1);
        self.message.fields().filter(is_node).zip(1..).map(move |(field, count)| {
            check(path, "nodes", count, limit)?;
            Node::read(path, field?.message("NodeProto")?)
        })
    }
}

impl<'a> Initializer<'a> {
    /// Reads a `TensorProto`.
    ///
    /// # Errors
    /// `Malformed` if it contradicts itself, `LimitExceeded`.
    pub fn read(path: &'a Path, message: Message<'a>) -> Result<Self> {
        let mut tensor =
            Self { name: "", dims: Vec::new(), data_type: 0, data: Data::Inline(0..0) };
        let mut external = External::default();
        let (mut is_external, mut raw, mut floats, mut other) = (false, None, None, None);
        for field in message.fields() {
            let field = field?;
            match field.number {
                1 => tensor.add_dims(path, &field)?,
                2 => tensor.data_type = field.varint()?,
                3 => other = Some("segments"),
                // Packed, as every writer writes them, they are the values in their order.
                4 => {
                    other = other.or(floats.is_some().then_some("several runs of `float_data`"));
                    floats = Some(field.range()?);
                }
                5 | 6 | 7 | 10 | 11 => other = Some("a typed list in place of `raw_data`"),
                8 => tensor.name = field.text()?,
                9 => raw = Some(field.range()?),
                13 => external.add(path, field.message("StringStringEntryProto")?)?,
                14 => is_external = field.varint()? == 1,
                _ => {}
            }
        }
        tensor.data = match (is_external, other, raw, floats) {
            (true, None, None, None) => Data::External(external),
            (false, None, Some(range), None) | (false, None, None, Some(range)) => {
                Data::Inline(range)
            }
            (false, Some(form), None, _) => Data::Other(form),
            (false, None, None, None) => Data::Inline(0..0),
            _ => {
                let place = format!("initializer `{}`", tensor.name);
                let found = "values in more than one form";
                return Err(FormatError::malformed(path, place, "", found, "one"));
            }
        };
        Ok(tensor)
    }

    fn add_dims(&mut self, path: &Path, field: &Field<'_>) -> Result<()> {
        for dim in field.varints() {
            let dim = dim?;
            if dim.cast_signed() < 0 {
                let place = format!("initializer `{}`", self.name);
                let found = format!("dimension {}", dim.cast_signed());
                return Err(FormatError::malformed(path, place, "", found, "at least 0"));
            }
            check(path, "dimensions of a tensor", self.dims.len() as u64 + 1, MAX_DIMENSIONS)?;
            self.dims.push(dim);
        }
        Ok(())
    }

    /// The number of values, `None` on overflow.
    pub fn elements(&self) -> Option<u64> {
        self.dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim))
    }

    /// The element type, if it is one that weights have.
    pub fn dtype(&self) -> Option<DType> {
        match self.data_type {
            1 => Some(DType::F32),
            10 => Some(DType::F16),
            16 => Some(DType::BF16),
            _ => None,
        }
    }
}

impl<'a> External<'a> {
    /// Enters one key; those that only ONNX Runtime knows are its business, `checksum` is not
    /// checked by anyone.
    fn add(&mut self, path: &Path, entry: Message<'a>) -> Result<()> {
        let (key, value) = key_and_value(entry)?;
        let place = match key {
            "location" => &mut self.location,
            "offset" => &mut self.offset,
            "length" => &mut self.length,
            _ => return Ok(()),
        };
        if place.replace(value).is_some() {
            let place = format!("key `{key}` of external data");
            return Err(FormatError::malformed(path, place, "", "a second one", "one"));
        }
        Ok(())
    }
}

impl<'a> Node<'a> {
    fn read(path: &Path, message: Message<'a>) -> Result<Self> {
        let mut node = Self {
            name: "",
            op: "",
            inputs: Vec::new(),
            outputs: Vec::new(),
            name_scopes: None,
            message,
        };
        for (field, count) in message.fields().zip(1..) {
            let field = field?;
            check(path, "fields of a node", count, MAX_NODE_FIELDS)?;
            match field.number {
                1 => node.inputs.push(field.text()?),
                2 => node.outputs.push(field.text()?),
                3 => node.name = field.text()?,
                4 => node.op = field.text()?,
                9 => {
                    let (key, value) = key_and_value(field.message("StringStringEntryProto")?)?;
                    if key == "pkg.torch.onnx.name_scopes" {
                        node.name_scopes = Some(value);
                    }
                }
                _ => {}
            }
        }
        Ok(node)
    }

    /// The whole number `name` among its attributes.
    pub fn number(&self, name: &str) -> Result<Option<u64>> {
        self.attribute(name, 3)?.map(|field| field.varint()).transpose()
    }

    /// The float `name` among its attributes.
    pub fn float(&self, name: &str) -> Result<Option<f32>> {
        self.attribute(name, 2)?.map(|field| field.f32()).transpose()
    }

    /// Whether it exchanges the dimensions of a matrix: a `Transpose` does unless its attribute
    /// says otherwise.
    pub fn swaps_two_dimensions(&self) -> Result<bool> {
        let mut order = Vec::new();
        for field in self.attribute_fields("perm")? {
            let field = field?;
            if field.number == 8 {
                order.extend(field.varints().take(3));
            }
            if order.len() > 2 {
                break;
            }
        }
        let order = order.into_iter().collect::<Result<Vec<_>>>()?;
        Ok(order.is_empty() || order == [1, 0])
    }

    /// The last field `number` of the attribute `name`.
    fn attribute(&self, name: &str, number: u64) -> Result<Option<Field<'a>>> {
        let mut found = None;
        for field in self.attribute_fields(name)? {
            let field = field?;
            if field.number == number {
                found = Some(field);
            }
        }
        Ok(found)
    }

    /// The fields of the attribute `name`, none if the node has no such attribute.
    fn attribute_fields(&self, name: &str) -> Result<impl Iterator<Item = Result<Field<'a>>>> {
        for field in self.message.fields() {
            let field = field?;
            if field.number != 5 {
                continue;
            }
            let attribute = field.message("AttributeProto")?;
            for part in attribute.fields() {
                let part = part?;
                if part.number == 1 && part.text()? == name {
                    return Ok(Some(attribute.fields()).into_iter().flatten());
                }
            }
        }
        Ok(None.into_iter().flatten())
    }
}

fn key_and_value<'a>(entry: Message<'a>) -> Result<(&'a str, &'a str)> {
    let (mut key, mut value) = ("", "");
    for field in entry.fields() {
        let field = field?;
        match field.number {
            1 => key = field.text()?,
            2 => value = field.text()?,
            _ => {}
        }
    }
    Ok((key, value))
}
