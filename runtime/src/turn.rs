//! What goes through a model in one step: new tokens of several texts, in batches.

use std::ops::Range;

use crate::{Sequence, cuda::WorkspaceOnDevice, identity::Identity};

/// New tokens of a text.
pub struct Turn<'t> {
    /// The tokens.
    pub tokens: &'t [u32],
    /// What they follow, and what holds them afterwards.
    pub sequence: &'t mut Sequence,
}

/// Memory that a model computes in, for any number of sequences: [`crate::Model::workspace`] makes
/// it. Blocks on the CPU need none.
pub struct Workspace {
    pub(crate) model: Identity,
    /// Of each CUDA device.
    pub(crate) segments: Vec<WorkspaceOnDevice>,
}

/// Tokens that go through the blocks together: of consecutive turns, of each some that follow one
/// another.
pub(crate) struct Batch {
    /// The turns.
    pub turns: Range<usize>,
    /// Which tokens of each turn.
    pub tokens: Vec<Range<usize>>,
    /// Rows of the batch that hold the last token of a turn.
    pub last_rows: Vec<usize>,
}

/// Cuts turns of so many tokens into batches of up to `most`; each turn has batches of its own
/// unless they go `together`.
pub(crate) fn batches(
    turns: impl IntoIterator<Item = usize>,
    most: usize,
    together: bool,
) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    let mut room = 0;
    for (turn, count) in turns.into_iter().enumerate() {
        if !together {
            room = 0;
        }
        let mut start = 0;
        while start < count {
            if room == 0 {
                room = most;
                let (turns, tokens, last_rows) = (turn..turn, Vec::new(), Vec::new());
                batches.push(Batch { turns, tokens, last_rows });
            }
            let batch = batches.last_mut().expect("pushed where there was no room");
            let end = count.min(start + room);
            batch.turns.end = turn + 1;
            batch.tokens.push(start..end);
            room -= end - start;
            if end == count {
                batch.last_rows.push(most - room - 1);
            }
            start = end;
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_turn_is_cut_and_short_ones_fill_up_what_is_left() {
        // The first turn of a batch, the tokens of each, the rows of last ones.
        let cut = |turns: &[usize], together| -> Vec<String> {
            let batches = batches(turns.iter().copied(), 4, together);
            let text = |Batch { turns, tokens, last_rows }: &Batch| {
                assert_eq!(turns.len(), tokens.len());
                format!("{}: {tokens:?} {last_rows:?}", turns.start)
            };
            batches.iter().map(text).collect()
        };
        assert_eq!(
            cut(&[10, 1, 2], true),
            ["0: [0..4] []", "0: [4..8] []", "0: [8..10, 0..1, 0..1] [1, 2]", "2: [1..2] [0]"]
        );
        assert_eq!(cut(&[5, 1], false), ["0: [0..4] []", "0: [4..5] [0]", "1: [0..1] [0]"]);
        assert!(cut(&[0], true).is_empty());
    }
}
