//! A SliM layer in the layout of ONNX Runtime's operator `MatMulNBits`.
//!
//! The operator knows one width and one block size per layer, and a scale per row and block. Its
//! weights are `scale * (code - middle)` with `middle = 2^(bits - 1)`. It could be given zero
//! points, too, but SliM's minima are real numbers, and with real zero points ONNX Runtime's CPU
//! kernels dequantize the layer for every token (1.32: 5 to 20 times slower) or, with 8 bits,
//! refuse. So what lacks in a block is an `offset` of its own, which is constant over the block's
//! columns: `w = scale * (code - middle) + offset`. The offsets are a matrix 16 to 256 times
//! narrower than the layer; its product with the sums of the inputs over each block, added to that
//! of the operator, gives what the SliM layer gives.

use std::ops::Range;

use slim_formats::slim::{
    Bands, BitWidth, Group, LayerLayout, PackedTensor, ScaleCoding, TILE_ROWS, UNIT_COLS,
};

/// Columns of the largest block that the operator takes.
const MAX_BLOCK: usize = 256;

/// Columns of the smallest block for which ONNX Runtime has a fast 2-bit kernel.
const MIN_BLOCK_OF_2_BITS: usize = 32;

/// A layer's codes, scales and offsets.
pub struct Blocks {
    /// Bits per code: 2, 4 or 8.
    pub bits: u8,
    /// Columns per block: a power of two.
    pub block: usize,
    /// Blocks per row; the last one may have fewer columns.
    pub row_blocks: usize,
    /// `[rows, row_blocks * block * bits / 8]`, the first code of a byte in its lowest bits.
    pub codes: Vec<u8>,
    /// `[rows, row_blocks]`.
    pub scales: Vec<f32>,
    /// `[rows, row_blocks]`.
    pub offsets: Vec<f32>,
}

impl Blocks {
    /// Lays out a matrix with codes of at least `least_bits`.
    pub fn new(bands: Bands<'_>, least_bits: u8) -> Self {
        let (rows, cols) = bands.shape();
        let (bits, block) = Self::bits_and_block(bands, least_bits);
        let row_blocks = cols.div_ceil(block);
        let mut blocks = Self {
            bits,
            block,
            row_blocks,
            codes: vec![0; rows * row_blocks * block_bytes(block, bits)],
            scales: vec![0.0; rows * row_blocks],
            offsets: vec![0.0; rows * row_blocks],
        };
        for (first_row, band) in bands.iter() {
            let layout = band.layout();
            for tile in 0..layout.tiles() {
                for group in layout.groups() {
                    blocks.set_codes(band, first_row, tile, group);
                    blocks.set_scales(band, first_row, tile, group);
                }
            }
        }
        blocks
    }

    /// Bits per code and columns per block of the matrix.
    pub fn bits_and_block(bands: Bands<'_>, least_bits: u8) -> (u8, usize) {
        let block = block_size(bands.get(0).layout());
        (node_bits(bands.widest(), block).max(least_bits), block)
    }

    /// Codes of `width` bits move to the middle of those of `bits`.
    fn set_codes(
        &mut self,
        packed: PackedTensor<'_>,
        first_row: usize,
        tile: usize,
        group: &Group,
    ) {
        let bits = usize::from(self.bits);
        let row_bytes = self.row_blocks * block_bytes(self.block, self.bits);
        let coding = packed.layout().coding();
        let shift = (1 << (bits - 1)) - half_range(group, coding) as u8;
        let mut columns = vec![[0; TILE_ROWS]; group.cols.len()];
        packed.codes(tile, group, &mut columns);
        let rows = tile_rows(packed.layout(), first_row, tile);
        let codes = &mut self.codes[rows.start * row_bytes..rows.end * row_bytes];
        for (lane, row) in codes.chunks_exact_mut(row_bytes).enumerate() {
            for (col, column) in group.cols.clone().zip(&columns) {
                let bit = col * bits;
                row[bit / 8] |= (column[lane] + shift) << (bit % 8);
            }
        }
    }

    /// `w = factor * code + offset` is `factor * (code - half) + (offset + factor * half)`.
    fn set_scales(
        &mut self,
        packed: PackedTensor<'_>,
        first_row: usize,
        tile: usize,
        group: &Group,
    ) {
        let layout = packed.layout();
        let half = f32::from(half_range(group, layout.coding()));
        let rows = tile_rows(layout, first_row, tile);
        let (d, m) = packed.row_scales(tile);
        for (run, cols) in group.runs(layout.coding()).enumerate() {
            let (factor, offset) = packed.scales(tile, group, run);
            for (lane, row) in rows.clone().enumerate() {
                let (factor, offset) = (d[lane] * factor[lane], m[lane] * offset[lane]);
                let first = row * self.row_blocks;
                let own = first + cols.start / self.block..first + cols.end.div_ceil(self.block);
                self.scales[own.clone()].fill(factor);
                self.offsets[own].fill(offset + factor * half);
            }
        }
    }
}

/// The rows of a tile in the matrix, of a band that begins with row `first_row`.
fn tile_rows(layout: &LayerLayout, first_row: usize, tile: usize) -> Range<usize> {
    let [start, end] = [tile, tile + 1].map(|tile| layout.rows().min(tile * TILE_ROWS));
    first_row + start..first_row + end
}

/// Half as many as a group has codes.
fn half_range(group: &Group, coding: ScaleCoding) -> u16 {
    1 << (group.code_width(coding).bits() - 1)
}

/// Bytes of a block's codes.
pub fn block_bytes(block: usize, bits: u8) -> usize {
    block * usize::from(bits) / 8
}

/// The largest block that lies in one run of every row, wherever it starts: all lengths are
/// multiples of 16, with the columns that are stored behind the last one.
fn block_size(layout: &LayerLayout) -> usize {
    let starts = layout.groups().iter().flat_map(|group| group.runs(layout.coding()));
    let stored = layout.cols().next_multiple_of(UNIT_COLS);
    let ends = starts.fold(stored, |ends, run| ends | run.start);
    (1 << ends.trailing_zeros()).min(MAX_BLOCK)
}

/// The narrowest codes that hold those of every group, and that ONNX Runtime is fast with.
fn node_bits(widest: BitWidth, block: usize) -> u8 {
    match widest.bits() {
        1 | 2 if block >= MIN_BLOCK_OF_2_BITS => 2,
        1..=4 => 4,
        _ => 8,
    }
}
#[cfg(test)]
mod tests;
