//! SliM files that must be refused, by rule, and files that must come back as they were written.
//!
//! A small valid file is taken apart into a [`Draft`], damaged in one place, and put together again
//! with hashes that fit: what refuses it is the rule, not the hash.

use std::{
    fs,
    path::{Path, PathBuf},
};

use half::f16;
use tempfile::TempDir;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    file::{ALIGNMENT, keys, part_name},
    *,
};
use crate::{
    DType, Features, FormatError, Generation, ModelConfig, ModelSource, OutputPath, Result, Rope,
    Weight,
    gguf::{Array, GgufFile, HeaderWriter, Metadata, NewTensor, Value},
    open_model,
};

/// 20 rows, groups of 48 and 32 columns, 6-bit scale codes for 32 columns: 2 tiles, 384 code bytes
/// and 3 records of 24 bytes each.
const TWO_LEVEL: &str = "blk.0.attn_q.weight";
/// 17 rows, groups of 16 columns of 1, 3 and 8 bits: 2 tiles, 384 code bytes and 64 + 38 + 48 scale
/// bytes each.
const PAPER: &str = "blk.0.attn_k.weight";
const NORM: &str = "output_norm.weight";
const EMBEDDING: &str = "token_embd.weight";

const TILE_CODES: usize = 384;
const TWO_LEVEL_TILE_SCALES: usize = 72;
const PAPER_TILE_SCALES: usize = 150;

/// Numbers without a pattern, the same on every run (SplitMix64).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One number for each of the first `used` rows of a tile, zero for the padding.
    fn row(&mut self, used: usize, max: u8) -> CodeColumn {
        std::array::from_fn(|r| if r < used { self.next() as u8 & max } else { 0 })
    }

    fn halves(&mut self, used: usize) -> [f16; TILE_ROWS] {
        self.row(used, 127).map(|code| f16::from_f32(f32::from(code) / 64.0))
    }
}

fn layer(
    rows: usize,
    cols: usize,
    group_size: usize,
    coding: ScaleCoding,
    bits: &[u8],
) -> PackedLayer {
    let widths: Vec<_> = bits.iter().map(|&bits| BitWidth::new(bits).unwrap()).collect();
    let layout = LayerLayout::new(rows, cols, group_size, coding, &widths).unwrap();
    let mut layer = PackedLayer::zeroed(layout.clone());
    let mut noise = Noise(rows as u64);
    for mut tile in layer.tiles_mut() {
        let used = TILE_ROWS.min(rows.saturating_sub(TILE_ROWS * tile.index()));
        tile.set_row_scales(&noise.halves(used), &noise.halves(used));
        for (index, group) in layout.groups().iter().enumerate() {
            let max = group.bit_width.max_code();
            let codes: Vec<_> = group.cols.clone().map(|_| noise.row(used, max)).collect();
            tile.set_codes(index, &codes);
            match coding {
                ScaleCoding::TwoLevel { scale_bits, .. } => {
                    let max = u8::MAX >> (8 - scale_bits);
                    for run in 0..group.runs(coding).len() {
                        let (s, z) = (noise.row(used, max), noise.row(used, max));
                        tile.set_two_level(index, run, &s, &z);
                    }
                }
                ScaleCoding::Trellis { .. } => {
                    for run in 0..group.runs(coding).len() {
                        tile.set_trellis_scales(index, run, &noise.row(used, 15));
                    }
                }
                ScaleCoding::Paper if max == 1 => {
                    tile.set_binary(index, &noise.halves(used), &noise.halves(used));
                }
                ScaleCoding::Paper => {
                    tile.set_affine(index, &noise.halves(used), &noise.row(used, max));
                }
            }
        }
    }
    layer
}

fn two_level_layer() -> PackedLayer {
    layer(20, 80, 48, ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 6 }, &[2, 3])
}

fn paper_layer() -> PackedLayer {
    layer(17, 48, 16, ScaleCoding::Paper, &[1, 3, 8])
}

/// The dense tensors of the file: name, type, shape, bytes.
fn dense_tensors() -> [(&'static str, DType, Vec<u64>, Vec<u8>); 3] {
    // Without the bit that infinite numbers need.
    let bytes = |count: u8| (0..count).map(|byte| byte & !4).collect();
    [
        (EMBEDDING, DType::F16, vec![4, 16], bytes(128)),
        (NORM, DType::F32, vec![16], bytes(64)),
        ("blk.0.attn_norm.weight", DType::BF16, vec![16], bytes(32)),
    ]
}

fn config() -> ModelConfig {
    ModelConfig {
        family: &crate::arch::Llama,
        name: Some("tiny".into()),
        block_count: 1,
        hidden_size: 16,
        ffn_size: 32,
        head_count: 4,
        kv_head_count: 2,
        head_dim: 4,
        vocab_size: 4,
        context_length: 64,
        norm_epsilon: 1e-5,
        rope: Rope::new(10000.0, vec![1.0; 2]),
        features: Features::default(),
        sliding_window: None,
        tied_embeddings: true,
        bos_token_id: Some(1),
        eos_token_ids: vec![2, 3],
        add_bos: true,
        generation: Generation::default(),
    }
}

/// What will be in the small file.
pub(super) fn planned() -> Outline {
    let [embedding, norms @ ..] = dense_tensors();
    let mut planned = Outline::default();
    planned.dense(embedding.0, embedding.1, &embedding.2);
    planned.layer(TWO_LEVEL, two_level_layer().layout(), None);
    norms.iter().for_each(|(name, dtype, shape, _)| planned.dense(name, *dtype, shape));
    planned.layer(PAPER, paper_layer().layout(), None);
    planned
}

/// What its metadata says.
pub(super) fn metadata() -> Metadata {
    let mut metadata = config().to_gguf();
    metadata.insert("tokenizer.huggingface.json", "{}").unwrap();
    metadata
}

/// A writer of the small file.
fn new_writer<'p>(output: impl Into<OutputPath<'p>>, metadata: Metadata) -> Result<SlimWriter> {
    SlimWriter::create(output, &planned(), metadata)
}

/// Adds everything of the small file.
pub(super) fn fill(writer: &mut SlimWriter) {
    let [embedding, norms @ ..] = dense_tensors();
    writer.dense(embedding.0, embedding.1, &embedding.2, &embedding.3).unwrap();
    writer.layer(TWO_LEVEL, &two_level_layer(), Some(0.25)).unwrap();
    for (name, dtype, shape, bytes) in norms {
        writer.dense(name, dtype, &shape, &bytes).unwrap();
    }
    writer.layer(PAPER, &paper_layer(), None).unwrap();
}

/// A writer that holds everything of the small file.
fn filled_writer<'p>(output: impl Into<OutputPath<'p>>) -> SlimWriter {
    let mut writer = new_writer(output, metadata()).unwrap();
    fill(&mut writer);
    writer
}

/// The small file, alone in its folder.
pub(super) fn small_file() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.slim.gguf");
    filled_writer(&path).finish().unwrap();
    (folder, path)
}

/// A file taken apart, or a part of one.
#[derive(Clone)]
pub(super) struct Draft {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(NewTensor, Vec<u8>)>,
    pub(super) alignment: u32,
}

impl Draft {
    fn of(path: &Path) -> Self {
        Self::of_part(&GgufFile::open(path).unwrap(), 0)
    }

    pub(super) fn of_part(gguf: &GgufFile, part: usize) -> Self {
        let part = gguf.parts().nth(part).unwrap();
        let entries = part.header().metadata().iter();
        let entries = entries.filter(|(key, _)| *key != "general.alignment");
        let tensors = part.tensors().iter().map(|info| {
            let (name, shape) = (info.name.clone(), info.shape.clone());
            (NewTensor { name, dtype: info.dtype, shape }, gguf.bytes_of(info).to_vec())
        });
        Self {
            metadata: entries.map(|(key, value)| (key.to_owned(), value.clone())).collect(),
            tensors: tensors.collect(),
            alignment: ALIGNMENT,
        }
    }

    /// The file with hashes that fit.
    pub(super) fn bytes(mut self) -> Vec<u8> {
        let hashes = self.tensors.iter().map(|(_, bytes)| xxh3_64(bytes)).collect();
        self.set(keys::TENSOR_HASHES, Value::Array(Array::U64(hashes)));
        self.set(keys::HEADER_HASH, Value::U64(0));
        let (mut bytes, header) = self.bytes_as_they_are();
        let offset = header.value_offset(keys::HEADER_HASH).unwrap();
        let hash = xxh3_64(header.unpadded());
        bytes[offset..][..8].copy_from_slice(&hash.to_le_bytes());
        bytes
    }

    fn bytes_as_they_are(self) -> (Vec<u8>, HeaderWriter) {
        let mut metadata = Metadata::new();
        for (key, value) in self.metadata {
            metadata.insert(key, value).unwrap();
        }
        let (tensors, data): (Vec<_>, Vec<_>) = self.tensors.into_iter().unzip();
        let path = Path::new("draft");
        let header = HeaderWriter::new(path, &metadata, &tensors, self.alignment).unwrap();
        let mut bytes = header.bytes().to_vec();
        for (&offset, data) in header.tensor_offsets().iter().zip(data) {
            bytes.resize(offset as usize, 0);
            bytes.extend(data);
        }
        bytes.resize(header.file_bytes() as usize, 0);
        (bytes, header)
    }

    pub(super) fn set(&mut self, key: &str, value: impl Into<Value>) {
        let value = value.into();
        match self.metadata.iter_mut().find(|(found, _)| found == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
    }

    pub(super) fn remove(&mut self, key: &str) {
        self.metadata.retain(|(found, _)| found != key);
    }

    fn column(&mut self, name: &str) -> &mut Array {
        let key = keys::layers(name);
        match self.metadata.iter_mut().find(|(found, _)| *found == key) {
            Some((_, Value::Array(array))) => array,
            _ => panic!("{key}"),
        }
    }

    /// Changes the entry of the first layer, [`TWO_LEVEL`], in a numeric column.
    fn first(&mut self, column: &str, value: u32) {
        match self.column(column) {
            Array::U32(values) => values[0] = value,
            Array::U8(values) => values[0] = value as u8,
            other => panic!("{other:?}"),
        }
    }

    fn tensor(&mut self, name: &str) -> &mut (NewTensor, Vec<u8>) {
        self.tensors.iter_mut().find(|(tensor, _)| tensor.name == name).unwrap()
    }

    /// The bytes of a part of a layer.
    fn part(&mut self, layer: &str, part: &str) -> &mut Vec<u8> {
        &mut self.tensor(&part_name(layer, part)).1
    }

    fn remove_part(&mut self, layer: &str, part: &str) {
        let name = part_name(layer, part);
        self.tensors.retain(|(tensor, _)| tensor.name != name);
    }

    fn add(&mut self, name: &str, dtype: DType, shape: &[u64]) {
        let tensor = NewTensor { name: name.into(), dtype, shape: shape.to_vec() };
        let bytes = vec![0; tensor.bytes().unwrap() as usize];
        self.tensors.push((tensor, bytes));
    }

    /// Another type and shape, and as many bytes as they ask for.
    fn retype(&mut self, name: &str, dtype: DType, shape: &[u64]) {
        let (tensor, bytes) = self.tensor(name);
        (tensor.dtype, tensor.shape) = (dtype, shape.to_vec());
        let len = tensor.bytes().unwrap() as usize;
        bytes.resize(len, 0);
    }

    fn retype_part(&mut self, layer: &str, part: &str, dtype: DType, shape: &[u64]) {
        self.retype(&part_name(layer, part), dtype, shape);
    }
}

/// One damage to a [`Draft`]: its name, what refuses it, and the damage.
type Case<'a> = (&'a str, &'a str, &'a dyn Fn(&mut Draft));

/// A rule, or the other kinds of error by name.
pub(super) fn culprit(error: &FormatError) -> &str {
    match error {
        FormatError::Malformed { rule: "", .. } => "malformed",
        FormatError::Malformed { rule, .. } => rule,
        FormatError::Unsupported { .. } => "unsupported",
        other => panic!("a reader should not give {other}"),
    }
}

/// The rules that a full check finds broken, each once.
pub(super) fn broken_rules(file: &SlimFile) -> Vec<&'static str> {
    let mut rules: Vec<_> = file.verify().iter().map(|fault| fault.rule).collect();
    rules.dedup();
    // The small file is no whole model.
    rules.retain(|rule| *rule != "F3");
    rules
}

/// Opens a file with these bytes without checking hashes.
fn open_bytes(path: &Path, bytes: &[u8]) -> Result<SlimFile, FormatError> {
    fs::write(path, bytes).unwrap();
    SlimFile::open_without_hashes(path)
}

fn assert_refused(cases: &[Case<'_>]) {
    let (folder, path) = small_file();
    let (valid, target) = (Draft::of(&path), folder.path().join("damaged"));
    for (name, expected, damage) in cases {
        let mut draft = valid.clone();
        damage(&mut draft);
        let error = open_bytes(&target, &draft.bytes()).err();
        let error = error.unwrap_or_else(|| panic!("{name}: opened"));
        assert_eq!(culprit(&error), *expected, "{name}: {error}");
        assert!(SlimFile::open(&target).is_err(), "{name}");
    }
}

#[test]
fn draft_without_damage_is_the_file() {
    let (_folder, path) = small_file();
    assert!(Draft::of(&path).bytes() == fs::read(&path).unwrap());
}

#[test]
fn open_bad_containers_are_refused() {
    assert_refused(&[
        ("alignment 32", "F1", &|draft| draft.alignment = 32),
        ("alignment 128", "F1", &|draft| draft.alignment = 128),
        ("no version", "F2", &|draft| draft.remove(keys::VERSION)),
        ("version of another type", "F2", &|draft| draft.set(keys::VERSION, "1")),
        ("version 0", "unsupported", &|draft| draft.set(keys::VERSION, 0u32)),
        ("version 5", "unsupported", &|draft| draft.set(keys::VERSION, 5u32)),
        ("version 2^32", "unsupported", &|draft| draft.set(keys::VERSION, 1u64 << 32)),
        ("no architecture", "malformed", &|draft| draft.remove("general.architecture")),
        ("no block count", "malformed", &|draft| draft.remove("llama.block_count")),
        ("head size bomb", "malformed", &|draft| {
            for key in ["attention.key_length", "attention.value_length", "rope.dimension_count"] {
                draft.set(&format!("llama.{key}"), u64::MAX);
            }
        }),
        ("hidden size bomb", "malformed", &|draft| {
            draft.set("llama.embedding_length", u64::MAX);
            for key in ["attention.key_length", "attention.value_length", "rope.dimension_count"] {
                draft.remove(&format!("llama.{key}"));
            }
        }),
        ("RoPE factors of another type", "malformed", &|draft| {
            draft.add("rope_freqs.weight", DType::F16, &[2]);
        }),
        ("too few RoPE factors", "malformed", &|draft| {
            draft.add("rope_freqs.weight", DType::F32, &[1]);
        }),
    ]);
}

#[test]
fn open_bad_layer_tables_are_refused() {
    assert_refused(&[
        ("duplicate layer", "F5", &|draft| match draft.column("name") {
            Array::String(names) => names[1] = names[0].clone(),
            _ => unreachable!(),
        }),
        ("layer without tensors", "F6", &|draft| match draft.column("name") {
            Array::String(names) => names[1] = "absent".into(),
            _ => unreachable!(),
        }),
        ("no rows", "F5", &|draft| draft.first("rows", 0)),
        ("row bomb", "F5", &|draft| draft.first("rows", u32::MAX)),
        ("rows without codes", "F6", &|draft| draft.first("rows", 1 << 28)),
        ("one tile more", "F6", &|draft| draft.first("rows", 33)),
        ("one tile less", "F6", &|draft| draft.first("rows", 16)),
        ("no columns", "F5", &|draft| draft.first("cols", 0)),
        ("columns not in sixteens", "F21", &|draft| draft.first("cols", 72)),
        ("column bomb", "F6", &|draft| draft.first("cols", u32::MAX)),
        ("columns without codes", "F6", &|draft| draft.first("cols", 1 << 28)),
        ("16 columns more", "F6", &|draft| draft.first("cols", 96)),
        ("group size 0", "F5", &|draft| draft.first("group_size", 0)),
        ("group size 24", "F5", &|draft| draft.first("group_size", 24)),
        ("group size 8", "F5", &|draft| draft.first("group_size", 8)),
        ("group size for other widths", "F6", &|draft| draft.first("group_size", 16)),
        ("group bomb", "F6", &|draft| draft.first("group_size", u32::MAX - 15)),
        ("unknown coding", "F5", &|draft| draft.first("coding", 2)),
        ("paper with sub-groups", "F5", &|draft| draft.first("coding", 0)),
        ("sub-group 0", "F5", &|draft| draft.first("sub_group", 0)),
        ("sub-group 48", "F5", &|draft| draft.first("sub_group", 48)),
        ("sub-group for other scales", "F6", &|draft| draft.first("sub_group", 16)),
        ("scale codes of 0 bits", "F5", &|draft| draft.first("scale_bits", 0)),
        ("scale codes of 5 bits", "F5", &|draft| draft.first("scale_bits", 5)),
        ("scale codes of other bits", "F6", &|draft| draft.first("scale_bits", 4)),
        ("a trellis in version 1", "F24", &|draft| {
            draft.first("coding", 2);
            draft.first("scale_bits", 4);
            draft.retype_part(TWO_LEVEL, "scales", DType::I8, &[2, 3 * 8]);
            draft.retype_part(TWO_LEVEL, "row_scales", DType::F16, &[2, 16]);
        }),
        ("a trellis with minimums", "F6", &|draft| {
            draft.first("coding", 2);
            draft.first("scale_bits", 4);
            draft.retype_part(TWO_LEVEL, "scales", DType::I8, &[2, 3 * 8]);
        }),
        ("everything large, few widths", "F6", &|draft| {
            draft.first("rows", 1 << 28);
            draft.first("cols", 1 << 28);
            draft.first("group_size", 16);
        }),
        ("everything large, one width", "F6", &|draft| {
            draft.first("rows", 1 << 28);
            draft.first("cols", 1 << 28);
            draft.first("group_size", 1 << 28);
            draft.retype_part(TWO_LEVEL, "bits", DType::I8, &[1]);
        }),
        ("a million widths without codes", "F6", &|draft| {
            draft.first("cols", 1 << 24);
            draft.first("group_size", 16);
            draft.retype_part(TWO_LEVEL, "bits", DType::I8, &[1 << 20]);
            draft.part(TWO_LEVEL, "bits").fill(1);
        }),
    ]);
}

#[test]
fn open_bad_columns_are_refused() {
    for column in
        ["name", "rows", "cols", "group_size", "coding", "sub_group", "scale_bits", "error"]
    {
        let key = keys::layers(column);
        assert_refused(&[
            (&format!("no {column}"), "F5", &|draft| draft.remove(&key)),
            (&format!("one {column} missing"), "F5", &|draft| match draft.column(column) {
                Array::U8(values) => values.truncate(1),
                Array::U32(values) => values.truncate(1),
                Array::F32(values) => values.truncate(1),
                Array::String(values) => values.truncate(1),
                other => panic!("{other:?}"),
            }),
            (&format!("{column} of wrong type"), "F5", &|draft| {
                *draft.column(column) = Array::I64(vec![16; 2]);
            }),
            (&format!("one number for {column}"), "F5", &|draft| draft.set(&key, 16u32)),
        ]);
    }
}

#[test]
fn open_bad_parts_are_refused() {
    for (layer, part) in [
        (TWO_LEVEL, "bits"),
        (TWO_LEVEL, "codes"),
        (TWO_LEVEL, "scales"),
        (TWO_LEVEL, "row_scales"),
        (PAPER, "bits"),
        (PAPER, "codes"),
        (PAPER, "scales"),
    ] {
        let name = part_name(layer, part);
        assert_refused(&[
            (&format!("no {name}"), "F6", &|draft| draft.remove_part(layer, part)),
            (&format!("{name} of another type"), "F6", &|draft| {
                let shape = draft.tensor(&name).0.shape.clone();
                draft.retype(&name, DType::F32, &shape);
            }),
            (&format!("{name} one row longer"), "F6", &|draft| {
                let (NewTensor { dtype, mut shape, .. }, _) = draft.tensor(&name).clone();
                shape[0] += 1;
                draft.retype(&name, dtype, &shape);
            }),
            (&format!("{name} one row shorter"), "F6", &|draft| {
                let (NewTensor { dtype, mut shape, .. }, _) = draft.tensor(&name).clone();
                shape[0] -= 1;
                draft.retype(&name, dtype, &shape);
            }),
        ]);
    }
    assert_refused(&[
        ("width 0", "F6", &|draft| draft.part(TWO_LEVEL, "bits")[1] = 0),
        ("width 9", "F6", &|draft| draft.part(TWO_LEVEL, "bits")[1] = 9),
        ("width 255", "F6", &|draft| draft.part(PAPER, "bits")[0] = 255),
        ("width for other codes", "F6", &|draft| draft.part(TWO_LEVEL, "bits")[0] = 3),
        ("codes in one row", "F6", &|draft| {
            draft.retype_part(TWO_LEVEL, "codes", DType::I8, &[2 * TILE_CODES as u64]);
        }),
        ("codes transposed", "F6", &|draft| {
            draft.retype_part(PAPER, "codes", DType::I8, &[TILE_CODES as u64, 2]);
        }),
        ("row scales in another shape", "F6", &|draft| {
            draft.retype_part(TWO_LEVEL, "row_scales", DType::F16, &[2, 16, 2]);
        }),
        ("row scales beside the paper coding", "F6", &|draft| {
            draft.add(&part_name(PAPER, "row_scales"), DType::F16, &[2, 2, 16]);
        }),
        ("layer and dense tensor", "F7", &|draft| draft.add(TWO_LEVEL, DType::F16, &[20, 80])),
        ("part of no layer", "F7", &|draft| {
            draft.add("blk.0.attn_v.weight.bits", DType::I8, &[4]);
        }),
        ("dense I8", "F7", &|draft| draft.retype(NORM, DType::I8, &[16])),
        ("dense F64", "F7", &|draft| draft.retype(NORM, DType::F64, &[16])),
        ("dense Q8_0", "F7", &|draft| draft.retype(EMBEDDING, DType::Q8_0, &[4, 32])),
    ]);
}

#[test]
fn open_another_gguf_version_is_refused() {
    let (_folder, path) = small_file();
    let mut bytes = fs::read(&path).unwrap();
    bytes[4] = 2;
    let error = open_bytes(&path, &bytes).err().unwrap();
    assert_eq!(culprit(&error), "F1", "{error}");
}

#[test]
fn verify_finds_bad_values_by_rule() {
    const NAN: [u8; 2] = [0x01, 0x7e];
    const INFINITY: [u8; 2] = [0x00, 0xfc];
    /// Ors `bits` into a byte of the last tile of a part, whose tiles take `tile` bytes.
    fn dirty<'a>(
        layer: &'a str,
        part: &'a str,
        tile: usize,
        byte: usize,
        bits: u8,
    ) -> impl Fn(&mut Draft) + 'a {
        move |draft| {
            let byte = &mut draft.part(layer, part)[tile + byte];
            assert_eq!(*byte & bits, 0, "a valid file has nothing here");
            *byte |= bits;
        }
    }
    let (folder, path) = small_file();
    let (valid, target) = (Draft::of(&path), folder.path().join("damaged"));
    let scales = |byte, bits| dirty(TWO_LEVEL, "scales", TWO_LEVEL_TILE_SCALES, byte, bits);
    let paper_scales = |byte, bits| dirty(PAPER, "scales", PAPER_TILE_SCALES, byte, bits);
    let cases: &[Case<'_>] = &[
        ("NaN in d", "F9", &|d| d.part(TWO_LEVEL, "row_scales")[..2].copy_from_slice(&NAN)),
        ("infinite m in the padding", "F9", &|d| {
            d.part(TWO_LEVEL, "row_scales")[126..].copy_from_slice(&INFINITY);
        }),
        ("infinite 1-bit scale", "F9", &|d| {
            d.part(PAPER, "scales")[30..32].copy_from_slice(&INFINITY);
        }),
        ("NaN mean", "F9", &|d| d.part(PAPER, "scales")[32..34].copy_from_slice(&NAN)),
        ("NaN 3-bit scale", "F9", &|d| d.part(PAPER, "scales")[64..66].copy_from_slice(&NAN)),
        ("infinite 8-bit scale in the last tile", "F9", &|d| {
            d.part(PAPER, "scales")[PAPER_TILE_SCALES + 102..][..2].copy_from_slice(&INFINITY);
        }),
        ("code of row 4 of 4", "F8", &dirty(TWO_LEVEL, "codes", TILE_CODES, 16, 0x80)),
        ("high bit of a code", "F8", &dirty(TWO_LEVEL, "codes", TILE_CODES, 192 + 128 + 63, 1)),
        ("code of row 1 of 1", "F8", &dirty(PAPER, "codes", TILE_CODES, 2, 1)),
        ("scale code", "F8", &scales(5, 0x01)),
        ("minimum code", "F8", &scales(5, 0x80)),
        ("high bits of a scale code", "F8", &scales(24 + 16 + 4, 0x10)),
        ("high bits of a minimum code", "F8", &scales(48 + 16 + 7, 0x80)),
        ("1-bit scale", "F8", &paper_scales(3, 0x3c)),
        ("mean", "F8", &paper_scales(35, 0x3c)),
        ("3-bit scale", "F8", &paper_scales(64 + 3, 0x3c)),
        ("3-bit zero point", "F8", &paper_scales(64 + 32, 0x08)),
        ("8-bit zero point", "F8", &paper_scales(64 + 38 + 32 + 15, 0x80)),
        // With a column less, the file's codes of the last one are padding; rows 0 to 3 of both
        // tiles have some.
        ("codes of column 79 of 79", "F21", &|draft| {
            draft.set(keys::VERSION, 2u32);
            draft.first("cols", 79);
        }),
    ];
    for (name, rule, damage) in cases {
        let mut draft = valid.clone();
        damage(&mut draft);
        fs::write(&target, draft.bytes()).unwrap();
        let file = SlimFile::open(&target).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(broken_rules(&file).contains(rule), "{name}: {:?}", file.verify());
    }
}

/// What breaks each rule: the damages of this table and those of the tests that it names. A rule of
/// the specification without an entry fails the test.
#[test]
fn every_rule_of_the_specification_is_checked() {
    const OPENING: &str = "open_bad_parts_are_refused";
    const LAYOUT: &str = "worked_example_equals_the_specification";
    let by_rule = [
        (
            "F1",
            "open_bad_containers_are_refused, verify_finds_a_name_that_is_too_long, verify_finds_bytes_between_tensors_and_behind_them",
        ),
        ("F2", "open_bad_containers_are_refused"),
        ("F3", "verify_finds_a_model_that_is_not_whole"),
        ("F4", "verify_finds_broken_rules"),
        ("F5", "open_bad_layer_tables_are_refused, verify_finds_broken_rules"),
        ("F6", OPENING),
        ("F7", OPENING),
        ("F8", "verify_finds_bad_values_by_rule"),
        ("F9", "verify_finds_bad_values_by_rule, writer_numbers_that_are_not_finite_are_refused"),
        // Where bits lie: every byte of the right length says something.
        ("F10", LAYOUT),
        ("F11", LAYOUT),
        ("F12", LAYOUT),
        ("F13", LAYOUT),
        ("F14", LAYOUT),
        ("F15", LAYOUT),
        ("F16", LAYOUT),
        ("F17", LAYOUT),
        ("F18", "open_wrong_hashes_are_refused"),
        ("F19", "open_wrong_hashes_are_refused"),
        ("F20", "bands that do not belong together are refused"),
        (
            "F24",
            "open_bad_layer_tables_are_refused, trellis_windows_and_sums_equal_the_specification",
        ),
        ("F25", "trellis_tables_equal_the_specification"),
        ("F26", "trellis_scales_are_read_back"),
        ("F21", "open_bad_layer_tables_are_refused, verify_finds_bad_values_by_rule"),
        ("F22", "verify_finds_broken_rules, writer_numbers_that_are_not_finite_are_refused"),
        ("F23", "verify_finds_broken_rules"),
        ("F27", "parts_that_do_not_belong_together_are_refused"),
    ];
    let rules: std::collections::BTreeSet<_> = include_str!("../../../docs/format.md")
        .split("- **F")
        .skip(1)
        .filter_map(|rule| rule.split_once("**"))
        .map(|(number, _)| format!("F{number}"))
        .collect();
    let checked = by_rule.iter().map(|(rule, _)| (*rule).to_owned()).collect();
    assert_eq!(rules, checked);
}

#[test]
fn verify_finds_broken_rules() {
    let (folder, path) = small_file();
    let (valid, target) = (Draft::of(&path), folder.path().join("damaged"));
    const NAN: [u8; 4] = [0, 0, 0xc0, 0x7f];
    let error = |value: f32| {
        move |draft: &mut Draft| match draft.column("error") {
            Array::F32(errors) => errors[1] = value,
            other => panic!("{other:?}"),
        }
    };
    let tokenizer = |tokens: &[&str]| {
        let tokens: Vec<String> = tokens.iter().map(|&token| token.to_owned()).collect();
        move |draft: &mut Draft| {
            draft.remove("tokenizer.huggingface.json");
            draft.set("tokenizer.ggml.tokens", Value::Array(Array::String(tokens.clone())));
        }
    };
    let cases: &[Case<'_>] = &[
        ("no tokenizer", "F4", &|d| d.remove("tokenizer.huggingface.json")),
        ("tokenizer cut short", "F23", &|d| d.set("tokenizer.huggingface.json", "{\"a\":")),
        ("a token twice", "F23", &tokenizer(&["a", "b", "a", "c"])),
        ("error NaN", "F5", &error(f32::NAN)),
        ("infinite error", "F5", &error(f32::INFINITY)),
        ("negative error", "F5", &error(-0.5)),
        ("NaN in a norm", "F22", &|d| d.tensor(NORM).1[60..].copy_from_slice(&NAN)),
        ("infinite bf16", "F22", &|d| {
            d.tensor("blk.0.attn_norm.weight").1[..2].copy_from_slice(&NAN[2..]);
        }),
        ("infinite f16", "F22", &|d| {
            d.tensor(EMBEDDING).1[126..].copy_from_slice(&[0x00, 0x7c]);
        }),
    ];
    for (name, rule, damage) in cases {
        let mut draft = valid.clone();
        damage(&mut draft);
        fs::write(&target, draft.bytes()).unwrap();
        let file = SlimFile::open(&target).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(broken_rules(&file), [*rule], "{name}: {:?}", file.verify());
    }
    assert_eq!(
        broken_rules(&open_with(&valid, &target, &tokenizer(&["a", "b", "c", "d"]))),
        [""; 0]
    );
}

fn open_with(valid: &Draft, target: &Path, change: &dyn Fn(&mut Draft)) -> SlimFile {
    let mut draft = valid.clone();
    change(&mut draft);
    fs::write(target, draft.bytes()).unwrap();
    SlimFile::open(target).unwrap()
}

/// The writer refuses such a name: a byte is put into it, and taken from the padding of the header.
#[test]
fn verify_finds_a_name_that_is_too_long() {
    let (folder, path) = small_file();
    let (mut draft, target) = (Draft::of(&path), folder.path().join("damaged"));
    let name = "x".repeat(63);
    draft.add(&name, DType::F32, &[1]);
    fs::write(&target, draft.bytes()).unwrap();
    let header_bytes =
        GgufFile::open(&target).unwrap().parts().next().unwrap().header_bytes().len();
    assert!(!header_bytes.is_multiple_of(64), "padding");
    let mut bytes = fs::read(&target).unwrap();
    bytes.remove(header_bytes);
    let at = bytes.windows(63).position(|window| window == name.as_bytes()).unwrap();
    bytes[at - 8] = 64;
    bytes.insert(at, b'x');
    let file = open_bytes(&target, &bytes).unwrap();
    assert!(broken_rules(&file).contains(&"F1"), "{:?}", file.verify());
}

/// No hash covers what belongs to no tensor.
#[test]
fn verify_finds_bytes_between_tensors_and_behind_them() {
    let (folder, path) = small_file();
    let valid = fs::read(&path).unwrap();
    let target = folder.path().join("damaged");
    let gguf = GgufFile::open(&path).unwrap();
    let in_tensor = |at: &usize| {
        gguf.tensors()
            .iter()
            .any(|info| (info.offset..info.offset + info.bytes).contains(&(*at as u64)))
    };
    let gaps: Vec<usize> = (gguf.parts().next().unwrap().header_bytes().len()..valid.len())
        .filter(|at| !in_tensor(at))
        .collect();
    assert!(gaps.len() > 64);
    for at in gaps {
        let mut bytes = valid.clone();
        bytes[at] = 1;
        assert_eq!(broken_rules(&open_bytes(&target, &bytes).unwrap()), ["F1"], "byte {at}");
    }
    let longer = [valid.as_slice(), &[0; 64]].concat();
    assert_eq!(broken_rules(&open_bytes(&target, &longer).unwrap()), ["F1"]);
}

#[test]
fn verify_finds_a_model_that_is_not_whole() {
    let (folder, path) = small_file();
    let (valid, target) = (Draft::of(&path), folder.path().join("damaged"));
    let fault = |change: &dyn Fn(&mut Draft)| {
        let faults = open_with(&valid, &target, change).verify();
        let fault = faults.into_iter().find(|fault| fault.rule == "F3").unwrap();
        (fault.place, fault.found)
    };
    let place = format!("tensor `{EMBEDDING}`");
    let no_embedding = |d: &mut Draft| d.tensors.retain(|(tensor, _)| tensor.name != EMBEDDING);
    assert_eq!(fault(&no_embedding), (place.clone(), "none".into()));
    let short = |d: &mut Draft| d.retype(EMBEDDING, DType::F16, &[3, 16]);
    assert_eq!(fault(&short), (place, "3 x 16".into()));
}

#[test]
fn writer_numbers_that_are_not_finite_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = new_writer(&*folder.path().join("out"), Metadata::new()).unwrap();
    let nan = f32::NAN.to_le_bytes();
    let error = writer.dense("norm", DType::F32, &[2], &[[0; 4], nan].concat()).unwrap_err();
    let expected = "tensor `norm`, value 1: found NaN, expected finite values (rule F22)";
    assert_eq!(error.to_string(), expected);
    let mut layer = two_level_layer();
    let mut d = [f16::ONE; TILE_ROWS];
    d[3] = f16::INFINITY;
    layer.tiles_mut()[1].set_row_scales(&d, &[f16::ONE; TILE_ROWS]);
    let error = writer.layer("a", &layer, None).unwrap_err();
    let expected = "tensor `a.row_scales`, row 19: found inf, expected finite values (rule F9)";
    assert_eq!(error.to_string(), expected);
}

/// Damages that hashes find: the file opens without them only.
#[test]
fn open_wrong_hashes_are_refused() {
    let (folder, path) = small_file();
    let (valid, target) = (Draft::of(&path), folder.path().join("damaged"));
    let cases: &[Case<'_>] = &[
        ("no header hash", "F19", &|draft| draft.remove(keys::HEADER_HASH)),
        ("header hash of another type", "F19", &|draft| draft.set(keys::HEADER_HASH, 1u32)),
        ("another header hash", "F19", &|draft| draft.set(keys::HEADER_HASH, 1u64)),
        ("a name changed", "F19", &|draft| draft.set("general.name", "tidy")),
        ("no tensor hashes", "F18", &|draft| draft.remove(keys::TENSOR_HASHES)),
        ("tensor hashes of another type", "F18", &|draft| {
            draft.set(keys::TENSOR_HASHES, vec![1u32; 10]);
        }),
        ("a tensor hash missing", "F18", &|draft| {
            draft.set(keys::TENSOR_HASHES, Value::Array(Array::U64(vec![1; 9])));
        }),
        ("a byte of data changed", "F18", &|draft| draft.part(PAPER, "codes")[7] ^= 4),
        ("a byte of a norm changed", "F18", &|draft| draft.tensor(NORM).1[63] ^= 1),
    ];
    for (name, rule, damage) in cases {
        let mut draft = valid.clone();
        damage(&mut draft);
        let (bytes, _) = draft.bytes_as_they_are();
        let file = open_bytes(&target, &bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(broken_rules(&file).contains(rule), "{name}: {:?}", file.verify());
        assert!(SlimFile::open(&target).is_err(), "{name}");
    }
}

/// Uses everything that a reader of an opened file may use.
pub(super) fn read_everything(file: &SlimFile) {
    for info in file.layers() {
        let layer = file.layer(&info.name).expect("a layer that was accepted can be read");
        let layout = layer.layout();
        for tile in 0..layout.tiles() {
            layer.row_scales(tile);
            for group in layout.groups() {
                layer.codes(tile, group, &mut vec![[0; TILE_ROWS]; group.cols.len()]);
                for run in 0..group.runs(layout.coding()).len() {
                    layer.scales(tile, group, run);
                }
            }
        }
    }
    for name in file.tensor_names() {
        if let Ok(Some(Weight::Dense(tensor))) = file.tensor(name) {
            let bytes = tensor.dtype.size_in_bytes((tensor.rows * tensor.cols) as u64);
            assert_eq!(bytes, Some(tensor.bytes.len() as u64), "{name}");
        }
    }
}

#[test]
fn header_with_any_byte_changed_is_refused_or_harmless() {
    let (folder, path) = small_file();
    let (valid, target) = (fs::read(&path).unwrap(), folder.path().join("damaged"));
    let header_bytes = GgufFile::open(&path).unwrap().parts().next().unwrap().header_bytes().len();
    for position in 0..header_bytes {
        for flip in [1 << (position % 8), 0xff] {
            let mut bytes = valid.clone();
            bytes[position] ^= flip;
            if let Ok(file) = open_bytes(&target, &bytes) {
                read_everything(&file);
                assert!(broken_rules(&file).contains(&"F19"), "byte {position} ^ {flip}");
                assert!(SlimFile::open(&target).is_err(), "byte {position} ^ {flip}");
            }
        }
    }
}

#[test]
fn data_with_any_byte_changed_is_refused() {
    let (folder, path) = small_file();
    let (valid, target) = (fs::read(&path).unwrap(), folder.path().join("damaged"));
    let gguf = GgufFile::open(&path).unwrap();
    for info in gguf.tensors() {
        for position in (info.offset..info.offset + info.bytes).step_by(5) {
            let mut bytes = valid.clone();
            bytes[position as usize] ^= 0x10;
            fs::write(&target, &bytes).unwrap();
            let error = SlimFile::open(&target).err();
            let error = error.unwrap_or_else(|| panic!("byte {position} of {}", info.name));
            // A width is in the structure, too.
            assert!(matches!(culprit(&error), "F18" | "F6"), "{error}");
        }
    }
}

#[test]
fn file_cut_short_is_refused() {
    let (folder, path) = small_file();
    let (valid, target) = (fs::read(&path).unwrap(), folder.path().join("cut"));
    let gguf = GgufFile::open(&path).unwrap();
    let data_end = gguf.tensors().iter().map(|info| info.offset + info.bytes).max().unwrap();
    for len in (0..data_end as usize).step_by(7).chain([data_end as usize - 1]) {
        let error = open_bytes(&target, &valid[..len]).err();
        let error = error.unwrap_or_else(|| panic!("{len} bytes: opened"));
        assert_eq!(culprit(&error), "malformed", "{len} bytes: {error}");
    }
}

#[test]
fn written_file_is_read_back() {
    let (_folder, path) = small_file();
    let file = SlimFile::open(&path).unwrap();
    assert_eq!(broken_rules(&file), [""; 0]);
    let [missing] = &file.verify()[..] else { panic!("{:?}", file.verify()) };
    assert_eq!((missing.rule, missing.found.as_str()), ("F3", "20 x 80"));
    read_everything(&file);
    assert_eq!((file.config(), file.format()), (&config(), "slim"));
    let table: Vec<_> = file.layers().iter().map(|info| (&*info.name, info.error)).collect();
    assert_eq!(table, [(TWO_LEVEL, Some(0.25)), (PAPER, None)]);
    for (name, expected) in [(TWO_LEVEL, two_level_layer()), (PAPER, paper_layer())] {
        let Ok(Some(Weight::Packed(found))) = file.tensor(name) else { panic!("{name}") };
        assert_eq!(found.layout(), expected.layout());
        let expected = expected.view();
        for tile in 0..found.layout().tiles() {
            assert_eq!(found.tile_codes(tile), expected.tile_codes(tile));
            assert_eq!(found.tile_scales(tile), expected.tile_scales(tile));
            assert_eq!(found.row_scales(tile), expected.row_scales(tile));
        }
    }
    for (name, dtype, shape, bytes) in dense_tensors() {
        let Ok(Some(Weight::Dense(found))) = file.tensor(name) else { panic!("{name}") };
        let rows = if shape.len() == 1 { 1 } else { shape[0] as usize };
        assert_eq!((found.dtype, found.rows, found.cols, found.bytes), (dtype, rows, 16, &*bytes));
    }
    let names = [TWO_LEVEL, PAPER, EMBEDDING, NORM, "blk.0.attn_norm.weight"];
    assert_eq!(file.tensor_names(), names);
    assert!(file.tensor("absent").unwrap().is_none());
    assert_eq!(open_model(&path).unwrap().format(), "slim");
}

/// Section 3 and 4 of the specification, counted by hand: [`TWO_LEVEL`] takes 2 tiles of 384 code
/// bytes, 72 scale bytes and 64 row scale bytes, and 2 bytes of widths.
#[test]
fn bits_per_weight_counts_everything() {
    let (_folder, path) = small_file();
    let file = SlimFile::open(&path).unwrap();
    let bits = (2 * (TILE_CODES + TWO_LEVEL_TILE_SCALES + 64) + 2) as f64 * 8.0;
    let found = file.bits_per_weight(|layer| layer.name == TWO_LEVEL);
    assert_eq!(found, Some(bits / (20.0 * 80.0)));
    assert_eq!(file.bits_per_weight(|_| false), None);
}

#[test]
fn equal_layers_give_equal_bytes() {
    let (first, second) = (small_file(), small_file());
    assert!(fs::read(&first.1).unwrap() == fs::read(&second.1).unwrap());
}

pub(super) fn names_in(folder: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(folder.path()).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn dropped_writer_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    drop(filled_writer(&folder.path().join("out")));
    assert!(names_in(&folder).is_empty());
}

#[test]
fn existing_target_is_replaced_if_asked_and_by_finish_only() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    fs::write(&target, "before").unwrap();
    assert!(new_writer(&target, config().to_gguf()).is_err());
    let output = OutputPath { path: &target, replaces: true };
    drop(filled_writer(output));
    assert_eq!(fs::read(&target).unwrap(), b"before");

    let mut twice = config().to_gguf();
    twice.insert(keys::VERSION, 1u32).unwrap();
    assert!(new_writer(output, twice).is_err());
    assert_eq!(fs::read(&target).unwrap(), b"before");

    let writer = filled_writer(output);
    assert_eq!(fs::read(&target).unwrap(), b"before");
    let written = writer.finish().unwrap();
    assert_eq!(fs::metadata(&target).unwrap().len(), written.bytes);
    assert!(SlimFile::open(&target).is_ok());
    assert_eq!(names_in(&folder), ["out"]);
}

#[test]
fn writer_other_tensors_than_planned_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    let error = new_writer(&target, config().to_gguf()).unwrap().finish().unwrap_err();
    assert!(error.to_string().contains("tensors: found 0, expected "), "{error}");
    assert!(names_in(&folder).is_empty());
}

#[test]
fn writer_second_tensor_of_a_name_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = filled_writer(&folder.path().join("out"));
    let layer_again = writer.layer(PAPER, &paper_layer(), None).unwrap_err();
    let dense_again = writer.dense(TWO_LEVEL, DType::F32, &[1], &[0; 4]).unwrap_err();
    assert_eq!((culprit(&layer_again), culprit(&dense_again)), ("F7", "F7"));
}
