//! Which columns form which group, and where each group's bytes start inside a tile.

use std::{fmt, ops::Range};

use super::{
    layout::{TILE_ROWS, UNIT_COLS},
    trellis::{self, STRIP_ROWS},
};

/// Bits per code of a group, 1 to 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitWidth(u8);

impl BitWidth {
    /// `None` unless `1 <= bits <= 8`.
    pub fn new(bits: u8) -> Option<Self> {
        (1..=8).contains(&bits).then_some(Self(bits))
    }

    /// The number of bits.
    #[inline]
    pub fn bits(self) -> u8 {
        self.0
    }

    /// The largest code, `2^bits - 1`.
    pub fn max_code(self) -> u8 {
        u8::MAX >> (8 - self.0)
    }
}

/// What codes stand for, and how scales are stored (sections 4 and 5 of `docs/format.md`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleCoding {
    /// An fp16 scale and an integer zero point per (row, group); fp16 scale and mean for 1-bit
    /// groups.
    Paper,
    /// Scale and minimum codes per (row, sub-group) that multiply an fp16 pair per row.
    TwoLevel {
        /// Columns per sub-group: 16, 32 or 64.
        sub_group: usize,
        /// Bits of a scale code and of a minimum code: 4 or 6.
        scale_bits: u8,
    },
    /// Codes of 32 rows that stand for values together; scale codes of 4 bits per (row, sub-group)
    /// that multiply an fp16 scale per row.
    Trellis {
        /// Columns per sub-group: 16, 32 or 64.
        sub_group: usize,
    },
}

impl ScaleCoding {
    /// The name in commands, metadata and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Paper => "paper",
            Self::TwoLevel { .. } => "two-level",
            Self::Trellis { .. } => "trellis",
        }
    }

    /// Columns per sub-group and bits of a scale code; `None` for the paper coding, which has
    /// neither.
    pub fn sub_groups(self) -> Option<(usize, u8)> {
        match self {
            Self::Paper => None,
            Self::TwoLevel { sub_group, scale_bits } => Some((sub_group, scale_bits)),
            Self::Trellis { sub_group } => Some((sub_group, 4)),
        }
    }

    /// The columns of a group that share one scale record, in order: its sub-groups, or all of them
    /// (paper).
    pub fn runs(self, group: &Range<usize>) -> impl ExactSizeIterator<Item = Range<usize>> + use<> {
        let Range { start, end } = *group;
        let run = self.sub_groups().map_or(group.len(), |(sub_group, _)| sub_group);
        (start..end).step_by(run).map(move |first| first..end.min(first + run))
    }

    /// Rows whose codes belong together: a tile, or the strip of a trellis.
    pub fn strip_rows(self) -> usize {
        match self {
            Self::Paper | Self::TwoLevel { .. } => TILE_ROWS,
            Self::Trellis { .. } => STRIP_ROWS,
        }
    }

    /// Tiles whose codes belong together.
    pub fn strip_tiles(self) -> usize {
        self.strip_rows() / TILE_ROWS
    }
}

/// `two-level, 4-bit codes per 32 columns`.
impl fmt::Display for ScaleCoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self.sub_groups() {
            None => Ok(()),
            Some((sub_group, bits)) => write!(f, ", {bits}-bit codes per {sub_group} columns"),
        }
    }
}

/// One group of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its columns; what is stored beyond those of the layer does not count (F21).
    pub cols: Range<usize>,
    /// Bits per code.
    pub bit_width: BitWidth,
    /// Offset of its codes in a tile, in bytes.
    pub codes_offset: usize,
    /// Offset of its scale records in a tile, in bytes.
    pub scales_offset: usize,
}

impl Group {
    /// Columns that its codes are stored for: whole units (F21).
    #[inline]
    pub fn stored_cols(&self) -> usize {
        self.cols.len().next_multiple_of(UNIT_COLS)
    }

    /// Bytes of its codes in a tile (F10).
    #[inline]
    pub fn code_bytes(&self) -> usize {
        2 * usize::from(self.bit_width.bits()) * self.stored_cols()
    }

    /// Bytes of the floats, scales and means, that its scale records in a tile begin with (F16,
    /// F17).
    pub(super) fn float_scale_bytes(&self, coding: ScaleCoding) -> usize {
        match (coding, self.bit_width.bits()) {
            (ScaleCoding::TwoLevel { .. } | ScaleCoding::Trellis { .. }, _) => 0,
            (ScaleCoding::Paper, 1) => 4 * TILE_ROWS,
            (ScaleCoding::Paper, _) => 2 * TILE_ROWS,
        }
    }

    /// The width of what [`PackedTensor::codes`](super::PackedTensor::codes) gives.
    pub fn code_width(&self, coding: ScaleCoding) -> BitWidth {
        match coding {
            ScaleCoding::Paper | ScaleCoding::TwoLevel { .. } => self.bit_width,
            ScaleCoding::Trellis { .. } => trellis::entry_width(self.bit_width),
        }
    }

    /// [`ScaleCoding::runs`] of its columns.
    pub fn runs(&self, coding: ScaleCoding) -> impl ExactSizeIterator<Item = Range<usize>> + use<> {
        coding.runs(&self.cols)
    }
}

/// The shape of a layer and the place of each of its groups in a tile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerLayout {
    rows: usize,
    cols: usize,
    group_size: usize,
    coding: ScaleCoding,
    groups: Vec<Group>,
    tile_code_bytes: usize,
    tile_scale_bytes: usize,
}

impl LayerLayout {
    /// Lays out a layer, or says which rule its parameters break: (rule, what was found, what was
    /// expected).
    ///
    /// # Errors
    /// F5 for a bad shape, group size or coding; F6 for a wrong number of bit-widths.
    pub fn new(
        rows: usize,
        cols: usize,
        group_size: usize,
        coding: ScaleCoding,
        bit_widths: &[BitWidth],
    ) -> Result<Self, (&'static str, String, &'static str)> {
        // Far above any model; keeps every product below well inside 64 bits.
        const MAX_DIM: usize = 1 << 28;
        if rows == 0 || rows > MAX_DIM {
            return Err(("F5", format!("{rows} rows"), "1 to 2^28 rows"));
        }
        if cols == 0 || cols > MAX_DIM {
            return Err(("F5", format!("{cols} columns"), "1 to 2^28 columns"));
        }
        if group_size == 0 || !group_size.is_multiple_of(UNIT_COLS) {
            return Err((
                "F5",
                format!("group size {group_size}"),
                "a multiple of 16, at least 16",
            ));
        }
        if let Some((sub_group, scale_bits)) = coding.sub_groups()
            && !(matches!(sub_group, 16 | 32 | 64) && matches!(scale_bits, 4 | 6))
        {
            return Err((
                "F5",
                format!("sub-groups of {sub_group} columns with {scale_bits}-bit scale codes"),
                "16, 32 or 64 columns and 4 or 6 bits",
            ));
        }
        if bit_widths.len() != cols.div_ceil(group_size) {
            return Err((
                "F6",
                format!("{} bit-widths", bit_widths.len()),
                "one for each group of columns",
            ));
        }
        let (mut codes_offset, mut scales_offset) = (0, 0);
        let groups = bit_widths
            .iter()
            .enumerate()
            .map(|(index, &bit_width)| {
                let first = index * group_size;
                let cols = first..cols.min(first + group_size);
                let group = Group { cols, bit_width, codes_offset, scales_offset };
                codes_offset += group.code_bytes();
                scales_offset += scale_bytes(coding, &group);
                group
            })
            .collect();
        Ok(Self {
            rows,
            cols,
            group_size,
            coding,
            groups,
            tile_code_bytes: codes_offset,
            tile_scale_bytes: scales_offset,
        })
    }

    /// Output channels.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input channels.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Columns per group; the last group may have fewer.
    pub fn group_size(&self) -> usize {
        self.group_size
    }

    /// The scale coding.
    #[inline]
    pub fn coding(&self) -> ScaleCoding {
        self.coding
    }

    /// The groups in column order.
    #[inline]
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Why a layer of layout `below` cannot be the band below one of this layout (F20): what was
    /// found, what was expected.
    pub(super) fn mismatch_below(&self, below: &Self) -> Option<(String, String)> {
        let kind = |layout: &Self| (layout.cols, layout.group_size, layout.coding);
        if kind(self) != kind(below) {
            let describe = |(cols, group_size, coding)| {
                format!("{cols} columns in groups of {group_size}, {coding:?}")
            };
            return Some((describe(kind(below)), format!("{}, as above", describe(kind(self)))));
        }
        let strip = self.coding.strip_rows();
        let found = || format!("a band of {} rows above it", self.rows);
        (!self.rows.is_multiple_of(strip)).then(|| (found(), format!("a multiple of {strip} rows")))
    }

    /// Tiles of 16 rows, in whole strips; the last ones are padded.
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(self.coding.strip_rows()) * self.coding.strip_tiles()
    }

    /// Bytes of the codes of one tile.
    pub fn tile_code_bytes(&self) -> usize {
        self.tile_code_bytes
    }

    /// Bytes of the scale records of one tile.
    pub fn tile_scale_bytes(&self) -> usize {
        self.tile_scale_bytes
    }

    /// Bytes of the row scales of one tile.
    pub fn tile_row_scale_bytes(&self) -> usize {
        match self.coding {
            ScaleCoding::Paper => 0,
            ScaleCoding::TwoLevel { .. } => 2 * 2 * TILE_ROWS,
            ScaleCoding::Trellis { .. } => 2 * TILE_ROWS,
        }
    }

    /// Whether codes are stored for more columns than there are (F21).
    pub fn has_padding_columns(&self) -> bool {
        !self.cols.is_multiple_of(UNIT_COLS)
    }

    /// Bits that the layer takes in the file, everything counted: codes, scales, row scales,
    /// bit-widths, padding.
    pub fn stored_bits(&self) -> u64 {
        let tile = self.tile_code_bytes + self.tile_scale_bytes + self.tile_row_scale_bytes();
        8 * (self.tiles() * tile + self.groups.len()) as u64
    }
}

/// Bytes of the scale records of `group` in a tile (F14 to F17).
fn scale_bytes(coding: ScaleCoding, group: &Group) -> usize {
    match (coding, group.bit_width.bits()) {
        (ScaleCoding::TwoLevel { scale_bits, .. }, _) => {
            group.runs(coding).len() * two_level_record_bytes(scale_bits)
        }
        (ScaleCoding::Trellis { .. }, _) => group.runs(coding).len() * TRELLIS_RECORD_BYTES,
        (ScaleCoding::Paper, 1) => 4 * TILE_ROWS,
        (ScaleCoding::Paper, bits) => (2 * TILE_ROWS) + 2 * usize::from(bits),
    }
}

/// Bytes of one record of a trellis layer: 4 bits for each row of a tile.
pub(super) const TRELLIS_RECORD_BYTES: usize = TILE_ROWS / 2;

/// Bytes of one two-level record: 16, and 8 more for the high bits of 6-bit codes.
pub(super) fn two_level_record_bytes(scale_bits: u8) -> usize {
    if scale_bits == 6 { 24 } else { 16 }
}
