//! What a conversion will do, before it does it.

use anyhow::{Context as _, Result};
use serde_json::{Value as Json, json};
use slim_converter::{Method, SLAB_ROWS, Settings};
use slim_formats::{
    ModelSource, Weight,
    slim::{BitWidth, LayerLayout, ScaleCoding},
};
use slim_kernels::weight;

use crate::output::{facts, plural, size};

/// Copies of a linear layer's weights in f32 that the published search holds besides the weights: one for each width.
const SEARCH_COPIES: u64 = 3;
/// Copies in f32 of the rows that are quantized at a time: weights, quantized weights, their difference.
const SLAB_COPIES: u64 = 3;
/// Matrices of a Hessian's size in f32 that the converter holds at a time: the Hessian as it is and in the order of the sweep,
/// its factor and the inverse of that in f64.
const HESSIAN_COPIES: u64 = 6;

/// The resolved settings, and what they lead to.
pub struct Plan {
    settings: Settings,
    /// Blocks of the model.
    pub blocks: usize,
    layers: Vec<PlannedLayer>,
    /// Norms, and matrices that stay at 16 bits.
    dense_bytes: u64,
    /// Size of the source's files.
    pub source_bytes: u64,
    /// Memory for the largest layer, without activations.
    pub working_bytes: u64,
    /// Activations of all calibration samples.
    activation_bytes: u64,
}

/// A layer to quantize.
struct PlannedLayer {
    name: String,
    rows: usize,
    cols: usize,
    stored_bits: u64,
    /// Type and bits per weight in the source, if its weights are quantized already.
    quantized_source: Option<(String, f64)>,
}

impl Plan {
    /// The plan for `source`.
    pub fn new(source: &dyn ModelSource, settings: &Settings) -> Result<Self> {
        let mut plan = Self {
            settings: settings.clone(),
            blocks: source.config().block_count,
            layers: Vec::new(),
            dense_bytes: 0,
            source_bytes: source_bytes(source)?,
            working_bytes: 0,
            activation_bytes: activation_bytes(source, settings),
        };
        for name in source.tensor_names() {
            if let Some(found) = source.tensor(name)? {
                plan.add(name, found)?;
            }
        }
        Ok(plan)
    }

    /// Adds a tensor of the source.
    fn add(&mut self, name: &str, found: Weight<'_>) -> Result<()> {
        let (rows, cols) = weight::shape(found);
        if rows == 1 {
            self.dense_bytes += 4 * cols as u64;
            return Ok(());
        }
        let is_linear = name.starts_with("blk.");
        let working = self.working_bytes_of(rows as u64, cols as u64, is_linear);
        self.working_bytes = self.working_bytes.max(working);

        let settings =
            if is_linear { self.settings.clone() } else { self.settings.for_embedding() };
        let Some(bit_width) = BitWidth::new(settings.bits).filter(|_| cols.is_multiple_of(16))
        else {
            self.dense_bytes += 2 * (rows * cols) as u64;
            return Ok(());
        };
        let Settings { group_size, coding, .. } = settings;
        let widths = vec![bit_width; cols.div_ceil(group_size)];
        let layout = LayerLayout::new(rows, cols, group_size, coding, &widths);
        let stored_bits = layout.map(|layout| layout.stored_bits());
        let stored_bits = stored_bits.map_err(|(_, found, expected)| {
            anyhow::anyhow!("tensor `{name}`: found {found}, expected {expected}")
        })?;
        let quantized_source = quantized_source(found);
        self.layers.push(PlannedLayer {
            name: name.to_owned(),
            rows,
            cols,
            stored_bits,
            quantized_source,
        });
        Ok(())
    }

    /// Memory to quantize a layer in: a calibrated one is held whole, others a slab at a time; a code takes a byte at most.
    fn working_bytes_of(&self, rows: u64, cols: u64, is_linear: bool) -> u64 {
        let weights = match is_linear && self.is_calibrated() {
            true if self.settings.reference => (1 + SEARCH_COPIES) * rows * cols,
            true => rows * cols,
            false => 0,
        };
        let hessians = if weights > 0 { HESSIAN_COPIES * cols.pow(2) } else { 0 };
        let slab = SLAB_COPIES * rows.min(SLAB_ROWS as u64) * cols;
        rows * cols + 4 * (weights + hessians + slab)
    }

    fn is_calibrated(&self) -> bool {
        self.settings.method != Method::RoundToNearest
    }

    fn linear_layers(&self) -> impl Iterator<Item = &PlannedLayer> {
        self.layers.iter().filter(|layer| layer.name.starts_with("blk."))
    }

    /// The mean over the linear layers of the blocks if the groups' widths average to `bits`.
    fn bits_per_weight(&self) -> f64 {
        let (bits, weights) = self.linear_layers().fold((0, 0), |(bits, weights), layer| {
            (bits + layer.stored_bits, weights + (layer.rows * layer.cols) as u64)
        });
        bits as f64 / weights.max(1) as f64
    }

    /// The tensors of the result, without header and tokenizer.
    fn tensor_bytes(&self) -> u64 {
        self.dense_bytes + self.layers.iter().map(|layer| layer.stored_bits / 8).sum::<u64>()
    }

    /// What to say about a source whose linear layers are quantized already.
    pub fn quantized_source_warning(&self) -> Option<String> {
        let (kind, bits) =
            self.linear_layers().find_map(|layer| layer.quantized_source.as_ref())?;
        Some(format!(
            "the source's weights are already rounded ({kind}, {bits:.1} bits per weight): the result cannot be \
             better than they are; convert the fp16 original if you can"
        ))
    }

    pub fn describe(&self, max_memory: u64) -> String {
        let Settings { bits, group_size, embed_bits, samples, context, seed, .. } = self.settings;
        let method =
            if self.settings.reference { "reference" } else { self.settings.method.name() };
        let scales = match self.settings.coding {
            ScaleCoding::Paper => "paper".to_owned(),
            ScaleCoding::TwoLevel { sub_group, scale_bits } => {
                format!("two-level, {scale_bits}-bit codes per {sub_group} columns")
            }
        };
        let linear = plural(self.linear_layers().count(), "linear layer");
        let blocks = plural(self.blocks, "block");
        let memory = size(self.working_bytes + self.activation_bytes);
        let mut lines = vec![
            ("method", method.to_owned()),
            ("bits", format!("{bits} per code, in groups of {group_size} columns")),
            ("scales", scales),
            ("embedding", format!("{embed_bits} bits")),
        ];
        if self.is_calibrated() {
            let samples = plural(samples, "sample");
            lines.push(("calibration", format!("{samples} of {context} tokens, seed {seed}")));
        }
        if self.settings.method == Method::SlimPlus {
            lines.push(("training", plural(self.settings.steps, "step")));
        }
        lines.push(("layers", format!("{linear} in {blocks}")));
        lines.push((
            "bits per weight",
            format!("about {:.3}, everything counted", self.bits_per_weight()),
        ));
        let (after, before) = (size(self.tensor_bytes()), size(self.source_bytes));
        lines.push(("size", format!("about {after} and the tokenizer, from {before}")));
        lines.push(("memory", format!("about {memory}, of which {} is granted", size(max_memory))));
        facts(&lines) + "\nnothing was written\n"
    }

    pub fn to_json(&self) -> Json {
        let layer = |layer: &PlannedLayer| {
            json!({
                "name": layer.name,
                "rows": layer.rows,
                "cols": layer.cols,
                "bytes": layer.stored_bits / 8,
            })
        };
        json!({
            "method": self.settings.method.name(),
            "reference": self.settings.reference,
            "bits": self.settings.bits,
            "group_size": self.settings.group_size,
            "embed_bits": self.settings.embed_bits,
            "bits_per_weight": self.bits_per_weight(),
            "tensor_bytes": self.tensor_bytes(),
            "memory_bytes": self.working_bytes + self.activation_bytes,
            "layers": self.layers.iter().map(layer).collect::<Json>(),
        })
    }
}

fn source_bytes(source: &dyn ModelSource) -> Result<u64> {
    let mut total = 0;
    for path in source.files() {
        let metadata = std::fs::metadata(&path);
        total +=
            metadata.with_context(|| format!("`{}`: cannot read its size", path.display()))?.len();
    }
    Ok(total)
}

/// The residual stream, its norm, the attention outputs and the feed-forward activations of all samples, in f32.
fn activation_bytes(source: &dyn ModelSource, settings: &Settings) -> u64 {
    let config = source.config();
    let width = 2 * config.hidden_size + config.head_count * config.head_dim + config.ffn_size;
    match settings.method {
        Method::RoundToNearest => 0,
        Method::Slim | Method::SlimPlus | Method::Gptq => {
            4 * (settings.samples * settings.context * width) as u64
        }
    }
}

/// Type and bits per weight of a weight that is quantized already.
fn quantized_source(found: Weight<'_>) -> Option<(String, f64)> {
    let name = match found {
        Weight::Dense(dense) if !dense.dtype.is_quantized() => return None,
        Weight::Dense(dense) => format!("{:?}", dense.dtype),
        Weight::Packed(_) => "SliM".to_owned(),
    };
    let (rows, cols) = weight::shape(found);
    Some((name, 8.0 * weight::stored_bytes(found) as f64 / (rows * cols) as f64))
}
