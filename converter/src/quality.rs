//! What a result is likely to be worth, from texts that no conversion is calibrated on.

use serde_json::Value as Json;
use slim_formats::ModelConfig;
use slim_runtime::{
    ChatFormat, Divergence, InBatches, Message, Model, Protocol, Result, document_tokens, evaluate,
};

/// Tokens of each text that are measured at most.
const TOKENS: usize = 256;

/// Positions whose logits are held at a time, those of both models.
const LOGITS: u64 = 2 * 128;

/// The mean divergence from the source above which a result is likely useless, in nats per token.
/// `docs/accuracy.md` says why.
pub const USELESS_KL: f64 = 1.0;

/// A kind of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// Running text.
    Prose,
    /// Programs.
    Code,
    /// A chat, in the model's own format if it has one.
    Chat,
}

/// How far a result is from its source on a kind of text.
#[derive(Debug, Clone)]
pub struct Quality {
    /// The kind.
    pub domain: Domain,
    /// Tokens that were compared.
    pub tokens: usize,
    /// The divergence from the source.
    pub divergence: Divergence,
}

impl Domain {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Prose, Self::Code, Self::Chat];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prose => "prose",
            Self::Code => "code",
            Self::Chat => "chat",
        }
    }

    /// The tokens of its text for a model.
    fn tokens(self, model: &Model) -> Result<Vec<u32>> {
        let text = match self {
            Self::Prose => include_str!("../data/held-back/prose.txt").to_owned(),
            Self::Code => include_str!("../data/held-back/code.txt").to_owned(),
            Self::Chat => return chat_tokens(model),
        };
        document_tokens(model.tokenizer()?, model.config(), &text)
    }
}

impl Quality {
    /// Whether the result is likely useless for such texts.
    pub fn is_useless(&self) -> bool {
        let kl = self.divergence.kl_mean;
        kl.is_nan() || kl > USELESS_KL
    }
}

/// Memory that [`predict_quality`] takes besides the mapped files, in bytes: the logits of both.
pub fn quality_bytes(config: &ModelConfig) -> u64 {
    4 * LOGITS * config.vocab_size as u64
}

/// Compares `result` with the `source` that it was made of, on a text of each kind: 256
/// tokens through both.
///
/// # Errors
/// Those of the models and of their tokenizers.
pub fn predict_quality(source: &Model, result: &Model) -> Result<Vec<Quality>> {
    Domain::ALL.into_iter().map(|domain| compare(domain, source, result)).collect()
}

fn compare(domain: Domain, source: &Model, result: &Model) -> Result<Quality> {
    let text = domain.tokens(source)?;
    let tokens = text.len().min(TOKENS).min(source.config().context_length);
    let whole = |model| InBatches { model, batch: tokens };
    let (mut source, mut result) = (whole(source), whole(result));
    let protocol = Protocol { context: tokens, windows: 1 };
    let evaluation = evaluate(&mut result, Some(&mut source), &text, protocol, |_, _| ())?;
    let divergence = evaluation.divergence.expect("two models were compared");
    Ok(Quality { domain, tokens, divergence })
}

/// The tokens of the held-back chat; without a template that renders it, of its lines.
fn chat_tokens(model: &Model) -> Result<Vec<u32>> {
    let (tokenizer, config) = (model.tokenizer()?, model.config());
    let messages = chat();
    let rendered = model.source().chat_template().and_then(|template| {
        let (format, _) = ChatFormat::new(template, config, tokenizer).ok()?;
        format.tokens(&messages, &[]).ok()
    });
    if let Some(tokens) = rendered {
        return Ok(tokens);
    }
    let line = |message: &Message| format!("{}: {}\n\n", message.role, message.content);
    document_tokens(tokenizer, config, &messages.iter().map(line).collect::<String>())
}

fn chat() -> Vec<Message> {
    let json: Json =
        serde_json::from_str(include_str!("../data/held-back/chat.json")).expect("it is JSON");
    let text = |message: &Json, key: &str| message[key].as_str().expect("a text").to_owned();
    let message = |message| Message::new(text(message, "role"), text(message, "content"));
    json.as_array().expect("a list of messages").iter().map(message).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::BUILT_IN_CALIBRATION;

    /// Runs of ten words.
    fn runs(text: &str) -> HashSet<Vec<&str>> {
        let words: Vec<&str> = text.split_whitespace().collect();
        words.windows(10).map(<[&str]>::to_vec).collect()
    }

    #[test]
    fn held_back_texts_share_no_ten_words_in_a_row_with_the_calibration_text() {
        let calibration = runs(BUILT_IN_CALIBRATION);
        let chat: String = chat().iter().map(|message| format!("{} ", message.content)).collect();
        let prose = include_str!("../data/held-back/prose.txt");
        let code = include_str!("../data/held-back/code.txt");
        for text in [prose, code, &chat] {
            let runs = runs(text);
            assert!(runs.len() > 150 && runs.is_disjoint(&calibration));
        }
    }

    #[test]
    fn what_is_no_number_is_useless() {
        for (kl_mean, is_useless) in [(0.9, false), (1.1, true), (f64::NAN, true)] {
            let divergence = Divergence { kl_mean, kl_p50: 0.0, kl_p99: 0.0, top1_agreement: 1.0 };
            let quality = Quality { domain: Domain::Prose, tokens: 2, divergence };
            assert_eq!(quality.is_useless(), is_useless);
        }
    }
}
