//! The keys and values of a text's tokens so far, in host memory.

use std::ops::Range;

use half::{
    f16,
    slice::{HalfBitsSliceExt, HalfFloatSliceExt},
};

use crate::narrow::in_range_of_f16;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    /// fp16 numbers; beyond their range the largest one.
    F16,
    /// 8-bit codes, and an f32 scale for each head at each position:
    /// `scale = max |number| / 127`, `number = scale * code`.
    Q8,
}

impl KvType {
    /// Bytes of the keys and values of one head at one position.
    pub fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F16 => 2 * 2 * head_dim,
            Self::Q8 => 2 * (head_dim + size_of::<f32>()),
        }
    }
}

/// The keys and values of a block.
///
/// How they are stored is the cache's own affair: whoever reads them gets f32.
#[derive(Clone)]
pub struct KvCache {
    /// The keys.
    pub keys: KvRows,
    /// The values.
    pub values: KvRows,
}

impl KvCache {
    /// Room for `capacity` positions. The system hands out the memory as it is first written.
    pub fn new(kv_type: KvType, kv_heads: usize, capacity: usize, head_dim: usize) -> Self {
        let len = kv_heads * capacity * head_dim;
        let new = || match kv_type {
            KvType::F16 => Stored::F16(vec![0; len]),
            KvType::Q8 => {
                Stored::Q8 { codes: vec![0; len], scales: vec![0.0; kv_heads * capacity] }
            }
        };
        Self::of(new, kv_heads, capacity, head_dim)
    }

    /// [`Self::new`] for f32 numbers, of which nothing is rounded: what models are calibrated with.
    pub fn exact(kv_heads: usize, capacity: usize, head_dim: usize) -> Self {
        let new = || Stored::F32(vec![0.0; kv_heads * capacity * head_dim]);
        Self::of(new, kv_heads, capacity, head_dim)
    }

    fn of(new: impl Fn() -> Stored, heads: usize, capacity: usize, head_dim: usize) -> Self {
        let rows = || KvRows { stored: new(), heads, capacity, head_dim };
        Self { keys: rows(), values: rows() }
    }

    /// Puts `k`, `v: [m, kv_heads, head_dim]` at positions `start ..`.
    ///
    /// # Panics
    /// If there is no room for them.
    pub fn store(&mut self, k: &[f32], v: &[f32], start: usize) {
        self.keys.store(k, start);
        self.values.store(v, start);
    }
}

/// Keys or values: `[kv_heads, capacity, head_dim]`.
#[derive(Clone)]
pub struct KvRows {
    stored: Stored,
    heads: usize,
    capacity: usize,
    head_dim: usize,
}

/// Numbers in the order of [`KvRows`].
#[derive(Clone)]
enum Stored {
    F32(Vec<f32>),
    /// The bits: unlike f16, the allocator knows what zeros of u16 are.
    F16(Vec<u16>),
    Q8 {
        codes: Vec<i8>,
        /// `[kv_heads, capacity]`.
        scales: Vec<f32>,
    },
}

impl KvRows {
    fn store(&mut self, new: &[f32], start: usize) {
        let Self { heads, capacity, head_dim: dim, .. } = *self;
        let m = new.len() / (heads * dim);
        assert!(start + m <= capacity, "{m} positions from {start} in {capacity}");
        let mut clamped = vec![0.0; dim];
        for (i, new) in new.chunks_exact(dim).enumerate() {
            let row = i % heads * capacity + start + i / heads;
            let at = row * dim..(row + 1) * dim;
            match &mut self.stored {
                Stored::F32(rows) => rows[at].copy_from_slice(new),
                Stored::F16(rows) => {
                    clamped.iter_mut().zip(new).for_each(|(to, x)| *to = in_range_of_f16(*x));
                    rows[at].reinterpret_cast_mut::<f16>().convert_from_f32_slice(&clamped);
                }
                Stored::Q8 { codes, scales } => scales[row] = encode(new, &mut codes[at]),
            }
        }
    }

    /// The numbers of a head at some positions, `[positions, head_dim]`: as they lie there, or
    /// converted into `scratch`.
    ///
    /// # Panics
    /// If there is no such head or position.
    pub fn read<'r>(
        &'r self,
        head: usize,
        positions: Range<usize>,
        scratch: &'r mut Vec<f32>,
    ) -> &'r [f32] {
        let Self { heads, capacity, head_dim: dim, .. } = *self;
        assert!(head < heads && positions.end <= capacity, "{positions:?} of head {head}");
        let rows = head * capacity + positions.start..head * capacity + positions.end;
        let at = rows.start * dim..rows.end * dim;
        if let Stored::F32(rows) = &self.stored {
            return &rows[at];
        }
        scratch.resize(at.len(), 0.0);
        match &self.stored {
            Stored::F32(_) => {}
            Stored::F16(halves) => widen(&halves[at], scratch),
            Stored::Q8 { codes, scales } => decode(&codes[at], &scales[rows], scratch),
        }
        scratch
    }
}

/// The codes of a row; gives their scale.
fn encode(row: &[f32], codes: &mut [i8]) -> f32 {
    let largest = row.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    for (code, x) in codes.iter_mut().zip(row) {
        // The quotient first: 127 / largest may be infinite. Of zeros it is NaN, whose code is 0.
        *code = (x / largest * 127.0).round_ties_even() as i8;
    }
    largest / 127.0
}

/// Of f32 over f16: the biases of their exponents differ by 112.
const REBIAS: f32 = (1u128 << 112) as f32;

per_isa! {
    /// The numbers of these bits of f16, none of which is infinite.
    ///
    /// A loop that the compiler vectorises: the conversion of the crate `half` is called for every
    /// eight numbers, and took five times as long.
    fn widen(halves: &[u16], numbers: &mut [f32]) {
        let mut largest = 0;
        for half in halves {
            largest = largest.max(*half & 0x7fff);
        }
        for (number, half) in numbers.iter_mut().zip(halves) {
            // The sign stays in front, exponent and mantissa go to where f32 has them.
            let bits = (i32::from(*half as i16) << 13) as u32 & 0x8fff_e000;
            *number = f32::from_bits(bits) * REBIAS;
        }
        // NaN alone is larger than any number.
        if largest > f16::INFINITY.to_bits() {
            for (number, half) in numbers.iter_mut().zip(halves) {
                *number = f16::from_bits(*half).to_f32();
            }
        }
    }
}

per_isa! {
    /// The numbers of rows of codes, each with its scale.
    fn decode(codes: &[i8], scales: &[f32], numbers: &mut [f32]) {
        let dim = codes.len() / scales.len().max(1);
        let rows = numbers.chunks_exact_mut(dim.max(1)).zip(codes.chunks_exact(dim.max(1)));
        for ((numbers, codes), scale) in rows.zip(scales) {
            for (number, code) in numbers.iter_mut().zip(codes) {
                *number = scale * f32::from(*code);
            }
        }
    }
}
