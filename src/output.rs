//! Printing: data to stdout, talk to stderr. Neither ends the process where the reader has gone.

use std::{
    fmt,
    io::{self, Write},
};

use serde_json::Value;

/// Prints text as data.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Prints one JSON document as data.
pub fn print_json(document: &Value) -> io::Result<()> {
    print(&format!("{document}\n"))
}

/// Prints a line as talk.
pub fn note(line: impl fmt::Display) {
    // Talk that nobody reads is no reason to stop.
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Bytes in the unit that a person would use: `67.4 MiB`.
pub fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut scaled = bytes as f64 / 1024.0;
    let mut unit = 0;
    while scaled >= 1000.0 && unit + 1 < units.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        _ => format!("{scaled:.1} {}", units[unit]),
    }
}

/// A count with its thousands apart: `134,515,008`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A quantity with its noun, in the plural unless it is 1: `1 block`, `30 blocks`.
pub fn plural(number: usize, noun: &str) -> String {
    format!("{} {noun}{}", count(number as u64), if number == 1 { "" } else { "s" })
}

/// Label and value of each fact, the values and all their lines below each other.
pub fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    let line_break = format!("\n{:width$}  ", "");
    let line = |(label, value): &(&str, String)| {
        format!("{label:width$}  {}\n", value.replace('\n', &line_break))
    };
    facts.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_takes_the_largest_unit_below_1000() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1.0 KiB"),
            (1_022_976, "999.0 KiB"),
            (1_024_000, "1.0 MiB"),
            (4 << 30, "4.0 GiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn facts_align_every_line() {
        let lines = [("a", "1".to_owned()), ("long", "2\n3".to_owned())];
        assert_eq!(facts(&lines), "a     1\nlong  2\n      3\n");
    }

    #[test]
    fn count_sets_thousands_apart() {
        for (number, text) in
            [(0, "0"), (999, "999"), (1000, "1,000"), (134_515_008, "134,515,008")]
        {
            assert_eq!(count(number), text);
        }
    }
}
