//! Files that must be refused, and files that must come back as they were written.

use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::{FormatError, Limits, ModelSource, Result};

const PATH: &str = "test.gguf";

/// Writes GGUF by hand, so that rules can be broken.
#[derive(Clone)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn header(version: u32, tensors: u64, entries: u64) -> Self {
        Self(MAGIC.to_vec()).u32(version).u64(tensors).u64(entries)
    }

    fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn string(self, text: &str) -> Self {
        let mut bytes = self.u64(text.len() as u64);
        bytes.0.extend(text.as_bytes());
        bytes
    }

    fn u32_entry(self, key: &str, value: u32) -> Self {
        self.string(key).u32(4).u32(value)
    }

    /// A tensor entry; `dimensions` as in the file, fastest first.
    fn tensor(self, name: &str, dimensions: &[u64], type_id: u32, offset: u64) -> Self {
        let bytes = self.string(name).u32(dimensions.len() as u32);
        let bytes = dimensions.iter().fold(bytes, |bytes, &dimension| bytes.u64(dimension));
        bytes.u32(type_id).u64(offset)
    }

    /// Padding and `len` bytes of tensor data.
    fn data(mut self, len: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + len, 0);
        self
    }
}

fn parse(bytes: &[u8]) -> Result<GgufHeader> {
    GgufHeader::parse(Path::new(PATH), bytes, bytes.len() as u64, &Limits::default())
}

/// One tensor `t`.
fn one_tensor(dimensions: &[u64], type_id: u32, offset: u64, data_bytes: usize) -> Bytes {
    Bytes::header(3, 1, 0).tensor("t", dimensions, type_id, offset).data(data_bytes)
}

fn two_tensors(names: [&str; 2], type_id: u32, second_offset: u64, data_bytes: usize) -> Bytes {
    let header = Bytes::header(3, 2, 0).tensor(names[0], &[8], type_id, 0);
    header.tensor(names[1], &[8], 0, second_offset).data(data_bytes)
}

fn one_entry() -> Bytes {
    Bytes::header(3, 0, 1)
}

#[test]
fn header_bad_files_are_refused() {
    use Culprit::{Limit, Malformed, Unsupported};

    let arrays_in_arrays =
        (0..100).fold(one_entry().string("k").u32(9), |bytes, _| bytes.u32(9).u64(1));
    let zeros = |count: usize| std::iter::repeat_n(0, count);
    let mut big_endian = MAGIC.to_vec();
    big_endian.extend([0, 0, 0, 3].into_iter().chain(zeros(16)));

    let cases: Vec<(&str, Vec<u8>, Culprit, &str)> = vec![
        ("empty file", vec![], Malformed, "the magic bytes"),
        ("magic", b"GGML\x03\0\0\0".to_vec(), Malformed, "found `GGML`"),
        ("no version", MAGIC.to_vec(), Malformed, "the version"),
        ("version 0", Bytes::header(0, 0, 0).0, Malformed, "found 0, expected 2 or 3"),
        ("version 1", Bytes::header(1, 0, 0).0, Unsupported, "GGUF version 1"),
        ("version 4", Bytes::header(4, 0, 0).0, Unsupported, "GGUF version 4"),
        ("big-endian", big_endian, Unsupported, "big-endian"),
        ("no counts", Bytes(MAGIC.to_vec()).u32(3).0, Malformed, "the number of tensors"),
        (
            "tensor count beyond the file",
            Bytes::header(3, 1000, 0).0,
            Malformed,
            "the number of tensors",
        ),
        (
            "tensor count beyond the limit",
            Bytes::header(3, u64::MAX, 0).0,
            Limit,
            "the number of tensors",
        ),
        (
            "entry count beyond the file",
            Bytes::header(3, 0, 60_000).0,
            Malformed,
            "the number of metadata entries",
        ),
        (
            "entry count beyond the limit",
            Bytes::header(3, 0, 1 << 63).0,
            Limit,
            "the number of metadata entries",
        ),
        (
            "key beyond the file",
            one_entry().u64(1000).data(64).0,
            Malformed,
            "the key of metadata entry 0",
        ),
        ("key length bomb", one_entry().u64(u64::MAX).data(64).0, Limit, "string length"),
        (
            "empty key",
            one_entry().string("").u32(4).u32(0).0,
            Malformed,
            "0 bytes, expected 1 to 65535",
        ),
        (
            "key of 65536 bytes",
            one_entry().u32_entry(&"k".repeat(65536), 0).0,
            Malformed,
            "found 65536 bytes",
        ),
        (
            "key not UTF-8",
            one_entry().u64(1).u8(0xff).u32(4).u64(0).0,
            Malformed,
            "no UTF-8 at byte 32",
        ),
        (
            "duplicate key",
            Bytes::header(3, 0, 2).u32_entry("k", 1).u32_entry("k", 1).0,
            Malformed,
            "key `k`: found a second entry",
        ),
        (
            "value type 13",
            one_entry().string("k").u32(13).u64(0).0,
            Malformed,
            "key `k`: found value type 13",
        ),
        ("value cut short", one_entry().string("k").u32(10).u32(0).0, Malformed, "key `k`"),
        ("truth value 2", one_entry().string("k").u32(7).u8(2).0, Malformed, "truth value 2"),
        (
            "string bomb",
            one_entry().string("k").u32(8).u64(1 << 62).0,
            Limit,
            "key `k`: string length",
        ),
        (
            "string beyond the file",
            one_entry().string("k").u32(8).u64(9).u64(0).0,
            Malformed,
            "at least 9",
        ),
        (
            "array bomb",
            one_entry().string("k").u32(9).u32(10).u64(1 << 61).0,
            Limit,
            "key `k`: array length",
        ),
        (
            "array beyond the file",
            one_entry().string("k").u32(9).u32(10).u64(1 << 20).0,
            Malformed,
            "key `k`",
        ),
        (
            "strings beyond the file",
            one_entry().string("k").u32(9).u32(8).u64(1 << 20).0,
            Malformed,
            "key `k`",
        ),
        (
            "array element type 13",
            one_entry().string("k").u32(9).u32(13).u64(0).0,
            Malformed,
            "value type 13",
        ),
        ("nested array bomb", arrays_in_arrays.0, Limit, "arrays in arrays"),
        ("alignment 0", one_entry().u32_entry(ALIGNMENT_KEY, 0).0, Malformed, "found 0"),
        ("alignment 13", one_entry().u32_entry(ALIGNMENT_KEY, 13).0, Malformed, "found 13"),
        (
            "alignment u64",
            one_entry().string(ALIGNMENT_KEY).u32(10).u64(32).0,
            Malformed,
            ALIGNMENT_KEY,
        ),
        ("no dimensions", one_tensor(&[], 0, 0, 64).0, Malformed, "tensor `t`: found 0 dimensions"),
        ("five dimensions", one_tensor(&[1; 5], 0, 0, 64).0, Malformed, "found 5 dimensions"),
        ("zero dimension", one_tensor(&[8, 0], 0, 0, 64).0, Malformed, "shape [0, 8]"),
        (
            "element count overflow",
            one_tensor(&[1 << 32, 1 << 32], 0, 0, 64).0,
            Malformed,
            "tensor `t`",
        ),
        (
            "size overflow",
            one_tensor(&[1 << 62], 0, 0, 64).0,
            Malformed,
            "a size that fits 64 bits",
        ),
        (
            "size beyond the file",
            one_tensor(&[1 << 60], 0, 0, 64).0,
            Malformed,
            "where the file ends",
        ),
        ("part of a block", one_tensor(&[16, 2], 8, 0, 64).0, Malformed, "rows of whole blocks"),
        (
            "offset not aligned",
            one_tensor(&[8], 0, 8, 64).0,
            Malformed,
            "offset 8, expected a multiple of 32",
        ),
        ("offset beyond the file", one_tensor(&[8], 0, 64, 64).0, Malformed, "offset 64"),
        ("offset overflow", one_tensor(&[8], 0, u64::MAX - 31, 64).0, Malformed, "tensor `t`"),
        ("data cut short", one_tensor(&[8], 0, 0, 31).0, Malformed, "where the file ends"),
        ("unknown type without bytes", one_tensor(&[8], 99, 0, 0).0, Malformed, "tensor `t`"),
        ("overlap", two_tensors(["a", "b"], 28, 32, 64).0, Malformed, "where tensor `b` starts"),
        ("same offset", two_tensors(["a", "b"], 99, 0, 64).0, Malformed, "tensor `"),
        (
            "duplicate tensor",
            two_tensors(["a", "a"], 0, 32, 64).0,
            Malformed,
            "found a second tensor",
        ),
        (
            "tensor name beyond the file",
            Bytes::header(3, 1, 0).u64(100).data(32).0,
            Malformed,
            "name of tensor 0",
        ),
    ];
    for (name, bytes, culprit, fragment) in cases {
        let error = parse(&bytes).expect_err(name);
        assert_eq!(Culprit::of(&error), culprit, "{name}: {error}");
        assert!(error.to_string().contains(fragment), "{name}: {error}");
    }
}

#[derive(Debug, PartialEq)]
enum Culprit {
    Malformed,
    Unsupported,
    Limit,
}

impl Culprit {
    fn of(error: &FormatError) -> Self {
        match error {
            FormatError::Malformed { .. } => Self::Malformed,
            FormatError::Unsupported { .. } => Self::Unsupported,
            FormatError::LimitExceeded { .. } => Self::Limit,
            other => panic!("a reader cannot give {other:?}"),
        }
    }
}

#[test]
fn header_beyond_its_limit_is_refused() {
    let bytes = one_entry().string("k").u32(8).string(&"x".repeat(100)).0;
    let limits = Limits { header_bytes: 64, ..Limits::default() };
    let error =
        GgufHeader::parse(Path::new(PATH), &bytes, bytes.len() as u64, &limits).unwrap_err();
    assert_eq!(Culprit::of(&error), Culprit::Limit);
}

#[test]
fn header_tensors_in_any_order_are_placed() {
    let bytes = Bytes::header(2, 3, 0)
        .tensor("last", &[8], 0, 96)
        .tensor("unknown", &[3, 5], 99, 32)
        .tensor("first", &[4, 2], 0, 0)
        .data(128)
        .0;
    let header = parse(&bytes).unwrap();
    let start = header.data_start();
    assert_eq!((header.version(), header.alignment(), start % 32), (2, 32, 0));
    let place = |name| header.tensor(name).map(|tensor| (tensor.offset - start, tensor.bytes));
    assert_eq!(place("first"), Some((0, 32)));
    assert_eq!(place("unknown"), Some((32, 64)));
    assert_eq!(place("last"), Some((96, 32)));
    assert_eq!(place("absent"), None);
    assert_eq!(header.tensor("first").unwrap().shape, [2, 4]);
    assert_eq!(header.tensor("unknown").unwrap().dtype, DType::Unknown(99));
}

#[test]
fn dtype_ids_are_their_own_inverse() {
    for id in 0..64 {
        assert_eq!(dtype_id(dtype_from_id(id)), id);
    }
}

fn new_tensor(name: &str, dtype: DType, shape: &[u64]) -> NewTensor {
    NewTensor { name: name.to_owned(), dtype, shape: shape.to_vec() }
}

/// A file with every value type.
fn sample() -> (Metadata, Vec<NewTensor>) {
    let values = [
        ("general.architecture", "llama".into()),
        ("u8", 1u8.into()),
        ("i8", Value::I8(-1)),
        ("u16", Value::U16(2)),
        ("i16", Value::I16(-2)),
        ("u32", 3u32.into()),
        ("i32", Value::I32(-3)),
        ("u64", 4u64.into()),
        ("i64", Value::I64(-4)),
        ("f32", 0.5f32.into()),
        ("f64", Value::F64(0.25)),
        ("bool", true.into()),
        ("strings", vec!["a".to_owned(), "é".to_owned()].into()),
        ("nested", Array::Array(vec![Array::Bool(vec![true, false]), Array::U64(vec![7])]).into()),
    ];
    let mut metadata = Metadata::new();
    for (key, value) in values {
        metadata.insert(key, value).unwrap();
    }
    let tensors = vec![
        new_tensor("token_embd.weight", DType::F16, &[5, 3]),
        new_tensor("blk.0.attn_q.weight", DType::Q8_0, &[2, 64]),
        new_tensor("norm", DType::F32, &[3]),
    ];
    (metadata, tensors)
}

fn sample_bytes() -> Vec<u8> {
    let (metadata, tensors) = sample();
    let header = HeaderWriter::new(Path::new(PATH), &metadata, &tensors, 64).unwrap();
    let mut bytes = header.bytes().to_vec();
    bytes.resize(header.file_bytes() as usize, 0);
    bytes
}

#[test]
fn metadata_getters_read_only_their_type() {
    let (metadata, _) = sample();
    assert_eq!(metadata.u64("u8"), Some(1));
    assert_eq!(metadata.u64("i8"), None);
    assert_eq!(metadata.u64("f32"), None);
    assert_eq!(metadata.f64("f32"), Some(0.5));
    assert_eq!(metadata.bool("bool"), Some(true));
    assert_eq!(metadata.str("general.architecture"), Some("llama"));
    assert_eq!(metadata.strings("strings").unwrap(), ["a", "é"]);
    assert_eq!(metadata.with_prefix("u").len(), 4);
    assert_eq!(metadata.with_prefix("u").u64("u64"), Some(4));
}

#[test]
fn metadata_bad_keys_are_refused() {
    let mut metadata = Metadata::new();
    metadata.insert("k", 1u32).unwrap();
    for (key, fragment) in
        [("k", "a second entry"), ("", "found 0 bytes"), (&*"k".repeat(65536), "65536 bytes")]
    {
        let error = metadata.insert(key, 2u32).unwrap_err();
        assert!(matches!(error, FormatError::InvalidArgument { .. }));
        assert!(error.to_string().contains(fragment), "{error}");
    }
    assert_eq!(metadata.u64("k"), Some(1));
}

#[test]
fn writer_value_offset_is_where_the_value_is() {
    let (metadata, tensors) = sample();
    let mut header = HeaderWriter::new(Path::new(PATH), &metadata, &tensors, 32).unwrap();
    header.set_u64("u64", 0x1122_3344_5566_7788);
    let read =
        GgufHeader::parse(Path::new(PATH), header.bytes(), header.file_bytes(), &Limits::default())
            .unwrap();
    assert_eq!(read.metadata().u64("u64"), Some(0x1122_3344_5566_7788));
    for (key, _) in metadata.iter() {
        assert_eq!(read.value_offset(key), header.value_offset(key), "{key}");
    }
    assert_eq!(read.value_offset("absent"), None);
}

#[test]
fn writer_bad_arguments_are_refused() {
    let norm = |name: &str| new_tensor(name, DType::F32, &[4]);
    let cases: [(&str, Vec<NewTensor>, u32, &str); 9] = [
        ("alignment 0", vec![], 0, "found 0"),
        ("alignment 13", vec![], 13, "found 13"),
        ("empty name", vec![norm("")], 32, "a name of 0 bytes"),
        ("name of 64 bytes", vec![norm(&"n".repeat(64))], 32, "a name of 64 bytes"),
        ("duplicate name", vec![norm("n"), norm("n")], 32, "a second tensor"),
        ("five dimensions", vec![new_tensor("n", DType::F32, &[1; 5])], 32, "1 to 4 dimensions"),
        ("zero dimension", vec![new_tensor("n", DType::F32, &[0])], 32, "F32 [0]"),
        ("unknown type", vec![new_tensor("n", DType::Unknown(99), &[1])], 32, "a known type"),
        (
            "part of a block",
            vec![new_tensor("n", DType::Q4_0, &[2, 16])],
            32,
            "rows of whole blocks",
        ),
    ];
    for (name, tensors, alignment, fragment) in cases {
        let error = HeaderWriter::new(Path::new(PATH), &Metadata::new(), &tensors, alignment)
            .expect_err(name);
        assert!(matches!(error, FormatError::InvalidArgument { .. }), "{name}");
        assert!(error.to_string().contains(fragment), "{name}: {error}");
    }
    let huge = [new_tensor("a", DType::F64, &[1 << 60]), new_tensor("b", DType::F64, &[1 << 60])];
    let error = HeaderWriter::new(Path::new(PATH), &Metadata::new(), &huge, 32).unwrap_err();
    assert!(error.to_string().contains("2^64"), "{error}");
}

#[test]
fn every_truncation_is_refused() {
    let bytes = sample_bytes();
    parse(&bytes).unwrap();
    // The last tensor's 12 bytes are followed by 52 bytes of padding, which a file may lack.
    for length in 0..bytes.len() - 52 {
        assert!(parse(&bytes[..length]).is_err(), "{length} bytes");
    }
}

#[test]
fn every_changed_header_byte_is_survived() {
    let bytes = sample_bytes();
    let data_start = parse(&bytes).unwrap().data_start() as usize;
    for position in 0..data_start {
        for mask in [0x01, 0x80, 0xff] {
            let mut changed = bytes.clone();
            changed[position] ^= mask;
            if let Ok(header) = parse(&changed) {
                assert!(
                    header
                        .tensors()
                        .iter()
                        .all(|tensor| tensor.offset + tensor.bytes <= bytes.len() as u64)
                );
            }
        }
    }
}

#[test]
fn file_serves_header_and_tensor_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(PATH);
    let header =
        HeaderWriter::new(&path, &Metadata::new(), &[new_tensor("v", DType::F32, &[2])], 32)
            .unwrap();
    let mut bytes = header.bytes().to_vec();
    bytes.extend([1.5f32, -2.0].iter().flat_map(|value| value.to_le_bytes()));
    std::fs::write(&path, &bytes).unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.parts().next().unwrap().header_bytes(), header.unpadded());
    assert_eq!(file.bytes_of(file.tensor("v").unwrap()), &bytes[header.bytes().len()..]);
    assert_eq!(file.f32_vector("v").unwrap(), Some(vec![1.5, -2.0]));
    assert_eq!(file.f32_vector("absent").unwrap(), None);
}

type Entry<'a> = (&'a str, Value);

/// A llama model of one block, with room for one more entry and one more tensor.
fn model_file(
    folder: &Path,
    more: Option<Entry<'_>>,
    more_tensor: Option<NewTensor>,
) -> std::path::PathBuf {
    let path = folder.join("model.gguf");
    let mut metadata = Metadata::new();
    let architecture = more.clone().filter(|(key, _)| *key == "general.architecture");
    if architecture.is_none() {
        metadata.insert("general.architecture", "llama").unwrap();
    }
    for (key, value) in [
        ("llama.block_count", 1u32),
        ("llama.embedding_length", 8),
        ("llama.feed_forward_length", 16),
        ("llama.attention.head_count", 2),
        ("llama.context_length", 32),
        ("llama.vocab_size", 3),
    ] {
        metadata.insert(key, value).unwrap();
    }
    metadata.insert("llama.attention.layer_norm_rms_epsilon", 1e-5f32).unwrap();
    if let Some((key, value)) = more {
        metadata.insert(key, value).unwrap();
    }
    let matrix = |name: &str, rows, cols| new_tensor(name, DType::F16, &[rows, cols]);
    let mut tensors = vec![
        matrix("token_embd.weight", 3, 8),
        new_tensor("blk.0.attn_norm.weight", DType::F32, &[8]),
        matrix("blk.0.attn_q.weight", 8, 8),
        matrix("blk.0.attn_k.weight", 8, 8),
        matrix("blk.0.attn_v.weight", 8, 8),
        matrix("blk.0.attn_output.weight", 8, 8),
        new_tensor("blk.0.ffn_norm.weight", DType::F32, &[8]),
        matrix("blk.0.ffn_gate.weight", 16, 8),
        matrix("blk.0.ffn_up.weight", 16, 8),
        matrix("blk.0.ffn_down.weight", 8, 16),
        new_tensor("output_norm.weight", DType::F32, &[8]),
    ];
    // One of the same name takes the other's place.
    tensors.retain(|tensor| more_tensor.as_ref().is_none_or(|more| more.name != tensor.name));
    tensors.extend(more_tensor);
    let header = HeaderWriter::new(&path, &metadata, &tensors, 32).unwrap();
    let mut bytes = header.bytes().to_vec();
    bytes.resize(header.file_bytes() as usize, 0);
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn model_serves_weights_tokenizer_and_template() {
    use crate::{Layout, TokenizerSource, Weight, open_model};

    let folder = tempfile::tempdir().unwrap();
    let template = Some(("tokenizer.chat_template", "{{ messages }}".into()));
    let factors = new_tensor("rope_freqs.weight", DType::F32, &[2]);
    // Factors of zero are refused: the tensor is read.
    let error = open_model(&model_file(folder.path(), None, Some(factors))).err().unwrap();
    assert!(error.to_string().contains("RoPE factor"), "{error}");

    let model = open_model(&model_file(folder.path(), template, None)).unwrap();
    assert_eq!((model.format(), model.config().block_count), ("gguf", 1));
    assert!(model.config().tied_embeddings);
    assert_eq!(model.chat_template(), Some("{{ messages }}"));
    assert!(matches!(model.tokenizer(), TokenizerSource::Missing));
    assert_eq!(model.tensor_names().len(), 11);
    assert!(model.warnings().is_empty());
    for (name, expected) in [
        ("blk.0.attn_q.weight", Layout::Interleaved { head_dim: 4, first: 0, rotated: 4 }),
        ("blk.0.attn_v.weight", Layout::AsStored),
    ] {
        match model.tensor(name).unwrap() {
            Some(Weight::Dense(tensor)) => {
                assert_eq!((tensor.layout, tensor.bytes.len()), (expected, 128))
            }
            _ => panic!("{name} is not dense"),
        }
    }
    assert!(model.tensor("output.weight").unwrap().is_none());
}

#[test]
fn model_that_cannot_be_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let tensor = |name, dtype, dims: &[u64]| Some(new_tensor(name, dtype, dims));
    let cases: [(Option<Entry<'_>>, Option<NewTensor>, &str); 8] = [
        (
            Some(("general.architecture", "bert".into())),
            None,
            "architecture `bert` is not supported",
        ),
        (
            Some(("split.count", 2u32.into())),
            None,
            "is one of 2 parts under a name of its own, not names that end with \
             `-00001-of-00002.gguf` and so on",
        ),
        (Some(("general.type", "adapter".into())), None, "is a LoRA adapter, not a language model"),
        (
            Some(("llama.expert_count", 8u32.into())),
            None,
            "the model's number of experts of a token: found 0, expected 1 to 8",
        ),
        (
            None,
            tensor("blk.0.attn_q.bias", DType::F32, &[8]),
            "tensor `blk.0.attn_k.bias`: found none, and none of 1 more, expected the tensors of 1 \
             blocks",
        ),
        (
            None,
            tensor("blk.0.attn_q.scale", DType::F32, &[8]),
            "tensor `blk.0.attn_q.scale` of a llama model with 1 blocks is not supported",
        ),
        (
            None,
            tensor("blk.0.ffn_down.weight", DType::F32, &[8, 32]),
            "tensor `blk.0.ffn_down.weight`: found [8, 32], expected [8, 16] by \
             `llama.embedding_length` 8, `llama.feed_forward_length` 16",
        ),
        (
            None,
            tensor("token_embd.weight", DType::F32, &[3, 4]),
            "tensor `token_embd.weight`: found [3, 4], expected [3, 8] by `llama.vocab_size` 3, \
             `llama.embedding_length` 8",
        ),
    ];
    for (entry, tensor, message) in cases {
        let path = model_file(folder.path(), entry, tensor);
        let error = GgufModel::open(&path).unwrap_err().to_string();
        let (found, message) =
            (error.trim_start_matches(&format!("`{}`", path.display())), message);
        assert!(found.trim_start_matches(": ").trim_start() == message, "{error}");
    }
}

#[test]
fn model_odd_vocabulary_is_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = ["a", "b", "a"].map(str::to_owned).to_vec();
    let path = model_file(folder.path(), Some(("tokenizer.ggml.tokens", tokens.into())), None);
    let model = GgufModel::open(&path).unwrap();
    let expected = "`tokenizer.ggml.tokens`: found the text \"a\" of token 0 again as token 2, \
                    expected one token of each text";
    assert_eq!(model.warnings(), [format!("`{}`: {expected}", path.display())]);
}

fn any_array() -> impl Strategy<Value = Array> {
    use prop::collection::vec;
    let leaf = prop_oneof![
        vec(any::<u8>(), 0..5).prop_map(Array::U8),
        vec(any::<i8>(), 0..5).prop_map(Array::I8),
        vec(any::<u16>(), 0..5).prop_map(Array::U16),
        vec(any::<i16>(), 0..5).prop_map(Array::I16),
        vec(any::<u32>(), 0..5).prop_map(Array::U32),
        vec(any::<i32>(), 0..5).prop_map(Array::I32),
        vec(any::<u64>(), 0..5).prop_map(Array::U64),
        vec(any::<i64>(), 0..5).prop_map(Array::I64),
        vec(-1e30f32..1e30, 0..5).prop_map(Array::F32),
        vec(-1e300f64..1e300, 0..5).prop_map(Array::F64),
        vec(any::<bool>(), 0..5).prop_map(Array::Bool),
        vec(".{0,8}", 0..5).prop_map(Array::String),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| vec(inner, 0..3).prop_map(Array::Array))
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i64>().prop_map(Value::I64),
        (-1e300f64..1e300).prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        ".{0,40}".prop_map(Value::String),
        any_array().prop_map(Value::Array),
    ]
}

fn any_type_and_shape() -> impl Strategy<Value = (DType, Vec<u64>)> {
    let dtype = prop::sample::select(DTYPE_IDS.map(|(dtype, _)| dtype).to_vec());
    let shape = prop::collection::vec(1u64..4, 1..=MAX_DIMENSIONS);
    (dtype, shape).prop_map(|(dtype, mut shape)| {
        // Rows of whole blocks.
        *shape.last_mut().unwrap() *= dtype.block().unwrap().0;
        (dtype, shape)
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        entries in prop::collection::btree_map("[a-z_.]{1,20}", any_value(), 0..8),
        tensors in prop::collection::btree_map("[a-z.]{1,63}", any_type_and_shape(), 0..6),
        alignment in (1u32..32).prop_map(|eighths| 8 * eighths),
    ) {
        let mut metadata = Metadata::new();
        for (key, value) in entries {
            metadata.insert(key, value).unwrap();
        }
        let tensors: Vec<NewTensor> =
            tensors.into_iter().map(|(name, (dtype, shape))| NewTensor { name, dtype, shape }).collect();
        let written = HeaderWriter::new(Path::new(PATH), &metadata, &tensors, alignment).unwrap();
        // The header is enough: the length of the file stands for its data.
        let read = GgufHeader::parse(Path::new(PATH), written.bytes(), written.file_bytes(), &Limits::default()).unwrap();

        prop_assert_eq!(read.alignment(), u64::from(alignment));
        prop_assert!(read.metadata().iter().filter(|&(key, _)| key != ALIGNMENT_KEY).eq(metadata.iter()));
        prop_assert_eq!(read.tensors().len(), tensors.len());
        for ((read, tensor), &offset) in read.tensors().iter().zip(&tensors).zip(written.tensor_offsets()) {
            prop_assert_eq!((&read.name, read.dtype, &read.shape), (&tensor.name, tensor.dtype, &tensor.shape));
            prop_assert_eq!((read.offset, Some(read.bytes)), (offset, tensor.bytes()));
        }
    }

    #[test]
    fn any_bytes_after_the_magic_are_survived(tail in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = Bytes::header(3, 1, 1).0;
        bytes.extend(tail);
        let _ = parse(&bytes);
    }
}
