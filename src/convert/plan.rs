//! What a conversion will do, before it does it.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use serde_json::{Value as Json, json};
use slim_converter::{
    Contents, Foretold, Method, PlannedTensor, Resources, SLAB_ROWS, Settings, Storage, Target,
    float_bytes, foretell,
};
use slim_formats::{
    ModelSource, Part, Weight,
    slim::{LayerLayout, ScaleCoding},
};
use slim_kernels::weight;

use crate::{
    output::{facts, plural, size},
    progress::duration,
};

/// Copies of a linear layer's weights in f32 that the published search holds besides the weights:
/// one for each width.
const SEARCH_COPIES: u64 = 3;
/// Copies of a linear layer's weights in f32 besides the weights where the float model runs along:
/// what is added to them, and the sum.
const CORRECTION_COPIES: u64 = 2;
/// Copies in f32 of the rows that are quantized at a time: quantized weights, the gradient of what
/// their errors cost, and how both move with either row scale.
const SLAB_COPIES: u64 = 6;

/// Bits per weight below which a trellis is worth its price: from 4 bits on its errors are no
/// smaller (`docs/accuracy.md`).
const TRELLIS_PAYS_BELOW: f64 = 3.6;
/// Matrices of a Hessian's size in f32 that the converter holds at a time: the Hessian, its factor,
/// and what the inputs lack to those in the float model.
const HESSIAN_COPIES: u64 = 3;

/// The resolved settings, and what they lead to.
pub struct Plan {
    settings: Settings,
    /// Blocks of the model.
    pub blocks: usize,
    contents: Contents,
    /// Size of each part of the file, with a target of the smallest one.
    part_bytes: Vec<u64>,
    /// Size of the source's files.
    pub source_bytes: u64,
    /// Types of the linear layers whose weights the source has quantized already, and bits per
    /// weight of all of them.
    quantized_source: Option<(String, f64)>,
    /// Memory for the largest layer, without what can be in temporary files.
    pub working_bytes: u64,
    /// Activations of all calibration samples, and output Hessians.
    float_bytes: u64,
}

impl Plan {
    /// The plan for `source`.
    pub fn new(source: &dyn ModelSource, settings: &Settings) -> Result<Self> {
        let contents = Contents::new(source, settings)?;
        let mut plan = Self {
            settings: settings.clone(),
            blocks: source.config().block_count,
            part_bytes: contents.part_bytes()?,
            source_bytes: source_bytes(source)?,
            quantized_source: quantized_source(source, &contents)?,
            working_bytes: 0,
            float_bytes: float_bytes(source.decoder(), settings),
            contents,
        };
        let working_bytes =
            plan.contents.tensors().iter().map(|tensor| plan.working_bytes_of(tensor));
        plan.working_bytes = working_bytes.max().unwrap_or(0);
        if plan.contents.has_bands() {
            // In f32 while their block is quantized.
            let decoder = source.decoder();
            plan.working_bytes += 4 * 3 * (decoder.widest_ffn() * decoder.hidden_size) as u64;
        }
        Ok(plan)
    }

    /// Memory to quantize a layer in: one of a block that is calibrated is held whole, others a
    /// slab at a time; a code takes a byte at most.
    fn working_bytes_of(&self, tensor: &PlannedTensor) -> u64 {
        let (rows, cols) = match tensor.storage {
            Storage::F32 => return 0,
            Storage::Dense(_) | Storage::Layer(_) => (tensor.rows as u64, tensor.cols as u64),
        };
        let is_linear = tensor.name.starts_with("blk.");
        let copies = match self.settings.method {
            _ if !is_linear => 0,
            Method::RoundToNearest => 0,
            Method::Reference => 1 + SEARCH_COPIES,
            Method::Slim | Method::SlimPlus => 1 + CORRECTION_COPIES,
            Method::Gptq => 1,
        };
        let weights = copies * rows * cols;
        // Rows of what tokens say to all blocks are too wide for one.
        let is_of_blocks = *tensor.source == *Part::BlockEmbedding.gguf_name();
        let is_swept = weights > 0 || !is_linear && !is_of_blocks && self.settings.has_budget();
        let hessians = if is_swept { HESSIAN_COPIES * cols.pow(2) } else { 0 };
        let slab = SLAB_COPIES * rows.min(SLAB_ROWS as u64) * cols;
        rows * cols + 4 * (weights + hessians + slab)
    }

    /// Whether all groups get the same width: size and bits per weight are exact then.
    fn has_even_widths(&self) -> bool {
        matches!(self.settings.method, Method::Gptq | Method::RoundToNearest)
    }

    fn is_calibrated(&self) -> bool {
        self.settings.method != Method::RoundToNearest
    }

    /// Size of the file and bits per weight of its linear layers. With a target one of them is the
    /// target, and the other what it leads to, about.
    fn size_and_bits(&self) -> (u64, f64) {
        let least_bytes = self.part_bytes.iter().sum();
        let least_bits = self.contents.bits_per_weight();
        let weights = match self.settings.embed_bits {
            Some(_) => self.contents.linear_weights(),
            None => self.contents.layers().map(|(_, l)| (l.rows() * l.cols()) as u64).sum(),
        };
        let weights = weights.max(1) as f64;
        let bits = match self.settings.target {
            None => return (least_bytes, least_bits),
            Some(Target::BitsPerWeight(bits)) => bits,
            Some(Target::FileBytes(bytes)) => {
                least_bits + 8.0 * (bytes - least_bytes) as f64 / weights
            }
        };
        // No group has more than 8 bits per code.
        let bits = bits.min(least_bits + 7.0);
        (least_bytes + ((bits - least_bits) * weights / 8.0).round() as u64, bits)
    }

    /// Files that it will be in; where widths differ, as if a part could be filled up.
    fn parts(&self) -> usize {
        match self.settings.split_max_bytes {
            Some(most) if !self.has_even_widths() => self.size_and_bits().0.div_ceil(most) as usize,
            _ => self.part_bytes.len(),
        }
    }

    /// Sentences about tensors that will not be stored as the settings ask.
    pub fn warnings(&self) -> &[String] {
        self.contents.warnings()
    }

    /// What to say about a source whose linear layers are quantized already.
    pub fn quantized_source_warning(&self) -> Option<String> {
        let (kind, bits) = self.quantized_source.as_ref()?;
        Some(format!(
            "the source's weights are already rounded ({kind}, {bits:.1} bits per weight): the result cannot be \
             better than they are; convert the fp16 original if you can"
        ))
    }

    /// The coding, and at so many bits per weight what the other one would be better at.
    pub fn scales(&self, bits_per_weight: f64) -> String {
        let coding = self.settings.coding;
        match coding {
            ScaleCoding::TwoLevel { .. } if bits_per_weight < TRELLIS_PAYS_BELOW => {
                format!("{coding}; `--scales trellis` has smaller errors, and decodes more slowly")
            }
            ScaleCoding::Trellis { .. } => {
                format!("{coding}; `--scales two-level` decodes faster")
            }
            ScaleCoding::TwoLevel { .. } | ScaleCoding::Paper => coding.to_string(),
        }
    }

    /// Tries the work out, to tell what all of it takes.
    pub fn foretell(&self, source: &dyn ModelSource, resources: &Resources) -> Result<Foretold> {
        Ok(foretell(source, &self.contents, &self.settings, resources)?)
    }

    pub fn describe(&self, max_memory: u64, foretold: &Foretold) -> String {
        let Settings { bits, group_size, embed_bits, samples, context, seed, .. } = self.settings;
        let method = self.settings.method.name();
        let scales = self.settings.coding;
        let per_code = match self.settings.target {
            None => format!("{bits} per code"),
            Some(Target::BitsPerWeight(bits)) => format!("{bits} per weight, everything counted"),
            Some(Target::FileBytes(bytes)) => format!("as many as fit into {}", size(bytes)),
        };
        let embedding = match embed_bits {
            Some(bits) => format!("{bits} bits"),
            None => "as many bits as are worth it".to_owned(),
        };
        let linear = plural(self.contents.linear_matrices(), "linear layer");
        let blocks = plural(self.blocks, "block");
        let about = if self.has_even_widths() { "" } else { "about " };
        let memory = size(self.working_bytes + self.float_bytes);
        let mut lines = vec![
            ("method", method.to_owned()),
            ("bits", format!("{per_code}, in groups of {group_size} columns")),
            ("scales", scales.to_string()),
            ("embedding", embedding),
        ];
        if self.is_calibrated() {
            let samples = plural(samples, "sample");
            let drawn = if self.settings.draws_text { " that the model writes" } else { "" };
            let line = format!("{samples} of {context} tokens{drawn}, seed {seed}");
            lines.push(("calibration", line));
        }
        if self.settings.method == Method::SlimPlus {
            lines.push(("training", plural(self.settings.steps, "step")));
        }
        let bands = match self.contents.has_bands() {
            true => ", `attn_q`, `ffn_gate` and `ffn_up` in bands",
            false => "",
        };
        lines.push(("layers", format!("{linear} in {blocks}{bands}")));
        let (file_bytes, bits_per_weight) = self.size_and_bits();
        lines.push(("bits per weight", format!("{about}{bits_per_weight:.3}, everything counted")));
        let (after, before) = (size(file_bytes), size(self.source_bytes));
        let about = match self.settings.target {
            Some(Target::FileBytes(_)) => "at most ",
            Some(Target::BitsPerWeight(_)) | None => about,
        };
        lines.push(("size", format!("{about}{after}, from {before}")));
        if let Some(most) = self.settings.split_max_bytes {
            let parts = plural(self.parts(), "part");
            lines.push(("parts", format!("{about}{parts} of at most {}", size(most))));
        }
        lines.push(("memory", format!("about {memory}, of which {} is granted", size(max_memory))));
        lines.push(("disk", format!("about {} while it runs", size(foretold.disk_bytes))));
        let besides = match self.settings.draws_text {
            true => ", besides what the model writes",
            false => "",
        };
        lines.push(("time", format!("about {}{besides}", duration(foretold.time))));
        facts(&lines) + "\nnothing was written\n"
    }

    pub fn to_json(&self, foretold: &Foretold) -> Json {
        let Settings { bits, target, .. } = self.settings;
        let (file_bytes, bits_per_weight) = self.size_and_bits();
        let (target_bpw, target_bytes) = match target {
            None => (None, None),
            Some(Target::BitsPerWeight(bits)) => (Some(bits), None),
            Some(Target::FileBytes(bytes)) => (None, Some(bytes)),
        };
        // With a target, the widths and thereby the bytes of a layer are still to be found.
        let layer = |(name, layout): (&str, &LayerLayout)| {
            json!({
                "name": name,
                "rows": layout.rows(),
                "cols": layout.cols(),
                "bytes": target.is_none().then(|| layout.stored_bits() / 8),
            })
        };
        json!({
            "method": self.settings.method.name(),
            "reference": self.settings.method == Method::Reference,
            "bits": target.is_none().then_some(bits),
            "target_bits_per_weight": target_bpw,
            "target_file_bytes": target_bytes,
            "group_size": self.settings.group_size,
            "embed_bits": self.settings.embed_bits,
            "bits_per_weight": bits_per_weight,
            "file_bytes": file_bytes,
            "parts": self.parts(),
            "is_exact": self.has_even_widths(),
            "memory_bytes": self.working_bytes + self.float_bytes,
            "disk_bytes": foretold.disk_bytes,
            "seconds": foretold.time.as_secs_f64(),
            "layers": self.contents.layers().map(layer).collect::<Json>(),
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

/// Types and bits per weight of the linear layers whose weights are quantized already.
fn quantized_source(
    source: &dyn ModelSource,
    contents: &Contents,
) -> Result<Option<(String, f64)>> {
    let names: BTreeSet<_> = contents.tensors().iter().map(|tensor| &tensor.source).collect();
    let (mut kinds, mut bits, mut weights) = (BTreeSet::new(), 0, 0);
    for name in names.into_iter().filter(|name| name.starts_with("blk.")) {
        let found = source.require(name)?;
        if let Some(kind) = quantized_kind(found) {
            let (rows, cols) = weight::shape(found);
            kinds.insert(kind);
            bits += 8 * weight::stored_bytes(found);
            weights += (rows * cols) as u64;
        }
    }
    let kinds = kinds.into_iter().collect::<Vec<_>>().join(", ");
    Ok((weights > 0).then(|| (kinds, bits as f64 / weights as f64)))
}

/// The type of a weight that is quantized already.
fn quantized_kind(found: Weight<'_>) -> Option<String> {
    match found {
        Weight::Dense(dense) if !dense.dtype.is_quantized() => None,
        Weight::Dense(dense) => Some(format!("{:?}", dense.dtype)),
        Weight::Packed(_) | Weight::Bands(_) => Some("SliM".to_owned()),
    }
}
