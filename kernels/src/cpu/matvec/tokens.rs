//! The inputs of a product with many tokens, those of some tokens side by side.

use std::ops::Range;

use rayon::prelude::*;

use super::input::{Input, Units};

/// Some tokens that a kernel multiplies at a time.
pub struct TokenBlock {
    /// How many.
    pub(super) tokens: usize,
    /// For each four columns a word of each token.
    pub(super) codes: Vec<i32>,
    /// The same for the second codes.
    pub(super) fine_codes: Vec<i32>,
    /// For each step the scale of each token, then each one's sum.
    pub(super) worths: Vec<f32>,
    /// For each step the tokens that have second codes, a bit each.
    pub(super) fine: Vec<u16>,
}

impl TokenBlock {
    /// The tokens of `inputs`, in steps of such units.
    fn new(steps: &[Range<usize>], inputs: &[Input]) -> Self {
        let tokens = inputs.len();
        let units = steps.last().map_or(0, |step| step.end);
        let mut block = Self {
            tokens,
            codes: vec![0; 4 * units * tokens],
            fine_codes: vec![0; 4 * units * tokens],
            worths: vec![0.0; 2 * steps.len() * tokens],
            fine: vec![0; steps.len()],
        };
        for (token, input) in inputs.iter().enumerate() {
            let Units { codes, fine_codes, .. } = input.of(0..units);
            for (all, codes) in [(&mut block.codes, codes), (&mut block.fine_codes, fine_codes)] {
                let of_token = all[token..].iter_mut().step_by(tokens);
                of_token.zip(codes.as_flattened()).for_each(|(to, code)| *to = *code);
            }
            for (index, units) in steps.iter().enumerate() {
                let Units { sums, steps, .. } = input.of(units.clone());
                let worths = &mut block.worths[2 * index * tokens..];
                worths[token] = steps[0].scale;
                worths[tokens + token] = sums.as_flattened().iter().sum();
                block.fine[index] |= u16::from(steps[0].has_fine_codes) << token;
            }
        }
        block
    }

    /// Blocks of `x: [m, cols]`: of `largest` tokens, 12 or a power of two, and of powers of two
    /// for the rest.
    pub(super) fn of_all(
        largest: usize,
        steps: &[Range<usize>],
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
