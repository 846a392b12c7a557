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
    file::{Fault, keys},
    layout::PackedLayer,
    outline::Outline,
    verify,
};
use crate::{
    AtomicFile, DType, FormatError, Result,
    gguf::{Metadata, NewTensor},
};

/// Collects layers and dense tensors; see the module documentation.
pub struct SlimWriter {
    target: PathBuf,
    spool: BufWriter<File>,
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
            outline: Outline::default(),
            hashes: Vec::new(),
        })
    }

    /// Adds a dense tensor of type F32, F16 or BF16 (F7); `shape` is outermost first.
    ///
    /// # Errors
    /// `Io` if the disk is full; `Malformed` for a second tensor of that name; `InvalidArgument` for
    /// numbers that are not finite (F9, F22).
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

    /// Writes the header with `metadata` (general, model, tokenizer and provenance keys) and all data, and puts the
    /// file in place.
    ///
    /// # Errors
    /// `Io`, or `Malformed` for metadata that GGUF cannot hold.
    pub fn finish(self, metadata: Metadata) -> Result<WrittenFile> {
        let mut header = self.outline.header(&self.target, metadata, self.hashes)?;
        let hash = xxh3_64(header.unpadded());
        header.set_u64(keys::HEADER_HASH, hash);

        let spool_error = |e| FormatError::io(&self.target, "copy the tensor data", e);
        let mut spool = self.spool.into_inner().map_err(|e| spool_error(e.into_error()))?;
        spool.seek(SeekFrom::Start(0)).map_err(spool_error)?;
        let mut out = AtomicFile::create(&self.target)?;
        out.write_all(header.bytes()).map_err(spool_error)?;
        for (tensor, offset) in self.outline.tensors().iter().zip(header.tensor_offsets()) {
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

    /// Writes the data of the next tensor of the outline.
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let NewTensor { dtype, shape, .. } = &self.outline.tensors()[self.hashes.len()];
        assert_eq!(dtype.size_in_bytes(shape.iter().product()), Some(bytes.len() as u64));
        self.hashes.push(xxh3_64(bytes));
        self.spool
            .write_all(bytes)
            .map_err(|e| FormatError::io(&self.target, "write the tensor data", e))
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

fn pad_to(out: &mut AtomicFile, offset: u64) -> std::io::Result<()> {
    let position = out.stream_position()?;
    std::io::copy(&mut std::io::repeat(0).take(offset.saturating_sub(position)), out).map(drop)
}
