//! How byte-level tokenizers cut a text into words before merging, by the names that
//! `tokenizer.ggml.pre` gives them.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

/// What one name means. The default is that of plain GPT-2, but for `names` and `splits`.
pub(super) struct PreTokenizer {
    names: &'static [&'static str],
    /// Regular expressions applied in turn; matches and the text between them become words.
    splits: &'static [&'static str],
    /// A word that is a token is not built by merges.
    pub(super) ignore_merges: bool,
    /// The text is brought to Unicode form NFC first.
    pub(super) normalize_nfc: bool,
}

const PLAIN: PreTokenizer =
    PreTokenizer { names: &[], splits: &[], ignore_merges: false, normalize_nfc: false };

pub(super) const DIGIT: &str = r"\p{N}";
pub(super) const GPT_2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// # Source
/// The names, and the expressions of `default` and `falcon`, are those of llama.cpp's
/// `src/llama-vocab.cpp`; the other expressions are the originals of the models' `tokenizer.json`.
const KNOWN: &[PreTokenizer] = &[
    PreTokenizer {
        names: &["default"],
        splits: &[r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ..PLAIN
    },
    PreTokenizer { names: &["gpt-2", "phi-2", "mpt", "olmo"], splits: &[GPT_2], ..PLAIN },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"],
        splits: &[DIGIT, GPT_2],
        ..PLAIN
    },
    PreTokenizer {
        names: &["falcon"],
        splits: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT_2, "[0-9][0-9][0-9]"],
        ..PLAIN
    },
    PreTokenizer {
        names: &["llama-bpe", "llama-v3", "llama3", "falcon3"],
        splits: &[LLAMA_3],
        ignore_merges: true,
        ..PLAIN
    },
    PreTokenizer { names: &["dbrx", "smaug-bpe", "chatglm-bpe"], splits: &[LLAMA_3], ..PLAIN },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen"],
        splits: &[QWEN_2],
        normalize_nfc: true,
        ..PLAIN
    },
    PreTokenizer { names: &["stablelm2"], splits: &[QWEN_2], ..PLAIN },
    PreTokenizer { names: &["tekken"], splits: &[TEKKEN], ignore_merges: true, ..PLAIN },
    PreTokenizer { names: &["gpt-4o", "llama4"], splits: &[GPT_4O], ..PLAIN },
];

impl PreTokenizer {
    /// The pre-tokenizer of this name, `None` if this program does not know it.
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        KNOWN.iter().find(|known| known.names.contains(&name))
    }

    /// The first name of the pre-tokenizer that does the same, `None` if this program does not know
    /// it.
    pub(super) fn name_of(
        splits: &[&str],
        ignore_merges: bool,
        normalize_nfc: bool,
    ) -> Option<&'static str> {
        let is_same = |known: &&Self| {
            known.splits == splits
                && (known.ignore_merges, known.normalize_nfc) == (ignore_merges, normalize_nfc)
        };
        KNOWN.iter().find(is_same).map(|known| known.names[0])
    }

    /// The library's steps: the splits, then bytes spelled as characters.
    pub(super) fn steps(&self) -> tokenizers::Result<Sequence> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        for &regex in self.splits {
            let pattern = SplitPattern::Regex(regex.to_owned());
            steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into());
        }
        steps.push(ByteLevel::new(false, false, false).into());
        Ok(Sequence::new(steps))
    }
}
