//! The control texts of a template (`<|im_start|>`), and whether the tokenizer has them as tokens.

use std::collections::BTreeSet;

use serde_json::Value as Json;

use crate::{Result, Tokenizer};

/// No control text is longer.
const MAX_BYTES: usize = 64;

/// Breaks a control text in two where a user typed it. It is no character, so that nothing else in
/// a text is taken for it.
const MARK: char = '\u{FDD0}';

/// Control texts that the vocabulary has as tokens, but as tokens of ordinary text, which merges do
/// not reach: files that type `<|im_start|>` as ordinary are common.
///
/// They become tokens where the template writes them. Where a user types them they stay text, as in
/// transformers and llama.cpp, which find no special token there either. (What the vocabulary has
/// as a special token becomes one wherever it stands, also as there.)
#[derive(Default)]
pub(super) struct MendedTexts(Vec<(String, u32)>);

impl MendedTexts {
    /// Looks through what a template writes. Also gives what is wrong with it, a sentence each.
    pub fn find(written: &str, tokenizer: &Tokenizer) -> Result<(Self, Vec<String>)> {
        let (mut mended, mut warnings) = (Vec::new(), Vec::new());
        for text in bracketed(written) {
            let count = tokenizer.encode(text)?.len();
            if count == 1 {
                continue;
            }
            if let Some(token) = tokenizer.token_id(text) {
                warnings.push(format!(
                    "the chat template writes `{text}`, which the tokenizer cuts into {count} tokens; \
                     the vocabulary has it as token {token}, typed as ordinary text, which is used"
                ));
                mended.push((text.to_owned(), token));
            } else if is_control(text) {
                warnings.push(format!(
                    "the chat template writes `{text}`, which is no token of the vocabulary and is cut \
                     into {count}; the model may not understand the chat"
                ));
            }
        }
        // Of two at one place the longer one counts.
        mended.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        Ok((Self(mended), warnings))
    }

    /// What a user wrote, with each of the texts broken.
    pub fn broken(&self, content: &str) -> String {
        self.0
            .iter()
            .fold(content.to_owned(), |content, (text, _)| content.replace(text, &marked(text)))
    }

    /// The same in all texts of a document.
    pub fn broken_json(&self, json: &Json) -> Json {
        match json {
            Json::String(text) => self.broken(text).into(),
            Json::Array(items) => items.iter().map(|item| self.broken_json(item)).collect(),
            Json::Object(fields) => {
                let broken =
                    |(key, field): (&String, &Json)| (key.clone(), self.broken_json(field));
                Json::Object(fields.iter().map(broken).collect())
            }
            other => other.clone(),
        }
    }

    /// The tokens of what a template made of broken contents.
    pub fn encode(&self, written: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let encode = |part: &str| match part {
            "" => Ok(Vec::new()),
            part => tokenizer.encode(&self.whole(part)),
        };
        let (mut tokens, mut start, mut at) = (Vec::new(), 0, 0);
        while at < written.len() {
            let rest = &written[at..];
            let found = self.0.iter().find(|(text, _)| rest.starts_with(text.as_str()));
            if let Some((text, token)) = found {
                tokens.extend(encode(&written[start..at])?);
                tokens.push(*token);
                start = at + text.len();
                at = start;
            } else {
                at += rest.chars().next().map_or(1, char::len_utf8);
            }
        }
        tokens.extend(encode(&written[start..])?);
        Ok(tokens)
    }

    /// The tokens of the texts.
    pub fn tokens(&self) -> impl Iterator<Item = u32> {
        self.0.iter().map(|&(_, token)| token)
    }

    fn whole(&self, content: &str) -> String {
        self.0
            .iter()
            .fold(content.to_owned(), |content, (text, _)| content.replace(&marked(text), text))
    }
}

fn marked(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().into_iter().chain([MARK]).chain(letters).collect()
}

/// The parts of a text from `<` to `>` or from `[` to `]`, without spaces between.
fn bracketed(text: &str) -> BTreeSet<&str> {
    let end_of = |part: &str| {
        let close = if part.starts_with('<') { '>' } else { ']' };
        let stops = |c: char| c.is_whitespace() || c == close || "<[".contains(c);
        let end = 1 + part[1..].find(stops)?;
        (part[end..].starts_with(close) && (3..=MAX_BYTES).contains(&(end + 1))).then_some(end + 1)
    };
    let starts = text.match_indices(['<', '[']).map(|(start, _)| &text[start..]);
    starts.filter_map(|part| Some(&part[..end_of(part)?])).collect()
}

/// Whether a text is spelled as only control tokens are. `[INST]` and `<think>` are not: models
/// read them as text, too.
fn is_control(text: &str) -> bool {
    text.starts_with('<') && (text.contains(['|', '｜', '_']) || ["<s>", "</s>"].contains(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bracketed_texts_are_found() {
        let text = "<s>[INST] <<SYS>>a < b > c <|im_start|>x[/INST]<｜User｜>[a b]<>";
        let expected = ["<s>", "[INST]", "<SYS>", "<|im_start|>", "[/INST]", "<｜User｜>"];
        assert_eq!(bracketed(text), BTreeSet::from(expected));
        assert_eq!(bracketed(&format!("<{}>", "a".repeat(100))), BTreeSet::new());
    }
}
