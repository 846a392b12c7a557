//! Matrix products in the tile registers of AMX, the matrix unit of recent Intel server processors.
//!
//! It multiplies bf16 numbers and adds in f32. For [`Precision::Fine`] each f32 becomes the sum of
//! two bf16 numbers, `upper + lower`, and a product of two values three products of those, all but
//! `lower * lower`; [`Precision::Coarse`] has the upper parts alone.
#![cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(unreachable_code, unused, reason = "elsewhere there is no `Amx`, as the compiler sees")
)]

use std::{
    mem,
    sync::{Mutex, PoisonError},
};

use bytemuck::{Pod, Zeroable};
use faer::{MatMut, prelude::ReborrowMut};

use super::{Mat, Precision, Store};

pub use registers::Amx;

/// Rows of the left factor, and columns of the right one, whose product the tile registers hold.
const SIDE: usize = 32;

/// Values along the inner dimension that one instruction multiplies.
const DEPTH: usize = 32;

/// Lanes of a tile: rows of the left factor, or columns of the right one.
const LANES: usize = 16;

/// Pairs of values along the inner dimension in a tile: as many as lanes.
const PAIRS: usize = DEPTH / 2;

/// Rows of the tiles that hold [`SIDE`] lanes over [`DEPTH`] values: both upper parts, then both
/// lower parts if there are any.
fn step_rows(precision: Precision) -> usize {
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
    amx: Amx,
    precision: Precision,
    memory: Memory,
    /// Multiples of [`DEPTH`] in the inner dimension.
    steps: usize,
}

impl Tiles {
    /// The rows of `lanes`, the inner dimension along its columns.
    pub fn new(amx: Amx, precision: Precision, lanes: Mat<'_>, factor: Factor) -> Self {
        let (sides, steps) = (lanes.layout.rows.div_ceil(SIDE), lanes.layout.cols.div_ceil(DEPTH));
        let mut memory = Memory::of(sides * steps * step_rows(precision));
        match precision {
            Precision::Fine => pack_fine(lanes, factor, sides, steps, memory.rows_mut()),
            Precision::Coarse => pack_coarse(lanes, factor, sides, steps, memory.rows_mut()),
        }
        Self { amx, precision, memory, steps }
    }

    /// The tiles of lanes `SIDE * side ..`.
    fn side(&self, side: usize) -> &[Row] {
        let len = self.steps * step_rows(self.precision);
        &self.memory.rows()[side * len..][..len]
    }
}

/// `out` from the product of all lanes of `left` with all lanes of `right`; `out` is row-major.
pub fn multiply(left: &Tiles, right: &Tiles, store: Store, mut out: MatMut<'_, f32>) {
    let mut registers = left.amx.registers();
    let mut product = Product([[0.0; SIDE]; SIDE]);
    for j in (0..out.ncols()).step_by(SIDE) {
        for i in (0..out.nrows()).step_by(SIDE) {
            let (left_side, right_side) = (left.side(i / SIDE), right.side(j / SIDE));
            registers.multiply(left.precision, left_side, right_side, &mut product);
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

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod registers {
    #![allow(
        unsafe_code,
        reason = "there are no stable intrinsics for AMX: its instructions are written in assembly"
    )]

    use std::{arch::asm, marker::PhantomData};

    use super::{Precision, Product, Row, step_rows};

    /// Says that this processor has AMX, and that the system lets this process use it.
    #[derive(Debug, Clone, Copy)]
    pub struct Amx(());

    /// The tile registers of this thread, ready for use.
    pub struct Registers(PhantomData<*const ()>);

    /// `ldtilecfg`'s operand.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    const _: () = assert!(size_of::<Configuration>() == 64);

    impl Amx {
        /// Asks the processor, and Linux for the tile registers.
        pub fn detect() -> Option<Self> {
            const AMX_BF16: u32 = 1 << 22;
            const AMX_TILE: u32 = 1 << 24;
            const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
            const XFEATURE_XTILEDATA: libc::c_long = 18;
            let features = std::arch::x86_64::__cpuid_count(7, 0).edx;
            if features & AMX_BF16 == 0 || features & AMX_TILE == 0 {
                return None;
            }
            // SAFETY: this request takes a number and touches no memory of the process.
            let refusal = unsafe {
                libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
            };
            (refusal == 0).then_some(Self(()))
        }

        /// Eight tiles of 16 rows of 64 bytes.
        pub fn registers(self) -> Registers {
            let configuration = Configuration {
                palette: 1,
                start_row: 0,
                reserved: [0; 14],
                row_bytes: std::array::from_fn(|tile| if tile < 8 { 64 } else { 0 }),
                rows: std::array::from_fn(|tile| if tile < 8 { 16 } else { 0 }),
            };
            // SAFETY: `self` says that the instruction may be used, and it accepts this operand.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly))
            }
            Registers(PhantomData)
        }
    }

    impl Drop for Registers {
        /// Idle registers need not be saved when the system turns to another thread.
        fn drop(&mut self) {
            // SAFETY: an `Amx` has said that the instruction may be used; the compiler keeps
            // nothing in these registers.
            unsafe { asm!("tilerelease", options(nostack, nomem)) }
        }
    }

    /// Sums in tiles 0 to 3 what each of `steps` adds to them, and stores them as `product`: tile 4
    /// and 5 hold lanes of the left factor, 6 and 7 of the right one.
    macro_rules! sum_products {
        ($left:ident, $right:ident, $steps:ident, $product:ident; $($step:literal,)*) => {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "test {steps}, {steps}",
                "jz 3f",
                "2:",
                $($step,)*
                "dec {steps}",
                "jnz 2b",
                "3:",
                "tilestored [{out} + {out_row}], tmm0",
                "tilestored [{out} + {out_row} + 64], tmm1",
                "tilestored [{out} + {out_row} + 2048], tmm2",
                "tilestored [{out} + {out_row} + 2112], tmm3",
                left = inout(reg) $left.as_ptr() => _,
                right = inout(reg) $right.as_ptr() => _,
                steps = inout(reg) $steps => _,
                row = in(reg) size_of::<Row>(),
                out = in(reg) $product.0.as_mut_ptr(),
                out_row = in(reg) size_of_val(&$product.0[0]),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            )
        };
    }

    impl Registers {
        /// The product of 32 lanes with 32 lanes, both of one precision, over equally many steps.
        pub(super) fn multiply(
            &mut self,
            precision: Precision,
            left: &[Row],
            right: &[Row],
            product: &mut Product,
        ) {
            let step_rows = step_rows(precision);
            assert!(left.len() == right.len() && left.len().is_multiple_of(step_rows));
            let steps = left.len() / step_rows;
            match precision {
                Precision::Fine => self.multiply_fine(left, right, steps, product),
                Precision::Coarse => self.multiply_coarse(left, right, steps, product),
            }
        }

        fn multiply_coarse(
            &mut self,
            left: &[Row],
            right: &[Row],
            steps: usize,
            product: &mut Product,
        ) {
            // As `multiply_fine` without the lower parts. SAFETY: `self` says that the registers
            // are configured. Each step reads 2048 bytes of either slice, which has 32 rows of 64
            // bytes for each (`multiply`); the four sums take the 32 rows of 128 bytes of
            // `product`.
            unsafe {
                sum_products!(left, right, steps, product;
                    "tileloadd tmm6, [{right} + {row}]",
                    "tileloadd tmm4, [{left} + {row}]",
                    "tileloadd tmm7, [{right} + {row} + 1024]",
                    "tileloadd tmm5, [{left} + {row} + 1024]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {left}, 2048",
                    "add {right}, 2048",
                );
            }
        }

        fn multiply_fine(
            &mut self,
            left: &[Row],
            right: &[Row],
            steps: usize,
            product: &mut Product,
        ) {
            // A step has the upper parts of lanes 0 to 15 at byte 0, those of lanes 16 to 31 at
            // 1024, lower parts at 2048 and 3072. SAFETY: `self` says that the registers are
            // configured. Each step reads 4096 bytes of either slice, which has 64 rows of 64 bytes
            // for each (`multiply`); the four sums take the 32 rows of 128 bytes of `product`.
            unsafe {
                sum_products!(left, right, steps, product;
                    "tileloadd tmm6, [{right} + {row}]",
                    "tileloadd tmm7, [{right} + {row} + 1024]",
                    "tileloadd tmm4, [{left} + {row} + 2048]",
                    "tileloadd tmm5, [{left} + {row} + 3072]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm4, [{left} + {row}]",
                    "tileloadd tmm5, [{left} + {row} + 1024]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm6, [{right} + {row} + 2048]",
                    "tileloadd tmm7, [{right} + {row} + 3072]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {left}, 4096",
                    "add {right}, 4096",
                );
            }
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod registers {
    //! What stands in on other processors and systems: nothing that could be called.

    use super::{Precision, Product, Row};

    #[derive(Debug, Clone, Copy)]
    pub enum Amx {}

    pub enum Registers {}

    impl Amx {
        pub fn detect() -> Option<Self> {
            None
        }

        pub fn registers(self) -> Registers {
            match self {}
        }
    }

    impl Registers {
        pub(super) fn multiply(&mut self, _: Precision, _: &[Row], _: &[Row], _: &mut Product) {
            match *self {}
        }
    }
}
