//! Activations of all calibration samples.

use std::ops::Range;

use crate::{Engine, Result, floats::Floats};

/// Tokens that go through a layer together, if samples are shorter: its weights are made ready for
/// each batch.
const BATCH_TOKENS: usize = 2048;

/// `[samples, context, width]` f32.
pub struct Activations {
    values: Floats,
    samples: usize,
    context: usize,
    width: usize,
}

/// The inputs of one or more linear layers.
#[derive(Clone, Copy)]
pub struct StageInputs<'a> {
    /// `[samples, tokens, cols]`, from the layers as they are by now.
    pub activations: &'a Activations,
    /// What the layers should make of them, if it is not their own product with them.
    pub float: Option<FloatInputs<'a>>,
}

/// The same stage of the float model.
#[derive(Clone, Copy)]
pub struct FloatInputs<'a> {
    /// `[samples, tokens, cols]`.
    pub activations: &'a Activations,
    /// What the residual stream lacks to that of the float model before a layer adds to it,
    /// `[samples, tokens, rows]`; `None` for layers that do not add to it.
    pub missing: Option<&'a Activations>,
}

impl Activations {
    /// Zeros.
    ///
    /// # Errors
    /// As [`Floats::zeros`].
    pub fn new(
        samples: usize,
        context: usize,
        width: usize,
        memory_left: &mut u64,
    ) -> Result<Self> {
        let values = Floats::zeros(samples * context * width, memory_left)?;
        Ok(Self { values, samples, context, width })
    }

    /// Makes room for as many tokens with `width` channels, at most as many as it was made for;
    /// what it held is gone.
    pub fn set_width(&mut self, width: usize) {
        assert!(self.samples * self.context * width <= self.values.len(), "{width} channels");
        self.width = width;
    }

    /// Rows `[tokens, width]`, as samples of one token each, in memory.
    pub fn of_tokens(rows: &[f32], width: usize) -> Self {
        let mut values = Floats::zeros(rows.len(), &mut { u64::MAX }).expect("memory, no file");
        values.copy_from_slice(rows);
        Self { values, samples: rows.len() / width, context: 1, width }
    }

    /// Calibration samples.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Tokens of all samples.
    pub fn tokens(&self) -> usize {
        self.samples * self.context
    }

    /// Channels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The samples in batches.
    pub fn batches(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (samples, of_batch) = (self.samples, (BATCH_TOKENS / self.context.max(1)).max(1));
        (0..samples).step_by(of_batch).map(move |first| first..samples.min(first + of_batch))
    }

    /// One sample, `[context, width]`.
    pub fn sample(&self, index: usize) -> &[f32] {
        self.batch(index..index + 1)
    }

    /// One sample, `[context, width]`.
    pub fn sample_mut(&mut self, index: usize) -> &mut [f32] {
        self.batch_mut(index..index + 1)
    }

    /// Samples that follow each other, `[samples.len(), context, width]`.
    pub fn batch(&self, samples: Range<usize>) -> &[f32] {
        let len = self.context * self.width;
        &self.values[samples.start * len..samples.end * len]
    }

    /// Samples that follow each other, `[samples.len(), context, width]`.
    pub fn batch_mut(&mut self, samples: Range<usize>) -> &mut [f32] {
        let len = self.context * self.width;
        &mut self.values[samples.start * len..samples.end * len]
    }

    /// Calls `change` with the samples of every batch and their values,
    /// `[samples, context, width]`.
    pub fn update(
        &mut self,
        engine: &Engine,
        change: impl Fn(Range<usize>, &mut [f32]) -> Result<()> + Sync,
    ) -> Result<()> {
        let batches: Vec<_> = self.batches().collect();
        let len = batches.first().map_or(0, Range::len) * self.context * self.width;
        let values = self.batch_mut(0..self.samples).chunks_mut(len.max(1));
        engine.for_each(batches.into_iter().zip(values), |(batch, values)| change(batch, values))
    }

    /// Replaces every batch by what `of` gives for its samples.
    pub fn fill(
        &mut self,
        engine: &Engine,
        of: impl Fn(Range<usize>) -> Result<Vec<f32>> + Sync,
    ) -> Result<()> {
        self.update(engine, |batch, values| {
            values.copy_from_slice(&of(batch)?);
            Ok(())
        })
    }
}
