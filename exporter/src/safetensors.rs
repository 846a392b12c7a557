//! `--to safetensors`: a Hugging Face folder in fp16.

use serde_json::json;
use slim_formats::{
    DType, Decoder, ModelSource, OutputPath,
    arch::{BlockSpec, Mixer},
};

use crate::{
    Report, Result,
    folder::{Element, Folder, PlannedTensor},
    tensor::{StoredTensor, check_values, stored_tensors, tensors},
};

/// What transformers has in another order.
pub(crate) fn lacks(decoder: &Decoder) -> Option<String> {
    let is_tiled = |block: &BlockSpec| matches!(block.mixer, Mixer::DeltaNet(net) if net.is_tiled);
    let found = decoder.blocks.iter().position(is_tiled)?;
    Some(format!("block {found}, whose value heads are in the order of llama.cpp,"))
}

pub(crate) fn write(
    model: &dyn ModelSource,
    output: OutputPath<'_>,
    on_tensor: &mut dyn FnMut(&str),
) -> Result<Report> {
    let count = tensors(model)?.len();
    let decoder = plain(model);
    let stored = stored_tensors(decoder.tensors(), |tensor| &tensor.hf);
    let planned: Vec<PlannedTensor> = stored.iter().map(plan_f16).collect();
    let warnings = check_values(model, |_| true)?;
    let folder = Folder::create(output)?;
    folder.describe(model, json!({}))?;
    let mut layers = Vec::new();
    let encoded = stored.iter().map(|tensor| {
        let (bytes, losses) = tensor.encode(model, DType::F16, on_tensor)?;
        layers.extend(losses);
        Ok(bytes)
    });
    folder.tensors(&planned, encoded)?;
    Ok(Report { tensors: count, file_bytes: folder.finish()?, layers, warnings })
}

/// The model with its tensors where files of plain values have them.
fn plain(model: &dyn ModelSource) -> Decoder {
    let mut config = model.config().clone();
    if let Some(experts) = &mut config.features.experts {
        experts.are_mxfp4 = false;
    }
    Decoder::new(&config)
}

/// A tensor as F16.
pub(crate) fn plan_f16(tensor: &StoredTensor<'_>) -> PlannedTensor {
    PlannedTensor { name: tensor.name.to_owned(), dtype: Element::F16, shape: tensor.dims() }
}
