//! `--to gptq`: a Hugging Face folder with the linear layers as GPTQ packs them, second version.
//!
//! A weight is `scale * (code - zero_point)`. A layer of `n` output and `k` input channels is
//! - `qweight`, i32 `[k * bits / 32, n]`: codes, packed along the input channels, the first lowest,
//! - `qzeros`, i32 `[k / 32, n * bits / 32]`: zero points, packed along the output channels,
//! - `scales`, f16 `[k / 32, n]`,
//! - `g_idx`, i32 `[k]`: the group of each input channel.

mod fit;

use rayon::prelude::*;
use serde_json::{Value, json};
use slim_formats::{DType, Decoder, ModelSource, OutputPath, arch::Tensor, slim::ScaleCoding};

use self::fit::{Fitted, GROUP, fit};
use crate::{
    ExportError, LayerLoss, Report, Result,
    folder::{Element, Folder, PlannedTensor},
    safetensors::plan_f16,
    tensor::{Loss, StoredTensor, check_values, for_each_panel, stored_tensors, tensors},
};

/// What the layout has no place for: it holds linear layers, each by itself.
pub(crate) fn lacks(decoder: &Decoder) -> Option<String> {
    let is_stacked = |tensor: &&Tensor| tensor.is_linear() && tensor.hf.outer.is_some();
    if decoder.blocks.iter().any(|block| block.attention().is_none()) {
        return Some("a model with blocks of another kind than attention".into());
    }
    let found = decoder.tensors().iter().find(is_stacked)?;
    Some(format!("experts in one tensor, `{}`,", found.hf.name))
}

pub(crate) fn write(
    model: &dyn ModelSource,
    output: OutputPath<'_>,
    on_tensor: &mut dyn FnMut(&str),
) -> Result<Report> {
    let tensors = tensors(model)?;
    let bits = bits_for(model, tensors)?;
    let stored = stored_tensors(tensors, |tensor| &tensor.hf);
    let mut planned = Vec::new();
    for tensor in &stored {
        match is_layer(tensor) {
            true => planned.extend(plan_layer(tensor, bits)),
            false => planned.push(plan_f16(tensor)),
        }
    }
    let warnings = check_values(model, |tensor| !tensor.is_linear())?;
    let folder = Folder::create(output)?;
    folder.describe(model, quantization_config(bits))?;
    let mut layers = Vec::new();
    let mut encode = |tensor: &StoredTensor<'_>| -> Result<Vec<Vec<u8>>> {
        let (bytes, losses) = match is_layer(tensor) {
            true => pack_layer(model, tensor, bits, on_tensor)?,
            false => {
                let (bytes, losses) = tensor.encode(model, DType::F16, on_tensor)?;
                (vec![bytes], losses)
            }
        };
        layers.extend(losses);
        Ok(bytes)
    };
    let encoded = stored.iter().flat_map(|tensor| match encode(tensor) {
        Ok(bytes) => bytes.into_iter().map(Ok).collect(),
        Err(error) => vec![Err(error)],
    });
    folder.tensors(&planned, encoded)?;
    Ok(Report { tensors: tensors.len(), file_bytes: folder.finish()?, layers, warnings })
}

/// Whether it becomes codes: a linear layer, or several in one.
fn is_layer(stored: &StoredTensor<'_>) -> bool {
    stored.parts[0].0.is_linear()
}

/// Bits per code, one width for the whole model: 4 where that holds every layer as it is, which is
/// to say integer zero points and groups of up to 4 bits, otherwise 8. Real minima moved to the
/// next of 16 integer zero points cost SmolLM2 at 3.3 bits a fifth of its perplexity.
fn bits_for(model: &dyn ModelSource, tensors: &[Tensor]) -> Result<usize> {
    let refused = |what: String, hint| {
        Err(ExportError::unsupported(model.path(), "the GPTQ layout", what, hint))
    };
    let mut fits_4_bits = true;
    for Tensor { name, .. } in tensors.iter().filter(|tensor| tensor.is_linear()) {
        let Some(bands) = model.require(name)?.bands() else {
            let hint = "convert the model first; `--to safetensors` takes any";
            return refused(format!("tensor `{name}`, which is not quantized,"), hint);
        };
        let (rows, cols) = bands.shape();
        if !rows.is_multiple_of(8) || !cols.is_multiple_of(GROUP) {
            let what = format!(
                "tensor `{name}` of {rows} rows and {cols} columns, no multiples of 8 and {GROUP},"
            );
            return refused(what, "use `--to safetensors`");
        }
        let coding = bands.get(0).layout().coding();
        fits_4_bits &= coding == ScaleCoding::Paper && bands.widest().bits() <= 4;
    }
    Ok(if fits_4_bits { 4 } else { 8 })
}

fn quantization_config(bits: usize) -> Value {
    json!({"quantization_config": {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": false,
        "sym": false,
        "lm_head": false,
        "checkpoint_format": "gptq_v2",
    }})
}

/// The tensors of a layer, in the order of [`pack_layer`].
fn plan_layer(stored: &StoredTensor<'_>, bits: usize) -> [PlannedTensor; 4] {
    let (rows, cols) = shape_of(stored);
    let module = stored.name.trim_end_matches(".weight");
    let (groups, per_word) = (cols / GROUP, 32 / bits);
    [
        ("qweight", Element::I32, vec![cols / per_word, rows]),
        ("qzeros", Element::I32, vec![groups, rows / per_word]),
        ("scales", Element::F16, vec![groups, rows]),
        ("g_idx", Element::I32, vec![cols]),
    ]
    .map(|(part, dtype, shape)| PlannedTensor {
        name: format!("{module}.{part}"),
        dtype,
        shape,
    })
}

fn shape_of(stored: &StoredTensor<'_>) -> (usize, usize) {
    let (tensor, place) = stored.parts[0];
    (place.total_rows, tensor.shape().1)
}

/// The bytes of the four tensors of a layer, and what it loses.
fn pack_layer(
    model: &dyn ModelSource,
    stored: &StoredTensor<'_>,
    bits: usize,
    on_tensor: &mut dyn FnMut(&str),
) -> Result<(Vec<Vec<u8>>, Vec<LayerLoss>)> {
    let (rows, cols) = shape_of(stored);
    let groups = cols / GROUP;
    let mut fitted = vec![Fitted::default(); rows * groups];
    let mut losses = Vec::new();
    for &(tensor, place) in &stored.parts {
        on_tensor(&tensor.name);
        losses.push(fit_layer(model, tensor, bits, &mut |row, groups_of_row| {
            let row = place.first_row + place.layout.stored_row(row).unwrap_or(row);
            fitted[row * groups..][..groups].copy_from_slice(groups_of_row);
        })?);
    }

    let group = |row: usize, group: usize| &fitted[row * groups + group];
    let word = |value_at: &dyn Fn(usize) -> u8| -> [u8; 4] {
        let values = (0..32 / bits).map(|at| u32::from(value_at(at)) << (bits * at));
        values.fold(0, |word, value| word | value).to_le_bytes()
    };
    let per_word = 32 / bits;
    let grid = |height: usize, width: usize| {
        (0..height).flat_map(move |row| (0..width).map(move |col| (row, col)))
    };
    let qweight = grid(cols / per_word, rows).flat_map(|(first, row)| {
        let col = first * per_word;
        word(&|at| group(row, col / GROUP).codes[col % GROUP + at])
    });
    let qzeros = grid(groups, rows / per_word)
        .flat_map(|(index, first)| word(&|at| group(first * per_word + at, index).zero_point));
    let scales = grid(groups, rows).flat_map(|(index, row)| group(row, index).scale.to_le_bytes());
    let g_idx = (0..cols).flat_map(|col| ((col / GROUP) as i32).to_le_bytes());
    let parts = vec![qweight.collect(), qzeros.collect(), scales.collect(), g_idx.collect()];
    Ok((parts, losses))
}

/// Gives `put` the groups of each row of a matrix, with the number of the row.
fn fit_layer(
    model: &dyn ModelSource,
    tensor: &Tensor,
    bits: usize,
    put: &mut dyn FnMut(usize, &[Fitted]),
) -> Result<LayerLoss> {
    let (name, groups) = (&tensor.name, tensor.shape().1 / GROUP);
    let max_code = ((1 << bits) - 1) as u8;
    let mut loss = Loss::default();
    for_each_panel(model.require(name)?, |first, values| {
        let (values, _) = values.as_chunks::<GROUP>();
        let panel: Vec<Fitted> = values.par_iter().map(|values| fit(values, max_code)).collect();
        for (index, (values, group)) in values.iter().zip(&panel).enumerate() {
            if !group.scale.is_finite() {
                let (row, found) = (first + index / groups, values[0]);
                return Err(ExportError::Unrepresentable { tensor: name.clone(), row, found });
            }
            loss.add(values, &group.weights());
        }
        for (row, fitted) in (first..).zip(panel.chunks_exact(groups)) {
            put(row, fitted);
        }
        Ok(())
    })?;
    let layout = if bits == 4 { "GPTQ 4-bit" } else { "GPTQ 8-bit" };
    Ok(LayerLoss { name: name.clone(), layout, error: loss.relative() })
}
