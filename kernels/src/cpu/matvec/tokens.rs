//! The inputs of a product with one token or some, those of all of them side by side.

use rayon::prelude::*;

use super::{
    super::unpack::UNIT,
    in_whole_units,
    input::{Rounding, StepCodes, round_block},
};

/// `T` tokens that a kernel multiplies at a time.
#[derive(Default)]
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

impl<const T: usize> Step<T> {
    /// One of no inputs.
    pub const ZERO: Self = Self {
        codes: [[[0; T]; 4]; 2],
        scales: [0.0; T],
        sums: [0.0; T],
        fine: Fine { tokens: 0, first: 0 },
    };
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
    pub(super) fn of_all(largest: usize, x: &[f32], cols: usize, rounding: &Rounding) -> Vec<Self> {
        let (x, cols) = (in_whole_units(x, cols), cols.next_multiple_of(UNIT));
        let m = x.len() / cols;
        if m == 1 {
            return vec![Self::of(rounding, &x, cols)];
        }
        let mut counts = vec![largest; m / largest];
        let powers = (0..4).rev().map(|power| 1 << power);
        counts.extend(powers.filter(|tokens| (m % largest) & tokens != 0));
        let mut rest = &*x;
        let mut blocks = Vec::new();
        for tokens in counts {
            let (block, others) = rest.split_at(tokens * cols);
            blocks.push(block);
            rest = others;
        }
        blocks.into_par_iter().map(|x| Self::of(rounding, x, cols)).collect()
    }

    /// A block of all tokens `x: [.., cols]`, whole units.
    pub(super) fn of(rounding: &Rounding, x: &[f32], cols: usize) -> Self {
        let mut block = match x.len() / cols {
            1 => Self::One(Tokens::default()),
            2 => Self::Two(Tokens::default()),
            4 => Self::Four(Tokens::default()),
            8 => Self::Eight(Tokens::default()),
            12 => Self::Twelve(Tokens::default()),
            count => unreachable!("a block of {count} tokens"),
        };
        round_block(rounding, x, cols, &mut block);
        block
    }
}
