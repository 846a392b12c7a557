//! The function `strftime_now`: Python's `datetime.now().strftime` in the C locale.

use chrono::{DateTime, FixedOffset, Local};

/// The fields of the C library that chrono writes as it does.
const FIELDS: &str = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyY";

/// Those of them that are numbers, which flags can pad.
const NUMBERS: &str = "CdegGHIjklmMsSuUVwWyY";

/// No field is wider: more would be an attack.
const MAX_WIDTH: usize = 1024;

/// The time now, as transformers gives it to a template: that of this place.
pub(super) fn strftime_now(format: &str) -> String {
    strftime(format, &Local::now().fixed_offset())
}

/// What is no field stays as it is. Python's `now()` knows no time zone, so `%Z` and `%z` are
/// empty.
///
/// # Source
/// `strftime` of glibc, with its flags `-`, `_`, `0`, `^`, `#`, widths, and modifiers `E`, `O`;
/// `%f` of Python's `datetime`.
fn strftime(format: &str, time: &DateTime<FixedOffset>) -> String {
    let mut text = String::new();
    let mut rest = format;
    while let Some((before, after)) = rest.split_once('%') {
        text += before;
        let (field, behind) = match Field::read(after) {
            Some((field, length)) => (field.text(time), &after[length..]),
            None => ("%".to_owned(), after),
        };
        text += &field;
        rest = behind;
    }
    text + rest
}

/// A field behind its `%`.
struct Field {
    /// Empty, or one of `-_0^#`.
    flag: Option<char>,
    width: usize,
    letter: char,
}

impl Field {
    /// The field at the start of a text, and how many bytes it takes; `None` for one that is
    /// unknown.
    fn read(text: &str) -> Option<(Self, usize)> {
        let flags = text.len() - text.trim_start_matches(['-', '_', '0', '^', '#']).len();
        let (flags, rest) = text.split_at(flags);
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (width, rest) = rest.split_at(digits);
        let rest = rest.strip_prefix(['E', 'O', ':']).unwrap_or(rest);
        let letter = rest.chars().next()?;
        if !FIELDS.contains(letter) && !"fzZ%".contains(letter) {
            return None;
        }
        let width = width.parse().unwrap_or(0);
        let field = Self { flag: flags.chars().last(), width, letter };
        (width <= MAX_WIDTH).then_some((field, text.len() - rest.len() + letter.len_utf8()))
    }

    fn text(&self, time: &DateTime<FixedOffset>) -> String {
        let mut text = match self.letter {
            '%' => return "%".to_owned(),
            'z' | 'Z' => return String::new(),
            'f' => return format!("{:06}", time.timestamp_subsec_micros().min(999_999)),
            letter => time.format(&format!("%{letter}")).to_string(),
        };
        let is_number = NUMBERS.contains(self.letter);
        if is_number && matches!(self.flag, Some('-' | '_' | '0')) {
            let digits = text.trim_start_matches([' ', '0']);
            let digits = if digits.is_empty() { "0" } else { digits };
            text = match self.flag {
                Some('-') => digits.to_owned(),
                Some('_') => format!("{digits:>0$}", text.len()),
                _ => format!("{digits:0>0$}", text.len()),
            };
        }
        match self.flag {
            Some('^') => text = text.to_uppercase(),
            Some('#') if self.letter == 'p' => text = text.to_lowercase(),
            Some('#') => text = text.to_uppercase(),
            _ => {}
        }
        let fills_with_zeros = match self.flag {
            Some('0') => true,
            Some('-' | '_') => false,
            _ => is_number && !"ekl".contains(self.letter),
        };
        match fills_with_zeros {
            true => format!("{text:0>0$}", self.width),
            false => format!("{text:>0$}", self.width),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unix time in UTC.
    fn at(seconds: i64, format: &str) -> String {
        strftime(format, &DateTime::from_timestamp(seconds, 4_500_000).unwrap().fixed_offset())
    }

    #[test]
    fn strftime_knows_the_calendar() {
        for (seconds, format, expected) in [
            (0, "%Y-%m-%d %H:%M:%S %A", "1970-01-01 00:00:00 Thursday"),
            (951_782_400, "%d %b %Y", "29 Feb 2000"),
            (4_107_542_399, "%a %d %B %Y %H:%M:%S 100%%", "Sun 28 February 2100 23:59:59 100%"),
            (4_107_542_400, "%d %B", "01 March"),
        ] {
            assert_eq!(at(seconds, format), expected, "{format}");
        }
    }

    /// The expected texts are what Python 3 prints on Linux.
    #[test]
    fn strftime_has_the_fields_of_python() {
        // 2024-07-04 15:07:09.004500, a Thursday.
        for (format, expected) in [
            ("%-d %e %_d %0e", "4  4  4 04"),
            ("%I:%M %p %P", "03:07 PM pm"),
            ("%-I %l %k %-H", "3  3 15 15"),
            ("%j %-j %y %C", "186 186 24 20"),
            ("%x %X", "07/04/24 15:07:09"),
            ("%c", "Thu Jul  4 15:07:09 2024"),
            ("%D %F %T %R %r", "07/04/24 2024-07-04 15:07:09 15:07 03:07:09 PM"),
            ("%U %W %w %u %G %g %V", "26 27 4 4 2024 24 27"),
            ("[%Z|%z]", "[|]"),
            ("%f %s %h%n%t.", "004500 1720105629 Jul\n\t."),
            ("%^a %#B %#p %^b", "THU JULY pm JUL"),
            ("%Ey %Od %EY", "24 04 2024"),
            ("%5d %-5d %10A|%3Y", "00004     4   Thursday|2024"),
            ("%_5d|%05e|%5e|%^10a", "    4|00004|    4|       THU"),
            ("%Q %é %", "%Q %é %"),
        ] {
            assert_eq!(at(1_720_105_629, format), expected, "{format}");
        }
        assert_eq!(at(1_720_105_629, "%99999999d"), "%99999999d");
    }
}
