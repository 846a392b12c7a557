//! How far the weights of two models are from each other, whatever holds them.

use std::ops::Range;

use anyhow::Result;
use rayon::prelude::*;
use slim_formats::{ModelSource, Weight};
use slim_kernels::{
    linalg::{self, Mat, Precision, Store},
    weight,
};

/// Rows that are compared at a time.
const ROWS: usize = 64;

/// Numbers that a neuron is known by.
const MARKS: usize = 64;

/// The type of a weight, and its bits per weight, everything counted.
pub fn stored(weight: Weight<'_>) -> (String, f64) {
    let (rows, cols) = weight::shape(weight);
    let bits = 8.0 * weight::stored_bytes(weight) as f64 / (rows * cols) as f64;
    let kind = match weight {
        Weight::Dense(dense) => format!("{:?}", dense.dtype),
        Weight::Packed(layer) => layer.layout().coding().name().to_owned(),
        Weight::Bands(bands) => {
            format!("{} in {} bands", bands.get(0).layout().coding().name(), bands.iter().count())
        }
    };
    (kind, bits)
}

/// Two models whose weights are compared.
pub struct Comparison<'a> {
    sources: [&'a dyn ModelSource; 2],
    /// The block whose neurons were looked for last, and where those of the first model are in the
    /// second one, if they stand in another order.
    neurons: Option<(String, Option<Vec<usize>>)>,
}

impl<'a> Comparison<'a> {
    pub fn new(sources: [&'a dyn ModelSource; 2]) -> Self {
        Self { sources, neurons: None }
    }

    /// `|A - B|^2 / |B|^2` of a weight; `None` if one of the models lacks it, or in another shape.
    /// Neurons are matched first: a conversion may put them into another order.
    pub fn error(&mut self, name: &str) -> Result<Option<f64>> {
        let Some([a, b]) = self.pair(name)? else { return Ok(None) };
        let along = match name.split_once(".ffn_") {
            Some((block, "up.weight" | "gate.weight")) => {
                self.order_of_neurons(block)?.map_or(Along::Neither, Along::Rows)
            }
            Some((block, "down.weight" | "up.bias" | "gate.bias")) => {
                self.order_of_neurons(block)?.map_or(Along::Neither, Along::Columns)
            }
            _ => Along::Neither,
        };
        relative_error(a, b, along).map(Some)
    }

    /// A weight of both models, in one shape.
    fn pair(&self, name: &str) -> Result<Option<[Weight<'a>; 2]>> {
        let [a, b] = self.sources;
        let (Some(a), Some(b)) = (a.tensor(name)?, b.tensor(name)?) else { return Ok(None) };
        Ok((weight::shape(a) == weight::shape(b)).then_some([a, b]))
    }

    /// Where the neurons of a block of the first model are in the second one; `None` if they stand
    /// in the same order, or if it cannot be told.
    fn order_of_neurons(&mut self, block: &str) -> Result<Option<&[usize]>> {
        if self.neurons.as_ref().is_none_or(|(found, _)| found != block) {
            let order = match self.pair(&format!("{block}.ffn_up.weight"))? {
                Some([a, b]) if relative_error(a, b, Along::Neither)? > 0.5 => matched(a, b)?,
                _ => None,
            };
            self.neurons = Some((block.to_owned(), order));
        }
        Ok(self.neurons.as_ref().and_then(|(_, order)| order.as_deref()))
    }
}

/// What stands in another order.
#[derive(Clone, Copy)]
enum Along<'a> {
    Neither,
    Rows(&'a [usize]),
    Columns(&'a [usize]),
}

fn relative_error(a: Weight<'_>, b: Weight<'_>, along: Along<'_>) -> Result<f64> {
    let (rows, cols) = weight::shape(a);
    // Rows far from each other: whole tiles are unpacked for each.
    let scattered = match along {
        Along::Rows(_) => values(b, 0..rows)?,
        Along::Neither | Along::Columns(_) => Vec::new(),
    };
    let of_rows = |first: usize| -> Result<[f64; 2]> {
        let of_a = first..rows.min(first + ROWS);
        let ours = values(a, of_a.clone())?;
        let theirs = match along {
            Along::Rows(order) => {
                let rows = order[of_a].iter().map(|&row| &scattered[row * cols..(row + 1) * cols]);
                rows.collect::<Vec<_>>().concat()
            }
            Along::Neither | Along::Columns(_) => values(b, of_a)?,
        };
        let mut sums = [0.0; 2];
        for (ours, theirs) in ours.chunks(cols).zip(theirs.chunks(cols)) {
            for (col, ours) in ours.iter().enumerate() {
                let theirs = match along {
                    Along::Columns(order) => theirs[order[col]],
                    Along::Neither | Along::Rows(_) => theirs[col],
                };
                sums[0] += f64::from(ours - theirs).powi(2);
                sums[1] += f64::from(theirs).powi(2);
            }
        }
        Ok(sums)
    };
    let starts: Vec<usize> = (0..rows).step_by(ROWS).collect();
    let sums: Vec<[f64; 2]> = starts.into_par_iter().map(of_rows).collect::<Result<_>>()?;
    let [errors, squares] = [0, 1].map(|i| sums.iter().map(|sums| sums[i]).sum::<f64>());
    Ok(if errors == 0.0 { 0.0 } else { errors / squares })
}

fn values(weight: Weight<'_>, rows: Range<usize>) -> Result<Vec<f32>> {
    let mut values = vec![0.0; rows.len() * weight::shape(weight).1];
    weight::dequantize_rows(weight, rows, &mut values)?;
    Ok(values)
}

/// For each row of `a` the row of `b` that is most like it; `None` unless each is one row's.
fn matched(a: Weight<'_>, b: Weight<'_>) -> Result<Option<Vec<usize>>> {
    let rows = weight::shape(a).0;
    let [a, b] = [marks(a)?, marks(b)?];
    let mut order = Vec::with_capacity(rows);
    for marks in a.chunks(ROWS * MARKS) {
        let count = marks.len() / MARKS;
        let mut likeness = vec![0.0; count * rows];
        let (ours, theirs) = (Mat::new(marks, count, MARKS), Mat::new(&b, rows, MARKS));
        let precision = Precision::Fine;
        linalg::matmul(precision, &mut likeness, rows, Store::REPLACE, ours, theirs.transposed());
        let most_like = |row: &[f32]| (0..rows).max_by(|&i, &j| row[i].total_cmp(&row[j]));
        order.extend(likeness.chunks(rows).filter_map(most_like));
    }
    let mut is_taken = vec![false; rows];
    order.iter().for_each(|&row| is_taken[row] = true);
    Ok(is_taken.into_iter().all(|taken| taken).then_some(order))
}

/// Sums of each row's values with pseudorandom signs, of length 1: what is nearly the same row has
/// nearly the same ones.
fn marks(weight: Weight<'_>) -> Result<Vec<f32>> {
    let (rows, cols) = weight::shape(weight);
    let mut state = 1u64;
    let mut sign = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if state >> 63 == 0 { 1.0 } else { -1.0 }
    };
    let signs: Vec<f32> = (0..cols * MARKS).map(|_| sign()).collect();
    let mut marks = vec![0.0; rows * MARKS];
    for (index, marks) in marks.chunks_mut(ROWS * MARKS).enumerate() {
        let count = marks.len() / MARKS;
        let values = values(weight, index * ROWS..index * ROWS + count)?;
        let (values, signs) = (Mat::new(&values, count, cols), Mat::new(&signs, cols, MARKS));
        linalg::matmul(Precision::Fine, marks, MARKS, Store::REPLACE, values, signs);
        for marks in marks.chunks_mut(MARKS) {
            let length = marks.iter().map(|mark| mark * mark).sum::<f32>().sqrt();
            marks.iter_mut().for_each(|mark| *mark /= length.max(f32::MIN_POSITIVE));
        }
    }
    Ok(marks)
}
