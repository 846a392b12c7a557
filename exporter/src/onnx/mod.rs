//! A folder that ONNX Runtime runs by itself and that ONNX Runtime GenAI loads.

mod blocks;
mod decoder;
mod graph;
mod protobuf;
mod settings;

use serde_json::json;
use slim_formats::{ModelSource, OutputPath};

use self::graph::{DATA_FILE, Graph};
use crate::{
    Report, Result,
    folder::Folder,
    tensor::{check_values, tensors},
};
pub(crate) use decoder::lacks;

pub(crate) fn write(
    model: &dyn ModelSource,
    output: OutputPath<'_>,
    on_tensor: &mut dyn FnMut(&str),
) -> Result<Report> {
    let mut warnings = check_values(model, |_| false)?;
    warnings.extend(decoder::warning(model.config()));
    let folder = Folder::create(output)?;
    folder.describe(model, json!({}))?;
    folder.json("genai_config.json", &settings::genai_config(model.config()))?;
    let mut graph = Graph::new(folder.new_file(DATA_FILE, decoder::data_bytes(model)?)?);
    decoder::add_decoder(&mut graph, model, on_tensor)?;
    folder.file("model.onnx", &graph.finish()?)?;
    let tensors = tensors(model)?.len();
    Ok(Report { tensors, file_bytes: folder.finish()?, layers: Vec::new(), warnings })
}

#[cfg(test)]
mod tests;
