//! What was found: a line as each test and measurement ends, and all of them again at the end.

/// The lines so far.
#[derive(Default)]
pub struct Report {
    lines: Vec<String>,
    failed: usize,
}

/// A limit, and whether it was kept.
pub struct Bound {
    pub text: String,
    pub is_kept: bool,
}

impl Bound {
    pub fn at_least(value: f64, limit: f64, unit: &str) -> Option<Self> {
        Some(Self { text: format!(">= {limit} {unit}"), is_kept: value >= limit })
    }

    pub fn at_most(value: f64, limit: f64, unit: &str) -> Option<Self> {
        Some(Self { text: format!("<= {limit} {unit}"), is_kept: value <= limit })
    }
}

impl Report {
    /// A line about the machine.
    pub fn fact(&mut self, what: &str, found: impl Into<String>) {
        self.line(what, found.into(), "", "");
    }

    /// A measurement; whether it keeps its bound does not decide how the program ends.
    pub fn measured(&mut self, what: &str, found: impl Into<String>, bound: Option<Bound>) {
        match bound {
            None => self.line(what, found.into(), "", ""),
            Some(Bound { text, is_kept }) => {
                self.line(what, found.into(), &text, if is_kept { "ok" } else { "MISSED" });
            }
        }
    }

    /// A test.
    pub fn tested(&mut self, what: &str, found: impl Into<String>, bound: &Bound) {
        self.failed += usize::from(!bound.is_kept);
        self.line(what, found.into(), &bound.text, if bound.is_kept { "ok" } else { "FAILED" });
    }

    /// The measurements could not go on.
    pub fn stopped(&mut self, error: &anyhow::Error) {
        self.failed += 1;
        self.line("measurements stopped", format!("{error:#}"), "", "FAILED");
    }

    fn line(&mut self, what: &str, found: String, bound: &str, verdict: &str) {
        let line = format!("{what:<38} {found:<46} {bound:<14} {verdict}");
        let line = line.trim_end().to_owned();
        println!("{line}");
        self.lines.push(line);
    }

    /// Prints all lines again; whether every test has passed.
    pub fn finish(self) -> bool {
        println!("\n== summary");
        self.lines.iter().for_each(|line| println!("{line}"));
        match self.failed {
            0 => println!("all tests passed"),
            failed => println!("FAILED tests: {failed}"),
        }
        self.failed == 0
    }
}
