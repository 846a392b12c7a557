//! Hyperparameters as GGUF metadata.

use std::{cell::RefCell, collections::HashSet, path::Path};

use super::{
    ModelConfig, Rope,
    keys::{is_about, is_harmless_in_gguf},
    rope_pairs,
};
use crate::{
    FormatError, Generation, Result, arch,
    gguf::{Array, Metadata, Value},
    special_tokens::{END_IDS_KEY, GGML_END_KEYS, SpecialTokens},
};

const DEFAULT_ROPE_THETA: f64 = 10000.0;

impl ModelConfig {
    /// Reads the standard keys of the `llama` architecture.
    ///
    /// `rope_factors` are the values of the tensor `rope_freqs.weight`, if the file has one. Only
    /// the tensors tell whether the embeddings are tied, so `tied_embeddings` is false here and the
    /// caller's to set.
    ///
    /// # Errors
    /// `Malformed` if a key is missing, has a value of the wrong kind, or contradicts its other
    /// spelling; `Unsupported` for another architecture, for what this program does not compute,
    /// and for a key of the architecture or of RoPE that nothing here reads.
    pub fn from_gguf(
        path: &Path,
        metadata: &Metadata,
        rope_factors: Option<Vec<f32>>,
    ) -> Result<Self> {
        let keys = Keys { path, metadata, asked: RefCell::default() };
        let architecture = keys.require("general.architecture", "a string", Value::as_str)?;
        let Some(family) = arch::by_architecture(architecture) else {
            return keys.unsupported(format!("architecture `{architecture}`"));
        };
        let hidden_size = keys.size("llama.embedding_length")?;
        let head_count = keys.size("llama.attention.head_count")?;
        let head_dim = match keys.optional_size("llama.attention.key_length")? {
            Some(head_dim) => head_dim,
            None => hidden_size.checked_div(head_count).unwrap_or(0),
        };
        for key in ["llama.attention.value_length", "llama.rope.dimension_count"] {
            if let Some(found) = keys.optional_size(key)?
                && found != head_dim
            {
                return keys
                    .unsupported(format!("`{key}` {found} beside a head size of {head_dim}"));
            }
        }
        let vocab_size = read_vocab_size(&keys)?;
        let mut config = Self {
            family,
            name: keys.optional("general.name", "a string", Value::as_str)?.map(str::to_owned),
            block_count: keys.size("llama.block_count")?,
            hidden_size,
            ffn_size: keys.size("llama.feed_forward_length")?,
            head_count,
            kv_head_count: keys
                .optional_size("llama.attention.head_count_kv")?
                .unwrap_or(head_count),
            head_dim,
            vocab_size,
            context_length: keys.size("llama.context_length")?,
            norm_epsilon: keys.require(EPSILON_KEY, "a float", Value::as_f64)? as f32,
            rope: read_rope(&keys, head_dim, rope_factors)?,
            sliding_window: keys
                .optional_size("llama.attention.sliding_window")?
                .filter(|&window| window > 0),
            tied_embeddings: false,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            add_bos: false,
            generation: Generation::from_gguf(path, metadata)?,
        };
        SpecialTokens::from_gguf(path, metadata, vocab_size)?.describe(&mut config);
        let config = config.validated(path)?;
        keys.refuse_unread(&config)?;
        Ok(config)
    }

    /// The standard keys that [`from_gguf`](Self::from_gguf) reads back.
    ///
    /// Not among them: the RoPE factors, which GGUF keeps in the tensor `rope_freqs.weight` (needed
    /// unless [`Rope::is_unscaled`]), and `tied_embeddings`, which is the absence of
    /// `output.weight`.
    pub fn to_gguf(&self) -> Metadata {
        let own = |key: &str| format!("{}.{key}", self.family.architecture());
        // Every size was validated to be far below 2^32.
        let size = |size: usize| Value::U32(size as u32);
        let mut entries =
            vec![("general.architecture".to_owned(), self.family.architecture().into())];
        entries.extend(
            self.name.as_ref().map(|name| ("general.name".to_owned(), name.as_str().into())),
        );
        entries.extend([
            (own("vocab_size"), size(self.vocab_size)),
            (own("context_length"), size(self.context_length)),
            (own("embedding_length"), size(self.hidden_size)),
            (own("block_count"), size(self.block_count)),
            (own("feed_forward_length"), size(self.ffn_size)),
            (own("attention.head_count"), size(self.head_count)),
            (own("attention.head_count_kv"), size(self.kv_head_count)),
            (own("attention.key_length"), size(self.head_dim)),
            (own("attention.value_length"), size(self.head_dim)),
            (own("attention.layer_norm_rms_epsilon"), self.norm_epsilon.into()),
            (own("rope.dimension_count"), size(self.head_dim)),
            (own("rope.freq_base"), self.rope.theta.into()),
        ]);
        entries.extend(
            self.sliding_window.map(|window| (own("attention.sliding_window"), size(window))),
        );
        let bos = self.bos_token_id.map(|id| ("tokenizer.ggml.bos_token_id".to_owned(), id.into()));
        let eos = self.eos_token_ids.first().map(|&id| (GGML_END_KEYS[0].to_owned(), id.into()));
        let all_eos = (self.eos_token_ids.len() > 1)
            .then(|| (END_IDS_KEY.to_owned(), self.eos_token_ids.clone().into()));
        // Of several ends llama.cpp's readers know two: of a text and of a turn.
        let eot = self.eos_token_ids.get(1).map(|&id| (GGML_END_KEYS[1].to_owned(), id.into()));
        entries.extend(bos.into_iter().chain(eos).chain(eot).chain(all_eos));
        entries.push(("tokenizer.ggml.add_bos_token".to_owned(), self.add_bos.into()));
        entries.extend(self.generation.to_gguf());
        Metadata::from_unique(entries)
    }
}

/// The factor of RoPE scaling: its name, and the one of files before autumn 2023.
const ROPE_FACTOR_KEYS: [&str; 2] = ["llama.rope.scaling.factor", "llama.rope.scale_linear"];

const EPSILON_KEY: &str = "llama.attention.layer_norm_rms_epsilon";

/// The key, or the number of tokens.
fn read_vocab_size(keys: &Keys<'_>) -> Result<usize> {
    match keys.metadata.strings("tokenizer.ggml.tokens") {
        Some(tokens) => Ok(keys.optional_size("llama.vocab_size")?.unwrap_or(tokens.len())),
        None => keys.size("llama.vocab_size"),
    }
}

fn read_rope(keys: &Keys<'_>, head_dim: usize, factors: Option<Vec<f32>>) -> Result<Rope> {
    let theta = keys.optional("llama.rope.freq_base", "a float", Value::as_f64)?;
    let factor = read_rope_factor(keys)?;
    let scale = match keys.optional("llama.rope.scaling.type", "a string", Value::as_str)? {
        Some("none") => 1.0,
        // A factor without a type is linear, as llama.cpp has it.
        None => factor.unwrap_or(1.0) as f32,
        Some("linear") => {
            factor.ok_or_else(|| keys.malformed(ROPE_FACTOR_KEYS[0], "none", "a float"))? as f32
        }
        Some(other) => return keys.unsupported(format!("RoPE scaling `{other}`")),
    };
    let factors = factors.unwrap_or_else(|| vec![1.0; rope_pairs(head_dim)]);
    Ok(Rope {
        theta: theta.unwrap_or(DEFAULT_ROPE_THETA) as f32,
        factors: factors.into_iter().map(|factor| factor * scale).collect(),
    })
}

/// The factor of linear scaling under its name or its old one; llama.cpp takes 0 for none.
fn read_rope_factor(keys: &Keys<'_>) -> Result<Option<f64>> {
    let mut found = None;
    for key in ROPE_FACTOR_KEYS {
        let factor = keys.optional(key, "a float", Value::as_f64)?.filter(|&factor| factor != 0.0);
        match (found, factor) {
            (Some(first), Some(factor)) if !is_about(factor, first) => {
                let expected = format!("{first} as in `{}`", ROPE_FACTOR_KEYS[0]);
                return Err(keys.malformed(key, factor, &expected));
            }
            _ => found = found.or(factor),
        }
    }
    Ok(found)
}

/// Metadata, the file that it comes from, and which of its keys were asked for.
struct Keys<'a> {
    path: &'a Path,
    metadata: &'a Metadata,
    asked: RefCell<HashSet<String>>,
}

impl<'a> Keys<'a> {
    /// Refuses keys that no rule read and that could change the computation.
    fn refuse_unread(&self, config: &ModelConfig) -> Result<()> {
        let asked = self.asked.borrow();
        let unread = self
            .metadata
            .iter()
            .find(|&(key, value)| !asked.contains(key) && !is_harmless_in_gguf(key, value, config));
        match unread {
            Some((key, value)) => self.unsupported(format!("key `{key}` of {value}")),
            None => Ok(()),
        }
    }

    fn unsupported<T>(&self, what: String) -> Result<T> {
        Err(FormatError::unsupported(self.path, what, ""))
    }

    fn malformed(&self, key: &str, found: impl ToString, expected: &str) -> FormatError {
        FormatError::malformed(self.path, format!("key `{key}`"), "", found, expected)
    }

    /// The value that `read` accepts as `kind`, `None` if the key is absent.
    fn optional<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        self.asked.borrow_mut().insert(key.to_owned());
        let value = self.metadata.get(key);
        value.map(|value| read(value).ok_or_else(|| self.malformed(key, value, kind))).transpose()
    }

    fn require<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<T> {
        self.optional(key, kind, read)?.ok_or_else(|| self.malformed(key, "none", kind))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.optional(key, "a whole number, the same for all blocks", as_size)
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| self.malformed(key, "none", "a whole number"))
    }
}

/// A whole number, or an array with one per block if they are equal.
fn as_size(value: &Value) -> Option<usize> {
    let size = match value.as_array() {
        None => value.as_u64()?,
        Some(array) => all_equal(array)?,
    };
    size.try_into().ok()
}

fn all_equal(array: &Array) -> Option<u64> {
    let sizes = array.to_u64s()?;
    let first = *sizes.first()?;
    sizes.iter().all(|&size| size == first).then_some(first)
}
