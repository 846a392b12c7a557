//! One linear layer, from its weights and calibration inputs to its packed form.

use std::{borrow::Cow, ops::Range};

use rayon::prelude::*;
use slim_formats::slim::{BitWidth, LayerLayout, PackedLayer, ScaleCoding, TILE_ROWS};

use crate::{
    Activations, Engine, Method, Result, Settings,
    activations::StageInputs,
    allocate::{group_columns, published_divergences, published_widths},
    coder::Coder,
    hessian::{Factor, Hessian},
    published::ABSOLUTE_DAMPING,
    rows::Targets,
    salience::group_salience,
    sweep::{Curvature, SweptTile, difference, reordered, sweep},
    target::{Correction, Lack},
};

/// Share of the mean diagonal that is added to a Hessian before it is factored, as in GPTQ.
const DAMPING: f32 = 0.01;

/// The calibration inputs of a layer, or of several layers that share them.
pub struct LayerInputs<'a> {
    activations: &'a Activations,
    factored: FactoredHessian,
    /// The ranking of the published search; only for `--reference`.
    search_importance: Option<Vec<f32>>,
    /// What makes up for the difference to the inputs in the float model.
    correction: Option<Correction>,
    /// Columns whose inputs are all 0.
    dead: usize,
}

/// A Hessian as the sweep takes it.
pub struct FactoredHessian {
    factor: Factor,
    importance: Vec<f32>,
    /// Columns in the order of the sweep.
    order: Vec<usize>,
    /// The damped Hessian, its rows and columns in that order.
    damped: Hessian,
    /// What was added to its diagonal.
    damping: f32,
    /// The share of the mean diagonal that was needed to factor it, if more than usual.
    pub extra_damping: Option<f32>,
}

impl<'a> LayerInputs<'a> {
    /// Computes the Hessian of the inputs and factors it.
    ///
    /// # Errors
    /// `Numerical` if the inputs are not finite, `Kernel` if a device fails.
    pub fn new(stage: StageInputs<'a>, settings: &Settings, engine: &Engine) -> Result<Self> {
        let activations = stage.activations;
        let mut hessian = Hessian::of(activations, engine, settings.precision())?;
        let dead = hessian.diagonal().iter().filter(|&&square| square == 0.0).count();
        // The published code damps in place for its ranking, and again for the sweep.
        let mut damping = 0.0;
        let mut search_importance = None;
        if settings.method == Method::Reference {
            damping = ABSOLUTE_DAMPING;
            hessian = hessian.damped(damping);
            search_importance = Some(hessian.factor(0.0)?.0.importance());
        }
        // The small steps of the factorization have one thread.
        let (factored, lack) = rayon::join(
            || FactoredHessian::new(hessian, settings),
            || stage.float.map(|float| Lack::new(activations, float, settings.precision())),
        );
        let mut factored = factored?;
        factored.damping += damping;
        let correction = lack.map(|lack| lack.correction(|m| factored.solve(m)));
        Ok(Self { activations, factored, search_importance, correction, dead })
    }

    /// The Hessian of the inputs.
    pub fn hessian(&self) -> &FactoredHessian {
        &self.factored
    }

    /// Calibration tokens.
    pub fn tokens(&self) -> usize {
        self.activations.tokens()
    }

    /// Columns whose inputs are all 0.
    pub fn dead(&self) -> usize {
        self.dead
    }

    /// `weights: [rows, cols]` with what makes up for the difference to the inputs in the float
    /// model.
    pub fn corrected(&self, weights: Vec<f32>) -> Vec<f32> {
        match &self.correction {
            Some(correction) => correction.apply(&weights),
            None => weights,
        }
    }
}

impl FactoredHessian {
    /// Of a layer that is quantized as `settings` say.
    ///
    /// # Errors
    /// `Numerical` if the Hessian is not finite.
    pub fn new(hessian: Hessian, settings: &Settings) -> Result<Self> {
        let order = match settings.method {
            Method::Reference => (0..hessian.size()).collect(),
            _ => sweep_order(&hessian.diagonal(), settings),
        };
        let reordered = hessian.reordered(&order);
        let (factor, share) = reordered.factor(DAMPING)?;
        let damping = share * reordered.mean_diagonal();
        let mut importance = vec![0.0; order.len()];
        for (&col, cost) in order.iter().zip(factor.importance()) {
            importance[col] = cost;
        }
        let extra_damping = (share > DAMPING).then_some(share);
        let damped = reordered.damped(damping);
        Ok(Self { factor, importance, order, damped, damping, extra_damping })
    }

    /// Replaces `m: [.., cols]` by `m H^-1`.
    fn solve(&self, m: &mut [f32]) {
        self.factor.solve(m, &self.order);
    }

    /// `sum_r d_r H d_r^T` over the rows of `rows: [.., cols]`, without damping.
    fn quadratic(&self, rows: &[f32]) -> f64 {
        let Self { damped, damping, order, .. } = self;
        let of_slab = |rows: &[f32]| {
            let squares = rows.iter().map(|&d| f64::from(d).powi(2)).sum::<f64>();
            damped.quadratic(&reordered(rows, order)) - f64::from(*damping) * squares
        };
        rows.chunks(SLAB_ROWS * order.len()).map(of_slab).sum()
    }

    fn curvature(&self, settings: &Settings) -> Curvature<'_> {
        let (is_swept, is_refined) = match settings.method {
            Method::RoundToNearest => (false, false),
            Method::Reference => (true, false),
            Method::Slim | Method::SlimPlus | Method::Gptq => (true, true),
        };
        Curvature {
            factor: is_swept.then(|| self.factor.values()),
            importance: Cow::Borrowed(&self.importance),
            order: Cow::Borrowed(&self.order),
            hessian: is_refined.then(|| self.damped.values()),
        }
    }
}

/// Runs of columns that share scales, those with the largest inputs first: what is quantized first
/// has the most columns left that make up for its error.
fn sweep_order(diagonal: &[f32], settings: &Settings) -> Vec<usize> {
    let groups = group_columns(diagonal.len(), settings.group_size);
    let mut runs: Vec<Range<usize>> =
        groups.iter().flat_map(|group| settings.coding.runs(group)).collect();
    let size = |run: &Range<usize>| {
        diagonal[run.clone()].iter().map(|&x| f64::from(x)).sum::<f64>() / run.len() as f64
    };
    runs.sort_by(|a, b| size(b).total_cmp(&size(a)));
    runs.into_iter().flatten().collect()
}

/// Rows whose quantized form is held as f32 at a time: bounds the memory that a tall layer, such as
/// an embedding, takes.
pub const SLAB_ROWS: usize = 64 * TILE_ROWS;

/// A layer that was quantized on its calibration inputs.
pub struct QuantizedLayer {
    /// As the file holds it.
    pub packed: PackedLayer,
    /// Relative squared output error, `||X (What - W)^T||^2 / ||X W^T||^2`, where `W` are the
    /// targets.
    pub error: f32,
}

/// Quantizes some rows of a matrix to a mean of `settings.bits`, on the inputs that it takes in.
pub fn quantize_layer(
    targets: &mut Targets,
    rows: Range<usize>,
    inputs: &LayerInputs<'_>,
    settings: &Settings,
    widths: Option<&Vec<BitWidth>>,
) -> QuantizedLayer {
    let quantizer = Quantizer::calibrated(targets.rows(rows.clone()), inputs, settings, widths);
    let (packed, errors) = quantizer.round(targets, rows.clone());
    // Rounded rows are not touched again: their targets still stand.
    let error = inputs.factored.quadratic(&errors).max(0.0);
    let total = inputs.factored.quadratic(targets.rows(rows));
    QuantizedLayer { packed, error: if total > 0.0 { (error / total) as f32 } else { 0.0 } }
}

/// Does what [`quantize_layer`] does to all rows of `targets`, and forgets it.
pub fn try_layer(targets: &mut Targets, settings: &Settings, hessian: &FactoredHessian) {
    let rows = 0..targets.row_count();
    let quantizer =
        Quantizer::streamed(rows.len(), hessian.order.len(), settings, Some(hessian), None);
    let (_, errors) = quantizer.round(targets, rows.clone());
    hessian.quadratic(&errors);
    hessian.quadratic(targets.rows(rows));
}

/// Quantizes a layer whose rows come a slab at a time: `weights` gives some of them as f32. Without
/// a Hessian every weight is rounded by itself.
///
/// # Errors
/// What `weights` answers.
pub fn stream_layer(
    rows: usize,
    cols: usize,
    settings: &Settings,
    hessian: Option<&FactoredHessian>,
    widths: Option<&Vec<BitWidth>>,
    mut weights: impl FnMut(Range<usize>) -> Result<Vec<f32>>,
) -> Result<PackedLayer> {
    let quantizer = Quantizer::streamed(rows, cols, settings, hessian, widths);
    let mut packed = PackedLayer::zeroed(quantizer.layout.clone());
    for (slab, slots) in packed.tiles_mut().chunks_mut(SLAB_ROWS / TILE_ROWS).enumerate() {
        let tiles = quantizer.sweep(&weights(quantizer.slab_rows(slab))?);
        slots.par_iter_mut().zip(&tiles).for_each(|(slot, tile)| tile.store(slot));
    }
    Ok(packed)
}

/// All that is decided before the first row is quantized.
struct Quantizer<'a> {
    layout: LayerLayout,
    curvature: Curvature<'a>,
    coder: Coder,
}

impl<'a> Quantizer<'a> {
    fn calibrated(
        weights: &[f32],
        inputs: &'a LayerInputs<'_>,
        settings: &Settings,
        widths: Option<&Vec<BitWidth>>,
    ) -> Self {
        let cols = inputs.factored.importance.len();
        let widths = widths.cloned().unwrap_or_else(|| own_widths(weights, inputs, settings));
        let coder = settings.coder();
        let curvature = inputs.factored.curvature(settings);
        let layout =
            layout(weights.len() / cols, cols, settings.group_size, coder.coding(), &widths);
        Self { layout, curvature, coder }
    }

    fn streamed(
        rows: usize,
        cols: usize,
        settings: &Settings,
        hessian: Option<&'a FactoredHessian>,
        widths: Option<&Vec<BitWidth>>,
    ) -> Self {
        let coder = Coder::Best(settings.coding);
        let even = || uniform_widths(cols.div_ceil(settings.group_size), settings.bits);
        let widths = widths.cloned().unwrap_or_else(even);
        let layout = layout(rows, cols, settings.group_size, coder.coding(), &widths);
        let curvature = match hessian {
            Some(hessian) => hessian.curvature(settings),
            None => Curvature {
                factor: None,
                importance: Cow::Owned(vec![1.0; cols]),
                order: Cow::Owned((0..cols).collect()),
                hessian: None,
            },
        };
        Self { layout, curvature, coder }
    }

    /// The rows of slab `slab`.
    fn slab_rows(&self, slab: usize) -> Range<usize> {
        let first = slab * SLAB_ROWS;
        first..self.layout.rows().min(first + SLAB_ROWS)
    }

    /// Quantizes some rows of `targets`, which leave their errors to those behind; gives these,
    /// target less result, in the order of rounding.
    fn round(&self, targets: &mut Targets, rows: Range<usize>) -> (PackedLayer, Vec<f32>) {
        let cols = self.layout.cols();
        let mut packed = PackedLayer::zeroed(self.layout.clone());
        let mut slots = packed.tiles_mut();
        let mut errors = Vec::with_capacity(rows.len() * cols);
        for slab in targets.slabs(rows.clone()) {
            let weights: Vec<f32> =
                slab.iter().flat_map(|block| targets.rows(block.clone())).copied().collect();
            let swept = self.sweep(&weights);
            let strip = self.layout.coding().strip_rows();
            let tiles = slab.iter().flat_map(|block| {
                let rows = block.len().next_multiple_of(strip);
                (block.start..block.start + rows).step_by(TILE_ROWS)
            });
            for (row, swept) in tiles.zip(&swept) {
                swept.store(&mut slots[(row - rows.start) / TILE_ROWS]);
            }
            let of_slab = difference(&weights, cols, &swept);
            targets.spread(&slab, &of_slab);
            errors.extend(of_slab);
        }
        (packed, errors)
    }

    /// Quantizes some rows.
    fn sweep(&self, weights: &[f32]) -> Vec<SweptTile> {
        sweep(weights, &self.curvature, &self.layout, self.coder)
    }
}

/// The layout of a layer whose settings have been validated.
pub fn layout(
    rows: usize,
    cols: usize,
    group_size: usize,
    coding: ScaleCoding,
    widths: &[BitWidth],
) -> LayerLayout {
    LayerLayout::new(rows, cols, group_size, coding, widths)
        .unwrap_or_else(|(_, found, expected)| panic!("found {found}, expected {expected}"))
}

fn uniform_widths(groups: usize, bits: u8) -> Vec<BitWidth> {
    vec![BitWidth::new(bits).expect("validated settings"); groups]
}

/// The widths of a layer that no budget has decided: as published, or all the same.
fn own_widths(weights: &[f32], inputs: &LayerInputs<'_>, settings: &Settings) -> Vec<BitWidth> {
    let LayerInputs { activations, factored, search_importance, .. } = inputs;
    let importance = &factored.importance;
    let groups = group_columns(importance.len(), settings.group_size);
    let Some(search) = search_importance else {
        return uniform_widths(groups.len(), settings.bits);
    };
    let ranking = group_salience(weights, search, &groups);
    let divergences = published_divergences(weights, activations, &groups, &ranking, settings.bits);
    published_widths(&divergences, &group_salience(weights, importance, &groups), settings.bits)
}

/// The tiles of a layer as the quantizer sees them, for tests.
#[cfg(test)]
pub(crate) fn sweep_layer(
    weights: &[f32],
    inputs: &LayerInputs<'_>,
    settings: &Settings,
) -> (LayerLayout, Vec<SweptTile>) {
    let quantizer = Quantizer::calibrated(weights, inputs, settings, None);
    let tiles = quantizer.sweep(weights);
    (quantizer.layout, tiles)
}
