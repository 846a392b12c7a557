//! `slimllm reproduce`: the command that made a file, and whether it makes the same bytes again.

mod compare;
mod recipe;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Parser;
use serde_json::{Value as Json, json};
use slim_converter::{BUILT_IN_CALIBRATION, source_metadata};
use slim_formats::{
    TemporaryFolder,
    gguf::{GgufFile, Metadata},
    slim::parts_beside,
};

use self::{
    compare::differences,
    recipe::{Recipe, calibration_sha256, hub_source, source_files},
};
use crate::{
    Outcome,
    args::{Args, Command, ReproduceArgs},
    convert,
    failure::advised,
    open::{open, read_text},
    output::{note, print, print_json, sha256, warn},
};

pub fn run(args: &ReproduceArgs) -> Result<Outcome> {
    let file = GgufFile::open(&args.file)?;
    let recipe = Recipe::of(&args.file, file.metadata())?;
    let source = find_source(args, file.metadata())?;
    let calibration = calibration(args, file.metadata())?;
    let command = recipe.command(source.as_deref(), calibration.as_deref());
    if args.run {
        require_inputs(args, &recipe, source.as_deref(), calibration.as_deref())?;
    }
    if !args.json {
        print(&format!("{}\n", shell_line(&command)))?;
        recipe.notes().iter().for_each(note);
    }
    recipe.obstacles().iter().for_each(|obstacle| warn(obstacle));
    let found = match &source {
        Some(source) if args.run => Some(repeat(args, &file, &recipe, source, calibration)?),
        _ => None,
    };
    if args.json {
        print_json(document(&command, &recipe, found.as_deref()))?;
    } else if let Some(found) = &found {
        print(&match &found[..] {
            [] => "\nthe same bytes\n".to_owned(),
            found => format!("\nother bytes:\n{}", found.iter().map(line).collect::<String>()),
        })?;
    }
    Ok(match found {
        Some(found) if !found.is_empty() => Outcome::No,
        _ => Outcome::Done,
    })
}

/// The command that the `metadata` of a file stands for, as a shell takes it.
pub fn command_of(file: &Path, metadata: &Metadata) -> Result<String> {
    Ok(shell_line(&Recipe::of(file, metadata)?.command(None, None)))
}

fn line(difference: &String) -> String {
    format!("- {difference}\n")
}

/// Checks that all is there that the command takes.
fn require_inputs(
    args: &ReproduceArgs,
    recipe: &Recipe,
    source: Option<&Path>,
    calibration: Option<&Path>,
) -> Result<()> {
    let shown = args.file.display();
    if source.is_none() {
        let message = format!("`{shown}`: its source, {}, was not found", recipe.source_names());
        return Err(advised(message, "say where it is with `--source PATH`"));
    }
    if calibration.is_none() && recipe.needs_text() {
        let message = format!("`{shown}` was calibrated on a text of its own");
        return Err(advised(message, "say where it is with `--calibration FILE`"));
    }
    Ok(())
}

/// Runs the command into a temporary folder; gives what differs.
fn repeat(
    args: &ReproduceArgs,
    file: &GgufFile,
    recipe: &Recipe,
    source: &Path,
    calibration: Option<PathBuf>,
) -> Result<Vec<String>> {
    let folder = TemporaryFolder::beside(&args.file)?;
    let output = folder.path().join("repeated.slim.gguf");
    let mut command = recipe.command_to(Some(source), calibration.as_deref(), &output);
    command.extend(["--quiet".into(), "--max-memory".into(), args.max_memory.to_string()]);
    let Command::Convert(convert_args) = Args::try_parse_from(&command)?.command else {
        bail!("`{}`: no conversion made it", args.file.display());
    };
    convert::run(&convert_args)?;
    let parts = parts_beside(&output);
    differences(file, &GgufFile::open(parts.first().unwrap_or(&output))?)
}

/// Where the source is: where the user says, on the hub that it is from, beside the file, or in the
/// current folder. It must be the one that the file names, for which a hub is asked to run it only.
fn find_source(args: &ReproduceArgs, metadata: &Metadata) -> Result<Option<PathBuf>> {
    if let Some(path) = &args.source {
        return match other_source(path, metadata)? {
            None => Ok(Some(path.clone())),
            Some(difference) => bail!("`{}` is another source: {difference}", path.display()),
        };
    }
    if let Some(id) = hub_source(metadata).map(PathBuf::from) {
        let difference = if args.run { other_source(&id, metadata)? } else { None };
        return match difference {
            None => Ok(Some(id)),
            Some(difference) => bail!("`{}` is another source: {difference}", id.display()),
        };
    }
    let beside = args.file.parent().unwrap_or(Path::new(""));
    for folder in [beside, Path::new(".")] {
        let Some(path) = in_folder(folder, metadata) else { continue };
        match other_source(&path, metadata)? {
            None => return Ok(Some(path)),
            Some(difference) => note(format_args!(
                "`{}` is named as the source is, but is another one: {difference}",
                path.display()
            )),
        }
    }
    Ok(None)
}

/// What in a folder is named as the source is: a model's file, or the folder itself.
fn in_folder(folder: &Path, metadata: &Metadata) -> Option<PathBuf> {
    let names = source_files(metadata);
    if !names.iter().all(|name| folder.join(name).is_file()) {
        return None;
    }
    let file = names.iter().find(|name| name.ends_with(".gguf") || name.ends_with(".onnx"));
    Some(match file {
        Some(name) => folder.join(name),
        None if folder == Path::new("") => PathBuf::from("."),
        None => folder.to_owned(),
    })
}

/// How a source differs from the one that a file names; `None` if it is that one.
fn other_source(path: &Path, metadata: &Metadata) -> Result<Option<String>> {
    let found = source_metadata(&*open(path)?)?;
    let shown = |value: Option<&slim_formats::gguf::Value>| match value {
        Some(value) => format!("{value:?}"),
        None => "nothing".to_owned(),
    };
    let difference = found.iter().find(|(key, value)| metadata.get(key) != Some(value));
    Ok(difference.map(|(key, value)| {
        format!("`{key}` is {}, expected {}", shown(Some(value)), shown(metadata.get(key)))
    }))
}

/// The calibration text that the user names, which must be the one that the file names.
fn calibration(args: &ReproduceArgs, metadata: &Metadata) -> Result<Option<PathBuf>> {
    let Some(path) = &args.calibration else { return Ok(None) };
    let (found, expected) = (sha256(read_text(path)?.as_bytes()), calibration_sha256(metadata));
    let expected = expected.unwrap_or("none, for nothing was calibrated");
    if found != expected {
        bail!(
            "`{}` is another calibration text: found sha256 {found}, expected {expected}",
            path.display()
        );
    }
    Ok((found != sha256(BUILT_IN_CALIBRATION.as_bytes())).then(|| path.clone()))
}

fn document(command: &[String], recipe: &Recipe, found: Option<&[String]>) -> Json {
    json!({
        "command": command,
        "provenance": recipe.provenance(),
        "differences": found,
    })
}

/// Words as a shell takes them.
fn shell_line(words: &[String]) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    let quoted = |word: &String| match !word.is_empty() && word.chars().all(is_plain) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    };
    words.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_would_read_them_otherwise() {
        let words = ["slimllm", "a b", "it's", "", "--bits"].map(str::to_owned);
        assert_eq!(shell_line(&words), "slimllm 'a b' 'it'\\''s' '' --bits");
    }
}
