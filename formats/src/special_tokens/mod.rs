//! The tokens that begin and end what a model writes, from all places where its files say it: one
//! reader for Hugging Face folders, ONNX models, GGUF and SliM files.

mod added;
mod ggml;
mod hugging_face;
#[cfg(test)]
mod tests;
mod vocabulary;
mod well_known;

use crate::ModelConfig;

pub(crate) use added::with_added_tokens;
pub use ggml::GgmlDefaults;
pub(crate) use ggml::{END_IDS_KEY, GGML_END_KEYS};
pub(crate) use hugging_face::TokenFiles;
pub(crate) use vocabulary::Vocabulary;

/// Where a text begins, and what ends it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct SpecialTokens {
    /// The token that starts a text.
    pub bos: Option<u32>,
    /// The tokens that end what the model writes, each once, the main one first.
    pub ends: Vec<u32>,
    /// Whether `bos` is put in front of a text.
    pub add_bos: bool,
}

impl SpecialTokens {
    /// Adds a token that ends what the model writes.
    fn end(&mut self, token: u32) {
        if !self.ends.contains(&token) {
            self.ends.push(token);
        }
    }

    /// Adds the tokens of the vocabulary that are known to end a turn or a text.
    fn end_as_well_known(&mut self, vocabulary: &Vocabulary, vocab_size: usize) {
        for token in well_known::ends(vocabulary) {
            if (token as usize) < vocab_size {
                self.end(token);
            }
        }
    }

    /// Brings them into a configuration.
    pub fn describe(self, config: &mut ModelConfig) {
        config.bos_token_id = self.bos;
        config.eos_token_ids = self.ends;
        config.add_bos = self.add_bos;
    }
}
