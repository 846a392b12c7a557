//! The command that the provenance of a file stands for.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::Value as Json;
use slim_converter::{BUILT_IN_CALIBRATION, COMMIT, DRAWN};
use slim_formats::{
    NumberedFile,
    gguf::{Metadata, Value},
};
use slim_kernels::instruction_path;

use crate::{failure::advised, inspect::metadata_json, output::sha256};

/// What a part of a file may take, of files that are split where they take more.
const SPLIT: &str = "slim.quantization.split_max_bytes";

/// What a file says of how it was made.
pub struct Recipe {
    /// The file.
    path: PathBuf,
    /// The keys of its provenance.
    metadata: Metadata,
}

/// Names of the source's files.
pub fn source_files(metadata: &Metadata) -> &[String] {
    metadata.strings("slim.source.files").unwrap_or_default()
}

/// The id of the source on a hub, if it is from one. ONNX graphs are not fetched.
pub fn hub_source(metadata: &Metadata) -> Option<String> {
    if metadata.str("slim.source.format") == Some("onnx") {
        return None;
    }
    let repository = metadata.str("slim.source.repository")?;
    let commit = metadata.str("slim.source.revision")?;
    let gguf = source_files(metadata).iter().find(|name| name.ends_with(".gguf"));
    let gguf = gguf.map(|name| match NumberedFile::of(name) {
        Some(part) => format!(":{}", part.stem()),
        None => format!(":{name}"),
    });
    Some(format!("{repository}@{commit}{}", gguf.unwrap_or_default()))
}

/// SHA-256 of the calibration text, of methods that use one.
pub fn calibration_sha256(metadata: &Metadata) -> Option<&str> {
    metadata.str("slim.calibration.text_sha256")
}

impl Recipe {
    /// That of the file `path`, which has `metadata`.
    ///
    /// # Errors
    /// A sentence if it does not say how it was made.
    pub fn of(path: &Path, metadata: &Metadata) -> Result<Self> {
        let is_of_it = |key: &str| {
            ["slim.source.", "slim.quantization.", "slim.calibration."]
                .iter()
                .any(|prefix| key.starts_with(prefix))
        };
        let mut provenance = Metadata::new();
        for (key, value) in metadata.iter().filter(|(key, _)| is_of_it(key)) {
            provenance.insert(key, value.clone())?;
        }
        let recipe = Self { path: path.to_owned(), metadata: provenance };
        for key in ["slim.source.files", "slim.quantization.method"] {
            if !recipe.metadata.contains(key) {
                let message =
                    format!("`{}`: found no key `{key}`, expected how it was made", path.display());
                return Err(advised(message, "only files that `slimllm convert` wrote say it"));
            }
        }
        Ok(recipe)
    }

    /// The command that writes a file of the same name.
    pub fn command(&self, source: Option<&Path>, calibration: Option<&Path>) -> Vec<String> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let whole = match NumberedFile::of(&name) {
            Some(part) if self.metadata.contains(SPLIT) => format!("{}.gguf", part.stem()),
            _ => name.into_owned(),
        };
        self.command_to(source, calibration, Path::new(&whole))
    }

    /// The command that writes `output`; names stand for a source and a text that were not found.
    pub fn command_to(
        &self,
        source: Option<&Path>,
        calibration: Option<&Path>,
        output: &Path,
    ) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let source = source.map_or_else(|| self.source_name(), text);
        let mut command = ["slimllm", "convert"].map(str::to_owned).to_vec();
        command.extend([source, "-o".to_owned(), text(output)]);
        let mut add = |flag: &str, value: Option<String>| {
            command.extend(value.into_iter().flat_map(|value| [flag.to_owned(), value]));
        };
        let of = |key: &str| {
            let value = self.metadata.get(&format!("slim.{key}"))?;
            value.as_str().map(str::to_owned).or_else(|| number(value))
        };
        let is_reference = of("quantization.method").as_deref() == Some("reference");
        add("--method", of("quantization.method").filter(|_| !is_reference));
        add("--bits", of("quantization.bits"));
        add("--target-bpw", of("quantization.target_bits_per_weight"));
        add("--target-size", of("quantization.target_file_bytes"));
        add("--split-max-size", of("quantization.split_max_bytes"));
        add("--group-size", of("quantization.group_size"));
        if !is_reference {
            let scales = of("quantization.scales");
            // A trellis has scale codes of 4 bits, which nobody chooses.
            let has_choice = scales.as_deref() == Some("two-level");
            add("--scales", scales);
            add("--sub-group", of("quantization.sub_group"));
            add("--scale-bits", of("quantization.scale_bits").filter(|_| has_choice));
        }
        add("--embed-bits", of("quantization.embed_bits"));
        add("--samples", of("calibration.samples"));
        add("--context", of("calibration.context"));
        add("--seed", of("quantization.seed"));
        add("--steps", of("quantization.steps"));
        if self.is_drawn() {
            add("--calibration", Some("self".to_owned()));
        } else if self.needs_text() {
            add("--calibration", Some(calibration.map_or_else(|| "TEXT".to_owned(), text)));
        }
        if let Some(instructions) = of("quantization.instructions") {
            let device = if instructions.contains("+cuda_") { "cuda" } else { "cpu" };
            add("--device", Some(device.to_owned()));
        }
        if is_reference {
            command.push("--reference".to_owned());
        }
        command
    }

    /// Whether it takes a calibration text that is neither this build's own nor drawn.
    pub fn needs_text(&self) -> bool {
        let found = calibration_sha256(&self.metadata);
        found.is_some_and(|found| !is_built_in(found)) && !self.is_drawn()
    }

    /// Whether the calibration text was drawn from the source.
    fn is_drawn(&self) -> bool {
        self.metadata.contains(DRAWN)
    }

    /// The names of the source's files, for messages.
    pub fn source_names(&self) -> String {
        format!("`{}`", source_files(&self.metadata).join("`, `"))
    }

    /// What stands for the source in a command.
    fn source_name(&self) -> String {
        let names = source_files(&self.metadata);
        let file = names.iter().find(|name| name.ends_with(".gguf") || name.ends_with(".onnx"));
        file.cloned().unwrap_or_else(|| "SOURCE".to_owned())
    }

    /// What the command does not say: lines for people.
    pub fn notes(&self) -> Vec<String> {
        let text = |key: &str| self.metadata.str(key).unwrap_or("not told").to_owned();
        let hashes = self.metadata.strings("slim.source.sha256").unwrap_or_default();
        let files = source_files(&self.metadata).iter().zip(hashes);
        let mut notes: Vec<_> =
            files.map(|(name, hash)| format!("source        {name}, sha256 {hash}")).collect();
        if let Some(hash) = calibration_sha256(&self.metadata) {
            let whose = match is_built_in(hash) {
                true => ", built in",
                false if self.is_drawn() => ", drawn from the source",
                false => "",
            };
            notes.push(format!("calibration   sha256 {hash}{whose}"));
        }
        let commit = text("slim.quantization.commit");
        notes.push(format!("tool          {}, commit {commit}", text("slim.quantization.tool")));
        notes.push(format!("instructions  {}", text("slim.quantization.instructions")));
        notes
    }

    /// Why this build, here, may write other bytes.
    pub fn obstacles(&self) -> Vec<String> {
        let ours = [
            ("slim.quantization.tool", concat!("slimllm ", env!("CARGO_PKG_VERSION")).to_owned()),
            ("slim.quantization.commit", COMMIT.unwrap_or("not told").to_owned()),
            ("slim.quantization.instructions", instruction_path()),
        ];
        let differs = |(key, ours): (&str, String)| {
            let theirs = self.metadata.str(key).filter(|theirs| *theirs != ours)?;
            // A device's is known when it is opened.
            let is_known = !theirs.contains("+cuda_");
            is_known.then(|| format!("`{key}` is `{theirs}`, and `{ours}` here: bytes may differ"))
        };
        ours.into_iter().filter_map(differs).collect()
    }

    /// Its keys and values.
    pub fn provenance(&self) -> Json {
        metadata_json(&self.metadata)
    }
}

fn is_built_in(sha256_of_text: &str) -> bool {
    sha256_of_text == sha256(BUILT_IN_CALIBRATION.as_bytes())
}

/// A number as a user types it: what is stored as an f32 was read from a short decimal.
fn number(value: &Value) -> Option<String> {
    match value {
        Value::F32(value) => Some(value.to_string()),
        value => value.as_u64().map(|value| value.to_string()),
    }
}
