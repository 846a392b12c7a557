//! `--to safetensors`: a Hugging Face folder in fp16.

use half::f16;
use serde_json::json;
use slim_formats::{ModelSource, OutputPath, Weight, arch::Tensor};
use slim_kernels::weight;

use crate::{
    LayerLoss, Report, Result,
    folder::{Element, Folder, PlannedTensor},
    tensor::{Loss, check_values, for_each_panel, tensors, to_f16},
};

pub(crate) fn write(
    model: &dyn ModelSource,
    output: OutputPath<'_>,
    on_tensor: &mut dyn FnMut(&str),
) -> Result<Report> {
    let mut planned = Vec::new();
    for tensor in tensors(model)? {
        planned.push(plan_f16(tensor, model.require(&tensor.name)?));
    }
    let warnings = check_values(model, |_| true)?;
    let folder = Folder::create(output)?;
    folder.describe(model, json!({}))?;
    let mut layers = Vec::new();
    folder.tensors(&planned, &mut |PlannedTensor { source, .. }| {
        on_tensor(source);
        let (bytes, loss) = f16_bytes(source, model.require(source)?)?;
        layers.extend(loss);
        Ok(bytes)
    })?;
    Ok(Report { tensors: planned.len(), file_bytes: folder.finish()?, layers, warnings })
}

/// The tensor whose bytes [`f16_bytes`] gives.
pub(crate) fn plan_f16(tensor: &Tensor, weight: Weight<'_>) -> PlannedTensor {
    let shape = match weight::shape(weight) {
        (1, cols) => vec![cols],
        (rows, cols) => vec![rows, cols],
    };
    let (name, source) = (tensor.hf.name.clone(), tensor.name.clone());
    PlannedTensor { name, source, dtype: Element::F16, shape }
}

/// A tensor in fp16, and what a matrix loses.
pub(crate) fn f16_bytes(name: &str, weight: Weight<'_>) -> Result<(Vec<u8>, Option<LayerLoss>)> {
    let (rows, cols) = weight::shape(weight);
    let mut bytes = Vec::with_capacity(2 * rows * cols);
    let mut loss = Loss::default();
    for_each_panel(weight, |first, values| {
        let panel = to_f16(name, first, cols, values)?;
        let halves = panel.as_chunks().0.iter();
        let written: Vec<f32> = halves.map(|&half| f16::from_le_bytes(half).to_f32()).collect();
        loss.add(values, &written);
        bytes.extend(panel);
        Ok(())
    })?;
    let error = loss.relative();
    let loss = (rows > 1).then(|| LayerLoss { name: name.to_owned(), layout: "F16", error });
    Ok((bytes, loss))
}
