//! The inputs of a product with many tokens, those of some tokens side by side.

use std::ops::Range;

use rayon::prelude::*;

use super::input::{Input, Step, sum_of};

/// Some tokens that a kernel multiplies at a time.
pub struct TokenBlock {
    /// How many.
    pub(super) tokens: usize,
    /// For each four columns a word of each token.
    pub(super) codes: Vec<i32>,
    /// The scale of each token, for each step.
    pub(super) scales: Vec<f32>,
    /// The sum of each token, for each step.
    pub(super) sums: Vec<f32>,
    /// The tokens of each step that have second codes.
    pub(super) fine: Vec<Fine>,
    /// The second codes, step by step and in it token by token.
    pub(super) fine_codes: Vec<[i32; 4]>,
}

/// What a matrix multiplies with scales of its own: some units of a step of the input.
pub(super) struct StepPart {
    /// Which step.
    pub step: usize,
    /// Both of its units, or one.
    pub units: Range<usize>,
}

/// Second codes of a step.
pub(super) struct Fine {
    /// The tokens that have them, a bit each.
    pub tokens: u16,
    /// Those of the first one in [`TokenBlock::fine_codes`].
    pub first: usize,
}

impl TokenBlock {
    /// The tokens of `inputs`, in such steps.
    fn new(steps: &[StepPart], inputs: &[Input]) -> Self {
        let tokens = inputs.len();
        let units: usize = steps.iter().map(|step| step.units.len()).sum();
        let mut block = Self {
            tokens,
            codes: vec![0; 4 * units * tokens],
            scales: Vec::with_capacity(steps.len() * tokens),
            sums: Vec::with_capacity(steps.len() * tokens),
            fine: Vec::with_capacity(steps.len()),
            fine_codes: Vec::new(),
        };
        let mut words = block.codes.chunks_exact_mut(tokens);
        for StepPart { step, units } in steps {
            for word in 4 * units.start..4 * units.end {
                let out = words.next().expect("a word of each four columns");
                for (out, input) in out.iter_mut().zip(inputs) {
                    *out = input.steps[*step].codes.as_flattened()[word];
                }
            }
            let mut fine = Fine { tokens: 0, first: block.fine_codes.len() };
            for (token, input) in inputs.iter().enumerate() {
                let Step { scale, has_fine_codes, .. } = input.steps[*step];
                block.scales.push(scale);
                block.sums.push(sum_of(&input.sums[*step][units.clone()]));
                if has_fine_codes {
                    fine.tokens |= 1 << token;
                    block.fine_codes.extend(&input.fine_codes[*step][units.clone()]);
                }
            }
            block.fine.push(fine);
        }
        block
    }

    /// Blocks of `x: [m, cols]`: of `largest` tokens, 12 or a power of two, and of powers of two
    /// for the rest.
    pub(super) fn of_all(
        largest: usize,
        steps: &[StepPart],
        x: &[f32],
        cols: usize,
        round: impl Fn(&[f32]) -> Input + Sync,
    ) -> Vec<Self> {
        let m = x.len() / cols;
        let mut parts = vec![largest; m / largest];
        let powers = (0..4).rev().map(|power| 1 << power);
        parts.extend(powers.filter(|tokens| (m % largest) & tokens != 0));
        let mut rest = x;
        let mut blocks = Vec::new();
        for tokens in parts {
            let (block, others) = rest.split_at(tokens * cols);
            blocks.push(block);
            rest = others;
        }
        let block = |x: &[f32]| {
            let inputs: Vec<Input> = x.chunks_exact(cols).map(&round).collect();
            Self::new(steps, &inputs)
        };
        blocks.into_par_iter().map(block).collect()
    }
}
