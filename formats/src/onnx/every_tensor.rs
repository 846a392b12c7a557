//! Every tensor of a model, wherever in it: what another runtime may read.

use std::path::Path;

use super::{
    external::ExternalFiles,
    graph::{Data, Initializer},
    wire::Message,
};
use crate::{Limits, MappedFile, Result, limits::check};

/// Messages in which tensors may lie, for each node that a graph may have: the node, its attributes
/// and their tensors.
const MESSAGES_PER_NODE: u64 = 16;

/// Checks every file that an `.onnx` file names: each must be a regular file in the model's folder
/// or below it, to which no link leads, as [`OnnxModel::open`] asks of those with weights.
///
/// For whoever hands the model to another runtime, which would open them all. Whether the files
/// hold what the model says is that runtime's business.
///
/// # Errors
/// `Io`, `Malformed`, `Unsupported` for a link, `LimitExceeded`.
///
/// [`OnnxModel::open`]: super::OnnxModel::open
pub fn check_external_data(path: &Path) -> Result<()> {
    let model = MappedFile::open(path)?;
    let mut files = ExternalFiles::new(path, path.parent().unwrap_or(path))?;
    let limit = MESSAGES_PER_NODE * Limits::default().node_count;
    let (mut unread, mut count) = (vec![Message::new(path, "ModelProto", &model)], 1);
    while let Some(message) = unread.pop() {
        for field in message.fields() {
            let field = field?;
            match nested(message.kind(), field.number) {
                Some("TensorProto") => {
                    let tensor = Initializer::read(path, field.message("TensorProto")?)?;
                    if let Data::External(external) = &tensor.data {
                        files.file(tensor.name, external)?;
                    }
                }
                Some(kind) => {
                    count += 1;
                    check(path, "messages of a model", count, limit)?;
                    unread.push(field.message(kind)?);
                }
                None => {}
            }
        }
    }
    Ok(())
}

/// The kind of message in a field, if it is a tensor or may have some within.
fn nested(kind: &str, field: u64) -> Option<&'static str> {
    match (kind, field) {
        ("ModelProto", 7) | ("TrainingInfoProto", 1 | 2) | ("AttributeProto", 6 | 11) => {
            Some("GraphProto")
        }
        ("ModelProto", 20) => Some("TrainingInfoProto"),
        ("ModelProto", 25) => Some("FunctionProto"),
        ("GraphProto", 1) | ("FunctionProto", 7) => Some("NodeProto"),
        ("NodeProto", 5) | ("FunctionProto", 11) => Some("AttributeProto"),
        ("GraphProto", 15) | ("AttributeProto", 22 | 23) => Some("SparseTensorProto"),
        ("GraphProto", 5) | ("AttributeProto", 5 | 10) | ("SparseTensorProto", 1 | 2) => {
            Some("TensorProto")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::onnx::encode::{Model, Node, Tensor, attribute, bytes};

    /// Puts an encoded tensor somewhere in a model.
    type Place<'a> = &'a dyn Fn(&[u8]) -> Vec<u8>;

    /// A model whose one tensor, with values in a file of the given name, lies where `place` puts
    /// it.
    fn model(location: &str, place: Place<'_>) -> Vec<u8> {
        let external = vec![("location", location.to_owned())];
        let tensor = Tensor { name: "t".to_owned(), external, ..Tensor::default() };
        let model = Model { tensors: vec![tensor], ..Model::default() }.graph();
        // The `TensorProto` itself, without the tag and the length in front.
        place(&model[2..])
    }

    #[test]
    fn external_data_anywhere_in_a_model_is_checked() {
        let graph = |graph: &[u8]| bytes(7, graph);
        let node = |attributes: Vec<u8>| {
            let node = Node { op: "If".to_owned(), attributes, ..Node::default() };
            Model { nodes: vec![node], ..Model::default() }.graph()
        };
        let places: [(&str, Place<'_>); 6] = [
            ("initializer", &|t| graph(&bytes(5, t))),
            ("sparse initializer", &|t| graph(&bytes(15, &bytes(1, t)))),
            ("constant", &|t| graph(&node(attribute("value", &bytes(5, t))))),
            ("branch", &|t| graph(&node(attribute("then_branch", &bytes(6, &bytes(5, t)))))),
            ("function", &|t| bytes(25, &bytes(7, &bytes(5, &bytes(5, t))))),
            ("training", &|t| bytes(20, &bytes(1, &bytes(5, t)))),
        ];
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("values.bin"), [0; 4]).unwrap();
        let path = folder.path().join("model.onnx");
        for (what, place) in places {
            fs::write(&path, model("values.bin", place)).unwrap();
            check_external_data(&path).unwrap_or_else(|error| panic!("{what}: {error}"));
            fs::write(&path, model("../values.bin", place)).unwrap();
            let error = check_external_data(&path).err().unwrap_or_else(|| panic!("{what}"));
            assert!(error.to_string().contains("location of its external data"), "{what}: {error}");
        }
    }

    #[test]
    fn external_data_of_nested_branches_is_checked_without_recursion() {
        let tensor = model("../values.bin", &|t| bytes(5, t));
        let nested = (0..2_000)
            .fold(tensor, |graph, _| bytes(1, &attribute("then_branch", &bytes(6, &graph))));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        fs::write(&path, bytes(7, &nested)).unwrap();
        let error = check_external_data(&path).unwrap_err();
        assert!(error.to_string().contains("location of its external data"), "{error}");
    }
}
