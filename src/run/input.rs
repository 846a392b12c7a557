//! Where the user's messages come from: a line editor on a terminal, otherwise lines of stdin.

use std::{
    env, fs,
    io::{self, BufRead, IsTerminal},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use rustyline::{Behavior, Config, Editor, error::ReadlineError, history::FileHistory};

use crate::output::note;

/// Messages that the history keeps.
const HISTORY_LENGTH: usize = 1000;

/// The user's side of a chat.
pub enum Input {
    Terminal { editor: Box<Editor<(), FileHistory>>, history: Option<PathBuf> },
    Lines,
}

impl Input {
    /// The line editor if stdin is a terminal.
    pub fn open() -> Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self::Lines);
        }
        // The prompt is talk, which has no place in a file that stdout goes to.
        let behavior =
            if io::stdout().is_terminal() { Behavior::Stdio } else { Behavior::PreferTerm };
        let config = Config::builder().behavior(behavior).max_history_size(HISTORY_LENGTH)?;
        let mut editor = Box::new(Editor::with_config(config.build())?);
        // A chat without the messages of the last one is still a chat.
        let history = history_file();
        if let Some(path) = &history {
            let _ = editor.load_history(path);
        }
        Ok(Self::Terminal { editor, history })
    }

    /// Whether a person is typing.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal { .. })
    }

    /// The next text, of more than one line if it was pasted so; `None` at the end of the input,
    /// and when Ctrl-C is pressed twice.
    pub fn next(&mut self) -> Result<Option<String>> {
        match self {
            Self::Lines => next_line(),
            Self::Terminal { editor, history } => edit(editor, history.as_deref()),
        }
    }
}

/// The next line that says something.
fn next_line() -> Result<Option<String>> {
    loop {
        let mut line = String::new();
        if io::stdin().lock().read_line(&mut line).context("cannot read a message from stdin")? == 0
        {
            return Ok(None);
        }
        if !line.trim().is_empty() {
            return Ok(Some(line.trim().to_owned()));
        }
    }
}

fn edit(editor: &mut Editor<(), FileHistory>, history: Option<&Path>) -> Result<Option<String>> {
    let mut interrupted = false;
    loop {
        match editor.readline("> ") {
            Ok(text) if text.trim().is_empty() => interrupted = false,
            Ok(text) => {
                let text = text.trim().to_owned();
                editor.add_history_entry(&text)?;
                if let Some(path) = history {
                    let _ = editor.append_history(path);
                }
                return Ok(Some(text));
            }
            Err(ReadlineError::Interrupted) if !interrupted => {
                note("press Ctrl-C again or Ctrl-D to leave");
                interrupted = true;
            }
            Err(ReadlineError::Interrupted | ReadlineError::Eof) => return Ok(None),
            Err(error) => return Err(error).context("cannot read a message from the terminal"),
        }
    }
}

/// The file of messages in the folder that XDG has for such, which is made if need be.
fn history_file() -> Option<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")));
    let folder = state?.join("slimllm");
    fs::create_dir_all(&folder).ok()?;
    Some(folder.join("history"))
}
