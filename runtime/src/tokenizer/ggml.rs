//! The `tokenizer.ggml.*` keys of a GGUF file.

use std::cmp::Reverse;

use ahash::AHashMap;
use slim_formats::{
    GgmlDefaults,
    gguf::{Array, Metadata},
};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, BpeBuilder};
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as Normalizers};
use tokenizers::processors::template::{SpecialToken, Template, TemplateProcessing};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, Tokenizer};

use super::pre_tokenizer::PreTokenizer;
use super::{failed, token_type};
use crate::{Result, RuntimeError};

/// Builds what the keys describe.
pub(super) fn build(metadata: &Metadata) -> Result<Tokenizer> {
    let keys = Keys(metadata);
    let vocabulary = Vocabulary::read(keys)?;
    let mut tokenizer = match keys.str("model")? {
        "gpt2" => byte_level(keys, &vocabulary)?,
        "llama" => sentence_piece(keys, &vocabulary)?,
        other => return Err(keys.unsupported("model", other)),
    };
    tokenizer.add_tokens(vocabulary.added_tokens()).map_err(failed("special tokens"))?;
    let add_bos = keys.bool("add_bos_token").unwrap_or(GgmlDefaults::of(metadata).add_bos);
    let add_eos = keys.bool("add_eos_token").unwrap_or(false);
    tokenizer.with_post_processor(Some(document_frame(keys, &vocabulary, add_bos, add_eos)?));
    Ok(tokenizer)
}

/// The metadata behind the prefix that all keys here share.
#[derive(Clone, Copy)]
struct Keys<'a>(&'a Metadata);

impl<'a> Keys<'a> {
    fn name(key: &str) -> String {
        format!("tokenizer.ggml.{key}")
    }

    fn required<T>(key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| {
            let key = Self::name(key);
            RuntimeError::tokenizer(format!("key `{key}` is missing or has a wrong type"))
        })
    }

    fn str(self, key: &str) -> Result<&'a str> {
        Self::required(key, self.0.str(&Self::name(key)))
    }

    fn strings(self, key: &str) -> Result<&'a [String]> {
        Self::required(key, self.0.strings(&Self::name(key)))
    }

    fn bool(self, key: &str) -> Option<bool> {
        self.0.bool(&Self::name(key))
    }

    fn array(self, key: &str) -> Option<&'a Array> {
        self.0.get(&Self::name(key))?.as_array()
    }

    /// The token whose id a key holds, or else `default`, with its text.
    fn token(
        self,
        key: &str,
        default: Option<u32>,
        vocabulary: &Vocabulary<'a>,
    ) -> Result<(u32, &'a str)> {
        let id = match self.0.contains(&Self::name(key)) {
            true => self.0.u64(&Self::name(key)),
            false => default.map(u64::from),
        };
        let id = Self::required(key, id)?;
        let text = usize::try_from(id).ok().and_then(|id| vocabulary.tokens.get(id));
        let text = text.ok_or_else(|| {
            let (key, count) = (Self::name(key), vocabulary.tokens.len());
            RuntimeError::tokenizer(format!("key `{key}`: {id} is not one of {count} tokens"))
        })?;
        Ok((id as u32, text))
    }

    fn unsupported(self, key: &str, value: &str) -> RuntimeError {
        RuntimeError::tokenizer(format!("key `{}`: `{value}` is not supported", Self::name(key)))
    }
}

/// Token texts by id, and what each is for.
struct Vocabulary<'a> {
    tokens: &'a [String],
    types: Vec<u64>,
}

impl<'a> Vocabulary<'a> {
    fn read(keys: Keys<'a>) -> Result<Self> {
        let tokens = keys.strings("tokens")?;
        let types = match keys.array("token_type") {
            Some(types) => Keys::required("token_type", types.to_u64s())?,
            None => vec![token_type::NORMAL; tokens.len()],
        };
        same_length("token_type", types.len(), tokens.len())?;
        Ok(Self { tokens, types })
    }

    /// The tokens that a text can have; of several with the same text, the first.
    fn ids(&self) -> AHashMap<String, u32> {
        // Of equal keys, the last one collected stays.
        let ids = (0..self.tokens.len()).rev().filter(|&id| self.types[id] != token_type::UNUSED);
        ids.map(|id| (self.tokens[id].clone(), id as u32)).collect()
    }

    /// The tokens that are found in a text before anything else happens to it.
    fn added_tokens(&self) -> impl Iterator<Item = AddedToken> {
        self.tokens.iter().zip(&self.types).filter_map(|(text, &token_type)| {
            let special = match token_type {
                token_type::UNKNOWN | token_type::CONTROL => true,
                token_type::USER_DEFINED => false,
                _ => return None,
            };
            Some(AddedToken::from(text.as_str(), special).normalized(false))
        })
    }
}

fn same_length(key: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let key = Keys::name(key);
    Err(RuntimeError::tokenizer(format!("key `{key}`: {found} entries for {expected} tokens")))
}

/// Byte-level BPE.
fn byte_level(keys: Keys, vocabulary: &Vocabulary) -> Result<Tokenizer> {
    let name = keys.str("pre")?;
    let pre = PreTokenizer::named(name).ok_or_else(|| keys.unsupported("pre", name))?;
    let ids = vocabulary.ids();
    let merges = keys.strings("merges")?.iter().map(|merge| {
        let pair = merge
            .split_once(' ')
            .filter(|(left, right)| ids.contains_key(&format!("{left}{right}")));
        let (left, right) = pair.ok_or_else(|| {
            RuntimeError::tokenizer(format!("merge `{merge}` does not give a token"))
        })?;
        Ok((left.to_owned(), right.to_owned()))
    });
    let merges = merges.collect::<Result<_>>()?;
    let model = BPE::builder().vocab_and_merges(ids, merges).ignore_merges(pre.ignore_merges);
    let mut tokenizer = Tokenizer::new(finish(model)?);
    let steps = pre.steps().map_err(failed("the pre-tokenizer cannot be built"))?;
    tokenizer.with_pre_tokenizer(Some(steps)).with_decoder(Some(ByteLevel::default()));
    if pre.normalize_nfc {
        tokenizer.with_normalizer(Some(NFC)).map_err(failed("the normalizer cannot be built"))?;
    }
    Ok(tokenizer)
}

/// SentencePiece BPE.
///
/// # Source
/// As `transformers` converts SentencePiece models (`convert_slow_tokenizer.py`, `LlamaConverter`).
fn sentence_piece(keys: Keys, vocabulary: &Vocabulary) -> Result<Tokenizer> {
    const SPACE: &str = "▁";
    let broken = failed("the SentencePiece tokenizer cannot be built");

    let merges = merges_by_score(keys, vocabulary)?;
    let mut model = BPE::builder()
        .vocab_and_merges(vocabulary.ids(), merges)
        .byte_fallback(true)
        .fuse_unk(true);
    if keys.0.contains(&Keys::name("unknown_token_id")) {
        model = model.unk_token(keys.token("unknown_token_id", None, vocabulary)?.1.to_owned());
    }
    let mut tokenizer = Tokenizer::new(finish(model)?);

    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders: Vec<DecoderWrapper> = vec![
        Replace::new(SPACE, " ").map_err(&broken)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if keys.bool("add_space_prefix").unwrap_or(true) {
        normalizers.push(Prepend::new(SPACE.to_owned()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(Replace::new(" ", SPACE).map_err(&broken)?.into());
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers))).map_err(&broken)?;
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

/// The longest token that merges may make: each has as many pairs of parts as letters, and
/// published vocabularies have none of 300 bytes.
const MAX_MERGED_BYTES: usize = 1024;

/// Every way to put a token together from two others, the token with the highest score first.
fn merges_by_score(keys: Keys, vocabulary: &Vocabulary) -> Result<Vec<(String, String)>> {
    let Some(Array::F32(scores)) = keys.array("scores") else {
        return Keys::required("scores", None);
    };
    same_length("scores", scores.len(), vocabulary.tokens.len())?;

    let mergeable =
        |&id: &usize| matches!(vocabulary.types[id], token_type::NORMAL | token_type::USER_DEFINED);
    let texts =
        (0..scores.len()).filter(mergeable).map(|id| (vocabulary.tokens[id].as_str(), scores[id]));
    let known: AHashMap<&str, f32> = texts.clone().collect();
    let mut merges: Vec<(f32, &str, &str)> = Vec::new();
    for (text, score) in texts {
        if text.len() > MAX_MERGED_BYTES {
            let length = text.len();
            return Err(RuntimeError::tokenizer(format!(
                "a token of {length} bytes, expected {MAX_MERGED_BYTES} at most"
            )));
        }
        let pairs = text.char_indices().skip(1).map(|(middle, _)| text.split_at(middle));
        let pairs =
            pairs.filter(|(left, right)| known.contains_key(left) && known.contains_key(right));
        merges.extend(pairs.map(|(left, right)| (score, left, right)));
    }
    // Of equal scores, the longer left part first.
    merges.sort_by(|a, b| {
        let lengths =
            |left: &str, right: &str| Reverse((left.chars().count(), right.chars().count()));
        b.0.total_cmp(&a.0).then_with(|| lengths(a.1, a.2).cmp(&lengths(b.1, b.2)))
    });
    Ok(merges.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect())
}

fn finish(model: BpeBuilder) -> Result<BPE> {
    model.build().map_err(failed("the merges cannot be read"))
}

/// The tokens around a document.
fn document_frame(
    keys: Keys,
    vocabulary: &Vocabulary,
    add_bos: bool,
    add_eos: bool,
) -> Result<TemplateProcessing> {
    let mut pieces = vec!["$A"];
    let mut special_tokens = Vec::new();
    let defaults = GgmlDefaults::of(keys.0);
    let mut define = |name: &str, key, default| {
        let (id, text) = keys.token(key, default, vocabulary)?;
        special_tokens.push(SpecialToken::new(name.to_owned(), vec![id], vec![text.to_owned()]));
        Ok::<_, RuntimeError>(())
    };
    if add_bos {
        define("bos", "bos_token_id", defaults.bos)?;
        pieces.insert(0, "bos");
    }
    if add_eos {
        define("eos", "eos_token_id", defaults.eos)?;
        pieces.push("eos");
    }
    let special_tokens: Vec<_> = special_tokens
        .into_iter()
        .collect::<tokenizers::Result<_>>()
        .map_err(failed("special tokens"))?;
    let template = Template::try_from(pieces).expect("the pieces are constants");
    let mut frame = TemplateProcessing::default();
    frame.set_single(template);
    frame.set_special_tokens(special_tokens.into());
    Ok(frame)
}
