//! Writes a SliM file while its layers are being made.
//!
//! The header comes first, but holds what is known last (bit-widths, hashes, errors). What it takes
//! is known before, though: room for it is left, and it is written last. The target appears, whole,
//! when [`SlimWriter::finish`] returns.

use std::{
    collections::HashSet,
    io::{Read, Seek, SeekFrom, Write},
    path::PathBuf,
};

use xxhash_rust::xxh3::xxh3_64;

use super::{
    file::{ALIGNMENT, Fault, keys},
    layout::PackedLayer,
    outline::Outline,
    verify,
};
use crate::{
    AtomicFile, DType, FormatError, OutputPath, Result,
    gguf::{HeaderWriter, Metadata, NewTensor},
};

/// Collects layers and dense tensors; see the module documentation.
pub struct SlimWriter {
    target: PathBuf,
    out: AtomicFile,
    metadata: Metadata,
    header_bytes: usize,
    names: HashSet<String>,
    outline: Outline,
    /// Of the tensors whose data has been written.
    hashes: Vec<u64>,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrittenFile {
    /// Size of the file.
    pub bytes: u64,
}

impl SlimWriter {
    /// Prepares to write `target`, which is left as it is until [`Self::finish`], with `metadata`
    /// (general, model, tokenizer and provenance keys). `planned` has the tensors that will be
    /// added; only bit-widths and errors of its layers may differ.
    ///
    /// # Errors
    /// As [`AtomicFile::create`], or `Malformed` for metadata that GGUF cannot hold.
    pub fn create<'p>(
        target: impl Into<OutputPath<'p>>,
        planned: &Outline,
        metadata: Metadata,
    ) -> Result<Self> {
        let target = target.into();
        let mut out = AtomicFile::create(target)?;
        let hashes = vec![0; planned.tensors().len()];
        let header = planned.header(target.path, metadata.clone(), hashes)?;
        let header_bytes = header.bytes().len();
        out.seek(SeekFrom::Start(header_bytes as u64))
            .map_err(|e| FormatError::io(target.path, "leave room for the header", e))?;
        Ok(Self {
            target: target.path.to_owned(),
            out,
            metadata,
            header_bytes,
            names: HashSet::new(),
            outline: Outline::default(),
            hashes: Vec::new(),
        })
    }

    /// Reserves room for a file of `bytes` bytes.
    ///
    /// # Errors
    /// As [`AtomicFile::reserve`].
    pub fn reserve(&mut self, bytes: u64) -> Result<()> {
        self.out.reserve(bytes)
    }

    /// Adds a dense tensor of type F32, F16 or BF16 (F7); `shape` is outermost first.
    ///
    /// # Errors
    /// `Io` if the disk is full; `Malformed` for a second tensor of that name; `InvalidArgument`
    /// for numbers that are not finite (F9, F22).
    ///
    /// # Panics
    /// If `bytes` does not fill `shape`.
    pub fn dense(&mut self, name: &str, dtype: DType, shape: &[u64], bytes: &[u8]) -> Result<()> {
        self.claim(name)?;
        refuse(verify::value_fault(name, dtype, bytes))?;
        self.outline.dense(name, dtype, shape);
        self.append(bytes)
    }

    /// Adds a quantized layer with its relative output error (`None` if it was not measured).
    ///
    /// # Errors
    /// As [`Self::dense`].
    pub fn layer(&mut self, name: &str, layer: &PackedLayer, error: Option<f32>) -> Result<()> {
        self.claim(name)?;
        refuse(verify::scale_fault(name, layer.view()))?;
        refuse(verify::layer_error_fault(name, error))?;
        let layout = layer.layout();
        self.outline.layer(name, layout, error);
        let bits: Vec<u8> = layout.groups().iter().map(|group| group.bit_width.bits()).collect();
        let (codes, scales, row_scales) = layer.parts();
        self.append(&bits)?;
        self.append(codes)?;
        self.append(scales)?;
        if !row_scales.is_empty() {
            self.append(row_scales)?;
        }
        Ok(())
    }

    /// Writes the header, and puts the file in place.
    ///
    /// # Errors
    /// `Io`, or `InvalidArgument` for other tensors than were planned.
    pub fn finish(mut self) -> Result<WrittenFile> {
        let mut header = self.outline.header(&self.target, self.metadata, self.hashes)?;
        if header.bytes().len() != self.header_bytes {
            let what = format!("`{}`: bytes of the header", self.target.display());
            let (found, expected) = (header.bytes().len(), self.header_bytes.to_string());
            return Err(FormatError::invalid_argument(what, found, expected));
        }
        let hash = xxh3_64(header.unpadded());
        header.set_u64(keys::HEADER_HASH, hash);
        write_header(&mut self.out, &header)
            .map_err(|e| FormatError::io(&self.target, "write the header", e))?;
        self.out.commit()?;
        Ok(WrittenFile { bytes: header.file_bytes() })
    }

    fn claim(&mut self, name: &str) -> Result<()> {
        if self.names.insert(name.to_owned()) {
            return Ok(());
        }
        let place = format!("tensor `{name}`");
        Err(FormatError::malformed(&self.target, place, "F7", "a second one", "unique names"))
    }

    /// Writes the data of the next tensor of the outline.
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let NewTensor { dtype, shape, .. } = &self.outline.tensors()[self.hashes.len()];
        assert_eq!(dtype.size_in_bytes(shape.iter().product()), Some(bytes.len() as u64));
        self.hashes.push(xxh3_64(bytes));
        let append = |out: &mut AtomicFile| {
            out.write_all(bytes)?;
            pad(out)
        };
        append(&mut self.out).map_err(|e| FormatError::io(&self.target, "write the tensor data", e))
    }
}

/// What would break a rule is not written.
fn refuse(fault: Option<Fault>) -> Result<()> {
    match fault {
        None => Ok(()),
        Some(Fault { rule, place, found, expected }) => Err(FormatError::InvalidArgument {
            what: place,
            found,
            expected: format!("{expected} (rule {rule})"),
        }),
    }
}

fn write_header(out: &mut AtomicFile, header: &HeaderWriter) -> std::io::Result<()> {
    debug_assert_eq!(out.stream_position()?, header.file_bytes());
    out.seek(SeekFrom::Start(0))?;
    out.write_all(header.bytes())
}

/// Zeros up to where the next tensor starts.
fn pad(out: &mut AtomicFile) -> std::io::Result<()> {
    let position = out.stream_position()?;
    let padding = position.next_multiple_of(ALIGNMENT.into()) - position;
    std::io::copy(&mut std::io::repeat(0).take(padding), out).map(drop)
}
