//! One token times a weight matrix, straight from the file's bytes. Of packed layers 16 rows are 16
//! lanes, and no sum goes across them; of ggml's blocks the lanes are columns of one row.
//!
//! Where the processor multiplies bytes, the input becomes 8-bit integers first ([`Input`]): a code
//! then costs a fraction of an instruction, and decoding waits for the memory. Elsewhere `portable`
//! and `dense` multiply in f32, and so does `dense` everywhere with weights that are floats.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod batch;
mod blocks;
mod codes;
mod dense;
mod input;
mod kernel;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;
mod panel;
mod portable;
mod tokens;

use std::{borrow::Cow, fmt, mem, sync::LazyLock};

use rayon::prelude::*;
use slim_formats::{
    DenseTensor,
    slim::{Bands, PackedTensor, TILE_ROWS},
};

use self::{
    panel::{Chunk, Panel, Sums},
    tokens::{TokenBlock, Tokens},
};
use super::unpack::{Lanes, UNIT};
use crate::Result;

pub use input::{Input, Rounding};

/// Bytes of a layer in a task. With eight times as many, threads wait for each other: decoding
/// SmolLM2 at 3 bits took half as long again.
const TASK_BYTES: usize = 1 << 15;

/// What an instruction set multiplies bytes with.
#[derive(Clone, Copy)]
pub struct Kernels {
    tiles: TileKernels,
    blocks: BlockKernels,
}

/// Of 16 rows at a time:
#[derive(Clone, Copy)]
struct TileKernels {
    /// the products of a tile with some tokens,
    tile: fn(PackedTensor<'_>, usize, &TokenBlock, &mut [Lanes]),
    /// this many at the most;
    tile_tokens: usize,
    /// those of a strip of a trellis, from its first tile on, with one token;
    strip: fn(PackedTensor<'_>, usize, &Tokens<1>, &mut [Lanes]),
    /// a chunk of a tile, unpacked;
    unpack: fn(PackedTensor<'_>, usize, &Chunk, &mut Panel),
    /// the products of what was unpacked with some tokens, which are added,
    multiply: fn(&Panel, &Chunk, &TokenBlock, &mut [Sums]),
    /// this many at the most;
    tokens: usize,
    /// what their sums come to.
    products: fn(&Panel, &[Sums], &mut [Lanes]),
}

/// Of a tensor in ggml's blocks:
#[derive(Clone, Copy)]
struct BlockKernels {
    /// the products of rows from one on with an input, as many as there is room for;
    products: fn(&DenseTensor<'_>, usize, &Input, &mut [f32]),
    /// a chunk of 16 rows, unpacked.
    unpack: fn(&DenseTensor<'_>, usize, &Chunk, &mut Panel),
}

/// What multiplies.
#[derive(Clone, Copy)]
pub enum Method {
    /// Codes with 8-bit integers, in the instruction set of this name.
    Integer(&'static str, Kernels),
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
        let kernels: [(&'static str, Option<Kernels>); 0] = [];
        let found = kernels.into_iter().filter_map(|(name, kernels)| Some((name, kernels?)));
        found.map(|(name, kernels)| Self::Integer(name, kernels)).chain([Self::Float]).collect()
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
/// [`Method::Integer`]: that of [`Input`], which is 2e-5 of NMSE for values without outliers; the
/// rest as for [`Method::Float`], which sums in f32: over a sub-group (two-level) or group (paper),
/// then over those.
///
/// # Panics
/// If `x` or `out` is not as long as the matrix is wide or high.
pub fn matvec_by<'a>(method: Method, matrix: impl Into<Bands<'a>>, x: &[f32], out: &mut [f32]) {
    let bands = matrix.into();
    let (rows, cols) = bands.shape();
    assert_eq!((x.len(), out.len()), (cols, rows), "inputs and outputs");
    match method {
        Method::Integer(_, kernels) => batch::multiply_one(kernels, bands, x, out),
        Method::Float => {
            let x = in_whole_units(x, cols);
            let sums = portable::column_sums(&x);
            for_tiles(bands, out, |band, tile| portable::tile(band, tile, &x, &sums));
        }
    }
}

/// The tokens `x: [.., cols]` with zeros behind each, which take padding columns (F21) out of every
/// sum.
fn in_whole_units(x: &[f32], cols: usize) -> Cow<'_, [f32]> {
    if cols.is_multiple_of(UNIT) {
        return Cow::Borrowed(x);
    }
    let padding = vec![0.0; cols.next_multiple_of(UNIT) - cols];
    let padded: Vec<f32> = x.chunks(cols).flat_map(|x| x.iter().chain(&padding)).copied().collect();
    Cow::Owned(padded)
}

/// `out[rows]` from a dense matrix times `x[cols]`.
///
/// # Accuracy
/// [`Method::Integer`] with one of ggml's quantized types: as [`matvec_by`]. Otherwise f32 sums
/// over 256 columns, then over those.
///
/// # Errors
/// `UnsupportedType` for element types that hold no weights.
///
/// # Panics
/// If `x` or `out` is not as long as the matrix is wide or high.
pub fn dense_by(
    method: Method,
    matrix: &DenseTensor<'_>,
    x: &[f32],
    out: &mut [f32],
) -> Result<()> {
    assert_eq!((x.len(), out.len()), (matrix.cols, matrix.rows), "inputs and outputs");
    let row_bytes = (matrix.stored_bytes() as usize).div_ceil(matrix.rows.max(1)).max(1);
    let task_rows = TASK_BYTES.div_ceil(row_bytes).next_multiple_of(blocks::ROWS);
    let tasks = out.par_chunks_mut(task_rows).enumerate();
    let in_rows = matrix.layout.stored_row(0).is_some();
    match method {
        Method::Integer(_, kernels) if in_rows && blocks::run(matrix.dtype).is_some() => {
            let input = Input::in_whole_steps(x);
            tasks.for_each(|(task, out)| {
                (kernels.blocks.products)(matrix, task * task_rows, &input, out)
            });
            Ok(())
        }
        _ => tasks.try_for_each(|(task, out)| {
            let first = task * task_rows;
            dense::products(matrix, first..first + out.len(), x, out)
        }),
    }
}

/// Stores the products that `products` gives for each tile of each band, which it is told.
fn for_tiles(
    bands: Bands<'_>,
    mut out: &mut [f32],
    products: impl Fn(PackedTensor<'_>, usize) -> Lanes + Sync,
) {
    let mut tasks = Vec::new();
    for (_, band) in bands.iter() {
        let layout = band.layout();
        let tile_bytes = layout.tile_code_bytes() + layout.tile_scale_bytes();
        let tiles = (TASK_BYTES / tile_bytes).max(1);
        let (mine, below) = mem::take(&mut out).split_at_mut(layout.rows());
        let chunks = mine.chunks_mut(tiles * TILE_ROWS).enumerate();
        tasks.extend(chunks.map(|(task, out)| (band, task * tiles, out)));
        out = below;
    }
    tasks.into_par_iter().for_each(|(band, first, out)| {
        for (i, out) in out.chunks_mut(TILE_ROWS).enumerate() {
            out.copy_from_slice(&products(band, first + i)[..out.len()]);
        }
    });
}
