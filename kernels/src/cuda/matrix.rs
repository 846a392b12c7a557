//! A weight on the device.

use std::{cmp::Reverse, iter::repeat_n, ops::RangeInclusive, sync::Arc};

use bytemuck::{Pod, Zeroable};
use half::f16;
use rayon::prelude::*;
use slim_formats::{
    Weight,
    slim::{Group, LayerLayout, PackedTensor, ScaleCoding, TILE_ROWS, UNIT_COLS},
};

use super::{Buffer, Device, check_equal, check_limit};
use crate::{
    KernelError, Result,
    weight::{dequantize_rows, shape},
};

/// Columns of an item at most.
const ITEM_COLS: usize = 128;
/// Columns of a step.
const STEP_COLS: usize = 64;
/// Columns of a quarter, and quarters of a quad.
const QUARTER_COLS: usize = 64;
pub(super) const QUARTERS: usize = 4;
/// The words of a step of a tile in fragment order.
const STEP_WORDS: usize = TILE_ROWS * STEP_COLS / 2;
/// Units of columns that the kernels can count.
const MAX_UNITS: usize = u16::MAX as usize;
/// What fp16 can represent.
const FP16: RangeInclusive<f32> = -65504.0..=65504.0;
/// Bytes of fragments that the host holds at a time.
const FRAGMENT_PIECE_BYTES: usize = 32 << 20;

/// A weight matrix in device memory.
///
/// Packed layers lie there as in their file, with a table of what the kernels work on at a time;
/// any other weight is fp16, in the order in which the kernels use it. Products add its bias, if it
/// has one.
pub struct Matrix {
    rows: usize,
    cols: usize,
    /// All packed, or a single dense one.
    pub(super) bands: Vec<Band>,
    /// [rows].
    pub(super) bias: Option<Buffer<f32>>,
}

/// Some rows of a matrix, or all of them.
pub(super) struct Band {
    pub first_row: usize,
    pub rows: usize,
    pub cols: usize,
    pub storage: Storage,
}

pub(super) enum Storage {
    Packed(Packed),
    Trellis(Packed),
    Dense(Dense),
}

/// Which kernels multiply with a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StorageKind {
    Packed,
    Trellis,
    Dense,
}

impl StorageKind {
    pub const ALL: [Self; 3] = [Self::Packed, Self::Trellis, Self::Dense];
}

/// `PackedMatrix` of `kernels/cuda/packed.cuh`, and `TrellisMatrix` of `trellis.cuh`.
pub(super) struct Packed {
    pub codes: Buffer<u8>,
    pub scales: Buffer<u8>,
    pub row_scales: Buffer<u8>,
    pub units: Buffer<f32>,
    pub row_factors: Buffer<u16>,
    pub items: Buffer<Item>,
    pub quads: Buffer<Quarter>,
    pub tile_code_bytes: u32,
    pub tile_scale_bytes: u32,
    pub coding: u32,
    pub sub_group_log2: u32,
    pub max_width: u32,
    pub plain_units: u32,
}

/// `DenseMatrix` of `kernels/cuda/dense.cuh`.
pub(super) struct Dense {
    pub fragments: Buffer<u32>,
    pub steps: u32,
}

/// Up to 128 columns of a group: `Item` of `kernels/cuda/packed.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Item {
    codes: u32,
    scales: u32,
    col16: u16,
    start16: u16,
    group16: u16,
    width: u8,
    units: u8,
}

/// 64 columns of a group: `Quarter` of `kernels/cuda/packed.cuh`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Quarter {
    codes: u32,
    plane_step: u32,
    scales: u32,
    col64: u16,
    width: u16,
}

const _: () = assert!(size_of::<Item>() == 16 && size_of::<Quarter>() == 16);

impl Matrix {
    /// Copies a weight to the device.
    ///
    /// # Errors
    /// `TooLarge`; `Unrepresentable` for a scale that is not finite, or a value of a dense weight
    /// beyond 65504 either way; `UnsupportedType` for element types that hold no weights;
    /// `OutOfDeviceMemory`; `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn upload(device: &Arc<Device>, weight: Weight<'_>) -> Result<Self> {
        let (rows, cols) = shape(weight);
        check_limit("columns", cols, MAX_UNITS * UNIT_COLS)?;
        check_limit("rows", rows, 1 << 28)?;
        let Some(layers) = weight.bands() else { return Self::upload_dense(device, weight) };
        let band = |(first_row, layer): (usize, PackedTensor<'_>)| {
            let packed = Packed::upload(device, layer)?;
            let storage = match layer.layout().coding() {
                ScaleCoding::Paper | ScaleCoding::TwoLevel { .. } => Storage::Packed(packed),
                ScaleCoding::Trellis { .. } => Storage::Trellis(packed),
            };
            Ok(Band { first_row, rows: layer.layout().rows(), cols, storage })
        };
        let bands = layers.iter().map(band).collect::<Result<_>>()?;
        Ok(Self { rows, cols, bands, bias: None })
    }

    /// The same as fp16, whatever the weight is.
    ///
    /// # Errors
    /// As [`Self::upload`].
    pub(super) fn upload_dense(device: &Arc<Device>, weight: Weight<'_>) -> Result<Self> {
        let (rows, cols) = shape(weight);
        let storage = Storage::Dense(Dense::upload(device, weight)?);
        let bands = vec![Band { first_row: 0, rows, cols, storage }];
        Ok(Self { rows, cols, bands, bias: None })
    }

    /// The matrix with a bias.
    ///
    /// # Errors
    /// `ShapeMismatch` unless it has a value for each row.
    pub fn with_bias(self, bias: Buffer<f32>) -> Result<Self> {
        check_equal("values of the bias", bias.len(), self.rows)?;
        Ok(Self { bias: Some(bias), ..self })
    }

    /// Output channels.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input channels.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of device memory that it takes.
    pub fn device_bytes(&self) -> u64 {
        let bytes = |band: &Band| match &band.storage {
            Storage::Packed(w) | Storage::Trellis(w) => {
                let bytes = [&w.codes, &w.scales, &w.row_scales].map(Buffer::device_bytes);
                let tables = [w.units.device_bytes(), w.row_factors.device_bytes()];
                let items = w.items.device_bytes() + w.quads.device_bytes();
                bytes.iter().chain(&tables).sum::<u64>() + items
            }
            Storage::Dense(w) => w.fragments.device_bytes(),
        };
        let bias = self.bias.as_ref().map_or(0, Buffer::device_bytes);
        self.bands.iter().map(bytes).sum::<u64>() + bias
    }

    /// How its bands are stored, which all have the coding of the first.
    pub(super) fn kind(&self) -> StorageKind {
        match self.bands[0].storage {
            Storage::Packed(_) => StorageKind::Packed,
            Storage::Trellis(_) => StorageKind::Trellis,
            Storage::Dense(_) => StorageKind::Dense,
        }
    }
}

impl Packed {
    fn upload(device: &Arc<Device>, w: PackedTensor<'_>) -> Result<Self> {
        let layout = w.layout();
        let (coding, sub_group_log2) = match layout.coding() {
            ScaleCoding::Paper => (0, 0),
            ScaleCoding::TwoLevel { sub_group, scale_bits } => {
                (if scale_bits == 6 { 2 } else { 1 }, sub_group.ilog2())
            }
            ScaleCoding::Trellis { sub_group } => (3, sub_group.ilog2()),
        };
        let max_width = layout.groups().iter().map(|group| group.bit_width.bits()).max();
        check_limit("bytes of a tile's scales", layout.tile_scale_bytes(), u32::MAX as usize)?;
        let (codes, scales, row_scales) = w.parts();
        let (units, items) = (units(w)?, items(layout));
        Ok(Self {
            units: Buffer::upload(device, &units)?,
            row_factors: Buffer::upload(device, &row_factors(w, &units))?,
            plain_units: plain_units(layout.coding(), &items),
            items: Buffer::upload(device, &items)?,
            quads: Buffer::upload(device, &quads(layout))?,
            codes: Buffer::upload(device, codes)?,
            scales: Buffer::upload(device, scales)?,
            row_scales: Buffer::upload(device, row_scales)?,
            // At most 2 * 8 bytes for each of the columns, which are limited.
            tile_code_bytes: layout.tile_code_bytes() as u32,
            tile_scale_bytes: layout.tile_scale_bytes() as u32,
            coding,
            sub_group_log2,
            max_width: max_width.unwrap_or(1).into(),
        })
    }
}

/// The columns of a layer, cut into what a warp takes at a time.
fn items(layout: &LayerLayout) -> Vec<Item> {
    layout.groups().iter().flat_map(|group| group_items(layout.coding(), group)).collect()
}

/// Offsets and counts fit their types: `Matrix::upload` limits columns.
fn group_items(coding: ScaleCoding, group: &Group) -> impl Iterator<Item = Item> {
    let (run_cols, record_bytes) = match coding {
        // One record for the whole group.
        ScaleCoding::Paper => (ITEM_COLS, 0),
        ScaleCoding::TwoLevel { sub_group, scale_bits: 6 } => (sub_group, 24),
        ScaleCoding::TwoLevel { sub_group, .. } => (sub_group, 16),
        ScaleCoding::Trellis { sub_group } => (sub_group, TILE_ROWS / 2),
    };
    (0..group.stored_cols()).step_by(ITEM_COLS).map(move |start| Item {
        codes: group.codes_offset as u32,
        scales: (group.scales_offset + start / run_cols * record_bytes) as u32,
        col16: ((group.cols.start + start) / UNIT_COLS) as u16,
        start16: (start / UNIT_COLS) as u16,
        group16: (group.stored_cols() / UNIT_COLS) as u16,
        width: group.bit_width.bits(),
        units: (ITEM_COLS.min(group.stored_cols() - start) / UNIT_COLS) as u8,
    })
}

/// Whether a layer is two-level, with scale codes of 4 bits for 32 columns or more.
fn has_small_scale_codes(coding: ScaleCoding) -> bool {
    matches!(coding, ScaleCoding::TwoLevel { sub_group: 32.., scale_bits: 4 })
}

/// Units of each item of a plain layer: 8, or 4, in all of them, with 4-bit scale codes for 32
/// columns or more. 0 for any other.
fn plain_units(coding: ScaleCoding, items: &[Item]) -> u32 {
    let may_be_plain =
        has_small_scale_codes(coding) || matches!(coding, ScaleCoding::Trellis { sub_group: 32.. });
    let of_all = |units| may_be_plain && items.iter().all(|item| item.units == units);
    [8, 4].into_iter().find(|&units| of_all(units)).unwrap_or(0).into()
}

/// The columns of a layer in quads of one bit-width, the widest first, for `matvec_raw`. What a
/// quad lacks of four quarters has no width and the column behind the last, and so has a last quad.
/// Nothing at all if codes cannot be multiplied as they are.
fn quads(layout: &LayerLayout) -> Vec<Quarter> {
    if !takes_raw_codes(layout) {
        return Vec::new();
    }
    let end = Quarter { col64: (layout.cols() / QUARTER_COLS) as u16, ..Quarter::default() };
    let mut quarters: Vec<_> =
        layout.groups().iter().flat_map(|group| group_quarters(layout.coding(), group)).collect();
    quarters.sort_by_key(|quarter| Reverse(quarter.width));
    let of_width = quarters.chunk_by(|a, b| a.width == b.width);
    let mut quads: Vec<_> = of_width
        .flat_map(|quarters| {
            let missing = quarters.len().next_multiple_of(QUARTERS) - quarters.len();
            quarters.iter().copied().chain(repeat_n(end, missing))
        })
        .collect();
    quads.extend([end; QUARTERS]);
    quads
}

/// Whether scales can be applied to sums over 32 columns, four bits of a scale code each, and
/// groups can be cut into quarters.
fn takes_raw_codes(layout: &LayerLayout) -> bool {
    has_small_scale_codes(layout.coding())
        && layout.groups().iter().all(|group| group.cols.len().is_multiple_of(QUARTER_COLS))
}

/// Offsets and counts fit their types: `Matrix::upload` limits columns.
fn group_quarters(coding: ScaleCoding, group: &Group) -> impl Iterator<Item = Quarter> {
    let ScaleCoding::TwoLevel { sub_group, .. } = coding else { unreachable!("two-level codes") };
    let (cols, width) = (group.cols.len(), usize::from(group.bit_width.bits()));
    let planes = [8, 4, 2, 1].into_iter().filter(move |bits| width & bits != 0);
    // Where a quarter's codes of a plane begin in the group, bytes.
    let plane_at = move |bits_before: usize, bits: usize, start: usize| {
        2 * (bits_before * cols + bits * start)
    };
    (0..cols).step_by(QUARTER_COLS).map(move |start| {
        let mut planes = planes.clone();
        let first = planes.next().unwrap_or(0);
        let codes = plane_at(0, first, start);
        let second = planes.next().map_or(codes, |bits| plane_at(first, bits, start));
        Quarter {
            codes: (group.codes_offset + codes) as u32,
            plane_step: (second - codes) as u32,
            scales: (group.scales_offset + start / sub_group * TILE_ROWS) as u32,
            col64: ((group.cols.start + start) / QUARTER_COLS) as u16,
            width: width as u16,
        }
    })
}

/// For each row the fp16 numbers `2^15 * d / unit` and `-2^-9 * m / unit`: `RowScales` of
/// `packed.cuh`. Nothing for the paper's coding.
fn row_factors(w: PackedTensor<'_>, units: &[f32]) -> Vec<u16> {
    const D: f32 = 32768.0;
    const M: f32 = -1.0 / 512.0;
    if w.layout().coding() == ScaleCoding::Paper {
        return Vec::new();
    }
    let of_tile = |(tile, units): (usize, &[f32])| -> [[u16; 2]; TILE_ROWS] {
        let (d, m) = w.row_scales(tile);
        let half = |number: f32, row: usize| f16::from_f32(number / units[row]).to_bits();
        std::array::from_fn(|row| [half(D * d[row], row), half(M * m[row], row)])
    };
    let factors: Vec<_> = units.par_chunks(TILE_ROWS).enumerate().map(of_tile).collect();
    factors.into_flattened().into_flattened()
}

/// What the operands of each row are counted in, `[tiles * 16]`: weight = unit * 2^(24 - E) *
/// operand (`packed.cuh`).
///
/// A power of two: what the file stores in fp16 keeps all its bits when it is divided by it. No
/// factor of the row is larger (before it is multiplied with a scale code), and no offset so much
/// larger that fp16 could not hold both.
fn units(w: PackedTensor<'_>) -> Result<Vec<f32>> {
    let of_tile = |tile| -> [f32; TILE_ROWS] {
        let (factor, offset) = match w.layout().coding() {
            ScaleCoding::Paper => largest_of_groups(w, tile),
            ScaleCoding::TwoLevel { .. } | ScaleCoding::Trellis { .. } => w.row_scales(tile),
        };
        std::array::from_fn(|r| unit(factor[r], offset[r]))
    };
    let units: Vec<_> = (0..w.layout().tiles()).into_par_iter().map(of_tile).collect();
    let units = units.into_flattened();
    match units.iter().position(|unit| !unit.is_finite()) {
        Some(row) => Err(KernelError::Unrepresentable { row, value: units[row] }),
        None => Ok(units),
    }
}

/// The unit of a row; 1 if all its weights are 0.
fn unit(factor: f32, offset: f32) -> f32 {
    const MAX_OFFSET: f32 = (1 << 20) as f32;
    match factor.abs() + offset.abs() / MAX_OFFSET {
        0.0 => 1.0,
        sum if !sum.is_finite() => sum,
        // Rounds up to the next power of two, by the bits of an f32.
        _ => {
            let needed = factor.abs().max(offset.abs() / MAX_OFFSET);
            f32::from_bits((needed.to_bits() + 0x007f_ffff) & 0xff80_0000)
        }
    }
}

/// The largest factor and the largest offset of each row of a tile, NaN if there is one.
fn largest_of_groups(w: PackedTensor<'_>, tile: usize) -> ([f32; TILE_ROWS], [f32; TILE_ROWS]) {
    let larger = |a: f32, b: f32| if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b.abs()) };
    let mut largest = ([0.0; TILE_ROWS], [0.0; TILE_ROWS]);
    for group in w.layout().groups() {
        let (factor, offset) = w.scales(tile, group, 0);
        for r in 0..TILE_ROWS {
            largest.0[r] = larger(largest.0[r], factor[r]);
            largest.1[r] = larger(largest.1[r], offset[r]);
        }
    }
    largest
}

impl Dense {
    fn upload(device: &Arc<Device>, weight: Weight<'_>) -> Result<Self> {
        let (rows, cols) = shape(weight);
        let tiles = rows.div_ceil(TILE_ROWS);
        let tile_words = cols.div_ceil(STEP_COLS) * STEP_WORDS;
        let mut fragments = Buffer::zeros(device, tiles * tile_words)?;
        let piece_tiles = (FRAGMENT_PIECE_BYTES / size_of::<u32>() / tile_words).max(1);
        let mut piece = vec![0; piece_tiles.min(tiles) * tile_words];
        for first in (0..tiles).step_by(piece_tiles) {
            let words = &mut piece[..piece_tiles.min(tiles - first) * tile_words];
            words
                .par_chunks_mut(tile_words)
                .enumerate()
                .try_for_each(|(i, words)| write_fragments(weight, first + i, words))?;
            let start = first * tile_words;
            fragments.view_mut().slice(start..start + words.len()).write(words)?;
        }
        Ok(Self { fragments, steps: cols.div_ceil(STEP_COLS) as u32 })
    }
}

/// Tile `tile` of a weight in fragment order (`kernels/cuda/dense.cuh`):
/// `[steps][4 products][32 lanes][4 words]`.
fn write_fragments(weight: Weight<'_>, tile: usize, words: &mut [u32]) -> Result<()> {
    let (rows, cols) = shape(weight);
    let first_row = tile * TILE_ROWS;
    let n = TILE_ROWS.min(rows - first_row);
    let mut values = vec![0.0; n * cols];
    dequantize_rows(weight, first_row..first_row + n, &mut values)?;
    if let Some(at) = values.iter().position(|value| !FP16.contains(value)) {
        let (row, value) = (first_row + at / cols, values[at]);
        return Err(KernelError::Unrepresentable { row, value });
    }
    let half = |row: usize, col: usize| match row < n && col < cols {
        true => u32::from(f16::from_f32(values[row * cols + col]).to_bits()),
        false => 0,
    };
    for (i, word) in words.iter_mut().enumerate() {
        let (step, product, lane, k) = (i / STEP_WORDS, i / 128 % 4, i / 4 % 32, i % 4);
        let row = lane / 4 * 2 + k % 2;
        let col = step * STEP_COLS + lane % 4 * UNIT_COLS + 4 * product + k / 2;
        *word = half(row, col) | half(row, col + 2) << 16;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use slim_formats::{
        DType, DenseTensor, Layout,
        slim::{BitWidth, PackedLayer},
    };

    use super::*;

    fn layout(cols: usize, group_size: usize, coding: ScaleCoding, bits: &[u8]) -> LayerLayout {
        let widths: Vec<_> = bits.iter().map(|&bits| BitWidth::new(bits).unwrap()).collect();
        LayerLayout::new(16, cols, group_size, coding, &widths).unwrap()
    }

    #[test]
    fn items_cover_each_column_once_and_never_two_groups() {
        let two_level = ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 6 };
        for coding in [ScaleCoding::Paper, two_level] {
            let layout = layout(656, 304, coding, &[3, 2, 8]);
            let found: Vec<_> =
                items(&layout).iter().map(|i| (i.col16, i.start16, i.group16, i.units)).collect();
            let expected =
                [(0, 0, 19, 8), (8, 8, 19, 8), (16, 16, 19, 3), (19, 0, 19, 8), (27, 8, 19, 8)];
            assert_eq!(found[..5], expected);
            assert_eq!(found[5..], [(35, 16, 19, 3), (38, 0, 3, 3)]);
            // 304 columns of 3 bits take 1824 bytes of a tile; item 1 starts at the fifth record.
            let (codes, scales) = (items(&layout)[4].codes, items(&layout)[4].scales);
            assert_eq!(
                (codes, scales),
                (1824, if coding == ScaleCoding::Paper { 38 } else { 10 * 24 + 4 * 24 })
            );
        }
    }

    #[test]
    fn plain_items_are_all_alike_with_small_scale_codes_for_many_columns() {
        let units = |cols: usize, group_size: usize, coding| {
            let bits = vec![2; cols.div_ceil(group_size)];
            plain_units(coding, &items(&layout(cols, group_size, coding, &bits)))
        };
        let usual = ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 4 };
        assert_eq!([64, 128, 256].map(|group_size| units(512, group_size, usual)), [4, 8, 8]);
        // A last group of 64 columns, one of 96 in all.
        assert_eq!([units(576, 128, usual), units(96, 128, usual)], [0, 0]);
        let others = [
            ScaleCoding::Paper,
            ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 6 },
            ScaleCoding::TwoLevel { sub_group: 16, scale_bits: 4 },
        ];
        assert_eq!(others.map(|coding| units(512, 128, coding)), [0; 3]);
    }

    #[test]
    fn quads_have_one_width_and_end_with_nothing() {
        let coding = ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 4 };
        let quads = quads(&layout(448, 128, coding, &[3, 7, 3, 1]));
        let fields = |quarter: &Quarter| {
            let Quarter { codes, plane_step, scales, .. } = *quarter;
            [codes, plane_step, scales, quarter.col64.into(), quarter.width.into()]
        };
        // A group of 128 columns takes 256 bytes a bit, and four records of 16 bytes.
        let found: Vec<_> = quads.iter().map(fields).collect();
        let end = [0, 0, 0, 7, 0];
        let seven = [[768, 1024, 64, 2, 7], [768 + 512, 768, 96, 3, 7], end, end];
        assert_eq!(found[..4], seven);
        assert_eq!(found[4..6], [[0, 512, 0, 0, 3], [256, 384, 32, 1, 3]]);
        assert_eq!(found[6..8], [[2560, 512, 128, 4, 3], [2816, 384, 160, 5, 3]]);
        assert_eq!(found[8..12], [[3328, 0, 192, 6, 1], end, end, end]);
        assert_eq!(found[12..], [end; 4]);
    }

    #[test]
    fn quads_are_made_of_small_scale_codes_and_whole_quarters() {
        let has_quads = |cols: usize, group_size: usize, coding| {
            let bits = vec![2; cols.div_ceil(group_size)];
            !quads(&layout(cols, group_size, coding, &bits)).is_empty()
        };
        let two_level = |sub_group, scale_bits| ScaleCoding::TwoLevel { sub_group, scale_bits };
        assert_eq!(
            [(32, 4), (64, 4), (16, 4), (32, 6)].map(|(sub_group, scale_bits)| has_quads(
                128,
                64,
                two_level(sub_group, scale_bits)
            )),
            [true, true, false, false]
        );
        assert!(!has_quads(128, 64, ScaleCoding::Paper));
        let usual = two_level(32, 4);
        assert_eq!(
            [(576, 128), (512, 256), (96, 32)]
                .map(|(cols, group_size)| has_quads(cols, group_size, usual)),
            [true, true, false]
        );
        assert!(!has_quads(544, 64, usual) && !has_quads(570, 64, usual));
    }

    #[test]
    fn row_factors_are_row_scales_over_the_unit() {
        let two_level = ScaleCoding::TwoLevel { sub_group: 16, scale_bits: 4 };
        let mut packed = PackedLayer::zeroed(layout(16, 16, two_level, &[2]));
        let (mut d, mut m) = ([f16::ZERO; TILE_ROWS], [f16::ZERO; TILE_ROWS]);
        (d[1], m[1]) = (f16::from_f32(0.375), f16::from_f32(-0.5));
        packed.tiles_mut()[0].set_row_scales(&d, &m);
        let factors = row_factors(packed.view(), &units(packed.view()).unwrap());
        // The unit is 0.5.
        assert_eq!(factors[2..4], [24576.0, 1.0 / 512.0].map(|x| f16::from_f32(x).to_bits()));
        assert_eq!(factors.len(), 2 * TILE_ROWS);
    }

    #[test]
    fn units_keep_operands_in_the_range_of_fp16() {
        let two_level = ScaleCoding::TwoLevel { sub_group: 16, scale_bits: 4 };
        let mut packed = PackedLayer::zeroed(layout(16, 16, two_level, &[2]));
        let (mut d, mut m) = ([f16::ONE; TILE_ROWS], [f16::ONE; TILE_ROWS]);
        (d[0], m[0]) = (f16::ZERO, f16::ZERO);
        (d[1], m[1]) = (f16::ZERO, f16::from_f32(-0.5));
        (d[2], m[2]) = (f16::from_f32(-0.25), f16::ZERO);
        (d[3], m[3]) = (f16::MIN_POSITIVE_SUBNORMAL, f16::from_f32(4.0));
        packed.tiles_mut()[0].set_row_scales(&d, &m);
        let tiny = 4.0 / 1_048_576.0;
        assert_eq!(units(packed.view()).unwrap()[..5], [1.0, 0.5 / 1_048_576.0, 0.25, tiny, 1.0]);

        let mut packed = PackedLayer::zeroed(layout(32, 16, ScaleCoding::Paper, &[2, 1]));
        let [mut scale, mut mean] = [[f16::ZERO; TILE_ROWS]; 2];
        (scale[0], mean[0]) = (f16::from_f32(-3.0), f16::ONE);
        mean[1] = f16::from_f32(4096.0);
        packed.tiles_mut()[0].set_binary(1, &scale, &mean);
        assert_eq!(units(packed.view()).unwrap()[..3], [8.0, 4096.0 / 1_048_576.0, 1.0]);

        mean[9] = f16::NAN;
        packed.tiles_mut()[0].set_binary(1, &scale, &mean);
        let error = units(packed.view()).err().unwrap();
        assert!(matches!(error, KernelError::Unrepresentable { row: 9, .. }), "{error}");
    }

    #[test]
    fn fragments_lie_as_the_kernels_read_them() {
        let (rows, cols) = (18, 80);
        let value = |row: usize, col: usize| (row * cols + col) as f32;
        let bytes: Vec<u8> =
            (0..rows * cols).flat_map(|i| value(i / cols, i % cols).to_le_bytes()).collect();
        let dense = |bytes, layout| DenseTensor {
            dtype: DType::F32,
            rows,
            cols,
            bytes,
            layout,
            scales: None,
        };
        let mut words = vec![0; 2 * STEP_WORDS];
        write_fragments(Weight::Dense(dense(&bytes, Layout::AsStored)), 1, &mut words).unwrap();
        let columns: Vec<u8> =
            (0..rows * cols).flat_map(|i| value(i % rows, i / rows).to_le_bytes()).collect();
        let mut again = vec![0; 2 * STEP_WORDS];
        let transposed = dense(&columns, Layout::Transposed { stride: rows, step: 1 });
        write_fragments(Weight::Dense(transposed), 1, &mut again).unwrap();
        assert_eq!(again, words);
        let pair = |low: f32, high: f32| {
            u32::from(f16::from_f32(low).to_bits()) | u32::from(f16::from_f32(high).to_bits()) << 16
        };
        // Step 0, product 2, lane 1: rows 16 and 17, columns 16 + 8 ...
        let at = (2 * 32 + 1) * 4;
        let expected = [(16, 24), (17, 24), (16, 25), (17, 25)];
        let expected = expected.map(|(row, col)| pair(value(row, col), value(row, col + 2)));
        assert_eq!(words[at..at + 4], expected);
        // Step 1 has 16 columns, the rest is zero; so are rows from 18 on.
        assert_eq!(words[STEP_WORDS], pair(value(16, 64), value(16, 66)));
        assert_eq!(words[STEP_WORDS + 4..STEP_WORDS + 8], [0; 4]);
        assert_eq!(words[16..20], [0; 4]);
    }
}
