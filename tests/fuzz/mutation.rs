//! Small changes of a file: of bytes, and of what the readers count with.

use slim_runtime::SplitMix64;

/// Numbers at which checks go wrong.
const NUMBERS: [u64; 12] =
    [0, 1, 7, 8, 255, 1 << 16, (1 << 31) - 1, 1 << 31, u32::MAX as u64, 1 << 40, 1 << 63, u64::MAX];

/// Words that change what a text means.
const WORDS: [&str; 14] = [
    "null",
    "-1",
    "0",
    "1e308",
    "18446744073709551615",
    "[]",
    "{}",
    "\"\"",
    "true",
    "..",
    "/",
    "{{",
    "%}",
    "\u{0}",
];

/// Mutations without end, the same for the same seed.
pub struct Mutations(SplitMix64);

impl Mutations {
    pub fn new(seed: u64) -> Self {
        Self(SplitMix64::new(seed))
    }

    /// A changed copy of `file`.
    pub fn of(&mut self, file: &[u8]) -> Vec<u8> {
        let mut bytes = file.to_vec();
        for _ in 0..=self.0.below(3) {
            self.change(&mut bytes);
        }
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            bytes.push(self.0.below(256) as u8);
            return;
        }
        let at = self.place(bytes.len());
        match self.0.below(8) {
            0 => bytes[at] ^= 1 << self.0.below(8),
            1 => bytes[at] = self.0.below(256) as u8,
            2 => bytes.truncate(at),
            3 => {
                let number = NUMBERS[self.0.below(NUMBERS.len() as u64) as usize].to_le_bytes();
                let width = [1, 2, 4, 8][self.0.below(4) as usize].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&number[..width]);
            }
            4 => {
                let word = WORDS[self.0.below(WORDS.len() as u64) as usize];
                let end = self.end_of_word(bytes, at);
                bytes.splice(at..end, word.bytes());
            }
            5 => {
                let end = bytes.len().min(at + 1 + self.place(64));
                bytes.drain(at..end);
            }
            6 => {
                let end = bytes.len().min(at + 1 + self.place(64));
                let part = bytes[at..end].to_vec();
                let to = self.place(bytes.len());
                bytes.splice(to..to, part);
            }
            _ => {
                // A part of another part's place, as long.
                let from = self.place(bytes.len());
                let count = (1 + self.place(32)).min(bytes.len() - at.max(from));
                bytes.copy_within(from..from + count, at);
            }
        }
    }

    /// A place in a file: half of them in its first kilobyte, where most of what is counted is.
    fn place(&mut self, len: usize) -> usize {
        let len = if self.0.below(2) == 0 { len.min(1024) } else { len };
        self.0.below(len as u64) as usize
    }

    /// Where the word at `at` ends: numbers and names are replaced whole.
    fn end_of_word(&mut self, bytes: &[u8], at: usize) -> usize {
        let is_of_word = |byte: &u8| byte.is_ascii_alphanumeric() || b".-_".contains(byte);
        at + bytes[at..].iter().take_while(|byte| is_of_word(byte)).take(32).count()
    }
}
