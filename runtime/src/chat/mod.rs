//! Chats as tokens: the model's own template, its tokenizer, one beginning-of-text token.

mod template;

use slim_formats::{ModelConfig, ModelSource};

use crate::{Result, Tokenizer, tokenizer::with_one_bos};

pub use template::{ChatTemplate, Message};

/// How a model writes a chat: its template, and the tokens of what the template writes.
pub struct ChatFormat<'a> {
    template: ChatTemplate,
    tokenizer: &'a Tokenizer,
    config: &'a ModelConfig,
}

impl<'a> ChatFormat<'a> {
    /// The format of a model with this template; also what is wrong with it, a sentence each.
    ///
    /// # Errors
    /// `ChatTemplate` if the template is not valid Jinja.
    pub fn new(
        template: &str,
        config: &'a ModelConfig,
        tokenizer: &'a Tokenizer,
    ) -> Result<(Self, Vec<String>)> {
        let text_of = |token: Option<u32>| {
            token.and_then(|token| tokenizer.token_text(token)).unwrap_or_default()
        };
        let bos = text_of(config.bos_token_id);
        let eos = text_of(config.eos_token_ids.first().copied());
        let template = ChatTemplate::new(template, &bos, &eos)?;
        Ok((Self { template, tokenizer, config }, Vec::new()))
    }

    /// The tokens of a chat up to where the assistant answers.
    ///
    /// # Errors
    /// `ChatTemplate` if the template refuses the messages, `Tokenizer` if its text cannot be encoded.
    pub fn tokens(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let text = self.template.render(messages, true)?;
        with_one_bos(self.tokenizer, self.config, self.tokenizer.encode(&text)?)
    }
}

/// The tokens that end what the model writes, the main one first: those that its files name, and the
/// one that its chat template writes after an answer.
pub fn end_tokens(source: &dyn ModelSource, _tokenizer: &Tokenizer) -> Vec<u32> {
    source.config().eos_token_ids.clone()
}
