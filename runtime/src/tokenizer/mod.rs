//! Text to tokens and back, exactly as the model's own tokenizer does it.

mod bytes;
mod components;
mod document;
mod ggml;
mod guard;
mod hugging_face;
mod pre_tokenizer;
mod stream;
#[cfg(test)]
mod tests;
mod to_ggml;

use slim_formats::{ModelSource, TokenizerSource, gguf::token_type, missing_tokenizer};

use crate::{Result, RuntimeError};

use guard::guarded;

pub use document::document_tokens;
pub(crate) use document::with_one_bos;
pub use stream::TextStream;
pub use to_ggml::ggml_keys;

/// A model's tokenizer.
///
/// The texts of special tokens (`<|im_end|>`) inside a text become those tokens, as in Hugging
/// Face: a chat is encoded after its template has put them there.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
}

impl Tokenizer {
    /// The tokenizer of a model.
    ///
    /// # Errors
    /// `Format` if the model has none, with where it is missing; otherwise as [`Self::new`].
    pub fn of(source: &dyn ModelSource) -> Result<Self> {
        match source.tokenizer() {
            TokenizerSource::Missing => Err(missing_tokenizer(source).into()),
            tokenizer => Self::new(tokenizer),
        }
    }

    /// The tokenizer that a model file describes.
    ///
    /// # Errors
    /// `Tokenizer` if there is none, if it breaks a rule, or if it is of a kind that this program
    /// does not know: nothing is guessed, because wrong tokens give plausible nonsense.
    pub fn new(source: &TokenizerSource) -> Result<Self> {
        let inner = guarded(|| match source {
            TokenizerSource::HuggingFace(json) => hugging_face::build(json),
            TokenizerSource::Ggml(metadata) => ggml::build(metadata),
            TokenizerSource::Missing => Err(RuntimeError::tokenizer("the model has none")),
        })?;
        Ok(Self::from_inner(inner))
    }

    fn from_inner(inner: tokenizers::Tokenizer) -> Self {
        let highest = inner.get_vocab(true).into_values().max();
        let vocab_size = highest.map_or(0, |token| token as usize + 1);
        Self { inner, vocab_size }
    }

    /// The text of a `tokenizer.json` that describes this tokenizer.
    ///
    /// # Errors
    /// `Tokenizer` if the library fails on it.
    pub fn to_json(&self) -> Result<String> {
        guarded(|| self.inner.to_string(true).map_err(failed("the tokenizer cannot be written")))
    }

    /// The tokens of a text and nothing else: for chats, whose template writes every special token
    /// itself, and for perplexity. Hugging Face's `tokenizer(text, add_special_tokens=False)`.
    ///
    /// # Errors
    /// `Tokenizer` if the library fails on this text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false)
    }

    /// The tokens of a whole document: those that the model expects around one are added, usually
    /// the beginning-of-text token in front. Hugging Face's `tokenizer(text)`.
    ///
    /// # Errors
    /// `Tokenizer` if the library fails on this text.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, true)
    }

    /// The tokens that a whole document has before those of its text.
    pub(crate) fn added_in_front(&self) -> Result<Vec<u32>> {
        let (text, mut document) = (self.encode("a")?, self.encode_document("a")?);
        let place = document.windows(text.len()).position(|tokens| tokens == text);
        document.truncate(place.unwrap_or(0));
        Ok(document)
    }

    fn encode_with(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        guarded(|| {
            let encoding = self.inner.encode_fast(text, add_special_tokens);
            let encoding = encoding.map_err(failed("the text cannot be encoded"))?;
            Ok(encoding.get_ids().to_vec())
        })
    }

    /// The text of tokens. Special tokens and ids outside the vocabulary leave no text; bytes that
    /// are not UTF-8 become U+FFFD. [`TextStream`] gives the same text piece by piece.
    ///
    /// # Errors
    /// `Tokenizer` if the library fails on these tokens.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        guarded(|| self.inner.decode(tokens, true).map_err(failed("the tokens cannot be decoded")))
    }

    /// One more than the highest token id. The model may have more rows than that, never fewer.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token with this exact vocabulary text.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// The vocabulary text of a token, in the vocabulary's own spelling (`Ġthe`, `▁the`, `<0x0A>`).
    pub fn token_text(&self, token: u32) -> Option<String> {
        self.inner.id_to_token(token)
    }

    /// The bytes that a token adds to a text, which may be a part of a character. Those of an added
    /// token are its text.
    pub fn token_bytes(&self, token: u32) -> Vec<u8> {
        bytes::of_token(&self.inner, token)
    }

    /// Whether a token is found in a text before anything else happens to the text around it.
    pub(crate) fn is_added(&self, token: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&token)
    }

    /// Whether a token steers a model and leaves no text.
    pub fn is_special(&self, token: u32) -> bool {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&token).is_some_and(|token| token.special)
    }
}

/// Wraps an error of the tokenizer library.
fn failed(reason: &'static str) -> impl Fn(tokenizers::Error) -> RuntimeError {
    move |source| RuntimeError::Tokenizer { reason: reason.to_owned(), source: Some(source) }
}
