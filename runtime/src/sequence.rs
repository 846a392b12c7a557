//! A text that a model has read: its tokens, and what each block keeps of them.

use std::ops::Range;

use crate::{State, cuda::SequenceOnDevice, identity::Identity, state::Recurrent};

/// Memory that the system can give, where it says so: Linux.
pub(crate) fn free_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes << 10)
}

/// Tokens at the end of a prompt that go through a model with states by themselves: the copy before
/// them is what another text with the same beginning can go on from.
const LAST_PIECE: usize = 16;

/// A text that a model has read so far: [`crate::Model::sequence`] makes it.
///
/// Any number of sequences share a model and a [`crate::Workspace`].
pub struct Sequence {
    pub(crate) model: Identity,
    /// Those that are held.
    pub(crate) tokens: Vec<u32>,
    pub(crate) capacity: usize,
    /// Of the blocks on the CPU.
    pub(crate) blocks: Vec<State>,
    /// The states of blocks that have some, at an earlier length.
    pub(crate) kept: Option<Kept>,
    /// Of the blocks on each CUDA device.
    pub(crate) segments: Vec<SequenceOnDevice>,
}

/// A copy of all states of a text, which cannot be rolled back.
pub(crate) struct Kept {
    /// Tokens that they have seen.
    tokens: usize,
    states: Vec<Recurrent>,
}

impl Sequence {
    /// The tokens held; the next one takes the position that is their number.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens but the first [`reusable`](Self::reusable)`(tokens)`.
    pub fn truncate(&mut self, tokens: usize) {
        let left = self.reusable(tokens);
        if left < self.tokens.len() {
            let kept = self.kept.as_ref().filter(|kept| kept.tokens == left);
            let mut states = kept.into_iter().flat_map(|kept| &kept.states);
            for state in recurrent(&mut self.blocks) {
                match states.next() {
                    Some(kept) => state.clone_from(kept),
                    None => state.clear(),
                }
            }
        }
        self.tokens.truncate(left);
    }

    /// How many of its first `tokens` tokens it can go on from: all, but for a model with states,
    /// which has a copy of these from the beginning of the last step of several tokens at best.
    pub fn reusable(&self, tokens: usize) -> usize {
        let held = self.tokens.len();
        if tokens >= held || !self.has_states() {
            return tokens.min(held);
        }
        let kept = self.kept.as_ref().map(|kept| kept.tokens);
        kept.filter(|&kept| kept <= tokens).unwrap_or(0)
    }

    /// How many of so many `unread` tokens of a prompt to feed next, `most` at most: all that may
    /// be, but that a model with states reads the last few of a prompt by themselves.
    pub fn next_piece(&self, unread: usize, most: usize) -> usize {
        match unread.checked_sub(LAST_PIECE) {
            Some(before @ 1..) if self.has_states() => before.min(most),
            _ => unread.min(most),
        }
    }

    fn has_states(&self) -> bool {
        self.blocks.iter().any(|state| matches!(state, State::Recurrent(_)))
    }

    /// Copies the states, if there are some, before several tokens change them: the `range` of
    /// those that are new.
    pub(crate) fn keep(&mut self, range: &Range<usize>) {
        let tokens = self.tokens.len() + range.start;
        if range.len() > 1 && tokens > 0 {
            let states: Vec<_> = recurrent(&mut self.blocks).map(|state| state.clone()).collect();
            self.kept = (!states.is_empty()).then_some(Kept { tokens, states });
        }
    }

    /// Forgets all tokens of a model with states, which a step has left somewhere on its way.
    pub(crate) fn give_up(&mut self) {
        let mut states = recurrent(&mut self.blocks).peekable();
        if states.peek().is_some() {
            states.for_each(Recurrent::clear);
            self.tokens.clear();
            self.kept = None;
        }
    }
}

/// The states among what blocks keep.
fn recurrent(blocks: &mut [State]) -> impl Iterator<Item = &mut Recurrent> {
    blocks.iter_mut().filter_map(|state| match state {
        State::Recurrent(state) => Some(state),
        State::Cache(_) | State::Shared => None,
    })
}
