//! Progress on stderr: a bar on a terminal, lines elsewhere.

mod estimate;

use std::{
    fmt,
    io::{IsTerminal, stderr},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};

pub use self::estimate::Planned;
use self::estimate::{Estimate, SystemClock};
use crate::output::{note, one_line, warn};

/// Lines that are printed at most for the steps of one noun.
const MOST_LINES: usize = 40;

/// How far a command is.
pub struct Progress {
    kind: Kind,
    /// What a step is called.
    noun: &'static str,
    steps: usize,
    done: usize,
    estimate: Estimate<SystemClock>,
    /// Whether the work is planned by its kinds; otherwise a step is a unit of the only one.
    has_plan: bool,
}

enum Kind {
    Bar(ProgressBar),
    Lines,
    Silent,
}

impl Progress {
    /// Progress of `steps` steps called `noun`.
    pub fn new(noun: &'static str, steps: usize) -> Self {
        let kind = if stderr().is_terminal() { Kind::Bar(bar(steps)) } else { Kind::Lines };
        Self::of(kind, noun, steps)
    }

    /// Progress that shows nothing but warnings.
    pub fn silent() -> Self {
        Self::of(Kind::Silent, "", 0)
    }

    fn of(kind: Kind, noun: &'static str, steps: usize) -> Self {
        let mut estimate = Estimate::new(SystemClock::start());
        estimate.plan(0, Planned { units: steps as f64, usual_cost: 1.0, family: 0 });
        Self { kind, noun, steps, done: 0, estimate, has_plan: false }
    }

    /// Plans work of a kind, for one estimate over all steps of all nouns.
    pub fn plan(&mut self, kind: usize, planned: Planned) {
        if !self.has_plan {
            self.has_plan = true;
            self.estimate = Estimate::new(SystemClock::start());
        }
        self.estimate.plan(kind, planned);
    }

    /// Planned work begins now; what came before is a sample of what it takes.
    pub fn begin_work(&mut self) {
        self.estimate.begin();
    }

    /// Planned work is done.
    pub fn worked(&mut self, kind: usize, units: f64) {
        self.estimate.worked(kind, units);
    }

    /// Goes on to `steps` steps called `noun`, if it is not there yet.
    pub fn begin(&mut self, noun: &'static str, steps: usize) {
        if self.noun != noun {
            (self.noun, self.steps, self.done) = (noun, steps, 0);
            if let Kind::Bar(bar) = &self.kind {
                bar.set_length(steps as u64);
                bar.set_position(0);
            }
        }
    }

    /// A part of a step is done: a bar shows it, lines wait for the step.
    pub fn detail(&self, message: impl fmt::Display) {
        if let Kind::Bar(bar) = &self.kind {
            bar.set_message(self.line(message, true));
        }
    }

    /// `done` steps are done.
    pub fn step(&mut self, done: usize, message: impl fmt::Display) {
        if !self.has_plan {
            self.estimate.worked(0, done.saturating_sub(self.done) as f64);
        }
        self.estimate.step();
        self.done = done;
        match &self.kind {
            Kind::Bar(bar) => {
                bar.set_message(self.line(message, true));
                bar.set_position(done as u64);
            }
            Kind::Lines if self.has_line(done) => note(self.line(message, false)),
            Kind::Lines | Kind::Silent => {}
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

    /// Whether step `done` is one of those that are printed.
    fn has_line(&self, done: usize) -> bool {
        done.is_multiple_of(self.steps.div_ceil(MOST_LINES).max(1)) || done == self.steps
    }

    /// Where it is. The end of what a bar shows may be cut off.
    fn line(&self, message: impl fmt::Display, is_cut: bool) -> String {
        let Self { noun, done, steps, .. } = self;
        let left = match self.estimate.left() {
            None => "estimating the time".to_owned(),
            Some(left) if left.as_secs() == 0 => String::new(),
            Some(left) => format!("{} left", duration(left)),
        };
        let comma = if left.is_empty() { "" } else { ", " };
        let message = message.to_string();
        let message = one_line(&message);
        match is_cut {
            true => format!("{noun} {done} of {steps}{comma}{left}: {message}"),
            false => format!("{noun} {done} of {steps}: {message}{comma}{left}"),
        }
    }
}

/// A bar that fits into any terminal: what stands beside it is cut off at the right edge.
fn bar(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:12} {wide_msg}").expect("the template is valid");
    let bar = ProgressBar::new(steps as u64).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// A duration as a person would say it: `42 s`, `3 min 20 s`, `17 min`, `2 h 5 min`.
pub fn duration(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..100 => format!("{seconds} s"),
        seconds @ 100..595 => {
            let tens = (seconds + 5) / 10;
            match tens % 6 {
                0 => format!("{} min", tens / 6),
                rest => format!("{} min {rest}0 s", tens / 6),
            }
        }
        seconds @ 595..5970 => format!("{} min", (seconds + 30) / 60),
        seconds => {
            let minutes = (seconds + 30) / 60;
            format!("{} h {} min", minutes / 60, minutes % 60)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duration_is_told_to_a_twentieth() {
        for (seconds, text) in [
            (0, "0 s"),
            (99, "99 s"),
            (100, "1 min 40 s"),
            (119, "2 min"),
            (204, "3 min 20 s"),
            (594, "9 min 50 s"),
            (595, "10 min"),
            (1020, "17 min"),
            (5969, "99 min"),
            (7500, "2 h 5 min"),
        ] {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn lines_are_few_and_the_last_is_there() {
        for steps in [1, 30, 41, 300, 65_536] {
            let progress = Progress::of(Kind::Lines, "step", steps);
            let lines: Vec<usize> = (1..=steps).filter(|&done| progress.has_line(done)).collect();
            assert!(lines.len() <= MOST_LINES + 1, "{steps}: {}", lines.len());
            assert_eq!(lines.last(), Some(&steps));
        }
    }

    #[test]
    fn nothing_is_told_before_it_is_known() {
        let mut progress = Progress::of(Kind::Silent, "survey", 3);
        assert_eq!(progress.line("bits", false), "survey 0 of 3: bits, estimating the time");
        (1..=3).for_each(|done| progress.step(done, ""));
        assert_eq!(progress.line("bits", true), "survey 3 of 3: bits");
    }
}
