//! The whole conversion: one block at a time, each layer calibrated on what the quantized layers before it give.

use std::{ops::Range, path::Path};

use half::f16;
use rayon::prelude::*;
use slim_formats::{
    DType, ModelSource, Weight,
    slim::{PackedLayer, SlimWriter},
};
use slim_kernels::weight;
use slim_runtime::{Block, Context, KvBlock, embed, rope_angles};

use crate::{
    Activations, Calibration, ConvertError, Engine, LayerReport, Method, Progress, Report,
    Resources, Result, Settings,
    layer::{LayerInputs, quantize_layer, round_layer},
    provenance,
};

/// Quantizes `source` and writes the SliM file `target`, which appears when all is done.
///
/// # Errors
/// A file, tensor or setting that cannot be used; nothing is written then.
pub fn convert(
    source: &dyn ModelSource,
    calibration: &Calibration,
    settings: &Settings,
    resources: Resources,
    target: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    settings.validate()?;
    let metadata = provenance::metadata(source, calibration, settings)?;
    let mut output = Output {
        writer: SlimWriter::create(target)?,
        source,
        settings,
        layers: Vec::new(),
        warnings: Vec::new(),
        progress,
    };
    let mut calibrator = match settings.method {
        Method::RoundToNearest => None,
        Method::Slim | Method::Gptq => {
            Some(Calibrator::new(source, calibration, settings, &resources)?)
        }
    };
    let blocks = source.config().block_count;
    for index in 0..blocks {
        let block = Block::load(source, index)?;
        match &mut calibrator {
            Some(calibrator) => calibrator.quantize_block(index, block, &mut output)?,
            None => round_block(index, &block, &mut output)?,
        }
        (output.progress)(Progress::Block { done: index + 1, of: blocks });
    }
    output.model_tensors()?;
    output.finish(metadata)
}

/// The activations of all samples on their way through the blocks.
struct Calibrator<'a> {
    engine: &'a Engine,
    context: Context<'a>,
    tokens_per_sample: usize,
    /// The residual stream, `[samples, tokens, hidden]`.
    residual: Activations,
    /// The normed residual, `[samples, tokens, hidden]`.
    normed: Activations,
    /// The inputs of `attn_output`, `[samples, tokens, heads * head_dim]`.
    attended: Activations,
    /// The inputs of `ffn_down`, `[samples, tokens, ffn]`.
    ffn: Activations,
    /// The residual before the block, for `--reference`: the published code takes the inputs of a block's layers from the
    /// float block, and runs the quantized one afterwards.
    before: Option<Activations>,
}

impl<'a> Calibrator<'a> {
    fn new(
        source: &'a dyn ModelSource,
        calibration: &Calibration,
        settings: &Settings,
        resources: &'a Resources,
    ) -> Result<Self> {
        let config = source.config();
        let samples = calibration.samples.len();
        let tokens_per_sample = calibration.samples.first().map_or(0, Vec::len);
        let mut memory_left = resources.activation_bytes;
        let mut activations =
            |width| Activations::new(samples, tokens_per_sample, width, &mut memory_left);
        let mut residual = activations(config.hidden_size)?;
        let normed = activations(config.hidden_size)?;
        let attended = activations(config.head_count * config.head_dim)?;
        let ffn = activations(config.ffn_size)?;
        let before = match settings.reference {
            true => Some(activations(config.hidden_size)?),
            false => None,
        };
        let embedding = find(source, "token_embd.weight")?;
        for (index, tokens) in calibration.samples.iter().enumerate() {
            residual.sample_mut(index).copy_from_slice(&embed(embedding, tokens)?);
        }
        let engine = &resources.engine;
        let context = Context { config, backend: engine.backend() };
        Ok(Self { engine, context, tokens_per_sample, residual, normed, attended, ffn, before })
    }

    /// Quantizes the layers of a block in the order in which data flows through them.
    fn quantize_block(
        &mut self,
        index: usize,
        block: Block<'_>,
        output: &mut Output<'_>,
    ) -> Result<()> {
        let Self { engine, context, tokens_per_sample, residual, normed, attended, ffn, before } =
            self;
        let context = *context;
        let name = |layer: &str| format!("blk.{index}.{layer}.weight");
        output.norm(&name("attn_norm"), &block.attn_norm)?;
        output.norm(&name("ffn_norm"), &block.ffn_norm)?;
        if let Some(before) = before {
            before.fill(|i| Ok(residual.sample(i).to_vec()))?;
        }
        let is_sequential = before.is_none();

        normed.fill(|i| Ok(block.attention_input(context, residual.sample(i))))?;
        let (q, k, v) = {
            let inputs = output.inputs(&name("attn_q"), normed, engine)?;
            (
                output.layer(&name("attn_q"), block.attn_q, Some(&inputs))?,
                output.layer(&name("attn_k"), block.attn_k, Some(&inputs))?,
                output.layer(&name("attn_v"), block.attn_v, Some(&inputs))?,
            )
        };
        let quantized = Block {
            attn_q: q.weight(block.attn_q),
            attn_k: k.weight(block.attn_k),
            attn_v: v.weight(block.attn_v),
            ..block.clone()
        };
        let running = if is_sequential { &quantized } else { &block };

        let angles = rope_angles(context.config, 0, *tokens_per_sample);
        let mut kv = KvBlock::new(context.config, *tokens_per_sample);
        let held = engine.hold(&[running.attn_q, running.attn_k, running.attn_v])?;
        attended.fill(|i| Ok(running.attend(context, normed.sample(i), &mut kv, 0, &angles)?))?;
        drop(held);
        let attn_output = {
            let inputs = output.inputs(&name("attn_output"), attended, engine)?;
            output.layer(&name("attn_output"), block.attn_output, Some(&inputs))?
        };
        let quantized = Block { attn_output: attn_output.weight(block.attn_output), ..quantized };
        let running = if is_sequential { &quantized } else { &block };

        let held = engine.hold(&[running.attn_output])?;
        for i in 0..residual.samples() {
            running.add_attention(context, attended.sample(i), residual.sample_mut(i))?;
        }
        drop(held);
        normed.fill(|i| Ok(running.ffn_input(context, residual.sample(i))))?;
        let (gate, up) = {
            let inputs = output.inputs(&name("ffn_gate"), normed, engine)?;
            (
                output.layer(&name("ffn_gate"), block.ffn_gate, Some(&inputs))?,
                output.layer(&name("ffn_up"), block.ffn_up, Some(&inputs))?,
            )
        };
        let quantized = Block {
            ffn_gate: gate.weight(block.ffn_gate),
            ffn_up: up.weight(block.ffn_up),
            ..quantized
        };
        let running = if is_sequential { &quantized } else { &block };

        let held = engine.hold(&[running.ffn_gate, running.ffn_up])?;
        ffn.fill(|i| Ok(running.ffn_activation(context, normed.sample(i))?))?;
        drop(held);
        let down = {
            let inputs = output.inputs(&name("ffn_down"), ffn, engine)?;
            output.layer(&name("ffn_down"), block.ffn_down, Some(&inputs))?
        };
        let quantized = Block { ffn_down: down.weight(block.ffn_down), ..quantized };
        let _held = match is_sequential {
            true => engine.hold(&[quantized.ffn_down])?,
            false => engine.hold(&quantized.weights())?,
        };
        for i in 0..residual.samples() {
            match before {
                None => quantized.add_ffn(context, ffn.sample(i), residual.sample_mut(i))?,
                Some(before) => {
                    residual.sample_mut(i).copy_from_slice(before.sample(i));
                    quantized.forward(context, residual.sample_mut(i), &mut kv, 0, &angles)?;
                }
            }
        }
        Ok(())
    }
}

/// Quantizes a block without calibration.
fn round_block(index: usize, block: &Block<'_>, output: &mut Output<'_>) -> Result<()> {
    let name = |layer: &str| format!("blk.{index}.{layer}.weight");
    output.norm(&name("attn_norm"), &block.attn_norm)?;
    output.norm(&name("ffn_norm"), &block.ffn_norm)?;
    for (layer, weight) in [
        ("attn_q", block.attn_q),
        ("attn_k", block.attn_k),
        ("attn_v", block.attn_v),
        ("attn_output", block.attn_output),
        ("ffn_gate", block.ffn_gate),
        ("ffn_up", block.ffn_up),
        ("ffn_down", block.ffn_down),
    ] {
        output.layer(&name(layer), weight, None)?;
    }
    Ok(())
}

/// The file being written, and what is told about it.
struct Output<'a> {
    writer: SlimWriter,
    source: &'a dyn ModelSource,
    settings: &'a Settings,
    layers: Vec<LayerReport>,
    warnings: Vec<String>,
    progress: &'a mut dyn FnMut(Progress<'_>),
}

/// What became of a layer.
enum Layer {
    Quantized(Box<PackedLayer>),
    /// Stored as f16: its columns do not fill groups.
    Kept,
}

impl Layer {
    /// The weight that runs from here on.
    fn weight<'a>(&'a self, source: Weight<'a>) -> Weight<'a> {
        match self {
            Self::Quantized(packed) => Weight::Packed(packed.view()),
            Self::Kept => source,
        }
    }
}

impl Output<'_> {
    /// The Hessian of the layers that take `activations` in, of which `name` is the first.
    fn inputs<'a>(
        &mut self,
        name: &str,
        activations: &'a Activations,
        engine: &Engine,
    ) -> Result<LayerInputs<'a>> {
        let inputs = LayerInputs::new(activations, self.settings, engine)?;
        if let Some(share) = inputs.extra_damping {
            self.warn(format!(
                "`{name}`: its Hessian needed {share} of its mean diagonal as damping"
            ));
        }
        Ok(inputs)
    }

    /// Quantizes and writes a linear layer of a block.
    fn layer(
        &mut self,
        name: &str,
        source: Weight<'_>,
        inputs: Option<&LayerInputs<'_>>,
    ) -> Result<Layer> {
        let (rows, cols) = weight::shape(source);
        if !self.fits_groups(name, cols) {
            self.keep(name, source)?;
            return Ok(Layer::Kept);
        }
        let (packed, error) = match inputs {
            Some(inputs) => {
                let weights = finite_rows(name, source, 0..rows)?;
                let layer = quantize_layer(&weights, inputs, self.settings);
                (layer.packed, Some(layer.error))
            }
            None => (self.round(name, source, self.settings)?, None),
        };
        self.write(name, &packed, error)?;
        Ok(Layer::Quantized(Box::new(packed)))
    }

    /// Whether a layer can be cut into groups; warns if not.
    fn fits_groups(&mut self, name: &str, cols: usize) -> bool {
        let fits = cols.is_multiple_of(16);
        if !fits {
            self.warn(format!(
                "`{name}` stays at 16 bits: its {cols} columns are no multiple of 16"
            ));
        }
        fits
    }

    fn round(&self, name: &str, source: Weight<'_>, settings: &Settings) -> Result<PackedLayer> {
        let (rows, cols) = weight::shape(source);
        round_layer(rows, cols, settings, |rows| finite_rows(name, source, rows))
    }

    fn write(&mut self, name: &str, packed: &PackedLayer, error: Option<f32>) -> Result<()> {
        self.writer.layer(name, packed, error)?;
        let layout = packed.layout();
        let report = LayerReport {
            name: name.to_owned(),
            rows: layout.rows(),
            cols: layout.cols(),
            bits: layout.groups().iter().map(|group| group.bit_width.bits()).collect(),
            stored_bits: layout.stored_bits(),
            error,
        };
        (self.progress)(Progress::Layer(&report));
        self.layers.push(report);
        Ok(())
    }

    /// Embedding, output norm, output layer and RoPE factors.
    fn model_tensors(&mut self) -> Result<()> {
        let source = self.source;
        let config = source.config();
        let mut matrices = vec!["token_embd.weight"];
        if !config.tied_embeddings {
            matrices.push("output.weight");
        }
        for name in matrices {
            let found = find(source, name)?;
            if self.settings.embed_bits < 16 && self.fits_groups(name, weight::shape(found).1) {
                let packed = self.round(name, found, &self.settings.for_embedding())?;
                self.write(name, &packed, None)?;
            } else {
                self.keep(name, found)?;
            }
        }
        let name = "output_norm.weight";
        let values = finite_rows(name, find(source, name)?, 0..1)?;
        self.norm(name, &values)?;
        if !config.rope.is_unscaled() {
            self.norm("rope_freqs.weight", &config.rope.factors)?;
        }
        Ok(())
    }

    /// Writes a vector as F32.
    fn norm(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok(self.writer.dense(name, DType::F32, &[values.len() as u64], &bytes)?)
    }

    /// Writes a matrix as F16.
    fn keep(&mut self, name: &str, source: Weight<'_>) -> Result<()> {
        const ROWS: usize = 1024;
        let (rows, cols) = weight::shape(source);
        let mut bytes = Vec::with_capacity(2 * rows * cols);
        for first in (0..rows).step_by(ROWS) {
            let weights = finite_rows(name, source, first..rows.min(first + ROWS))?;
            bytes.extend(weights.iter().flat_map(|&weight| f16::from_f32(weight).to_le_bytes()));
        }
        Ok(self.writer.dense(name, DType::F16, &[rows as u64, cols as u64], &bytes)?)
    }

    fn warn(&mut self, warning: String) {
        (self.progress)(Progress::Warning(&warning));
        self.warnings.push(warning);
    }

    fn finish(self, metadata: slim_formats::gguf::Metadata) -> Result<Report> {
        let written = self.writer.finish(metadata)?;
        let linear = self.layers.iter().filter(|layer| layer.name.starts_with("blk."));
        let (bits, weights) = linear.fold((0, 0), |(bits, weights), layer| {
            (bits + layer.stored_bits, weights + (layer.rows * layer.cols) as u64)
        });
        Ok(Report {
            file_bytes: written.bytes,
            bits_per_weight: bits as f64 / weights.max(1) as f64,
            layers: self.layers,
            warnings: self.warnings,
        })
    }
}

fn find<'a>(source: &'a dyn ModelSource, name: &str) -> Result<Weight<'a>> {
    source.tensor(name)?.ok_or_else(|| {
        let place = format!("tensor `{name}`");
        slim_formats::FormatError::malformed(source.path(), place, "", "none", "a tensor").into()
    })
}

/// Some rows of a tensor, `[rows.len(), cols]`.
fn finite_rows(name: &str, source: Weight<'_>, rows: Range<usize>) -> Result<Vec<f32>> {
    const ROWS: usize = 64;
    let (_, cols) = weight::shape(source);
    let mut weights = vec![0.0; rows.len() * cols];
    weights.par_chunks_mut(ROWS * cols).enumerate().try_for_each(|(index, out)| {
        let first = rows.start + index * ROWS;
        weight::dequantize_rows(source, first..first + out.len() / cols, out)
    })?;
    match weights.iter().position(|weight| !weight.is_finite()) {
        None => Ok(weights),
        Some(at) => Err(ConvertError::NotFinite {
            tensor: name.to_owned(),
            row: rows.start + at / cols,
            found: weights[at],
        }),
    }
}
