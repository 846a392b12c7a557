//! Every file of test data is listed in `tests/data/MANIFEST.md` with its origin, licence and hash.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

fn sha256(path: &Path) -> String {
    let digest = Sha256::digest(fs::read(path).unwrap());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The rows of the table: file to (origin, licence, hash).
fn rows(manifest: &str) -> BTreeMap<&str, [&str; 3]> {
    let rows = manifest.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| {
        let (file, rest) = row.split_once("` | ").unwrap();
        let columns: Vec<&str> = rest.trim_end_matches(" |").split(" | ").collect();
        (file, columns.try_into().unwrap_or_else(|_| panic!("{file}: four columns")))
    })
    .collect()
}

#[test]
fn manifest_lists_every_file_with_its_hash() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
    let manifest = fs::read_to_string(folder.join("MANIFEST.md")).unwrap();
    let rows = rows(&manifest);
    for (file, [origin, licence, hash]) in &rows {
        assert_eq!(sha256(&folder.join(file)), *hash, "{file}");
        assert!(!origin.is_empty() && !licence.is_empty(), "{file}");
    }
    for path in files_below(&folder) {
        let name = path.strip_prefix(&folder).unwrap().to_str().unwrap().replace('\\', "/");
        assert!(name == "MANIFEST.md" || rows.contains_key(&*name), "{name} is not listed");
    }
}
