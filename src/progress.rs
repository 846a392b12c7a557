//! Progress on stderr: a bar on a terminal, a line per step elsewhere.

use std::{
    fmt,
    io::{IsTerminal, stderr},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::output::{note, one_line, warn};

/// How far a command is.
pub struct Progress {
    kind: Kind,
    /// What a step is called.
    noun: &'static str,
    steps: usize,
    start: Instant,
}

enum Kind {
    Bar(ProgressBar),
    Lines,
    Silent,
}

impl Progress {
    /// Progress of `steps` steps called `noun`.
    pub fn new(noun: &'static str, steps: usize) -> Self {
        let kind = if stderr().is_terminal() { Kind::Bar(bar(noun, steps)) } else { Kind::Lines };
        Self { kind, noun, steps, start: Instant::now() }
    }

    /// Goes on to `steps` steps called `noun`, if it is not there yet.
    pub fn begin(&mut self, noun: &'static str, steps: usize) {
        if self.noun != noun && !matches!(self.kind, Kind::Silent) {
            self.finish();
            *self = Self::new(noun, steps);
        }
    }

    /// Progress that shows nothing but warnings.
    pub fn silent() -> Self {
        Self { kind: Kind::Silent, noun: "", steps: 0, start: Instant::now() }
    }

    /// A part of a step is done: a bar shows it, lines wait for the step.
    pub fn detail(&self, message: impl fmt::Display) {
        if let Kind::Bar(bar) = &self.kind {
            bar.set_message(one_line(&message.to_string()).into_owned());
        }
    }

    /// `done` steps are done.
    pub fn step(&self, done: usize, message: impl fmt::Display) {
        match &self.kind {
            Kind::Bar(bar) => {
                bar.set_message(one_line(&message.to_string()).into_owned());
                bar.set_position(done as u64);
            }
            Kind::Lines => {
                let per_step = self.start.elapsed() / done.max(1) as u32;
                let left = duration(per_step * (self.steps - done) as u32);
                let Self { noun, steps, .. } = self;
                note(format_args!("{noun} {done} of {steps}: {message}, {left} left"));
            }
            Kind::Silent => {}
        }
    }

    /// Prints a warning above the bar.
    pub fn warn(&self, warning: &str) {
        let print = || warn(warning);
        match &self.kind {
            Kind::Bar(bar) => bar.suspend(print),
            Kind::Lines | Kind::Silent => print(),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Kind::Bar(bar) = &self.kind {
            bar.finish_and_clear();
        }
    }
}

fn bar(noun: &'static str, steps: usize) -> ProgressBar {
    let template = "{bar:24} {prefix} {pos} of {len}: {msg}, {eta} left";
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    let bar = ProgressBar::new(steps as u64).with_style(style).with_prefix(noun);
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// A duration as a person would say it: `42 s`, `7 min`, `2 h 5 min`.
pub fn duration(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..100 => format!("{seconds} s"),
        seconds @ 100..6000 => format!("{} min", (seconds + 30) / 60),
        seconds => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}
