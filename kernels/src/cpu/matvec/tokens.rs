//! The inputs of a product with one token or some, those of all of them side by side.

use std::array;

use rayon::prelude::*;

use super::input::StepCodes;

/// `T` tokens that a kernel multiplies at a time.
pub(super) struct Tokens<const T: usize> {
    /// In the order of columns.
    pub steps: Vec<Step<T>>,
    /// The second codes of the steps that have some, token by token.
    pub fine_codes: Vec<StepCodes>,
}

/// A step of `T` inputs.
#[derive(Clone, Copy)]
pub(super) struct Step<const T: usize> {
    /// For each four columns a word of each token. Where the step has but 16 columns, those of the
    /// others are 0.
    pub codes: [[[i32; T]; 4]; 2],
    /// What codes are worth.
    pub scales: [f32; T],
    /// The sums of the rounded values: what a minimum multiplies.
    pub sums: [f32; T],
    pub fine: Fine,
}

/// Second codes of a step.
#[derive(Clone, Copy)]
pub(super) struct Fine {
    /// The tokens that have them, a bit each.
    pub tokens: u16,
    /// Those of the first one in [`Tokens::fine_codes`].
    pub first: usize,
}

impl<const T: usize> Tokens<T> {
    fn of(inputs: [Tokens<1>; T]) -> Self {
        let mut fine_codes = Vec::new();
        let steps = (0..inputs[0].steps.len()).map(|index| {
            let of_tokens: [_; T] = array::from_fn(|token| &inputs[token].steps[index]);
            let mut codes = [[[0; T]; 4]; 2];
            for (unit, codes) in codes.iter_mut().enumerate() {
                for (word, codes) in codes.iter_mut().enumerate() {
                    *codes = of_tokens.map(|step| step.codes[unit][word][0]);
                }
            }
            let mut fine = Fine { tokens: 0, first: fine_codes.len() };
            for (token, input) in inputs.iter().enumerate() {
                if let Some(codes) = input.fine_codes_of(index) {
                    fine.tokens |= 1 << token;
                    fine_codes.push(*codes);
                }
            }
            let scales = of_tokens.map(|step| step.scales[0]);
            Step { codes, scales, sums: of_tokens.map(|step| step.sums[0]), fine }
        });
        Self { steps: steps.collect(), fine_codes }
    }
}

impl Tokens<1> {
    /// The second codes of a step.
    pub fn fine_codes_of(&self, step: usize) -> Option<&StepCodes> {
        let fine = self.steps[step].fine;
        (fine.tokens != 0).then(|| &self.fine_codes[fine.first])
    }
}

/// Tokens that a kernel multiplies at a time, as many as registers have room for.
pub enum TokenBlock {
    One(Tokens<1>),
    Two(Tokens<2>),
    Four(Tokens<4>),
    Eight(Tokens<8>),
    Twelve(Tokens<12>),
}

impl TokenBlock {
    /// How many.
    pub(super) fn tokens(&self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::Two(_) => 2,
            Self::Four(_) => 4,
            Self::Eight(_) => 8,
            Self::Twelve(_) => 12,
        }
    }

    /// Blocks of `x: [m, cols]`: of `largest` tokens, 12 or a power of two, and of powers of two
    /// for the rest.
    pub(super) fn of_all(
        largest: usize,
        x: &[f32],
        cols: usize,
        round: impl Fn(&[f32]) -> Tokens<1> + Sync,
    ) -> Vec<Self> {
        if x.len() == cols {
            return vec![Self::One(round(x))];
        }
        let m = x.len() / cols;
        let mut counts = vec![largest; m / largest];
        let powers = (0..4).rev().map(|power| 1 << power);
        counts.extend(powers.filter(|tokens| (m % largest) & tokens != 0));
        let mut rest = x;
        let mut blocks = Vec::new();
        for tokens in counts {
            let (block, others) = rest.split_at(tokens * cols);
            blocks.push(block);
            rest = others;
        }
        let block = |x: &[f32]| Self::of(x.chunks_exact(cols).map(&round).collect());
        blocks.into_par_iter().map(block).collect()
    }

    fn of(mut inputs: Vec<Tokens<1>>) -> Self {
        fn tokens<const T: usize>(inputs: Vec<Tokens<1>>) -> Tokens<T> {
            let inputs = inputs.try_into().ok();
            Tokens::of(inputs.expect("that many tokens"))
        }
        match inputs.len() {
            1 => Self::One(inputs.remove(0)),
            2 => Self::Two(tokens(inputs)),
            4 => Self::Four(tokens(inputs)),
            8 => Self::Eight(tokens(inputs)),
            12 => Self::Twelve(tokens(inputs)),
            count => unreachable!("a block of {count} tokens"),
        }
    }
}
