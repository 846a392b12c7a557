//! `slimllm run --chat`: messages, answers and commands.

use std::path::Path;

use anyhow::Result;
use slim_runtime::{Generator, Timings};

use super::{
    answer::{Interrupt, print_answer},
    conversation::Conversation,
    input::Input,
    sampling::Sampling,
};
use crate::{
    failure,
    output::{facts, note, plural},
};

const HELP: &str = "\
/system TEXT   set the system prompt; without TEXT, show it
/reset         forget the conversation, not the system prompt
/save FILE     write the conversation as JSON to a new file
/stats         show how full the context is, speeds and settings
/exit          leave, as Ctrl-D does
//TEXT         send a message that begins with a slash
Ctrl-C         stop an answer";

/// What the user typed.
#[derive(Debug, PartialEq, Eq)]
enum Typed<'a> {
    Message(&'a str),
    Command { name: &'a str, argument: &'a str },
}

impl<'a> Typed<'a> {
    fn read(text: &'a str) -> Self {
        match text.strip_prefix('/') {
            None => Self::Message(text),
            Some(message) if message.starts_with('/') => Self::Message(message),
            Some(command) => {
                let (name, argument) =
                    command.split_once(char::is_whitespace).unwrap_or((command, ""));
                Self::Command { name, argument: argument.trim() }
            }
        }
    }
}

/// A model and a user who talk.
pub struct Chat<'a> {
    generator: Generator<'a>,
    conversation: Conversation<'a>,
    /// Tokens of an answer at most.
    limit: Option<usize>,
    sampling: Sampling,
    interrupt: Interrupt,
    last: Timings,
}

impl<'a> Chat<'a> {
    pub fn new(
        generator: Generator<'a>,
        conversation: Conversation<'a>,
        limit: Option<usize>,
        sampling: Sampling,
    ) -> Self {
        let (interrupt, last) = (Interrupt::default(), Timings::default());
        Self { generator, conversation, limit, sampling, interrupt, last }
    }

    /// Answers `first`, then what the user says, until `/exit` or the end of the input.
    pub fn run(mut self, model: &Path, first: Option<String>) -> Result<()> {
        let mut input = Input::open()?;
        if input.is_terminal() {
            self.interrupt = Interrupt::catch()?;
            note("/help lists the commands");
        }
        if let Some(message) = first.as_deref().map(str::trim).filter(|text| !text.is_empty()) {
            self.answer(message)?;
        }
        while let Some(text) = input.next()? {
            match Typed::read(&text) {
                Typed::Message(message) => self.answer(message)?,
                Typed::Command { name: "exit" | "quit", .. } => break,
                Typed::Command { name, argument } => {
                    // The chat goes on, whatever became of a command.
                    if let Err(error) = self.obey(name, argument, model) {
                        failure::report(&error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Lets the model answer a message. One that it cannot take is refused, and the chat goes on.
    fn answer(&mut self, message: &str) -> Result<()> {
        let prompt = match self.conversation.ask(message, self.room_for_answer()) {
            Ok(prompt) => prompt,
            Err(error) => {
                failure::report(&error);
                return Ok(());
            }
        };
        let context = self.generator.context();
        if prompt.dropped_turns > 0 {
            note(format_args!(
                "the context of {} is full: dropped the oldest {} of the conversation",
                plural(context, "token"),
                plural(prompt.dropped_turns, "turn")
            ));
        }
        let generation = self.generator.generate(&prompt.tokens, self.limit)?;
        let answer = print_answer(generation, context, &self.interrupt)?;
        self.last = answer.timings;
        self.conversation.answered(answer.text);
        Ok(())
    }

    /// Tokens that the context keeps free for an answer: all of a short one, and a quarter of the
    /// context for one that may be long.
    fn room_for_answer(&self) -> usize {
        let most = self.generator.context() / 4;
        self.limit.map_or(most, |limit| limit.min(most)).max(1)
    }

    fn obey(&mut self, name: &str, argument: &str, model: &Path) -> Result<()> {
        match (name, argument) {
            ("help", _) => note(HELP),
            ("system", "") => match self.conversation.system() {
                Some(system) => note(format_args!("the system prompt is: {system}")),
                None => note("there is no system prompt but what the model's template may have"),
            },
            ("system", text) => {
                self.conversation.set_system(text)?;
                note("the system prompt is set");
            }
            ("reset", _) => {
                self.conversation.reset();
                note("the conversation starts anew");
            }
            ("save", "") => note("`/save` takes the name of a new file: `/save FILE`"),
            ("save", file) => {
                self.conversation.save(Path::new(file), model)?;
                note(format_args!("saved to `{file}`"));
            }
            ("stats", _) => note(self.stats().trim_end()),
            _ => note(format_args!(
                "there is no command `/{name}`; `/help` lists them, and `//` sends a text that \
                 begins with a slash"
            )),
        }
        Ok(())
    }

    fn stats(&self) -> String {
        let (turns, forgotten) = self.conversation.turns();
        let context = self.generator.context();
        facts(&[
            ("context", format!("{} of {}", self.generator.held(), plural(context, "token"))),
            ("conversation", format!("{}, {forgotten} of them dropped", plural(turns, "turn"))),
            ("last answer", self.last.to_string()),
            ("settings", self.sampling.to_string()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_told_from_messages() {
        let command = |name, argument| Typed::Command { name, argument };
        for (text, typed) in [
            ("Hello /help", Typed::Message("Hello /help")),
            ("//etc/passwd?", Typed::Message("/etc/passwd?")),
            ("///", Typed::Message("//")),
            ("/help", command("help", "")),
            ("/system  Be brief.\nAlways. ", command("system", "Be brief.\nAlways.")),
            ("/", command("", "")),
        ] {
            assert_eq!(Typed::read(text), typed, "{text}");
        }
    }
}
