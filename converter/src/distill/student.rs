//! The quantized model while it is trained.

use slim_formats::{
    Decoder, Part, PartMap, Weight,
    slim::{Bands, PackedLayer, SlimFile, band_name},
};

use super::{PRECISION, layer::TrainedLayer, parameters::Parameters};
use crate::{
    Result,
    backward::{Backward, Gradient, Loss, weight_gradient},
    work_folder::Record,
};

/// The entries of the record of a training.
const STEPS: &str = "steps";
const NUMBERS: &str = "numbers";

/// How far the weight of a norm moves in a step.
const NORM_RATE: f32 = 0.0003;

/// A model from a SliM file, with its scales and norms being trained. It runs on its packed layers,
/// as the file will.
pub struct Student<'a> {
    /// The model of the file.
    start: Backward<'a>,
    /// The bands of each block's linear layers; none of those without two-level scales.
    layers: Vec<PartMap<Vec<PackedLayer>>>,
    /// What is trained behind each of them.
    trained: Vec<PartMap<Vec<TrainedLayer>>>,
    norms: Norms,
}

/// The norms of a model.
struct Norms {
    blocks: Vec<PartMap<Parameters>>,
    output: Option<Parameters>,
}

impl<'a> Student<'a> {
    /// The model of `file`.
    pub fn new(file: &'a SlimFile) -> Result<Self> {
        let start = Backward::load(file, PRECISION)?;
        let (mut layers, mut trained) = (Vec::new(), Vec::new());
        for block in &start.blocks {
            let (mut of_block, mut numbers_of_block) = (PartMap::new(), PartMap::new());
            for (part, weight) in block.layers.iter() {
                let bands = weight.bands().into_iter().flat_map(|bands| bands.iter());
                let two_level = bands.filter_map(|(_, band)| {
                    TrainedLayer::new(band).map(|numbers| (band.to_layer(), numbers))
                });
                let (bands, numbers) = two_level.unzip();
                of_block.insert(part, bands);
                numbers_of_block.insert(part, numbers);
            }
            layers.push(of_block);
            trained.push(numbers_of_block);
        }
        let norms = start.blocks.iter().map(|block| {
            let norms = block.vectors.iter();
            norms.map(|(part, norm)| (part, Parameters::new(norm.clone()))).collect()
        });
        let output = start.ends.norm.clone().map(Parameters::new);
        let norms = Norms { blocks: norms.collect(), output };
        Ok(Self { start, layers, trained, norms })
    }

    /// Takes a step at `rate` times the full rates, number `step` counted from 1, against the
    /// gradients of the loss on `sequences`; gives the loss before it.
    pub fn step(
        &mut self,
        sequences: &[&[u32]],
        loss: &mut Loss<'_>,
        rate: f32,
        step: usize,
    ) -> Result<f64> {
        let Self { start, layers, trained, norms } = self;
        let loss = running(start, layers, norms).run(sequences, loss, &mut |gradient| {
            match gradient {
                Gradient::Linear { block, part, x, dy } => {
                    descend(&layers[block][part], &mut trained[block][part], x, dy, rate, step);
                }
                Gradient::Norm { block, part, dw } => {
                    let dw: Vec<f32> = dw.iter().map(|&d| d as f32).collect();
                    norms.of_mut(block, part).step(&dw, rate * NORM_RATE, step);
                }
                Gradient::Output { .. } | Gradient::Embedding(_) | Gradient::BlockEmbedding(_) => {}
            }
            Ok(())
        })?;
        self.store();
        Ok(loss)
    }

    /// What is trained, after `steps` steps.
    pub fn record(&self, steps: usize) -> Record {
        let trained = self.trained.iter().flat_map(PartMap::values).flatten();
        let parameters = trained.flat_map(TrainedLayer::parameters).chain(self.norms.parameters());
        let numbers: Vec<f32> =
            parameters.flat_map(Parameters::numbers).flatten().copied().collect();
        Record::default().with(STEPS, &[steps as u64]).with(NUMBERS, &numbers)
    }

    /// Goes on from what [`Self::record`] has noted; gives the steps. `None` if that was of another
    /// model, which changes nothing.
    pub fn resume(&mut self, record: &Record) -> Option<usize> {
        let steps = *record.get::<u64>(STEPS)?.first()?;
        let found: Vec<f32> = record.get(NUMBERS)?;
        let trained = self.trained.iter_mut().flat_map(PartMap::values_mut).flatten();
        let parameters = trained.flat_map(TrainedLayer::parameters_mut);
        let parameters = parameters.chain(self.norms.parameters_mut());
        let mut numbers: Vec<&mut [f32]> = parameters.flat_map(Parameters::numbers_mut).collect();
        if numbers.iter().map(|numbers| numbers.len()).sum::<usize>() != found.len() {
            return None;
        }
        let mut found = found.as_slice();
        for numbers in &mut numbers {
            let (these, others) = found.split_at(numbers.len());
            numbers.copy_from_slice(these);
            found = others;
        }
        self.store();
        Some(steps as usize)
    }

    /// Rounds what is trained into the layers.
    fn store(&mut self) {
        let layers = self.layers.iter_mut().flat_map(PartMap::values_mut).flatten();
        let trained = self.trained.iter().flat_map(PartMap::values).flatten();
        layers.zip(trained).for_each(|(layer, trained)| trained.store(layer));
    }

    /// A trained layer by its name.
    pub fn layer(&self, name: &str) -> Option<&PackedLayer> {
        let decoder: &Decoder = self.start.decoder;
        decoder.tensors().iter().filter(|tensor| tensor.is_linear()).find_map(|tensor| {
            let bands = &self.layers[tensor.block?][tensor.part];
            let matrix = &tensor.name;
            let is_named = |index: &usize| {
                if bands.len() == 1 { name == matrix } else { name == band_name(matrix, *index) }
            };
            (0..bands.len()).find(is_named).map(|index| &bands[index])
        })
    }

    /// A norm, or a bias of a block, by its tensor's name.
    pub fn norm(&self, name: &str) -> Option<&[f32]> {
        let tensor = self.start.decoder.find(name).filter(|tensor| !tensor.is_matrix())?;
        let norm = match tensor.block {
            Some(block) => &self.norms.blocks[block][tensor.part],
            None if tensor.part == Part::OutputNorm => self.norms.output.as_ref()?,
            None => return None,
        };
        Some(&norm.values)
    }
}

impl Norms {
    fn parameters(&self) -> impl Iterator<Item = &Parameters> {
        self.blocks.iter().flat_map(PartMap::values).chain(&self.output)
    }

    fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameters> {
        self.blocks.iter_mut().flat_map(PartMap::values_mut).chain(&mut self.output)
    }

    fn of_mut(&mut self, block: Option<usize>, part: Part) -> &mut Parameters {
        match block {
            Some(block) => &mut self.blocks[block][part],
            None => self.output.as_mut().expect("a norm with a gradient is there"),
        }
    }
}

/// Takes a step with the bands of a matrix, against the gradients for its inputs
/// `x: [tokens, cols]` and the gradient `dy: [tokens, rows]` of the loss at its outputs.
fn descend(
    bands: &[PackedLayer],
    trained: &mut [TrainedLayer],
    x: &[f32],
    dy: &[f32],
    rate: f32,
    step: usize,
) {
    if bands.is_empty() {
        return;
    }
    let (rows, cols) = Bands::new(bands).shape();
    let dw = weight_gradient(PRECISION, x, dy, rows, cols);
    let mut dw = dw.as_slice();
    for (band, trained) in bands.iter().zip(trained) {
        let (mine, below) = dw.split_at(band.layout().rows() * cols);
        trained.descend(band, mine, rate, step);
        dw = below;
    }
}

/// The model of a student as it is now.
fn running<'m>(
    start: &'m Backward<'_>,
    layers: &'m [PartMap<Vec<PackedLayer>>],
    norms: &Norms,
) -> Backward<'m> {
    let mut model: Backward<'m> = start.clone();
    for ((block, layers), norms) in model.blocks.iter_mut().zip(layers).zip(&norms.blocks) {
        block.vectors = norms.iter().map(|(part, norm)| (part, norm.values.clone())).collect();
        let trained = layers.iter().filter(|(_, bands)| !bands.is_empty());
        block.layers.extend(trained.map(|(part, bands)| (part, Weight::Bands(Bands::new(bands)))));
    }
    model.ends.norm = norms.output.as_ref().map(|norm| norm.values.clone());
    model
}
