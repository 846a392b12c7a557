//! Hugging Face model directories: `config.json`, safetensors files, a tokenizer.

mod fp8;
mod index;
mod mxfp4;
mod scales;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use crate::{
    DType, Decoder, FormatError, Layout, ModelConfig, ModelSource, Part, Result, TokenizerSource,
    Weight,
    arch::Tensor,
    folder::{Description, Folder},
    locate::{self, Weights},
    places::{self, Fixed, floats},
    shapes::{self, Spelling},
};
use index::{Parts, Shards, StoredTensor, Table};

/// A model in a Hugging Face directory.
#[derive(Debug)]
pub struct HfDirectory {
    path: PathBuf,
    config: ModelConfig,
    decoder: Decoder,
    shards: Shards,
    /// By Hugging Face's names.
    stored: Table,
    /// Vectors that are not used as they are stored.
    fixed: Fixed,
    tokenizer: TokenizerSource,
    chat_template: Option<String>,
    files: Vec<PathBuf>,
    warnings: Vec<String>,
}

impl HfDirectory {
    /// Opens a directory, or one `.safetensors` file with the `config.json` and the tokenizer
    /// beside it.
    ///
    /// `model.safetensors` is preferred to the shards of `model.safetensors.index.json`. Of a
    /// model's root in a hub's cache it is the snapshot of `refs/main`. Links are followed, since
    /// the hub's cache consists of them; a shard's name cannot leave the directory.
    ///
    /// What is stored counts. A `tie_word_embeddings` or `quantization_config` that it contradicts
    /// is one of the [`warnings`](ModelSource::warnings).
    ///
    /// # Errors
    /// `Io`; `Missing` and `OtherKind` where files or all of a model are missing; `Malformed` if a
    /// file contradicts its format or the others; `Unsupported` if the model needs what this
    /// program does not compute, is quantized, or holds a tensor that it does not know.
    pub fn open(path: &Path) -> Result<Self> {
        let snapshot = locate::snapshot(path)?;
        let path = snapshot.as_deref().unwrap_or(path);
        let weights = match path.is_dir() {
            true => locate::weights_in(path)?,
            false => {
                locate::refuse_part(path)?;
                Weights::Single(path.to_owned())
            }
        };
        let mut folder = Folder::around(path);
        let Description {
            mut config,
            tokenizer,
            chat_template,
            quantization,
            is_part,
            mut warnings,
        } = folder.description()?;
        let method = quantization.as_deref();
        let mut parts = Parts::new(is_part);
        let (shards, mut stored) = match weights {
            Weights::Single(file) => Shards::open_one(&file, &mut parts, method)?,
            Weights::Index(index_path) => {
                let index = folder.json(locate::INDEX)?.unwrap_or_default();
                Shards::open_index(folder.root(), &index_path, &index, &mut parts, method)?
            }
        };
        warnings.extend(parts.warning(path));
        fp8::attach_scales(path, &shards, &mut stored)?;
        mxfp4::attach_scales(path, &mut stored)?;
        let is_quantized = stored.values().any(|tensor| tensor.dtype.is_quantized());
        if let Some(method) = method.filter(|_| !is_quantized) {
            warnings.push(format!(
                "`{}`: `quantization_config` ({method}) is left over: the weights are stored plainly, \
                 and read as they are",
                folder.config_path().display()
            ));
        }
        warnings.extend(settle_output(&shards, &mut stored, &mut config, folder.config_path()));
        check_derived(path, &shards, &mut stored, &config)?;
        find_fused_experts(&stored, &mut config);
        let decoder = Decoder::new(&config);
        let blocks = config.family.hf_blocks();
        let names = stored.keys().map(String::as_str);
        warnings.extend(places::guessing_left_out(path, &decoder, blocks, names));
        stored.retain(|name, _| !decoder.is_of_guessing(blocks, name));
        refuse_unknown(path, &stored, &decoder)?;
        refuse_mixed_experts(path, &stored, &decoder)?;
        let mut files = folder.into_read();
        files.extend(shards.paths());
        shapes::check(path, &config, &decoder, Spelling::HuggingFace, |place| {
            Ok(stored.get(&place.name).map(|tensor| (tensor.rows, tensor.cols)))
        })?;
        let fixed = places::fixed(
            path,
            &decoder,
            |tensor| &tensor.hf,
            |place| {
                let tensor = stored.get(&place.name)?;
                Some((tensor.dtype, shards.bytes_of(tensor)))
            },
        )?;
        let path = path.to_owned();
        Ok(Self {
            path,
            config,
            decoder,
            shards,
            stored,
            fixed,
            tokenizer,
            chat_template,
            files,
            warnings,
        })
    }
}

impl ModelSource for HfDirectory {
    fn path(&self) -> &Path {
        &self.path
    }

    fn format(&self) -> &'static str {
        "safetensors"
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn tensor_names(&self) -> Vec<&str> {
        let stored = |tensor: &&Tensor| self.stored.contains_key(&tensor.hf.name);
        self.decoder.tensors().iter().filter(stored).map(|tensor| tensor.name.as_str()).collect()
    }

    fn tensor(&self, name: &str) -> Result<Option<Weight<'_>>> {
        let Some(known) = self.decoder.find(name) else { return Ok(None) };
        if let Some(fixed) = self.fixed.get(name) {
            return Ok(Some(fixed));
        }
        let Some(stored) = self.stored.get(&known.hf.name) else { return Ok(None) };
        let bytes = self.shards.bytes_of(stored);
        let scales = stored.scales.as_ref().map(|scales| scales.view(&self.shards));
        Ok(Some(places::rows_of(known, &known.hf, stored.dtype, bytes, scales)))
    }

    fn tokenizer(&self) -> &TokenizerSource {
        &self.tokenizer
    }

    fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    fn files(&self) -> Vec<PathBuf> {
        self.files.clone()
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn release_pages(&self) {
        self.shards.release_pages();
    }
}

/// Leaves out an output projection that is the embedding, and says where `tie_word_embeddings` is
/// wrong about it.
fn settle_output(
    shards: &Shards,
    stored: &mut Table,
    config: &mut ModelConfig,
    config_path: &Path,
) -> Option<String> {
    let [output_name, embedding_name] =
        [Part::Output, Part::Embedding].map(|part| config.family.hf_name(part));
    let is_said_tied = config.tied_embeddings;
    let output = stored.get(&*output_name);
    let is_embedding = |output: &StoredTensor| {
        stored.get(&*embedding_name).is_some_and(|embedding| {
            (output.dtype, output.rows) == (embedding.dtype, embedding.rows)
                && shards.bytes_of(output) == shards.bytes_of(embedding)
        })
    };
    config.tied_embeddings = match output {
        None => true,
        Some(output) => is_said_tied && is_embedding(output),
    };
    let found = match (is_said_tied, config.tied_embeddings) {
        (true, false) => {
            format!("true, but the stored `{output_name}` is another matrix, which is used")
        }
        (false, true) => {
            format!("false, but no `{output_name}` is stored: the embedding is used for it")
        }
        (true, true) => {
            stored.remove(&*output_name);
            return None;
        }
        (false, false) => return None,
    };
    Some(format!("`{}`: `tie_word_embeddings` is {found}", config_path.display()))
}

/// Finds out whether the matrices of experts are in one tensor for all, as newer releases of
/// transformers write them, and whether that is in MXFP4.
fn find_fused_experts(stored: &Table, config: &mut ModelConfig) {
    if let Some(experts) = &mut config.features.experts {
        let mut names = stored.iter();
        let fused = names.find(|(name, _)| name.ends_with("mlp.experts.gate_up_proj"));
        experts.are_fused = fused.is_some();
        experts.are_mxfp4 = fused.is_some_and(|(_, tensor)| tensor.dtype == DType::F4_E2M1);
    }
}

/// Takes out what follows from the configuration, RoPE frequencies in old checkpoints, once it
/// agrees.
///
/// They are those before or after scaling: releases of transformers differ.
fn check_derived(
    path: &Path,
    shards: &Shards,
    stored: &mut Table,
    config: &ModelConfig,
) -> Result<()> {
    const SUFFIX: &str = "rotary_emb.inv_freq";
    let pairs = config.rope.factors.len();
    let theta = f64::from(config.rope.theta);
    let frequency = |pair: usize| theta.powf(-(pair as f64) / pairs as f64);
    // Half precision keeps three digits, and of the smallest numbers fewer.
    let agrees =
        |found: f32, expected: f64| (f64::from(found) - expected).abs() <= 0.01 * expected + 1e-7;
    for (name, tensor) in stored.extract_if(|name, _| name.ends_with(SUFFIX)) {
        let values = floats(tensor.dtype, shards.bytes_of(&tensor)).unwrap_or_default();
        let is_of_rope = |factor: &dyn Fn(usize) -> f64| {
            values.len() == pairs
                && (0..pairs).all(|pair| agrees(values[pair], frequency(pair) / factor(pair)))
        };
        if !is_of_rope(&|_| 1.0) && !is_of_rope(&|pair| config.rope.factors[pair].into()) {
            let expected = format!("those of the RoPE base {theta} in `config.json`");
            let place = format!("tensor `{name}`");
            let hint = "correct `config.json`; or, if it is right, save the model with a current \
                        transformers, which leaves this tensor out";
            return Err(FormatError::malformed(path, place, "", "other frequencies", expected)
                .with_hint(hint));
        }
    }
    Ok(())
}

/// Refuses experts of which only some matrices are in MXFP4, which lie otherwise than plain ones,
/// and scales of matrices that are stored column by column.
fn refuse_mixed_experts(path: &Path, stored: &Table, decoder: &Decoder) -> Result<()> {
    for tensor in decoder.tensors().iter().filter(|tensor| tensor.is_matrix()) {
        let (Part::Expert(..), Some(block), Some(found)) =
            (tensor.part, tensor.block, stored.get(&tensor.hf.name))
        else {
            continue;
        };
        let are_mxfp4 = decoder.blocks[block].experts.is_some_and(|experts| experts.are_mxfp4);
        let is_mixed = (found.dtype == DType::F4_E2M1) != are_mxfp4;
        let is_transposed = matches!(tensor.hf.layout, Layout::Transposed { .. });
        if is_mixed || is_transposed && found.scales.is_some() {
            let (name, dtype) = (&tensor.hf.name, found.dtype);
            let kind = if are_mxfp4 { "in MXFP4" } else { "in plain types" };
            let what = format!("tensor `{name}` of type {dtype:?} in a model with experts {kind}");
            return Err(FormatError::unsupported(path, what, ""));
        }
    }
    Ok(())
}

/// Refuses tensors that would be ignored.
fn refuse_unknown(path: &Path, stored: &Table, decoder: &Decoder) -> Result<()> {
    let known = places::by_stored_name(decoder, |tensor| &tensor.hf);
    match stored.keys().filter(|name| !known.contains_key(name.as_str())).min() {
        None => Ok(()),
        Some(name) => {
            let blocks = decoder.blocks.len();
            let what = format!("tensor `{name}` of a model with {blocks} blocks");
            Err(FormatError::unsupported(path, what, ""))
        }
    }
}
