//! The input of a product with one token as 8-bit integers.

use std::ops::Range;

use slim_formats::slim::LayerLayout;

use super::super::unpack::UNIT;

/// Columns that share a scale, at most: two units.
pub(super) const STEP: usize = 2 * UNIT;

/// Codes of the input, the same for all rows of a layer: `x = scale * code`.
///
/// A scale covers a *step*: 32 columns of a run, or the 16 that are left of it. Where one value stands out, as those of a few channels
/// do in every model, the others would lose their bits to it: such a step has a second code for what the first one leaves.
///
/// # Accuracy
/// A value is off by 1/254 of the largest one in its step at most, and by 1/64,516 of it in a step with second codes. Sums of the
/// input are sums of its codes, so that a row gets the product of its weights with the rounded input: the error of a sum would cost
/// more than the rounding does.
///
/// A step with a NaN or an infinite value gives no finite product. Values below 1e-37 may lose bits.
pub struct Input {
    /// For each 16 columns; a word has four of them in the order of memory.
    codes: Vec<[i32; 4]>,
    /// The same for the second codes.
    fine_codes: Vec<[i32; 4]>,
    /// Also for each 16 columns; the second entry of a step of two units stays unused.
    steps: Vec<Step>,
}

/// Some units of an input.
#[derive(Clone, Copy)]
pub(super) struct Units<'a> {
    pub codes: &'a [[i32; 4]],
    pub fine_codes: &'a [[i32; 4]],
    pub steps: &'a [Step],
}

/// What the codes of a step are worth.
#[derive(Clone, Copy, Default)]
pub(super) struct Step {
    pub scale: f32,
    /// The sum of the rounded values: what a minimum multiplies.
    pub sum: f32,
    /// Whether it has second codes.
    pub has_fine_codes: bool,
}

/// What a second code is worth in scales: it goes from -127 to 127 and covers half a scale each way.
pub(super) const FINE: f32 = 1.0 / 254.0;

/// A step has second codes if its largest value is so many times the root of its mean square. Of 32 normally distributed values, one
/// in 500 steps has such a value. Without second codes SmolLM2's perplexity rises by half a percent, with them by nothing that
/// could be told from noise.
const OUTLIER: f32 = 4.0;

impl Input {
    /// Quantizes `x[cols]` for a layer.
    pub fn new(layout: &LayerLayout, x: &[f32]) -> Self {
        Self::in_steps(&steps(layout).collect::<Vec<_>>(), x)
    }

    /// Quantizes `x[cols]` for a matrix whose runs are all of `run` columns: one unit or two.
    pub fn in_runs(run: usize, x: &[f32]) -> Self {
        Self::in_steps(&runs(run, x.len()), x)
    }

    fn in_steps(steps: &[Range<usize>], x: &[f32]) -> Self {
        let units = x.len() / UNIT;
        let mut input = Self {
            codes: vec![[0; 4]; units],
            fine_codes: vec![[0; 4]; units],
            steps: vec![Step::default(); units],
        };
        quantize(steps, x, &mut input);
        input
    }

    /// Some units of it.
    pub(super) fn of(&self, units: Range<usize>) -> Units<'_> {
        let (codes, fine_codes) = (&self.codes[units.clone()], &self.fine_codes[units.clone()]);
        Units { codes, fine_codes, steps: &self.steps[units] }
    }

    /// The rounded input, `[cols]`.
    #[cfg(test)]
    pub fn values(&self, layout: &LayerLayout) -> Vec<f32> {
        self.values_in_steps(steps(layout))
    }

    /// The same after [`Self::in_runs`].
    #[cfg(test)]
    pub fn values_in_runs(&self, run: usize) -> Vec<f32> {
        self.values_in_steps(runs(run, UNIT * self.codes.len()).into_iter())
    }

    #[cfg(test)]
    fn values_in_steps(&self, steps: impl Iterator<Item = Range<usize>>) -> Vec<f32> {
        let codes: &[i8] = bytemuck::cast_slice(&self.codes);
        let fine_codes: &[i8] = bytemuck::cast_slice(&self.fine_codes);
        steps
            .flat_map(|cols| {
                let scale = self.steps[cols.start / UNIT].scale;
                let codes = codes[cols.clone()].iter().zip(&fine_codes[cols]);
                codes.map(move |(&code, &fine)| scale * (f32::from(code) + FINE * f32::from(fine)))
            })
            .collect()
    }
}

/// Runs of so many columns.
pub(super) fn runs(run: usize, cols: usize) -> Vec<Range<usize>> {
    (0..cols).step_by(run).map(|first| first..first + run).collect()
}

/// The columns of each step.
pub(super) fn steps(layout: &LayerLayout) -> impl Iterator<Item = Range<usize>> {
    let runs = layout.groups().iter().flat_map(|group| group.runs(layout.coding()));
    runs.flat_map(|run| {
        run.clone().step_by(STEP).map(move |first| first..run.end.min(first + STEP))
    })
}

per_isa! {
    fn quantize(steps: &[Range<usize>], x: &[f32], input: &mut Input) {
        for cols in steps {
            let first = cols.start / UNIT;
            let (codes, fine_codes) = (&mut input.codes[first..], &mut input.fine_codes[first..]);
            input.steps[first] = quantize_step(&x[cols.clone()], codes, fine_codes);
        }
    }
}

#[inline(always)]
pub(super) fn quantize_step(
    x: &[f32],
    codes: &mut [[i32; 4]],
    fine_codes: &mut [[i32; 4]],
) -> Step {
    let (units, _) = x.as_chunks::<UNIT>();
    // Of positive floats the larger one has the larger bits, and NaN the largest.
    let (mut largest, mut squares) = (0, [0.0; UNIT]);
    for unit in units {
        for i in 0..UNIT {
            largest = largest.max(unit[i].to_bits() & 0x7fff_ffff);
            squares[i] += unit[i] * unit[i];
        }
    }
    let largest = f32::from_bits(largest);
    let scale = largest / 127.0;
    let mean_square = squares.iter().sum::<f32>() / x.len() as f32;
    let has_fine_codes = largest * largest > OUTLIER * OUTLIER * mean_square;
    let (mut sum, mut fine_sum) = (0, 0);
    for (u, unit) in units.iter().enumerate() {
        let (mut steps, mut rests) = ([0.0; UNIT], [0.0; UNIT]);
        for i in 0..UNIT {
            // Not a number where the scale is 0 or none: the code is any then.
            steps[i] = (unit[i] / scale).clamp(-127.0, 127.0);
            rests[i] = (steps[i] - rounded(steps[i])) / FINE;
        }
        codes[u] = round(&steps, &mut sum);
        if has_fine_codes {
            fine_codes[u] = round(&rests, &mut fine_sum);
        }
    }
    Step { scale, sum: scale * (sum as f32 + FINE * fine_sum as f32), has_fine_codes }
}

/// 1.5 * 2^23: a sum with it has no bits left for a fraction.
const NO_FRACTION: f32 = 12_582_912.0;

#[inline(always)]
fn rounded(value: f32) -> f32 {
    value + NO_FRACTION - NO_FRACTION
}

/// The nearest integers, which have to lie within -128 .. 127, and which are added to `sum`.
#[inline(always)]
fn round(values: &[f32; UNIT], sum: &mut i32) -> [i32; 4] {
    let mut codes = [0i8; UNIT];
    for i in 0..UNIT {
        codes[i] = (values[i] + NO_FRACTION).to_bits() as i8;
        *sum += i32::from(codes[i]);
    }
    bytemuck::cast(codes)
}
