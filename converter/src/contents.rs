//! What a conversion writes: one list for the budget, for what is told beforehand, and for the
//! conversion itself.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
    path::PathBuf,
};

use slim_formats::{
    DType, Decoder, FormatError, ModelSource, Part, Weight,
    arch::Tensor,
    gguf::Metadata,
    slim::{BitWidth, LayerLayout, Outline, ScaleCoding, band_name},
};
use slim_kernels::{narrow::Extent, weight};

use crate::{
    ConvertError, Engine, Method, Result, Settings, Target, bands::bands, coder::scales_fit_f16,
    provenance,
};

/// The vectors behind the last block, in the order of the file.
pub(crate) const VECTORS_BEHIND: [Part; 2] = [Part::OutputNorm, Part::OutputNormBias];

/// The matrices before the first block that stay dense.
pub(crate) const MATRICES_BEFORE: [Part; 3] =
    [Part::EmbeddingUp, Part::Positions, Part::BlockEmbeddingUp];

/// The vectors before the first block.
pub(crate) const VECTORS_BEFORE: [Part; 1] = [Part::BlockEmbeddingNorm];

/// The ones behind the last block, before the output layer.
pub(crate) const MATRICES_BEHIND: [Part; 1] = [Part::EmbeddingDown];

/// The tensors of a conversion's result.
pub struct Contents {
    /// Of the source, for messages.
    path: PathBuf,
    tensors: Vec<PlannedTensor>,
    /// Where in `tensors` each tensor of the source is, or its bands.
    by_source: HashMap<String, Range<usize>>,
    /// As large as that of the file.
    metadata: Metadata,
    /// What a part of it may take, if it is to be split.
    split_max_bytes: Option<u64>,
    has_bands: bool,
    /// What the user should know before the work begins.
    warnings: Vec<String>,
}

/// How large the values of each tensor of the source are, by GGUF name.
type Extents = HashMap<String, Extent>;

/// A tensor of the result.
pub struct PlannedTensor {
    /// GGUF name.
    pub name: String,
    /// The tensor that it is made of: the same one, or the matrix that it is a band of.
    pub source: String,
    /// Output channels; 1 for a vector.
    pub rows: usize,
    /// Input channels.
    pub cols: usize,
    /// How it is stored.
    pub storage: Storage,
}

/// How a tensor is stored.
pub enum Storage {
    /// As a quantized layer. The groups have the bit-width of the settings; in the blocks, with a
    /// target, the lowest.
    Layer(LayerLayout),
    /// As a matrix of this type, which holds its values: so are the settings, or it cannot be a
    /// layer.
    Dense(DType),
    /// As a vector.
    F32,
}

impl Contents {
    /// What [`convert`](crate::convert()) makes of `source` on the processor.
    ///
    /// # Errors
    /// `Format` for a tensor that is missing or cannot be a layer, `NotFinite` for one with a value
    /// that is no number, `InvalidSetting` for a target that is out of reach.
    pub fn new(source: &dyn ModelSource, settings: &Settings) -> Result<Self> {
        Self::computed_by(source, settings, &Engine::Cpu.instruction_path())
    }

    /// What it makes of it by other instructions, which the file names.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(crate) fn computed_by(
        source: &dyn ModelSource,
        settings: &Settings,
        instructions: &str,
    ) -> Result<Self> {
        let extents = extents(source)?;
        if settings.has_budget() {
            // Bands take some bytes, which the smallest targets may not have.
            let in_bands = Self::of(source, settings, instructions, &extents, true)?;
            if in_bands.check(settings.target).is_ok() {
                return Ok(in_bands);
            }
        }
        let contents = Self::of(source, settings, instructions, &extents, false)?;
        contents.check(settings.target)?;
        Ok(contents)
    }

    fn of(
        source: &dyn ModelSource,
        settings: &Settings,
        instructions: &str,
        extents: &Extents,
        has_bands: bool,
    ) -> Result<Self> {
        let (bits, method) = match settings.target {
            None => (settings.bits, settings.method),
            // A draft for `slim+` is made by `slim`: the target leaves room for the keys that its
            // metadata has besides.
            Some(_) => (1, Method::SlimPlus),
        };
        let linear = Settings { bits, method, ..settings.clone() };
        let embedding = settings.for_embedding();
        let config = source.config();
        let mut contents = Self {
            path: source.path().to_owned(),
            tensors: Vec::new(),
            by_source: HashMap::new(),
            metadata: provenance::unhashed_metadata(source, &linear, instructions)?,
            split_max_bytes: settings.split_max_bytes,
            has_bands,
            warnings: Vec::new(),
        };
        let decoder = source.decoder();
        contents.matrix(decoder.embedding(), source, &embedding, extents)?;
        if let Some(tensor) = decoder.outside(Part::BlockEmbedding) {
            contents.matrix(tensor, source, &embedding, extents)?;
        }
        for tensor in MATRICES_BEFORE.into_iter().filter_map(|part| decoder.outside(part)) {
            contents.kept(tensor, source.require(&tensor.name)?, extents);
        }
        contents.vectors(&VECTORS_BEFORE, decoder);
        for block in 0..decoder.blocks.len() {
            let (matrices, vectors): (Vec<_>, Vec<_>) =
                decoder.tensors_of(block).iter().partition(|tensor| tensor.is_matrix());
            vectors.into_iter().for_each(|tensor| contents.vector(&tensor.name, tensor.dims[0]));
            for tensor in matrices {
                match tensor.part.stays_precise() {
                    true => contents.kept(tensor, source.require(&tensor.name)?, extents),
                    false => contents.matrix(tensor, source, &linear, extents)?,
                }
            }
        }
        contents.vectors(&VECTORS_BEHIND, decoder);
        for tensor in MATRICES_BEHIND.into_iter().filter_map(|part| decoder.outside(part)) {
            contents.kept(tensor, source.require(&tensor.name)?, extents);
        }
        if !decoder.has_tied_embeddings() {
            contents.matrix(decoder.output(), source, &embedding, extents)?;
        }
        for (name, values) in config.rope_vectors() {
            contents.vector(name, values.len());
        }
        Ok(contents)
    }

    /// Whether matrices are cut into bands, and the neurons of the feed-forward networks sorted for
    /// it.
    pub fn has_bands(&self) -> bool {
        self.has_bands
    }

    /// Sentences about tensors that are not stored as the settings ask.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The tensors in the order of the file.
    pub fn tensors(&self) -> &[PlannedTensor] {
        &self.tensors
    }

    /// Names and layouts of the quantized layers: all matrices of the blocks among them.
    pub fn layers(&self) -> impl Iterator<Item = (&str, &LayerLayout)> {
        self.tensors.iter().filter_map(|tensor| match &tensor.storage {
            Storage::Layer(layout) => Some((tensor.name.as_str(), layout)),
            Storage::Dense(_) | Storage::F32 => None,
        })
    }

    /// The quantized layers of the blocks.
    pub fn linear_layers(&self) -> impl Iterator<Item = (&str, &LayerLayout)> {
        self.layers().filter(|(name, _)| name.starts_with("blk."))
    }

    /// How many matrices of the blocks are quantized.
    pub fn linear_matrices(&self) -> usize {
        let layers = self.tensors.iter().filter(|t| matches!(t.storage, Storage::Layer(_)));
        let sources: BTreeSet<_> = layers.map(|tensor| &tensor.source).collect();
        sources.into_iter().filter(|source| source.starts_with("blk.")).count()
    }

    /// The quantized layers that the tensor `source` becomes, with the rows of it that each holds;
    /// none if it stays dense.
    pub(crate) fn layers_of(&self, source: &str) -> Vec<(String, Range<usize>)> {
        let mut next_row = 0;
        let with_rows = self.layouts_of(source).map(|(name, layout)| {
            let first = next_row;
            next_row += layout.rows();
            (name.to_owned(), first..next_row)
        });
        with_rows.collect()
    }

    /// Names and layouts of the quantized layers that the tensor `source` becomes.
    pub(crate) fn layouts_of(&self, source: &str) -> impl Iterator<Item = (&str, &LayerLayout)> {
        self.of_source(source).iter().filter_map(|tensor| match &tensor.storage {
            Storage::Layer(layout) => Some((tensor.name.as_str(), layout)),
            Storage::Dense(_) | Storage::F32 => None,
        })
    }

    /// What the tensor `source` becomes.
    fn of_source(&self, source: &str) -> &[PlannedTensor] {
        self.by_source.get(source).map_or(&[], |places| &self.tensors[places.clone()])
    }

    /// Plans a tensor behind the others; bands of one follow each other.
    fn push(&mut self, tensor: PlannedTensor) {
        let place = self.tensors.len();
        self.by_source.entry(tensor.source.clone()).or_insert(place..place).end = place + 1;
        self.tensors.push(tensor);
    }

    /// The type in which the matrix `name` is kept; `None` if it is not.
    pub(crate) fn kept_type(&self, name: &str) -> Option<DType> {
        match self.of_source(name).first()?.storage {
            Storage::Dense(dtype) => Some(dtype),
            Storage::Layer(_) | Storage::F32 => None,
        }
    }

    /// Weights of the linear layers.
    pub fn linear_weights(&self) -> u64 {
        self.linear_layers().map(|(_, layout)| (layout.rows() * layout.cols()) as u64).sum()
    }

    /// Bits per weight of the linear layers, everything counted, at the widths of
    /// [`Storage::Layer`].
    pub fn bits_per_weight(&self) -> f64 {
        let bits: u64 = self.linear_layers().map(|(_, layout)| layout.stored_bits()).sum();
        bits as f64 / self.linear_weights().max(1) as f64
    }

    /// Size of the file at the widths of [`Storage::Layer`]; with a target, of the smallest file.
    ///
    /// # Errors
    /// `Format` for names, shapes or metadata that a file cannot hold.
    pub fn file_bytes(&self) -> Result<u64> {
        self.file_bytes_with(|_| None)
    }

    /// Size of the file if some layers have other widths.
    ///
    /// # Errors
    /// As [`Self::file_bytes`].
    pub(crate) fn file_bytes_with<'w>(
        &self,
        widths: impl Fn(&str) -> Option<&'w [BitWidth]>,
    ) -> Result<u64> {
        Ok(self.part_bytes_with(widths)?.iter().sum())
    }

    /// Size of each part of the file at the widths of [`Storage::Layer`]; of one if it stays whole.
    ///
    /// # Errors
    /// As [`Self::file_bytes`].
    pub fn part_bytes(&self) -> Result<Vec<u64>> {
        self.part_bytes_with(|_| None)
    }

    fn part_bytes_with<'w>(
        &self,
        widths: impl Fn(&str) -> Option<&'w [BitWidth]>,
    ) -> Result<Vec<u64>> {
        let outline = self.outline(widths);
        Ok(outline.part_bytes(&self.path, &self.metadata, self.split_max_bytes)?)
    }

    /// The tensors of the file if some layers have other widths.
    pub(crate) fn outline<'w>(&self, widths: impl Fn(&str) -> Option<&'w [BitWidth]>) -> Outline {
        let mut outline = Outline::default();
        for PlannedTensor { name, rows, cols, storage, .. } in &self.tensors {
            match (storage, widths(name)) {
                (Storage::Layer(layout), Some(widths)) => {
                    let layout = crate::layer::layout(
                        *rows,
                        *cols,
                        layout.group_size(),
                        layout.coding(),
                        widths,
                    );
                    outline.layer(name, &layout, None);
                }
                (Storage::Layer(layout), None) => outline.layer(name, layout, None),
                (&Storage::Dense(dtype), _) => {
                    outline.dense(name, dtype, &[*rows as u64, *cols as u64]);
                }
                (Storage::F32, _) => outline.dense(name, DType::F32, &[*cols as u64]),
            }
        }
        outline
    }

    /// Size of the file, as far as it is known before the widths are: with a target about the
    /// largest.
    ///
    /// # Errors
    /// As [`Self::file_bytes`].
    pub(crate) fn expected_file_bytes(&self, target: Option<Target>) -> Result<u64> {
        let least = self.file_bytes()?;
        Ok(match target {
            None => least,
            Some(Target::FileBytes(bytes)) => bytes,
            Some(Target::BitsPerWeight(bits)) => {
                let more = (bits - self.bits_per_weight()).max(0.0) * self.linear_weights() as f64;
                least + (more / 8.0) as u64
            }
        })
    }

    /// Vectors outside of blocks.
    fn vectors(&mut self, parts: &[Part], decoder: &Decoder) {
        for tensor in parts.iter().filter_map(|&part| decoder.outside(part)) {
            self.vector(&tensor.name, tensor.dims[0]);
        }
    }

    fn vector(&mut self, name: &str, cols: usize) {
        let (name, source) = (name.to_owned(), name.to_owned());
        self.push(PlannedTensor { name, source, rows: 1, cols, storage: Storage::F32 });
    }

    /// A matrix that is not quantized.
    fn kept(&mut self, tensor: &Tensor, found: Weight<'_>, extents: &Extents) {
        let (name, source) = (tensor.name.clone(), tensor.name.clone());
        let (rows, cols) = weight::shape(found);
        let storage = Storage::Dense(extents[name.as_str()].type_for(found));
        self.push(PlannedTensor { name, source, rows, cols, storage });
    }

    /// A matrix, in bands if it is quantized and there are to be any.
    fn matrix(
        &mut self,
        tensor: &Tensor,
        source: &dyn ModelSource,
        settings: &Settings,
        extents: &Extents,
    ) -> Result<()> {
        let name = tensor.name.as_str();
        let (found, extent) = (source.require(name)?, &extents[name]);
        let (rows, cols) = weight::shape(found);
        let width = BitWidth::new(settings.bits);
        let obstacle = width.and_then(|_| obstacle(settings.coding, extent));
        let Some(width) = width.filter(|_| obstacle.is_none()) else {
            let dtype = extent.type_for(found);
            let loss =
                (dtype != DType::F16).then(|| format!("f16 does not hold {}", describe(extent)));
            let reason = obstacle.or(loss);
            let warning = reason.map(|reason| format!("`{name}` is kept as {dtype:?}: {reason}"));
            self.warnings.extend(warning);
            self.kept(tensor, found, extents);
            return Ok(());
        };
        let strip = settings.coding.strip_rows();
        let bands = bands(tensor, source.decoder(), strip).filter(|_| self.has_bands);
        let Some(bands) = bands else {
            return self.layer(name.to_owned(), name, [rows, cols], width, settings);
        };
        for (index, rows) in bands.into_iter().enumerate() {
            self.layer(band_name(name, index), name, [rows, cols], width, settings)?;
        }
        Ok(())
    }

    /// Rows of the matrix `of` as a layer.
    fn layer(
        &mut self,
        name: String,
        of: &str,
        [rows, cols]: [usize; 2],
        width: BitWidth,
        settings: &Settings,
    ) -> Result<()> {
        let Settings { group_size, coding, .. } = *settings;
        let widths = vec![width; cols.div_ceil(group_size)];
        let layout = LayerLayout::new(rows, cols, group_size, coding, &widths);
        let layout = layout.map_err(|(rule, found, expected)| {
            FormatError::malformed(&self.path, format!("tensor `{name}`"), rule, found, expected)
        })?;
        let (source, storage) = (of.to_owned(), Storage::Layer(layout));
        self.push(PlannedTensor { name, source, rows, cols, storage });
        Ok(())
    }

    /// Whether the lowest widths are within the target.
    fn check(&self, target: Option<Target>) -> Result<()> {
        let (what, found, least) = match target {
            None => return Ok(()),
            Some(Target::BitsPerWeight(bits)) => {
                let least = self.bits_per_weight();
                if least <= bits {
                    return Ok(());
                }
                // Rounded up: the least that can be asked for.
                let least = (1e3 * least).ceil() / 1e3;
                ("target bits per weight", bits.to_string(), format!("{least:.3}"))
            }
            Some(Target::FileBytes(bytes)) => {
                let least = self.file_bytes()?;
                if least <= bytes {
                    return Ok(());
                }
                ("target size", size(bytes, f64::floor), size(least, f64::ceil))
            }
        };
        let expected = format!("at least {least} with these groups and scales");
        Err(ConvertError::InvalidSetting { what, found, expected })
    }
}

/// Looks at all weights of the source.
fn extents(source: &dyn ModelSource) -> Result<Extents> {
    let extents = source.decoder().tensors().iter().map(|tensor| {
        let tensor = tensor.name.clone();
        let extent = Extent::of(source.require(&tensor)?)?;
        source.release_pages();
        match extent.not_finite {
            None => Ok((tensor, extent)),
            Some((row, found)) => Err(ConvertError::NotFinite { tensor, row, found }),
        }
    });
    extents.collect()
}

/// Why a matrix that should be quantized cannot be.
fn obstacle(coding: ScaleCoding, extent: &Extent) -> Option<String> {
    (!scales_fit_f16(coding, extent))
        .then(|| format!("f16 scales do not reach {}", describe(extent)))
}

/// What is out of the ordinary about values that f16 does not reach.
fn describe(extent: &Extent) -> String {
    let (row, value) = extent.largest;
    match value.abs() > 1.0 {
        true => format!("{value} in row {row}"),
        false => format!("values as small as its own, {} in a typical row", extent.typical),
    }
}

/// Bytes as they can be typed: `31.2 MB`.
fn size(bytes: u64, round: impl Fn(f64) -> f64) -> String {
    let (unit, name) = match bytes {
        0..10_000 => return format!("{bytes} bytes"),
        10_000..1_000_000 => (1e3, "kB"),
        1_000_000..1_000_000_000 => (1e6, "MB"),
        _ => (1e9, "GB"),
    };
    format!("{:.1} {name}", round(10.0 * bytes as f64 / unit) / 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_is_rounded_as_told() {
        for (bytes, down, up) in [
            (9_999, "9999 bytes", "9999 bytes"),
            (61_234, "61.2 kB", "61.3 kB"),
            (31_200_000, "31.2 MB", "31.2 MB"),
            (1_500_000_001, "1.5 GB", "1.6 GB"),
        ] {
            assert_eq!((size(bytes, f64::floor), size(bytes, f64::ceil)), (down.into(), up.into()));
        }
    }
}
