//! Chats as tokens: the model's own template, its tokenizer, one beginning-of-text token.

mod control;
mod generation;
mod isolation;
mod strftime;
mod template;
#[cfg(test)]
mod tests;
mod to_json;

use serde_json::Value as Json;
use slim_formats::{ModelConfig, ModelSource};

use crate::{Result, Tokenizer, tokenizer::with_one_bos};
use control::MendedTexts;

pub use isolation::{isolate_chat_templates, render_for_parent};
pub use template::{Chat, ChatTemplate, Message};

/// How a model writes a chat: its template, and the tokens of what the template writes.
pub struct ChatFormat<'a> {
    template: ChatTemplate,
    tokenizer: &'a Tokenizer,
    config: &'a ModelConfig,
    mended: MendedTexts,
    /// The token that the template writes after an answer, if it writes one there.
    turn_end: Option<u32>,
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
        let template = ChatTemplate::new(template, &bos, &eos);
        // What a template writes for chats of all kinds, as far as it accepts them; in one go, for
        // it may take a process.
        let opened =
            [&["user"][..], &["system", "user"], &["user", "assistant", "user"]].map(trial);
        let closed = [&["user", "assistant", "user"][..], &["user", "assistant"]].map(trial);
        let chats = opened.iter().map(|messages| Chat::new(messages, true));
        let chats = chats.chain(closed.iter().map(|messages| Chat::new(messages, false)));
        let mut texts = template.render_all(&chats.collect::<Vec<_>>())?.into_iter();
        let written: Vec<_> =
            texts.by_ref().take(opened.len()).map(Result::unwrap_or_default).collect();
        let (mended, warnings) = MendedTexts::find(&written.join("\n"), tokenizer)?;
        let mut format = Self { template, tokenizer, config, mended, turn_end: None };
        format.turn_end = texts.find_map(Result::ok).and_then(|text| format.end_of_turn(&text));
        Ok((format, warnings))
    }

    /// The tokens of a chat up to where the assistant answers, with one beginning-of-text token at
    /// most. `tools` are functions that it may call, for templates that have a place for them.
    ///
    /// # Errors
    /// `ChatTemplate` if the template refuses the messages, `Tokenizer` if its text cannot be
    /// encoded.
    pub fn tokens(&self, messages: &[Message], tools: &[Json]) -> Result<Vec<u32>> {
        let broken = |message: &Message| {
            let more = message.more.iter();
            Message {
                role: message.role.clone(),
                content: self.mended.broken(&message.content),
                more: more
                    .map(|(key, json)| (key.clone(), self.mended.broken_json(json)))
                    .collect(),
            }
        };
        let messages: Vec<_> = messages.iter().map(broken).collect();
        let tools: Vec<_> = tools.iter().map(|tool| self.mended.broken_json(tool)).collect();
        let chat = Chat { tools: &tools, ..Chat::new(&messages, true) };
        let text = self.template.render(chat)?;
        with_one_bos(self.tokenizer, self.config, self.mended.encode(&text, self.tokenizer)?)
    }

    /// The tokens that end what the model writes, the main one first: those that its files name,
    /// and the one that the template writes after an answer.
    pub fn end_tokens(&self) -> Vec<u32> {
        let mut ends = self.config.eos_token_ids.clone();
        ends.extend(self.turn_end.filter(|token| !ends.contains(token)));
        ends
    }

    /// The token behind an answer in a chat that the template has written, if one is there.
    fn end_of_turn(&self, text: &str) -> Option<u32> {
        let (_, behind) = text.split_once(&trial_content("assistant"))?;
        let tokens = self.mended.encode(behind.trim_start(), self.tokenizer).ok()?;
        let first = *tokens.first()?;
        let is_found = self.tokenizer.is_added(first) || self.mended.tokens().any(|t| t == first);
        let is_token = (first as usize) < self.config.vocab_size;
        // A template that opens each turn with the first token of a text does not end one with it.
        (is_found && is_token && Some(first) != self.config.bos_token_id).then_some(first)
    }
}

/// A chat to try a template with.
fn trial(roles: &[&str]) -> Vec<Message> {
    roles.iter().map(|&role| Message::new(role, trial_content(role))).collect()
}

/// What nobody else writes, and templates do not change.
fn trial_content(role: &str) -> String {
    format!("What the {role} says in this trial.")
}

/// [`ChatFormat::end_tokens`] of a model that may have no template, or none that can be used: that
/// is an error where a chat begins.
pub fn end_tokens(source: &dyn ModelSource, tokenizer: &Tokenizer) -> Vec<u32> {
    let config = source.config();
    let format = source.chat_template().map(|text| ChatFormat::new(text, config, tokenizer));
    match format {
        Some(Ok((format, _))) => format.end_tokens(),
        Some(Err(_)) | None => config.eos_token_ids.clone(),
    }
}
