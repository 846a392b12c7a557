//! The functions that fuzzers run (`fuzz/`), on stable Rust: over a small corpus and over seeded
//! mutations of it. None may panic, take long, or allocate much more than its input has; and a SliM
//! file that is opened with its hashes checked has the weights that it was written with.
//!
//! `SLIMLLM_TEST_MUTATIONS` says how many mutations each function gets.

mod mutation;
#[path = "../../fuzz/src/lib.rs"]
mod targets;

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use peak_alloc::PeakAlloc;

use mutation::Mutations;
use targets::{Folder, TARGETS, Target};

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

/// Mutations for each function, unless the environment says otherwise.
const MUTATIONS: u64 = 1000;

/// What a function may allocate besides the bytes of its input.
const ALLOWED_BYTES: usize = 64 << 20;

/// A function that takes longer hangs, for all that a user knows.
const SOON: Duration = Duration::from_secs(10);

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// The inputs that a target starts from: a sound one, and what was found before.
fn seeds(target: &Target) -> Vec<Vec<u8>> {
    let found = fs::read_dir(data("fuzz/found").join(target.name)).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = found.map(|entry| entry.path()).collect();
    paths.sort();
    paths.insert(0, data(target.seed));
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

#[test]
fn mutated_files_are_refused_or_read_without_harm() {
    let mutations = std::env::var("SLIMLLM_TEST_MUTATIONS");
    let mutations = mutations.map_or(MUTATIONS, |text| text.parse().unwrap());
    let only = std::env::var("SLIMLLM_TEST_FUZZ_TARGET").ok();
    for target in &TARGETS {
        let name = target.name;
        if only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        let start = Instant::now();
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::new(root.path(), target, &data(""));
        let seeds = seeds(target);
        let sound = (target.read)(&seeds[0], &folder);
        assert!(sound.is_some(), "{name}: the first seed is sound");
        let mut read = 0;
        for (index, input) in seeds.iter().cloned().chain(mutated(&seeds, mutations)).enumerate() {
            let answer = harmless(name, index, &input, || (target.read)(&input, &folder));
            read += u64::from(answer.is_some());
            // The hashes let nothing else through.
            if name == "slim" && answer.is_some() && answer != sound {
                panic!("slim, input {index}: other weights; {}", kept(name, index, &input));
            }
        }
        println!("{name}: {mutations} mutations, {read} read, {:.1?}", start.elapsed());
    }
}

/// Mutations of the seeds in turn.
fn mutated(seeds: &[Vec<u8>], count: u64) -> impl Iterator<Item = Vec<u8>> {
    let mut mutations = Mutations::new(0);
    (0..count).map(move |index| mutations.of(&seeds[index as usize % seeds.len()]))
}

/// Runs a function on an input, which is kept if it does harm.
fn harmless(
    name: &str,
    index: usize,
    input: &[u8],
    run: impl FnOnce() -> Option<u64>,
) -> Option<u64> {
    let before = ALLOCATED.current_usage();
    ALLOCATED.reset_peak_usage();
    let start = Instant::now();
    let answer = catch_unwind(AssertUnwindSafe(run));
    let time = start.elapsed();
    let allocated = ALLOCATED.peak_usage().saturating_sub(before);
    let harm = match &answer {
        Err(_) => Some("a panic".to_owned()),
        Ok(_) if time > SOON => Some(format!("{time:?}")),
        Ok(_) if allocated > input.len() + ALLOWED_BYTES => Some(format!("{allocated} bytes")),
        Ok(_) => None,
    };
    match harm {
        Some(harm) => panic!("{name}, input {index}: {harm}; {}", kept(name, index, input)),
        None => answer.unwrap_or_default(),
    }
}

/// Where an input is kept for a closer look, and for `tests/data/fuzz/found`.
fn kept(name: &str, index: usize, input: &[u8]) -> String {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    let path = folder.join(format!("{name}-{index}"));
    fs::create_dir_all(&folder).and_then(|()| fs::write(&path, input)).unwrap();
    format!("it is `{}`", path.display())
}
