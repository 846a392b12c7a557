//! Writes a SliM file while its layers are being made.
//!
//! The header comes first, but holds what is known last (bit-widths, hashes, errors). What it takes
//! is known before, though: room for it is left, and it is written last. The target appears, whole,
//! when [`SlimWriter::finish`] returns. Once the widths are known, it can be split into parts, each
//! of which is written so.

use std::{
    collections::HashSet,
    fs,
    io::{Read, Seek, SeekFrom, Write},
    path::PathBuf,
};

use xxhash_rust::xxh3::xxh3_64;

use super::{
    file::{ALIGNMENT, Fault, keys},
    layout::PackedLayer,
    outline::Outline,
    parts::{FilePart, parts_beside, share_out},
    verify,
};
use crate::{
    AtomicFile, DType, FormatError, OutputPath, Result,
    gguf::{HeaderWriter, Metadata, NewTensor},
};

/// Collects layers and dense tensors; see the module documentation.
pub struct SlimWriter {
    target: PathBuf,
    replaces: bool,
    metadata: Metadata,
    /// The parts of the file, or the whole file.
    parts: Vec<PartWriter>,
    /// Regular files that the parts take the place of, whatever their names.
    replaced: Vec<PathBuf>,
    names: HashSet<String>,
    outline: Outline,
    /// Of the tensors whose data has been written.
    hashes: Vec<u64>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenFile {
    /// Where it is: one path, or those of its parts.
    pub paths: Vec<PathBuf>,
    /// Size of the file, of all parts.
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
        let whole = FilePart::whole(planned.tensors().len());
        let header = planned.unhashed_header(target.path, &metadata, &whole)?;
        let parts = vec![PartWriter::create(target, whole, &header)?];
        Ok(Self {
            target: target.path.to_owned(),
            replaces: target.replaces,
            metadata,
            parts,
            replaced: Vec::new(),
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
        self.parts[0].out.reserve(bytes)
    }

    /// Splits the file into parts of at most `most` bytes, if it takes more, before its first
    /// tensor is added, and reserves their room. `exact` is what was planned, with the widths that
    /// the layers will have. If the target may be replaced, so may whatever has the name of a part
    /// of it.
    ///
    /// # Errors
    /// As [`Outline::part_bytes`], [`AtomicFile::create`] and [`AtomicFile::reserve`].
    pub fn split(&mut self, most: u64, exact: &Outline) -> Result<()> {
        assert!(self.hashes.is_empty(), "nothing is written yet");
        let parts = share_out(exact, &self.target, &self.metadata, Some(most))?;
        if self.replaces {
            let named = parts_beside(&self.target).into_iter().chain([self.target.clone()]);
            let is_file =
                |path: &PathBuf| path.symlink_metadata().is_ok_and(|found| found.is_file());
            self.replaced = named.filter(is_file).collect();
        }
        // Gives back the room that was reserved for the whole.
        self.parts.clear();
        for part in parts {
            let path = part.path(&self.target);
            let header = exact.unhashed_header(&path, &self.metadata, &part)?;
            let output = OutputPath { path: &path, replaces: self.replaces };
            let mut part = PartWriter::create(output, part, &header)?;
            part.out.reserve(header.file_bytes())?;
            self.parts.push(part);
        }
        Ok(())
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

    /// Writes the headers, and puts the file in place. Of an earlier one that it replaces, whole or
    /// in other parts, nothing stays.
    ///
    /// # Errors
    /// `Io`, or `InvalidArgument` for other tensors than were planned.
    pub fn finish(mut self) -> Result<WrittenFile> {
        let planned = self.parts.last().map_or(0, |part| part.part.tensors.end);
        if self.hashes.len() != planned {
            let what = format!("`{}`: tensors", self.target.display());
            return Err(FormatError::invalid_argument(
                what,
                self.hashes.len(),
                planned.to_string(),
            ));
        }
        let (mut bytes, mut next) = (0, None);
        // From the last, whose hash the one before it has.
        for PartWriter { path, part, out, header_bytes } in self.parts.iter_mut().rev() {
            let hashes = self.hashes[part.tensors.clone()].to_vec();
            let mut header = self.outline.header(path, &self.metadata, part, hashes)?;
            if header.bytes().len() != *header_bytes {
                let what = format!("`{}`: bytes of the header", path.display());
                let (found, expected) = (header.bytes().len(), header_bytes.to_string());
                return Err(FormatError::invalid_argument(what, found, expected));
            }
            if let Some(next) = next {
                header.set_u64(keys::NEXT_HASH, next);
            }
            let hash = xxh3_64(header.unpadded());
            header.set_u64(keys::HEADER_HASH, hash);
            write_header(out, &header).map_err(|e| FormatError::io(path, "write the header", e))?;
            bytes += header.file_bytes();
            next = Some(hash);
        }
        let (paths, files): (Vec<_>, Vec<_>) =
            self.parts.into_iter().map(|part| (part.path, part.out)).unzip();
        AtomicFile::commit_all(files)?;
        for path in self.replaced.iter().filter(|path| !paths.contains(path)) {
            // What stays is no part of the file: it is there, whole.
            let _ = fs::remove_file(path);
        }
        Ok(WrittenFile { paths, bytes })
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
        // What was not planned goes to the last part; `finish` refuses it.
        let ends_before = |part: &PartWriter| part.part.tensors.end <= self.hashes.len();
        let index = self.parts.partition_point(ends_before).min(self.parts.len() - 1);
        self.hashes.push(xxh3_64(bytes));
        let PartWriter { path, out, .. } = &mut self.parts[index];
        let append = |out: &mut AtomicFile| {
            out.write_all(bytes)?;
            pad(out)
        };
        append(out).map_err(|e| FormatError::io(path, "write the tensor data", e))
    }
}

/// One of the files that are written.
struct PartWriter {
    path: PathBuf,
    part: FilePart,
    out: AtomicFile,
    /// Bytes that are left for its header.
    header_bytes: usize,
}

impl PartWriter {
    /// Leaves room for `header`.
    fn create(output: OutputPath<'_>, part: FilePart, header: &HeaderWriter) -> Result<Self> {
        let (path, header_bytes) = (output.path.to_owned(), header.bytes().len());
        let mut out = AtomicFile::create(output)?;
        out.seek(SeekFrom::Start(header_bytes as u64))
            .map_err(|e| FormatError::io(&path, "leave room for the header", e))?;
        Ok(Self { path, part, out, header_bytes })
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
