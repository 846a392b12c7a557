//! One linear layer, from its weights and calibration inputs to its packed form.

use rayon::prelude::*;
use slim_formats::slim::{BitWidth, LayerLayout, PackedLayer, TILE_ROWS};

use crate::{
    Activations, Method, Result, Settings,
    allocate::{by_predicted_loss, group_columns, published_divergences, published_widths},
    coder::Coder,
    hessian::{Factor, Hessian},
    lanes::gather,
    published::ABSOLUTE_DAMPING,
    salience::group_salience,
    sweep::{Curvature, SweptTile, sweep},
};

/// Share of the mean diagonal that is added to a Hessian before it is factored, as in GPTQ.
const DAMPING: f32 = 0.01;

/// The calibration inputs of a layer, or of several layers that share them.
pub struct LayerInputs<'a> {
    activations: &'a Activations,
    hessian: Hessian,
    factor: Factor,
    importance: Vec<f32>,
    /// The ranking of the published search; only for `--reference`.
    search_importance: Option<Vec<f32>>,
    /// The share of the mean diagonal that was needed to factor the Hessian, if more than usual.
    pub extra_damping: Option<f32>,
}

impl<'a> LayerInputs<'a> {
    /// Computes the Hessian of the inputs and factors it.
    ///
    /// # Errors
    /// `Kernel` if the inputs are not finite.
    pub fn new(activations: &'a Activations, settings: &Settings) -> Result<Self> {
        let hessian = Hessian::of(activations);
        // The published code damps in place for its ranking, and again for the sweep.
        let damped = match settings.reference {
            true => hessian.clone().damped(ABSOLUTE_DAMPING),
            false => hessian.clone(),
        };
        let search_importance = match settings.reference {
            true => Some(damped.factor(0.0)?.0.importance()),
            false => None,
        };
        let (factor, share) = damped.factor(DAMPING)?;
        let importance = factor.importance();
        let extra_damping = (share > DAMPING).then_some(share);
        Ok(Self { activations, hessian, factor, importance, search_importance, extra_damping })
    }
}

/// A quantized layer.
pub struct QuantizedLayer {
    /// As the file holds it.
    pub packed: PackedLayer,
    /// Relative squared output error; `None` without inputs.
    pub error: Option<f32>,
}

/// Quantizes `weights: [rows, cols]` to `settings.bits`; without `inputs`, every weight is rounded by itself.
///
/// # Panics
/// If `cols` is not a multiple of 16.
pub fn quantize_layer(
    weights: &[f32],
    cols: usize,
    inputs: Option<&LayerInputs<'_>>,
    settings: &Settings,
) -> QuantizedLayer {
    let (layout, tiles) = sweep_layer(weights, cols, inputs, settings);
    let mut packed = PackedLayer::zeroed(layout);
    packed.tiles_mut().par_iter_mut().zip(&tiles).for_each(|(slot, tile)| tile.store(slot));
    let error = inputs.map(|inputs| relative_error(weights, cols, &tiles, &inputs.hessian));
    QuantizedLayer { packed, error }
}

/// Allocates bit-widths and quantizes every tile.
pub(crate) fn sweep_layer(
    weights: &[f32],
    cols: usize,
    inputs: Option<&LayerInputs<'_>>,
    settings: &Settings,
) -> (LayerLayout, Vec<SweptTile>) {
    let rows = weights.len() / cols;
    let coder = match inputs {
        Some(_) => settings.coder(),
        None => Coder::Best(settings.coding),
    };
    let widths = bit_widths(weights, cols, inputs, settings);
    let layout = LayerLayout::new(rows, cols, settings.group_size, coder.coding(), &widths)
        .unwrap_or_else(|(_, found, expected)| panic!("found {found}, expected {expected}"));
    let plain = vec![1.0; cols];
    let curvature = match inputs {
        Some(inputs) => Curvature {
            factor: (settings.method != Method::RoundToNearest).then(|| inputs.factor.values()),
            importance: &inputs.importance,
        },
        None => Curvature { factor: None, importance: &plain },
    };
    let tiles = (0..layout.tiles())
        .into_par_iter()
        .map(|tile| {
            let used = TILE_ROWS.min(rows - tile * TILE_ROWS);
            sweep(gather(weights, cols, tile, 0..cols), used, &curvature, &layout, coder)
        })
        .collect();
    (layout, tiles)
}

fn bit_widths(
    weights: &[f32],
    cols: usize,
    inputs: Option<&LayerInputs<'_>>,
    settings: &Settings,
) -> Vec<BitWidth> {
    let (bits, groups) = (settings.bits, group_columns(cols, settings.group_size));
    match inputs {
        Some(LayerInputs { activations, importance, search_importance: Some(search), .. }) => {
            let ranking = group_salience(weights, search, &groups);
            let divergences = published_divergences(weights, activations, &groups, &ranking, bits);
            published_widths(&divergences, &group_salience(weights, importance, &groups), bits)
        }
        Some(inputs) if settings.method == Method::Slim => {
            by_predicted_loss(weights, &inputs.importance, &groups, settings.coding, bits)
        }
        _ => vec![BitWidth::new(bits).expect("validated settings"); groups.len()],
    }
}

/// `||X (What - W)^T||^2 / ||X W^T||^2`, from the Hessian of `X`.
fn relative_error(weights: &[f32], cols: usize, tiles: &[SweptTile], hessian: &Hessian) -> f32 {
    let mut difference = weights.to_vec();
    difference.par_chunks_mut(TILE_ROWS * cols).zip(tiles).for_each(|(rows, tile)| {
        for (lane, row) in rows.chunks_exact_mut(cols).enumerate() {
            for (weight, column) in row.iter_mut().zip(&tile.dequantized) {
                *weight -= column[lane];
            }
        }
    });
    let (error, total) = (hessian.quadratic(&difference), hessian.quadratic(weights));
    if total > 0.0 { (error / total) as f32 } else { 0.0 }
}
