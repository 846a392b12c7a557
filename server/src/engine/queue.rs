//! The texts that wait for a slot, and the way from the threads of HTTP to the engine.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::mpsc::Sender;

use super::{Draw, Sent};

/// A text that is to be written.
pub struct Job {
    /// At least one token, and no more than the context holds.
    pub prompt: Vec<u32>,
    /// Tokens to write at most; `None` for as many as the context has room for.
    pub limit: Option<usize>,
    /// How tokens are drawn.
    pub draw: Draw,
    /// Whether it is to be the same whatever else was and is written.
    pub is_repeatable: bool,
    /// Texts that end it, none of them empty.
    pub stops: Vec<String>,
    /// Its place among the texts of its request.
    pub choice: usize,
    /// Where it goes.
    pub client: Sender<Sent>,
    /// When it came.
    pub arrived: Instant,
}

/// Why texts are not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// As many texts as may wait do.
    Full,
    /// The server stops.
    Closed,
}

/// The texts that wait, oldest first.
pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    /// Texts that may be here and in slots.
    room: usize,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    /// Texts in slots.
    running: usize,
    is_closed: bool,
    has_ended: bool,
}

impl Queue {
    /// For `parallel` slots and `waiting` texts that wait for one.
    pub fn new(parallel: usize, waiting: usize) -> Self {
        let room = parallel + waiting;
        Self { state: Mutex::default(), changed: Condvar::new(), room }
    }

    /// Takes all of these texts, or none.
    pub fn push(&self, jobs: Vec<Job>) -> Result<(), Refusal> {
        let mut state = self.state();
        if state.is_closed {
            return Err(Refusal::Closed);
        }
        state.waiting.retain(|job| !job.client.is_closed());
        if state.waiting.len() + state.running + jobs.len() > self.room {
            return Err(Refusal::Full);
        }
        state.waiting.extend(jobs);
        self.changed.notify_all();
        Ok(())
    }

    /// The oldest text that waits and whose client does; it takes a slot.
    pub fn take(&self) -> Option<Job> {
        let mut state = self.state();
        let job = std::iter::from_fn(|| state.waiting.pop_front());
        let job = { job }.find(|job| !job.client.is_closed())?;
        state.running += 1;
        Some(job)
    }

    /// A text has left its slot.
    pub fn left(&self) {
        self.state().running -= 1;
    }

    /// Waits for a text.
    pub fn wait(&self) {
        let state = self.state();
        let nothing = |state: &mut State| state.waiting.is_empty() && !state.has_ended;
        drop(self.changed.wait_while(state, nothing));
    }

    /// Waits for a change, but no longer than so.
    pub fn wait_for(&self, most: Duration) {
        let state = self.state();
        if !state.has_ended {
            drop(self.changed.wait_timeout(state, most));
        }
    }

    /// Takes no more texts; those that wait are told.
    pub fn close(&self) {
        let mut state = self.state();
        state.is_closed = true;
        state
            .waiting
            .drain(..)
            .for_each(|job| drop(job.client.try_send(Sent::stopped(job.choice))));
    }

    /// Ends the texts that are being written, too.
    pub fn end(&self) {
        self.close();
        self.state().has_ended = true;
        self.changed.notify_all();
    }

    /// Whether it takes no more texts.
    pub fn is_closed(&self) -> bool {
        self.state().is_closed
    }

    pub fn has_ended(&self) -> bool {
        self.state().has_ended
    }

    /// Texts that wait.
    pub fn waiting(&self) -> usize {
        self.state().waiting.len()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
