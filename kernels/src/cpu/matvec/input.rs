//! The inputs of products as 8-bit integers.

use std::ops::Range;

use slim_formats::slim::LayerLayout;

use super::{
    super::unpack::UNIT,
    tokens::{Fine, Step, TokenBlock, Tokens},
};

/// Columns that share a scale, at most: two units.
pub(super) const STEP: usize = 2 * UNIT;

/// Codes of the input of one token, the same for all rows of a layer: `x = scale * code`.
///
/// A scale covers a *step*: 32 columns of a run, or the 16 that are left of it. Where one value
/// stands out, as those of a few channels do in every model, the others would lose their bits to
/// it: such a step has a second code for what the first one leaves.
///
/// # Accuracy
/// A value is off by 1/254 of the largest one in its step at most, and by 1/64,516 of it in a step
/// with second codes. Sums of the input are sums of its codes, so that a row gets the product of
/// its weights with the rounded input: the error of a sum would cost more than the rounding does.
///
/// A step with a NaN or an infinite value gives no finite product. Values below 1e-37 may lose
/// bits.
pub struct Input {
    pub(super) tokens: Tokens<1>,
    /// For each step the sums of the rounded values of each word.
    pub(super) word_sums: Vec<[[f32; 4]; 2]>,
}

/// Codes of 16 columns twice; a word has four of them in the order of memory. Where a step has but
/// 16 columns, the others are 0.
pub(super) type StepCodes = [[i32; 4]; 2];

/// What a second code is worth in scales: it goes from -127 to 127 and covers half a scale each
/// way.
pub(super) const FINE: f32 = 1.0 / 254.0;

/// A step has second codes if its largest value is so many times the root of its mean square. Of 32
/// normally distributed values, one in 500 steps has such a value. Without second codes SmolLM2's
/// perplexity rises by half a percent, with them by nothing that could be told from noise.
const OUTLIER: f32 = 4.0;

impl Input {
    /// Quantizes `x[cols]`, whole steps, for a matrix whose scales do not matter.
    pub fn in_whole_steps(x: &[f32]) -> Self {
        let steps = x.len() / STEP;
        let tokens = Tokens { steps: Vec::with_capacity(steps), fine_codes: Vec::new() };
        let mut input = Self { tokens, word_sums: Vec::with_capacity(steps) };
        quantize(x, &mut input);
        input
    }

    /// The rounded input, `[cols]`.
    #[cfg(test)]
    pub fn values(&self) -> Vec<f32> {
        values(&self.tokens, steps(0..STEP * self.tokens.steps.len()))
    }
}

per_isa! {
    fn quantize(x: &[f32], input: &mut Input) {
        for x in x.as_chunks::<STEP>().0 {
            let rounded = round_step(x);
            let mut step = Step::ZERO;
            step.set(0, &rounded);
            step.fine.first = input.tokens.fine_codes.len();
            input.tokens.fine_codes.extend(rounded.fine_codes);
            input.tokens.steps.push(step);
            input.word_sums.push(rounded.word_sums);
        }
    }
}

/// The steps that a matrix has its inputs rounded in, each token as [`Input`] says.
pub struct Rounding {
    /// Their columns.
    steps: Vec<Range<usize>>,
    /// Whether the matrix has other scales for each unit: then a step becomes one of each unit.
    has_scales_of_units: bool,
}

impl Rounding {
    /// For a packed layer.
    pub fn of_layer(layout: &LayerLayout) -> Self {
        Self { steps: runs(layout).flat_map(steps).collect(), has_scales_of_units: false }
    }

    /// For ggml's blocks, with a scale for each `run` columns.
    pub(super) fn of_blocks(cols: usize, run: usize) -> Self {
        Self { steps: steps(0..cols).collect(), has_scales_of_units: run < STEP }
    }

    /// The rounded input, `[cols]`, for a packed layer.
    #[cfg(test)]
    pub fn values(&self, x: &[f32]) -> Vec<f32> {
        let padded = super::in_whole_units(x, x.len());
        let TokenBlock::One(tokens) = TokenBlock::of(self, &padded, padded.len()) else {
            unreachable!("one token")
        };
        let mut values = values(&tokens, self.steps.iter().cloned());
        values.truncate(x.len());
        values
    }

    /// Quantizes `x: [T, cols]`, whole units.
    #[inline(always)]
    fn round<const T: usize>(&self, x: &[f32], cols: usize, tokens: &mut Tokens<T>) {
        let units = if self.has_scales_of_units { STEP / UNIT } else { 1 };
        tokens.steps.reserve_exact(units * self.steps.len());
        for cols_of_step in &self.steps {
            let mut step = Step::ZERO;
            let (mut word_sums, mut fine_codes) = ([[[0.0; 4]; 2]; T], [StepCodes::default(); T]);
            for t in 0..T {
                let rounded = round_step(&x[t * cols..][cols_of_step.clone()]);
                step.set(t, &rounded);
                word_sums[t] = rounded.word_sums;
                fine_codes[t] = rounded.fine_codes.unwrap_or_default();
            }
            let has_fine_codes = |t: &usize| step.fine.tokens >> t & 1 == 1;
            if !self.has_scales_of_units {
                step.fine.first = tokens.fine_codes.len();
                tokens.fine_codes.extend((0..T).filter(has_fine_codes).map(|t| fine_codes[t]));
                tokens.steps.push(step);
                continue;
            }
            for unit in 0..units {
                let codes = [step.codes[unit], [[0; T]; 4]];
                let sums = word_sums.map(|word_sums| sum_of(&[word_sums[unit]]));
                let fine = Fine { first: tokens.fine_codes.len(), ..step.fine };
                let of_unit = |t: usize| [fine_codes[t][unit], [0; 4]];
                tokens.fine_codes.extend((0..T).filter(has_fine_codes).map(of_unit));
                tokens.steps.push(Step { codes, sums, fine, ..step });
            }
        }
    }
}

per_isa! {
    /// Quantizes the tokens `x: [.., cols]` of a block.
    pub(super) fn round_block(rounding: &Rounding, x: &[f32], cols: usize, block: &mut TokenBlock) {
        match block {
            TokenBlock::One(tokens) => rounding.round(x, cols, tokens),
            TokenBlock::Two(tokens) => rounding.round(x, cols, tokens),
            TokenBlock::Four(tokens) => rounding.round(x, cols, tokens),
            TokenBlock::Eight(tokens) => rounding.round(x, cols, tokens),
            TokenBlock::Twelve(tokens) => rounding.round(x, cols, tokens),
        }
    }
}

/// The values of rounded inputs, of the columns of each step.
#[cfg(test)]
fn values(tokens: &Tokens<1>, steps: impl Iterator<Item = Range<usize>>) -> Vec<f32> {
    let values = steps.enumerate().flat_map(|(index, cols)| {
        let step = &tokens.steps[index];
        let codes: [i8; STEP] = bytemuck::cast(step.codes);
        let fine = match step.fine.tokens {
            0 => StepCodes::default(),
            _ => tokens.fine_codes[step.fine.first],
        };
        let fine: [i8; STEP] = bytemuck::cast(fine);
        let codes = codes.into_iter().zip(fine).take(cols.len());
        codes.map(|(code, fine)| step.scales[0] * (f32::from(code) + FINE * f32::from(fine)))
    });
    values.collect()
}

/// The columns of each run of a layer, in whole units.
fn runs(layout: &LayerLayout) -> impl Iterator<Item = Range<usize>> {
    let runs = layout.groups().iter().flat_map(|group| group.runs(layout.coding()));
    runs.map(|run| run.start..run.end.next_multiple_of(UNIT))
}

/// The columns of each step of a run.
fn steps(run: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = run.end;
    run.step_by(STEP).map(move |first| first..end.min(first + STEP))
}

/// A step of a token.
struct RoundedStep {
    codes: StepCodes,
    fine_codes: Option<StepCodes>,
    scale: f32,
    /// Of the rounded values of each word, and of all.
    word_sums: [[f32; 4]; 2],
    sum: f32,
}

impl<const T: usize> Step<T> {
    /// Makes `rounded` the step of token `t`.
    #[inline(always)]
    fn set(&mut self, t: usize, rounded: &RoundedStep) {
        for (codes, rounded) in
            self.codes.as_flattened_mut().iter_mut().zip(rounded.codes.as_flattened())
        {
            codes[t] = *rounded;
        }
        (self.scales[t], self.sums[t]) = (rounded.scale, rounded.sum);
        self.fine.tokens |= u16::from(rounded.fine_codes.is_some()) << t;
    }
}

/// A step of one unit or two.
#[inline(always)]
fn round_step(x: &[f32]) -> RoundedStep {
    let (mut codes, mut fine_codes, mut word_sums) = ([[0; 4]; 2], [[0; 4]; 2], [[0.0; 4]; 2]);
    let (units, _) = x.as_chunks::<UNIT>();
    // Of positive floats the larger one has the larger bits, and NaN the largest.
    let (mut largest, mut squares) = ([0; UNIT], [0.0; UNIT]);
    for unit in units {
        for i in 0..UNIT {
            largest[i] = largest[i].max(unit[i].to_bits() & 0x7fff_ffff);
            squares[i] += unit[i] * unit[i];
        }
    }
    let largest = f32::from_bits(largest.into_iter().fold(0, u32::max));
    let scale = largest / 127.0;
    let mean_square = total(squares) / x.len() as f32;
    let has_fine_codes = largest * largest > OUTLIER * OUTLIER * mean_square;
    let value = |sum: i32, fine_sum: i32| scale * (sum as f32 + FINE * fine_sum as f32);
    for (u, unit) in units.iter().enumerate().take(2) {
        let mut steps = [0.0; UNIT];
        for i in 0..UNIT {
            // Not a number where the scale is 0 or none: the code is any then.
            steps[i] = (unit[i] / scale).clamp(-127.0, 127.0);
        }
        let of_words;
        let mut of_fine_words = [0; 4];
        (codes[u], of_words) = round(&steps);
        if has_fine_codes {
            let mut rests = [0.0; UNIT];
            for i in 0..UNIT {
                rests[i] = (steps[i] - rounded(steps[i])) / FINE;
            }
            (fine_codes[u], of_fine_words) = round(&rests);
        }
        for i in 0..4 {
            word_sums[u][i] = value(of_words[i], of_fine_words[i]);
        }
    }
    let sum = sum_of(&word_sums[..units.len()]);
    let fine_codes = has_fine_codes.then_some(fine_codes);
    RoundedStep { codes, fine_codes, scale, word_sums, sum }
}

/// The sum of some units, from the sums of their words.
#[inline(always)]
fn sum_of(units: &[[f32; 4]]) -> f32 {
    let mut lanes = [0.0; 4];
    for unit in units {
        for i in 0..4 {
            lanes[i] += unit[i];
        }
    }
    total(lanes)
}

/// The sum of a power of two of lanes, in halves: one after the other, each would wait for the one
/// before.
#[inline(always)]
fn total<const LANES: usize>(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[half + i];
        }
        half /= 2;
    }
    lanes[0]
}

/// 1.5 * 2^23: a sum with it has no bits left for a fraction.
const NO_FRACTION: f32 = 12_582_912.0;

#[inline(always)]
fn rounded(value: f32) -> f32 {
    value + NO_FRACTION - NO_FRACTION
}

/// The nearest integers, which have to lie within -128 .. 127, and the sum of each four.
#[inline(always)]
fn round(values: &[f32; UNIT]) -> ([i32; 4], [i32; 4]) {
    let mut codes = [0; UNIT];
    for i in 0..UNIT {
        codes[i] = (values[i] + NO_FRACTION).to_bits() as u8;
    }
    let words: [u32; 4] = bytemuck::cast(codes);
    let mut sums = [0; 4];
    for i in 0..4 {
        // Bytes without a sign, each 128 more; two of them in 16 bits, then all in 32.
        let bytes = words[i] ^ 0x8080_8080;
        let pairs = (bytes & 0x00ff_00ff) + (bytes >> 8 & 0x00ff_00ff);
        sums[i] = ((pairs & 0xffff) + (pairs >> 16)) as i32 - 4 * 128;
    }
    (words.map(u32::cast_signed), sums)
}
