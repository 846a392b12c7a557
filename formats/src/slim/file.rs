//! Opens a SliM file: every rule that costs no pass over the data is checked before a view is given
//! out.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    path::{Path, PathBuf},
};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{
    bands::{Bands, matrix_of, read_bands},
    group::{BitWidth, Group, LayerLayout, ScaleCoding},
    layout::{PackedTensor, TILE_ROWS, UNIT_COLS},
    parts, verify,
};
use crate::{
    DType, Decoder, DenseTensor, FormatError, Layout, ModelConfig, ModelSource, Part, Result,
    TokenizerSource, Weight,
    gguf::{ALIGNMENT_KEY, Array, GgufFile, GgufPart, Metadata, TensorInfo, Value, split},
    vocabulary_faults,
};

/// Versions of the format (F2): what is written to files that need no later one.
pub(super) const FIRST_VERSION: u32 = 1;
/// The first version whose layers may have padding columns (F21).
const PADDING_VERSION: u32 = 2;
/// The first version that has the trellis.
const TRELLIS_VERSION: u32 = 3;
/// The first version that has parts (F27), and the last one that this program knows.
pub(super) const PARTS_VERSION: u32 = 4;

/// The first version that has such a layer.
pub(super) fn version_for(layout: &LayerLayout) -> u32 {
    match layout.coding() {
        ScaleCoding::Trellis { .. } => TRELLIS_VERSION,
        _ if layout.has_padding_columns() => PADDING_VERSION,
        _ => FIRST_VERSION,
    }
}

/// The shape of the row scales of a layer (F6), if its coding has any.
pub(super) fn row_scale_shape(layout: &LayerLayout) -> Option<Vec<u64>> {
    let (tiles, rows) = (layout.tiles() as u64, TILE_ROWS as u64);
    match layout.coding() {
        ScaleCoding::Paper => None,
        ScaleCoding::TwoLevel { .. } => Some(vec![tiles, 2, rows]),
        ScaleCoding::Trellis { .. } => Some(vec![tiles, rows]),
    }
}

/// `general.alignment` of a SliM file (F1): a cache line, and a multiple of every block of codes.
pub(super) const ALIGNMENT: u32 = 64;

/// The GGUF version of a SliM file (F1).
const GGUF_VERSION: u32 = 3;

/// Names of metadata keys.
pub(super) mod keys {
    pub const VERSION: &str = "slim.format.version";
    pub const TENSOR_HASHES: &str = "slim.tensors.xxh3";
    pub const HEADER_HASH: &str = "slim.header.xxh3";
    pub const NEXT_HASH: &str = "slim.next.xxh3";

    /// A column of the layer table.
    pub fn layers(column: &str) -> String {
        format!("slim.layers.{column}")
    }
}

/// The tensor that holds one part of a layer (F6).
pub(super) fn part_name(layer: &str, part: &str) -> String {
    format!("{layer}.{part}")
}

/// An opened SliM file.
pub struct SlimFile {
    gguf: GgufFile,
    config: ModelConfig,
    decoder: Decoder,
    tokenizer: TokenizerSource,
    layers: Vec<LayerInfo>,
    /// Where layers stand in the table, by the names of single ones and of matrices in bands.
    places: HashMap<String, Range<usize>>,
    /// Codes, scales and row scales of each layer: which part of the file, and where in it.
    stored: Vec<[(usize, Range<usize>); 3]>,
    /// The names of the tensors that layers are made of.
    parts: HashSet<String>,
}

/// One row of the layer table.
#[derive(Debug, Clone)]
pub struct LayerInfo {
    /// The layer's GGUF name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Shape and groups.
    pub layout: LayerLayout,
    /// Relative output error on the calibration set, if it was measured.
    pub error: Option<f32>,
}

/// A broken rule that [`SlimFile::verify`] found.
#[derive(Debug, Clone)]
pub struct Fault {
    /// The rule of `docs/format.md`.
    pub rule: &'static str,
    /// The tensor or key.
    pub place: String,
    /// What is there.
    pub found: String,
    /// What the rule asks for.
    pub expected: String,
}

impl SlimFile {
    /// Opens a file and checks its structure and its hashes.
    ///
    /// # Errors
    /// `Malformed` with the first rule that is broken.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Self::open_without_hashes(path)?;
        match file.hash_faults().into_iter().next() {
            None => Ok(file),
            Some(f) => Err(FormatError::malformed(path, f.place, f.rule, f.found, f.expected)),
        }
    }

    /// Opens a file and checks its structure only: faster on a slow disk, and the way to look into
    /// a damaged file.
    ///
    /// # Errors
    /// `Malformed` with the first rule that is broken.
    pub fn open_without_hashes(path: &Path) -> Result<Self> {
        let gguf = GgufFile::open(path)?;
        let metadata = gguf.metadata();
        let version = metadata.u64(keys::VERSION).ok_or_else(|| {
            let place = format!("key `{}`", keys::VERSION);
            FormatError::malformed(path, place, "F2", "no number", "the version of the format")
        })?;
        if !(u64::from(FIRST_VERSION)..=u64::from(PARTS_VERSION)).contains(&version) {
            let what = format!(
                "SliM format version {version} (this program reads {FIRST_VERSION} to {PARTS_VERSION})"
            );
            return Err(FormatError::unsupported(path, what, "update slimllm"));
        }
        gguf.parts().try_for_each(check_container)?;
        parts::check(&gguf, version)?;
        let layers = read_layers(&gguf)?;
        check_version(path, version, &layers)?;
        let parts = part_names(&layers);
        check_dense_tensors(&gguf, &layers, &parts)?;
        let single = layers.iter().enumerate().map(|(i, layer)| (layer.name.clone(), i..i + 1));
        let places: HashMap<_, _> = single.chain(read_bands(&gguf, &layers)?).collect();
        let stored = layers.iter().map(|layer| {
            ["codes", "scales", "row_scales"].map(|part| {
                let info = gguf.tensor(&part_name(&layer.name, part));
                info.map_or((0, 0..0), |info| (info.part, info.range()))
            })
        });
        let stored = stored.collect();
        let mut config = ModelConfig::from_gguf(path, metadata, gguf.facts()?)?;
        config.find_biases(|name| gguf.tensor(name).is_some());
        config.find_keys_as_values(|name| places.contains_key(name) || gguf.tensor(name).is_some());
        let output = Part::Output.gguf_name();
        config.tied_embeddings = !places.contains_key(&*output) && gguf.tensor(&output).is_none();
        let decoder = Decoder::new(&config);
        let tokenizer = TokenizerSource::from_gguf(metadata);
        Ok(Self { config, decoder, tokenizer, layers, places, stored, parts, gguf })
    }

    /// Whether the metadata of a GGUF file says that it is a SliM file (F2).
    pub fn is_described_by(metadata: &Metadata) -> bool {
        metadata.contains(keys::VERSION)
    }

    /// The container.
    pub fn gguf(&self) -> &GgufFile {
        &self.gguf
    }

    /// The metadata that the writer was given: all but what it adds itself (F1, F2, F5, F18, F19,
    /// F27).
    pub fn given_metadata(&self) -> Metadata {
        let added =
            [keys::VERSION, keys::TENSOR_HASHES, keys::HEADER_HASH, keys::NEXT_HASH, ALIGNMENT_KEY];
        let prefixes = [&*keys::layers(""), split::PREFIX];
        let is_added = |key: &&str| {
            added.contains(key) || prefixes.iter().any(|prefix| key.starts_with(prefix))
        };
        let given = self.gguf.metadata().iter().filter(|(key, _)| !is_added(key));
        Metadata::from_unique(given.map(|(key, value)| (key.to_owned(), value.clone())).collect())
    }

    /// The layer table.
    pub fn layers(&self) -> &[LayerInfo] {
        &self.layers
    }

    /// A quantized layer by name.
    pub fn layer(&self, name: &str) -> Option<PackedTensor<'_>> {
        let places = self.places.get(name).filter(|places| places.len() == 1)?;
        Some(self.layer_at(places.start))
    }

    /// The quantized layer at a place of the table.
    pub(super) fn layer_at(&self, place: usize) -> PackedTensor<'_> {
        let [codes, scales, row_scales] =
            self.stored[place].clone().map(|(part, range)| self.gguf.bytes_at(part, range));
        PackedTensor::new(&self.layers[place].layout, codes, scales, row_scales)
            .expect("`check_parts` has compared shapes")
    }

    /// Mean bits per weight of the layers that `include` accepts, everything counted: codes,
    /// scales, row scales, bit-widths, padding. `None` if there are none.
    pub fn bits_per_weight(&self, include: impl Fn(&LayerInfo) -> bool) -> Option<f64> {
        let chosen = self.layers.iter().filter(|layer| include(layer));
        let (bits, weights) = chosen.fold((0, 0), |(bits, weights), layer| {
            let layout = &layer.layout;
            (bits + layout.stored_bits(), weights + (layout.rows() * layout.cols()) as u64)
        });
        (weights > 0).then(|| bits as f64 / weights as f64)
    }

    /// Checks the rules that opening the file does not: names and padding of the container (F1),
    /// the tensors of the model (F3), tokenizer (F4, F23), errors of layers (F5), padding rows and
    /// columns (F8, F21), finite numbers (F9, F22) and hashes (F18, F19).
    pub fn verify(&self) -> Vec<Fault> {
        let mut faults = self.hash_faults();
        faults.extend(verify::faults(self));
        faults.extend(vocabulary_faults(&self.tokenizer, self.config.vocab_size, "F23"));
        for (place, info) in self.layers.iter().enumerate() {
            let layer = self.layer_at(place);
            faults.extend(verify::scale_fault(&info.name, layer));
            faults.extend(padding_fault(&info.name, layer));
            faults.extend(column_fault(&info.name, layer));
        }
        faults
    }

    /// Whether a tensor is a part of a layer.
    pub(super) fn is_part(&self, name: &str) -> bool {
        self.parts.contains(name)
    }

    fn hash_faults(&self) -> Vec<Fault> {
        self.gguf.parts().flat_map(|part| self.hash_faults_in(part)).collect()
    }

    fn hash_faults_in(&self, part: GgufPart<'_>) -> Vec<Fault> {
        let mut faults = Vec::new();
        let (metadata, header) = (part.header().metadata(), part.header_bytes());
        let of_part = self.within(part);
        let missing = |rule, key| Fault {
            rule,
            place: format!("key `{key}`{of_part}"),
            found: "none".into(),
            expected: "one hash per tensor and header".into(),
        };
        match (part.header().value_offset(keys::HEADER_HASH), metadata.get(keys::HEADER_HASH)) {
            (Some(offset), Some(&Value::U64(stored))) => {
                let mut hasher = Xxh3::new();
                hasher.update(&header[..offset]);
                hasher.update(&[0; 8]);
                hasher.update(&header[offset + 8..]);
                let place = format!("{}{of_part}", keys::HEADER_HASH);
                faults.extend(hash_fault("F19", place, hasher.digest(), stored));
            }
            _ => faults.push(missing("F19", keys::HEADER_HASH)),
        }
        match metadata.get(keys::TENSOR_HASHES) {
            Some(Value::Array(Array::U64(stored))) if stored.len() == part.tensors().len() => {
                for (info, &stored) in part.tensors().iter().zip(stored) {
                    let place = format!("tensor `{}`{of_part}", info.name);
                    let hash = xxh3_64(self.gguf.bytes_of(info));
                    faults.extend(hash_fault("F18", place, hash, stored));
                }
            }
            _ => faults.push(missing("F18", keys::TENSOR_HASHES)),
        }
        faults
    }

    /// Behind the name of something in a part, which part; nothing of a whole file.
    pub(super) fn within(&self, part: GgufPart<'_>) -> String {
        let name = part.path().file_name().unwrap_or_default();
        match self.gguf.parts().count() {
            1 => String::new(),
            _ => format!(" in `{}`", name.display()),
        }
    }
}

impl ModelSource for SlimFile {
    fn path(&self) -> &Path {
        self.gguf.path()
    }

    fn format(&self) -> &'static str {
        "slim"
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn tensor_names(&self) -> Vec<&str> {
        let dense = self.gguf.tensors().iter().map(|info| info.name.as_str());
        let layers = self.layers.iter().map(|layer| match matrix_of(&layer.name) {
            None => Some(layer.name.as_str()),
            Some((matrix, index)) => (index == "0").then_some(matrix),
        });
        layers.flatten().chain(dense.filter(|name| !self.parts.contains(*name))).collect()
    }

    fn tensor(&self, name: &str) -> Result<Option<Weight<'_>>> {
        if let Some(places) = self.places.get(name) {
            return Ok(Some(match places.len() {
                1 => Weight::Packed(self.layer_at(places.start)),
                _ => Weight::Bands(Bands::in_file(self, places)),
            }));
        }
        let Some(info) = self.gguf.tensor(name).filter(|_| !self.parts.contains(name)) else {
            return Ok(None);
        };
        let (rows, cols) = info.rows_and_cols(self.path())?;
        let bytes = self.gguf.bytes_of(info);
        let layout = Layout::AsStored;
        Ok(Some(Weight::Dense(DenseTensor {
            dtype: info.dtype,
            rows,
            cols,
            bytes,
            layout,
            scales: None,
        })))
    }

    fn tokenizer(&self) -> &TokenizerSource {
        &self.tokenizer
    }

    fn chat_template(&self) -> Option<&str> {
        self.gguf.metadata().str("tokenizer.chat_template")
    }

    fn files(&self) -> Vec<PathBuf> {
        self.gguf.files()
    }

    fn release_pages(&self) {
        self.gguf.release_pages();
    }
}

/// F1, as far as it concerns readers.
fn check_container(part: GgufPart<'_>) -> Result<()> {
    let malformed = |place, found: u64, expected: u32| {
        Err(FormatError::malformed(part.path(), place, "F1", found, expected.to_string()))
    };
    let (version, alignment) = (part.header().version(), part.header().alignment());
    if version != GGUF_VERSION {
        return malformed("the GGUF version", version.into(), GGUF_VERSION);
    }
    if alignment != u64::from(ALIGNMENT) {
        return malformed(ALIGNMENT_KEY, alignment, ALIGNMENT);
    }
    Ok(())
}

/// One column of the layer table, as `T`s.
fn column<'a, T>(
    path: &Path,
    metadata: &'a Metadata,
    name: &str,
    get: impl Fn(&'a Value) -> Option<&'a [T]>,
) -> Result<&'a [T]> {
    let key = keys::layers(name);
    metadata.get(&key).and_then(get).ok_or_else(|| {
        let place = format!("key `{key}`");
        FormatError::malformed(path, place, "F5", "none of the right type", "an array per layer")
    })
}

fn read_layers(gguf: &GgufFile) -> Result<Vec<LayerInfo>> {
    let (path, metadata) = (gguf.path(), gguf.metadata());
    let u32s = |name| {
        column(path, metadata, name, |value| match value {
            Value::Array(Array::U32(values)) => Some(values.as_slice()),
            _ => None,
        })
    };
    let u8s = |name| {
        column(path, metadata, name, |value| match value {
            Value::Array(Array::U8(values)) => Some(values.as_slice()),
            _ => None,
        })
    };
    let names = column(path, metadata, "name", |value| match value {
        Value::Array(Array::String(values)) => Some(values.as_slice()),
        _ => None,
    })?;
    let errors = column(path, metadata, "error", |value| match value {
        Value::Array(Array::F32(values)) => Some(values.as_slice()),
        _ => None,
    })?;
    let (rows, cols, group_sizes) = (u32s("rows")?, u32s("cols")?, u32s("group_size")?);
    let (codings, sub_groups, scale_bits) = (u8s("coding")?, u8s("sub_group")?, u8s("scale_bits")?);
    let lengths = [
        errors.len(),
        rows.len(),
        cols.len(),
        group_sizes.len(),
        codings.len(),
        sub_groups.len(),
        scale_bits.len(),
    ];
    if let Some(other) = lengths.iter().find(|&&len| len != names.len()) {
        let expected = format!("{} entries in every column", names.len());
        return Err(FormatError::malformed(path, "the layer table", "F5", other, expected));
    }
    let mut seen = HashSet::new();
    (0..names.len())
        .map(|i| {
            let place = format!("layer `{}`", names[i]);
            if !seen.insert(&names[i]) {
                return Err(FormatError::malformed(path, place, "F5", "a second one", "one entry"));
            }
            let coding = match (codings[i], sub_groups[i], scale_bits[i]) {
                (0, 0, 0) => ScaleCoding::Paper,
                (1, sub_group, scale_bits) => {
                    ScaleCoding::TwoLevel { sub_group: sub_group.into(), scale_bits }
                }
                (2, sub_group, 4) => ScaleCoding::Trellis { sub_group: sub_group.into() },
                (coding, _, bits) => {
                    let found = format!("coding {coding} with {bits} scale bits");
                    let expected =
                        "0 with zero sub_group and scale_bits, 1, or 2 with 4 scale bits";
                    return Err(FormatError::malformed(path, place, "F5", found, expected));
                }
            };
            let (rows, cols, group_size) =
                (rows[i] as usize, cols[i] as usize, group_sizes[i] as usize);
            require_code_bytes(gguf, &names[i], cols)?;
            let widths = read_bit_widths(gguf, &names[i])?;
            let layout = LayerLayout::new(rows, cols, group_size, coding, &widths).map_err(
                |(rule, found, expected)| {
                    FormatError::malformed(path, &place, rule, found, expected)
                },
            )?;
            check_parts(gguf, &names[i], &layout)?;
            let error = (errors[i] >= 0.0).then_some(errors[i]);
            Ok(LayerInfo { name: names[i].clone(), layout, error })
        })
        .collect()
}

/// F21, F24: a reader of an earlier version would take such a layer for a fault.
fn check_version(path: &Path, version: u64, layers: &[LayerInfo]) -> Result<()> {
    let is_newer = |layer: &&LayerInfo| u64::from(version_for(&layer.layout)) > version;
    let Some(LayerInfo { name, layout, .. }) = layers.iter().find(is_newer) else { return Ok(()) };
    let place = format!("layer `{name}`");
    let (rule, found, expected) = match version_for(layout) {
        TRELLIS_VERSION => ("F24", "coding 2".to_owned(), "0 or 1".to_owned()),
        _ => {
            let (found, of) = (layout.cols(), UNIT_COLS);
            ("F21", format!("{found} columns"), format!("a multiple of {of}"))
        }
    };
    let expected = format!("{expected} in version {version}");
    Err(FormatError::malformed(path, place, rule, found, expected))
}

/// Refuses a layer with less than a bit per weight, before anything is made for each of its groups.
fn require_code_bytes(gguf: &GgufFile, layer: &str, cols: usize) -> Result<()> {
    let info = part(gguf, layer, "codes", DType::I8)?;
    let least = (cols * TILE_ROWS / 8) as u64;
    if info.bytes >= least {
        return Ok(());
    }
    let place = format!("tensor `{}`", info.name);
    let (found, expected) = (format!("{} bytes", info.bytes), format!("at least {least}"));
    Err(FormatError::malformed(gguf.path(), place, "F6", found, expected))
}

fn read_bit_widths(gguf: &GgufFile, layer: &str) -> Result<Vec<BitWidth>> {
    let info = part(gguf, layer, "bits", DType::I8)?;
    let bytes = gguf.bytes_of(info).iter().enumerate();
    bytes
        .map(|(group, &bits)| {
            BitWidth::new(bits).ok_or_else(|| {
                let place = format!("layer `{layer}`, group {group}");
                FormatError::malformed(gguf.path(), place, "F6", format!("width {bits}"), "1 to 8")
            })
        })
        .collect()
}

/// The tensor of one part of a layer, if it has the right type.
fn part<'a>(gguf: &'a GgufFile, layer: &str, part: &str, dtype: DType) -> Result<&'a TensorInfo> {
    let name = part_name(layer, part);
    match gguf.tensor(&name) {
        Some(info) if info.dtype == dtype => Ok(info),
        other => {
            let found = other.map_or("none".to_owned(), |info| format!("type {:?}", info.dtype));
            let place = format!("tensor `{name}`");
            let expected = format!("a tensor of type {dtype:?}");
            Err(FormatError::malformed(gguf.path(), place, "F6", found, expected))
        }
    }
}

/// Checks type and shape of the tensors of a layer.
fn check_parts(gguf: &GgufFile, layer: &str, layout: &LayerLayout) -> Result<()> {
    let tiles = layout.tiles() as u64;
    let mut expected = vec![
        ("bits", DType::I8, vec![layout.groups().len() as u64]),
        ("codes", DType::I8, vec![tiles, layout.tile_code_bytes() as u64]),
        ("scales", DType::I8, vec![tiles, layout.tile_scale_bytes() as u64]),
    ];
    if let Some(shape) = row_scale_shape(layout) {
        expected.push(("row_scales", DType::F16, shape));
    } else if let Some(info) = gguf.tensor(&part_name(layer, "row_scales")) {
        let place = format!("tensor `{}`", info.name);
        let expected = "none beside the paper coding";
        return Err(FormatError::malformed(gguf.path(), place, "F6", "one", expected));
    }
    for (suffix, dtype, shape) in expected {
        let info = part(gguf, layer, suffix, dtype)?;
        if without_leading_ones(&info.shape) != without_leading_ones(&shape) {
            let place = format!("tensor `{}`", info.name);
            let (found, expected) = (format!("shape {:?}", info.shape), format!("shape {shape:?}"));
            return Err(FormatError::malformed(gguf.path(), place, "F6", found, expected));
        }
    }
    Ok(())
}

/// GGUF writers may drop outer dimensions of one.
fn without_leading_ones(shape: &[u64]) -> &[u64] {
    &shape[shape.iter().position(|&dim| dim != 1).unwrap_or(shape.len())..]
}

fn part_names(layers: &[LayerInfo]) -> HashSet<String> {
    let parts = ["bits", "codes", "scales", "row_scales"];
    layers.iter().flat_map(|layer| parts.map(|part| part_name(&layer.name, part))).collect()
}

/// F7: what is not a part of a layer is a plain float tensor under a name of its own.
fn check_dense_tensors(
    gguf: &GgufFile,
    layers: &[LayerInfo],
    parts: &HashSet<String>,
) -> Result<()> {
    let layer_names: HashSet<_> = layers.iter().map(|layer| layer.name.as_str()).collect();
    for info in gguf.tensors().iter().filter(|info| !parts.contains(&info.name)) {
        let place = format!("tensor `{}`", info.name);
        if layer_names.contains(info.name.as_str()) {
            let expected = "a layer or a dense tensor, not both";
            return Err(FormatError::malformed(gguf.path(), place, "F7", "both", expected));
        }
        if !matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16) {
            let (found, expected) = (format!("type {:?}", info.dtype), "F32, F16 or BF16");
            return Err(FormatError::malformed(gguf.path(), place, "F7", found, expected));
        }
    }
    Ok(())
}

fn hash_fault(rule: &'static str, place: String, found: u64, stored: u64) -> Option<Fault> {
    (found != stored).then(|| Fault {
        rule,
        place,
        found: format!("hash {found:016x}"),
        expected: format!("{stored:016x} as recorded"),
    })
}

/// F8: every weight of a padding row is stored as zeros, but for the codes of a trellis.
fn padding_fault(name: &str, layer: PackedTensor<'_>) -> Option<Fault> {
    let layout = layer.layout();
    let has_free_codes = matches!(layout.coding(), ScaleCoding::Trellis { .. });
    let last_tiles = layout.rows() / TILE_ROWS..layout.tiles();
    let is_dirty = |tile: usize, group: &Group| {
        let used = layout.rows().saturating_sub(tile * TILE_ROWS);
        let mut columns = vec![[0; TILE_ROWS]; group.cols.len()];
        layer.stored_codes(tile, group, &mut columns);
        let has_codes = columns.iter().any(|column| column[used..].iter().any(|&code| code != 0));
        (has_codes && !has_free_codes)
            || layer.zero_points(tile, group)[used..].iter().any(|&zero| zero != 0)
            || (0..group.runs(layout.coding()).len()).any(|run| {
                let (factor, offset) = layer.scales(tile, group, run);
                factor[used..].iter().chain(&offset[used..]).any(|&value| value != 0.0)
            })
    };
    let mut tiles = last_tiles;
    tiles.any(|tile| layout.groups().iter().any(|group| is_dirty(tile, group))).then(|| Fault {
        rule: "F8",
        place: format!("layer `{name}`, rows past {}", layout.rows()),
        found: "values other than zero".into(),
        expected: "zeros".into(),
    })
}

/// F21: the codes behind the last column are stored as zeros.
fn column_fault(name: &str, layer: PackedTensor<'_>) -> Option<Fault> {
    let layout = layer.layout();
    let last = layout.groups().last().filter(|_| layout.has_padding_columns())?;
    let mut columns = vec![[0; TILE_ROWS]; last.stored_cols()];
    let is_dirty = (0..layout.tiles()).any(|tile| {
        layer.stored_codes(tile, last, &mut columns);
        columns[last.cols.len()..].iter().any(|column| *column != [0; TILE_ROWS])
    });
    is_dirty.then(|| Fault {
        rule: "F21",
        place: format!("layer `{name}`, columns past {}", layout.cols()),
        found: "codes other than zero".into(),
        expected: "zeros".into(),
    })
}
