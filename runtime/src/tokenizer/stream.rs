//! Decoding while tokens arrive.

use super::Tokenizer;
use crate::Result;

/// A character is at most four bytes, so this many tokens that do not end in a whole one hold
/// broken bytes, for which waiting would never end.
const MAX_PENDING_TOKENS: usize = 16;

/// Turns tokens into text as they arrive, in whole characters and with the spacing that
/// [`Tokenizer::decode`] gives to the same tokens at once.
///
/// A token's text can depend on the token before it (whether its leading space counts), so the
/// tokens that gave the last text are kept and decoded again with the new ones.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens whose text was returned last, then those that have returned none yet.
    tokens: Vec<u32>,
    /// How many of `tokens` have returned their text.
    returned: usize,
}

impl<'a> TextStream<'a> {
    /// A stream that continues `context`, whose text it does not return; empty at the start of a
    /// text, where SentencePiece drops a leading space.
    pub fn new(tokenizer: &'a Tokenizer, context: &[u32]) -> Self {
        let mut tokens = context.to_vec();
        tokens.retain(|&token| !tokenizer.is_special(token));
        Self { tokenizer, returned: tokens.len(), tokens }
    }

    /// Takes one token and returns the text that is now certain, `None` while there is none:
    /// after a special token, or in the middle of a character.
    ///
    /// # Errors
    /// `Tokenizer` if the library fails on the token.
    pub fn push(&mut self, token: u32) -> Result<Option<String>> {
        if self.tokenizer.is_special(token) {
            return Ok(None);
        }
        self.tokens.push(token);
        let text = self.new_text()?;
        let pending = self.tokens.len() - self.returned;
        let unfinished =
            text.ends_with(char::REPLACEMENT_CHARACTER) && pending < MAX_PENDING_TOKENS;
        if text.is_empty() || unfinished {
            return Ok(None);
        }
        self.tokens.drain(..self.returned);
        self.returned = self.tokens.len();
        Ok(Some(text))
    }

    /// What is left at the end: nothing, or U+FFFD for a character that was cut short.
    ///
    /// # Errors
    /// `Tokenizer` if the library fails on the tokens.
    pub fn finish(&self) -> Result<String> {
        self.new_text()
    }

    /// The text of the tokens that have returned none.
    fn new_text(&self) -> Result<String> {
        let (old, new) = self.tokens.split_at(self.returned);
        let (before, all) = (self.tokenizer.decode(old)?, self.tokenizer.decode(&self.tokens)?);
        match all.strip_prefix(&before) {
            Some(text) => Ok(text.to_owned()),
            // Byte tokens after whole characters can turn those into U+FFFD.
            None => self.tokenizer.decode(new),
        }
    }
}
