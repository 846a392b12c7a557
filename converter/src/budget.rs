//! One budget of bits for the whole model: the widths of all groups of all layers, by what an error
//! costs the loss. Embedding and output layer have a budget of their own, unless the size of the
//! file is the target.
//!
//! What a group costs at a width is predicted by the fit of its scales: the squared error of each
//! weight, times the mean square of its input, weighted by token, and the mean squared gradient of
//! the loss at its output (`backward`). Widths are then shared out so that no bit would be worth
//! more elsewhere.

use std::{collections::HashMap, ops::Range};

use rayon::prelude::*;
use slim_formats::{
    Decoder, ModelSource, PartMap, Weight,
    arch::Tensor,
    slim::{BitWidth, TILE_ROWS},
};
use slim_kernels::weight;
use slim_runtime::Block;

use crate::{
    Calibration, Contents, Progress, Result, Settings, Target, Work, WorkFolder,
    allocate::group_columns,
    backward::{
        Sensitivities, Sensitivity, sensitivities, sensitivity_batches, sensitivity_samples,
    },
    coder::expected_error,
    finite::finite_rows,
    hessian::Hessian,
    lanes::gather,
    layer::{SLAB_ROWS, layout},
    neurons::Ffn,
    rows::{OutputHessian, hang_together},
    work,
    work_folder::Record,
};

/// Bits that a code can have.
const MOST_BITS: usize = 8;

/// What is found out about a model before its bits are shared out: nothing of it depends on how
/// many there are.
pub struct Survey {
    /// What bits are worth.
    pub costs: Costs,
    /// The order of the neurons of every block; empty where they are not sorted.
    pub neurons: Vec<Vec<usize>>,
    /// By the names of the matrices whose rows are to make up for each other's errors.
    pub outputs: HashMap<String, OutputHessian>,
    /// The Hessians of the embedding and the output layer.
    pub vocabulary: PartMap<Hessian>,
}

/// The record of all but the output Hessians, which have records of their own, written before.
pub const SURVEY: &str = "survey";

impl Survey {
    /// Keeps it.
    ///
    /// # Errors
    /// As [`WorkFolder::put`].
    pub fn record(&self, work: &WorkFolder) -> Result<()> {
        for (name, outputs) in &self.outputs {
            work.put(&outputs_record(name), &Record::default().with("sums", &outputs.sums))?;
        }
        let mut record = Record::default();
        self.costs.record(&mut record);
        for (block, order) in self.neurons.iter().enumerate() {
            let order: Vec<u64> = order.iter().map(|&neuron| neuron as u64).collect();
            record.put(format!("{NEURONS}{block}"), &order);
        }
        for (part, hessian) in self.vocabulary.iter() {
            record.put(format!("{VOCABULARY}{}", part.gguf_name()), hessian.values());
        }
        work.put(SURVEY, &record)
    }

    /// What [`Self::record`] has kept of a model, without the output Hessians of layers that are
    /// done, as `is_done` tells; in memory as for [`OutputHessian::zeros`].
    ///
    /// # Errors
    /// As [`OutputHessian::zeros`].
    pub fn recorded(
        work: &WorkFolder,
        decoder: &Decoder,
        is_done: impl Fn(&str) -> bool,
        memory_left: &mut u64,
    ) -> Result<Option<Self>> {
        let Some(record) = work.get(SURVEY) else { return Ok(None) };
        let order_of = |block: usize| -> Option<Vec<usize>> {
            let order: Vec<u64> = record.get(&format!("{NEURONS}{block}"))?;
            Some(order.into_iter().map(|neuron| neuron as usize).collect())
        };
        let neurons = (0..record.names(NEURONS).count()).map(order_of).collect();
        let of_vocabulary = decoder.tensors().iter().filter(|tensor| tensor.block.is_none());
        let vocabulary = of_vocabulary.filter_map(|tensor| {
            let values = record.get(&format!("{VOCABULARY}{}", tensor.name))?;
            Some((tensor.part, Hessian::new(values, tensor.shape().1)))
        });
        let vocabulary = vocabulary.collect();
        let mut outputs = HashMap::new();
        let are_left = |tensor: &&Tensor| hang_together(tensor) && !is_done(&tensor.name);
        for tensor in decoder.tensors().iter().filter(are_left) {
            let Some(record) = work.get(&outputs_record(&tensor.name)) else { continue };
            let mut zeros = OutputHessian::zeros(tensor.shape().0, memory_left)?;
            let sums: Vec<f32> = record.get("sums").unwrap_or_default();
            if sums.len() != zeros.sums.len() {
                return Ok(None);
            }
            zeros.sums.copy_from_slice(&sums);
            outputs.insert(tensor.name.clone(), zeros);
        }
        let (Some(costs), Some(neurons)) = (Costs::recorded(&record), neurons) else {
            return Ok(None);
        };
        Ok(Some(Self { costs, neurons, outputs, vocabulary }))
    }
}

const LOSSES: &str = "losses.";
const BITS: &str = "bits.";
const LAYER: &str = "layer.";
const WIDTHS: &str = "widths.";
const NEURONS: &str = "neurons.";
const VOCABULARY: &str = "hessian.";

fn outputs_record(name: &str) -> String {
    format!("outputs.{name}")
}

/// Sorts neurons, if they are to be sorted, and weighs up the widths of all groups. The output
/// Hessians are in memory as for [`OutputHessian::zeros`].
///
/// # Errors
/// As the reverse pass; `NotFinite` for a weight that is no number.
pub fn survey(
    source: &dyn ModelSource,
    calibration: &Calibration,
    settings: &Settings,
    contents: &Contents,
    memory_left: &mut u64,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Survey> {
    let decoder = source.decoder();
    let samples = &calibration.samples;
    let samples = &samples[..sensitivity_samples(samples.len(), settings.context)];
    let mut done = 0;
    let of = sensitivity_batches(samples).len() + decoder.blocks.len();
    progress(Progress::Survey { done, of });
    let mut sensitivities = sensitivities(source, samples, memory_left, &mut |tokens| {
        done += 1;
        progress(Progress::Worked(Work::Sensitivities, work::sensitivities(decoder, tokens)));
        progress(Progress::Survey { done, of });
    })?;
    let (mut layers, mut neurons) = (Vec::new(), Vec::new());
    for index in 0..decoder.blocks.len() {
        let block = Block::load(source, index)?;
        let ffn = match contents.has_bands() {
            true => Ffn::load(&block, decoder, index)?,
            false => None,
        };
        let ffn = match ffn {
            Some(ffn) => {
                let order = ffn.order(&sensitivities.blocks[index]);
                ffn.sort_sensitivities(&mut sensitivities.blocks[index], &order);
                let sorted = ffn.sorted(&order);
                neurons.push(order);
                Some(sorted)
            }
            None => {
                neurons.push(Vec::new());
                None
            }
        };
        let block = match &ffn {
            Some(ffn) => ffn.within(&block),
            None => block,
        };
        for (part, &found) in block.layers.iter().filter(|(part, _)| !part.stays_precise()) {
            let name = &decoder.tensor(index, part).name;
            let sensitivity = &sensitivities.blocks[index][part];
            layers.extend(matrix_costs(name, found, sensitivity, contents, settings)?);
            progress(Progress::Worked(Work::Fits, work::weights(weight::shape(found))));
        }
        source.release_pages();
        done += 1;
        progress(Progress::Survey { done, of });
    }
    let vocabulary = vocabulary_costs(source, &sensitivities, contents, settings, progress)?;
    let of_vocabulary = match settings.embed_bits {
        Some(_) => even_budget(vocabulary, &settings.for_embedding()),
        None => {
            layers.extend(vocabulary);
            Vec::new()
        }
    };
    // As a record has them.
    layers.sort_by(|a, b| a.name.cmp(&b.name));
    let Sensitivities { outputs, vocabulary, .. } = sensitivities;
    let hessians = vocabulary.iter().filter_map(|(part, found)| Some((part, found.hessian()?)));
    let vocabulary = hessians.collect();
    Ok(Survey { costs: Costs { layers, of_vocabulary }, neurons, outputs, vocabulary })
}

/// What bits are worth to each group.
pub struct Costs {
    /// Of the layers that share one budget.
    layers: Vec<LayerCosts>,
    /// The widths of embedding and output layer, where they have a budget of their own.
    of_vocabulary: Vec<(String, Vec<BitWidth>)>,
}

/// The widths of the groups of quantized layers, by name.
pub type Widths = HashMap<String, Vec<BitWidth>>;

impl Costs {
    /// The widths with the least predicted loss among those that the settings allow.
    ///
    /// # Errors
    /// As [`Contents::file_bytes`].
    pub fn widths(&self, settings: &Settings, contents: &Contents) -> Result<Widths> {
        let chosen = share_out(&self.layers, settings, |widths| self.file_bytes(widths, contents))?;
        Ok(self.named(&chosen))
    }

    /// Size of the file with such widths of `layers`.
    fn file_bytes(&self, widths: &[Vec<BitWidth>], contents: &Contents) -> Result<u64> {
        let widths = self.named(widths);
        contents.file_bytes_with(|name| widths.get(name).map(Vec::as_slice))
    }

    fn named(&self, widths: &[Vec<BitWidth>]) -> Widths {
        let names = self.layers.iter().map(|layer| layer.name.clone());
        names.zip(widths.iter().cloned()).chain(self.of_vocabulary.iter().cloned()).collect()
    }

    /// The size of the smallest file whose predicted divergence from the source is at most `most`,
    /// and its divergence; of the largest one if all diverge more.
    ///
    /// # Errors
    /// As [`Contents::file_bytes`].
    pub fn smallest(&self, most: f64, contents: &Contents) -> Result<(u64, f64)> {
        let loss = |price| at_price(&self.layers, price).map(|choice| choice.loss).sum::<f64>();
        // The second order of the divergence, whose curvature the losses are of.
        let divergence = |price| 0.5 * loss(price);
        let (price, _) = bisect_price(|price| divergence(price) <= most);
        let chosen: Vec<Choice> = at_price(&self.layers, price).collect();
        let bytes = self.file_bytes(&by_layer(&self.layers, &chosen), contents)?;
        Ok((bytes, divergence(price)))
    }

    fn record(&self, record: &mut Record) {
        for LayerCosts { name, weights, own_bits, groups } in &self.layers {
            let choices: Vec<Choice> = groups.iter().flatten().copied().collect();
            let losses: Vec<f64> = choices.iter().map(|choice| choice.loss).collect();
            let bits: Vec<u64> = choices.iter().map(|choice| choice.bits).collect();
            record.put(format!("{LOSSES}{name}"), &losses);
            record.put(format!("{BITS}{name}"), &bits);
            record.put(format!("{LAYER}{name}"), &[*weights, *own_bits]);
        }
        for (name, widths) in &self.of_vocabulary {
            let bits: Vec<u8> = widths.iter().map(|width| width.bits()).collect();
            record.put(format!("{WIDTHS}{name}"), &bits);
        }
    }

    fn recorded(record: &Record) -> Option<Self> {
        let layer = |name: &str| {
            let losses: Vec<f64> = record.get(&format!("{LOSSES}{name}"))?;
            let bits: Vec<u64> = record.get(&format!("{BITS}{name}"))?;
            let &[weights, own_bits] = &record.get::<u64>(&format!("{LAYER}{name}"))?[..] else {
                return None;
            };
            let of_group = |(losses, bits): (&[f64], &[u64])| -> Vec<Choice> {
                let choices = widths().zip(losses).zip(bits);
                choices.map(|((width, &loss), &bits)| Choice { width, loss, bits }).collect()
            };
            let groups = losses.chunks(MOST_BITS).zip(bits.chunks(MOST_BITS)).map(of_group);
            let groups = groups.collect();
            Some(LayerCosts { name: name.to_owned(), weights, own_bits, groups })
        };
        let of_vocabulary = |name: &str| {
            let bits: Vec<u8> = record.get(&format!("{WIDTHS}{name}"))?;
            let widths = bits.into_iter().map(BitWidth::new).collect::<Option<_>>()?;
            Some((name.to_owned(), widths))
        };
        let layers = record.names(LAYER).map(layer).collect::<Option<_>>()?;
        let of_vocabulary = record.names(WIDTHS).map(of_vocabulary).collect::<Option<_>>()?;
        Some(Self { layers, of_vocabulary })
    }
}

/// The costs of the embeddings and the output layer.
fn vocabulary_costs(
    source: &dyn ModelSource,
    sensitivities: &Sensitivities,
    contents: &Contents,
    settings: &Settings,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<LayerCosts>> {
    let settings = settings.for_embedding();
    let mut layers = Vec::new();
    for (part, vocabulary) in sensitivities.vocabulary.iter() {
        let name = &*part.gguf_name();
        let (found, sensitivity) = (source.require(name)?, &vocabulary.sensitivity);
        layers.extend(matrix_costs(name, found, sensitivity, contents, &settings)?);
        progress(Progress::Worked(Work::Fits, work::weights(weight::shape(found))));
        source.release_pages();
    }
    Ok(layers)
}

/// The widths of layers that have a budget of their own: what they would take at the width of the
/// settings.
fn even_budget(layers: Vec<LayerCosts>, settings: &Settings) -> Vec<(String, Vec<BitWidth>)> {
    let widths = by_layer(&layers, &best(&layers, even_bits(&layers, settings)));
    layers.into_iter().map(|layer| layer.name).zip(widths).collect()
}

/// The costs of each layer that the matrix `name` becomes.
fn matrix_costs(
    name: &str,
    found: Weight<'_>,
    sensitivity: &Sensitivity,
    contents: &Contents,
    settings: &Settings,
) -> Result<Vec<LayerCosts>> {
    let costs = |(band, rows): (String, Range<usize>)| {
        let sensitivity = sensitivity.of_rows(rows.clone());
        LayerCosts::new(band, &sensitivity, settings, |slab| {
            finite_rows(name, found, rows.start + slab.start..rows.start + slab.end)
        })
    };
    contents.layers_of(name).into_iter().map(costs).collect()
}

/// What the groups of a layer cost at each width.
struct LayerCosts {
    name: String,
    weights: u64,
    /// Bits of the layer that are no group's: row scales and the table of widths.
    own_bits: u64,
    /// For each group its choices, widths 1 to 8.
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

impl LayerCosts {
    /// The costs of a layer that `sensitivity` is of; `weights` gives some of its rows,
    /// `[.., cols]`.
    fn new(
        name: String,
        sensitivity: &Sensitivity,
        settings: &Settings,
        weights: impl Fn(Range<usize>) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let (rows, cols) = (sensitivity.outputs.len(), sensitivity.inputs.len());
        let groups = group_columns(cols, settings.group_size);
        let mut losses = vec![vec![0.0; MOST_BITS]; groups.len()];
        for first in (0..rows).step_by(SLAB_ROWS) {
            let slab = first..rows.min(first + SLAB_ROWS);
            let weights = weights(slab.clone())?;
            add_losses(&mut losses, &weights, &groups, &sensitivity.of_rows(slab), settings);
        }
        let widths: Vec<BitWidth> = widths().collect();
        let bits = |len: usize, width: BitWidth| {
            let layout = layout(rows, len, settings.group_size, settings.coding, &[width]);
            8 * (layout.tiles() * (layout.tile_code_bytes() + layout.tile_scale_bytes())) as u64
        };
        let of_group = |(group, losses): (&Range<usize>, &Vec<f64>)| -> Vec<Choice> {
            let choice = |(&width, &loss)| Choice { width, loss, bits: bits(group.len(), width) };
            widths.iter().zip(losses).map(choice).collect()
        };
        let groups: Vec<_> = groups.iter().zip(&losses).map(of_group).collect();
        let lowest: Vec<BitWidth> = groups.iter().map(|choices| choices[0].width).collect();
        let in_groups: u64 = groups.iter().map(|choices| choices[0].bits).sum();
        let layout = layout(rows, cols, settings.group_size, settings.coding, &lowest);
        let own_bits = layout.stored_bits() - in_groups;
        Ok(Self { name, weights: (rows * cols) as u64, own_bits, groups })
    }
}

/// Weighs up the widths of the groups of `weights: [.., cols]` as if all errors cost the same: a
/// trial of what that takes.
pub fn try_fits(weights: &[f32], cols: usize, settings: &Settings) {
    let groups = group_columns(cols, settings.group_size);
    let mut losses = vec![vec![0.0; MOST_BITS]; groups.len()];
    let outputs = vec![1.0; weights.len() / cols];
    let sensitivity = Sensitivity { inputs: vec![1.0; cols], outputs };
    add_losses(&mut losses, weights, &groups, &sensitivity, settings);
}

/// The widths that groups can have.
fn widths() -> impl Iterator<Item = BitWidth> {
    (1..=MOST_BITS as u8).filter_map(BitWidth::new)
}

/// Adds what each of `groups` of some rows costs at each width to `losses: [groups][widths]`.
fn add_losses(
    losses: &mut [Vec<f64>],
    weights: &[f32],
    groups: &[Range<usize>],
    sensitivity: &Sensitivity,
    settings: &Settings,
) {
    let cols = sensitivity.inputs.len();
    let importance: Vec<f32> = sensitivity.inputs.iter().map(|&square| square as f32).collect();
    let losses_of_tile = |tile: usize| -> Vec<f64> {
        let w = gather(weights, cols, tile, 0..cols);
        let outputs = &sensitivity.outputs[tile * TILE_ROWS..];
        let loss = |group: &Range<usize>, width| -> f64 {
            let runs = settings.coding.runs(group);
            let errors = runs.map(|run| {
                expected_error(settings.coding, &w[run.clone()], &importance[run], width)
            });
            errors.map(|error| weighted(&error, outputs)).sum()
        };
        groups
            .iter()
            .flat_map(|group| widths().map(move |width| (group, width)))
            .map(|(group, width)| loss(group, width))
            .collect()
    };
    let tiles = sensitivity.outputs.len().div_ceil(TILE_ROWS);
    let tiles: Vec<_> = (0..tiles).into_par_iter().map(losses_of_tile).collect();
    for tile in tiles {
        losses.iter_mut().flatten().zip(tile).for_each(|(sum, loss)| *sum += loss);
    }
}

fn weighted(error: &[f32; TILE_ROWS], outputs: &[f64]) -> f64 {
    error.iter().zip(outputs).map(|(&error, output)| f64::from(error) * output).sum()
}

/// The widths with the least predicted loss among those that the settings allow; `file_bytes` tells
/// what size such widths give the file.
///
/// # Errors
/// As `file_bytes`.
fn share_out(
    layers: &[LayerCosts],
    settings: &Settings,
    file_bytes: impl Fn(&[Vec<BitWidth>]) -> Result<u64>,
) -> Result<Vec<Vec<BitWidth>>> {
    let budget_bits = match settings.target {
        None => even_bits(layers, settings),
        Some(Target::BitsPerWeight(bits)) => {
            let weights: u64 = layers.iter().map(|layer| layer.weights).sum();
            let own_bits: u64 = layers.iter().map(|layer| layer.own_bits).sum();
            ((bits * weights as f64) as u64).saturating_sub(own_bits)
        }
        Some(Target::FileBytes(bytes)) => return fit_into(layers, bytes, file_bytes),
    };
    Ok(by_layer(layers, &best(layers, budget_bits)))
}

/// What all groups take at the width of the settings.
fn even_bits(layers: &[LayerCosts], settings: &Settings) -> u64 {
    let even = |choices: &Vec<Choice>| choices[usize::from(settings.bits) - 1].bits;
    layers.iter().flat_map(|layer| &layer.groups).map(even).sum()
}

/// The widths with the least predicted loss in a file of `target` bytes.
fn fit_into(
    layers: &[LayerCosts],
    target: u64,
    file_bytes: impl Fn(&[Vec<BitWidth>]) -> Result<u64>,
) -> Result<Vec<Vec<BitWidth>>> {
    let bits = |choices: &[Choice]| choices.iter().map(|choice| choice.bits).sum::<u64>();
    let lowest = best(layers, 0);
    let least = file_bytes(&by_layer(layers, &lowest))?;
    let mut budget_bits = bits(&lowest) + 8 * target.saturating_sub(least);
    loop {
        let chosen = best(layers, budget_bits);
        let widths = by_layer(layers, &chosen);
        // The padding of the tensors changes with the widths.
        let excess = file_bytes(&widths)?.saturating_sub(target);
        // `Contents` has seen to it that the lowest widths fit.
        if excess == 0 || bits(&chosen) <= bits(&lowest) {
            return Ok(widths);
        }
        budget_bits = bits(&chosen).saturating_sub(8 * excess);
    }
}

/// The choices of all groups with the least predicted loss among those that take no more than
/// `budget_bits`; the lowest widths if all take more.
///
/// At a price per bit each group has its best choice; the price is the lowest that the budget can
/// pay.
fn best(layers: &[LayerCosts], budget_bits: u64) -> Vec<Choice> {
    let bits = |price| at_price(layers, price).map(|choice| choice.bits).sum::<u64>();
    let (_, price) = bisect_price(|price| bits(price) > budget_bits);
    at_price(layers, price).collect()
}

/// The choice of each group if a bit costs `price`.
fn at_price(layers: &[LayerCosts], price: f64) -> impl Iterator<Item = Choice> {
    layers.iter().flat_map(|layer| &layer.groups).map(move |choices| {
        let cost = |choice: &&Choice| choice.loss + price * choice.bits as f64;
        *choices.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).expect("a choice")
    })
}

/// The highest price at which `is_low`, and the lowest at which it is not, next to each other.
fn bisect_price(is_low: impl Fn(f64) -> bool) -> (f64, f64) {
    // Over the exponent: prices have no natural scale.
    let (mut low, mut high) = (-300.0_f64, 300.0_f64);
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        match is_low(middle.exp2()) {
            true => low = middle,
            false => high = middle,
        }
    }
    (low.exp2(), high.exp2())
}

/// The widths of the groups of each layer.
fn by_layer(layers: &[LayerCosts], chosen: &[Choice]) -> Vec<Vec<BitWidth>> {
    let mut widths = chosen.iter().map(|choice| choice.width);
    layers.iter().map(|layer| widths.by_ref().take(layer.groups.len()).collect()).collect()
}

#[cfg(test)]
mod tests {
    use slim_formats::{
        gguf::Metadata,
        slim::{LayerLayout, Outline},
    };

    use super::*;
    use crate::{
        Method,
        tests::{CODINGS, noise, settings},
    };

    const ROWS: usize = 40;
    const COLS: usize = 160;

    /// Two layers of five groups of 32 columns, the first of which costs much in one layer.
    fn layers(settings: &Settings, first: f64) -> Vec<LayerCosts> {
        let mut sensitivity = Sensitivity { inputs: vec![1.0; COLS], outputs: vec![1.0; ROWS] };
        sensitivity.inputs[..32].fill(first);
        let layer = |seed| {
            let weights = noise(ROWS * COLS, seed);
            let rows =
                |rows: Range<usize>| Ok(weights[rows.start * COLS..rows.end * COLS].to_vec());
            LayerCosts::new(String::new(), &sensitivity, settings, rows).unwrap()
        };
        vec![layer(4), layer(5)]
    }

    fn layout_of(widths: &[BitWidth], settings: &Settings) -> LayerLayout {
        layout(ROWS, COLS, settings.group_size, settings.coding, widths)
    }

    fn stored_bits(widths: &[Vec<BitWidth>], settings: &Settings) -> u64 {
        widths.iter().map(|widths| layout_of(widths, settings).stored_bits()).sum()
    }

    /// A file of the two layers.
    fn file_bytes(widths: &[Vec<BitWidth>], settings: &Settings) -> Result<u64> {
        let mut outline = Outline::default();
        for (name, widths) in ["a", "b"].into_iter().zip(widths) {
            outline.layer(name, &layout_of(widths, settings), None);
        }
        Ok(outline.part_bytes("".as_ref(), &Metadata::new(), None)?.iter().sum())
    }

    fn shared_out(first: f64, settings: &Settings) -> Vec<Vec<BitWidth>> {
        let layers = layers(settings, first);
        share_out(&layers, settings, |widths| file_bytes(widths, settings)).unwrap()
    }

    fn all(bits: u8) -> Vec<Vec<BitWidth>> {
        vec![vec![BitWidth::new(bits).unwrap(); 5]; 2]
    }

    #[test]
    fn costly_group_gets_more_bits_within_the_budget_of_even_widths() {
        for coding in CODINGS {
            for bits in 2..=6 {
                let settings = settings(bits, coding, Method::Slim);
                let widths = shared_out(100.0, &settings);
                assert!(stored_bits(&widths, &settings) <= stored_bits(&all(bits), &settings));
                for layer in &widths {
                    assert!(layer[0] > layer[1] && layer[0].bits() > bits, "{layer:?}");
                }
            }
        }
    }

    #[test]
    fn target_bits_per_weight_are_met_from_below() {
        for coding in CODINGS {
            for target in [2.8, 3.4, 5.0, 7.5] {
                let settings = Settings {
                    target: Some(Target::BitsPerWeight(target)),
                    ..settings(3, coding, Method::Slim)
                };
                let widths = shared_out(10.0, &settings);
                let found = stored_bits(&widths, &settings) as f64 / (2 * ROWS * COLS) as f64;
                // A group of 32 columns is a tenth of these layers.
                assert!(found <= target && found > target - 0.25, "{coding:?}: {found}");
            }
        }
    }

    #[test]
    fn target_size_of_the_file_is_met_from_below_with_all_padding() {
        for coding in CODINGS {
            let settings = settings(3, coding, Method::Slim);
            let [least, most] = [1, 8].map(|bits| file_bytes(&all(bits), &settings).unwrap());
            let mut largest_gap = 0;
            for bytes in (least..=most).step_by(29) {
                let target = Some(Target::FileBytes(bytes));
                let settings = Settings { target, ..settings.clone() };
                let found = file_bytes(&shared_out(10.0, &settings), &settings).unwrap();
                assert!(found <= bytes, "{coding:?}: {found} for {bytes}");
                largest_gap = largest_gap.max(bytes - found);
            }
            // One more bit for a group of 32 columns in 48 rows, and the padding of four tensors.
            assert!(largest_gap < 48 * 32 / 8 + 4 * 64, "{coding:?}: {largest_gap}");
        }
    }

    #[test]
    fn result_with_a_target_does_not_depend_on_bits() {
        let widths = |bits| {
            let target = Some(Target::BitsPerWeight(4.0));
            shared_out(10.0, &Settings { target, ..settings(bits, CODINGS[0], Method::Slim) })
        };
        assert_eq!(widths(1), widths(8));
    }
}
