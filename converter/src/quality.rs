//! What a result is likely to be worth, from texts that no conversion is calibrated on.

use std::{path::Path, sync::Arc};

use serde_json::Value as Json;
use slim_formats::{ModelConfig, ModelSource, slim::SlimFile};
use slim_kernels::Cpu;
use slim_runtime::{
    ChatFormat, Divergence, Evaluation, InBatches, Message, Model, Protocol, Result,
    document_tokens, evaluate,
};

/// Tokens of each text that are measured at most.
const TOKENS: usize = 256;

/// Tokens that [`predict_quality`] sends through each model at most.
pub(crate) const CHECKED_TOKENS: usize = Domain::CHECKED.len() * TOKENS;

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
    /// Running text in German.
    German,
    /// In French.
    French,
    /// In Spanish.
    Spanish,
    /// In Russian.
    Russian,
    /// In Chinese.
    Chinese,
    /// A text of a thousand words about the same people and things.
    Long,
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
    /// Those that every result is compared on.
    pub const CHECKED: [Self; 3] = [Self::Prose, Self::Code, Self::Chat];

    /// All kinds.
    pub const ALL: [Self; 9] = [
        Self::Prose,
        Self::Code,
        Self::Chat,
        Self::German,
        Self::French,
        Self::Spanish,
        Self::Russian,
        Self::Chinese,
        Self::Long,
    ];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prose => "prose",
            Self::Code => "code",
            Self::Chat => "chat",
            Self::German => "german",
            Self::French => "french",
            Self::Spanish => "spanish",
            Self::Russian => "russian",
            Self::Chinese => "chinese",
            Self::Long => "long",
        }
    }

    /// Its text; `None` of the chat, whose text is the model's.
    fn text(self) -> Option<&'static str> {
        Some(match self {
            Self::Prose => include_str!("../data/held-back/prose.txt"),
            Self::Code => include_str!("../data/held-back/code.txt"),
            Self::Chat => return None,
            Self::German => include_str!("../data/held-back/german.txt"),
            Self::French => include_str!("../data/held-back/french.txt"),
            Self::Spanish => include_str!("../data/held-back/spanish.txt"),
            Self::Russian => include_str!("../data/held-back/russian.txt"),
            Self::Chinese => include_str!("../data/held-back/chinese.txt"),
            Self::Long => include_str!("../data/held-back/long.txt"),
        })
    }

    /// The tokens of its text for a model.
    fn tokens(self, model: &Model) -> Result<Vec<u32>> {
        match self.text() {
            Some(text) => document_tokens(model.tokenizer()?, model.config(), text),
            None => chat_tokens(model),
        }
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
    let quality = |domain: Domain| {
        let Profile { evaluation, .. } = profile(domain, source, result, TOKENS)?;
        let divergence = evaluation.divergence.expect("two models were compared");
        Ok(Quality { domain, tokens: evaluation.tokens, divergence })
    };
    Domain::CHECKED.into_iter().map(quality).collect()
}

/// Tells how far files are from the model that they were made of.
pub struct Ruler(Model);

impl Ruler {
    /// Of `source`. Memory is taken as by [`quality_bytes`].
    ///
    /// # Errors
    /// Those of [`Model::load`].
    pub fn new(source: Arc<dyn ModelSource>) -> crate::Result<Self> {
        Ok(Self(Model::load(source, &Cpu)?))
    }

    /// The mean divergence of a SliM file over all tokens of the texts of [`predict_quality`].
    ///
    /// # Errors
    /// Those of opening and running it.
    pub fn divergence(&self, file: &Path) -> crate::Result<f64> {
        let file = Model::load(Arc::new(SlimFile::open(file)?), &Cpu)?;
        let of_texts = predict_quality(&self.0, &file)?;
        let tokens: usize = of_texts.iter().map(|quality| quality.tokens).sum();
        let sum = |quality: &Quality| quality.divergence.kl_mean * quality.tokens as f64;
        Ok(of_texts.iter().map(sum).sum::<f64>() / tokens as f64)
    }
}

/// How a result compares with its source on a kind of text.
#[derive(Debug, Clone)]
pub struct Profile {
    /// The kind.
    pub domain: Domain,
    /// The tokens of its text.
    pub tokens: Vec<u32>,
    /// What was measured on them, as one window.
    pub evaluation: Evaluation,
}

/// Compares `result` with the `source` that it was made of on the text of a kind, up to `most`
/// tokens.
///
/// # Errors
/// Those of the models and of their tokenizers.
pub fn profile(domain: Domain, source: &Model, result: &Model, most: usize) -> Result<Profile> {
    let text = domain.tokens(source)?;
    let tokens = text.len().min(most).min(source.config().context_length);
    let whole = |model| InBatches { model, batch: tokens };
    let (mut source, mut result) = (whole(source), whole(result));
    let protocol = Protocol { context: tokens, windows: 1 };
    let evaluation = evaluate(&mut result, Some(&mut source), &text, protocol, |_, _| ())?;
    Ok(Profile { domain, tokens: text[..tokens].to_vec(), evaluation })
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
        for text in Domain::ALL.map(|domain| domain.text().unwrap_or(&chat)) {
            assert!(runs(text).is_disjoint(&calibration), "{text}");
        }
    }

    #[test]
    fn what_is_no_number_is_useless() {
        for (kl_mean, is_useless) in [(0.9, false), (1.1, true), (f64::NAN, true)] {
            let [kl_p50, kl_p90, kl_p99, kl_p999] = [0.0; 4];
            let top1_agreement = 1.0;
            let divergence =
                Divergence { kl_mean, kl_p50, kl_p90, kl_p99, kl_p999, top1_agreement };
            let quality = Quality { domain: Domain::Prose, tokens: 2, divergence };
            assert_eq!(quality.is_useless(), is_useless);
        }
    }
}
