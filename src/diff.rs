//! `slimllm diff`: what differs between two files.

mod describe;
mod weights;

use std::{collections::BTreeSet, path::Path};

use anyhow::Result;
use slim_formats::{ModelSource, gguf::Value, slim::LayerInfo};

use crate::{
    Outcome,
    args::DiffArgs,
    fetch::locate,
    inspect::Contents,
    open::open,
    output::{print, print_json},
    progress::Progress,
};

pub fn run(args: &DiffArgs) -> Result<Outcome> {
    let difference = Difference::between(&args.a, &args.b)?;
    args.page.write(&[args.a.clone(), args.b.clone()], || describe::html(&difference))?;
    match args.json {
        true => print_json(describe::json(&difference))?,
        false => print(&describe::text(&difference))?,
    }
    Ok(if difference.is_none() { Outcome::Done } else { Outcome::No })
}

/// What differs between two files, `A` and `B`, in this order everywhere.
pub struct Difference {
    files: [File; 2],
    /// Keys whose values differ, or that one of them lacks.
    metadata: Vec<(String, [Option<Value>; 2])>,
    /// Weights of the model that differ, or that one of them lacks.
    weights: Vec<WeightDifference>,
    /// How many are the same.
    same_weights: usize,
    /// Layers of both whose groups differ.
    layers: Vec<LayerDifference>,
}

/// One of the files.
struct File {
    name: String,
    format: &'static str,
    bytes: u64,
}

/// A weight of the model that differs.
struct WeightDifference {
    name: String,
    /// Its type and bits per weight.
    stored: [Option<(String, f64)>; 2],
    /// `|A - B|^2 / |B|^2`; `None` where shapes differ, or one of them lacks it.
    error: Option<f64>,
}

/// A layer whose groups differ.
struct LayerDifference {
    name: String,
    groups: Groups,
}

enum Groups {
    /// Shapes or group sizes, which leave no groups to compare.
    Layouts([String; 2]),
    /// Groups, first and last column, and widths.
    Widths(Vec<(usize, [usize; 2], [u8; 2])>),
}

impl Difference {
    fn between(a: &Path, b: &Path) -> Result<Self> {
        let paths = [locate(a, false)?, locate(b, false)?];
        // What cannot be opened has weights that nobody has compared: no answer, not "the same".
        let sources = [open(&paths[0])?, open(&paths[1])?];
        let (weights, same_weights) = differing_weights([&*sources[0], &*sources[1]])?;
        let contents = [Contents::read(&paths[0])?, Contents::read(&paths[1])?];
        let files = [(a, &contents[0]), (b, &contents[1])].map(|(path, contents)| File {
            name: path.display().to_string(),
            format: contents.format,
            bytes: contents.file_bytes,
        });
        let [ours, theirs] = &contents;
        Ok(Self {
            files,
            metadata: differing_metadata(&contents),
            weights,
            same_weights,
            layers: differing_layers(ours.layers(), theirs.layers()),
        })
    }

    /// Whether there is none.
    fn is_none(&self) -> bool {
        self.metadata.is_empty() && self.weights.is_empty() && self.layers.is_empty()
    }
}

/// Keys that say again what layers and tensors are, or their hashes, or which part a file is.
fn is_derived(key: &str) -> bool {
    ["slim.layers.", "slim.tensors.", "slim.header.", "slim.next.", "split."]
        .iter()
        .any(|start| key.starts_with(start))
}

fn differing_metadata([a, b]: &[Contents; 2]) -> Vec<(String, [Option<Value>; 2])> {
    let keys: BTreeSet<&str> =
        a.metadata.iter().chain(b.metadata.iter()).map(|(key, _)| key).collect();
    let values = |key: &str| [a, b].map(|file| file.metadata.get(key).cloned());
    keys.into_iter()
        .filter(|key| !is_derived(key))
        .map(|key| (key.to_owned(), values(key)))
        .filter(|(_, [a, b])| a != b)
        .collect()
}

/// The weights that differ, and how many do not.
fn differing_weights(sources: [&dyn ModelSource; 2]) -> Result<(Vec<WeightDifference>, usize)> {
    let names: Vec<BTreeSet<&str>> =
        sources.iter().map(|source| source.tensor_names().into_iter().collect()).collect();
    let mut progress = Progress::new("tensor", names[0].union(&names[1]).count());
    let (mut differing, mut same, mut done) = (Vec::new(), 0, 0);
    let mut compared = weights::Comparison::new(sources);
    for name in sources[0].tensor_names().into_iter().chain(names[1].difference(&names[0]).copied())
    {
        let stored = [0, 1]
            .map(|i| sources[i].tensor(name).ok().flatten().map(|weight| weights::stored(weight)));
        let error = compared.error(name)?;
        done += 1;
        progress.step(done, name);
        if error == Some(0.0) {
            same += 1;
            continue;
        }
        differing.push(WeightDifference { name: name.to_owned(), stored, error });
    }
    progress.finish();
    Ok((differing, same))
}

/// The layers of both that have other groups.
fn differing_layers(ours: &[LayerInfo], theirs: &[LayerInfo]) -> Vec<LayerDifference> {
    let of_name = |name: &str| theirs.iter().find(|layer| layer.name == name);
    let pairs = ours.iter().filter_map(|ours| Some((ours, of_name(&ours.name)?)));
    pairs
        .filter_map(|(ours, theirs)| {
            let groups = differing_groups(ours, theirs)?;
            Some(LayerDifference { name: ours.name.clone(), groups })
        })
        .collect()
}

fn differing_groups(ours: &LayerInfo, theirs: &LayerInfo) -> Option<Groups> {
    let layouts = [ours, theirs].map(|layer| {
        let layout = &layer.layout;
        format!("{} x {}, groups of {}", layout.rows(), layout.cols(), layout.group_size())
    });
    if layouts[0] != layouts[1] {
        return Some(Groups::Layouts(layouts));
    }
    let pairs = ours.layout.groups().iter().zip(theirs.layout.groups()).enumerate();
    let differing: Vec<_> = pairs
        .filter(|(_, (ours, theirs))| ours.bit_width != theirs.bit_width)
        .map(|(index, (ours, theirs))| {
            let cols = [ours.cols.start, ours.cols.end - 1];
            (index, cols, [ours.bit_width.bits(), theirs.bit_width.bits()])
        })
        .collect();
    (!differing.is_empty()).then_some(Groups::Widths(differing))
}
