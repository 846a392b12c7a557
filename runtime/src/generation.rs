//! Generating text: from a prompt to tokens to text, as a stream of events.

use std::{borrow::BorrowMut, fmt, time::Instant};

use crate::{
    Model, Result, RuntimeError, Sampler, SamplerSettings, Sequence, TextStream, Tokenizer, Turn,
    Workspace, document_tokens, end_tokens, model::PREFILL_BATCH,
};

/// Tokens of a context where nobody asks for more: keeps the KV cache small.
pub const DEFAULT_CONTEXT: usize = 4096;

/// How [`Model::generate`] continues a text.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Tokens of prompt and continuation at most, and no more than the model was made for; `None`
    /// for [`DEFAULT_CONTEXT`].
    pub context: Option<usize>,
    /// Tokens of the continuation at most; `None` for as many as the model and the context give.
    pub limit: Option<usize>,
    /// How tokens are drawn, and from which seed; `None` for [`SamplerSettings::recommended`].
    pub sampler: Option<SamplerSettings>,
}

impl Model {
    /// Continues `prompt`. An empty one becomes the token that starts a text.
    ///
    /// # Errors
    /// Those of [`Self::tokenizer`], [`Sampler::new`], [`Generator::new`] and
    /// [`Generator::generate`].
    pub fn generate(&self, prompt: &str, settings: Settings) -> Result<Generation<'_>> {
        let (tokenizer, config) = (self.tokenizer()?, self.config());
        let context = settings.context.unwrap_or(DEFAULT_CONTEXT).min(config.context_length);
        let recommended = || SamplerSettings::recommended(&config.generation);
        let sampler = Sampler::new(settings.sampler.unwrap_or_else(recommended))?;
        let prompt = document_tokens(tokenizer, config, prompt)?;
        let ends = end_tokens(self.source(), tokenizer);
        let generator = Generator::new(self, tokenizer, ends, context, sampler)?;
        Generation::new(generator, &prompt, settings.limit)
    }
}

/// A model in the middle of a text, which it can continue again and again.
pub struct Generator<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    sequence: Sequence,
    workspace: Workspace,
    sampler: Sampler,
    /// The tokens that end what the model writes.
    ends: Vec<u32>,
}

impl<'a> Generator<'a> {
    /// A model at the start of a text of up to `context` tokens; any of `ends` ends what it writes
    /// ([`end_tokens`]).
    ///
    /// # Errors
    /// `Kernel` if a device has no memory for the context.
    pub fn new(
        model: &'a Model,
        tokenizer: &'a Tokenizer,
        ends: Vec<u32>,
        context: usize,
        sampler: Sampler,
    ) -> Result<Self> {
        let (sequence, workspace) = (model.sequence(context)?, model.workspace()?);
        let sampler = sampler.limited_to(tokenizer.vocab_size(), model.config().vocab_size);
        Ok(Self { model, tokenizer, sequence, workspace, sampler, ends })
    }

    /// Tokens that the context holds at most.
    pub fn context(&self) -> usize {
        self.sequence.capacity()
    }

    /// Tokens that the context holds now.
    pub fn held(&self) -> usize {
        self.sequence.tokens().len()
    }

    /// Continues `prompt` by up to `limit` tokens; `None` is as many as the model and the context
    /// give. What the prompt shares with the text before is not computed again.
    ///
    /// # Errors
    /// `InvalidArgument` if the prompt is empty, or longer than the context.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        limit: Option<usize>,
    ) -> Result<Generation<'a, &mut Self>> {
        Generation::new(self, prompt, limit)
    }
}

/// What happens while a text is generated.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// More of a long prompt went through the model.
    Prompt {
        /// Tokens so far.
        done: usize,
        /// Tokens of the prompt that were not computed before.
        total: usize,
    },
    /// The next token.
    Token {
        /// The token.
        id: u32,
        /// The text that is now certain: empty after a special token and within a character.
        text: String,
    },
    /// Nothing follows.
    End {
        /// Why.
        reason: End,
        /// The text that was held back: U+FFFD for a character that was cut short, or nothing.
        text: String,
    },
}

/// Why a text ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The model ended it.
    Model,
    /// It has as many tokens as were asked for.
    Limit,
    /// The context is full.
    Context,
    /// The caller stopped it.
    Caller,
}

/// A text on its way: an iterator of its events, the last of which is [`Event::End`], or an error.
/// `G` is the generator or borrows it.
pub struct Generation<'a, G: BorrowMut<Generator<'a>> = Generator<'a>> {
    generator: G,
    /// Tokens that have to go through the model before the next can be drawn.
    fresh: Vec<u32>,
    /// Tokens of the prompt that were to go through the model.
    total: usize,
    /// Tokens that may still be drawn; `None` for any number.
    left: Option<usize>,
    stream: TextStream<'a>,
    state: State,
    timings: Timings,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Stopped,
    Ended,
}

impl<'a, G: BorrowMut<Generator<'a>>> Generation<'a, G> {
    fn new(mut generator: G, prompt: &[u32], limit: Option<usize>) -> Result<Self> {
        let Generator { tokenizer, sequence, .. } = generator.borrow_mut();
        let context = sequence.capacity();
        if !(1..=context).contains(&prompt.len()) {
            let expected = format!("1 to {context} tokens, the size of the context");
            return Err(RuntimeError::invalid_argument("prompt", prompt.len(), expected));
        }
        let pairs = sequence.tokens().iter().zip(prompt);
        let shared = pairs.take_while(|(held, new)| held == new).count();
        // The last token goes through the model in any case: what follows it is asked for.
        let shared = shared.min(prompt.len() - 1);
        sequence.truncate(shared);
        let shared = sequence.tokens().len();
        let (fresh, stream) = (prompt[shared..].to_vec(), TextStream::new(tokenizer, prompt));
        let (state, timings) = (State::Running, Timings::default());
        Ok(Self { generator, total: fresh.len(), fresh, left: limit, stream, state, timings })
    }

    /// Ends the text with the next event.
    pub fn stop(&mut self) {
        if self.state == State::Running {
            self.state = State::Stopped;
        }
    }

    /// How long it took so far.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    fn advance(&mut self) -> Result<Event> {
        if self.state == State::Stopped {
            return self.end(End::Caller);
        }
        let sequence = &self.generator.borrow_mut().sequence;
        let piece = sequence.next_piece(self.fresh.len(), PREFILL_BATCH);
        if piece < self.fresh.len() {
            return self.feed_piece(piece);
        }
        if self.left == Some(0) {
            return self.end(End::Limit);
        }
        let generator = self.generator.borrow_mut();
        if generator.held() + self.fresh.len() > generator.context() {
            return self.end(End::Context);
        }
        let token = self.draw()?;
        if self.generator.borrow_mut().ends.contains(&token) {
            return self.end(End::Model);
        }
        self.left = self.left.map(|left| left - 1);
        self.fresh.push(token);
        Ok(Event::Token { id: token, text: self.stream.push(token)?.unwrap_or_default() })
    }

    /// Sends a piece of a long prompt through the model; between pieces the caller can stop it.
    fn feed_piece(&mut self, piece: usize) -> Result<Event> {
        let Generator { model, sequence, workspace, .. } = self.generator.borrow_mut();
        let tokens: Vec<u32> = self.fresh.drain(..piece).collect();
        let turn = Turn { tokens: &tokens, sequence };
        self.timings.prefill.measure(tokens.len(), || model.prefill(turn, workspace))?;
        Ok(Event::Prompt { done: self.total - self.fresh.len(), total: self.total })
    }

    fn draw(&mut self) -> Result<u32> {
        let Generator { model, sequence, workspace, sampler, ends, .. } =
            self.generator.borrow_mut();
        let fresh = std::mem::take(&mut self.fresh);
        // A chat is full of ends of turns. A penalty on them would make the model talk on and on.
        let so_far = sequence.tokens().iter().chain(&fresh).copied();
        let recent: Vec<u32> = so_far.filter(|token| !ends.contains(token)).collect();
        let Timings { prefill, decode } = &mut self.timings;
        let timing = if prefill.tokens + fresh.len() <= self.total { prefill } else { decode };
        let turn = Turn { tokens: &fresh, sequence };
        timing.measure(fresh.len(), || model.next_token(turn, workspace, sampler, &recent))
    }

    fn end(&mut self, reason: End) -> Result<Event> {
        self.state = State::Ended;
        Ok(Event::End { reason, text: self.stream.finish()? })
    }
}

impl<'a, G: BorrowMut<Generator<'a>>> Iterator for Generation<'a, G> {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.state == State::Ended {
            return None;
        }
        let event = self.advance();
        if event.is_err() {
            self.state = State::Ended;
        }
        Some(event)
    }
}

/// How long a text took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Timings {
    /// The prompt, and the first token drawn.
    pub prefill: Timing,
    /// Each further token.
    pub decode: Timing,
}

/// Tokens that went through the model, and how long that took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Timing {
    /// Their number.
    pub tokens: usize,
    /// Seconds of wall time.
    pub seconds: f64,
}

impl Timing {
    fn measure<T>(&mut self, tokens: usize, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.tokens += tokens;
        self.seconds += start.elapsed().as_secs_f64();
        result
    }
}

/// `12 tokens at 250.6 tokens/s`.
impl fmt::Display for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} token{}", self.tokens, if self.tokens == 1 { "" } else { "s" })?;
        match self.tokens {
            0 => Ok(()),
            tokens => write!(f, " at {:.1} tokens/s", tokens as f64 / self.seconds),
        }
    }
}

/// `prefill 4 tokens at 46.5 tokens/s; decode 39 tokens at 250.6 tokens/s`.
impl fmt::Display for Timings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "prefill {}; decode {}", self.prefill, self.decode)
    }
}
