//! Texts that end a text.

/// Looks for stop strings in a text that comes in pieces, and holds back what may begin one.
#[derive(Debug, Default)]
pub struct Stops {
    stops: Vec<String>,
    held: String,
}

impl Stops {
    /// For any of these texts, of which none is empty.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes a piece; gives the text that is certain now, and whether a stop string follows it.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held += piece;
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(start) = found {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return (text, true);
        }
        let begun = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - begun);
        (std::mem::replace(&mut self.held, held), false)
    }

    /// What was held back, at the end of the text.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that begin `stop`, as many as possible.
pub fn overlap(text: &str, stop: &str) -> usize {
    let most = text.len().min(stop.len() - 1);
    let begins = |&bytes: &usize| text.as_bytes().ends_with(&stop.as_bytes()[..bytes]);
    // Both are UTF-8: a prefix that cuts a character ends no text.
    (1..=most).rev().find(begins).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What pieces become: the text, and whether it was stopped.
    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut filter = Stops::new(stops.iter().map(ToString::to_string).collect());
        let mut texts = Vec::new();
        for piece in pieces {
            let (text, stopped) = filter.push(piece);
            texts.push(text);
            if stopped {
                return (texts, true);
            }
        }
        texts.push(filter.finish());
        (texts, false)
    }

    #[test]
    fn stop_string_across_pieces_is_found_and_never_given() {
        assert_eq!(run(&["END"], &["a E", "N", "D b"]).0.concat(), "a ");
        assert_eq!(run(&["END"], &["a E", "N", "x"]), (vec_of(&["a ", "", "ENx", ""]), false));
        assert_eq!(run(&["aab"], &["aaa", "b"]).0, ["a", ""]);
        assert_eq!(run(&["b", "abc"], &["ab"]), (vec_of(&["a"]), true));
        assert_eq!(run(&["é!"], &["cé", "?"]).0, ["c", "é?", ""]);
        assert_eq!(run(&[], &["a", "b"]).0, ["a", "b", ""]);
        assert_eq!(run(&["END"], &["a EN"]).0, ["a ", "EN"]);
    }

    fn vec_of(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }
}
