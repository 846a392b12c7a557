//! The JSON document of `inspect`. Scripts rely on its keys: add, do not rename.

use serde_json::{Map, Value as Json, json};
use slim_formats::{
    gguf::{Array, Metadata, Value},
    slim::{Fault, LayerInfo},
};

use super::contents::{Contents, Tensor, bits_per_weight};

pub fn document(contents: &Contents, faults: Option<&[Fault]>, with_metadata: bool) -> Json {
    let mut document = json!({
        "format": contents.format,
        "architecture": contents.architecture,
        "file_bytes": contents.file_bytes,
        "parameters": contents.parameters(),
        "bits_per_weight": bits_per_weight(contents.quantized_layers()),
        "chat_template_sha256": contents.template_sha256(),
        "linear_bits_per_weight": bits_per_weight(contents.linear_layers()),
        "tensors": contents.tensors.iter().map(tensor).collect::<Json>(),
    });
    if contents.format == "slim" {
        document["layers"] = contents.layers().iter().map(layer).collect();
    }
    if with_metadata {
        document["metadata"] = metadata(&contents.metadata);
    }
    if let Some(found) = faults {
        document["faults"] = self::faults(found);
    }
    document
}

fn tensor(tensor: &Tensor) -> Json {
    let Tensor { name, dtype, shape, bytes } = tensor;
    json!({ "name": name, "type": dtype, "shape": shape, "bytes": bytes })
}

fn layer(layer: &LayerInfo) -> Json {
    let layout = &layer.layout;
    let (sub_group, scale_bits) = layout.coding().sub_groups().unzip();
    json!({
        "name": layer.name,
        "rows": layout.rows(),
        "cols": layout.cols(),
        "group_size": layout.group_size(),
        "scales": layout.coding().name(),
        "sub_group": sub_group,
        "scale_bits": scale_bits,
        "bytes": layout.stored_bits() / 8,
        "error": layer.error.map(f32_json),
        "bits": layout.groups().iter().map(|group| group.bit_width.bits()).collect::<Vec<_>>(),
    })
}

pub fn faults(faults: &[Fault]) -> Json {
    let fault = |Fault { rule, place, found, expected }: &Fault| json!({ "rule": rule, "place": place, "found": found, "expected": expected });
    faults.iter().map(fault).collect()
}

/// Keys and values.
pub fn metadata(metadata: &Metadata) -> Json {
    let entries = metadata.iter().map(|(key, found)| (key.to_owned(), value(found)));
    Json::Object(entries.collect::<Map<_, _>>())
}

/// A metadata value; JSON has no infinite numbers, which become null.
pub fn value(value: &Value) -> Json {
    match value {
        Value::U8(value) => (*value).into(),
        Value::I8(value) => (*value).into(),
        Value::U16(value) => (*value).into(),
        Value::I16(value) => (*value).into(),
        Value::U32(value) => (*value).into(),
        Value::I32(value) => (*value).into(),
        Value::U64(value) => (*value).into(),
        Value::I64(value) => (*value).into(),
        Value::F32(value) => f32_json(*value),
        Value::F64(value) => (*value).into(),
        Value::Bool(value) => (*value).into(),
        Value::String(value) => value.as_str().into(),
        Value::Array(values) => array(values),
    }
}

fn array(array: &Array) -> Json {
    match array {
        Array::U8(values) => values.as_slice().into(),
        Array::I8(values) => values.as_slice().into(),
        Array::U16(values) => values.as_slice().into(),
        Array::I16(values) => values.as_slice().into(),
        Array::U32(values) => values.as_slice().into(),
        Array::I32(values) => values.as_slice().into(),
        Array::U64(values) => values.as_slice().into(),
        Array::I64(values) => values.as_slice().into(),
        Array::F32(values) => values.iter().map(|&value| f32_json(value)).collect(),
        Array::F64(values) => values.as_slice().into(),
        Array::Bool(values) => values.as_slice().into(),
        Array::String(values) => values.as_slice().into(),
        Array::Array(values) => values.iter().map(self::array).collect(),
    }
}

/// With the digits that tell an f32 from its neighbours: 1e-5, not 0.000009999999747378752.
fn f32_json(value: f32) -> Json {
    value.to_string().parse::<f64>().map_or(Json::Null, Json::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f32_values_keep_their_short_form() {
        for (number, text) in
            [(1e-5, "0.00001"), (0.1, "0.1"), (-3.5, "-3.5"), (f32::INFINITY, "null")]
        {
            assert_eq!(f32_json(number).to_string(), text);
        }
    }
}
