//! `slimllm inspect`: what a file holds.

mod contents;
mod html;
mod json;
mod text;
mod verify;

use std::{path::Path, slice};

use anyhow::Result;
use serde_json::json;
use slim_formats::{FormatError, slim::Fault};

pub use self::{
    contents::Contents,
    json::{metadata as metadata_json, value as value_json},
    text::preview,
};
use crate::{
    Outcome,
    args::InspectArgs,
    fetch::locate,
    output::{print, print_json},
};

pub fn run(args: &InspectArgs) -> Result<Outcome> {
    let path = locate(&args.file, false)?;
    let contents = match Contents::read(&path) {
        Err(FormatError::Malformed { place, rule, found, expected, .. }) if args.verify => {
            return report_unreadable(Fault { rule, place, found, expected }, args);
        }
        contents => contents?,
    };
    let is_verified = args.verify || args.page.html.is_some();
    let faults = is_verified.then(|| contents.verify()).transpose()?;
    args.page.write(slice::from_ref(&args.file), || {
        let name = args.file.file_name().unwrap_or(args.file.as_os_str()).to_string_lossy();
        html::report(&contents, &name, faults.as_deref().unwrap_or_default())
    })?;
    match args.json {
        true => print_json(json::document(&contents, faults.as_deref(), args.metadata))?,
        false => print(&describe(&contents, faults.as_deref(), args))?,
    }
    Ok(outcome(&faults.unwrap_or_default()))
}

/// The answer of `--verify` for a file that cannot even be opened.
fn report_unreadable(fault: Fault, args: &InspectArgs) -> Result<Outcome> {
    let faults = [fault];
    match args.json {
        true => print_json(json!({ "faults": json::faults(&faults) }))?,
        false => print(&text::faults(&faults))?,
    }
    Ok(outcome(&faults))
}

fn describe(contents: &Contents, faults: Option<&[Fault]>, args: &InspectArgs) -> String {
    let parts = [
        Some(text::summary(contents)),
        args.tensors.then(|| text::tensors(contents)),
        args.bits.then(|| text::bit_widths(contents)),
        args.metadata.then(|| text::metadata(contents)),
        faults.map(|faults| match faults {
            [] => text::no_faults(contents),
            faults => text::faults(faults),
        }),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join("\n")
}

fn outcome(faults: &[Fault]) -> Outcome {
    if faults.is_empty() { Outcome::Done } else { Outcome::No }
}

/// Sum of the sizes of files.
fn total_bytes<P: AsRef<Path>>(files: &[P]) -> Result<u64, FormatError> {
    let size = |path: &Path| match std::fs::metadata(path) {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) => Err(FormatError::io(path, "read the size of the file", error)),
    };
    files.iter().map(|path| size(path.as_ref())).sum()
}
