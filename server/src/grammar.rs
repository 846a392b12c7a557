//! Forms that a text is to have: JSON of a schema, or a grammar.

use std::sync::Arc;

use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Value as Json, json};
use slim_runtime::Tokenizer;

/// What marks the text of a special token in a trie: no text matches it.
const SPECIAL: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// A form of a text.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// JSON of this schema.
    Json(Json),
    /// A grammar in llguidance's Lark.
    Lark(String),
}

/// What makes grammars of forms, for one tokenizer.
pub struct Grammars(ParserFactory);

/// Where a text is in its form.
pub struct Grammar {
    matcher: Matcher,
    ends: Arc<[u32]>,
}

impl Grammars {
    /// For a model with so many `rows` of logits, whose texts any of `ends` ends.
    ///
    /// # Errors
    /// A sentence from the library.
    pub fn new(tokenizer: &Tokenizer, rows: usize, ends: &[u32]) -> Result<Self, String> {
        let known = tokenizer.vocab_size().min(rows) as u32;
        let bytes = |token| {
            let bytes = tokenizer.token_bytes(token);
            match tokenizer.is_special(token) || ends.contains(&token) {
                true => [&[SPECIAL][..], &bytes].concat(),
                false => bytes,
            }
        };
        // The last word stands for the end of a text where the model has no token for it.
        let words: Vec<Vec<u8>> = (0..known).map(bytes).chain([Vec::new()]).collect();
        let end = ends.iter().copied().find(|&end| end < known).unwrap_or(known);
        let trie = TokTrie::from(&TokRxInfo::new(known + 1, end), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(sentence)?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits { verbose_errors: false, ..ParserLimits::default() };
        Ok(Self(factory))
    }

    /// The start of a text of this form; any of `ends` may end it where the form is complete.
    ///
    /// # Errors
    /// A sentence, if the form cannot be read or is too large.
    pub fn start(&self, form: &Form, ends: &[u32]) -> Result<Grammar, String> {
        let grammar = match form {
            Form::Json(schema) => TopLevelGrammar::from_json_schema(on_one_line(schema)),
            Form::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let matcher = Matcher::new(self.0.create_parser(grammar));
        match matcher.get_error() {
            Some(error) => Err(one_line(&error)),
            None => Ok(Grammar { matcher, ends: ends.into() }),
        }
    }
}

impl Grammar {
    /// Rules out the tokens that do not follow; `false` if nothing does.
    ///
    /// # Errors
    /// A sentence, if the form takes too long.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<bool, String> {
        let mask = self.matcher.compute_mask().map_err(sentence)?;
        let may_end = self.matcher.is_accepting().map_err(sentence)?;
        let mut any = false;
        for (token, logit) in (0..).zip(logits) {
            let follows = match self.ends.contains(&token) {
                true => may_end,
                false => (token as usize) < mask.len() && mask.is_allowed(token),
            };
            match follows {
                true => any = true,
                false => *logit = f32::NEG_INFINITY,
            }
        }
        Ok(any)
    }

    /// Goes on by a token; `true` if nothing follows it.
    ///
    /// # Errors
    /// A sentence, if the form takes too long.
    pub fn advance(&mut self, token: u32) -> Result<bool, String> {
        self.matcher.consume_token(token).map_err(sentence)?;
        Ok(self.matcher.is_stopped())
    }
}

/// JSON of a schema with spaces as models write them, and no more: small models go on with line
/// breaks for ever.
pub fn on_one_line(schema: &Json) -> Json {
    let mut schema = match schema {
        Json::Object(_) => schema.clone(),
        other => json!({ "allOf": [other] }),
    };
    schema["x-guidance"] = json!({
        "whitespace_flexible": false,
        "item_separator": ", ?",
        "key_separator": ": ?",
    });
    schema
}

fn sentence(error: impl std::fmt::Display) -> String {
    one_line(&format!("{error:#}"))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
