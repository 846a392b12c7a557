//! One token times a dense tensor, straight from the bytes where they lie: f32 inputs and sums, in
//! loops that the compiler vectorises.

use std::ops::Range;

use slim_formats::{DenseTensor, Layout};

use crate::{
    Result,
    cpu::elementwise::dot,
    ggml::{dequantize, dequantize_rows},
};

/// Values that are brought into f32 at a time: whole blocks of every type, and they stay in the
/// first cache.
const PIECE: usize = 256;

per_isa! {
    /// The products of rows `rows` with `x`.
    ///
    /// # Errors
    /// `UnsupportedType` for element types that hold no weights.
    pub fn products(
        tensor: &DenseTensor<'_>,
        rows: Range<usize>,
        x: &[f32],
        out: &mut [f32],
    ) -> Result<()> {
        let mut values = [0.0; PIECE];
        let bytes_of = |count: usize| tensor.dtype.size_in_bytes(count as u64).unwrap_or(0) as usize;
        out.fill(0.0);
        if let Layout::Transposed { stride, step } = tensor.layout {
            // A column is the weights of one input, and those of others that stand between.
            let of_piece = PIECE.div_ceil(step);
            for (rows, out) in rows.clone().step_by(of_piece).zip(out.chunks_mut(of_piece)) {
                let values = &mut values[..(out.len() - 1) * step + 1];
                for (col, x) in x.iter().enumerate() {
                    let start = bytes_of(col * stride + rows * step);
                    let bytes = &tensor.bytes[start..start + bytes_of(values.len())];
                    dequantize(tensor.dtype, bytes, values)?;
                    for (out, value) in out.iter_mut().zip(values.iter().step_by(step)) {
                        *out += x * value;
                    }
                }
            }
            return Ok(());
        }
        if tensor.scales.is_some() || tensor.layout.stored_row(0).is_none() {
            let mut values = vec![0.0; tensor.cols];
            for (row, out) in rows.zip(out) {
                dequantize_rows(tensor, row..row + 1, &mut values)?;
                *out = dot(&values, x);
            }
            return Ok(());
        }
        for (row, out) in rows.zip(out) {
            let stored = tensor.layout.stored_row(row).expect("rows one after the other");
            let row_bytes = tensor.row_bytes();
            let bytes = &tensor.bytes[stored * row_bytes..][..row_bytes];
            for (piece, x) in x.chunks(PIECE).enumerate() {
                let values = &mut values[..x.len()];
                let bytes = &bytes[bytes_of(piece * PIECE)..][..bytes_of(x.len())];
                dequantize(tensor.dtype, bytes, values)?;
                *out += dot(values, x);
            }
        }
        Ok(())
    }
}
