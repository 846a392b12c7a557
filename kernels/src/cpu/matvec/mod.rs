//! One token times a packed layer, straight from the file's bytes: 16 rows are 16 lanes, and no sum goes across them.
//!
//! Where the processor multiplies bytes, the input becomes 8-bit integers first ([`Input`]): a code then costs a fraction of an
//! instruction, and decoding waits for the memory. Elsewhere `portable` multiplies in f32.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod input;
mod kernel;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;
mod portable;

use std::{borrow::Cow, fmt, mem, sync::LazyLock};

use rayon::prelude::*;
use slim_formats::slim::{Bands, PackedTensor, TILE_ROWS};

use super::unpack::{Lanes, UNIT};

pub use input::Input;

/// Bytes of a layer in a task. With eight times as many, threads wait for each other: decoding SmolLM2 at 3 bits took half as long again.
const TASK_BYTES: usize = 1 << 15;

/// The products of the 16 rows of a tile with an input.
type TileKernel = fn(PackedTensor<'_>, usize, &Input) -> Lanes;

/// What multiplies.
#[derive(Clone, Copy)]
pub enum Method {
    /// Codes with 8-bit integers, in the instruction set of this name.
    Integer(&'static str, TileKernel),
    /// Codes with the f32 input, in loops that the compiler vectorises.
    Float,
}

impl Method {
    /// All that this machine has, the fastest one first.
    pub fn all() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let kernels = [
            ("AVX-512 VNNI", avx512::detect()),
            ("AVX-VNNI", avx2::detect_vnni()),
            ("AVX2", avx2::detect()),
        ];
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        let kernels = [("NEON", neon::detect())];
        #[cfg(not(any(
            target_arch = "x86_64",
            all(target_arch = "aarch64", target_endian = "little")
        )))]
        let kernels: [(&'static str, Option<TileKernel>); 0] = [];
        let found = kernels.into_iter().filter_map(|(name, kernel)| Some((name, kernel?)));
        found.map(|(name, kernel)| Self::Integer(name, kernel)).chain([Self::Float]).collect()
    }

    /// The fastest one, found out once.
    pub(crate) fn fastest() -> Self {
        static FASTEST: LazyLock<Method> = LazyLock::new(|| Method::all()[0]);
        *FASTEST
    }
}

impl fmt::Debug for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Integer(name, _) => name,
            Self::Float => "f32",
        })
    }
}

/// `out[rows]` from a matrix times `x[cols]`.
///
/// # Accuracy
/// [`Method::Integer`]: that of [`Input`], which is 2e-5 of NMSE for values without outliers; the rest as for [`Method::Float`],
/// which sums in f32: over a sub-group (two-level) or group (paper), then over those.
///
/// # Panics
/// If `x` or `out` is not as long as the matrix is wide or high.
pub fn matvec_by<'a>(method: Method, matrix: impl Into<Bands<'a>>, x: &[f32], out: &mut [f32]) {
    let bands = matrix.into();
    let (rows, cols) = bands.shape();
    assert_eq!((x.len(), out.len()), (cols, rows), "inputs and outputs");
    match method {
        Method::Integer(_, kernel) => {
            // Bands have the same columns in a sub-group or group.
            let input = Input::new(bands.get(0).layout(), x);
            for_each_tile(bands, out, |band, tile| kernel(band, tile, &input));
        }
        Method::Float => {
            let x = in_whole_units(x);
            let sums = portable::column_sums(&x);
            for_each_tile(bands, out, |band, tile| portable::tile(band, tile, &x, &sums));
        }
    }
}

/// `x` with zeros behind it, which take padding columns (F21) out of every sum.
fn in_whole_units(x: &[f32]) -> Cow<'_, [f32]> {
    if x.len().is_multiple_of(UNIT) {
        return Cow::Borrowed(x);
    }
    let mut padded = x.to_vec();
    padded.resize(x.len().next_multiple_of(UNIT), 0.0);
    Cow::Owned(padded)
}

/// Stores the 16 products that `product` gives for each tile of each band.
fn for_each_tile(
    bands: Bands<'_>,
    mut out: &mut [f32],
    product: impl Fn(PackedTensor<'_>, usize) -> Lanes + Sync,
) {
    let mut tasks = Vec::new();
    for (_, band) in bands.iter() {
        let layout = band.layout();
        let bytes = layout.tiles() * (layout.tile_code_bytes() + layout.tile_scale_bytes());
        let tiles = layout.tiles().div_ceil(bytes.div_ceil(TASK_BYTES));
        let (mine, below) = mem::take(&mut out).split_at_mut(layout.rows());
        let chunks = mine.chunks_mut(tiles * TILE_ROWS).enumerate();
        tasks.extend(chunks.map(|(task, out)| (band, task * tiles, out)));
        out = below;
    }
    let multiply = |(band, first, out): &mut (PackedTensor<'_>, usize, &mut [f32])| {
        for (i, out) in out.chunks_mut(TILE_ROWS).enumerate() {
            out.copy_from_slice(&product(*band, *first + i)[..out.len()]);
        }
    };
    match tasks.len() {
        1 => tasks.iter_mut().for_each(multiply),
        _ => tasks.par_iter_mut().for_each(multiply),
    }
}
