//! Reading: the whole header is validated before anything is served.

use std::{
    ops::{Deref, Range},
    path::{Path, PathBuf},
};

use super::{
    ALIGNMENT_KEY, ALIGNMENT_RULE, Array, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMENSIONS, Metadata,
    Value, dtype_from_id, element_count, is_alignment,
    split::{self, part_count},
    tensor_bytes,
    value::{MAX_KEY_BYTES, type_id},
};
use crate::{
    DType, FormatError, Limits, MappedFile, Part, Result, TensorFacts, arch::ROPE_TENSORS,
    folder::CUT_SHORT, limits,
};

/// The least bytes of a metadata entry: key length, one key byte, type, a one-byte value.
const MIN_ENTRY_BYTES: u64 = 8 + 1 + 4 + 1;
/// The least bytes of a tensor entry: name length, number of dimensions, one dimension, type,
/// offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// Where a tensor lies and how to read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions, outermost first (GGUF stores the fastest first): a matrix is `[rows, cols]`.
    pub shape: Vec<u64>,
    /// The file that it lies in, of a model that is split into several: counted from 0.
    pub part: usize,
    /// Where its bytes start, counted from the start of the file.
    pub offset: u64,
    /// How many bytes it has; for an unknown type, all that lie before the next tensor or the end
    /// of the file.
    pub bytes: u64,
}

impl TensorInfo {
    /// Where its bytes lie in its file.
    pub(crate) fn range(&self) -> Range<usize> {
        // `place_tensors` has checked that the range lies in the file.
        let first = self.offset as usize;
        first..first + self.bytes as usize
    }

    /// The dimensions of a matrix; a vector has one row. `path` is for messages.
    ///
    /// # Errors
    /// `Unsupported` for more than three dimensions.
    pub fn rows_and_cols(&self, path: &Path) -> Result<(usize, usize)> {
        // `place_tensors` has checked that the elements lie in the file, so their number fits
        // `usize`.
        match self.shape[..] {
            [cols] => Ok((1, cols as usize)),
            [rows, cols] => Ok((rows as usize, cols as usize)),
            // Matrices of experts, one above the other.
            [experts, rows, cols] => Ok((experts as usize * rows as usize, cols as usize)),
            _ => {
                let what = format!("tensor `{}`: shape {:?}", self.name, self.shape);
                Err(FormatError::unsupported(path, what, ""))
            }
        }
    }
}

/// The validated header of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufHeader {
    version: u32,
    alignment: u64,
    metadata: Metadata,
    /// Where the value of each metadata entry starts.
    value_offsets: Vec<usize>,
    tensors: Vec<TensorInfo>,
    /// The tensors' positions, sorted by name.
    by_name: Vec<usize>,
    header_bytes: usize,
    data_start: u64,
}

impl GgufHeader {
    /// Reads the header at the start of `bytes`, which may be the whole file or only its first
    /// part.
    ///
    /// `path` is for messages; `file_bytes` is the length of the whole file.
    ///
    /// # Errors
    /// `Malformed` if a rule of GGUF is broken, `Unsupported` for version 1 and for big-endian
    /// files, `LimitExceeded` if the header asks for more than `limits` grant.
    pub fn parse(path: &Path, bytes: &[u8], file_bytes: u64, limits: &Limits) -> Result<Self> {
        let mut cursor = Cursor { path, bytes, position: 0, limits };
        let version = read_version(&mut cursor)?;
        let tensor_count = cursor.count("tensors", limits.tensor_count, MIN_TENSOR_BYTES)?;
        let metadata_count =
            cursor.count("metadata entries", limits.metadata_count, MIN_ENTRY_BYTES)?;

        let (metadata, value_offsets) = read_metadata(&mut cursor, metadata_count)?;
        let alignment = read_alignment(&cursor, &metadata)?;
        let mut tensors = Vec::with_capacity(tensor_count);
        for index in 0..tensor_count {
            tensors.push(read_tensor_info(&mut cursor, index, alignment)?);
        }
        let by_name = sort_by_name(path, &tensors)?;

        let header_bytes = cursor.position;
        // Cannot overflow: a slice is at most isize::MAX bytes long, and the alignment fits 32
        // bits.
        let data_start = (header_bytes as u64).next_multiple_of(alignment);
        place_tensors(&cursor, &mut tensors, data_start, file_bytes)?;
        Ok(Self {
            version,
            alignment,
            metadata,
            value_offsets,
            tensors,
            by_name,
            header_bytes,
            data_start,
        })
    }

    /// The GGUF version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Tensors start at multiples of this many bytes, counted from
    /// [`data_start`](Self::data_start).
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// The metadata, in file order.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors, in the order of the header.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        let found =
            self.by_name.binary_search_by(|&index| self.tensors[index].name.as_str().cmp(name));
        found.ok().map(|place| &self.tensors[self.by_name[place]])
    }

    /// Where the value of a metadata key starts, in bytes from the start of the file; for a string
    /// or an array that is its length or element type.
    pub fn value_offset(&self, key: &str) -> Option<usize> {
        self.metadata.position(key).map(|position| self.value_offsets[position])
    }

    /// Where the tensors' bytes start, counted from the start of the file.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }
}

/// An opened GGUF file: its header (by dereference) and its bytes. A model that is split into
/// several files has the header of the first one, with the tensors of all.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    /// All files of the model.
    maps: Vec<MappedFile>,
    header: GgufHeader,
    /// The headers of the files behind the first, whose tensors are in `header`.
    others: Vec<GgufHeader>,
}

/// One of the files of a model.
#[derive(Debug, Clone, Copy)]
pub struct GgufPart<'f> {
    map: &'f MappedFile,
    header: &'f GgufHeader,
    tensors: &'f [TensorInfo],
}

impl<'f> GgufPart<'f> {
    /// Where it is.
    pub fn path(&self) -> &'f Path {
        self.map.path()
    }

    /// The whole file.
    pub fn bytes(&self) -> &'f [u8] {
        self.map
    }

    /// What its own header says, but for the tensors.
    pub fn header(&self) -> &'f GgufHeader {
        self.header
    }

    /// The bytes from the start of the file to the end of its tensor entries, without padding.
    pub fn header_bytes(&self) -> &'f [u8] {
        &self.bytes()[..self.header.header_bytes]
    }

    /// The tensors that lie in it, in the order of its header.
    pub fn tensors(&self) -> &'f [TensorInfo] {
        self.tensors
    }
}

impl GgufFile {
    /// Opens and validates a file under the default limits.
    ///
    /// # Errors
    /// As [`Self::open_with`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, &Limits::default())
    }

    /// Opens and validates a file; of a split model any of its files, and the others with it.
    ///
    /// # Errors
    /// `Io`, and those of [`GgufHeader::parse`]; for files of a split model that are missing, or
    /// belong to another one, `Missing`, `OtherKind` or `Malformed`.
    pub fn open_with(path: &Path, limits: &Limits) -> Result<Self> {
        let (map, header) = open_part(path, limits)?;
        if part_count(&header) == 1 {
            let (path, maps) = (path.to_owned(), vec![map]);
            return Ok(Self { path, maps, header, others: Vec::new() });
        }
        let mut parts = split::parts(path, (map, header), limits)?.into_iter();
        let (first, mut header) = parts.next().expect("a split model has files");
        let (mut maps, mut others) = (vec![first], Vec::new());
        for (map, mut other) in parts {
            let (part, tensors) = (maps.len(), std::mem::take(&mut other.tensors));
            header.tensors.extend(tensors.into_iter().map(|info| TensorInfo { part, ..info }));
            maps.push(map);
            others.push(other);
        }
        let count = header.tensors.len() as u64;
        limits::check(path, "the number of tensors", count, limits.tensor_count)?;
        header.by_name = sort_by_name(path, &header.tensors)?;
        split::check_tensor_count(path, &header)?;
        Ok(Self { path: path.to_owned(), maps, header, others })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files of the model, in order.
    pub fn files(&self) -> Vec<PathBuf> {
        self.maps.iter().map(|map| map.path().to_owned()).collect()
    }

    /// Each of them.
    pub fn parts(&self) -> impl Iterator<Item = GgufPart<'_>> {
        let headers = std::iter::once(&self.header).chain(&self.others);
        self.maps.iter().zip(headers).enumerate().map(|(part, (map, header))| {
            let place = |part| self.tensors().partition_point(|info| info.part < part);
            GgufPart { map, header, tensors: &self.tensors()[place(part)..place(part + 1)] }
        })
    }

    /// The bytes of a tensor of this file.
    ///
    /// # Panics
    /// If `tensor` was taken from another file and does not fit this one.
    pub fn bytes_of(&self, tensor: &TensorInfo) -> &[u8] {
        &self.maps[tensor.part][tensor.range()]
    }

    /// Bytes of a file.
    pub(crate) fn bytes_at(&self, part: usize, range: Range<usize>) -> &[u8] {
        &self.maps[part][range]
    }

    /// Size of all files.
    pub fn total_bytes(&self) -> u64 {
        self.maps.iter().map(|map| map.len() as u64).sum()
    }

    /// As [`MappedFile::release_pages`].
    pub fn release_pages(&self) {
        self.maps.iter().for_each(MappedFile::release_pages);
    }

    /// What the tensors say about the configuration.
    ///
    /// # Errors
    /// As [`Self::f32_vector`].
    pub fn facts(&self) -> Result<TensorFacts> {
        let [factors, short, long] = ROPE_TENSORS.map(|name| self.f32_vector(name));
        let embedding = self.tensor(&Part::Embedding.gguf_name());
        let embedding_rows = embedding.and_then(|info| usize::try_from(*info.shape.first()?).ok());
        Ok(TensorFacts { embedding_rows, factors: factors?, short: short?, long: long? })
    }

    /// The values of an F32 vector, `None` if the file has no tensor of this name.
    ///
    /// # Errors
    /// `Malformed` if the tensor has another type or shape.
    pub fn f32_vector(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(tensor) = self.tensor(name) else { return Ok(None) };
        if tensor.dtype != DType::F32 || tensor.shape.len() != 1 {
            let found = format!("{:?} {:?}", tensor.dtype, tensor.shape);
            return Err(FormatError::malformed(
                self.path(),
                format!("tensor `{name}`"),
                "",
                found,
                "an F32 vector",
            ));
        }
        let (words, _) = self.bytes_of(tensor).as_chunks::<4>();
        Ok(Some(words.iter().map(|&word| f32::from_le_bytes(word)).collect()))
    }
}

impl Deref for GgufFile {
    type Target = GgufHeader;

    fn deref(&self) -> &GgufHeader {
        &self.header
    }
}

/// Maps a file and reads its header.
pub(super) fn open_part(path: &Path, limits: &Limits) -> Result<(MappedFile, GgufHeader)> {
    let map = MappedFile::open(path)?;
    let header = GgufHeader::parse(path, &map, map.len() as u64, limits)?;
    Ok((map, header))
}

fn read_version(cursor: &mut Cursor<'_>) -> Result<u32> {
    let magic = cursor.take(4, "the magic bytes")?;
    if magic != MAGIC {
        let found = format!("`{}`", magic.escape_ascii());
        return Err(cursor.malformed("the magic bytes", found, "`GGUF`"));
    }
    let unsupported =
        |what: &str, hint: &str| Err(FormatError::unsupported(cursor.path, what, hint));
    match cursor.u32("the version")? {
        version @ (2 | 3) => Ok(version),
        1 => unsupported("GGUF version 1", "convert the model again with a current llama.cpp"),
        // A small number read with the wrong byte order has only high bytes.
        swapped if swapped != 0 && swapped.trailing_zeros() >= 16 => {
            unsupported("a big-endian GGUF file", "use the little-endian file of the same model")
        }
        0 => Err(cursor.malformed("the version", 0, "2 or 3")),
        version => unsupported(&format!("GGUF version {version}"), ""),
    }
}

/// The entries, and where the value of each starts.
fn read_metadata(cursor: &mut Cursor<'_>, count: usize) -> Result<(Metadata, Vec<usize>)> {
    let mut metadata = Metadata::new();
    let mut value_offsets = Vec::with_capacity(count);
    for index in 0..count {
        let place = format!("the key of metadata entry {index}");
        let key = cursor.string(&place)?;
        if !(1..=MAX_KEY_BYTES).contains(&key.len()) {
            let expected = format!("1 to {MAX_KEY_BYTES}");
            return Err(cursor.malformed(place, format!("{} bytes", key.len()), expected));
        }
        let place = format!("key `{key}`");
        let type_id = cursor.u32(&place)?;
        value_offsets.push(cursor.position);
        let value = read_value(cursor, type_id, &place)?;
        if metadata.contains(&key) {
            return Err(cursor.malformed(place, "a second entry of this key", "one"));
        }
        metadata.insert(key, value)?;
    }
    Ok((metadata, value_offsets))
}

fn read_alignment(cursor: &Cursor<'_>, metadata: &Metadata) -> Result<u64> {
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT.into()),
        Some(&Value::U32(alignment)) if is_alignment(alignment) => Ok(alignment.into()),
        Some(value) => {
            Err(cursor.malformed(format!("key `{ALIGNMENT_KEY}`"), value, ALIGNMENT_RULE))
        }
    }
}

fn read_value(cursor: &mut Cursor<'_>, type_id: u32, place: &str) -> Result<Value> {
    Ok(match type_id {
        type_id::U8 => Value::U8(cursor.number(place)?),
        type_id::I8 => Value::I8(cursor.number(place)?),
        type_id::U16 => Value::U16(cursor.number(place)?),
        type_id::I16 => Value::I16(cursor.number(place)?),
        type_id::U32 => Value::U32(cursor.number(place)?),
        type_id::I32 => Value::I32(cursor.number(place)?),
        type_id::U64 => Value::U64(cursor.number(place)?),
        type_id::I64 => Value::I64(cursor.number(place)?),
        type_id::F32 => Value::F32(cursor.number(place)?),
        type_id::F64 => Value::F64(cursor.number(place)?),
        type_id::BOOL => Value::Bool(cursor.bool(place)?),
        type_id::STRING => Value::String(cursor.string(place)?),
        type_id::ARRAY => Value::Array(read_array(cursor, place, 1)?),
        unknown => return Err(cursor.unknown_type(place, unknown)),
    })
}

fn read_array(cursor: &mut Cursor<'_>, place: &str, depth: u32) -> Result<Array> {
    limits::check(
        cursor.path,
        format!("{place}: arrays in arrays"),
        depth.into(),
        cursor.limits.array_depth.into(),
    )?;
    let type_id = cursor.u32(place)?;
    let len = cursor.number(place)?;
    limits::check(cursor.path, format!("{place}: array length"), len, cursor.limits.array_len)?;
    Ok(match type_id {
        type_id::U8 => Array::U8(cursor.numbers(len, place)?),
        type_id::I8 => Array::I8(cursor.numbers(len, place)?),
        type_id::U16 => Array::U16(cursor.numbers(len, place)?),
        type_id::I16 => Array::I16(cursor.numbers(len, place)?),
        type_id::U32 => Array::U32(cursor.numbers(len, place)?),
        type_id::I32 => Array::I32(cursor.numbers(len, place)?),
        type_id::U64 => Array::U64(cursor.numbers(len, place)?),
        type_id::I64 => Array::I64(cursor.numbers(len, place)?),
        type_id::F32 => Array::F32(cursor.numbers(len, place)?),
        type_id::F64 => Array::F64(cursor.numbers(len, place)?),
        type_id::BOOL => Array::Bool(cursor.elements(len, 1, place, |cursor| cursor.bool(place))?),
        type_id::STRING => {
            Array::String(cursor.elements(len, 8, place, |cursor| cursor.string(place))?)
        }
        type_id::ARRAY => Array::Array(
            cursor.elements(len, 12, place, |cursor| read_array(cursor, place, depth + 1))?,
        ),
        unknown => return Err(cursor.unknown_type(place, unknown)),
    })
}

/// Reads one entry; `offset` is still relative to the start of the data, and `bytes` is 0 for an
/// unknown type.
fn read_tensor_info(cursor: &mut Cursor<'_>, index: usize, alignment: u64) -> Result<TensorInfo> {
    let name = cursor.string(&format!("the name of tensor {index}"))?;
    let place = format!("tensor `{name}`");
    let shape = read_shape(cursor, &place)?;
    let dtype = dtype_from_id(cursor.u32(&place)?);
    let bytes = match dtype {
        DType::Unknown(_) => 0,
        known => tensor_bytes(known, &shape).ok_or_else(|| {
            cursor.malformed(
                &place,
                format!("{known:?} {shape:?}"),
                "rows of whole blocks, and a size that fits 64 bits",
            )
        })?,
    };
    let offset: u64 = cursor.number(&place)?;
    if !offset.is_multiple_of(alignment) {
        return Err(cursor.malformed(
            place,
            format!("offset {offset}"),
            format!("a multiple of {alignment}"),
        ));
    }
    Ok(TensorInfo { name, dtype, shape, part: 0, offset, bytes })
}

/// The dimensions, outermost first.
fn read_shape(cursor: &mut Cursor<'_>, place: &str) -> Result<Vec<u64>> {
    let dimensions = cursor.u32(place)?;
    if !(1..=MAX_DIMENSIONS as u32).contains(&dimensions) {
        let expected = format!("1 to {MAX_DIMENSIONS}");
        return Err(cursor.malformed(place, format!("{dimensions} dimensions"), expected));
    }
    let mut shape: Vec<u64> = cursor.numbers(dimensions.into(), place)?;
    shape.reverse();
    if element_count(&shape).is_none() {
        let expected = "dimensions that are not 0, and a product that fits 64 bits";
        return Err(cursor.malformed(place, format!("shape {shape:?}"), expected));
    }
    Ok(shape)
}

/// The tensors' positions sorted by name, if no two names are equal.
fn sort_by_name(path: &Path, tensors: &[TensorInfo]) -> Result<Vec<usize>> {
    let mut by_name: Vec<usize> = (0..tensors.len()).collect();
    by_name.sort_unstable_by_key(|&index| &tensors[index].name);
    let twice = by_name.windows(2).find(|pair| tensors[pair[0]].name == tensors[pair[1]].name);
    match twice {
        Some(pair) => {
            let place = format!("tensor `{}`", tensors[pair[0]].name);
            Err(FormatError::malformed(path, place, "", "a second tensor of this name", "one"))
        }
        None => Ok(by_name),
    }
}

/// Makes offsets absolute, gives unknown types their size, and checks that each tensor ends before
/// the next begins and the last before the end of the file.
fn place_tensors(
    cursor: &Cursor<'_>,
    tensors: &mut [TensorInfo],
    data_start: u64,
    file_bytes: u64,
) -> Result<()> {
    let mut last_first: Vec<&mut TensorInfo> = tensors.iter_mut().collect();
    last_first.sort_unstable_by_key(|tensor| std::cmp::Reverse(tensor.offset));
    let (mut limit, mut limit_is) = (file_bytes, "the file ends".to_owned());
    let beyond = |error: FormatError, limit| match limit == file_bytes {
        true => error.with_hint(CUT_SHORT),
        false => error,
    };
    for tensor in last_first {
        let place = || format!("tensor `{}`", tensor.name);
        let expected = || format!("at most {limit}, where {limit_is}");
        let start =
            tensor.offset.checked_add(data_start).filter(|&start| start < limit).ok_or_else(
                || {
                    let found = format!("offset {} after {data_start}", tensor.offset);
                    beyond(cursor.malformed(place(), found, expected()), limit)
                },
            )?;
        if matches!(tensor.dtype, DType::Unknown(_)) {
            tensor.bytes = limit - start;
        } else if tensor.bytes > limit - start {
            let found = format!("{} bytes from {start} on", tensor.bytes);
            let expected = format!("an end of {}", expected());
            return Err(beyond(cursor.malformed(place(), found, expected), limit));
        }
        tensor.offset = start;
        (limit, limit_is) = (start, format!("tensor `{}` starts", tensor.name));
    }
    Ok(())
}

/// A place in the bytes. Every read is checked against what remains before anything is allocated.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    position: usize,
    limits: &'a Limits,
}

impl<'a> Cursor<'a> {
    fn malformed(
        &self,
        place: impl Into<String>,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> FormatError {
        FormatError::malformed(self.path, place, "", found, expected)
    }

    fn unknown_type(&self, place: &str, id: u32) -> FormatError {
        self.malformed(place, format!("value type {id} before byte {}", self.position), "0 to 12")
    }

    fn remaining(&self) -> u64 {
        (self.bytes.len() - self.position) as u64
    }

    /// Refuses `count` items of at least `item_bytes` bytes that cannot lie in the remaining bytes.
    fn require(&self, count: u64, item_bytes: u64, place: &str) -> Result<()> {
        if count <= self.remaining() / item_bytes {
            return Ok(());
        }
        let needed = u128::from(count) * u128::from(item_bytes);
        let found = format!("{} bytes after byte {}", self.remaining(), self.position);
        Err(self.malformed(place, found, format!("at least {needed}")).with_hint(CUT_SHORT))
    }

    fn take(&mut self, count: u64, place: &str) -> Result<&'a [u8]> {
        self.require(count, 1, place)?;
        let end = self.position + count as usize;
        limits::check(self.path, "bytes of the header", end as u64, self.limits.header_bytes)?;
        let taken = &self.bytes[self.position..end];
        self.position = end;
        Ok(taken)
    }

    fn number<T: Number>(&mut self, place: &str) -> Result<T> {
        self.take(T::BYTES, place).map(T::from_le)
    }

    fn u32(&mut self, place: &str) -> Result<u32> {
        self.number(place)
    }

    /// A count of items of at least `item_bytes` bytes each.
    fn count(&mut self, what: &str, limit: u64, item_bytes: u64) -> Result<usize> {
        let place = format!("the number of {what}");
        let count: u64 = self.number(&place)?;
        limits::check(self.path, &place, count, limit)?;
        self.require(count, item_bytes, &place)?;
        Ok(count as usize)
    }

    fn numbers<T: Number>(&mut self, count: u64, place: &str) -> Result<Vec<T>> {
        self.require(count, T::BYTES, place)?;
        let bytes = self.take(count * T::BYTES, place)?;
        Ok(bytes.chunks_exact(T::BYTES as usize).map(T::from_le).collect())
    }

    /// `count` elements of at least `element_bytes` bytes each.
    fn elements<T>(
        &mut self,
        count: u64,
        element_bytes: u64,
        place: &str,
        mut read: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        self.require(count, element_bytes, place)?;
        (0..count).map(|_| read(self)).collect()
    }

    fn bool(&mut self, place: &str) -> Result<bool> {
        match self.number::<u8>(place)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.malformed(place, format!("truth value {other}"), "0 or 1")),
        }
    }

    fn string(&mut self, place: &str) -> Result<String> {
        let length = self.number(place)?;
        limits::check(
            self.path,
            format!("{place}: string length"),
            length,
            self.limits.string_bytes,
        )?;
        let bytes = self.take(length, place)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => {
                let byte = self.position - bytes.len() + error.valid_up_to();
                Err(self.malformed(place, format!("no UTF-8 at byte {byte}"), "UTF-8"))
            }
        }
    }
}

/// A fixed-size little-endian number.
trait Number: Sized {
    const BYTES: u64;
    /// # Panics
    /// If there are not exactly `BYTES` bytes.
    fn from_le(bytes: &[u8]) -> Self;
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl Number for $number {
            const BYTES: u64 = size_of::<Self>() as u64;

            fn from_le(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("the caller took exactly these bytes"))
            }
        }
    )*};
}

numbers!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);
