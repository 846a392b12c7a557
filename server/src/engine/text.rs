//! A text in a slot: what of it has to go through the model, and what its client has to get.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use slim_runtime::{Sequence, TextStream};
use tokio::sync::mpsc::error::TrySendError;

use super::{
    draw::{Drawn, Weighed},
    queue::Job,
};
use crate::{served::Served, stops::Stops};

/// How long a text may stand still in all because its client does not read.
const PATIENCE: Duration = Duration::from_secs(30);

/// News of one of the texts of a request.
#[derive(Debug)]
pub struct Sent {
    /// Its place among them.
    pub choice: usize,
    pub event: Event,
}

/// News of a text.
#[derive(Debug)]
pub enum Event {
    /// It goes on, or ends.
    Written {
        /// More text, which may be empty.
        text: String,
        /// The tokens that were drawn since the last news, where log probabilities are told.
        tokens: Vec<Weighed>,
        end: Option<End>,
    },
    /// It cannot be written further: a sentence.
    Failed(String),
    /// The server stops.
    Stopped,
}

/// The end of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Whether it reached its limit, or the context's; otherwise the model or a stop string ended
    /// it.
    pub is_cut: bool,
    /// Tokens of the prompt that were not computed again.
    pub reused: usize,
    /// Tokens drawn.
    pub written: usize,
}

impl Sent {
    pub fn stopped(choice: usize) -> Self {
        Self { choice, event: Event::Stopped }
    }
}

/// Whether a text stays in its slot.
pub enum State {
    Goes,
    Done,
    /// Why: `gone` or `slow`.
    Dropped(&'static str),
}

/// A text in a slot.
pub struct Text<'a> {
    job: Job,
    served: &'a Served,
    /// Tokens that have to go through the model: the rest of the prompt, or the last one drawn.
    fresh: Vec<u32>,
    reused: usize,
    /// Each token drawn, and how often.
    counts: HashMap<u32, u32>,
    written: usize,
    stream: TextStream<'a>,
    stops: Stops,
    /// The tokens drawn that no news has told yet.
    tokens: Vec<Weighed>,
    /// News that its client has not taken yet.
    news: Option<Event>,
    /// Since when.
    stalled: Option<Instant>,
    /// How long it stood still before.
    stood: Duration,
}

impl<'a> Text<'a> {
    /// A text whose first `reused` tokens its sequence holds.
    pub fn new(served: &'a Served, mut job: Job, reused: usize) -> Self {
        Self {
            served,
            fresh: job.prompt[reused..].to_vec(),
            reused,
            counts: HashMap::new(),
            written: 0,
            stream: TextStream::new(served.tokenizer(), &job.prompt),
            stops: Stops::new(std::mem::take(&mut job.stops)),
            tokens: Vec::new(),
            news: None,
            stalled: None,
            stood: Duration::ZERO,
            job,
        }
    }

    pub fn fresh(&self) -> &[u32] {
        &self.fresh
    }

    /// Whether it may go through the model.
    pub fn is_ready(&self) -> bool {
        self.news.is_none()
    }

    pub fn is_repeatable(&self) -> bool {
        self.job.is_repeatable
    }

    /// Whether its prompt was read.
    pub fn is_writing(&self) -> bool {
        self.written > 0
    }

    /// Hands on the news, if its client takes it.
    pub fn deliver(&mut self) -> State {
        if self.job.client.is_closed() {
            return State::Dropped("gone");
        }
        let Some(event) = self.news.take() else { return State::Goes };
        let is_last = match &event {
            Event::Written { end, .. } => end.is_some(),
            Event::Failed(_) | Event::Stopped => true,
        };
        match self.job.client.try_send(Sent { choice: self.job.choice, event }) {
            Ok(()) if is_last => State::Done,
            Ok(()) => {
                self.stood += self.stalled.take().map_or(Duration::ZERO, |since| since.elapsed());
                State::Goes
            }
            Err(TrySendError::Closed(_)) => State::Dropped("gone"),
            Err(TrySendError::Full(sent)) => {
                self.news = Some(sent.event);
                let since = *self.stalled.get_or_insert_with(Instant::now);
                match self.stood + since.elapsed() > PATIENCE {
                    true => State::Dropped("slow"),
                    false => State::Goes,
                }
            }
        }
    }

    /// Its first `tokens` fresh tokens have gone through the model; if these were all, draws what
    /// follows. Gives, if a token was drawn, how long its client waited for the first one, if it
    /// is that.
    pub fn went_through(
        &mut self,
        tokens: usize,
        sequence: &Sequence,
        logits: &mut [f32],
    ) -> Option<Option<Duration>> {
        self.fresh.drain(..tokens);
        if !self.fresh.is_empty() {
            return None;
        }
        let before = self.written;
        match self.draw(sequence, logits) {
            Ok(event) => self.news = event,
            Err(reason) => self.fail(reason),
        }
        let first = || (before == 0).then(|| self.job.arrived.elapsed());
        (self.written > before).then(first)
    }

    pub fn fail(&mut self, reason: String) {
        self.news = Some(Event::Failed(reason));
    }

    /// Tells its client that the server stops.
    pub fn stop(self) {
        let _ = self.job.client.try_send(Sent::stopped(self.job.choice));
    }

    /// Draws the next token; gives the news, if there are any.
    fn draw(&mut self, sequence: &Sequence, logits: &mut [f32]) -> Result<Option<Event>, String> {
        if self.job.limit == Some(0) {
            return self.end(true);
        }
        let ends = self.served.ends();
        // A chat is full of ends of turns. A penalty on them would make the model talk on and on.
        let recent = sequence.tokens().iter().copied().filter(|token| !ends.contains(token));
        let recent: Vec<_> = recent.collect();
        let drawn = self.job.draw.next(logits, &recent, &self.counts)?;
        let Some(Drawn { token, weighed }) = drawn.filter(|drawn| !ends.contains(&drawn.token))
        else {
            return self.end(false);
        };
        self.written += 1;
        *self.counts.entry(token).or_default() += 1;
        self.tokens.extend(weighed);
        let form_ends = match &mut self.job.draw.grammar {
            Some(grammar) => grammar.advance(token)?,
            None => false,
        };
        let piece = self.stream.push(token).map_err(|error| error.to_string())?;
        let (text, stopped) = self.stops.push(&piece.unwrap_or_default());
        if stopped {
            return Ok(Some(self.written_event(text, Some(false))));
        }
        let is_cut = self.job.limit == Some(self.written)
            || sequence.tokens().len() + 1 > sequence.capacity();
        if form_ends || is_cut {
            let rest = self.rest()?;
            return Ok(Some(self.written_event(text + &rest, Some(!form_ends))));
        }
        self.fresh.push(token);
        Ok((!text.is_empty()).then(|| self.written_event(text, None)))
    }

    /// The text ends without another token.
    fn end(&mut self, is_cut: bool) -> Result<Option<Event>, String> {
        let rest = self.rest()?;
        Ok(Some(self.written_event(rest, Some(is_cut))))
    }

    /// What was held back.
    fn rest(&mut self) -> Result<String, String> {
        let cut_character = self.stream.finish().map_err(|error| error.to_string())?;
        let (text, stopped) = self.stops.push(&cut_character);
        Ok(if stopped { text } else { text + &self.stops.finish() })
    }

    fn written_event(&mut self, text: String, end: Option<bool>) -> Event {
        let (reused, written) = (self.reused, self.written);
        let end = end.map(|is_cut| End { is_cut, reused, written });
        Event::Written { text, tokens: std::mem::take(&mut self.tokens), end }
    }
}
