//! Models in several files, as `llama-gguf-split` writes them: `NAME-00001-of-00003.gguf`, ...,
//! each a GGUF file. The first has the metadata.

use std::path::Path;

use super::{GgufHeader, Metadata, Value, reader::open_part};
use crate::{
    FormatError, Limits, MappedFile, Result,
    locate::{NumberedFile, list},
};

/// What the keys begin with.
pub(crate) const PREFIX: &str = "split.";
/// The number of the file, counted from 0.
const NUMBER: &str = "split.no";
/// How many files there are.
const COUNT: &str = "split.count";
/// How many tensors are in all files.
pub(crate) const TENSOR_COUNT: &str = "split.tensors.count";

/// Says in the metadata of file `number`, counted from 0, that it is one of `count` with `tensors`
/// tensors in all, in the types that llama.cpp asks for.
///
/// # Errors
/// `Malformed` if the metadata says it already.
///
/// # Panics
/// If there are more files or tensors than those types can count.
pub(crate) fn describe(
    metadata: &mut Metadata,
    number: usize,
    count: usize,
    tensors: usize,
) -> Result<()> {
    let small = |number: usize| Value::U16(number.try_into().expect("files are few"));
    metadata.insert(NUMBER, small(number))?;
    metadata.insert(COUNT, small(count))?;
    metadata.insert(TENSOR_COUNT, Value::I32(tensors.try_into().expect("tensors are few")))
}

/// How many files a model is in, by the header of one.
pub(super) fn part_count(header: &GgufHeader) -> u64 {
    header.metadata().u64(COUNT).unwrap_or(1).max(1)
}

/// The files of the split model of which `path` is one, which has been opened.
///
/// # Errors
/// `OtherKind` if the name does not tell those of the others, `Missing` if they are not there,
/// `Malformed` if one belongs to another model; otherwise those of opening them.
pub(super) fn parts(
    path: &Path,
    opened: (MappedFile, GgufHeader),
    limits: &Limits,
) -> Result<Vec<(MappedFile, GgufHeader)>> {
    let count = part_count(&opened.1);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let folder = path.parent().unwrap_or(Path::new(""));
    let numbered = NumberedFile::of(&name).filter(|numbered| numbered.count as u64 == count);
    let Some(numbered) = numbered else {
        let found = format!("one of {count} parts under a name of its own");
        let expected = format!("names that end with `-00001-of-{count:05}.gguf` and so on");
        return Err(FormatError::other_kind(path, found, expected, "give the parts these names"));
    };
    let missing = numbered.missing_in(folder);
    if let Some(first) = missing.first() {
        let hint = format!("download what is missing: {}", list(&missing));
        let needed_for = format!("the model is in {count} files");
        return Err(FormatError::missing(folder.join(first), needed_for, hint));
    }
    let mut opened = Some(opened);
    let open = |number: usize| {
        let part = match number == numbered.number {
            true => opened.take().expect("each number comes once"),
            false => open_part(&folder.join(numbered.name_of(number)), limits)?,
        };
        check(&part, number, count)?;
        Ok(part)
    };
    (1..=numbered.count).map(open).collect()
}

/// Checks that a file says of itself that it is number `number`, counted from 1, of `count`.
fn check((map, header): &(MappedFile, GgufHeader), number: usize, count: u64) -> Result<()> {
    for (key, expected) in [(NUMBER, number as u64 - 1), (COUNT, count)] {
        let found = header.metadata().u64(key);
        if found != Some(expected) {
            let found = found.map_or("none".to_owned(), |found| found.to_string());
            let place = format!("key `{key}`");
            let error = FormatError::malformed(map.path(), place, "", found, expected.to_string());
            return Err(error.with_hint("it is another file than its name says; download it again"));
        }
    }
    Ok(())
}

/// Checks the number of tensors of all files, which the first one tells.
pub(super) fn check_tensor_count(path: &Path, joined: &GgufHeader) -> Result<()> {
    let (found, told) = (joined.tensors().len() as u64, joined.metadata().u64(TENSOR_COUNT));
    match told {
        Some(told) if told != found => {
            let place = format!("key `{TENSOR_COUNT}`");
            let expected = format!("{found}, the tensors of all its files");
            let error = FormatError::malformed(path, place, "", told, expected);
            Err(error.with_hint("a file of another model may be among them"))
        }
        _ => Ok(()),
    }
}
