//! The model that is served, with what turns chats into its tokens.

use std::sync::OnceLock;

use self_cell::self_cell;
use serde_json::Value as Json;
use slim_runtime::{ChatFormat, Message, Model, Result, Tokenizer, document_tokens, end_tokens};

use crate::{grammar::Grammars, tools};

self_cell! {
    /// A model beside what borrows from it.
    pub struct Served {
        owner: Model,
        #[covariant]
        dependent: Formats,
    }
}

struct Formats<'a> {
    tokenizer: &'a Tokenizer,
    /// `None` without a chat template.
    chat: Option<ChatFormat<'a>>,
    /// Whether the template writes tools as we read their calls.
    has_tools: bool,
    ends: Vec<u32>,
    warnings: Vec<String>,
    /// Made when they are first asked for.
    grammars: OnceLock<Result<Grammars, String>>,
}

impl Served {
    /// # Errors
    /// Those of [`Model::tokenizer`] and [`ChatFormat::new`].
    pub fn load(model: Model) -> Result<Self> {
        Self::try_new(model, |model| {
            let (source, tokenizer) = (model.source(), model.tokenizer()?);
            let (mut chat, mut warnings) = (None, Vec::new());
            match source.chat_template() {
                None => warnings.push("the model has no chat template: chats are refused".into()),
                Some(template) => {
                    let (format, odd) = ChatFormat::new(template, model.config(), tokenizer)?;
                    (chat, warnings) = (Some(format), odd);
                }
            }
            let ends = match &chat {
                Some(format) => format.end_tokens(),
                None => end_tokens(source, tokenizer),
            };
            let has_tools = source.chat_template().is_some_and(tools::are_written_by);
            Ok(Formats { tokenizer, chat, has_tools, ends, warnings, grammars: OnceLock::new() })
        })
    }

    pub fn model(&self) -> &Model {
        self.borrow_owner()
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        self.borrow_dependent().tokenizer
    }

    /// The tokens that end what the model writes.
    pub fn ends(&self) -> &[u32] {
        &self.borrow_dependent().ends
    }

    /// What is odd about the model, a sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.borrow_dependent().warnings
    }

    pub fn has_chats(&self) -> bool {
        self.borrow_dependent().chat.is_some()
    }

    /// The tokens of a chat up to where the assistant answers; `None` without a chat template.
    pub fn chat_tokens(&self, messages: &[Message], tools: &[Json]) -> Option<Result<Vec<u32>>> {
        let Formats { chat, has_tools, .. } = self.borrow_dependent();
        let format = chat.as_ref()?;
        Some(match has_tools {
            true => format.tokens(messages, tools),
            false => format.tokens(&tools::in_words(messages, tools), &[]),
        })
    }

    /// The tokens of a text to continue.
    pub fn document_tokens(&self, text: &str) -> Result<Vec<u32>> {
        document_tokens(self.tokenizer(), self.model().config(), text)
    }

    /// # Errors
    /// A sentence, if no grammar can be used with this tokenizer.
    pub fn grammars(&self) -> Result<&Grammars, &str> {
        let new = || {
            let rows = self.model().config().vocab_size;
            Grammars::new(self.tokenizer(), rows, self.ends())
        };
        self.borrow_dependent().grammars.get_or_init(new).as_ref().map_err(String::as_str)
    }
}
