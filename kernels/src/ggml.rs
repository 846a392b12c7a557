//! Real values of ggml's tensor types.
//!
//! The K types (`Q2_K`, ...) cut their 256 weights into sub-blocks of 16 or 32 with a scale of
//! their own. Below, `d`, `m`, `dmin` are little-endian fp16, and `bytes a..b` are offsets in the
//! block.

use std::ops::Range;

use half::{bf16, f16, slice::HalfFloatSliceExt};
use slim_formats::{DType, DenseTensor, Layout, power_of_two};

use crate::{KernelError, Result};

/// Computes the values of whole blocks of `dtype`.
///
/// # Shapes and layout
/// `bytes`: exactly `dtype.size_in_bytes(out.len())` bytes as they lie in a GGUF file; `out`:
/// overwritten.
///
/// # Accuracy
/// Every value equals that of the Python package `gguf` to the last bit.
///
/// # Errors
/// `KernelError::UnsupportedType` for types that hold no weights (integers, F64, unknown ones);
/// `KernelError::ShapeMismatch` if `bytes` and `out` do not belong together.
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    match dtype {
        DType::F32 => each_block(bytes, out, |&block, out| *out = [f32::from_le_bytes(block)]),
        DType::F16 => halves(bytes, out),
        DType::BF16 => {
            each_block(bytes, out, |&block, out| *out = [bf16::from_le_bytes(block).to_f32()])
        }
        DType::F8_E4M3 => each_block(bytes, out, |&[code], out| *out = [f8_e4m3(code)]),
        DType::F8_E8M0 => each_block(bytes, out, |&[code], out| *out = [power_of_two(code)]),
        DType::F4_E2M1 => each_block(bytes, out, |&[codes], out| *out = f4_e2m1(codes)),
        DType::MXFP4 => each_block(bytes, out, mxfp4),
        quantized => for_block!(quantized, each_quantized_block(bytes, out), _ => {
            Err(KernelError::UnsupportedType { dtype })
        }),
    }
}

/// Computes the values of rows of a tensor, wherever they lie ([`Layout`]).
///
/// A transposed tensor is read 16 columns of up to 128 rows at a time: asked for its rows one by
/// one, it is read through the cache once for each.
///
/// # Shapes and layout
/// `out`: [`rows.len()`, `tensor.cols`] row-major, overwritten.
///
/// # Errors
/// As [`dequantize`]; also `KernelError::ShapeMismatch` if `rows` ends after the last row of the
/// tensor.
pub fn dequantize_rows(
    tensor: &DenseTensor<'_>,
    rows: Range<usize>,
    out: &mut [f32],
) -> Result<()> {
    expect_len("rows of a tensor", tensor.rows.min(rows.end), rows.end)?;
    expect_len("values of dequantized rows", out.len(), rows.len() * tensor.cols)?;
    if let Layout::Transposed { stride, step } = tensor.layout {
        const ROWS: usize = 128;
        let pieces = out.chunks_mut((ROWS * tensor.cols).max(1));
        return rows.clone().step_by(ROWS).zip(pieces).try_for_each(|(first, out)| {
            let rows = first..rows.end.min(first + ROWS);
            transposed_rows(tensor, stride, step, rows, out)
        });
    }
    if let Layout::TransposedHeads { head_rows } = tensor.layout {
        return rows_of_heads(tensor, head_rows, rows, out);
    }
    let row_bytes = tensor.row_bytes();
    for (row, values) in rows.zip(out.chunks_exact_mut(tensor.cols.max(1))) {
        let stored = tensor.layout.stored_row(row).expect("rows are stored one after the other");
        dequantize(tensor.dtype, &tensor.bytes[stored * row_bytes..][..row_bytes], values)?;
        if let Some(scales) = &tensor.scales {
            let blocks = values.chunks_mut(scales.block.1).zip(scales.of_row(stored));
            blocks.for_each(|(values, scale)| values.iter_mut().for_each(|value| *value *= scale));
        }
    }
    Ok(())
}

/// Some rows of a tensor each head of which is stored column by column.
fn rows_of_heads(
    tensor: &DenseTensor<'_>,
    head_rows: usize,
    rows: Range<usize>,
    out: &mut [f32],
) -> Result<()> {
    let cols = tensor.cols;
    let column_bytes = tensor.dtype.size_in_bytes(head_rows as u64).unwrap_or(0) as usize;
    let mut column = vec![0.0; head_rows];
    let mut first = rows.start;
    let mut out = out;
    while first < rows.end {
        let (head, end) = (first / head_rows, rows.end.min((first / head_rows + 1) * head_rows));
        let values = out.split_off_mut(..(end - first) * cols).expect("checked above");
        for col in 0..cols {
            let bytes = &tensor.bytes[(head * cols + col) * column_bytes..][..column_bytes];
            dequantize(tensor.dtype, bytes, &mut column)?;
            let of_rows = &column[first % head_rows..][..end - first];
            let places = values.iter_mut().skip(col).step_by(cols);
            places.zip(of_rows).for_each(|(place, value)| *place = *value);
        }
        first = end;
    }
    Ok(())
}

/// A sign, 4 bits of exponent, 3 of mantissa; all ones is not a number, there is no infinity.
fn f8_e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code >> 7 == 0 { magnitude } else { -magnitude }
}

/// A sign, 2 bits of exponent, 1 of mantissa. There is one zero, as in ggml.
const F4_E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The number in the low bits of a byte, and the one in its high bits.
fn f4_e2m1(codes: u8) -> [f32; 2] {
    [codes & 15, codes >> 4].map(|code| F4_E2M1[usize::from(code)])
}

/// A scale, codes of two numbers in a byte, which lie 16 apart.
fn mxfp4(&[scale, ref codes @ ..]: &[u8; 17], out: &mut [f32; 32]) {
    let scale = power_of_two(scale);
    let (first, second) = out.split_at_mut(16);
    for ((first, second), &codes) in first.iter_mut().zip(second).zip(codes) {
        [*first, *second] = f4_e2m1(codes).map(|value| scale * value);
    }
}

/// Some rows of a tensor that is stored column by column, a few columns at a time so that what is
/// read and what is written stays in the first cache.
fn transposed_rows(
    tensor: &DenseTensor<'_>,
    stride: usize,
    step: usize,
    rows: Range<usize>,
    out: &mut [f32],
) -> Result<()> {
    const COLS: usize = 16;
    let bytes_of = |values: usize| tensor.dtype.size_in_bytes(values as u64).unwrap_or(0) as usize;
    // Of a column, with what stands between its rows.
    let len = (rows.len() - 1) * step + 1;
    let mut columns = vec![0.0; COLS * len];
    for first in (0..tensor.cols).step_by(COLS) {
        let cols = first..tensor.cols.min(first + COLS);
        for (col, column) in cols.clone().zip(columns.chunks_exact_mut(len)) {
            let start = bytes_of(col * stride + rows.start * step);
            let bytes = &tensor.bytes[start..start + bytes_of(len)];
            dequantize(tensor.dtype, bytes, column)?;
        }
        for (row, out) in out.chunks_exact_mut(tensor.cols).enumerate() {
            let values = columns.chunks_exact(len).map(|column| column[row * step]);
            out[cols.clone()].iter_mut().zip(values).for_each(|(out, value)| *out = value);
        }
    }
    Ok(())
}

/// Calls `block` for each block of `BYTES` bytes and its `VALUES` values.
fn each_block<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) -> Result<()> {
    let (out, rest) = out.as_chunks_mut();
    expect_len("values after the last whole block", rest.len(), 0)?;
    expect_len("bytes of a dequantized tensor", bytes.len(), out.len() * BYTES)?;
    for (bytes, values) in bytes.as_chunks().0.iter().zip(out) {
        block(bytes, values);
    }
    Ok(())
}

/// The values of fp16 numbers, many at a time: the processor's conversion is looked for at each
/// call.
fn halves(bytes: &[u8], out: &mut [f32]) -> Result<()> {
    const PIECE: usize = 64;
    expect_len("bytes of a dequantized tensor", bytes.len(), 2 * out.len())?;
    for (bytes, out) in bytes.as_chunks().0.chunks(PIECE).zip(out.chunks_mut(PIECE)) {
        let mut halves = [f16::ZERO; PIECE];
        for (half, &bytes) in halves.iter_mut().zip(bytes) {
            *half = f16::from_le_bytes(bytes);
        }
        halves[..out.len()].convert_to_f32_slice(out);
    }
    Ok(())
}

/// The values of blocks of codes.
fn each_quantized_block<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
) -> Result<()> {
    each_block(bytes, out, |block: &[u8; BYTES], out: &mut [f32; VALUES]| {
        let runs = out.chunks_exact_mut(B::RUN).zip(run_scales::<B, BYTES, VALUES>(block));
        for (run, (out, (scale, minimum))) in runs.enumerate() {
            for (i, values) in out.chunks_exact_mut(4).enumerate() {
                let codes = B::codes(block, run * B::RUN / 4 + i).to_le_bytes();
                for (value, code) in values.iter_mut().zip(codes) {
                    let code = match B::BITS {
                        8 => f32::from(code.cast_signed()),
                        _ => f32::from(code),
                    };
                    *value = scale * (code - B::OFFSET) - minimum;
                }
            }
        }
    })
}

/// Scale and minimum of each run of a block.
#[inline(always)]
pub(crate) fn run_scales<B: Block<BYTES, VALUES>, const BYTES: usize, const VALUES: usize>(
    block: &[u8; BYTES],
) -> impl Iterator<Item = (f32, f32)> {
    // A run's code among those of four.
    let code = |codes: Option<u32>, run| codes.map_or(1, |codes| codes.to_le_bytes()[run % 4]);
    let (d, m) = (half_at(block, B::D), B::M.map(|(at, sign)| sign * half_at(block, at)));
    (0..VALUES / B::RUN).map(move |run| {
        let s = f32::from(code(B::scales(block, run / 4), run));
        let z = f32::from(code(B::minimums(block, run / 4), run));
        (d * (s - B::SCALE_OFFSET), m.map_or(0.0, |m| m * z))
    })
}

fn expect_len(what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        Ok(())
    } else {
        Err(KernelError::ShapeMismatch { what, found, expected })
    }
}

/// Four bytes, or some such words that follow one another: the codes of a block are taken apart in
/// the same way four by four and many at a time.
pub(crate) trait Words: Copy {
    fn and(self, mask: u32) -> Self;
    fn or(self, other: Self) -> Self;
    fn left(self, bits: usize) -> Self;
    /// Each word by the bits for its number.
    fn right(self, bits: impl Fn(usize) -> usize) -> Self;
}

impl Words for u32 {
    #[inline(always)]
    fn and(self, mask: u32) -> Self {
        self & mask
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        self | other
    }

    #[inline(always)]
    fn left(self, bits: usize) -> Self {
        self << bits
    }

    #[inline(always)]
    fn right(self, bits: impl Fn(usize) -> usize) -> Self {
        self >> bits(0)
    }
}

/// The bytes of a block.
pub(crate) trait Bytes: Copy {
    type Words: Words;

    /// The words from `first` on of the `len` bytes at `at`, after whose last word the first one
    /// follows.
    fn words(self, at: usize, len: usize, first: usize) -> Self::Words;
}

impl<const BYTES: usize> Bytes for &[u8; BYTES] {
    type Words = u32;

    #[inline(always)]
    fn words(self, at: usize, len: usize, first: usize) -> u32 {
        u32::from_le_bytes(*self[at + 4 * first % len..].first_chunk().expect("4 bytes"))
    }
}

/// Blocks of a ggml type: `VALUES` codes, and what they are worth in runs of [`Self::RUN`]. Of code
/// `q` that is `scale * (q - OFFSET) - minimum`, of the run's scale code `s` and minimum code `z`
/// `scale = d * (s - SCALE_OFFSET)` and `minimum = SIGN * m * z`.
pub(crate) trait Block<const BYTES: usize, const VALUES: usize> {
    /// Values that share a scale and a minimum.
    const RUN: usize;
    /// Bits of a code. Codes of 8 bits have a sign, others have none.
    const BITS: usize;
    const OFFSET: f32 = 0.0;
    const SCALE_OFFSET: f32 = 0.0;
    /// Where `d` lies.
    const D: usize = 0;
    /// Where `m` lies, in types that have minima, and `SIGN`.
    const M: Option<(usize, f32)> = None;

    /// Codes `4 word ..`, a byte each.
    fn codes<B: Bytes>(block: B, word: usize) -> B::Words;

    /// Scale codes of runs `4 word ..`, a byte each; `None` in types whose only run has 1.
    #[inline(always)]
    fn scales(_block: impl Bytes<Words = u32>, _word: usize) -> Option<u32> {
        None
    }

    /// Minimum codes likewise.
    #[inline(always)]
    fn minimums(_block: impl Bytes<Words = u32>, _word: usize) -> Option<u32> {
        None
    }
}

/// Calls `function` with the [`Block`] of a quantized type as its first generic argument; anything
/// else gives `$otherwise`.
macro_rules! for_block {
    ($dtype:expr, $($function:ident)::+($($argument:expr),*), $other:pat => $otherwise:expr) => {
        match $dtype {
            slim_formats::DType::Q4_0 => $($function)::+::<$crate::ggml::Q4_0, _, _>($($argument),*),
            slim_formats::DType::Q4_1 => $($function)::+::<$crate::ggml::Q4_1, _, _>($($argument),*),
            slim_formats::DType::Q5_0 => $($function)::+::<$crate::ggml::Q5_0, _, _>($($argument),*),
            slim_formats::DType::Q5_1 => $($function)::+::<$crate::ggml::Q5_1, _, _>($($argument),*),
            slim_formats::DType::Q8_0 => $($function)::+::<$crate::ggml::Q8_0, _, _>($($argument),*),
            slim_formats::DType::Q2_K => $($function)::+::<$crate::ggml::Q2K, _, _>($($argument),*),
            slim_formats::DType::Q3_K => $($function)::+::<$crate::ggml::Q3K, _, _>($($argument),*),
            slim_formats::DType::Q4_K => $($function)::+::<$crate::ggml::Q4K, _, _>($($argument),*),
            slim_formats::DType::Q5_K => $($function)::+::<$crate::ggml::Q5K, _, _>($($argument),*),
            slim_formats::DType::Q6_K => $($function)::+::<$crate::ggml::Q6K, _, _>($($argument),*),
            $other => $otherwise,
        }
    };
}
pub(crate) use for_block;

/// Every byte.
const EACH: u32 = 0x0101_0101;

/// `d`, codes (4 bits, offset 8).
pub(crate) struct Q4_0;

impl Block<18, 32> for Q4_0 {
    const RUN: usize = 32;
    const BITS: usize = 4;
    const OFFSET: f32 = 8.0;

    #[inline(always)]
    fn codes<B: Bytes>(block: B, word: usize) -> B::Words {
        fields(block, 2, 4, 16, word)
    }
}

/// `d`, `m`, codes (4 bits).
pub(crate) struct Q4_1;

impl Block<20, 32> for Q4_1 {
    const RUN: usize = 32;
    const BITS: usize = 4;
    const M: Option<(usize, f32)> = Some((2, -1.0));

    #[inline(always)]
    fn codes<B: Bytes>(block: B, word: usize) -> B::Words {
        fields(block, 4, 4, 16, word)
    }
}

/// `d`, bytes 2..6 bit 4 of the codes in a row, bytes 6..22 bits 0 to 3 (offset 16).
pub(crate) struct Q5_0;

impl Block<22, 32> for Q5_0 {
    const RUN: usize = 32;
    const BITS: usize = 5;
    const OFFSET: f32 = 16.0;

    #[inline(always)]
    fn codes<B: Bytes>(block: B, word: usize) -> B::Words {
        fields(block, 6, 4, 16, word).or(bits_in_a_row(block, 2, word).left(4))
    }
}

/// `d`, `m`, bytes 4..8 bit 4 of the codes in a row, bytes 8..24 bits 0 to 3.
pub(crate) struct Q5_1;

impl Block<24, 32> for Q5_1 {
    const RUN: usize = 32;
    const BITS: usize = 5;
    const M: Option<(usize, f32)> = Some((2, -1.0));

    #[inline(always)]
    fn codes<B: Bytes>(block: B, word: usize) -> B::Words {
        fields(block, 8, 4, 16, word).or(bits_in_a_row(block, 4, word).left(4))
    }
}

/// `d`, codes (signed bytes).
pub(crate) struct Q8_0;

impl Block<34, 32> for Q8_0 {
    const RUN: usize = 32;
    const BITS: usize = 8;

    #[inline(always)]
    fn codes<B: Bytes>(block: B, word: usize) -> B::Words {
        block.words(2, 32, word)
    }
}

/// Bytes 0..16 per sub-block of 16: scale (low 4 bits), minimum (high 4 bits); bytes 16..80 codes
/// (2 bits); `d` at 80, `dmin` at 82.
pub(crate) struct Q2K;

impl Block<84, 256> for Q2K {
    const RUN: usize = 16;
    const BITS: usize = 2;
    const D: usize = 80;
    const M: Option<(usize, f32)> = Some((82, 1.0));

    #[inline(always)]
    fn codes<B: Bytes>(block: B, word: usize) -> B::Words {
        fields(block, 16, 2, 32, word)
    }

    #[inline(always)]
    fn scales(block: impl Bytes<Words = u32>, word: usize) -> Option<u32> {
        Some(fields(block, 0, 4, 16, word))
    }

    #[inline(always)]
    fn minimums(block: impl Bytes<Words = u32>, word: usize) -> Option<u32> {
        Some(fields(block, 0, 4, 16, word + 4))
    }
}

/// Bytes 0..32 bit 2 of the codes, 32..96 bits 0 and 1 (offset 4); scales of sub-blocks of 16
/// (offset 32): bytes 96..104 bits 0 to 3, 104..108 bits 4 and 5; `d` at 108.
pub(crate) struct Q3K;

impl Block<110, 256> for Q3K {
    const RUN: usize = 16;
    const BITS: usize = 3;
    const OFFSET: f32 = 4.0;
    const SCALE_OFFSET: f32 = 32.0;
    const D: usize = 108;

    #[inline(always)]
    fn codes<B: Bytes>(block: B, word: usize) -> B::Words {
        fields(block, 32, 2, 32, word).or(fields(block, 0, 1, 32, word).left(2))
    }

    #[inline(always)]
    fn scales(block: impl Bytes<Words = u32>, word: usize) -> Option<u32> {
        Some(fields(block, 96, 4, 8, word).or(fields(block, 104, 2, 4, word).left(4)))
    }
}

/// `d`, `dmin`, bytes 4..16 [`six_bit_codes`] of sub-blocks of 32, bytes 16..144 codes (4 bits).
pub(crate) struct Q4K;

impl Block<144, 256> for Q4K {
    const RUN: usize = 32;
    const BITS: usize = 4;
    const M: Option<(usize, f32)> = Some((2, 1.0));

    #[inline(always)]
    fn codes<B: Bytes>(block: B, word: usize) -> B::Words {
        fields(block, 16, 4, 32, word)
    }

    #[inline(always)]
    fn scales(block: impl Bytes<Words = u32>, word: usize) -> Option<u32> {
        Some(six_bit_codes(block, 4, 0, word))
    }

    #[inline(always)]
    fn minimums(block: impl Bytes<Words = u32>, word: usize) -> Option<u32> {
        Some(six_bit_codes(block, 8, 4, word))
    }
}

/// As [`Q4K`], with bit 4 of the codes in bytes 16..48 and bits 0 to 3 in bytes 48..176.
pub(crate) struct Q5K;

impl Block<176, 256> for Q5K {
    const RUN: usize = 32;
    const BITS: usize = 5;
    const M: Option<(usize, f32)> = Some((2, 1.0));

    #[inline(always)]
    fn codes<B: Bytes>(block: B, word: usize) -> B::Words {
        fields(block, 48, 4, 32, word).or(fields(block, 16, 1, 32, word).left(4))
    }

    #[inline(always)]
    fn scales(block: impl Bytes<Words = u32>, word: usize) -> Option<u32> {
        Q4K::scales(block, word)
    }

    #[inline(always)]
    fn minimums(block: impl Bytes<Words = u32>, word: usize) -> Option<u32> {
        Q4K::minimums(block, word)
    }
}

/// Bytes 0..128 bits 0 to 3 of the codes, 128..192 bits 4 and 5 (offset 32); bytes 192..208 signed
/// scales of sub-blocks of 16; `d` at 208.
pub(crate) struct Q6K;

impl Block<210, 256> for Q6K {
    const RUN: usize = 16;
    const BITS: usize = 6;
    const OFFSET: f32 = 32.0;
    const SCALE_OFFSET: f32 = 128.0;
    const D: usize = 208;

    #[inline(always)]
    fn codes<B: Bytes>(block: B, word: usize) -> B::Words {
        fields(block, 0, 4, 64, word).or(fields(block, 128, 2, 32, word).left(4))
    }

    #[inline(always)]
    fn scales(block: impl Bytes<Words = u32>, word: usize) -> Option<u32> {
        Some(block.words(192, 16, word) ^ (0x80 * EACH))
    }
}

/// Codes `4 word ..` of `Q4_K`'s 8 scales or 8 minima. Codes 0 to 3 are the low 6 bits of the bytes
/// at `at`; the others have their low 4 bits in those at 12, from bit `bit` on, and their high 2
/// bits on top of the byte of the code four before.
#[inline(always)]
fn six_bit_codes(block: impl Bytes<Words = u32>, at: usize, bit: usize, word: usize) -> u32 {
    let first = block.words(at, 4, 0);
    match word {
        0 => first & (63 * EACH),
        _ => block.words(12, 4, 0) >> bit & (15 * EACH) | (first >> 6 & (3 * EACH)) << 4,
    }
}

/// Fields `4 word ..` of `bits` bits from the bytes at `at`. Of every `run` bytes, the lowest
/// fields come first, one of each byte, then the next higher ones.
#[inline(always)]
fn fields<B: Bytes>(block: B, at: usize, bits: usize, run: usize, word: usize) -> B::Words {
    let planes = 8 / bits;
    let bytes = block.words(at + 4 * word / (run * planes) * run, run, word);
    bytes.right(|i| 4 * (word + i) / run % planes * bits).and(((1 << bits) - 1) * EACH)
}

/// Bits `4 word ..` of the 32 at `at`, a byte each.
#[inline(always)]
fn bits_in_a_row<B: Bytes>(block: B, at: usize, word: usize) -> B::Words {
    let four = block.words(at, 4, word).right(|i| 4 * (word + i)).and(15);
    let two = four.or(four.left(14));
    two.or(two.left(7)).and(EACH)
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;
    use slim_formats::{BlockScales, ScaleValues};

    /// Random blocks and the values that the Python package `gguf` gives them
    /// (`tests/oracle/ggml_blocks.py`).
    const BLOCKS: &[u8] = include_bytes!("../../tests/data/ggml/blocks.safetensors");

    const TYPES: [DType; 14] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q8_0,
        DType::Q2_K,
        DType::Q3_K,
        DType::Q4_K,
        DType::Q5_K,
        DType::Q6_K,
        DType::MXFP4,
    ];

    #[test]
    fn dequantize_oracle_blocks_give_the_same_bits() {
        let oracle = SafeTensors::deserialize(BLOCKS).unwrap();
        for dtype in TYPES {
            let bytes = oracle.tensor(&format!("{dtype:?}.blocks")).unwrap().data();
            let expected: Vec<u32> =
                words(oracle.tensor(&format!("{dtype:?}.values")).unwrap().data());
            let mut values = vec![f32::NAN; expected.len()];
            dequantize(dtype, bytes, &mut values).unwrap();
            let values: Vec<u32> = values.into_iter().map(f32::to_bits).collect();
            assert_eq!(values, expected, "{dtype:?}");
        }
    }

    #[test]
    fn f8_values_are_those_of_the_format() {
        let values = [0x00, 0x80, 0x01, 0x07, 0x08, 0x38, 0x3c, 0xb8, 0x7e].map(f8_e4m3);
        let small = 1.0 / 512.0;
        assert_eq!(values, [0.0, 0.0, small, 7.0 * small, 8.0 * small, 1.0, 1.5, -1.0, 448.0]);
        assert!(f8_e4m3(0x7f).is_nan() && f8_e4m3(0xff).is_nan());
    }

    /// Blocks of 2 x 2 in a part of a matrix that begins with its second row.
    #[test]
    fn scales_multiply_their_blocks() {
        let values = ScaleValues::Floats(&[1.0, 10.0, 100.0, 1000.0]);
        let scales = BlockScales { values, block: (2, 2), per_row: 2, first_row: 1 };
        let tensor = DenseTensor {
            dtype: DType::F8_E4M3,
            rows: 3,
            cols: 3,
            bytes: &[0x38; 9],
            layout: Layout::AsStored,
            scales: Some(scales),
        };
        let mut out = [0.0; 9];
        dequantize_rows(&tensor, 0..3, &mut out).unwrap();
        assert_eq!(out, [1.0, 1.0, 10.0, 100.0, 100.0, 1000.0, 100.0, 100.0, 1000.0]);
    }

    /// The same weights in a file of ggml's and in one of Hugging Face's, whose order of codes and
    /// scales differ.
    #[test]
    fn mxfp4_values_are_those_of_the_format() {
        let codes: Vec<u8> = (0..32).map(|i| (i * 7 % 16) as u8).collect();
        let magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        let expected: Vec<f32> = codes
            .iter()
            .map(|&code| {
                let sign = if code < 8 { 1.0 } else { -1.0 };
                sign * magnitudes[usize::from(code % 8)] * 8.0
            })
            .collect();
        let mut of_ggml = vec![130];
        of_ggml.extend((0..16).map(|i| codes[i] | codes[i + 16] << 4));
        let mut values = [f32::NAN; 32];
        dequantize(DType::MXFP4, &of_ggml, &mut values).unwrap();
        assert_eq!(values[..], expected);

        let pairs: Vec<u8> = codes.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect();
        let values = ScaleValues::Exponents(&[127, 130]);
        let tensor = DenseTensor {
            dtype: DType::F4_E2M1,
            rows: 1,
            cols: 32,
            bytes: &pairs,
            layout: Layout::AsStored,
            scales: Some(BlockScales { values, block: (1, 32), per_row: 1, first_row: 1 }),
        };
        let mut values = [f32::NAN; 32];
        dequantize_rows(&tensor, 0..1, &mut values).unwrap();
        assert_eq!(values[..], expected);
        let powers = [0, 1, 127, 128, 254].map(power_of_two);
        let smallest = f32::MIN_POSITIVE;
        assert_eq!(powers, [0.5 * smallest, smallest, 1.0, 2.0, 1.701_411_8e38]);
        assert!(power_of_two(255).is_nan());
    }

    fn words(bytes: &[u8]) -> Vec<u32> {
        bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect()
    }

    #[test]
    fn dequantize_type_without_weights_is_refused() {
        for dtype in [DType::F64, DType::I8, DType::I16, DType::I32, DType::I64, DType::Unknown(99)]
        {
            let error = dequantize(dtype, &[], &mut []).unwrap_err();
            assert!(
                matches!(error, KernelError::UnsupportedType { dtype: found } if found == dtype)
            );
        }
    }

    #[test]
    fn dequantize_wrong_lengths_are_refused() {
        for (bytes, values) in [(17, 32), (19, 32), (18, 31), (18, 64), (0, 32), (18, 0)] {
            let error =
                dequantize(DType::Q4_0, &vec![0; bytes], &mut vec![0.0; values]).unwrap_err();
            assert!(
                matches!(error, KernelError::ShapeMismatch { .. }),
                "{bytes} bytes, {values} values"
            );
        }
    }

    /// Eight rows of two columns, each holding its stored row number.
    fn numbered_rows(bytes: &mut Vec<u8>, layout: Layout) -> DenseTensor<'_> {
        bytes.extend((0..8).flat_map(|row| [row as f32; 2]).flat_map(f32::to_le_bytes));
        DenseTensor { dtype: DType::F32, rows: 8, cols: 2, bytes, layout, scales: None }
    }

    #[test]
    fn dequantize_rows_as_stored_keeps_the_order() {
        let mut bytes = Vec::new();
        let tensor = numbered_rows(&mut bytes, Layout::AsStored);
        let mut out = [0.0; 4];
        dequantize_rows(&tensor, 3..5, &mut out).unwrap();
        assert_eq!(out, [3.0, 3.0, 4.0, 4.0]);
    }

    #[test]
    fn dequantize_rows_interleaved_gives_the_order_of_use() {
        let mut bytes = Vec::new();
        let tensor =
            numbered_rows(&mut bytes, Layout::Interleaved { head_dim: 4, first: 0, rotated: 4 });
        let mut out = [0.0; 10];
        dequantize_rows(&tensor, 1..6, &mut out).unwrap();
        assert_eq!(out, [2.0, 2.0, 1.0, 1.0, 3.0, 3.0, 4.0, 4.0, 6.0, 6.0]);
    }

    /// Columns of a fused matrix of 400 rows, more than are read at a time, in all ways of asking
    /// for them.
    #[test]
    fn dequantize_rows_transposed_gives_the_rows_of_a_part() {
        let (stride, first, rows, cols) = (400, 100, 290, 35);
        let value = |row: usize, col: usize| (col * stride + first + row) as f32;
        let fused: Vec<u8> = (0..cols * stride).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let bytes = &fused[4 * first..4 * (first + (cols - 1) * stride + rows)];
        let layout = Layout::Transposed { stride, step: 1 };
        let tensor = DenseTensor { dtype: DType::F32, rows, cols, bytes, layout, scales: None };
        assert_eq!(tensor.stored_bytes(), 4 * 290 * 35);
        for asked in [0..290, 0..1, 289..290, 3..131, 128..256, 100..290, 7..7] {
            let mut out = vec![f32::NAN; asked.len() * cols];
            dequantize_rows(&tensor, asked.clone(), &mut out).unwrap();
            let expected: Vec<f32> =
                asked.flat_map(|row| (0..cols).map(move |col| value(row, col))).collect();
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn dequantize_rows_outside_the_tensor_are_refused() {
        let mut bytes = Vec::new();
        let tensor = numbered_rows(&mut bytes, Layout::AsStored);
        for (rows, values) in [(7..9, 4), (9..9, 0), (0..2, 3)] {
            let error = dequantize_rows(&tensor, rows, &mut vec![0.0; values]).unwrap_err();
            assert!(matches!(error, KernelError::ShapeMismatch { .. }));
        }
    }
}
