//! Matrices that are cut into bands of rows (F20).

use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
};

use super::{
    BitWidth,
    file::{LayerInfo, SlimFile},
    layout::{PackedLayer, PackedTensor},
};
use crate::{FormatError, Result, gguf::GgufFile};

/// Bands of a matrix at most (F20): what the kernels take at a time.
pub const MAX_BANDS: usize = 16;

/// A matrix as a stack of layers, from the first row to the last. All but the last one fill whole
/// tiles; they differ in their rows and in the bit-widths of their groups, and in nothing else.
#[derive(Clone, Copy)]
pub struct Bands<'a>(Place<'a>);

#[derive(Clone, Copy)]
enum Place<'a> {
    /// One layer, the whole matrix.
    Alone(PackedTensor<'a>),
    /// These layers of a file.
    File(&'a SlimFile, &'a Range<usize>),
    Memory(&'a [PackedLayer]),
}

impl<'a> Bands<'a> {
    /// The bands of a matrix in memory.
    ///
    /// # Panics
    /// If they do not belong together, or are not 1 to [`MAX_BANDS`].
    pub fn new(layers: &'a [PackedLayer]) -> Self {
        assert!((1..=MAX_BANDS).contains(&layers.len()), "{} bands", layers.len());
        let mut pairs = layers.iter().zip(&layers[1..]);
        let differ = pairs.find_map(|(a, b)| a.layout().mismatch_below(b.layout()));
        assert_eq!(differ, None, "bands of one matrix");
        Self(Place::Memory(layers))
    }

    /// The bands at these places of the table of a file, which has checked them.
    pub(super) fn in_file(file: &'a SlimFile, layers: &'a Range<usize>) -> Self {
        Self(Place::File(file, layers))
    }

    /// How many there are.
    #[expect(clippy::len_without_is_empty, reason = "there is at least one")]
    pub fn len(&self) -> usize {
        match self.0 {
            Place::Alone(_) => 1,
            Place::File(_, layers) => layers.len(),
            Place::Memory(layers) => layers.len(),
        }
    }

    /// Band `index`.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn get(&self, index: usize) -> PackedTensor<'a> {
        assert!(index < self.len(), "band {index} of {}", self.len());
        match self.0 {
            Place::Alone(layer) => layer,
            Place::File(file, layers) => file.layer_at(layers.start + index),
            Place::Memory(layers) => layers[index].view(),
        }
    }

    /// From the first row to the last, each with the number of its first row in the matrix.
    pub fn iter(self) -> impl Iterator<Item = (usize, PackedTensor<'a>)> {
        (0..self.len()).scan(0, move |next_row, index| {
            let band = self.get(index);
            let first_row = *next_row;
            *next_row += band.layout().rows();
            Some((first_row, band))
        })
    }

    /// Output and input channels of the matrix.
    pub fn shape(&self) -> (usize, usize) {
        let rows = self.iter().map(|(_, band)| band.layout().rows()).sum();
        (rows, self.get(0).layout().cols())
    }

    /// The most bits that a code of it has, as [`PackedTensor::codes`] gives it.
    pub fn widest(&self) -> BitWidth {
        let widths = self.iter().flat_map(|(_, band)| {
            let layout = band.layout();
            layout.groups().iter().map(|group| group.code_width(layout.coding()))
        });
        widths.max().expect("a layer has groups")
    }
}

impl<'a> From<PackedTensor<'a>> for Bands<'a> {
    fn from(layer: PackedTensor<'a>) -> Self {
        Self(Place::Alone(layer))
    }
}

/// The name of band `index` of the matrix `name`.
pub fn band_name(name: &str, index: usize) -> String {
    format!("{name}.{index}")
}

/// The matrix that a layer is a band of, by its name, and which one it is.
pub fn matrix_of(layer: &str) -> Option<(&str, &str)> {
    let (matrix, index) = layer.rsplit_once('.')?;
    let is_number = index.bytes().all(|byte| byte.is_ascii_digit());
    (matrix.ends_with(".weight") && is_number).then_some((matrix, index))
}

/// The matrices that layers are bands of, with their places in the table.
///
/// # Errors
/// `Malformed` with F20.
pub(super) fn read_bands(
    gguf: &GgufFile,
    layers: &[LayerInfo],
) -> Result<BTreeMap<String, Range<usize>>> {
    let malformed = |place: String, found: String, expected: String| {
        Err(FormatError::malformed(gguf.path(), place, "F20", found, expected))
    };
    let mut matrices = BTreeMap::<String, Range<usize>>::new();
    for (at, layer) in layers.iter().enumerate() {
        let Some((matrix, index)) = matrix_of(&layer.name) else { continue };
        let place = format!("layer `{}`", layer.name);
        let places = matrices.entry(matrix.to_owned()).or_insert(at..at);
        if places.end != at || index != places.len().to_string() {
            let found = format!("in place {at} of the layer table");
            let expected = format!("band {} in place {}", places.len(), places.end);
            return malformed(place, found, expected);
        }
        if let Some(above) = layers[places.clone()].last()
            && let Some((found, expected)) = above.layout.mismatch_below(&layer.layout)
        {
            return malformed(place, found, expected);
        }
        places.end += 1;
    }
    let names: HashSet<_> = layers.iter().map(|layer| layer.name.as_str()).collect();
    let is_taken = |name: &str| gguf.tensor(name).is_some() || names.contains(name);
    for (matrix, places) in &matrices {
        let place = format!("matrix `{matrix}`");
        if !(2..=MAX_BANDS).contains(&places.len()) {
            return malformed(
                place,
                format!("{} bands", places.len()),
                format!("2 to {MAX_BANDS}"),
            );
        }
        if is_taken(matrix) {
            let expected = "bands, a layer or a dense tensor, not two of them";
            return malformed(place, "a tensor of that name, too".into(), expected.into());
        }
    }
    Ok(matrices)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::{
        super::{LayerLayout, Outline, ScaleCoding, SlimWriter},
        *,
    };
    use crate::{DType, Features, Generation, ModelConfig, ModelSource, Rope, Weight};

    const MATRIX: &str = "blk.0.ffn_up.weight";
    const TWO_LEVEL: ScaleCoding = ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 4 };

    fn zeros(rows: usize, cols: usize, coding: ScaleCoding, bits: &[u8]) -> PackedLayer {
        let widths: Vec<_> = bits.iter().filter_map(|&bits| BitWidth::new(bits)).collect();
        PackedLayer::zeroed(LayerLayout::new(rows, cols, 32, coding, &widths).unwrap())
    }

    /// A band of 64 columns.
    fn band(rows: usize) -> PackedLayer {
        zeros(rows, 64, TWO_LEVEL, &[1, 3])
    }

    fn config() -> ModelConfig {
        ModelConfig {
            family: &crate::arch::Llama,
            name: None,
            block_count: 1,
            hidden_size: 64,
            ffn_size: 40,
            head_count: 4,
            kv_head_count: 2,
            head_dim: 16,
            vocab_size: 4,
            context_length: 64,
            norm_epsilon: 1e-5,
            rope: Rope::new(10000.0, vec![1.0; 8]),
            features: Features::default(),
            sliding_window: None,
            tied_embeddings: true,
            bos_token_id: None,
            eos_token_ids: vec![],
            add_bos: false,
            generation: Generation::default(),
        }
    }

    /// A file with these layers and a norm.
    fn opened(layers: &[(&str, PackedLayer)]) -> (TempDir, Result<SlimFile>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("banded");
        let mut planned = Outline::default();
        layers.iter().for_each(|(name, layer)| planned.layer(name, layer.layout(), None));
        planned.dense("blk.0.ffn_norm.weight", DType::F32, &[1]);
        let mut writer = SlimWriter::create(&path, &planned, config().to_gguf()).unwrap();
        for (name, layer) in layers {
            writer.layer(name, layer, None).unwrap();
        }
        writer.dense("blk.0.ffn_norm.weight", DType::F32, &[1], &[0; 4]).unwrap();
        writer.finish().unwrap();
        (folder, SlimFile::open(&path))
    }

    fn name(index: usize) -> String {
        band_name(MATRIX, index)
    }

    #[test]
    fn bands_are_read_as_one_matrix() {
        let other = "blk.0.ffn_down.weight";
        let layers = [
            (other, band(17)),
            (&*name(0), band(32)),
            (&*name(1), zeros(16, 64, TWO_LEVEL, &[8, 2])),
            (&*name(2), band(7)),
        ];
        let (_folder, file) = opened(&layers);
        let file = file.unwrap();
        assert_eq!(file.tensor_names(), [other, MATRIX, "blk.0.ffn_norm.weight"]);
        // It is no whole model and has no tokenizer.
        let faults = file.verify();
        assert!(faults.iter().all(|fault| ["F3", "F4"].contains(&fault.rule)), "{faults:?}");
        let Ok(Some(Weight::Bands(bands))) = file.tensor(MATRIX) else { panic!("no bands") };
        assert_eq!((bands.len(), bands.shape(), bands.widest().bits()), (3, (55, 64), 8));
        let rows: Vec<_> =
            bands.iter().map(|(first, band)| (first, band.layout().rows())).collect();
        assert_eq!(rows, [(0, 32), (32, 16), (48, 7)]);
        assert!(matches!(file.tensor(other), Ok(Some(Weight::Packed(_)))));
        assert_eq!(file.layer(&name(1)).unwrap().layout(), layers[2].1.layout());
        assert!(file.layer(MATRIX).is_none());
    }

    #[test]
    fn bands_that_do_not_belong_together_are_refused() {
        let bands = |rows: &[usize]| -> Vec<(String, PackedLayer)> {
            rows.iter().enumerate().map(|(i, &rows)| (name(i), band(rows))).collect()
        };
        let with = |index: usize, layer: PackedLayer| {
            let mut layers = bands(&[16, 16]);
            layers[index].1 = layer;
            layers
        };
        let named = |names: &[&str]| -> Vec<(String, PackedLayer)> {
            names.iter().map(|name| (format!("{MATRIX}{name}"), band(16))).collect()
        };
        let six_bits = ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 6 };
        for (what, layers) in [
            ("one band", bands(&[16])),
            ("17 bands", bands(&[16; MAX_BANDS + 1])),
            ("a short band above another", bands(&[20, 16])),
            ("other columns", with(1, zeros(16, 96, TWO_LEVEL, &[1, 3, 2]))),
            ("another coding", with(1, zeros(16, 64, ScaleCoding::Paper, &[1, 3]))),
            ("other scale bits", with(0, zeros(16, 64, six_bits, &[1, 3]))),
            ("a gap", named(&[".0", ".2"])),
            ("from one on", named(&[".1", ".2"])),
            ("backwards", named(&[".1", ".0"])),
            ("a leading zero", named(&[".0", ".01"])),
            ("no number", named(&[".0", "."])),
            ("apart", named(&[".0", "s", ".1"])),
            ("a layer of the matrix's name", named(&["", ".0", ".1"])),
        ] {
            let layers: Vec<_> = layers.iter().map(|(n, l)| (n.as_str(), l.clone())).collect();
            let error = opened(&layers).1.err().unwrap_or_else(|| panic!("{what}: opened"));
            assert!(matches!(error, FormatError::Malformed { rule: "F20", .. }), "{what}: {error}");
        }
    }

    #[test]
    fn header_with_any_byte_changed_is_refused_or_harmless() {
        let (folder, file) = opened(&[(&*name(0), band(32)), (&*name(1), band(20))]);
        let file = file.unwrap();
        let valid = std::fs::read(file.path()).unwrap();
        let damaged = folder.path().join("damaged");
        for position in 0..file.gguf().parts().next().unwrap().header_bytes().len() {
            let mut bytes = valid.clone();
            bytes[position] ^= 1 << (position % 8);
            std::fs::write(&damaged, &bytes).unwrap();
            let Ok(file) = SlimFile::open_without_hashes(&damaged) else { continue };
            for name in file.tensor_names() {
                if let Ok(Some(Weight::Bands(bands))) = file.tensor(name) {
                    let rows: usize = bands.iter().map(|(_, band)| band.layout().rows()).sum();
                    assert_eq!((rows, bands.len() > 1), (bands.shape().0, true), "{position}");
                }
            }
            assert!(SlimFile::open(&damaged).is_err(), "byte {position}");
        }
    }

    #[test]
    fn numbers_behind_other_names_are_no_bands() {
        let (_folder, file) = opened(&[("token_embd.0", band(16)), ("blk.0.x.1", band(16))]);
        assert_eq!(file.unwrap().tensor_names().len(), 3);
    }
}
