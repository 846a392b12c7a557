//! One budget of bits for the whole model: the widths of all groups of all layers, by what an error costs the loss.
//!
//! What a group costs at a width is predicted by the fit that the sweep will make: the squared error of each row, weighted by
//! what it costs in the layer's outputs (`1 / U_jj^2`) and by what the loss minds an error at that output (the mean squared
//! gradient, `backward`). Widths are then shared out so that no bit would be worth more elsewhere.

use std::collections::HashMap;

use rayon::prelude::*;
use slim_formats::{
    ModelSource, Weight,
    slim::{BitWidth, TILE_ROWS},
};
use slim_kernels::weight;
use slim_runtime::Block;

use crate::{
    Calibration, ConvertError, Engine, Progress, Resources, Result, Settings,
    allocate::group_columns,
    backward::{Sensitivities, sensitivities},
    calibrator::{Calibrator, Layer, Stage, Visitor},
    convert::finite_rows,
    fit::fit_error,
    lanes::gather,
    layer::{LayerInputs, layout},
};

/// Samples that sensitivities are measured on: their mean settles long before a Hessian does.
const SENSITIVITY_SAMPLES: usize = 12;

/// Bits that a group may have more or less than the mean.
const SPREAD: u8 = 3;

/// The widths of the groups of every layer that has groups, by name.
///
/// # Errors
/// As the calibration and the reverse pass.
pub fn bit_widths(
    source: &dyn ModelSource,
    calibration: &Calibration,
    settings: &Settings,
    resources: &Resources,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<HashMap<String, Vec<BitWidth>>> {
    let of = source.config().block_count;
    progress(Progress::Survey { done: 0, of });
    let samples = &calibration.samples;
    let sensitivities = sensitivities(source, &samples[..samples.len().min(SENSITIVITY_SAMPLES)])?;
    let mut calibrator = Calibrator::new(source, calibration, settings, resources, false)?;
    let mut survey = Survey { settings, sensitivities, layers: Vec::new() };
    for index in 0..of {
        calibrator.pass_block(index, &Block::load(source, index)?, &mut survey)?;
        progress(Progress::Survey { done: index + 1, of });
    }
    let widths = share_out(&survey.layers, settings)?;
    Ok(survey.layers.into_iter().map(|layer| layer.name).zip(widths).collect())
}

/// Measures what each group of the float model would lose.
struct Survey<'a> {
    settings: &'a Settings,
    sensitivities: Sensitivities,
    layers: Vec<LayerCosts>,
}

/// What the groups of a layer cost at each width.
struct LayerCosts {
    name: String,
    weights: u64,
    /// Bits of the layer that are no group's: row scales and the table of widths.
    own_bits: u64,
    /// For each group its choices, from the lowest width up.
    groups: Vec<Vec<Choice>>,
}

/// A width of a group.
#[derive(Debug, Clone, Copy)]
struct Choice {
    width: BitWidth,
    /// Predicted increase of the loss.
    loss: f64,
    /// Bits in the file.
    bits: u64,
}

impl Visitor for Survey<'_> {
    fn inputs<'a>(
        &mut self,
        _: &str,
        stage: Stage<'a>,
        engine: &Engine,
    ) -> Result<LayerInputs<'a>> {
        LayerInputs::new(stage, self.settings, engine)
    }

    fn layer(&mut self, name: &str, source: Weight<'_>, inputs: &LayerInputs<'_>) -> Result<Layer> {
        let (rows, cols) = weight::shape(source);
        if cols.is_multiple_of(16) {
            let weights = finite_rows(name, source, 0..rows)?;
            let sensitivity = self.sensitivities.of_tensor(name);
            let costs =
                LayerCosts::new(name, &weights, inputs.importance(), sensitivity, self.settings);
            self.layers.push(costs);
        }
        Ok(Layer::Kept)
    }
}

impl LayerCosts {
    fn new(
        name: &str,
        weights: &[f32],
        importance: &[f32],
        sensitivity: &[f64],
        settings: &Settings,
    ) -> Self {
        let cols = importance.len();
        let groups = choices(weights, importance, sensitivity, settings);
        let lowest: Vec<BitWidth> = groups.iter().map(|choices| choices[0].width).collect();
        let in_groups: u64 = groups.iter().map(|choices| choices[0].bits).sum();
        let layout =
            layout(weights.len() / cols, cols, settings.group_size, settings.coding, &lowest);
        Self {
            name: name.to_owned(),
            weights: weights.len() as u64,
            own_bits: layout.stored_bits() - in_groups,
            groups,
        }
    }
}

/// What each group of a layer costs at each width.
fn choices(
    weights: &[f32],
    importance: &[f32],
    sensitivity: &[f64],
    settings: &Settings,
) -> Vec<Vec<Choice>> {
    let cols = importance.len();
    let groups = group_columns(cols, settings.group_size);
    let widths: Vec<BitWidth> = (settings.bits.saturating_sub(SPREAD)..=settings.bits + SPREAD)
        .filter_map(BitWidth::new)
        .collect();
    let losses_of_tile = |tile: usize| -> Vec<Vec<f64>> {
        let w = gather(weights, cols, tile, 0..cols);
        let sensitivity = &sensitivity[tile * TILE_ROWS..];
        let loss = |group: &std::ops::Range<usize>, width| -> f64 {
            let runs = settings.coding.runs(group);
            let errors = runs.map(|run| fit_error(&w[run.clone()], &importance[run], width));
            errors.map(|error| weighted(&error, sensitivity)).sum()
        };
        groups.iter().map(|group| widths.iter().map(|&w| loss(group, w)).collect()).collect()
    };
    let rows = weights.len() / cols;
    let tiles: Vec<_> = (0..rows.div_ceil(TILE_ROWS)).into_par_iter().map(losses_of_tile).collect();
    let bits = |len: usize, width: BitWidth| {
        let layout = layout(rows, len, len, settings.coding, &[width]);
        8 * (layout.tiles() * (layout.tile_code_bytes() + layout.tile_scale_bytes())) as u64
    };
    let choice = |group: usize, index: usize| Choice {
        width: widths[index],
        loss: tiles.iter().map(|tile| tile[group][index]).sum(),
        bits: bits(groups[group].len(), widths[index]),
    };
    let of_group = |group| (0..widths.len()).map(|index| choice(group, index)).collect();
    (0..groups.len()).map(of_group).collect()
}

fn weighted(error: &[f32; TILE_ROWS], sensitivity: &[f64]) -> f64 {
    error.iter().zip(sensitivity).map(|(&error, sensitivity)| f64::from(error) * sensitivity).sum()
}

/// The widths with the least predicted loss among those that the budget allows.
///
/// At a price per bit each group has its best choice; the price is the lowest that the budget can pay.
///
/// # Errors
/// `InvalidSetting` if even the lowest widths take more.
fn share_out(layers: &[LayerCosts], settings: &Settings) -> Result<Vec<Vec<BitWidth>>> {
    let groups = || layers.iter().flat_map(|layer| &layer.groups);
    let weights = layers.iter().map(|layer| layer.weights).sum::<u64>() as f64;
    let own_bits: u64 = layers.iter().map(|layer| layer.own_bits).sum();
    let budget: u64 = match settings.target_bits_per_weight {
        Some(target) => ((target * weights) as u64).saturating_sub(own_bits),
        None => groups()
            .map(|choices| {
                let even = choices.iter().find(|choice| choice.width.bits() == settings.bits);
                even.expect("the mean is a choice").bits
            })
            .sum(),
    };
    let at = |price: f64| {
        groups().map(move |choices| {
            let cost = |choice: &&Choice| choice.loss + price * choice.bits as f64;
            *choices.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).expect("a choice")
        })
    };
    let bits = |price: f64| at(price).map(|choice| choice.bits).sum::<u64>();
    // Bisection over the exponent: prices have no natural scale.
    let (mut low, mut high) = (-300.0_f64, 300.0_f64);
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        match bits(middle.exp2()) > budget {
            true => low = middle,
            false => high = middle,
        }
    }
    let price = high.exp2();
    if bits(price) > budget {
        let least = (bits(price) + own_bits) as f64 / weights;
        return Err(ConvertError::InvalidSetting {
            what: "bits per weight",
            found: settings.target_bits_per_weight.unwrap_or_default().to_string(),
            expected: format!("at least {least:.3} with these groups and scales"),
        });
    }
    let mut chosen = at(price).map(|choice| choice.width);
    Ok(layers.iter().map(|layer| chosen.by_ref().take(layer.groups.len()).collect()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Method,
        tests::{CODINGS, noise, settings},
    };

    const ROWS: usize = 40;
    const COLS: usize = 160;

    /// Two layers of five groups of 32 columns, the first of which costs much in one layer.
    fn layers(settings: &Settings, first: f32) -> Vec<LayerCosts> {
        let mut importance = [1.0; COLS];
        importance[..32].fill(first);
        let layer = |seed| {
            let weights = noise(ROWS * COLS, seed);
            LayerCosts::new("", &weights, &importance, &[1.0; ROWS], settings)
        };
        vec![layer(4), layer(5)]
    }

    fn stored_bits(widths: &[Vec<BitWidth>], settings: &Settings) -> u64 {
        let layer = |widths: &Vec<BitWidth>| {
            let group_size = settings.group_size;
            layout(ROWS, COLS, group_size, settings.coding, widths).stored_bits()
        };
        widths.iter().map(layer).sum()
    }

    #[test]
    fn costly_group_gets_more_bits_within_the_budget_of_even_widths() {
        for coding in CODINGS {
            for bits in 2..=6 {
                let settings = settings(bits, coding, Method::Slim);
                let widths = share_out(&layers(&settings, 100.0), &settings).unwrap();
                let even = vec![vec![BitWidth::new(bits).unwrap(); 5]; 2];
                assert!(stored_bits(&widths, &settings) <= stored_bits(&even, &settings));
                for layer in &widths {
                    assert!(layer[0] > layer[1] && layer[0].bits() > bits, "{layer:?}");
                }
            }
        }
    }

    #[test]
    fn target_is_met_from_below() {
        for coding in CODINGS {
            let target = 3.4;
            let settings = Settings {
                target_bits_per_weight: Some(target),
                ..settings(3, coding, Method::Slim)
            };
            let widths = share_out(&layers(&settings, 10.0), &settings).unwrap();
            let found = stored_bits(&widths, &settings) as f64 / (2 * ROWS * COLS) as f64;
            // A group of 32 columns is a tenth of these layers.
            assert!(found <= target && found > target - 0.2, "{coding:?}: {found}");
        }
    }

    #[test]
    fn target_below_the_lowest_widths_is_refused() {
        let settings =
            Settings { target_bits_per_weight: Some(1.2), ..settings(1, CODINGS[1], Method::Slim) };
        let error = share_out(&layers(&settings, 1.0), &settings).unwrap_err().to_string();
        assert!(error.contains("found 1.2, expected at least 2."), "{error}");
    }
}
