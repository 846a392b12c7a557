//! SliM files in several parts (F27): how tensors are shared out over them, and what they are
//! called.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use super::{
    file::{PARTS_VERSION, keys},
    outline::Outline,
};
use crate::{
    FormatError, Result,
    gguf::{GgufFile, Metadata, Value, split},
    locate::NumberedFile,
    temporary::folder_of,
};

/// Parts of a file at most: all are open at the same time, while they are written.
const MAX_PARTS: usize = 256;

/// What the names of parts end with.
const EXTENSION: &str = "gguf";

/// One of the files that a SliM file is stored in, or the only one.
#[derive(Debug, Clone)]
pub(super) struct FilePart {
    /// Counted from 0.
    pub number: usize,
    /// How many there are.
    pub count: usize,
    /// Its tensors, by their places in the outline.
    pub tensors: Range<usize>,
}

impl FilePart {
    /// The only one, with all of `tensors` tensors.
    pub fn whole(tensors: usize) -> Self {
        Self { number: 0, count: 1, tensors: 0..tensors }
    }

    /// Its place in a file that is called `path`.
    pub fn path(&self, path: &Path) -> PathBuf {
        match self.count {
            1 => path.to_owned(),
            count => {
                let stem = stem(path);
                let name = NumberedFile::first(&stem, EXTENSION, count).name_of(self.number + 1);
                path.with_file_name(name)
            }
        }
    }

    /// Adds what its metadata says of the parts, of which a whole file says nothing; `tensors` are
    /// those of all parts. The hash of the part behind it is 0 as yet.
    pub fn describe(&self, metadata: &mut Metadata, tensors: usize) -> Result<()> {
        if self.count > 1 {
            split::describe(metadata, self.number, self.count, tensors)?;
        }
        if self.number + 1 < self.count {
            metadata.insert(keys::NEXT_HASH, Value::U64(0))?;
        }
        Ok(())
    }

    /// The least version of a file of such parts (F2).
    pub fn version(&self) -> u32 {
        if self.count > 1 { PARTS_VERSION } else { 0 }
    }
}

/// The parts of a file of at most `most` bytes each, the whole file if it takes no more. A part
/// takes more only if it holds a single tensor.
///
/// # Errors
/// As [`Outline::part_bytes`].
pub(super) fn share_out(
    outline: &Outline,
    path: &Path,
    metadata: &Metadata,
    most: Option<u64>,
) -> Result<Vec<FilePart>> {
    let all = outline.tensors().len();
    let whole = FilePart::whole(all);
    let bytes = |part: &FilePart| Ok(outline.unhashed_header(path, metadata, part)?.file_bytes());
    let Some(most) = most else { return Ok(vec![whole]) };
    if bytes(&whole)? <= most {
        return Ok(vec![whole]);
    }
    let refused = |found: String, expected: String| {
        let what = format!("`{}`: parts of at most {most} bytes", path.display());
        FormatError::invalid_argument(what, found, expected)
    };
    // With it, each part but the last has the keys that it is to have; how many there are changes
    // no size.
    let of = |number, tensors| FilePart { number, count: MAX_PARTS + 1, tensors };
    let metadata_bytes = bytes(&of(0, 0..0))?;
    if metadata_bytes > most {
        let found = format!("{metadata_bytes} bytes of metadata, which are not cut");
        return Err(refused(found, "parts that hold it".to_owned()));
    }
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let mut next = 0;
    while next < all {
        let number = ranges.len();
        if number == MAX_PARTS {
            let found = format!("more than {MAX_PARTS}");
            return Err(refused(found, format!("at most {MAX_PARTS}: larger ones")));
        }
        let ends: Vec<usize> = (next + 1..=all).collect();
        let fits = |&end: &usize| bytes(&of(number, next..end)).is_ok_and(|bytes| bytes <= most);
        let fitting = ends.partition_point(fits);
        let end = next + if number == 0 { fitting } else { fitting.max(1) };
        ranges.push(next..end);
        next = end;
    }
    let count = ranges.len();
    let part = |(number, tensors)| FilePart { number, count, tensors };
    Ok(ranges.into_iter().enumerate().map(part).collect())
}

/// The files beside `path` that are called as parts of a file of this name are, however many; by
/// their names.
pub fn parts_beside(path: &Path) -> Vec<PathBuf> {
    let stem = stem(path);
    let is_part = |name: &String| {
        NumberedFile::of(name).is_some_and(|NumberedFile { number, count, .. }| {
            NumberedFile::first(&stem, EXTENSION, count).name_of(number) == *name
        })
    };
    let entries = std::fs::read_dir(folder_of(path)).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut parts: Vec<_> = names.filter(is_part).map(|name| path.with_file_name(name)).collect();
    parts.sort();
    parts
}

/// What the names of the parts of a file begin with.
fn stem(path: &Path) -> String {
    let has_extension = path.extension().is_some_and(|found| found == EXTENSION);
    let name = if has_extension { path.file_stem() } else { path.file_name() };
    name.unwrap_or_default().to_string_lossy().into_owned()
}

/// F27: the parts of a file belong together; `version` is that of the file.
pub(super) fn check(gguf: &GgufFile, version: u64) -> Result<()> {
    let parts: Vec<_> = gguf.parts().collect();
    if parts.len() == 1 {
        return Ok(());
    }
    let first = parts[0];
    let malformed = |path: &Path, key: &str, found: String, expected: String| {
        Err(FormatError::malformed(path, format!("key `{key}`"), "F27", found, expected))
    };
    if version < PARTS_VERSION.into() {
        let expected = format!("{PARTS_VERSION} in a file in {} parts", parts.len());
        return malformed(first.path(), keys::VERSION, version.to_string(), expected);
    }
    if first.header().metadata().u64(split::TENSOR_COUNT).is_none() {
        let expected = format!("{}, the tensors of all parts", gguf.tensors().len());
        return malformed(first.path(), split::TENSOR_COUNT, "none".to_owned(), expected);
    }
    for pair in parts.windows(2) {
        let [this, next] = [pair[0], pair[1]];
        let told = this.header().metadata().u64(keys::NEXT_HASH);
        let found = next.header().metadata().u64(keys::HEADER_HASH);
        if told.is_none() {
            let expected = "the hash of the next part".to_owned();
            return malformed(this.path(), keys::NEXT_HASH, "none".to_owned(), expected);
        }
        if told != found {
            let shown =
                |hash: Option<u64>| hash.map_or("none".into(), |hash| format!("{hash:016x}"));
            let place = format!("key `{}`", keys::HEADER_HASH);
            let expected = format!("{}, as the part before it says", shown(told));
            let found = shown(found);
            let error = FormatError::malformed(next.path(), place, "F27", found, expected);
            let hint = "one of the two is a part of another conversion; fetch or copy all parts \
                        again";
            return Err(error.with_hint(hint));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::{super::refusals::*, *};
    use crate::{
        DType, ModelSource, OutputPath,
        slim::{SlimFile, SlimWriter},
    };

    /// What a part may take: three are needed.
    const MOST: u64 = 2200;

    /// A writer of the small file in parts, with everything in it.
    fn writer(folder: &TempDir, name: &str, replaces: bool) -> Result<SlimWriter> {
        let output = OutputPath { path: &folder.path().join(name), replaces };
        let mut writer = SlimWriter::create(output, &planned(), metadata())?;
        writer.split(MOST, &planned())?;
        fill(&mut writer);
        Ok(writer)
    }

    /// The small file in parts, alone in its folder.
    fn split_file() -> (TempDir, Vec<PathBuf>) {
        let folder = tempfile::tempdir().unwrap();
        let written = writer(&folder, "small.slim.gguf", false).unwrap().finish().unwrap();
        (folder, written.paths)
    }

    fn name(part: usize) -> String {
        format!("small.slim-{part:05}-of-00003.gguf")
    }

    #[test]
    fn file_in_parts_is_the_whole_one_whichever_part_is_opened() {
        let (folder, paths) = split_file();
        let (_whole_folder, whole) = small_file();
        let whole = SlimFile::open(&whole).unwrap();
        assert_eq!(paths, [1, 2, 3].map(|part| folder.path().join(name(part))));
        for path in &paths {
            assert!(fs::metadata(path).unwrap().len() <= MOST);
            let file = SlimFile::open(path).unwrap();
            assert_eq!((broken_rules(&file), file.files()), (vec![], paths.clone()));
            read_everything(&file);
            assert_eq!(file.given_metadata(), whole.given_metadata());
            let tensors = |file: &SlimFile| -> Vec<_> {
                let gguf = file.gguf();
                let tensors = gguf.tensors().iter();
                tensors.map(|info| (info.name.clone(), gguf.bytes_of(info).to_vec())).collect()
            };
            assert!(tensors(&file) == tensors(&whole));
        }
    }

    #[test]
    fn parts_hold_what_fits_and_a_larger_tensor_has_one_of_its_own() {
        let mut outline = Outline::default();
        let sizes = [64, 64, 4096, 64, 1024, 1024, 1024];
        for (index, &bytes) in sizes.iter().enumerate() {
            outline.dense(&format!("t{index}"), DType::F32, &[bytes / 4]);
        }
        let parts = |most| share_out(&outline, "a".as_ref(), &Metadata::new(), Some(most));
        let found: Vec<_> = parts(2900).unwrap().into_iter().map(|part| part.tensors).collect();
        assert_eq!(found, [0..2, 2..3, 3..6, 6..7]);
        // A first part that has nothing but the metadata, which is not cut.
        let mut metadata = Metadata::new();
        metadata.insert("tokenizer.huggingface.json", "x".repeat(2000)).unwrap();
        let parts = |most| share_out(&outline, "a".as_ref(), &metadata, Some(most));
        let first = outline.part_bytes("a".as_ref(), &metadata, Some(3300)).unwrap()[0];
        assert_eq!(parts(first - 1).unwrap()[0].tensors, 0..1);
        let alone = outline.unhashed_header(
            "a".as_ref(),
            &metadata,
            &FilePart { number: 0, count: 9, tensors: 0..0 },
        );
        let alone = alone.unwrap().file_bytes();
        assert_eq!(parts(alone).unwrap()[0].tensors, 0..0);
        let error = parts(alone - 1).unwrap_err().to_string();
        assert!(error.contains("bytes of metadata, which are not cut"), "{error}");
        // Too many.
        (0..300).for_each(|index| outline.dense(&format!("u{index}"), DType::F32, &[1024]));
        let error = share_out(&outline, "a".as_ref(), &Metadata::new(), Some(6000)).unwrap_err();
        assert!(error.to_string().contains("found more than 256, expected at most 256"), "{error}");
    }

    /// Replaces a part by what `change` makes of it, with hashes of its own that fit.
    fn change(paths: &[PathBuf], part: usize, change: impl Fn(&mut Draft)) {
        let mut draft = Draft::of_part(&GgufFile::open(&paths[0]).unwrap(), part);
        change(&mut draft);
        fs::write(&paths[part], draft.bytes()).unwrap();
    }

    #[test]
    fn parts_that_do_not_belong_together_are_refused() {
        let refused = |expected: &str, damage: &dyn Fn(&[PathBuf])| {
            let (_folder, paths) = split_file();
            damage(&paths);
            for path in &paths {
                let error = SlimFile::open_without_hashes(path).err().expect(expected);
                assert_eq!(culprit(&error), expected, "{error}");
            }
        };
        refused("F27", &|paths| change(paths, 0, |d| d.set(keys::VERSION, 3u32)));
        refused("F27", &|paths| change(paths, 0, |d| d.remove(split::TENSOR_COUNT)));
        refused("F27", &|paths| change(paths, 0, |d| d.remove(keys::NEXT_HASH)));
        refused("F27", &|paths| change(paths, 1, |d| d.remove(keys::NEXT_HASH)));
        refused("F27", &|paths| change(paths, 0, |d| d.set(keys::NEXT_HASH, 1u64)));
        // A part of another conversion: whatever differs, its header has another hash.
        refused("F27", &|paths| change(paths, 1, |d| d.set("general.name", "another")));
        refused("F27", &|paths| change(paths, 2, |d| d.set("general.name", "another")));
        refused("malformed", &|paths| change(paths, 0, |d| d.set(split::TENSOR_COUNT, 9u32)));
        refused("malformed", &|paths| _ = fs::copy(&paths[2], &paths[1]).unwrap());
        refused("F1", &|paths| change(paths, 1, |d| d.alignment = 32));
        let (_folder, paths) = split_file();
        fs::remove_file(&paths[1]).unwrap();
        let error = SlimFile::open(&paths[0]).err().unwrap();
        assert!(matches!(error, FormatError::Missing { .. }), "{error}");
        assert!(error.to_string().contains(&name(2)), "{error}");
    }

    #[test]
    fn part_with_any_byte_of_its_header_changed_is_refused() {
        let (_folder, paths) = split_file();
        for (part, path) in paths.iter().enumerate() {
            let valid = fs::read(path).unwrap();
            let gguf = GgufFile::open(path).unwrap();
            let header = gguf.parts().nth(part).unwrap().header_bytes().len();
            for position in 0..header {
                let mut bytes = valid.clone();
                bytes[position] ^= 1 << (position % 8);
                // Not in place: the file is mapped.
                fs::remove_file(path).unwrap();
                fs::write(path, &bytes).unwrap();
                assert!(SlimFile::open(&paths[0]).is_err(), "part {part}, byte {position}");
                if let Ok(file) = SlimFile::open_without_hashes(&paths[0]) {
                    read_everything(&file);
                    assert!(!broken_rules(&file).is_empty());
                }
            }
            fs::remove_file(path).unwrap();
            fs::write(path, &valid).unwrap();
        }
    }

    #[test]
    fn damaged_tensor_is_found_and_the_part_named() {
        let (_folder, paths) = split_file();
        let mut bytes = fs::read(&paths[1]).unwrap();
        let offset = GgufFile::open(&paths[1]).unwrap().parts().nth(1).unwrap().tensors()[0].offset;
        bytes[offset as usize] ^= 1;
        fs::write(&paths[1], bytes).unwrap();
        let file = SlimFile::open_without_hashes(&paths[0]);
        let Ok(file) = file else { return assert!(SlimFile::open(&paths[0]).is_err()) };
        let fault = file.verify().into_iter().find(|fault| fault.rule == "F18").unwrap();
        assert!(fault.place.ends_with(&format!(" in `{}`", name(2))), "{}", fault.place);
    }

    #[test]
    fn parts_take_their_names_together_and_replace_what_was_there_only_if_asked() {
        let (folder, paths) = split_file();
        let before: Vec<_> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
        assert!(matches!(
            writer(&folder, "small.slim.gguf", false),
            Err(FormatError::Exists { .. })
        ));
        // Of an earlier file of this name, whole or in other parts; the last two are others.
        let stale = ["small.slim.gguf", "small.slim-00002-of-00007.gguf"];
        let others = ["small.slim-2-of-7.gguf", "small-00001-of-00002.gguf"];
        for name in stale.iter().chain(&others) {
            fs::write(folder.path().join(name), "before").unwrap();
        }
        drop(writer(&folder, "small.slim.gguf", true).unwrap());
        assert_eq!(names_in(&folder).len(), 7);
        writer(&folder, "small.slim.gguf", true).unwrap().finish().unwrap();
        let mut names = names_in(&folder);
        names.sort();
        assert_eq!(names, [others[1], &name(1), &name(2), &name(3), others[0]]);
        let after: Vec<_> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
        assert!(before == after, "equal input gives equal bytes");
    }

    #[test]
    fn file_that_takes_no_more_than_a_part_may_stays_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("small.slim.gguf");
        let mut writer = SlimWriter::create(&path, &planned(), metadata()).unwrap();
        writer.split(1 << 20, &planned()).unwrap();
        fill(&mut writer);
        assert_eq!(writer.finish().unwrap().paths, std::slice::from_ref(&path));
        assert!(fs::read(small_file().1).unwrap() == fs::read(path).unwrap());
    }
}
