//! Writing many texts together: one thread owns the model's sequences and works in rounds.
//!
//! A round takes one token of every text that is being written, and a piece of the prompt of one
//! that is not. All of them go through the model in one step.

mod draw;
mod queue;
mod text;

use std::{sync::Arc, time::Duration};

use rayon::prelude::*;
use slim_runtime::{Sequence, Turn, Workspace};

use crate::{metrics::Metrics, served::Served};

pub use draw::{Draw, Penalties, Weighed};
pub use queue::{Job, Queue, Refusal};
pub use text::{End, Event, Sent};
use text::{State, Text};

/// Tokens of a prompt that go through the model with the next tokens of other texts: they wait for
/// it. Texts that are to be repeatable are read in such pieces alone, too, from the beginning of a
/// text on: attention rounds otherwise with another number of queries.
const PIECE_TOKENS: usize = 64;

/// Tokens of a prompt that go through the model while no other text waits for it.
const LONE_PIECE_TOKENS: usize = 512;

/// How often texts are looked at whose clients do not read.
const LOOK: Duration = Duration::from_millis(10);

/// A sequence, and the text that it holds or held.
struct Slot<'a> {
    sequence: Sequence,
    text: Option<Text<'a>>,
    /// Tokens at the beginning of the sequence that were read in the pieces of a repeatable text.
    exact: usize,
    /// The round in which a text last took or left it.
    used: u64,
}

impl<'a> Slot<'a> {
    /// Whether its text goes on by a token.
    fn writes(&self) -> bool {
        self.text.as_ref().is_some_and(|text| text.is_ready() && text.is_writing())
    }

    /// Tokens of a text that the sequence holds already. The last token of a prompt goes through
    /// the model in any case: what follows it is asked for.
    fn reusable(&self, job: &Job) -> usize {
        let shared = shared(self.sequence.tokens(), &job.prompt).min(job.prompt.len() - 1);
        match job.is_repeatable {
            true => {
                let exact = shared.min(self.exact) / PIECE_TOKENS * PIECE_TOKENS;
                let reusable = self.sequence.reusable(exact);
                if reusable.is_multiple_of(PIECE_TOKENS) { reusable } else { 0 }
            }
            false => self.sequence.reusable(shared),
        }
    }

    /// Begins a text.
    fn begin(&mut self, served: &'a Served, job: Job, reused: usize) {
        self.sequence.truncate(reused);
        self.exact = self.exact.min(reused);
        self.text = Some(Text::new(served, job, reused));
    }

    /// How many tokens of a prompt go through the model next, if `most` may.
    fn next_piece(&self, most: usize) -> usize {
        match self.text.as_ref().is_some_and(Text::is_repeatable) {
            true => self.unread().min(PIECE_TOKENS),
            false => self.sequence.next_piece(self.unread(), most),
        }
    }

    /// So many tokens of a prompt are about to go through the model.
    fn read(&mut self, tokens: usize) {
        let start = self.sequence.tokens().len();
        if start == self.exact && start.is_multiple_of(PIECE_TOKENS) && tokens <= PIECE_TOKENS {
            self.exact += tokens;
        }
    }

    /// Tokens of its text's prompt that have not gone through the model.
    fn unread(&self) -> usize {
        let text = self.text.as_ref().filter(|text| text.is_ready() && !text.is_writing());
        text.map_or(0, |text| text.fresh().len())
    }
}

/// All slots, and where texts come from.
pub struct Engine<'a> {
    served: &'a Served,
    queue: &'a Queue,
    metrics: &'a Arc<Metrics>,
    workspace: Workspace,
    slots: Vec<Slot<'a>>,
    /// Rounds so far.
    round: u64,
    /// The slot whose prompt was read last.
    reader: usize,
}

impl<'a> Engine<'a> {
    /// With memory for `parallel` texts of up to `context` tokens each.
    ///
    /// # Errors
    /// Those of [`slim_runtime::Model::sequences`].
    pub fn new(
        served: &'a Served,
        queue: &'a Queue,
        metrics: &'a Arc<Metrics>,
        parallel: usize,
        context: usize,
    ) -> slim_runtime::Result<Self> {
        let workspace = served.model().workspace()?;
        let sequences = served.model().sequences(parallel, context)?;
        let slots =
            sequences.into_iter().map(|sequence| Slot { sequence, text: None, exact: 0, used: 0 });
        let slots = slots.collect();
        Ok(Self { served, queue, metrics, workspace, slots, round: 0, reader: 0 })
    }

    /// Writes texts until the queue has ended.
    pub fn run(mut self) {
        loop {
            self.deliver();
            self.admit();
            self.metrics.set_running(self.running());
            if self.queue.has_ended() {
                break self.drop_all();
            }
            match self.plan() {
                plan if plan.iter().all(|&tokens| tokens == 0) => match self.running() {
                    0 => self.queue.wait(),
                    _ => self.queue.wait_for(LOOK),
                },
                plan => self.step(&plan),
            }
        }
    }

    fn running(&self) -> usize {
        self.slots.iter().filter(|slot| slot.text.is_some()).count()
    }

    /// Hands on what was drawn, and frees the slots of texts that have ended.
    fn deliver(&mut self) {
        for slot in &mut self.slots {
            let state = slot.text.as_mut().map(Text::deliver);
            if let Some(State::Dropped(reason)) = state {
                self.metrics.count_dropped(reason);
            }
            if matches!(state, Some(State::Done | State::Dropped(_))) {
                slot.text = None;
                slot.used = self.round;
                self.queue.left();
            }
        }
    }

    /// Gives free slots to the texts that wait longest.
    fn admit(&mut self) {
        while self.slots.iter().any(|slot| slot.text.is_none()) {
            let Some(job) = self.queue.take() else { return };
            let free = self.slots.iter_mut().filter(|slot| slot.text.is_none());
            // Of equals the one that was left alone for longest.
            let best = free.max_by_key(|slot| (slot.reusable(&job), std::cmp::Reverse(slot.used)));
            let slot = best.expect("a free slot");
            let reused = slot.reusable(&job);
            self.metrics.count_prompt(job.prompt.len(), reused);
            slot.used = self.round;
            slot.begin(self.served, job, reused);
        }
    }

    /// How many tokens of each slot's text go through the model in this round.
    fn plan(&mut self) -> Vec<usize> {
        let mut plan: Vec<_> =
            self.slots.iter().map(|slot| if slot.writes() { 1 } else { 0 }).collect();
        let most = match plan.contains(&1) {
            true => PIECE_TOKENS,
            false => LONE_PIECE_TOKENS,
        };
        let count = self.slots.len();
        let next = (1..=count).map(|step| (self.reader + step) % count);
        if let Some(reader) = { next }.find(|&index| self.slots[index].unread() > 0) {
            plan[reader] = self.slots[reader].next_piece(most);
            self.slots[reader].read(plan[reader]);
            self.reader = reader;
        }
        plan
    }

    /// Sends so many tokens of each text through the model, and draws what follows.
    fn step(&mut self, plan: &[usize]) {
        self.round += 1;
        self.metrics.count_round();
        let Self { served, slots, workspace, .. } = self;
        let chosen = slots.iter_mut().zip(plan).filter(|(_, tokens)| **tokens > 0);
        let mut chosen: Vec<_> = chosen.map(|(slot, &tokens)| (slot, tokens)).collect();
        let turns = chosen.iter_mut().map(|(Slot { sequence, text, .. }, tokens)| {
            let text = text.as_ref().expect("a text that was planned");
            Turn { tokens: &text.fresh()[..*tokens], sequence }
        });
        let logits = served.model().step(&mut turns.collect::<Vec<_>>(), workspace);
        let mut logits = match logits {
            Ok(logits) => logits,
            Err(error) => {
                let texts = chosen.into_iter().filter_map(|(slot, _)| slot.text.as_mut());
                return texts.for_each(|text| text.fail(error.to_string()));
            }
        };
        let rows = logits.par_chunks_exact_mut(served.model().config().vocab_size);
        let written = chosen.into_par_iter().zip(rows).map(|((slot, tokens), logits)| {
            let text = slot.text.as_mut().expect("a text that was planned");
            text.went_through(tokens, &slot.sequence, logits)
        });
        let written = written.collect::<Vec<_>>();
        for first_token in written.into_iter().flatten() {
            self.metrics.count_token(first_token);
        }
    }

    /// Drops the texts that are left when the queue has ended.
    fn drop_all(&mut self) {
        for text in self.slots.iter_mut().filter_map(|slot| slot.text.take()) {
            self.metrics.count_dropped("stopped");
            text.stop();
        }
        self.metrics.set_running(0);
    }
}

/// Tokens that both texts begin with.
fn shared(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
