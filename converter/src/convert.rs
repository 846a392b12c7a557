//! The whole conversion: the embedding, then one block at a time, each layer calibrated on what the
//! quantized layers before it give.

use slim_formats::{
    DType, ModelSource, OutputPath, Part, ScratchFile, Weight,
    arch::Tensor,
    gguf::Metadata,
    slim::{BitWidth, LayerLayout, PackedLayer, PackedTensor, SlimFile, SlimWriter},
};
use slim_kernels::{narrow, weight};
use slim_runtime::Block;

use crate::{
    Calibration, ConvertError, Degenerate, Engine, LayerReport, Method, Progress, Report,
    Resources, Result, Settings, Work, WorkFolder,
    activations::StageInputs,
    budget::{Survey, Widths, survey},
    calibrator::{Calibrator, ENOUGH_TOKENS, Layer, Visitor, scratch_bytes},
    contents::{Contents, MATRICES_BEFORE, MATRICES_BEHIND, VECTORS_BEFORE, VECTORS_BEHIND},
    distill::train,
    finite::finite_rows,
    layer::{FactoredHessian, LayerInputs, quantize_layer, stream_layer},
    neurons::Ffn,
    probe::try_rounding,
    provenance::{self, STEPS},
    rows::Targets,
    work,
    work_folder::Record,
    zeros::ZeroGroups,
};

/// What is converted, and where the steps of it are kept until all are done.
pub struct Job<'j> {
    /// The model.
    pub source: &'j dyn ModelSource,
    /// What it is calibrated on.
    pub calibration: &'j Calibration,
    /// How.
    pub settings: &'j Settings,
    /// What is done.
    pub work: &'j WorkFolder,
}

/// Quantizes the source of `job` and writes the SliM file `target`, which appears when all is done.
/// Its room on the disk is reserved before, and that of the activations.
///
/// # Errors
/// A file, tensor or setting that cannot be used; `Interrupted` if the caller wants it to stop.
/// There is no target then, and [`Job::work`] has what was done.
pub fn convert<'p>(
    job: &Job<'_>,
    resources: &Resources,
    target: impl Into<OutputPath<'p>>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    let Job { source, calibration, settings, work } = *job;
    settings.validate()?;
    let is_trained = settings.method == Method::SlimPlus;
    let method = if is_trained { Method::Slim } else { settings.method };
    let rounding = &Settings { method, ..settings.clone() };
    let instructions = resources.engine.instruction_path();
    // Once: it has the hashes of the source's files.
    let metadata = provenance::metadata(source, calibration, rounding, &instructions)?;
    let mut identity = metadata.clone();
    if is_trained {
        identity.insert(STEPS, settings.steps as u32)?;
    }
    work.identify(&identity)?;
    let (first, target) = (&Job { settings: rounding, ..*job }, target.into());
    let report = match is_trained {
        true => quantize_and_train(job, first, metadata, resources, target, progress),
        false => quantize(first, metadata, resources, target, settings.split_max_bytes, progress),
    }?;
    work.remove();
    Ok(report)
}

/// The conversion `first` into a draft with `metadata`, which is then trained.
fn quantize_and_train(
    job: &Job<'_>,
    first: &Job<'_>,
    metadata: Metadata,
    resources: &Resources,
    target: OutputPath<'_>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    let Job { source, settings, work, .. } = *job;
    target.check_file()?;
    work.create()?;
    let draft = work.path().join("draft.slim.gguf");
    let (mut warnings, mut degenerate) = (Vec::new(), None);
    if !draft.exists() {
        let training = work::step(source.decoder(), settings) * settings.steps as f64;
        let mut with_training = |step: Progress<'_>| match step {
            Progress::Planned(Work::Steps, _) => progress(Progress::Planned(Work::Steps, training)),
            step => progress(step),
        };
        let draft = (&draft).into();
        // Whole: what becomes of it is split.
        let report = quantize(first, metadata, resources, draft, None, &mut with_training)?;
        (warnings, degenerate) = (report.warnings, report.degenerate);
    }
    let report = train(job, &SlimFile::open(&draft)?, target, progress)?;
    Ok(Report { warnings, degenerate, ..report })
}

/// All methods but the training; the file gets `metadata`, and parts of at most `part_bytes`.
pub(crate) fn quantize(
    job: &Job<'_>,
    metadata: Metadata,
    resources: &Resources,
    target: OutputPath<'_>,
    part_bytes: Option<u64>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    let Job { source, calibration, settings, work } = *job;
    let instructions = resources.engine.instruction_path();
    let contents = Contents::computed_by(source, settings, &instructions)?;
    let mut writer = SlimWriter::create(target, &contents.outline(|_| None), metadata)?;
    writer.reserve(contents.expected_file_bytes(settings.target)?)?;
    let decoder = source.decoder();
    let mut memory_left = resources.float_bytes;
    let reserved = ScratchFile::new(scratch_bytes(decoder, settings, memory_left))?;
    for kind in Work::ALL {
        let planned = kind.planned(decoder, &contents, settings, Some(work));
        progress(Progress::Planned(kind, planned));
    }
    let mut output = Output {
        writer,
        source,
        settings,
        work,
        contents,
        survey: None,
        widths: Widths::new(),
        layers: Vec::new(),
        warnings: Vec::new(),
        degenerate: Degenerate::default(),
        seldom_experts: Vec::new(),
        progress,
    };
    for warning in output.contents.warnings().to_vec() {
        output.warn(warning);
    }
    if settings.has_budget() {
        try_rounding(source, settings, &mut *output.progress)?;
        let contents = &output.contents;
        let (memory_left, progress) = (&mut memory_left, &mut *output.progress);
        let survey = surveyed(job, contents, memory_left, progress)?;
        output.widths = survey.costs.widths(settings, contents)?;
        output.survey = Some(survey);
    }
    if let Some(most) = part_bytes {
        output.split(most)?;
    }
    let embedding = output.vocabulary_matrix(decoder.embedding())?;
    if let Some(tensor) = decoder.outside(Part::BlockEmbedding) {
        output.vocabulary_matrix(tensor)?;
    }
    output.keep_outside(&MATRICES_BEFORE)?;
    output.vectors_outside(&VECTORS_BEFORE)?;
    drop(reserved);
    let mut calibrator = match settings.method {
        Method::RoundToNearest => None,
        _ => {
            let (samples, engine) = (&calibration.samples, &resources.engine);
            let embedding = embedding.weight(source.require(&decoder.embedding().name)?);
            Some(Calibrator::new(source, embedding, samples, settings, engine, &mut memory_left)?)
        }
    };
    drop(embedding);
    let blocks = decoder.blocks.len();
    for index in 0..blocks {
        let block = Block::load(source, index)?;
        let order = output.survey.as_ref().and_then(|survey| survey.neurons.get(index));
        let order = order.filter(|order| !order.is_empty());
        let ffn = match order {
            Some(order) => Ffn::load(&block, decoder, index)?.map(|ffn| ffn.sorted(order)),
            None => None,
        };
        let block = match &ffn {
            Some(ffn) => ffn.within(&block),
            None => block,
        };
        for (part, values) in block.vectors.iter() {
            let name = &decoder.tensor(index, part).name;
            match output.contents.kept_type(name) {
                // The taps of a convolution, which a block has in another order.
                Some(dtype) => output.keep(name, source.require(name)?, dtype)?,
                None => output.vector(name, values)?,
            }
        }
        match &mut calibrator {
            Some(calibrator) => {
                calibrator.pass_block(index, &block, &mut output)?;
                output.worked(Work::Forward, work::forward(decoder, index, settings));
            }
            None => round_block(index, &block, &mut output)?,
        }
        source.release_pages();
        (output.progress)(Progress::Block { done: index + 1, of: blocks });
    }
    output.warn_of_seldom_experts();
    output.behind_blocks()?;
    output.finish()
}

/// What was found out of the model, now or before.
pub(crate) fn surveyed(
    job: &Job<'_>,
    contents: &Contents,
    memory_left: &mut u64,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Survey> {
    let Job { source, calibration, settings, work } = *job;
    let is_done = |name: &str| work.has(&settings.record_of(name));
    if let Some(survey) = Survey::recorded(work, source.decoder(), is_done, memory_left)? {
        return Ok(survey);
    }
    let survey = survey(source, calibration, settings, contents, memory_left, progress)?;
    survey.record(work)?;
    work.go_on()?;
    Ok(survey)
}

/// Quantizes a block without calibration.
fn round_block(index: usize, block: &Block<'_>, output: &mut Output<'_>) -> Result<()> {
    for (part, &weight) in block.layers.iter() {
        let name = &output.source.decoder().tensor(index, part).name;
        if let Some(dtype) = output.contents.kept_type(name) {
            output.keep(name, weight, dtype)?;
            continue;
        }
        let bands = match output.recorded(name) {
            Some(bands) => bands,
            None => output.stream(name, weight, output.settings, None)?,
        };
        output.write(name, bands)?;
    }
    Ok(())
}

/// A quantized layer: a matrix or a band of one.
struct Band {
    packed: PackedLayer,
    /// If it was measured.
    error: Option<f32>,
    /// The inputs of its matrix, if it was calibrated.
    inputs: Option<Inputs>,
    /// Groups whose weights were all 0.
    zero_groups: u64,
}

/// What a matrix was calibrated on.
#[derive(Debug, Clone, Copy)]
struct Inputs {
    tokens: u64,
    /// Columns that were all 0.
    dead: u64,
}

impl Band {
    /// Number `index` of its matrix, as [`Self::record`] has noted it; `layout` is its layout, with
    /// any widths.
    fn recorded(record: &Record, index: usize, layout: &LayerLayout) -> Option<Self> {
        let bytes = |part: &str| record.get::<u8>(&format!("{index}.{part}"));
        let widths: Vec<BitWidth> =
            bytes("bits")?.into_iter().map(BitWidth::new).collect::<Option<_>>()?;
        let (rows, cols, group_size) = (layout.rows(), layout.cols(), layout.group_size());
        let layout = LayerLayout::new(rows, cols, group_size, layout.coding(), &widths).ok()?;
        let (codes, scales, row_scales) = (bytes("codes")?, bytes("scales")?, bytes("row_scales")?);
        let packed = PackedTensor::new(&layout, &codes, &scales, &row_scales).ok()?.to_layer();
        let error = record.get(&format!("{index}.error"))?.first().copied();
        let inputs = match record.get::<u64>(&format!("{index}.inputs"))?[..] {
            [tokens, dead] => Some(Inputs { tokens, dead }),
            _ => None,
        };
        let &zero_groups = record.get(&format!("{index}.zero_groups"))?.first()?;
        Some(Self { packed, error, inputs, zero_groups })
    }

    fn record(&self, record: &mut Record, index: usize) {
        let mut put = |part: &str, bytes: &[u8]| record.put(format!("{index}.{part}"), bytes);
        let groups = self.packed.layout().groups();
        put("bits", &groups.iter().map(|group| group.bit_width.bits()).collect::<Vec<_>>());
        let (codes, scales, row_scales) = self.packed.parts();
        put("codes", codes);
        put("scales", scales);
        put("row_scales", row_scales);
        record.put(format!("{index}.error"), self.error.as_slice());
        let inputs = self.inputs.map(|Inputs { tokens, dead }| [tokens, dead]);
        record.put(format!("{index}.inputs"), inputs.as_ref().map_or(&[], |inputs| &inputs[..]));
        record.put(format!("{index}.zero_groups"), &[self.zero_groups]);
    }
}

/// The file being written, and what is told about it.
struct Output<'a> {
    writer: SlimWriter,
    source: &'a dyn ModelSource,
    settings: &'a Settings,
    work: &'a WorkFolder,
    /// What is going to be in it.
    contents: Contents,
    /// Of methods that have the widths decided by one budget.
    survey: Option<Survey>,
    /// Those that were decided.
    widths: Widths,
    layers: Vec<LayerReport>,
    warnings: Vec<String>,
    degenerate: Degenerate,
    /// Block, number and calibration tokens of experts that few go through.
    seldom_experts: Vec<(usize, u16, usize)>,
    progress: &'a mut dyn FnMut(Progress<'_>),
}

impl Visitor for Output<'_> {
    fn stage(
        &mut self,
        layers: &[(&Tensor, Weight<'_>)],
        inputs: StageInputs<'_>,
        engine: &Engine,
    ) -> Result<Vec<Layer>> {
        let first = layers[0].0;
        // What ran before was a forward pass; how much, is told when the block is done.
        self.worked(Work::Forward, 0.0);
        let mut calibrated = None;
        let mut of_stage = Vec::new();
        for &(tensor, source) in layers {
            let name = tensor.name.as_str();
            if let Some(dtype) = self.contents.kept_type(name) {
                self.keep(name, source, dtype)?;
                of_stage.push(Layer::Kept);
                continue;
            }
            let bands = match self.recorded(name) {
                Some(bands) => bands,
                None => {
                    let inputs = match &mut calibrated {
                        Some(inputs) => inputs,
                        none => none.insert(self.calibrated(first, inputs, engine)?),
                    };
                    self.quantize(name, source, inputs)?
                }
            };
            of_stage.push(Layer::Quantized(self.write(name, bands)?));
        }
        Ok(of_stage)
    }

    fn expert(&mut self, block: usize, index: u16, tokens: usize) {
        if tokens < ENOUGH_TOKENS {
            self.seldom_experts.push((block, index, tokens));
        }
    }
}

/// Experts that a warning names.
const NAMED_EXPERTS: usize = 8;

impl Output<'_> {
    /// Splits the file into parts, now that the widths of all layers are known.
    fn split(&mut self, most: u64) -> Result<()> {
        let exact = self.contents.outline(|name| Some(self.widths.get(name)?.as_slice()));
        Ok(self.writer.split(most, &exact)?)
    }

    /// Names the experts that the calibration text says little of.
    fn warn_of_seldom_experts(&mut self) {
        let seldom = std::mem::take(&mut self.seldom_experts);
        self.degenerate.seldom_experts = seldom.len();
        if seldom.is_empty() {
            return;
        }
        let name = |&(block, index, tokens): &(usize, u16, usize)| {
            format!("expert {index} of block {block} ({tokens})")
        };
        let mut names: Vec<String> = seldom.iter().take(NAMED_EXPERTS).map(name).collect();
        if let Some(more) = seldom.len().checked_sub(NAMED_EXPERTS).filter(|&more| more > 0) {
            names.push(format!("{more} more"));
        }
        let names = names.join(", ");
        self.warn(format!(
            "fewer than {ENOUGH_TOKENS} calibration tokens go through {names}: calibrated on all \
             tokens of their blocks; more samples, or a text like those to come, would do better"
        ));
    }

    /// The inputs of a stage, of which `first` is a layer.
    fn calibrated<'i>(
        &mut self,
        first: &Tensor,
        inputs: StageInputs<'i>,
        engine: &Engine,
    ) -> Result<LayerInputs<'i>> {
        let name = &first.name;
        let inputs = LayerInputs::new(inputs, self.settings, engine)
            .map_err(|error| error.of_layer(name))?;
        self.worked(Work::Hessians, work::hessian(first, self.source.decoder(), self.settings));
        self.warn_of_damping(name, inputs.hessian());
        Ok(inputs)
    }

    /// A linear layer of a block.
    fn quantize(
        &mut self,
        name: &str,
        source: Weight<'_>,
        inputs: &LayerInputs<'_>,
    ) -> Result<Vec<Band>> {
        let (rows, cols) = weight::shape(source);
        let weights = finite_rows(name, source, 0..rows)?;
        let layers = self.contents.layers_of(name);
        let zero_groups = layers.iter().map(|(_, rows)| {
            let mut groups = ZeroGroups::new(cols, self.settings.group_size);
            groups.see(&weights[rows.start * cols..rows.end * cols]);
            groups.count()
        });
        let zero_groups: Vec<u64> = zero_groups.collect();
        let weights = inputs.corrected(weights);
        let outputs = self.survey.as_mut().and_then(|survey| survey.outputs.remove(name));
        let mut targets =
            Targets::new(weights, cols, outputs.as_ref(), self.settings.coding.strip_rows())
                .map_err(|error| error.of_layer(name))?;
        let kind = if outputs.is_some() { Work::LinkedSweeps } else { Work::Sweeps };
        drop(outputs);
        let mut bands = Vec::new();
        let seen = Inputs { tokens: inputs.tokens() as u64, dead: inputs.dead() as u64 };
        for ((band, rows), zero_groups) in layers.into_iter().zip(zero_groups) {
            let widths = self.widths.get(&band);
            let layer = quantize_layer(&mut targets, rows, inputs, self.settings, widths);
            self.swept(&layer.packed, kind);
            let (packed, error) = (layer.packed, Some(layer.error));
            bands.push(Band { packed, error, inputs: Some(seen), zero_groups });
        }
        self.record(name, &bands)?;
        Ok(bands)
    }

    /// What was worked out of a matrix before.
    fn recorded(&self, name: &str) -> Option<Vec<Band>> {
        let record = self.work.get(&self.settings.record_of(name))?;
        let layouts = self.contents.layouts_of(name);
        layouts
            .enumerate()
            .map(|(band, (_, layout))| Band::recorded(&record, band, layout))
            .collect()
    }

    /// Keeps what was worked out of a matrix.
    fn record(&self, name: &str, bands: &[Band]) -> Result<()> {
        let mut record = Record::default();
        bands.iter().enumerate().for_each(|(index, band)| band.record(&mut record, index));
        self.work.put(&self.settings.record_of(name), &record)?;
        self.work.go_on()
    }

    /// An embedding or the output layer.
    fn vocabulary_matrix(&mut self, tensor: &Tensor) -> Result<Layer> {
        let name = tensor.name.as_str();
        let found = self.source.require(name)?;
        if let Some(dtype) = self.contents.kept_type(name) {
            self.keep(name, found, dtype)?;
            return Ok(Layer::Kept);
        }
        let settings = self.settings.for_embedding();
        if let Some(bands) = self.recorded(name) {
            return Ok(Layer::Quantized(self.write(name, bands)?));
        }
        let hessian = self.survey.as_ref().and_then(|survey| survey.vocabulary.get(tensor.part));
        let hessian = match hessian.cloned() {
            Some(hessian) => {
                let hessian = FactoredHessian::new(hessian, &settings)
                    .map_err(|error| error.of_layer(name))?;
                self.warn_of_damping(name, &hessian);
                Some(hessian)
            }
            None => None,
        };
        let bands = self.stream(name, found, &settings, hessian.as_ref())?;
        self.source.release_pages();
        Ok(Layer::Quantized(self.write(name, bands)?))
    }

    /// Quantizes a matrix, as for [`stream_layer`].
    fn stream(
        &mut self,
        name: &str,
        source: Weight<'_>,
        settings: &Settings,
        hessian: Option<&FactoredHessian>,
    ) -> Result<Vec<Band>> {
        let (_, cols) = weight::shape(source);
        let mut bands = Vec::new();
        for (band, rows) in self.contents.layers_of(name) {
            let widths = self.widths.get(&band);
            let mut groups = ZeroGroups::new(cols, settings.group_size);
            let packed = stream_layer(rows.len(), cols, settings, hessian, widths, |slab| {
                let slab = rows.start + slab.start..rows.start + slab.end;
                let weights = finite_rows(name, source, slab)?;
                groups.see(&weights);
                Ok(weights)
            })?;
            self.swept(&packed, Work::Sweeps);
            let zero_groups = groups.count();
            bands.push(Band { packed, error: None, inputs: None, zero_groups });
        }
        self.record(name, &bands)?;
        Ok(bands)
    }

    /// Writes the bands of a matrix; gives what runs in its place.
    fn write(&mut self, name: &str, bands: Vec<Band>) -> Result<Vec<PackedLayer>> {
        self.count_degenerate(&bands);
        for ((name, _), Band { packed, error, .. }) in
            self.contents.layers_of(name).iter().zip(&bands)
        {
            self.writer.layer(name, packed, *error)?;
            let report = LayerReport::new(name, packed.layout(), *error);
            (self.progress)(Progress::Layer(&report));
            self.layers.push(report);
        }
        Ok(bands.into_iter().map(|band| band.packed).collect())
    }

    /// Counts what is degenerate in a matrix.
    fn count_degenerate(&mut self, bands: &[Band]) {
        let Degenerate { dead_inputs, rank_deficient, zero_groups, .. } = &mut self.degenerate;
        *zero_groups += bands.iter().map(|band| band.zero_groups as usize).sum::<usize>();
        if let Some(Band { packed, inputs: Some(inputs), .. }) = bands.first() {
            *dead_inputs += inputs.dead as usize;
            *rank_deficient += usize::from(inputs.tokens < packed.layout().cols() as u64);
        }
    }

    fn swept(&mut self, packed: &PackedLayer, kind: Work) {
        let layout = packed.layout();
        self.worked(kind, work::sweep((layout.rows(), layout.cols())));
    }

    /// Output norm, output layer and RoPE factors.
    fn behind_blocks(&mut self) -> Result<()> {
        let source = self.source;
        let (config, decoder) = (source.config(), source.decoder());
        self.vectors_outside(&VECTORS_BEHIND)?;
        self.keep_outside(&MATRICES_BEHIND)?;
        if !decoder.has_tied_embeddings() {
            self.vocabulary_matrix(decoder.output())?;
        }
        for (name, values) in config.rope_vectors() {
            self.vector(name, values)?;
        }
        Ok(())
    }

    /// Writes vectors outside of blocks.
    fn vectors_outside(&mut self, parts: &[Part]) -> Result<()> {
        let source = self.source;
        for tensor in parts.iter().filter_map(|&part| source.decoder().outside(part)) {
            let values = finite_rows(&tensor.name, source.require(&tensor.name)?, 0..1)?;
            self.vector(&tensor.name, &values)?;
        }
        Ok(())
    }

    /// Writes the matrices outside of blocks that stay dense.
    fn keep_outside(&mut self, parts: &[Part]) -> Result<()> {
        let source = self.source;
        for tensor in parts.iter().filter_map(|&part| source.decoder().outside(part)) {
            let name = &tensor.name;
            let dtype = self.contents.kept_type(name).expect("it was planned to be kept");
            self.keep(name, source.require(name)?, dtype)?;
        }
        Ok(())
    }

    /// Writes a vector as F32.
    fn vector(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok(self.writer.dense(name, DType::F32, &[values.len() as u64], &bytes)?)
    }

    /// Writes a matrix in a float type.
    fn keep(&mut self, name: &str, source: Weight<'_>, dtype: DType) -> Result<()> {
        const ROWS: usize = 1024;
        let (rows, cols) = weight::shape(source);
        let mut bytes = Vec::new();
        for first in (0..rows).step_by(ROWS) {
            let weights = finite_rows(name, source, first..rows.min(first + ROWS))?;
            bytes.extend(narrow::to_bytes(dtype, &weights).map_err(|at| {
                let (tensor, row) = (name.to_owned(), first + at / cols);
                ConvertError::Unrepresentable { tensor, row, found: weights[at], dtype }
            })?);
        }
        Ok(self.writer.dense(name, dtype, &[rows as u64, cols as u64], &bytes)?)
    }

    fn warn_of_damping(&mut self, name: &str, hessian: &FactoredHessian) {
        if let Some(share) = hessian.extra_damping {
            self.warn(format!(
                "`{name}`: its Hessian needed {share} of its mean diagonal as damping"
            ));
        }
    }

    fn warn(&mut self, warning: String) {
        (self.progress)(Progress::Warning(&warning));
        self.warnings.push(warning);
    }

    fn worked(&mut self, kind: Work, amount: f64) {
        (self.progress)(Progress::Worked(kind, amount));
    }

    fn finish(self) -> Result<Report> {
        let written = self.writer.finish()?;
        let report = Report::new(self.layers, &[], written, self.warnings);
        Ok(Report { degenerate: Some(self.degenerate), ..report })
    }
}
