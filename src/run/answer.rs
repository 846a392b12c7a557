//! Printing a text as it comes.

use std::{
    borrow::Cow,
    io::{self, IsTerminal},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result};
use signal_hook::{consts::SIGINT, flag};
use slim_runtime::{End, Event, Generation, Generator, Timings};

use crate::{
    interrupt::{self, EXIT_INTERRUPTED},
    output::{note, plural, print},
};

/// The wish to stop an answer: Ctrl-C, once it is caught.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Catches Ctrl-C. The second one before the first was noticed ends the process.
    pub fn catch() -> Result<Self> {
        let interrupt = Self::default();
        let raised = || Arc::clone(&interrupt.0);
        // In this order: the signal that raises it is not yet the second one.
        flag::register_conditional_shutdown(SIGINT, EXIT_INTERRUPTED.into(), raised())
            .and_then(|_| flag::register(SIGINT, raised()))
            .context("cannot catch Ctrl-C")?;
        interrupt::are_handled();
        Ok(interrupt)
    }

    /// Whether it was raised since the last time.
    fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

/// What was printed.
pub struct Answer {
    pub text: String,
    pub timings: Timings,
}

/// Prints a text as it comes, then what cut it short, if something did, and the timings. `context`:
/// tokens that the context holds.
pub fn print_answer<'a>(
    mut generation: Generation<'a, &mut Generator<'a>>,
    context: usize,
    interrupt: &Interrupt,
) -> Result<Answer> {
    // What was raised before belongs to another answer.
    interrupt.take();
    let is_terminal = io::stdout().is_terminal();
    let mut text = String::new();
    let mut cut = None;
    let mut tokens = 0;
    while let Some(event) = generation.next() {
        let piece = match event? {
            Event::Token { text, .. } => {
                tokens += 1;
                text
            }
            Event::End { reason, text } => {
                cut = reason_to_stop(reason, tokens, context);
                text
            }
            _ => String::new(),
        };
        print(&if is_terminal { printable(&piece) } else { piece.as_str().into() })?;
        text += &piece;
        if interrupt.take() {
            generation.stop();
        }
    }
    print("\n")?;
    if let Some(cut) = cut {
        note(format_args!("stopped: {cut}"));
    }
    let timings = generation.timings();
    note(timings);
    Ok(Answer { text, timings })
}

/// Why a text ends before the model ended it.
fn reason_to_stop(reason: End, tokens: usize, context: usize) -> Option<String> {
    match reason {
        End::Model => None,
        End::Limit => Some(format!("{} (`-n`; -1 lets the model end)", plural(tokens, "token"))),
        End::Context => Some(format!("the context of {} is full", plural(context, "token"))),
        End::Caller => Some("Ctrl-C".to_owned()),
    }
}

/// A text that cannot steer a terminal: control characters are escaped, all but line breaks and
/// tabs.
fn printable(text: &str) -> Cow<'_, str> {
    let steers = |c: char| c.is_control() && c != '\n' && c != '\t';
    if !text.contains(steers) {
        return text.into();
    }
    let mut printable = String::with_capacity(text.len());
    for c in text.chars() {
        match steers(c) {
            true => printable.extend(c.escape_default()),
            false => printable.push(c),
        }
    }
    printable.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        let text = "a\tb\n\u{1b}[2Jc\r\u{7f}\u{9b}31m é🙂";
        assert_eq!(printable(text), "a\tb\n\\u{1b}[2Jc\\r\\u{7f}\\u{9b}31m é🙂");
        assert!(matches!(printable("a\tb\n"), Cow::Borrowed(_)));
    }
}
