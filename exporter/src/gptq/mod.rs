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
use slim_formats::{ModelSource, OutputPath, Weight, arch::Tensor, slim::ScaleCoding};
use slim_kernels::weight;

use self::fit::{Fitted, GROUP, fit};
use crate::{
    ExportError, LayerLoss, Report, Result,
    folder::{Element, Folder, PlannedTensor},
    safetensors::{f16_bytes, plan_f16},
    tensor::{Loss, check_values, for_each_panel, tensors},
};

pub(crate) fn write(
    model: &dyn ModelSource,
    output: OutputPath<'_>,
    on_tensor: &mut dyn FnMut(&str),
) -> Result<Report> {
    let tensors = tensors(model)?;
    let bits = bits_for(model, tensors)?;
    let mut planned = Vec::new();
    for tensor in tensors {
        let weight = model.require(&tensor.name)?;
        match tensor.is_linear() {
            true => planned.extend(plan_layer(tensor, weight, bits)),
            false => planned.push(plan_f16(tensor, weight)),
        }
    }
    let warnings = check_values(model, |tensor| !tensor.is_linear())?;
    let folder = Folder::create(output)?;
    folder.describe(model, quantization_config(bits))?;
    let mut layers = Vec::new();
    // Of the layer whose first tensor was written last.
    let mut parts = Vec::new().into_iter();
    folder.tensors(&planned, &mut |PlannedTensor { source, .. }| {
        if let Some(bytes) = parts.next() {
            return Ok(bytes);
        }
        on_tensor(source);
        let weight = model.require(source)?;
        if model.decoder().find(source).is_some_and(Tensor::is_linear) {
            let (layer, loss) = pack_layer(source, weight, bits)?;
            layers.push(loss);
            parts = Vec::from(layer).into_iter();
            return Ok(parts.next().expect("a layer has four parts"));
        }
        let (bytes, loss) = f16_bytes(source, weight)?;
        layers.extend(loss);
        Ok(bytes)
    })?;
    Ok(Report { tensors: tensors.len(), file_bytes: folder.finish()?, layers, warnings })
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
fn plan_layer(tensor: &Tensor, weight: Weight<'_>, bits: usize) -> [PlannedTensor; 4] {
    let (rows, cols) = weight::shape(weight);
    let module = tensor.hf.name.trim_end_matches(".weight");
    let (groups, per_word) = (cols / GROUP, 32 / bits);
    [
        ("qweight", Element::I32, vec![cols / per_word, rows]),
        ("qzeros", Element::I32, vec![groups, rows / per_word]),
        ("scales", Element::F16, vec![groups, rows]),
        ("g_idx", Element::I32, vec![cols]),
    ]
    .map(|(part, dtype, shape)| PlannedTensor {
        name: format!("{module}.{part}"),
        source: tensor.name.clone(),
        dtype,
        shape,
    })
}

/// The bytes of the four tensors of a layer, and what it loses.
fn pack_layer(name: &str, weight: Weight<'_>, bits: usize) -> Result<([Vec<u8>; 4], LayerLoss)> {
    let (rows, cols) = weight::shape(weight);
    let groups = cols / GROUP;
    let max_code = ((1 << bits) - 1) as u8;
    let mut fitted: Vec<Fitted> = Vec::with_capacity(rows * groups);
    let mut loss = Loss::default();
    for_each_panel(weight, |first, values| {
        let (values, _) = values.as_chunks::<GROUP>();
        let panel: Vec<Fitted> = values.par_iter().map(|values| fit(values, max_code)).collect();
        for (index, (values, group)) in values.iter().zip(&panel).enumerate() {
            if !group.scale.is_finite() {
                let (row, found) = (first + index / groups, values[0]);
                return Err(ExportError::Unrepresentable { tensor: name.to_owned(), row, found });
            }
            loss.add(values, &group.weights());
        }
        fitted.extend(panel);
        Ok(())
    })?;

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
    let parts = [qweight.collect(), qzeros.collect(), scales.collect(), g_idx.collect()];
    let layout = if bits == 4 { "GPTQ 4-bit" } else { "GPTQ 8-bit" };
    Ok((parts, LayerLoss { name: name.to_owned(), layout, error: loss.relative() }))
}
