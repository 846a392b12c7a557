//! What the file says about where it comes from (section 7 of `docs/format.md`).

use std::{fs::File, io::Read, path::Path};

use sha2::{Digest, Sha256};
use slim_formats::{
    FormatError, HubCommit, ModelConfig, ModelSource, TokenizerSource, gguf::Metadata,
};
use slim_runtime::{Tokenizer, end_tokens};

use crate::{Calibration, Method, Result, Settings, Target, calibration::hex};

/// The commit that this build is of, if it was built in its repository.
pub const COMMIT: Option<&str> = option_env!("SLIMLLM_COMMIT");

/// Steps of training, of files that were trained.
pub(crate) const STEPS: &str = "slim.quantization.steps";

/// Of files whose calibration text was drawn from the model.
pub const DRAWN: &str = "slim.calibration.drawn";

/// The size that was to be met.
pub(crate) const TARGET_BYTES: &str = "slim.quantization.target_file_bytes";

/// What a part of the file may take.
pub(crate) const SPLIT: &str = "slim.quantization.split_max_bytes";

/// What decided how sums were rounded; not of methods that sum nothing up.
pub(crate) const INSTRUCTIONS: &str = "slim.quantization.instructions";

/// General, model, tokenizer and provenance keys; `instructions` are those of
/// [`Engine::instruction_path`](crate::Engine::instruction_path).
pub fn metadata(
    source: &dyn ModelSource,
    calibration: &Calibration,
    settings: &Settings,
    instructions: &str,
) -> Result<Metadata> {
    with_hashes(source, calibration, settings, instructions, sha256)
}

/// [`metadata()`] of the same size, with zeros for what takes long to find out.
pub fn unhashed_metadata(
    source: &dyn ModelSource,
    settings: &Settings,
    instructions: &str,
) -> Result<Metadata> {
    let hash = "0".repeat(64);
    let calibration =
        Calibration { samples: Vec::new(), text_sha256: hash.clone(), text: Vec::new() };
    with_hashes(source, &calibration, settings, instructions, |_| Ok((0, hash.clone())))
}

/// [`metadata()`] with a function that gives size and hash of a file.
fn with_hashes(
    source: &dyn ModelSource,
    calibration: &Calibration,
    settings: &Settings,
    instructions: &str,
    hash: impl Fn(&Path) -> std::io::Result<(u64, String)>,
) -> Result<Metadata> {
    let mut metadata = with_all_ends(source).to_gguf();
    tokenizer(source, &mut metadata)?;
    sources(source, hash, &mut metadata)?;
    if let Some(HubCommit { repository, commit }) = HubCommit::of(source.path()) {
        metadata.insert("slim.source.repository", repository)?;
        metadata.insert("slim.source.revision", commit)?;
    }
    metadata.insert("slim.quantization.tool", concat!("slimllm ", env!("CARGO_PKG_VERSION")))?;
    if let Some(commit) = COMMIT {
        metadata.insert("slim.quantization.commit", commit)?;
    }
    metadata.insert("slim.quantization.method", settings.method.name())?;
    match settings.target {
        None => metadata.insert("slim.quantization.bits", u32::from(settings.bits))?,
        Some(Target::BitsPerWeight(bits)) => {
            metadata.insert("slim.quantization.target_bits_per_weight", bits as f32)?;
        }
        Some(Target::FileBytes(bytes)) => {
            metadata.insert(TARGET_BYTES, bytes)?;
        }
    }
    if let Some(most) = settings.split_max_bytes {
        metadata.insert(SPLIT, most)?;
    }
    metadata.insert("slim.quantization.group_size", settings.group_size as u32)?;
    metadata.insert("slim.quantization.scales", settings.coding.name())?;
    if let Some((sub_group, scale_bits)) = settings.coding.sub_groups() {
        metadata.insert("slim.quantization.sub_group", sub_group as u32)?;
        metadata.insert("slim.quantization.scale_bits", u32::from(scale_bits))?;
    }
    if let Some(bits) = settings.embed_bits {
        metadata.insert("slim.quantization.embed_bits", u32::from(bits))?;
    }
    if settings.method != Method::RoundToNearest {
        metadata.insert(INSTRUCTIONS, instructions)?;
        metadata.insert("slim.quantization.seed", settings.seed)?;
        metadata.insert("slim.calibration.text_sha256", calibration.text_sha256.as_str())?;
        metadata.insert("slim.calibration.text_tokens", calibration.text.len() as u64)?;
        if settings.draws_text {
            metadata.insert(DRAWN, true)?;
        }
        metadata.insert("slim.calibration.samples", settings.samples as u32)?;
        metadata.insert("slim.calibration.context", settings.context as u32)?;
    }
    if settings.method == Method::SlimPlus {
        metadata.insert(STEPS, settings.steps as u32)?;
    }
    Ok(metadata)
}

/// The hyperparameters, with every token that ends what the model writes: so the file stops where
/// its source does, whoever reads it.
fn with_all_ends(source: &dyn ModelSource) -> ModelConfig {
    let mut config = source.config().clone();
    // Without a usable tokenizer only tokens by number are known.
    if let Ok(tokenizer) = Tokenizer::new(source.tokenizer()) {
        config.eos_token_ids = end_tokens(source, &tokenizer);
    }
    config
}

/// The source's tokenizer, whole, without the keys that the hyperparameters gave already.
fn tokenizer(source: &dyn ModelSource, metadata: &mut Metadata) -> Result<()> {
    match source.tokenizer() {
        TokenizerSource::HuggingFace(json) => {
            metadata.insert("tokenizer.huggingface.json", json.as_str())?;
        }
        TokenizerSource::Ggml(keys) => {
            for (key, value) in keys.iter() {
                if !metadata.contains(key) {
                    metadata.insert(key, value.clone())?;
                }
            }
        }
        TokenizerSource::Missing => {}
    }
    if let Some(template) = source.chat_template()
        && !metadata.contains("tokenizer.chat_template")
    {
        metadata.insert("tokenizer.chat_template", template)?;
    }
    Ok(())
}

/// The part of the metadata that tells a source: its format, and its files with their hashes.
///
/// # Errors
/// `Format` if a file cannot be read.
pub fn source_metadata(source: &dyn ModelSource) -> Result<Metadata> {
    let mut metadata = Metadata::new();
    sources(source, sha256, &mut metadata)?;
    Ok(metadata)
}

/// Names, sizes and hashes of the source files, in the order of their names.
fn sources(
    source: &dyn ModelSource,
    hash: impl Fn(&Path) -> std::io::Result<(u64, String)>,
    metadata: &mut Metadata,
) -> Result<()> {
    let mut files = source.files();
    files.sort();
    let (mut names, mut sizes, mut hashes) = (Vec::new(), Vec::new(), Vec::new());
    for path in &files {
        let name = path.file_name().unwrap_or_default();
        let (size, hash) = hash(path).map_err(|error| FormatError::io(path, "read", error))?;
        names.push(name.to_string_lossy().into_owned());
        sizes.push(size);
        hashes.push(hash);
    }
    metadata.insert("slim.source.format", source.format())?;
    metadata.insert("slim.source.files", names)?;
    metadata.insert("slim.source.bytes", slim_formats::gguf::Array::U64(sizes))?;
    metadata.insert("slim.source.sha256", hashes)?;
    Ok(())
}

fn sha256(path: &Path) -> std::io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((size, hex(&hasher.finalize()))),
            n => {
                hasher.update(&buffer[..n]);
                size += n as u64;
            }
        }
    }
}
