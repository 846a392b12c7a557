//! Where the prompt comes from.

use std::{
    io::{self, Read},
    path::PathBuf,
};

use anyhow::{Context as _, Result};

use crate::open::read_text;

/// The prompt on the command line, in a file, or on stdin.
#[derive(clap::Args)]
#[group(id = "prompt_source", multiple = false)]
pub struct PromptArgs {
    /// Text to continue, - to read it from stdin; with --chat the first message
    #[arg(short, long, value_name = "TEXT", required_unless_present_any = ["chat", "prompt_file"])]
    prompt: Option<String>,

    /// A file with the prompt, instead of --prompt; like stdin without its last line break
    #[arg(short = 'f', long, alias = "file", value_name = "FILE")]
    prompt_file: Option<PathBuf>,
}

impl PromptArgs {
    /// The prompt, of whatever size, if one is given.
    pub fn read(&self) -> Result<Option<String>> {
        let text = match (&self.prompt, &self.prompt_file) {
            (_, Some(path)) => read_text(path)?,
            (Some(prompt), None) if prompt == "-" => {
                let mut text = String::new();
                io::stdin()
                    .lock()
                    .read_to_string(&mut text)
                    .context("cannot read the prompt from stdin")?;
                text
            }
            (prompt, None) => return Ok(prompt.clone()),
        };
        Ok(Some(without_last_line_break(text)))
    }
}

/// Editors and `echo` end a text with a line break that is not meant as a part of it.
fn without_last_line_break(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_break_at_the_end_is_dropped() {
        for (text, expected) in
            [("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("a", "a"), ("\na ", "\na "), ("", "")]
        {
            assert_eq!(without_last_line_break(text.to_owned()), expected);
        }
    }
}
