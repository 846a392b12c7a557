//! Random numbers and weights: the same on every machine, and filled by all its cores.

use half::{bf16, f16};
use rayon::prelude::*;
use slim_formats::{
    DType, DenseTensor, Layout, Weight,
    slim::{
        Bands, BitWidth, CodeColumn, LayerLayout, PackedLayer, ScaleCoding, TILE_ROWS, TileMut,
    },
};
use slim_runtime::SplitMix64;

/// What most SliM files have.
pub const TWO_LEVEL: ScaleCoding = ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 4 };
pub const TRELLIS: ScaleCoding = ScaleCoding::Trellis { sub_group: 32 };

/// The row of each tile that [`Fill::OutlierRow`] makes large.
pub const OUTLIER_ROW: usize = 3;

/// Numbers that are filled together.
const PIECE: usize = 1 << 16;

/// `len` numbers between `-size` and `size`.
pub fn vector(seed: u64, len: usize, size: f32) -> Vec<f32> {
    let mut values = vec![0.0; len];
    values.par_chunks_mut(PIECE).enumerate().for_each(|(piece, values)| {
        let mut random = Random::new(seed, piece);
        values.iter_mut().for_each(|value| *value = size * random.signed());
    });
    values
}

/// The same, rounded to fp16, so that the kernels' rounding of inputs changes nothing.
pub fn half_vector(seed: u64, len: usize, size: f32) -> Vec<f32> {
    let mut values = vector(seed, len, size);
    values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32());
    values
}

/// The same as bits.
pub fn half_bits(seed: u64, len: usize) -> Vec<u16> {
    vector(seed, len, 1.0).into_par_iter().map(|value| f16::from_f32(value).to_bits()).collect()
}

/// A weight in host memory.
pub enum HostWeight {
    Packed(PackedLayer),
    Bands(Vec<PackedLayer>),
    Dense { dtype: DType, rows: usize, cols: usize, bytes: Vec<u8> },
}

impl HostWeight {
    /// Random numbers up to `size`, of type F32, F16 or BF16.
    pub fn dense(seed: u64, dtype: DType, [rows, cols]: [usize; 2], size: f32) -> Self {
        let values = vector(seed, rows * cols, size);
        let bytes = |to_bytes: fn(f32, &mut [u8]), width: usize| {
            let mut bytes = vec![0; width * values.len()];
            let slots = bytes.par_chunks_exact_mut(width).with_min_len(PIECE);
            slots.zip(&values).for_each(|(slot, &value)| to_bytes(value, slot));
            bytes
        };
        let bytes = match dtype {
            DType::F32 => bytes(|x, slot| slot.copy_from_slice(&x.to_le_bytes()), 4),
            DType::F16 => bytes(|x, slot| slot.copy_from_slice(&f16::from_f32(x).to_le_bytes()), 2),
            DType::BF16 => {
                bytes(|x, slot| slot.copy_from_slice(&bf16::from_f32(x).to_le_bytes()), 2)
            }
            other => unreachable!("no test has dense weights of type {other:?}"),
        };
        Self::Dense { dtype, rows, cols, bytes }
    }

    /// As the kernels take it.
    pub fn view(&self) -> Weight<'_> {
        match self {
            Self::Packed(layer) => Weight::Packed(layer.view()),
            Self::Bands(layers) => Weight::Bands(Bands::new(layers)),
            Self::Dense { dtype, rows, cols, bytes } => Weight::Dense(DenseTensor {
                dtype: *dtype,
                rows: *rows,
                cols: *cols,
                bytes,
                layout: Layout::AsStored,
                scales: None,
            }),
        }
    }
}

/// How the codes and scales of a packed layer are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fill {
    Random,
    /// The largest code and scale everywhere, with minimum and zero point 0.
    Highest,
    /// Code 0 everywhere, with the largest minimum and zero point.
    Lowest,
    /// Random, and one row of each tile 10,000 times larger.
    OutlierRow,
    /// Random, and every second group all zero.
    ZeroGroups,
    /// Random, and the scales of every second row zero.
    ZeroRows,
    /// Random, without factors: `d` is 0.
    NoFactor,
    /// Random, without offsets: `m` is 0.
    NoOffset,
    /// The smallest factor that fp16 has, beside a large offset.
    TinyFactor,
    /// The smallest offset that fp16 has, beside a large factor.
    TinyOffset,
}

/// A packed layer to be made.
#[derive(Debug, Clone)]
pub struct LayerSpec<'a> {
    pub rows: usize,
    pub cols: usize,
    pub group_size: usize,
    pub coding: ScaleCoding,
    /// Bits of the groups, in turn.
    pub widths: &'a [u8],
    /// About how large the weights are.
    pub size: f32,
}

impl LayerSpec<'_> {
    /// A layer of this kind.
    ///
    /// # Panics
    /// If the format has no such layer.
    pub fn fill(&self, seed: u64, fill: Fill) -> HostWeight {
        HostWeight::Packed(self.packed(seed, fill))
    }

    /// Random layers of this kind as the bands of a matrix, with so many rows; each begins with
    /// another width.
    ///
    /// # Panics
    /// As [`Self::fill`].
    pub fn bands(&self, seed: u64, rows: &[usize]) -> HostWeight {
        let band = |(index, &rows): (usize, &usize)| {
            let mut widths = self.widths.to_vec();
            widths.rotate_left(index % self.widths.len());
            LayerSpec { rows, widths: &widths, ..*self }
                .packed(seed + ((index as u64) << 32), Fill::Random)
        };
        HostWeight::Bands(rows.iter().enumerate().map(band).collect())
    }

    fn packed(&self, seed: u64, fill: Fill) -> PackedLayer {
        let groups = self.cols.div_ceil(self.group_size);
        let width = |&bits: &u8| BitWidth::new(bits).expect("1 to 8 bits");
        let widths: Vec<_> = self.widths.iter().map(width).cycle().take(groups).collect();
        let layout = LayerLayout::new(self.rows, self.cols, self.group_size, self.coding, &widths)
            .expect("a layer that the format has");
        let mut layer = PackedLayer::zeroed(layout);
        layer.tiles_mut().into_par_iter().for_each(|mut tile| {
            // A trellis may have a tile behind the last row.
            let used = TILE_ROWS.min(self.rows.saturating_sub(TILE_ROWS * tile.index()));
            let random = Random::new(seed, tile.index());
            TileFiller { random, fill, used, size: self.size }.fill(&mut tile);
        });
        layer
    }
}

struct Random(SplitMix64);

impl Random {
    /// Numbers for piece number `piece` of what `seed` stands for.
    fn new(seed: u64, piece: usize) -> Self {
        Self(SplitMix64::new(seed ^ (piece as u64 + 1).wrapping_mul(0xd134_2543_de82_ef95)))
    }

    /// Between -1 and 1.
    fn signed(&mut self) -> f32 {
        (2.0 * self.0.unit() - 1.0) as f32
    }

    fn up_to(&mut self, max: u8) -> u8 {
        self.0.below(u64::from(max) + 1) as u8
    }
}

const MAX_TRELLIS_SCALE: u8 = 15;

/// Fills the first `used` rows of a tile; the others stay zero, as the format wants it.
struct TileFiller {
    random: Random,
    fill: Fill,
    used: usize,
    size: f32,
}

impl TileFiller {
    fn fill(&mut self, tile: &mut TileMut<'_>) {
        let layout = tile.layout().clone();
        let groups = layout.groups();
        match layout.coding() {
            ScaleCoding::TwoLevel { scale_bits, .. } => {
                let scale_code = f32::from(u8::MAX >> (8 - scale_bits)) / 2.0;
                let widths = groups.iter().map(|group| group.bit_width.max_code());
                let widest = widths.max().unwrap_or(1);
                let d = self.factors(self.size / scale_code / (f32::from(widest) / 2.0));
                let m = self.offsets(self.size / scale_code);
                tile.set_row_scales(&d, &m);
            }
            ScaleCoding::Trellis { .. } => {
                let (scale_code, value) = (f32::from(MAX_TRELLIS_SCALE) / 2.0, 16.0);
                let d = self.factors(self.size / scale_code / value);
                tile.set_row_scales(&d, &[f16::ZERO; TILE_ROWS]);
            }
            ScaleCoding::Paper => {}
        }
        for (index, group) in groups.iter().enumerate() {
            if self.fill == Fill::ZeroGroups && index % 2 == 0 {
                continue;
            }
            let max = group.bit_width.max_code();
            let codes: Vec<_> = group.cols.clone().map(|_| self.codes(max)).collect();
            tile.set_codes(index, &codes);
            match layout.coding() {
                ScaleCoding::TwoLevel { scale_bits, .. } => {
                    let max = u8::MAX >> (8 - scale_bits);
                    for run in 0..group.runs(layout.coding()).len() {
                        tile.set_two_level(index, run, &self.codes(max), &self.minima(max));
                    }
                }
                ScaleCoding::Paper if max == 1 => {
                    tile.set_binary(index, &self.factors(self.size), &self.offsets(self.size));
                }
                ScaleCoding::Paper => {
                    let scales = self.factors(self.size / (f32::from(max) / 2.0));
                    tile.set_affine(index, &scales, &self.minima(max));
                }
                ScaleCoding::Trellis { .. } => {
                    for run in 0..group.runs(layout.coding()).len() {
                        tile.set_trellis_scales(index, run, &self.codes(MAX_TRELLIS_SCALE));
                    }
                }
            }
        }
    }

    /// Codes, or scale codes.
    fn codes(&mut self, max: u8) -> CodeColumn {
        self.rows(|this, _| match this.fill {
            Fill::Highest => max,
            Fill::Lowest => 0,
            _ => this.random.up_to(max),
        })
    }

    /// Minimum codes, or zero points.
    fn minima(&mut self, max: u8) -> CodeColumn {
        self.rows(|this, _| match this.fill {
            Fill::Highest => 0,
            Fill::Lowest => max,
            _ => this.random.up_to(max),
        })
    }

    fn factors(&mut self, size: f32) -> [f16; TILE_ROWS] {
        self.scales(size, |fill| match fill {
            Fill::NoFactor => Some(f16::ZERO),
            Fill::TinyFactor => Some(f16::MIN_POSITIVE_SUBNORMAL),
            Fill::TinyOffset => Some(f16::from_f32(1000.0)),
            _ => None,
        })
    }

    fn offsets(&mut self, size: f32) -> [f16; TILE_ROWS] {
        self.scales(size, |fill| match fill {
            Fill::NoOffset => Some(f16::ZERO),
            Fill::TinyFactor => Some(f16::from_f32(1000.0)),
            Fill::TinyOffset => Some(f16::MIN_POSITIVE_SUBNORMAL),
            _ => None,
        })
    }

    /// Scales up to `size`, unless the fill sets one for this purpose or all.
    fn scales(&mut self, size: f32, set: impl Fn(Fill) -> Option<f16>) -> [f16; TILE_ROWS] {
        self.rows(|this, row| {
            let random = size * this.random.signed();
            set(this.fill).unwrap_or(match this.fill {
                Fill::Highest | Fill::Lowest => f16::MAX,
                Fill::OutlierRow if row == OUTLIER_ROW => f16::from_f32(1e4 * size),
                Fill::ZeroRows if row % 2 == 1 => f16::ZERO,
                _ => f16::from_f32(random),
            })
        })
    }

    fn rows<T: Default>(&mut self, mut value: impl FnMut(&mut Self, usize) -> T) -> [T; TILE_ROWS] {
        std::array::from_fn(|row| if row < self.used { value(self, row) } else { T::default() })
    }
}
