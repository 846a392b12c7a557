//! The bytes of codes and scales. The only place that knows the order of bits (sections 3 to 5 of
//! `docs/format.md`); fast kernels read the same bytes their own way and are tested against it.

use half::f16;

use super::{
    group::{
        BitWidth, Group, LayerLayout, ScaleCoding, TRELLIS_RECORD_BYTES, two_level_record_bytes,
    },
    trellis::{self, TRELLIS_CENTER, WindowTable},
};

/// Rows per tile.
pub const TILE_ROWS: usize = 16;

/// Columns that codes are stored for at a time: a group is a whole number of these *units* (F21).
pub const UNIT_COLS: usize = 16;

/// One value per row of a tile, for one column.
pub type CodeColumn = [u8; TILE_ROWS];

/// A packed layer, borrowed from a file or from memory. Every length has been checked against
/// `layout`.
#[derive(Clone, Copy)]
pub struct PackedTensor<'a> {
    layout: &'a LayerLayout,
    codes: &'a [u8],
    scales: &'a [u8],
    row_scales: &'a [u8],
}

impl<'a> PackedTensor<'a> {
    /// Joins a layout with its bytes: codes `[tiles, tile_code_bytes]`, scales
    /// `[tiles, tile_scale_bytes]`, row scales f16 `[tiles, 2, 16]` (trellis: `[tiles, 16]`, paper:
    /// empty).
    ///
    /// # Errors
    /// The name of the part whose length is wrong, with the bytes found and expected.
    pub fn new(
        layout: &'a LayerLayout,
        codes: &'a [u8],
        scales: &'a [u8],
        row_scales: &'a [u8],
    ) -> Result<Self, (&'static str, usize, usize)> {
        for (part, bytes, tile_bytes) in [
            ("codes", codes, layout.tile_code_bytes()),
            ("scales", scales, layout.tile_scale_bytes()),
            ("row_scales", row_scales, layout.tile_row_scale_bytes()),
        ] {
            let expected = layout.tiles() * tile_bytes;
            if bytes.len() != expected {
                return Err((part, bytes.len(), expected));
            }
        }
        Ok(Self { layout, codes, scales, row_scales })
    }

    /// Shape, groups and offsets.
    #[inline]
    pub fn layout(&self) -> &'a LayerLayout {
        self.layout
    }

    /// The codes, scales and row scales as they lie in the file.
    pub fn parts(&self) -> (&'a [u8], &'a [u8], &'a [u8]) {
        (self.codes, self.scales, self.row_scales)
    }

    /// A copy in memory.
    pub fn to_layer(&self) -> PackedLayer {
        PackedLayer {
            layout: self.layout.clone(),
            codes: self.codes.to_vec(),
            scales: self.scales.to_vec(),
            row_scales: self.row_scales.to_vec(),
        }
    }

    /// The codes of one tile.
    #[inline]
    pub fn tile_codes(&self, tile: usize) -> &'a [u8] {
        chunk(self.codes, tile, self.layout.tile_code_bytes())
    }

    /// The scale records of one tile.
    #[inline]
    pub fn tile_scales(&self, tile: usize) -> &'a [u8] {
        chunk(self.scales, tile, self.layout.tile_scale_bytes())
    }

    /// The row scales of one tile; empty for the paper coding.
    #[inline]
    pub fn tile_row_scales(&self, tile: usize) -> &'a [u8] {
        chunk(self.row_scales, tile, self.layout.tile_row_scale_bytes())
    }

    /// The row scales `(d, m)` of the 16 rows of a tile: `d` twice for a trellis, ones for the
    /// paper coding, which has none.
    pub fn row_scales(&self, tile: usize) -> ([f32; TILE_ROWS], [f32; TILE_ROWS]) {
        let bytes = self.tile_row_scales(tile);
        match self.layout.coding() {
            ScaleCoding::Paper => ([1.0; TILE_ROWS], [1.0; TILE_ROWS]),
            ScaleCoding::TwoLevel { .. } => (f16_row(bytes), f16_row(&bytes[2 * TILE_ROWS..])),
            ScaleCoding::Trellis { .. } => (f16_row(bytes), f16_row(bytes)),
        }
    }

    /// The codes of `group` in a tile, for a trellis the entries that they stand for: `columns` has
    /// one for each of its columns, or for each stored one, and is overwritten.
    ///
    /// # Panics
    /// If `columns` has another length.
    pub fn codes(&self, tile: usize, group: &Group, columns: &mut [CodeColumn]) {
        self.stored_codes(tile, group, columns);
        if let ScaleCoding::Trellis { .. } = self.layout.coding() {
            let mut others = vec![[0; TILE_ROWS]; columns.len()];
            self.stored_codes(tile ^ 1, group, &mut others);
            let table = WindowTable::of(group.bit_width).entries();
            for (column, other) in columns.iter_mut().zip(&others) {
                let half = tile % 2;
                let tiles = if half == 0 { [&*column, other] } else { [other, &*column] };
                *column = trellis::entries(tiles, group.bit_width, &table)[half];
            }
        }
    }

    /// The codes of `group` in a tile as they are stored.
    pub(super) fn stored_codes(&self, tile: usize, group: &Group, columns: &mut [CodeColumn]) {
        let bytes = &self.tile_codes(tile)[group.codes_offset..][..group.code_bytes()];
        unpack_codes(bytes, group.bit_width, columns);
    }

    /// Factor and offset of each row of `tile` for one run of columns, before the row scales: a
    /// weight is `(d * factor) * code + m * offset`, each product rounded to f32.
    ///
    /// A run is sub-group `run` of the group (two-level: factor and offset are the integers `s` and
    /// `-z`; trellis: `s`, or half of it for 8 bits, and `-64 s`), or the whole group (paper; `run`
    /// is 0).
    #[inline]
    pub fn scales(
        &self,
        tile: usize,
        group: &Group,
        run: usize,
    ) -> ([f32; TILE_ROWS], [f32; TILE_ROWS]) {
        let records = &self.tile_scales(tile)[group.scales_offset..];
        match self.layout.coding() {
            ScaleCoding::TwoLevel { scale_bits, .. } => {
                let bytes = two_level_record_bytes(scale_bits);
                let (s, z) = two_level_codes(&records[run * bytes..][..bytes]);
                (s.map(f32::from), z.map(|z| -f32::from(z)))
            }
            ScaleCoding::Trellis { .. } => {
                let record = &records[run * TRELLIS_RECORD_BYTES..][..TRELLIS_RECORD_BYTES];
                let s: [f32; TILE_ROWS] =
                    std::array::from_fn(|r| f32::from(record[r % 8] >> (4 * (r / 8)) & 15));
                let step = trellis::value_step(group.bit_width);
                (s.map(|s| step * s), s.map(|s| -f32::from(TRELLIS_CENTER) * s))
            }
            ScaleCoding::Paper => paper_scales(records, group.bit_width),
        }
    }
}

impl PackedTensor<'_> {
    /// The zero points of a group; zeros where none are stored (two-level coding, 1-bit groups).
    pub(super) fn zero_points(&self, tile: usize, group: &Group) -> CodeColumn {
        if self.layout.coding() != ScaleCoding::Paper || group.bit_width.bits() == 1 {
            return [0; TILE_ROWS];
        }
        let after_scales = group.scales_offset + 2 * TILE_ROWS;
        zero_points(&self.tile_scales(tile)[after_scales..], group.bit_width)
    }
}

#[inline]
fn chunk(bytes: &[u8], index: usize, size: usize) -> &[u8] {
    &bytes[index * size..][..size]
}

fn f16_row(bytes: &[u8]) -> [f32; TILE_ROWS] {
    std::array::from_fn(|r| f16::from_le_bytes([bytes[2 * r], bytes[2 * r + 1]]).to_f32())
}

/// The scale codes and minimum codes of a record (F14, F15).
#[inline]
fn two_level_codes(record: &[u8]) -> (CodeColumn, CodeColumn) {
    let (low, high) = record.split_at(TILE_ROWS);
    let mut s: CodeColumn = std::array::from_fn(|r| low[r] & 15);
    let mut z: CodeColumn = std::array::from_fn(|r| low[r] >> 4);
    if high.len() == TILE_ROWS / 2 {
        for r in 0..TILE_ROWS {
            let high = high[r % 8] >> (4 * (r / 8));
            s[r] |= (high & 3) << 4;
            z[r] |= (high >> 2 & 3) << 4;
        }
    }
    (s, z)
}

/// Factor and offset of a paper record (F16, F17).
fn paper_scales(record: &[u8], width: BitWidth) -> ([f32; TILE_ROWS], [f32; TILE_ROWS]) {
    let (scale, rest) = record.split_at(2 * TILE_ROWS);
    let scale = f16_row(scale);
    if width.bits() == 1 {
        let mean = f16_row(rest);
        (scale.map(|s| 2.0 * s), std::array::from_fn(|r| mean[r] - scale[r]))
    } else {
        let zero = zero_points(rest, width);
        (scale, std::array::from_fn(|r| -(scale[r] * f32::from(zero[r]))))
    }
}

/// The zero points of a paper record (F16).
fn zero_points(bytes: &[u8], width: BitWidth) -> CodeColumn {
    std::array::from_fn(|r| {
        let bit = r * usize::from(width.bits());
        let word =
            u16::from(bytes[bit / 8]) | u16::from(*bytes.get(bit / 8 + 1).unwrap_or(&0)) << 8;
        (word >> (bit % 8)) as u8 & width.max_code()
    })
}

/// The planes of a width as `(bits of the plane, lowest bit of the code it holds)` (F11).
pub fn planes(width: BitWidth) -> impl Iterator<Item = (usize, usize)> {
    let width = usize::from(width.bits());
    let mut low = 0;
    [8, 4, 2, 1].into_iter().filter(move |plane| width & plane != 0).map(move |plane| {
        let start = low;
        low += plane;
        (plane, start)
    })
}

/// Where column `col` of a group with `stored` columns lies in a plane of `bits`:
/// `(byte of row 0, bytes from row to row, shift)` (F12, F13).
fn place(bits: usize, stored: usize, col: usize) -> (usize, usize, usize) {
    let block_cols = 32 / bits;
    let (block, j) = (col / block_cols, col % block_cols);
    let short = stored - block * block_cols < block_cols;
    if short {
        (64 * block + j % 4 / 2, 2, 4 * (j % 2) + j / 4)
    } else {
        (64 * block + j % 4, 4, bits * (j / 4))
    }
}

/// Unpacks the codes of one group of a tile, a column at a time.
fn unpack_codes(bytes: &[u8], width: BitWidth, columns: &mut [CodeColumn]) {
    let stored = columns.len().next_multiple_of(UNIT_COLS);
    columns.fill([0; TILE_ROWS]);
    let mut start = 0;
    for (bits, low) in planes(width) {
        let mask = u8::MAX >> (8 - bits);
        for (col, column) in columns.iter_mut().enumerate() {
            let (first, stride, shift) = place(bits, stored, col);
            for (r, code) in column.iter_mut().enumerate() {
                *code |= (bytes[start + first + stride * r] >> shift & mask) << low;
            }
        }
        start += 2 * bits * stored;
    }
}

/// Packs what [`unpack_codes`] unpacks, over what was there; columns that are only stored get zeros
/// (F21).
fn pack_codes(columns: &[CodeColumn], width: BitWidth, bytes: &mut [u8]) {
    bytes.fill(0);
    let stored = columns.len().next_multiple_of(UNIT_COLS);
    let mut start = 0;
    for (bits, low) in planes(width) {
        let mask = u8::MAX >> (8 - bits);
        for (col, column) in columns.iter().enumerate() {
            let (first, stride, shift) = place(bits, stored, col);
            for (r, code) in column.iter().enumerate() {
                bytes[start + first + stride * r] |= (code >> low & mask) << shift;
            }
        }
        start += 2 * bits * stored;
    }
}

/// A packed layer in memory, filled tile by tile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedLayer {
    layout: LayerLayout,
    codes: Vec<u8>,
    scales: Vec<u8>,
    row_scales: Vec<u8>,
}

impl PackedLayer {
    /// A layer of zeros.
    pub fn zeroed(layout: LayerLayout) -> Self {
        let tiles = layout.tiles();
        Self {
            codes: vec![0; tiles * layout.tile_code_bytes()],
            scales: vec![0; tiles * layout.tile_scale_bytes()],
            row_scales: vec![0; tiles * layout.tile_row_scale_bytes()],
            layout,
        }
    }

    /// The layer as kernels take it.
    pub fn view(&self) -> PackedTensor<'_> {
        PackedTensor {
            layout: &self.layout,
            codes: &self.codes,
            scales: &self.scales,
            row_scales: &self.row_scales,
        }
    }

    /// Shape, groups and offsets.
    pub fn layout(&self) -> &LayerLayout {
        &self.layout
    }

    /// The codes, scales and row scales as they lie in the file.
    pub fn parts(&self) -> (&[u8], &[u8], &[u8]) {
        (&self.codes, &self.scales, &self.row_scales)
    }

    /// The tiles, to be filled in any order.
    pub fn tiles_mut(&mut self) -> Vec<TileMut<'_>> {
        let layout = &self.layout;
        let mut codes = self.codes.chunks_exact_mut(layout.tile_code_bytes());
        let mut scales = self.scales.chunks_exact_mut(layout.tile_scale_bytes());
        let mut row_scales = self.row_scales.chunks_exact_mut(layout.tile_row_scale_bytes().max(1));
        (0..layout.tiles())
            .map(|index| TileMut {
                layout,
                index,
                codes: codes.next().unwrap_or_default(),
                scales: scales.next().unwrap_or_default(),
                row_scales: row_scales.next().unwrap_or_default(),
            })
            .collect()
    }
}

/// One tile of a [`PackedLayer`] being filled. The caller leaves padding rows at zero (F8).
pub struct TileMut<'a> {
    layout: &'a LayerLayout,
    index: usize,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
    row_scales: &'a mut [u8],
}

impl TileMut<'_> {
    /// The layout of the layer.
    pub fn layout(&self) -> &LayerLayout {
        self.layout
    }

    /// The number of this tile: its first row is `16 * index`.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Stores the codes of a group, one entry per column.
    pub fn set_codes(&mut self, group: usize, columns: &[CodeColumn]) {
        let group = &self.layout.groups()[group];
        assert_eq!(columns.len(), group.cols.len(), "one entry per column of the group");
        let bytes = &mut self.codes[group.codes_offset..][..group.code_bytes()];
        pack_codes(columns, group.bit_width, bytes);
    }

    /// Stores scale codes and minimum codes of sub-group `sub_group` of `group` (two-level coding).
    pub fn set_two_level(
        &mut self,
        group: usize,
        sub_group: usize,
        s: &CodeColumn,
        z: &CodeColumn,
    ) {
        let ScaleCoding::TwoLevel { scale_bits, .. } = self.layout.coding() else {
            panic!("two-level scales for a layer in the paper coding");
        };
        let bytes = two_level_record_bytes(scale_bits);
        let offset = self.layout.groups()[group].scales_offset + sub_group * bytes;
        let record = &mut self.scales[offset..][..bytes];
        record.fill(0);
        for r in 0..TILE_ROWS {
            record[r] = s[r] & 15 | z[r] << 4;
            if scale_bits == 6 {
                record[TILE_ROWS + r % 8] |= (s[r] >> 4 | z[r] >> 4 << 2) << (4 * (r / 8));
            }
        }
    }

    /// Stores scale codes of sub-group `sub_group` of `group` (trellis).
    pub fn set_trellis_scales(&mut self, group: usize, sub_group: usize, s: &CodeColumn) {
        let offset = self.layout.groups()[group].scales_offset + sub_group * TRELLIS_RECORD_BYTES;
        let record = &mut self.scales[offset..][..TRELLIS_RECORD_BYTES];
        for (r, byte) in record.iter_mut().enumerate() {
            *byte = s[r] & 15 | s[r + 8] << 4;
        }
    }

    /// Stores `d` and `m` of the 16 rows (a trellis has no `m`).
    pub fn set_row_scales(&mut self, d: &[f16; TILE_ROWS], m: &[f16; TILE_ROWS]) {
        store_f16(d.iter().chain(m), self.row_scales);
    }

    /// Stores scales and zero points of a group of 2 bits or more (paper coding).
    pub fn set_affine(&mut self, group: usize, scale: &[f16; TILE_ROWS], zero_point: &CodeColumn) {
        let group = &self.layout.groups()[group];
        let width = usize::from(group.bit_width.bits());
        let record = &mut self.scales[group.scales_offset..][..2 * TILE_ROWS + 2 * width];
        let (scales, zeros) = record.split_at_mut(2 * TILE_ROWS);
        store_f16(scale.iter(), scales);
        for (r, &zero) in zero_point.iter().enumerate() {
            let bit = r * width;
            let word = u16::from(zero) << (bit % 8);
            zeros[bit / 8] |= word as u8;
            if word > 0xff {
                zeros[bit / 8 + 1] |= (word >> 8) as u8;
            }
        }
    }

    /// Stores scales and means of a 1-bit group (paper coding).
    pub fn set_binary(&mut self, group: usize, scale: &[f16; TILE_ROWS], mean: &[f16; TILE_ROWS]) {
        let offset = self.layout.groups()[group].scales_offset;
        store_f16(scale.iter().chain(mean), &mut self.scales[offset..][..4 * TILE_ROWS]);
    }
}

fn store_f16<'a>(values: impl Iterator<Item = &'a f16>, bytes: &mut [u8]) {
    for (value, slot) in values.zip(bytes.chunks_exact_mut(2)) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
}
