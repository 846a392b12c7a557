//! What a conversion tells its caller.

use std::path::PathBuf;

use slim_formats::{
    DenseTensor,
    slim::{LayerLayout, WrittenFile, matrix_of},
};

use crate::{Trial, Work};

/// A step of a conversion, as it ends.
#[derive(Debug, Clone)]
pub enum Progress<'a> {
    /// So much work of a kind is to be done in all.
    Planned(Work, f64),
    /// A trial of planned work begins now: what was done since the last report counts for none.
    Begun,
    /// So much of it is done, and nothing else since the last report.
    Worked(Work, f64),
    /// A part of the measurement of what bits are worth is done, or, of none, is going to be: a
    /// batch of samples, then a block.
    Survey {
        /// Parts done.
        done: usize,
        /// Parts in all.
        of: usize,
    },
    /// A layer was quantized.
    Layer(&'a LayerReport),
    /// All layers of a block are done.
    Block {
        /// Blocks done.
        done: usize,
        /// Blocks of the model.
        of: usize,
    },
    /// A step of the training of scales and norms is done.
    Step {
        /// Steps done.
        done: usize,
        /// Steps in all.
        of: usize,
        /// The divergence from the source before the step, in nats per token.
        loss: f64,
    },
    /// Something that the user should know.
    Warning(&'a str),
}

/// One quantized layer.
#[derive(Debug, Clone)]
pub struct LayerReport {
    /// GGUF name.
    pub name: String,
    /// Output channels.
    pub rows: usize,
    /// Input channels.
    pub cols: usize,
    /// The bit-width of each group.
    pub bits: Vec<u8>,
    /// Bits in the file, everything counted.
    pub stored_bits: u64,
    /// Relative squared output error on the calibration inputs; `None` for layers without
    /// calibration.
    pub error: Option<f32>,
}

/// What says less than usual of how a model is to be quantized, and is quantized all the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Degenerate {
    /// Columns of calibrated matrices whose inputs were 0 on every calibration token: their weights
    /// are rounded one by one, for nothing else is known of them.
    pub dead_inputs: usize,
    /// Calibrated matrices with fewer calibration tokens than columns: only the damping of their
    /// Hessian lets it be factored.
    pub rank_deficient: usize,
    /// Groups of layers whose weights were all 0.
    pub zero_groups: usize,
    /// Experts that few calibration tokens went through: they are calibrated on all tokens of their
    /// block.
    pub seldom_experts: usize,
}

/// A finished conversion.
#[derive(Debug, Clone)]
pub struct Report {
    /// The linear layers, then embedding and output, in file order.
    pub layers: Vec<LayerReport>,
    /// Where the file is: one path, or those of its parts.
    pub paths: Vec<PathBuf>,
    /// Size of the file, of all parts.
    pub file_bytes: u64,
    /// Bits per weight of the linear layers of the blocks, everything counted.
    pub bits_per_weight: f64,
    /// What [`Progress::Warning`] told.
    pub warnings: Vec<String>,
    /// Sizes that were tried for a promised divergence, last the one that was taken.
    pub trials: Vec<Trial>,
    /// `None` if the layers were quantized by an earlier command.
    pub degenerate: Option<Degenerate>,
}

impl LayerReport {
    pub(crate) fn new(name: &str, layout: &LayerLayout, error: Option<f32>) -> Self {
        Self {
            name: name.to_owned(),
            rows: layout.rows(),
            cols: layout.cols(),
            bits: layout.groups().iter().map(|group| group.bit_width.bits()).collect(),
            stored_bits: layout.stored_bits(),
            error,
        }
    }
}

impl Report {
    /// `dense`: linear layers of the blocks that are not quantized.
    pub(crate) fn new(
        layers: Vec<LayerReport>,
        dense: &[DenseTensor<'_>],
        written: WrittenFile,
        warnings: Vec<String>,
    ) -> Self {
        let WrittenFile { paths, bytes: file_bytes } = written;
        let quantized = layers.iter().filter(|layer| layer.name.starts_with("blk."));
        let quantized = quantized.map(|layer| (layer.stored_bits, layer.rows * layer.cols));
        let dense = dense.iter().map(|dense| (8 * dense.stored_bytes(), dense.rows * dense.cols));
        let (bits, weights) = quantized
            .chain(dense)
            .fold((0, 0), |(bits, weights), (b, w)| (bits + b, weights + w as u64));
        let bits_per_weight = bits as f64 / weights.max(1) as f64;
        let trials = Vec::new();
        Self { layers, paths, file_bytes, bits_per_weight, warnings, trials, degenerate: None }
    }

    /// How many matrices the layers are, those in bands counted once.
    pub fn matrices(&self) -> usize {
        let is_first =
            |layer: &&LayerReport| matrix_of(&layer.name).is_none_or(|(_, index)| index == "0");
        self.layers.iter().filter(is_first).count()
    }
}
