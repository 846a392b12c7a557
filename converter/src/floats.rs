//! Many numbers: in memory, or in a temporary file where they do not fit.

use std::ops::{Deref, DerefMut};

use slim_formats::ScratchFile;

use crate::Result;

/// f32 values.
pub enum Floats {
    /// In memory.
    Memory(Vec<f32>),
    /// In a temporary file.
    Scratch(ScratchFile),
}

impl Floats {
    /// `len` zeros; in a temporary file if they take more than `memory_left` bytes, from which they
    /// are subtracted otherwise.
    ///
    /// # Errors
    /// `Format` if the temporary file cannot be made.
    pub fn zeros(len: usize, memory_left: &mut u64) -> Result<Self> {
        let bytes = (len * size_of::<f32>()) as u64;
        if bytes > *memory_left {
            return Ok(Self::Scratch(ScratchFile::new(bytes as usize)?));
        }
        *memory_left -= bytes;
        Ok(Self::Memory(vec![0.0; len]))
    }
}

impl Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Memory(values) => values,
            Self::Scratch(file) => bytemuck::cast_slice(file),
        }
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Memory(values) => values,
            Self::Scratch(file) => bytemuck::cast_slice_mut(file),
        }
    }
}
