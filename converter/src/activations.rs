//! Activations of all calibration samples: in memory, or in a temporary file where they do not fit.

use slim_formats::ScratchFile;

use crate::Result;

/// `[samples, context, width]` f32.
pub struct Activations {
    storage: Storage,
    samples: usize,
    context: usize,
    width: usize,
}

enum Storage {
    Memory(Vec<f32>),
    Scratch(ScratchFile),
}

impl Activations {
    /// Zeros; in a temporary file if they take more than `memory_left` bytes, from which they are subtracted otherwise.
    ///
    /// # Errors
    /// `Format` if the temporary file cannot be made.
    pub fn new(
        samples: usize,
        context: usize,
        width: usize,
        memory_left: &mut u64,
    ) -> Result<Self> {
        let len = samples * context * width;
        let bytes = (len * size_of::<f32>()) as u64;
        let storage = if bytes <= *memory_left {
            *memory_left -= bytes;
            Storage::Memory(vec![0.0; len])
        } else {
            Storage::Scratch(ScratchFile::new(bytes as usize)?)
        };
        Ok(Self { storage, samples, context, width })
    }

    /// Calibration samples.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Channels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// One sample, `[context, width]`.
    pub fn sample(&self, index: usize) -> &[f32] {
        let values = match &self.storage {
            Storage::Memory(values) => values,
            Storage::Scratch(file) => bytemuck::cast_slice(file),
        };
        let len = self.context * self.width;
        &values[index * len..][..len]
    }

    /// One sample, `[context, width]`.
    pub fn sample_mut(&mut self, index: usize) -> &mut [f32] {
        let values = match &mut self.storage {
            Storage::Memory(values) => values.as_mut_slice(),
            Storage::Scratch(file) => bytemuck::cast_slice_mut(file),
        };
        let len = self.context * self.width;
        &mut values[index * len..][..len]
    }

    /// Replaces every sample by what `of` gives for its number.
    pub fn fill(&mut self, mut of: impl FnMut(usize) -> Result<Vec<f32>>) -> Result<()> {
        for index in 0..self.samples {
            self.sample_mut(index).copy_from_slice(&of(index)?);
        }
        Ok(())
    }
}
