//! Printing: data to stdout, talk to stderr. Neither ends the process where the reader has gone,
//! and neither hands a terminal what it would obey: texts from files are printed, too.

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
    io::{self, Write},
    sync::{Mutex, PoisonError},
};

use serde_json::Value;
use sha2::{Digest, Sha256};

/// Prints text as data.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(visible(text).as_bytes())?;
    out.flush()
}

/// The warnings so far: who reads the JSON document need not read the talk.
static WARNINGS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Prints one JSON document as data, with all warnings under `warnings`. What a terminal would obey
/// can only be in its strings, where JSON has escapes of its own.
pub fn print_json(mut document: Value) -> io::Result<()> {
    document["warnings"] = WARNINGS.lock().unwrap_or_else(PoisonError::into_inner).clone().into();
    let json = document.to_string();
    let escaped = escape(&json, is_obeyed, |c, out| {
        let _ =
            c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}"));
    });
    print(&format!("{escaped}\n"))
}

/// Prints a line as talk.
pub fn note(line: impl fmt::Display) {
    // Talk that nobody reads is no reason to stop.
    let _ = writeln!(io::stderr().lock(), "{}", visible(&line.to_string()));
}

/// Prints a warning, and keeps it for the JSON document.
pub fn warn(warning: &str) {
    WARNINGS.lock().unwrap_or_else(PoisonError::into_inner).push(warning.to_owned());
    note(format_args!("warning: {}", one_line(warning)));
}

/// Text with everything visible that a terminal would obey, but for line breaks and tabs.
pub fn visible(text: &str) -> Cow<'_, str> {
    let is_escaped = |c| is_obeyed(c) && !matches!(c, '\n' | '\t');
    escape(text, is_escaped, |c, out| out.extend(c.escape_default()))
}

/// Text from a file within a line of ours: line breaks and tabs are visible, too.
pub fn one_line(text: &str) -> Cow<'_, str> {
    escape(text, is_obeyed, |c, out| out.extend(c.escape_default()))
}

/// Whether a terminal obeys a character instead of showing it: control characters, and marks that
/// change the direction of text or break lines.
fn is_obeyed(c: char) -> bool {
    let is_mark = matches!(
        c,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    );
    c.is_control() || is_mark
}

/// Text with other spellings of some characters.
fn escape(
    text: &str,
    is_escaped: impl Fn(char) -> bool,
    spell: impl Fn(char, &mut String),
) -> Cow<'_, str> {
    if !text.contains(&is_escaped) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_escaped(c) {
            true => spell(c, &mut out),
            false => out.push(c),
        }
    }
    Cow::Owned(out)
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

/// SHA-256 in hex.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
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

/// Rows under their headings: the first `left` columns to the left, the others to the right.
pub fn table<const N: usize>(
    left: usize,
    head: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> String {
    let rows: Vec<[String; N]> = [head.map(str::to_owned)].into_iter().chain(rows).collect();
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0));
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).enumerate().map(|(column, (cell, width))| {
            if column < left { format!("{cell:width$}") } else { format!("{cell:>width$}") }
        });
        format!("{}\n", cells.collect::<Vec<_>>().join("  "))
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_columns_are_as_wide_as_their_widest_cell() {
        let rows = [["a", "10"], ["long", "2"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(1, ["b", "n"], rows.into_iter()), "b      n\na     10\nlong   2\n");
    }

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
    fn what_a_terminal_obeys_is_made_visible() {
        let text = "a\u{1b}[31m\r\n\tb\u{7f}\u{9b}\u{202e}\u{2066}é漢";
        assert_eq!(visible(text), "a\\u{1b}[31m\\r\n\tb\\u{7f}\\u{9b}\\u{202e}\\u{2066}é漢");
        assert_eq!(one_line("a\nb\tc"), "a\\nb\\tc");
        assert!(matches!(visible("a b\n"), Cow::Borrowed(_)));
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
