//! One input of a fuzzer.

use std::{path::Path, sync::OnceLock};

use slim_fuzz::{Folder, TARGETS};

/// Reads an input as the target `name` does.
pub fn run(name: &str, data: &[u8]) {
    static FOLDER: OnceLock<(tempfile::TempDir, Folder)> = OnceLock::new();
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target");
    let (_, folder) = FOLDER.get_or_init(|| {
        let root = tempfile::tempdir().expect("the fuzzer has a folder");
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
        let folder = Folder::new(root.path(), target, &tests);
        (root, folder)
    });
    (target.read)(data, folder);
}
