//! Matrix products of bf16 numbers with f32 sums: in the tile registers of AMX, or with
//! `vdpbf16ps` of AVX-512.
//!
//! For [`Precision::Fine`] each f32 becomes the sum of two bf16 numbers, `upper + lower`, and a
//! product of two values three products of those, all but `lower * lower`; [`Precision::Coarse`]
//! has the upper parts alone.
#![cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(unreachable_code, unused, reason = "elsewhere there is no `Unit`, as the compiler sees")
)]

#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), path = "absent.rs")]
mod amx;
#[cfg_attr(not(target_arch = "x86_64"), path = "absent.rs")]
mod avx512;

use std::{
    mem,
    sync::{Mutex, PoisonError},
};

use bytemuck::{Pod, Zeroable};
use faer::{MatMut, prelude::ReborrowMut};

use super::{Mat, Precision, Store};

/// What multiplies bf16 numbers.
#[derive(Debug, Clone, Copy)]
pub enum Unit {
    Amx(amx::Unit, Precision),
    /// [`Precision::Coarse`] only: three products would take longer than one of f32.
    Avx512(avx512::Unit),
}

impl Unit {
    /// The fastest one of this machine that has this precision.
    pub fn detect(precision: Precision) -> Option<Self> {
        amx::Unit::detect().map(|amx| Self::Amx(amx, precision)).or_else(|| match precision {
            Precision::Fine => None,
            Precision::Coarse => avx512::Unit::detect().map(Self::Avx512),
        })
    }

    /// All of this machine.
    #[cfg(test)]
    pub fn all() -> impl Iterator<Item = Self> {
        let of_amx = |amx| [Precision::Fine, Precision::Coarse].map(|p| Self::Amx(amx, p));
        let avx512 = avx512::Unit::detect().map(Self::Avx512);
        amx::Unit::detect().into_iter().flat_map(of_amx).chain(avx512)
    }

    /// As `slimllm`'s files name it among a processor's instruction sets.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amx(..) => "amx",
            Self::Avx512(_) => "bf16",
        }
    }

    pub fn precision(self) -> Precision {
        match self {
            Self::Amx(_, precision) => precision,
            Self::Avx512(_) => Precision::Coarse,
        }
    }
}

/// Rows of the left factor, and columns of the right one, that are multiplied at a time: what the
/// tile registers hold.
const SIDE: usize = 32;

/// Values along the inner dimension that one instruction of AMX multiplies.
const DEPTH: usize = 32;

/// Lanes of a tile: rows of the left factor, or columns of the right one.
const LANES: usize = 16;

/// Pairs of values along the inner dimension in a tile: as many as lanes.
const PAIRS: usize = DEPTH / 2;

/// Rows of the tiles that hold [`SIDE`] lanes over [`DEPTH`] values: both upper parts, then both
/// lower parts if there are any.
const fn step_rows(precision: Precision) -> usize {
    match precision {
        Precision::Fine => 4 * LANES,
        Precision::Coarse => 2 * LANES,
    }
}

/// One row of a tile.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Row([u32; PAIRS]);

type Tile = [Row; LANES];

/// The product of [`SIDE`] lanes with [`SIDE`] lanes.
#[repr(C, align(64))]
struct Product([[f32; SIDE]; SIDE]);

/// Which factor of a product tiles belong to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Factor {
    /// Its rows are lanes, which lie in rows of a tile.
    Left,
    /// Its columns are lanes, which lie in columns of a tile.
    Right,
}

/// Some rows of a left factor, or columns of a right one, in the order in which the tile registers
/// take them in.
pub struct Tiles {
    unit: Unit,
    memory: Memory,
    /// Multiples of [`DEPTH`] in the inner dimension.
    steps: usize,
}

impl Tiles {
    /// The rows of `lanes`, the inner dimension along its columns.
    pub fn new(unit: Unit, lanes: Mat<'_>, factor: Factor) -> Self {
        let (sides, steps) = (lanes.layout.rows.div_ceil(SIDE), lanes.layout.cols.div_ceil(DEPTH));
        let mut memory = Memory::of(sides * steps * step_rows(unit.precision()));
        match unit.precision() {
            Precision::Fine => pack_fine(lanes, factor, sides, steps, memory.rows_mut()),
            Precision::Coarse => pack_coarse(lanes, factor, sides, steps, memory.rows_mut()),
        }
        Self { unit, memory, steps }
    }

    /// The tiles of lanes `SIDE * side ..`.
    fn side(&self, side: usize) -> &[Row] {
        let len = self.steps * step_rows(self.unit.precision());
        &self.memory.rows()[side * len..][..len]
    }
}

/// `out` from the product of all lanes of `left` with all lanes of `right`; `out` is row-major.
pub fn multiply(left: &Tiles, right: &Tiles, store: Store, out: MatMut<'_, f32>) {
    match left.unit {
        Unit::Amx(amx, precision) => {
            let mut registers = amx.registers(precision);
            multiply_by(left, right, store, out, |l, r, product| registers.multiply(l, r, product));
        }
        Unit::Avx512(unit) => {
            multiply_by(left, right, store, out, |l, r, product| unit.multiply(l, r, product));
        }
    }
}

/// The same, `by` what multiplies one side with one side.
fn multiply_by(
    left: &Tiles,
    right: &Tiles,
    store: Store,
    mut out: MatMut<'_, f32>,
    mut by: impl FnMut(&[Row], &[Row], &mut Product),
) {
    let mut product = Product([[0.0; SIDE]; SIDE]);
    for j in (0..out.ncols()).step_by(SIDE) {
        for i in (0..out.nrows()).step_by(SIDE) {
            by(left.side(i / SIDE), right.side(j / SIDE), &mut product);
            let (rows, cols) = (SIDE.min(out.nrows() - i), SIDE.min(out.ncols() - j));
            store_product(&product, store, out.rb_mut().submatrix_mut(i, j, rows, cols));
        }
    }
}

per_isa! {
    fn store_product(product: &Product, store: Store, out: MatMut<'_, f32>) {
        let cols = out.ncols();
        for (out, product) in out.row_iter_mut().zip(&product.0) {
            let out = out.try_as_row_major_mut().expect("row-major").as_slice_mut();
            store.row(out, &product[..cols]);
        }
    }
}

per_isa! {
    /// Fills all of `rows` for [`Precision::Fine`].
    fn pack_fine(lanes: Mat<'_>, factor: Factor, sides: usize, steps: usize, rows: &mut [Row]) {
        pack(Precision::Fine, lanes, factor, sides, steps, rows);
    }
}

per_isa! {
    /// The same for [`Precision::Coarse`].
    fn pack_coarse(lanes: Mat<'_>, factor: Factor, sides: usize, steps: usize, rows: &mut [Row]) {
        pack(Precision::Coarse, lanes, factor, sides, steps, rows);
    }
}

/// Pairs of values that follow each other along the inner dimension stay together.
#[inline(always)]
fn pack(
    precision: Precision,
    lanes: Mat<'_>,
    factor: Factor,
    sides: usize,
    steps: usize,
    rows: &mut [Row],
) {
    let by_lane = lanes.layout.col_stride == 1;
    let step_rows = step_rows(precision);
    let mut unused = [[Row([0; PAIRS]); LANES]; 2];
    for i in 0..sides * steps {
        // In the order of `lanes`, whatever that is.
        let (side, step) = if by_lane { (i / steps, i % steps) } else { (i % sides, i / sides) };
        let tiles = &mut rows[(side * steps + step) * step_rows..][..step_rows];
        let (upper, lower) = tiles.split_at_mut(2 * LANES);
        let lower = match precision {
            Precision::Fine => lower.as_chunks_mut().0,
            Precision::Coarse => &mut unused,
        };
        let halves = upper.as_chunks_mut().0.iter_mut().zip(lower);
        for (half, (upper, lower)) in halves.enumerate() {
            let first = (side * SIDE + half * LANES, step * DEPTH);
            if by_lane {
                pack_lanes(lanes, first, upper, lower);
            } else {
                pack_columns(lanes, first, upper, lower);
            }
            if by_lane != (factor == Factor::Left) {
                transpose(upper);
                if precision == Precision::Fine {
                    transpose(lower);
                }
            }
        }
    }
}

/// One tile of upper parts and one of lower parts, from lane and inner index `first` on, a lane in
/// each row.
#[inline(always)]
fn pack_lanes(lanes: Mat<'_>, first: (usize, usize), upper: &mut Tile, lower: &mut Tile) {
    let count = lanes.layout.rows.saturating_sub(first.0);
    let depth = DEPTH.min(lanes.layout.cols - first.1);
    for lane in 0..LANES {
        let mut values = [0.0; DEPTH];
        if lane < count {
            values =
                load(&lanes.data[(first.0 + lane) * lanes.layout.row_stride + first.1..], depth);
        }
        let (mut u, mut l) = ([0u16; DEPTH], [0u16; DEPTH]);
        for i in 0..DEPTH {
            let (upper, lower) = split(values[i]);
            (u[i], l[i]) = (upper as u16, lower as u16);
        }
        upper[lane].0 = bytemuck::cast(u);
        lower[lane].0 = bytemuck::cast(l);
    }
}

/// The same with a lane in each column.
#[inline(always)]
fn pack_columns(lanes: Mat<'_>, first: (usize, usize), upper: &mut Tile, lower: &mut Tile) {
    let count = LANES.min(lanes.layout.rows.saturating_sub(first.0));
    let at = |i: usize| -> [f32; LANES] {
        match count > 0 && first.1 + i < lanes.layout.cols {
            true => load(&lanes.data[first.0 + (first.1 + i) * lanes.layout.col_stride..], count),
            false => [0.0; LANES],
        }
    };
    for pair in 0..PAIRS {
        let (a, b) = (at(2 * pair), at(2 * pair + 1));
        for lane in 0..LANES {
            let (a_upper, a_lower) = split(a[lane]);
            let (b_upper, b_lower) = split(b[lane]);
            upper[pair].0[lane] = a_upper | b_upper << 16;
            lower[pair].0[lane] = a_lower | b_lower << 16;
        }
    }
}

/// The first `len` values, and zeros.
#[inline(always)]
fn load<const N: usize>(data: &[f32], len: usize) -> [f32; N] {
    match data.first_chunk() {
        Some(values) if len == N => *values,
        _ => {
            let mut values = [0.0; N];
            values[..len].copy_from_slice(&data[..len]);
            values
        }
    }
}

/// The bits of two bf16 numbers, the nearest one and the nearest one to what is left: 17 of the 24
/// bits of `value`. NaN for what is not finite, or larger than 5e33.
#[inline(always)]
fn split(value: f32) -> (u32, u32) {
    let upper = leading_bits(value);
    let lower = leading_bits(value - upper);
    (upper.to_bits() >> 16, lower.to_bits() >> 16)
}

/// `value` rounded to the 8 bits of a bf16 (Dekker's splitting).
#[inline(always)]
fn leading_bits(value: f32) -> f32 {
    let shifted = value * 65_537.0;
    shifted - (shifted - value)
}

/// Four rounds of a perfect shuffle of all values: each moves the leading bit of an index to its
/// end, so that row and column have changed places. It compiles to vector shuffles, unlike a loop
/// over rows and columns.
#[inline(always)]
fn transpose(tile: &mut Tile) {
    let mut values: [u32; LANES * PAIRS] = bytemuck::cast(*tile);
    for _ in 0..LANES.ilog2() {
        let mut shuffled = [0; LANES * PAIRS];
        for i in 0..LANES * PAIRS / 2 {
            shuffled[2 * i] = values[i];
            shuffled[2 * i + 1] = values[i + LANES * PAIRS / 2];
        }
        values = shuffled;
    }
    *tile = bytemuck::cast(values);
}

/// Memory that goes back to [`SPARE`] when it is dropped.
struct Memory {
    /// At least `len`.
    rows: Vec<Row>,
    len: usize,
}

/// Memory of tiles that are gone, at most [`SPARE_BYTES`], the last ones at the end: new memory
/// costs more than filling it.
static SPARE: Mutex<Vec<Vec<Row>>> = Mutex::new(Vec::new());

const SPARE_BYTES: usize = 64 << 20;

impl Memory {
    /// Rows of any content.
    fn of(len: usize) -> Self {
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = spare.iter().rposition(|rows| rows.len() >= len);
        let fitting = fitting.map(|at| spare.remove(at));
        drop(spare);
        let rows = fitting.unwrap_or_else(|| vec![Row([0; PAIRS]); len]);
        Self { rows, len }
    }

    fn rows(&self) -> &[Row] {
        &self.rows[..self.len]
    }

    fn rows_mut(&mut self) -> &mut [Row] {
        &mut self.rows[..self.len]
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        spare.push(mem::take(&mut self.rows));
        while spare.iter().map(|rows| size_of_val(&rows[..])).sum::<usize>() > SPARE_BYTES {
            spare.remove(0);
        }
    }
}
