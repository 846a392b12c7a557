//! What stands before and behind a text: one rule for plain texts and for chats, whatever file the
//! tokenizer comes from.

use slim_formats::ModelConfig;

use super::Tokenizer;
use crate::Result;

/// The tokens of a text that the model is to continue, with those that it expects in front. An
/// empty text is the token that starts one, or nothing if the model has no such token.
///
/// An end token that the tokenizer would put behind a whole document is left off.
///
/// # Errors
/// `Tokenizer` if the library fails on this text.
pub fn document_tokens(
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    text: &str,
) -> Result<Vec<u32>> {
    let mut tokens = with_one_bos(tokenizer, config, tokenizer.encode(text)?)?;
    if tokens.is_empty() {
        tokens.extend(config.bos_token_id);
    }
    Ok(tokens)
}

/// Puts the beginning-of-text token in front of a text's tokens, once.
///
/// Whether there is to be one is for the tokenizer's post-processor and the model's settings to
/// say. A text may begin with it already: a chat template often writes it, and users type it. One
/// that is written where none is asked for stays.
pub(crate) fn with_one_bos(
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    mut tokens: Vec<u32>,
) -> Result<Vec<u32>> {
    let mut added = tokenizer.added_in_front()?;
    if added.is_empty() && config.add_bos {
        added.extend(config.bos_token_id);
    }
    // Some tokenizers put several in front; the last of them is then no beginning of text.
    let bos = added.first().copied().or(config.bos_token_id);
    let written = tokens.iter().take_while(|&&token| Some(token) == bos).count();
    if written > 0 {
        tokens.drain(..written - 1);
    } else {
        tokens.splice(..0, added);
    }
    Ok(tokens)
}
