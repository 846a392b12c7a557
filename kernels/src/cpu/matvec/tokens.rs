//! The inputs of a product with many tokens as 8-bit integers, rounded as those of one token are ([`super::Input`]).

use std::ops::Range;

use rayon::prelude::*;

use super::input::{STEP, quantize_step};

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
    /// Quantizes `x: [tokens, cols]` in such steps of columns.
    fn new(steps: &[Range<usize>], x: &[f32], cols: usize) -> Self {
        let tokens = x.len() / cols;
        let words = steps.last().map_or(0, |step| step.end / 4);
        let mut block = Self {
            tokens,
            codes: vec![0; words * tokens],
            fine_codes: vec![0; words * tokens],
            worths: vec![0.0; 2 * steps.len() * tokens],
            fine: vec![0; steps.len()],
        };
        for (token, x) in x.chunks_exact(cols).enumerate() {
            quantize(steps, x, token, &mut block);
        }
        block
    }

    /// Blocks of `x: [m, cols]`: of `largest` tokens, 12 or a power of two, and of powers of two for the rest.
    pub(super) fn of_all(
        largest: usize,
        steps: &[Range<usize>],
        x: &[f32],
        cols: usize,
    ) -> Vec<Self> {
        let m = x.len() / cols;
        let mut parts = vec![largest; m / largest];
        let powers = (0..4).rev().map(|power| 1 << power);
        parts.extend(powers.filter(|tokens| m % largest & tokens != 0));
        let mut rest = x;
        let mut blocks = Vec::new();
        for tokens in parts {
            let (block, others) = rest.split_at(tokens * cols);
            blocks.push(block);
            rest = others;
        }
        blocks.par_iter().map(|x| Self::new(steps, x, cols)).collect()
    }
}

per_isa! {
    fn quantize(steps: &[Range<usize>], x: &[f32], token: usize, block: &mut TokenBlock) {
        let tokens = block.tokens;
        for (index, cols) in steps.iter().enumerate() {
            let mut values = [0.0; STEP];
            // What a step has beyond the last column counts for nothing.
            let inside = &x[cols.start..x.len().min(cols.end)];
            values[..inside.len()].copy_from_slice(inside);
            let (mut codes, mut fine_codes) = ([[0; 4]; 2], [[0; 4]; 2]);
            let step = quantize_step(&values[..cols.len()], &mut codes, &mut fine_codes);
            let words = cols.start / 4..cols.end / 4;
            for (word, code) in words.clone().zip(codes.as_flattened()) {
                block.codes[word * tokens + token] = *code;
            }
            if step.has_fine_codes {
                for (word, code) in words.zip(fine_codes.as_flattened()) {
                    block.fine_codes[word * tokens + token] = *code;
                }
                block.fine[index] |= 1 << token;
            }
            block.worths[2 * index * tokens + token] = step.scale;
            block.worths[(2 * index + 1) * tokens + token] = step.sum;
        }
    }
}
