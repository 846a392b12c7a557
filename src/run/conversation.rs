//! What was said in a chat, and what of it the context has room for.

use std::{fs::File, io::Write, path::Path};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use slim_runtime::{ChatFormat, Message};

use crate::{failure::advised, output::plural};

/// The messages of a chat.
pub struct Conversation<'a> {
    format: ChatFormat<'a>,
    /// Tokens that the context holds.
    context: usize,
    system: Option<String>,
    /// Turns: a message of the user and its answer. While an answer is awaited, the last one is
    /// missing.
    messages: Vec<Message>,
    /// How many of `messages` are too old for the context; whole turns.
    forgotten: usize,
}

/// What the model is to continue.
pub struct Prompt {
    pub tokens: Vec<u32>,
    /// Turns that had to be dropped for it.
    pub dropped_turns: usize,
}

impl<'a> Conversation<'a> {
    /// A chat in which nothing was said.
    pub fn new(format: ChatFormat<'a>, context: usize) -> Self {
        Self { format, context, system: None, messages: Vec::new(), forgotten: 0 }
    }

    pub fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// Takes a system prompt, if the model's template has a place for one.
    pub fn set_system(&mut self, text: &str) -> Result<()> {
        let with = |system: &str| {
            let messages = [Message::new("system", system), Message::new("user", "a")];
            self.format.tokens(&messages, &[]).context("the model takes no system prompt")
        };
        let tokens = with(text)?;
        // Some templates skip what they do not know.
        if tokens == with(&format!("{text} b"))? {
            bail!("the model takes no system prompt: its chat template leaves it out");
        }
        self.check_length(tokens.len(), "system prompt")?;
        self.system = Some(text.to_owned());
        Ok(())
    }

    /// Forgets what was said, but not the system prompt.
    pub fn reset(&mut self) {
        self.messages.clear();
        self.forgotten = 0;
    }

    /// Turns that were said, and how many of them the context has no room for any more.
    pub fn turns(&self) -> (usize, usize) {
        (self.messages.len() / 2, self.forgotten / 2)
    }

    /// Adds a message of the user and gives the tokens of the chat. Where they would leave no room
    /// for `answer` tokens, the oldest turns are dropped, never the system prompt.
    ///
    /// A message that cannot be asked is not added.
    pub fn ask(&mut self, message: &str, answer: usize) -> Result<Prompt> {
        self.messages.push(Message::new("user", message));
        match self.fit(answer) {
            Ok((first, tokens)) => {
                let dropped_turns = (first - self.forgotten) / 2;
                self.forgotten = first;
                Ok(Prompt { tokens, dropped_turns })
            }
            Err(error) => {
                self.messages.pop();
                Err(error)
            }
        }
    }

    /// Adds the answer to the last message.
    pub fn answered(&mut self, answer: String) {
        self.messages.push(Message::new("assistant", answer));
    }

    /// The first message of those that fit, and their tokens.
    fn fit(&self, answer: usize) -> Result<(usize, Vec<u32>)> {
        let last = self.messages.len() - 1;
        for first in (self.forgotten..last).step_by(2) {
            let tokens = self.tokens_from(first)?;
            if tokens.len() + answer <= self.context {
                return Ok((first, tokens));
            }
        }
        let tokens = self.tokens_from(last)?;
        self.check_length(tokens.len(), "message")?;
        Ok((last, tokens))
    }

    fn tokens_from(&self, first: usize) -> Result<Vec<u32>> {
        let system = self.system.iter().map(|text| Message::new("system", text));
        let messages: Vec<_> = system.chain(self.messages[first..].iter().cloned()).collect();
        Ok(self.format.tokens(&messages, &[])?)
    }

    /// Checks that a chat of nothing but `what` leaves room for an answer.
    fn check_length(&self, tokens: usize, what: &str) -> Result<()> {
        if tokens < self.context {
            return Ok(());
        }
        let message = format!(
            "the {what} is too long: with it alone the chat has {}, but the context holds {}",
            plural(tokens, "token"),
            self.context
        );
        Err(advised(message, format!("shorten the {what}")))
    }

    /// Writes all that was said to a new file, as JSON: `model`, and `messages` as chat APIs take
    /// them.
    pub fn save(&self, path: &Path, model: &Path) -> Result<()> {
        let system = self.system.iter().map(|text| Message::new("system", text));
        let messages: Vec<_> = system
            .chain(self.messages.iter().cloned())
            .map(|Message { role, content, .. }| json!({"role": role, "content": content}))
            .collect();
        let document = json!({"model": model.to_string_lossy(), "messages": messages});
        let cannot = || format!("`{}`: cannot save the conversation", path.display());
        let mut file = File::create_new(path).with_context(cannot)?;
        let written = writeln!(file, "{document:#}").and_then(|()| file.sync_all());
        if written.is_err() {
            // Half a conversation is worth less than the message that follows.
            let _ = std::fs::remove_file(path);
        }
        written.with_context(cannot)
    }
}
