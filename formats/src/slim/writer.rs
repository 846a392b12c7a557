//! Writes a SliM file while its layers are being made.
//!
//! Tensor data is spooled to an unnamed temporary file beside the target, since the header comes first and holds
//! what is known last (sizes, hashes, errors). The target appears, whole, when [`SlimWriter::finish`] returns.

use std::{
    collections::HashSet,
    fs::File,
    io::{BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use xxhash_rust::xxh3::xxh3_64;

use super::{
    file::{ALIGNMENT, FORMAT_VERSION, keys, part_name},
    group::ScaleCoding,
    layout::PackedLayer,
};
use crate::{
    AtomicFile, DType, FormatError, Result,
    gguf::{Array, HeaderWriter, Metadata, NewTensor, Value},
};

/// Collects layers and dense tensors; see the module documentation.
pub struct SlimWriter {
    target: PathBuf,
    spool: BufWriter<File>,
    names: HashSet<String>,
    tensors: Vec<NewTensor>,
    hashes: Vec<u64>,
    layers: LayerTable,
}

/// The columns of the layer table (F5).
#[derive(Default)]
struct LayerTable {
    name: Vec<String>,
    rows: Vec<u32>,
    cols: Vec<u32>,
    group_size: Vec<u32>,
    coding: Vec<u8>,
    sub_group: Vec<u8>,
    scale_bits: Vec<u8>,
    error: Vec<f32>,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrittenFile {
    /// Size of the file.
    pub bytes: u64,
}

impl SlimWriter {
    /// Prepares to write `target`, which is left as it is until [`Self::finish`].
    ///
    /// # Errors
    /// `Io` if the folder cannot be written to.
    pub fn create(target: &Path) -> Result<Self> {
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let spool = tempfile::tempfile_in(folder)
            .map_err(|e| FormatError::io(target, "create a temporary file beside it", e))?;
        Ok(Self {
            target: target.to_owned(),
            spool: BufWriter::with_capacity(1 << 20, spool),
            names: HashSet::new(),
            tensors: Vec::new(),
            hashes: Vec::new(),
            layers: LayerTable::default(),
        })
    }

    /// Adds a dense tensor of type F32, F16 or BF16 (F7); `shape` is outermost first.
    ///
    /// # Errors
    /// `Io` if the disk is full; `Malformed` for a second tensor of that name.
    ///
    /// # Panics
    /// If `bytes` does not fill `shape`.
    pub fn dense(&mut self, name: &str, dtype: DType, shape: &[u64], bytes: &[u8]) -> Result<()> {
        self.claim(name)?;
        self.append(name.to_owned(), dtype, shape.to_vec(), bytes)
    }

    /// Adds a quantized layer with its relative output error (`None` if it was not measured).
    ///
    /// # Errors
    /// As [`Self::dense`].
    pub fn layer(&mut self, name: &str, layer: &PackedLayer, error: Option<f32>) -> Result<()> {
        self.claim(name)?;
        let layout = layer.layout();
        let (coding, sub_group, scale_bits) = match layout.coding() {
            ScaleCoding::Paper => (0, 0, 0),
            ScaleCoding::TwoLevel { sub_group, scale_bits } => (1, sub_group as u8, scale_bits),
        };
        let table = &mut self.layers;
        table.name.push(name.to_owned());
        table.rows.push(layout.rows() as u32);
        table.cols.push(layout.cols() as u32);
        table.group_size.push(layout.group_size() as u32);
        table.coding.push(coding);
        table.sub_group.push(sub_group);
        table.scale_bits.push(scale_bits);
        table.error.push(error.unwrap_or(-1.0));

        let bits: Vec<u8> = layout.groups().iter().map(|group| group.bit_width.bits()).collect();
        let tiles = layout.tiles() as u64;
        let (codes, scales, row_scales) = layer.parts();
        let part = |suffix| part_name(name, suffix);
        self.append(part("bits"), DType::I8, vec![bits.len() as u64], &bits)?;
        let tile_bytes = layout.tile_code_bytes() as u64;
        self.append(part("codes"), DType::I8, vec![tiles, tile_bytes], codes)?;
        let tile_bytes = layout.tile_scale_bytes() as u64;
        self.append(part("scales"), DType::I8, vec![tiles, tile_bytes], scales)?;
        if !row_scales.is_empty() {
            self.append(part("row_scales"), DType::F16, vec![tiles, 2, 16], row_scales)?;
        }
        Ok(())
    }

    /// Writes the header with `metadata` (general, model, tokenizer and provenance keys) and all data, and puts the
    /// file in place.
    ///
    /// # Errors
    /// `Io`, or `Malformed` for metadata that GGUF cannot hold.
    pub fn finish(mut self, mut metadata: Metadata) -> Result<WrittenFile> {
        self.layers.describe(&mut metadata)?;
        metadata.insert(keys::TENSOR_HASHES, Value::Array(Array::U64(self.hashes)))?;
        metadata.insert(keys::HEADER_HASH, Value::U64(0))?;
        let mut header = HeaderWriter::new(&self.target, &metadata, &self.tensors, ALIGNMENT)?;
        let hash = xxh3_64(header.unpadded());
        header.set_u64(keys::HEADER_HASH, hash);

        let spool_error = |e| FormatError::io(&self.target, "copy the tensor data", e);
        let mut spool = self.spool.into_inner().map_err(|e| spool_error(e.into_error()))?;
        spool.seek(SeekFrom::Start(0)).map_err(spool_error)?;
        let mut out = AtomicFile::create(&self.target)?;
        out.write_all(header.bytes()).map_err(spool_error)?;
        for (tensor, offset) in self.tensors.iter().zip(header.tensor_offsets()) {
            pad_to(&mut out, *offset).map_err(spool_error)?;
            let bytes = tensor.bytes().unwrap_or_default();
            std::io::copy(&mut Read::by_ref(&mut spool).take(bytes), &mut out)
                .map_err(spool_error)?;
        }
        pad_to(&mut out, header.file_bytes()).map_err(spool_error)?;
        out.commit()?;
        Ok(WrittenFile { bytes: header.file_bytes() })
    }

    fn claim(&mut self, name: &str) -> Result<()> {
        if self.names.insert(name.to_owned()) {
            return Ok(());
        }
        let place = format!("tensor `{name}`");
        Err(FormatError::malformed(&self.target, place, "F7", "a second one", "unique names"))
    }

    fn append(&mut self, name: String, dtype: DType, shape: Vec<u64>, bytes: &[u8]) -> Result<()> {
        assert_eq!(dtype.size_in_bytes(shape.iter().product()), Some(bytes.len() as u64));
        self.hashes.push(xxh3_64(bytes));
        self.tensors.push(NewTensor { name, dtype, shape });
        self.spool
            .write_all(bytes)
            .map_err(|e| FormatError::io(&self.target, "write the tensor data", e))
    }
}

impl LayerTable {
    fn describe(&mut self, metadata: &mut Metadata) -> Result<()> {
        use std::mem::take;
        metadata.insert(keys::VERSION, Value::U32(FORMAT_VERSION))?;
        for (column, array) in [
            ("name", Array::String(take(&mut self.name))),
            ("rows", Array::U32(take(&mut self.rows))),
            ("cols", Array::U32(take(&mut self.cols))),
            ("group_size", Array::U32(take(&mut self.group_size))),
            ("coding", Array::U8(take(&mut self.coding))),
            ("sub_group", Array::U8(take(&mut self.sub_group))),
            ("scale_bits", Array::U8(take(&mut self.scale_bits))),
            ("error", Array::F32(take(&mut self.error))),
        ] {
            metadata.insert(keys::layers(column), Value::Array(array))?;
        }
        Ok(())
    }
}

fn pad_to(out: &mut AtomicFile, offset: u64) -> std::io::Result<()> {
    let position = out.stream_position()?;
    std::io::copy(&mut std::io::repeat(0).take(offset.saturating_sub(position)), out).map(drop)
}
