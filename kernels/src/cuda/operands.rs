//! The input of matrix products.

use std::sync::Arc;

use half::f16;
use rayon::prelude::*;

use super::{Buffer, Device, check_equal, check_limit};
use crate::{KernelError, Result, narrow::in_range_of_f16};

/// Rows are as many numbers apart as fill whole steps of the kernels.
const STRIDE_UNIT: usize = 64;

/// Far above any model; the kernels count in 32 bits.
const MAX_COLS: usize = 1 << 28;

/// fp16 vectors in the order in which products read them: one row per token, zero behind its last
/// column.
pub struct Operands {
    /// [tokens, stride], in operand order (`kernels/cuda/primitives.cuh`).
    pub(super) values: Buffer<u16>,
    tokens: usize,
    cols: usize,
}

impl Operands {
    /// Room for `tokens` vectors of `cols` numbers.
    ///
    /// # Errors
    /// `TooLarge` for more than 2^28 columns; `OutOfDeviceMemory`; `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn zeros(device: &Arc<Device>, tokens: usize, cols: usize) -> Result<Self> {
        check_limit("columns of operands", cols, MAX_COLS)?;
        let values = Buffer::zeros(device, tokens * cols.next_multiple_of(STRIDE_UNIT))?;
        Ok(Self { values, tokens, cols })
    }

    /// How many vectors fit.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Numbers of a vector.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of device memory that it takes.
    pub fn device_bytes(&self) -> u64 {
        self.values.device_bytes()
    }

    /// Numbers from one vector to the next.
    pub(super) fn stride(&self) -> usize {
        self.cols.next_multiple_of(STRIDE_UNIT)
    }

    /// Overwrites the first vectors with `x: [m, cols]`, rounded to fp16; beyond its range to the
    /// largest number of it.
    ///
    /// # Errors
    /// `ShapeMismatch` if `x` has another length or more vectors than fit; `Driver`.
    pub fn write(&mut self, x: &[f32], m: usize) -> Result<()> {
        self.check(m)?;
        check_equal("inputs", x.len(), m * self.cols)?;
        let (cols, stride) = (self.cols, self.stride());
        let mut values = vec![0; m * stride];
        values.par_chunks_exact_mut(stride).zip(x.par_chunks_exact(cols)).for_each(
            |(values, x)| {
                for (col, &x) in x.iter().enumerate() {
                    values[operand_index(col)] = saturated(x).to_bits();
                }
            },
        );
        self.values.view_mut().slice(0..values.len()).write(&values)
    }

    /// Waits for all work so far and gives the first `m` vectors, `[m, cols]`.
    ///
    /// # Errors
    /// `ShapeMismatch` if there are fewer; `Driver`.
    pub fn read(&self, m: usize) -> Result<Vec<f32>> {
        self.check(m)?;
        let values = self.values.view().slice(0..m * self.stride()).read()?;
        let rows = values.par_chunks_exact(self.stride());
        Ok(rows
            .flat_map_iter(|row| {
                (0..self.cols).map(|col| f16::from_bits(row[operand_index(col)]).to_f32())
            })
            .collect())
    }

    /// Whether it has room for `m` vectors.
    pub(super) fn check(&self, m: usize) -> Result<()> {
        match m <= self.tokens {
            true => Ok(()),
            false => {
                Err(KernelError::ShapeMismatch { what: "tokens", found: m, expected: self.tokens })
            }
        }
    }
}

/// Of each four columns 0 1 2 3 the order is 0 2 1 3.
fn operand_index(col: usize) -> usize {
    col & !3 | (col & 1) << 1 | col >> 1 & 1
}

/// Rounds to fp16 as the kernels do: beyond its range to the largest number of it.
pub(super) fn saturated(x: f32) -> f16 {
    f16::from_f32(in_range_of_f16(x))
}
