//! What a SliM file will hold, known before its data.

use std::path::Path;

use super::{
    file::{ALIGNMENT, FIRST_VERSION, keys, part_name, row_scale_shape, version_for},
    group::{LayerLayout, ScaleCoding},
    parts::{FilePart, share_out},
};
use crate::{
    DType, Result,
    gguf::{Array, HeaderWriter, Metadata, NewTensor, Value},
};

/// The tensors and the layer table of a file, in the order in which they are stored.
#[derive(Debug, Clone, Default)]
pub struct Outline {
    tensors: Vec<NewTensor>,
    layers: LayerTable,
}

/// The columns of the layer table (F5).
#[derive(Debug, Clone, Default)]
struct LayerTable {
    /// The first version that has all of it (F2).
    version: u32,
    name: Vec<String>,
    rows: Vec<u32>,
    cols: Vec<u32>,
    group_size: Vec<u32>,
    coding: Vec<u8>,
    sub_group: Vec<u8>,
    scale_bits: Vec<u8>,
    error: Vec<f32>,
}

impl Outline {
    /// Adds a dense tensor (F7); `shape` is outermost first.
    pub fn dense(&mut self, name: &str, dtype: DType, shape: &[u64]) {
        self.tensors.push(NewTensor { name: name.to_owned(), dtype, shape: shape.to_vec() });
    }

    /// Adds a quantized layer with its relative output error (`None` if it was not measured): its
    /// tensors (F6) in the order of [`PackedTensor::parts`](super::PackedTensor::parts), after that
    /// of its bit-widths.
    pub fn layer(&mut self, name: &str, layout: &LayerLayout, error: Option<f32>) {
        self.layers.push(name, layout, error);
        let tiles = layout.tiles() as u64;
        let mut part = |suffix, dtype, shape: &[u64]| {
            self.dense(&part_name(name, suffix), dtype, shape);
        };
        part("bits", DType::I8, &[layout.groups().len() as u64]);
        part("codes", DType::I8, &[tiles, layout.tile_code_bytes() as u64]);
        part("scales", DType::I8, &[tiles, layout.tile_scale_bytes() as u64]);
        if let Some(shape) = row_scale_shape(layout) {
            part("row_scales", DType::F16, &shape);
        }
    }

    /// Bytes of each part of the file with `metadata` (general, model, tokenizer and provenance
    /// keys), if no part is to take more than `most`; of the whole file, if it takes no more.
    /// `path` is for messages.
    ///
    /// # Errors
    /// `InvalidArgument` for names, shapes or metadata that GGUF cannot hold, and where parts of
    /// that size cannot hold the metadata or would be too many.
    pub fn part_bytes(
        &self,
        path: &Path,
        metadata: &Metadata,
        most: Option<u64>,
    ) -> Result<Vec<u64>> {
        let parts = share_out(self, path, metadata, most)?;
        let bytes = |part: &FilePart| Ok(self.unhashed_header(path, metadata, part)?.file_bytes());
        parts.iter().map(bytes).collect()
    }

    pub(super) fn tensors(&self) -> &[NewTensor] {
        &self.tensors
    }

    /// The header of a part, with zeros for all hashes.
    pub(super) fn unhashed_header(
        &self,
        path: &Path,
        metadata: &Metadata,
        part: &FilePart,
    ) -> Result<HeaderWriter> {
        self.header(path, metadata, part, vec![0; part.tensors.len()])
    }

    /// The header of a part, all but the hashes of headers; `hashes` are those of its tensors.
    pub(super) fn header(
        &self,
        path: &Path,
        metadata: &Metadata,
        part: &FilePart,
        hashes: Vec<u64>,
    ) -> Result<HeaderWriter> {
        let mut described = Metadata::new();
        if part.number == 0 {
            described = metadata.clone();
            self.layers.describe(&mut described, part.version())?;
        }
        part.describe(&mut described, self.tensors.len())?;
        described.insert(keys::TENSOR_HASHES, Value::Array(Array::U64(hashes)))?;
        described.insert(keys::HEADER_HASH, Value::U64(0))?;
        HeaderWriter::new(path, &described, &self.tensors[part.tensors.clone()], ALIGNMENT)
    }
}

impl LayerTable {
    fn push(&mut self, name: &str, layout: &LayerLayout, error: Option<f32>) {
        let coding = match layout.coding() {
            ScaleCoding::Paper => 0,
            ScaleCoding::TwoLevel { .. } => 1,
            ScaleCoding::Trellis { .. } => 2,
        };
        let (sub_group, scale_bits) = layout.coding().sub_groups().unwrap_or_default();
        self.version = self.version.max(version_for(layout));
        self.name.push(name.to_owned());
        self.rows.push(layout.rows() as u32);
        self.cols.push(layout.cols() as u32);
        self.group_size.push(layout.group_size() as u32);
        self.coding.push(coding);
        self.sub_group.push(sub_group as u8);
        self.scale_bits.push(scale_bits);
        self.error.push(error.unwrap_or(-1.0));
    }

    /// Adds the columns, and the version of the file, which is `least` or more.
    fn describe(&self, metadata: &mut Metadata, least: u32) -> Result<()> {
        let version = self.version.max(least).max(FIRST_VERSION);
        metadata.insert(keys::VERSION, Value::U32(version))?;
        for (column, array) in [
            ("name", Array::String(self.name.clone())),
            ("rows", Array::U32(self.rows.clone())),
            ("cols", Array::U32(self.cols.clone())),
            ("group_size", Array::U32(self.group_size.clone())),
            ("coding", Array::U8(self.coding.clone())),
            ("sub_group", Array::U8(self.sub_group.clone())),
            ("scale_bits", Array::U8(self.scale_bits.clone())),
            ("error", Array::F32(self.error.clone())),
        ] {
            metadata.insert(keys::layers(column), Value::Array(array))?;
        }
        Ok(())
    }
}
