//! Generating text: from a prompt to tokens to text, as a stream of events.

use std::{fmt, time::Instant};

use crate::{
    KvCache, Model, Result, RuntimeError, Sampler, TextStream, Tokenizer, model::PREFILL_BATCH,
};

/// A model in the middle of a text, which it can continue again and again.
pub struct Generator<'a> {
    model: &'a Model<'a>,
    tokenizer: &'a Tokenizer,
    cache: KvCache,
    /// The tokens in `cache`.
    held: Vec<u32>,
    sampler: Sampler,
    /// The tokens that end what the model writes.
    ends: Vec<u32>,
}

impl<'a> Generator<'a> {
    /// A model at the start of a text of up to `context` tokens; any of `ends` ends what it writes
    /// ([`end_tokens`](crate::end_tokens)).
    ///
    /// # Errors
    /// `Kernel` if a device has no memory for the context.
    pub fn new(
        model: &'a Model<'a>,
        tokenizer: &'a Tokenizer,
        ends: Vec<u32>,
        context: usize,
        sampler: Sampler,
    ) -> Result<Self> {
        let cache = model.new_cache(context)?;
        let sampler = sampler.limited_to(tokenizer.vocab_size(), model.config().vocab_size);
        Ok(Self { model, tokenizer, cache, held: Vec::new(), sampler, ends })
    }

    /// Tokens that the context holds at most.
    pub fn context(&self) -> usize {
        self.cache.capacity()
    }

    /// Tokens that the context holds now.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Continues `prompt` by up to `limit` tokens; `None` is as many as the model and the context
    /// give. What the prompt shares with the text before is not computed again.
    ///
    /// # Errors
    /// `InvalidArgument` if the prompt is empty, or longer than the context.
    pub fn generate(&mut self, prompt: &[u32], limit: Option<usize>) -> Result<Generation<'_, 'a>> {
        if !(1..=self.context()).contains(&prompt.len()) {
            let expected = format!("1 to {} tokens, the size of the context", self.context());
            return Err(RuntimeError::invalid_argument("prompt", prompt.len(), expected));
        }
        let shared = self.held.iter().zip(prompt).take_while(|(held, new)| held == new).count();
        // The last token goes through the model in any case: what follows it is asked for.
        let shared = shared.min(prompt.len() - 1);
        self.cache.truncate(shared);
        self.held.truncate(shared);
        let fresh = prompt[shared..].to_vec();
        Ok(Generation {
            total: fresh.len(),
            fresh,
            left: limit,
            stream: TextStream::new(self.tokenizer, prompt),
            state: State::Running,
            timings: Timings::default(),
            generator: self,
        })
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
pub struct Generation<'g, 'a> {
    generator: &'g mut Generator<'a>,
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

impl Generation<'_, '_> {
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
        if self.fresh.len() > PREFILL_BATCH {
            return self.feed_batch();
        }
        if self.left == Some(0) {
            return self.end(End::Limit);
        }
        if self.generator.held() + self.fresh.len() > self.generator.context() {
            return self.end(End::Context);
        }
        let token = self.draw()?;
        if self.generator.ends.contains(&token) {
            return self.end(End::Model);
        }
        self.left = self.left.map(|left| left - 1);
        self.fresh.push(token);
        Ok(Event::Token { id: token, text: self.stream.push(token)?.unwrap_or_default() })
    }

    /// Sends a batch of a long prompt through the model; between batches the caller can stop it.
    fn feed_batch(&mut self) -> Result<Event> {
        let Generator { model, cache, held, .. } = &mut *self.generator;
        let batch: Vec<u32> = self.fresh.drain(..PREFILL_BATCH).collect();
        held.extend(&batch);
        self.timings.prefill.measure(batch.len(), || model.prefill(&batch, cache))?;
        Ok(Event::Prompt { done: self.total - self.fresh.len(), total: self.total })
    }

    fn draw(&mut self) -> Result<u32> {
        let Generator { model, cache, held, sampler, ends, .. } = &mut *self.generator;
        let fresh = std::mem::take(&mut self.fresh);
        held.extend(&fresh);
        // A chat is full of ends of turns. A penalty on them would make the model talk on and on.
        let recent: Vec<u32> = held.iter().copied().filter(|token| !ends.contains(token)).collect();
        let Timings { prefill, decode } = &mut self.timings;
        let timing = if prefill.tokens + fresh.len() <= self.total { prefill } else { decode };
        timing.measure(fresh.len(), || model.next_token(&fresh, cache, sampler, &recent))
    }

    fn end(&mut self, reason: End) -> Result<Event> {
        self.state = State::Ended;
        Ok(Event::End { reason, text: self.stream.finish()? })
    }
}

impl Iterator for Generation<'_, '_> {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.state == State::Ended {
            return None;
        }
        let event = self.advance();
        if event.is_err() {
            self.state = State::Ended;
            // What a failed step left in the cache is unknown.
            self.generator.cache.clear();
            self.generator.held.clear();
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
