//! A folder that ONNX Runtime runs by itself and that ONNX Runtime GenAI loads.

mod blocks;
mod decoder;
mod graph;
mod protobuf;
mod settings;

use std::path::Path;

use serde_json::json;
use slim_formats::ModelSource;

use self::graph::Graph;
use crate::{
    Report, Result,
    folder::Folder,
    tensor::{check_values, tensors},
};
pub(crate) use decoder::lacks;

pub(crate) fn write(
    model: &dyn ModelSource,
    target: &Path,
    on_tensor: &mut dyn FnMut(&str),
) -> Result<Report> {
    let warnings = check_values(model, |_| false)?;
    let folder = Folder::create(target)?;
    let mut graph = Graph::create(folder.path())?;
    decoder::add_decoder(&mut graph, model, on_tensor)?;
    graph.finish()?;
    folder.json("genai_config.json", &settings::genai_config(model.config()))?;
    folder.describe(model, json!({}))?;
    let tensors = tensors(model)?.len();
    Ok(Report { tensors, file_bytes: folder.finish()?, layers: Vec::new(), warnings })
}

#[cfg(test)]
mod tests;
