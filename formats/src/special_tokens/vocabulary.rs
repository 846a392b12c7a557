//! Token texts and what they are for.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use crate::{
    TokenizerSource,
    gguf::{Metadata, token_type},
};

/// What is read of a `tokenizer.json`. The merges, most of such a file, are passed over.
#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenizerJson {
    added_tokens: Vec<AddedToken>,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Model {
    vocab: Value,
}

/// Token texts with their ids, as far as a tokenizer gives them: what cannot be read is left out,
/// for the tokenizer itself to refuse.
#[derive(Debug, Default)]
pub(crate) struct Vocabulary {
    tokens: HashMap<String, Token>,
}

#[derive(Debug, Clone, Copy)]
struct Token {
    id: u32,
    kind: Kind,
}

/// How a text becomes a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Ordinary text that merges give.
    Plain,
    /// Found before anything else happens to a text, but part of it.
    Added,
    /// Found like that, and no part of the text.
    Control,
}

impl Vocabulary {
    /// The tokens of any tokenizer.
    pub fn of(tokenizer: &TokenizerSource) -> Self {
        match tokenizer {
            TokenizerSource::HuggingFace(json) => Self::from_tokenizer_json(json),
            TokenizerSource::Ggml(metadata) => Self::from_ggml(metadata),
            TokenizerSource::Missing => Self::default(),
        }
    }

    fn from_tokenizer_json(text: &str) -> Self {
        let TokenizerJson { added_tokens, model } = serde_json::from_str(text).unwrap_or_default();
        let mut tokens = HashMap::new();
        let mut insert = |text: String, id: Option<u32>, kind| {
            if let Some(id) = id {
                tokens.insert(text, Token { id, kind });
            }
        };
        match model.vocab {
            Value::Object(vocab) => {
                for (text, id) in vocab {
                    insert(text, as_token_id(&id), Kind::Plain);
                }
            }
            // Unigram: pairs of text and score in the order of the ids.
            pairs => {
                for (pair, id) in pairs.as_array().into_iter().flatten().zip(0..) {
                    let text = pair[0].as_str().unwrap_or_default();
                    insert(text.to_owned(), Some(id), Kind::Plain);
                }
            }
        }
        for AddedToken { id, content, special } in added_tokens {
            insert(content, Some(id), if special { Kind::Control } else { Kind::Added });
        }
        Self { tokens }
    }

    fn from_ggml(metadata: &Metadata) -> Self {
        let texts = metadata.strings("tokenizer.ggml.tokens").unwrap_or_default();
        let types = metadata.get("tokenizer.ggml.token_type").and_then(|types| types.as_array());
        let types = types.and_then(|types| types.to_u64s()).unwrap_or_default();
        let token = |(text, id): (&String, u32)| {
            let kind = match types.get(id as usize) {
                Some(&token_type::CONTROL) => Kind::Control,
                Some(&token_type::USER_DEFINED) => Kind::Added,
                Some(&token_type::UNUSED) => return None,
                _ => Kind::Plain,
            };
            Some((text.clone(), Token { id, kind }))
        };
        Self { tokens: texts.iter().zip(0..).filter_map(token).collect() }
    }

    /// The token of this text.
    pub fn id(&self, text: &str) -> Option<u32> {
        Some(self.tokens.get(text)?.id)
    }

    /// The control token of this text.
    pub fn control_id(&self, text: &str) -> Option<u32> {
        let token = self.tokens.get(text)?;
        (token.kind == Kind::Control).then_some(token.id)
    }

    /// Whether a text is found before anything else happens to the text around it.
    pub fn is_added(&self, text: &str) -> bool {
        self.tokens.get(text).is_some_and(|token| token.kind != Kind::Plain)
    }

    /// Whether a token is a control token.
    pub fn is_control(&self, id: u32) -> bool {
        self.tokens.values().any(|token| token.id == id && token.kind == Kind::Control)
    }

    /// One more than the highest id.
    pub fn end_of_ids(&self) -> u32 {
        self.tokens.values().map(|token| token.id.saturating_add(1)).max().unwrap_or_default()
    }
}

pub(super) fn as_token_id(value: &Value) -> Option<u32> {
    value.as_u64()?.try_into().ok()
}
