//! Dense linear algebra, row-major f32 in and out: products of bf16 numbers where the processor is
//! fast at them, over `faer` elsewhere.
//!
//! Work is split into pieces of fixed size, so that no result depends on the number of threads.

mod bf16;
mod cholesky;

use std::{borrow::Cow, convert::Infallible, ops::Range, sync::LazyLock};

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul as gemm};
use rayon::prelude::*;

use bf16::{Factor, Tiles, Unit};

pub use cholesky::inverse_cholesky;

/// Columns of a [`Panel`].
pub const PANEL_COLS: usize = 128;

/// Panels that are held at a time.
const PANELS: usize = 32;

/// Multiplications below which a product is one task.
const SMALL: usize = 1 << 20;

/// Values below which a factor is made ready in one task.
const SMALL_FACTOR: usize = 1 << 15;

/// A borrowed matrix.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    layout: Layout,
}

/// Where the values of a matrix lie: those of each row side by side, or those of each column.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl Layout {
    /// `[rows, cols]`, row-major, with rows that lie `stride` apart.
    ///
    /// # Panics
    /// If rows overlap.
    pub fn strided(rows: usize, cols: usize, stride: usize) -> Self {
        assert!(stride >= cols, "rows of {cols} values, {stride} apart");
        Self { rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// That of the transpose.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    /// The matrix whose values lie so in `data`.
    ///
    /// # Panics
    /// If `data` is too short.
    pub fn of(self, data: &[f32]) -> Mat<'_> {
        let Self { rows, cols, row_stride, col_stride } = self;
        let last = |n: usize, stride: usize| (n - 1) * stride;
        let is_empty = rows * cols == 0;
        let needed = if is_empty { 0 } else { last(rows, row_stride) + last(cols, col_stride) + 1 };
        assert!(data.len() >= needed, "{} values for {needed}", data.len());
        Mat { data, layout: self }
    }
}

impl<'a> Mat<'a> {
    /// `data: [rows, cols]`, row-major and contiguous.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows that lie `stride` apart.
    ///
    /// # Panics
    /// If `data` is too short, or rows overlap.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        Layout::strided(rows, cols, stride).of(data)
    }

    /// Its transpose.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self { layout: self.layout.transposed(), ..self }
    }

    /// Some of its rows.
    fn rows(self, rows: Range<usize>) -> Self {
        let Self { data, layout } = self;
        let data = &data[(rows.start * layout.row_stride).min(data.len())..];
        Self { data, layout: Layout { rows: rows.len(), ..layout } }
    }

    /// Some of its columns.
    fn columns(self, cols: Range<usize>) -> Self {
        self.transposed().rows(cols).transposed()
    }

    fn faer(self) -> MatRef<'a, f32> {
        let Self { data, layout: Layout { rows, cols, row_stride, col_stride } } = self;
        match col_stride {
            1 => MatRef::from_row_major_slice_with_stride(data, rows, cols, row_stride),
            _ => self.transposed().faer().transpose(),
        }
    }
}

/// What becomes of a product.
#[derive(Debug, Clone, Copy)]
pub struct Store {
    /// What it is multiplied with.
    pub alpha: f32,
    /// Whether it is added to what was there before.
    pub add: bool,
}

impl Store {
    /// In place of what was there.
    pub const REPLACE: Self = Self { alpha: 1.0, add: false };
    /// Added to it.
    pub const ADD: Self = Self { alpha: 1.0, add: true };

    /// Some values of a row.
    #[inline(always)]
    fn row(self, out: &mut [f32], product: &[f32]) {
        match self.add {
            true => out.iter_mut().zip(product).for_each(|(out, p)| *out += self.alpha * p),
            false => out.iter_mut().zip(product).for_each(|(out, p)| *out = self.alpha * p),
        }
    }
}

/// How much of each value goes into a product where bf16 numbers are multiplied. Elsewhere all of
/// it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// 17 bits.
    Fine,
    /// 8 bits, for a third of the multiplications: enough where calibration samples are summed up,
    /// which differ more from one to the next.
    Coarse,
}

/// What computes the products.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Method {
    Bf16(Unit),
    Faer,
}

impl Method {
    /// All that this machine has.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        Unit::all().map(Self::Bf16).chain([Self::Faer]).collect()
    }

    /// The fastest one of this precision or more; looked for once.
    pub(crate) fn fastest(precision: Precision) -> Self {
        static FINE: LazyLock<Option<Unit>> = LazyLock::new(|| Unit::detect(Precision::Fine));
        static COARSE: LazyLock<Option<Unit>> = LazyLock::new(|| Unit::detect(Precision::Coarse));
        let unit = match precision {
            Precision::Fine => &FINE,
            Precision::Coarse => &COARSE,
        };
        unit.map_or(Self::Faer, Self::Bf16)
    }
}

/// What multiplies bf16 numbers for coarse products on this machine, if anything does.
pub(crate) fn bf16_unit() -> Option<&'static str> {
    match Method::fastest(Precision::Coarse) {
        Method::Bf16(unit) => Some(unit.name()),
        Method::Faer => None,
    }
}

/// `out[m, n]` from `a[m, k] * b[k, n]`; rows of `out` lie `out_stride` apart.
///
/// # Accuracy
/// Sums are f32. Where bf16 numbers are multiplied, a product of two values is off by up to 2^-15
/// of it, by about 2^-18 in root mean square ([`Precision::Coarse`]: 2^-7 and 2^-9); numbers below
/// 1e-35 lose more of their bits, and numbers above 5e33 become NaN, as infinite ones do.
///
/// # Panics
/// If the inner dimensions differ, or if `out` is too short.
pub fn matmul(
    precision: Precision,
    out: &mut [f32],
    out_stride: usize,
    store: Store,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    matmul_by(Method::fastest(precision), out, out_stride, store, a, b);
}

pub(crate) fn matmul_by(
    method: Method,
    out: &mut [f32],
    out_stride: usize,
    store: Store,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    assert_eq!(a.layout.cols, b.layout.rows, "the inner dimension");
    let panel = |cols| Ok::<_, Infallible>(Panel::by(method, b.columns(cols)));
    let Ok(()) = Left::by(method, a).multiply(b.layout.cols, panel, out, out_stride, store);
}

/// Adds `x^T x` to the upper triangle of `h: [n, n]`, for `x: [tokens, n]`. What is below the
/// diagonal is undefined. As accurate as [`matmul`].
pub fn add_gram(precision: Precision, h: &mut [f32], x: &[f32], n: usize) {
    add_gram_by(Method::fastest(precision), h, x, n);
}

pub(crate) fn add_gram_by(method: Method, h: &mut [f32], x: &[f32], n: usize) {
    let x = Mat::new(x, x.len().checked_div(n).unwrap_or(0), n);
    let panel = |cols| Ok::<_, Infallible>(Panel::by(method, x.columns(cols)));
    let is_upper = |rows: &Range<usize>, cols: &Range<usize>| cols.end > rows.start;
    let left = Left::by(method, x.transposed());
    let Ok(()) = left.multiply_pieces(n, panel, h, n, Store::ADD, is_upper);
}

/// Copies the upper triangle of `h: [n, n]` to the lower one.
pub fn mirror_upper(h: &mut [f32], n: usize) {
    // By tiles, of which rows and columns both stay in the first cache.
    const TILE: usize = 32;
    for rows in pieces(0..n, TILE) {
        for cols in pieces(0..rows.end, TILE) {
            for i in rows.clone() {
                for j in cols.start..cols.end.min(i) {
                    h[i * n + j] = h[j * n + i];
                }
            }
        }
    }
}

/// A left factor, made ready once for many right ones.
pub struct Left<'a> {
    matrix: Mat<'a>,
    /// For bf16, [`Left::piece_rows`] rows each; empty otherwise.
    tiles: Vec<Tiles>,
}

/// Some columns of a right factor, `[k, cols]`, made ready.
pub struct Panel<'a>(PanelValues<'a>);

enum PanelValues<'a> {
    Tiles(Tiles),
    /// As they lie.
    Plain(Cow<'a, [f32]>, Layout),
}

impl<'a> Panel<'a> {
    /// Of values that lie as `layout` says.
    pub fn of(precision: Precision, values: Vec<f32>, layout: Layout) -> Self {
        match Panel::by(Method::fastest(precision), layout.of(&values)).0 {
            PanelValues::Tiles(tiles) => Self(PanelValues::Tiles(tiles)),
            PanelValues::Plain(..) => Self(PanelValues::Plain(values.into(), layout)),
        }
    }

    fn by(method: Method, columns: Mat<'a>) -> Self {
        Self(match method {
            Method::Bf16(unit) => {
                PanelValues::Tiles(Tiles::new(unit, columns.transposed(), Factor::Right))
            }
            Method::Faer => PanelValues::Plain(columns.data.into(), columns.layout),
        })
    }
}

impl<'a> Left<'a> {
    /// The factor `a[m, k]`.
    pub fn of(precision: Precision, a: Mat<'a>) -> Self {
        Self::by(Method::fastest(precision), a)
    }

    fn by(method: Method, a: Mat<'a>) -> Self {
        let tiles = match method {
            Method::Bf16(unit) => {
                let piece = |rows| Tiles::new(unit, a.rows(rows), Factor::Left);
                let Layout { rows, cols, .. } = a.layout;
                map(rows * cols >= SMALL_FACTOR, pieces(0..rows, Self::piece_rows(cols)), piece)
            }
            Method::Faer => Vec::new(),
        };
        Self { matrix: a, tiles }
    }

    /// Rows of a piece of the result: as many as stay in the second cache while panels pass by.
    fn piece_rows(k: usize) -> usize {
        const VALUES_IN_L2: usize = 1 << 18;
        (VALUES_IN_L2 / k.max(1) / 32 * 32).clamp(64, 512)
    }

    /// `out[m, n]` from the product with the right factor `[k, n]` that `panel` gives by ranges of
    /// at most [`PANEL_COLS`] columns; rows of `out` lie `out_stride` apart. At most 4,096 columns
    /// are held at a time, as four bytes a value (two if coarse, none if they lie there already).
    ///
    /// # Errors
    /// What `panel` answers.
    ///
    /// # Panics
    /// If `out` is too short.
    pub fn multiply<'p, E: Send>(
        &self,
        n: usize,
        panel: impl Fn(Range<usize>) -> Result<Panel<'p>, E> + Sync,
        out: &mut [f32],
        out_stride: usize,
        store: Store,
    ) -> Result<(), E> {
        self.multiply_pieces(n, panel, out, out_stride, store, |_, _| true)
    }

    /// [`Self::multiply`] for the pieces whose rows and columns `is_wanted` accepts.
    fn multiply_pieces<'p, E: Send>(
        &self,
        n: usize,
        panel: impl Fn(Range<usize>) -> Result<Panel<'p>, E> + Sync,
        out: &mut [f32],
        out_stride: usize,
        store: Store,
        is_wanted: impl Fn(&Range<usize>, &Range<usize>) -> bool,
    ) -> Result<(), E> {
        let Layout { rows: m, cols: k, .. } = self.matrix.layout;
        let needed = if m * n == 0 { 0 } else { (m - 1) * out_stride + n };
        assert!(out_stride >= n && out.len() >= needed, "{} values for {needed}", out.len());
        let is_large = m * n * k >= SMALL;
        let piece_rows = Self::piece_rows(k);
        let rows = pieces(0..m, piece_rows);
        for first in (0..n).step_by(PANELS * PANEL_COLS) {
            let cols = pieces(first..n.min(first + PANELS * PANEL_COLS), PANEL_COLS);
            let panels: Vec<Panel<'_>> =
                map(is_large, cols.clone(), &panel).into_iter().collect::<Result<_, E>>()?;
            let mut tasks = Vec::new();
            for (piece, (rows, out)) in
                rows.iter().zip(out.chunks_mut((piece_rows * out_stride).max(1))).enumerate()
            {
                let mut rest =
                    row_major_mut(out, rows.len(), n, out_stride).split_at_col_mut(first).1;
                for (cols, panel) in cols.iter().zip(&panels) {
                    let (out, others) = rest.split_at_col_mut(cols.len());
                    rest = others;
                    if is_wanted(rows, cols) {
                        tasks.push((piece, rows.clone(), panel, out));
                    }
                }
            }
            map(is_large, tasks, |(piece, rows, panel, out)| {
                self.multiply_piece(piece, rows, panel, out, store);
            });
        }
        Ok(())
    }

    fn multiply_piece(
        &self,
        piece: usize,
        rows: Range<usize>,
        panel: &Panel<'_>,
        out: MatMut<'_, f32>,
        store: Store,
    ) {
        match &panel.0 {
            PanelValues::Tiles(right) => bf16::multiply(&self.tiles[piece], right, store, out),
            PanelValues::Plain(values, layout) => {
                let right = layout.of(values).faer();
                let accumulate = if store.add { Accum::Add } else { Accum::Replace };
                gemm(out, accumulate, self.matrix.rows(rows).faer(), right, store.alpha, Par::Seq);
            }
        }
    }
}

/// `range` in pieces of `len`, the last one shorter.
pub(crate) fn pieces(range: Range<usize>, len: usize) -> Vec<Range<usize>> {
    range.clone().step_by(len).map(|first| first..range.end.min(first + len)).collect()
}

/// `f` of each task, in parallel if that pays.
fn map<T: Send, R: Send>(
    is_large: bool,
    tasks: Vec<T>,
    f: impl Fn(T) -> R + Sync + Send,
) -> Vec<R> {
    match is_large {
        true => tasks.into_par_iter().map(f).collect(),
        false => tasks.into_iter().map(f).collect(),
    }
}

/// Not `MatMut::from_row_major_slice_with_stride_mut`: in faer 0.24.4 it swaps the strides and
/// writes out of bounds.
pub(crate) fn row_major_mut(
    out: &mut [f32],
    rows: usize,
    cols: usize,
    stride: usize,
) -> MatMut<'_, f32> {
    MatMut::from_column_major_slice_with_stride_mut(out, cols, rows, stride).transpose_mut()
}
