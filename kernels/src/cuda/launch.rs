//! Every kernel, launched: what it needs of its arguments is checked here, and nowhere else.
#![allow(unsafe_code, reason = "the driver cannot check what a kernel does with its arguments")]

use std::{f32::consts::LOG2_E, ffi::c_void, ptr, sync::Arc};

use slim_formats::arch::Activation;

use super::{
    Attention, Device, KvCache, Matrix, Operands, Rotation, Scores, Tokens, TopK, View, ViewMut,
    arguments::{
        BandArgs, DenseArgs, EmbedArgs, GemmArgs, Kind, KvCacheArgs, MATVEC_BANDS, MatmulArgs,
        MatvecArgs, Mode, NormArgs, PackedArgs, RotationArgs, ScoresArgs, TrellisArgs,
    },
    check_equal, check_limit,
    device::{Kernel, shared},
    driver::{self, LaunchShape, address, refused},
    matrix::{Band, StorageKind},
};
use crate::{KernelError, KvType, Result};

/// Calls a method, which is generic in it, for a kind of storage.
macro_rules! call_of_kind {
    ($kind:expr, $device:ident.$method:ident($($argument:expr),*)) => {
        match $kind {
            StorageKind::Packed => $device.$method::<PackedArgs>($($argument),*),
            StorageKind::Trellis => $device.$method::<TrellisArgs>($($argument),*),
            StorageKind::Dense => $device.$method::<DenseArgs>($($argument),*),
        }
    };
}

mod experts; // behind the macro that it uses

/// Tokens of a product that one launch of `matvec_*` takes.
const MATVEC_TOKENS: usize = 8;
/// Rows (in tiles) and tokens of a block of `matmul_*`.
const MATMUL_TILES: usize = 8;
const MATMUL_TOKENS: usize = 128;
/// Sets of four warps of a block of `matmul_*`.
const MATMUL_SETS: u32 = 2;
/// Numbers of a block of `activate` and `finish_logits`.
const ELEMENTS: usize = 256;
/// Heads of a block of `rope_store_*`.
const ROPE_WARPS: usize = 4;
/// Queries of a block of `attention_prefill_*`, those of all heads that share a kv head counted.
const PREFILL_ROWS: usize = 64;
const GEMM_TILE: usize = 128;

/// How vectors are normed.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// `[channels]`.
    pub weight: View<'a, f32>,
    /// `[channels]` of LayerNorm; without one it is a root mean square norm.
    pub bias: Option<View<'a, f32>>,
    /// Added to the mean square.
    pub epsilon: f32,
}

/// What the products that follow take in.
pub struct Next<'a> {
    /// How sums are normed for them; `None` if they are taken as they are.
    pub norm: Option<Norm<'a>>,
    /// [m, channels], overwritten.
    pub out: &'a mut Operands,
}

/// `activation(gate) * up`, or `activation(up)` without a gate.
#[derive(Clone, Copy)]
pub struct Neurons<'a> {
    /// What opens and closes neurons.
    pub gate: Option<&'a Matrix>,
    /// What they take in, of as many rows.
    pub up: &'a Matrix,
    /// What makes them nonlinear.
    pub activation: Activation,
}

/// A matrix in f32 whose rows and columns lie any number of floats apart.
#[derive(Clone, Copy)]
pub struct Strided<'a> {
    /// Where it lies, from its first value on.
    pub values: View<'a, f32>,
    /// Its rows.
    pub rows: usize,
    /// Its columns.
    pub cols: usize,
    /// Floats from one row to the next.
    pub row_stride: usize,
    /// Floats from one column to the next.
    pub col_stride: usize,
}

impl<'a> Strided<'a> {
    /// A row-major matrix without gaps.
    pub fn new(values: View<'a, f32>, rows: usize, cols: usize) -> Self {
        Self { values, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Rows as columns.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self {
            values: self.values,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    fn check(self, what: &'static str) -> Result<()> {
        match (self.rows.checked_sub(1), self.cols.checked_sub(1)) {
            (Some(row), Some(col)) => {
                let last = row
                    .saturating_mul(self.row_stride)
                    .saturating_add(col.saturating_mul(self.col_stride));
                check_room(what, self.values, last.saturating_add(1))
            }
            _ => Ok(()),
        }
    }
}

impl Device {
    /// `out[i][m, rows] = x[m, cols] * w[i]^T + bias[i]`; one launch for up to 32 bands of matrices
    /// of a kind and up to eight tokens.
    ///
    /// # Errors
    /// `ShapeMismatch` if the numbers of matrices and outputs, `x` or an output do not fit;
    /// `Driver`.
    pub fn matmul(
        &self,
        w: &[&Matrix],
        x: &Operands,
        m: usize,
        out: &mut [ViewMut<'_, f32>],
    ) -> Result<()> {
        check_equal("outputs", out.len(), w.len())?;
        for (w, out) in w.iter().zip(out.iter()) {
            check_input(w, x, m)?;
            check_room("outputs", out.as_view(), m * w.rows())?;
        }
        let mut products: Vec<_> = w.iter().copied().zip(out).collect();
        for kind in StorageKind::ALL {
            let (of_kind, others) = products.into_iter().partition(|(w, _)| w.kind() == kind);
            products = others;
            call_of_kind!(kind, self.store(of_kind, x, m))?;
        }
        Ok(())
    }

    /// `out[m, rows] += scale * (x[m, cols] * w^T + bias)`, and what follows.
    ///
    /// # Errors
    /// `ShapeMismatch` if `x`, `out` or what follows do not fit, or if norms do not take so many
    /// rows; `Driver`.
    ///
    /// # Panics
    /// If `out` or a vector of the norm does not start on a 16-byte boundary.
    pub fn matmul_add(
        &self,
        w: &Matrix,
        x: &Operands,
        m: usize,
        scale: f32,
        out: &mut ViewMut<'_, f32>,
        next: Option<Next<'_>>,
    ) -> Result<()> {
        check_input(w, x, m)?;
        check_room("outputs", out.as_view(), m * w.rows())?;
        if let Some(next) = &next {
            next.check(w.rows(), m)?;
        }
        call_of_kind!(w.kind(), self.add(w, x, m, scale, out, next))
    }

    /// The neurons of inputs `x`, `[m, rows]`. Products pass through `scratch: [m, rows]` each,
    /// unless they can stay in registers.
    ///
    /// # Errors
    /// `ShapeMismatch` if the arguments do not fit each other; `Driver`.
    pub fn matmul_activate(
        &self,
        neurons: Neurons<'_>,
        x: &Operands,
        m: usize,
        [gate_out, up_out]: [&mut ViewMut<'_, f32>; 2],
        out: &mut Operands,
    ) -> Result<()> {
        let Neurons { gate, up, activation } = neurons;
        check_input(up, x, m)?;
        check_operands(out, up.rows(), m)?;
        if let Some(gate) = gate {
            check_equal("rows of the matrices", up.rows(), gate.rows())?;
            check_input(gate, x, m)?;
        }
        if m <= MATVEC_TOKENS && neurons.are_alike() {
            return call_of_kind!(up.kind(), self.neurons_of(neurons, x, m, out));
        }
        let n = up.rows();
        match gate {
            None => {
                self.matmul(&[up], x, m, &mut [up_out.reborrow()])?;
                self.activate(activation, up_out.as_view(), None, n, m, out)
            }
            Some(gate) => {
                self.matmul(&[gate, up], x, m, &mut [gate_out.reborrow(), up_out.reborrow()])?;
                self.activate(activation, gate_out.as_view(), Some(up_out.as_view()), n, m, out)
            }
        }
    }

    /// The neurons that matrices of kind `K`, which are alike, make of up to eight tokens.
    fn neurons_of<K: Kind>(
        &self,
        neurons: Neurons<'_>,
        x: &Operands,
        m: usize,
        out: &mut Operands,
    ) -> Result<()> {
        let Neurons { gate, up, activation } = neurons;
        let bands: Vec<_> =
            gate.into_iter().chain([up]).flat_map(|w| self.bands::<K>(w, 0)).collect();
        self.matvec(&bands, x, m, Target::Neurons { has_gate: gate.is_some(), activation, out })
    }

    /// Adds the product with a matrix of kind `K`.
    fn add<K: Kind>(
        &self,
        w: &Matrix,
        x: &Operands,
        m: usize,
        scale: f32,
        out: &mut ViewMut<'_, f32>,
        next: Option<Next<'_>>,
    ) -> Result<()> {
        if m <= MATVEC_TOKENS {
            let bands = self.bands::<K>(w, self.vector_input(out.as_view()));
            return self.matvec(&bands, x, m, Target::Add { scale, next });
        }
        self.multiply_many::<K>(w, x, m, Target::Add { scale, next: None }, out)?;
        match next {
            Some(next) => self.norm(out.as_view(), m, next),
            None => Ok(()),
        }
    }

    /// Stores the products with matrices of one kind.
    fn store<K: Kind>(
        &self,
        products: Vec<(&Matrix, &mut ViewMut<'_, f32>)>,
        x: &Operands,
        m: usize,
    ) -> Result<()> {
        if m > MATVEC_TOKENS {
            let multiply = |(w, out)| self.multiply_many::<K>(w, x, m, Target::Store, out);
            return products.into_iter().try_for_each(multiply);
        }
        let bands = products.into_iter().flat_map(|(w, out)| self.bands::<K>(w, self.output(out)));
        let bands: Vec<_> = bands.collect();
        bands.chunks(MATVEC_BANDS).try_for_each(|bands| self.matvec(bands, x, m, Target::Store))
    }

    /// The bands of a matrix of kind `K`, whose product goes to `out`.
    fn bands<K: Kind>(&self, w: &Matrix, out: u64) -> Vec<BandArgs<K>> {
        let args = |band: &Band| BandArgs {
            w: K::of(self, band),
            out,
            bias: w.bias.as_ref().map_or(0, |bias| self.input(bias.view())),
            first_row: band.first_row as u32,
            matrix_rows: w.rows() as u32,
        };
        w.bands.iter().map(args).collect()
    }

    /// What lets one token be multiplied with the codes of the bands as they are: all of them must
    /// take that, and their rings must find room.
    fn ring<K: Kind>(&self, bands: &[BandArgs<K>], cols: usize, m: usize) -> Option<Ring> {
        let of_band = bands.iter().map(|band| band.w.quad_bytes());
        let quad_bytes = of_band.collect::<Option<Vec<_>>>()?.into_iter().max()?;
        let ring =
            |depth| Ring { quad_bytes, depth, shared: shared::raw(cols as u32, quad_bytes, depth) };
        // Room for two blocks of a multiprocessor is worth more than deep rings.
        let fits = |blocks, ring: &Ring| m == 1 && blocks * ring.shared <= self.shared_memory;
        let rings = || self.ring_depths.iter().copied().map(ring);
        rings().find(|ring| fits(2, ring)).or_else(|| rings().rfind(|ring| fits(1, ring)))
    }

    /// Up to eight tokens with bands of one kind. All shapes have been checked.
    fn matvec<K: Kind>(
        &self,
        bands: &[BandArgs<K>],
        x: &Operands,
        m: usize,
        target: Target<'_>,
    ) -> Result<()> {
        if m == 0 {
            return Ok(());
        }
        let in_grid = match target {
            Target::Neurons { has_gate: true, .. } => &bands[..bands.len() / 2],
            _ => bands,
        };
        let strips = in_grid.iter().map(|band| band.w.strips()).sum();
        let ring = self.ring(bands, x.cols(), m);
        let mut args = MatvecArgs {
            band: filled(bands),
            x: self.input(x.values.view()),
            x_stride: x.stride() as u32,
            m: m as u32,
            bands: bands.len() as u32,
            mode: target.mode() as u32,
            operands: 0,
            operand_stride: 0,
            activation: 0,
            norm: NormArgs::default(),
            normed: 0,
            normed_stride: 0,
            scale: target.scale(),
            counter: self.counter(),
            quad_bytes: ring.as_ref().map_or(0, |ring| ring.quad_bytes),
            depth: ring.as_ref().map_or(0, |ring| ring.depth),
        };
        match target {
            Target::Store | Target::Add { next: None, .. } => {}
            Target::Add { next: Some(Next { norm, out }), .. } => {
                args.norm = self.norm_args(norm);
                args.normed_stride = out.stride() as u32;
                args.normed = self.output(&mut out.values.view_mut());
            }
            Target::Neurons { activation, out, .. } => {
                args.activation = code_of(activation)?;
                args.operand_stride = out.stride() as u32;
                args.operands = self.output(&mut out.values.view_mut());
            }
        }
        let (kernel, shared) = match &ring {
            Some(ring) => (&self.kernels.matvec_raw, ring.shared),
            None => (K::matvec(self), 0),
        };
        // SAFETY: `matvec_*(Matvec args)`. band: one to 32 of the kernel's kind, as `Matrix` lays
        // them out, their `out` m rows of their matrix, whose rows they are (neurons: no `out`,
        // with gates as many of the one matrix as of the other, of the same rows), their `bias` a
        // value for each of its rows; x: m <= 8 rows of their columns, padded; operands, normed: m
        // rows of their rows; norm: of as many channels; counter: zero. The callers have checked
        // the shapes. `matvec_raw`: the same, of packed bands, with a quad at least each, and m 1.
        unsafe { self.launch(kernel, [strips, 1, 1], 256, shared, &mut [argument(&args)]) }
    }

    /// Any number of tokens with one matrix. All shapes have been checked.
    fn multiply_many<K: Kind>(
        &self,
        w: &Matrix,
        x: &Operands,
        m: usize,
        target: Target<'_>,
        out: &mut ViewMut<'_, f32>,
    ) -> Result<()> {
        let bands = self.bands::<K>(w, self.output(out));
        let blocks = bands.iter().map(|band| band.w.tiles().div_ceil(MATMUL_TILES)).sum();
        let item_bytes = bands.iter().map(|band| band.w.matmul_item_bytes()).max().unwrap_or(0);
        let fits = |stages| shared::matmul(item_bytes, stages) <= self.shared_memory;
        let stages = [2 * MATMUL_SETS, MATMUL_SETS].into_iter().find(|&stages| fits(stages));
        let stages = stages.unwrap_or(1);
        let args = MatmulArgs {
            band: filled(&bands),
            x: self.input(x.values.view()),
            x_stride: x.stride() as u32,
            m: m as u32,
            mode: target.mode() as u32,
            stages,
            bands: bands.len() as u32,
            scale: target.scale(),
        };
        let grid = [blocks, m.div_ceil(MATMUL_TOKENS), 1];
        let shared = shared::matmul(item_bytes, stages);
        // SAFETY: `matmul_*(Matmul args)`. band: one to 16 of the kernel's kind, all of `w`, as
        // `Matrix` lays them out, their `out` m rows of it, their `bias` a value for each of its
        // rows; x: m rows of its columns, padded. The callers have checked the shapes.
        unsafe {
            self.launch(K::matmul(self), grid, MATMUL_SETS * 128, shared, &mut [argument(&args)])
        }
    }

    /// What the products that follow take of m tokens; `x: [m, channels]`.
    ///
    /// # Errors
    /// `ShapeMismatch` if the arguments do not fit each other, or if channels are no multiple of 4;
    /// `Driver`.
    ///
    /// # Panics
    /// If `x` or a vector of the norm does not start on a 16-byte boundary.
    pub fn norm(&self, x: View<'_, f32>, m: usize, next: Next<'_>) -> Result<()> {
        let n = next.out.cols();
        next.check(n, m)?;
        check_room("inputs", x, m * n)?;
        let Next { norm, out } = next;
        let (x, norm, channels) = (self.vector_input(x), self.norm_args(norm), n as u32);
        let (stride, out) = (out.stride() as u32, self.output(&mut out.values.view_mut()));
        let args = &mut [
            argument(&x),
            argument(&norm),
            argument(&channels),
            argument(&out),
            argument(&stride),
        ];
        // SAFETY: `norm_rows(x, norm, n, out, stride)`. x: m rows of n; norm: of n channels; out: m
        // rows of n, `stride` apart.
        unsafe { self.launch(&self.kernels.norm_rows, [m, 1, 1], 256, 0, args) }
    }

    /// `x[t] += scale * norm(y[t])` for m tokens, `[m, channels]` each, and what follows.
    ///
    /// # Errors
    /// As [`Self::norm`].
    ///
    /// # Panics
    /// As [`Self::norm`].
    pub fn norm_add(
        &self,
        y: View<'_, f32>,
        norm: Norm<'_>,
        scale: f32,
        x: &mut ViewMut<'_, f32>,
        m: usize,
        next: Option<Next<'_>>,
    ) -> Result<()> {
        check_room("inputs", y, m * norm.weight.len())?;
        self.norm_into(self.vector_input(y), norm, Some(scale), x, m, next)
    }

    /// `x[t] = norm(x[t])` for m tokens, `[m, channels]`.
    ///
    /// # Errors
    /// As [`Self::norm`].
    ///
    /// # Panics
    /// As [`Self::norm`].
    pub fn norm_in_place(&self, x: &mut ViewMut<'_, f32>, norm: Norm<'_>, m: usize) -> Result<()> {
        self.norm_into(self.vector_input(x.as_view()), norm, None, x, m, None)
    }

    /// The norm of `y`, which has been checked: times `added` added to `x`, or else in its place.
    fn norm_into(
        &self,
        y: u64,
        norm: Norm<'_>,
        added: Option<f32>,
        x: &mut ViewMut<'_, f32>,
        m: usize,
        next: Option<Next<'_>>,
    ) -> Result<()> {
        let n = norm.weight.len();
        check_equal("channels", n, n.next_multiple_of(4))?;
        norm.check(n)?;
        check_room("sums", x.as_view(), m * n)?;
        let (scale, is_added) = (added.unwrap_or(1.0), u32::from(added.is_some()));
        let (mut next_norm, mut out, mut stride) = (NormArgs::default(), 0, 0);
        if let Some(next) = next {
            next.check(n, m)?;
            next_norm = self.norm_args(next.norm);
            stride = next.out.stride() as u32;
            out = self.output(&mut next.out.values.view_mut());
        }
        let (norm, n) = (self.norm_args(Some(norm)), n as u32);
        let x = self.vector_input(x.as_view());
        let args = &mut [
            argument(&y),
            argument(&norm),
            argument(&scale),
            argument(&is_added),
            argument(&x),
            argument(&n),
            argument(&next_norm),
            argument(&out),
            argument(&stride),
        ];
        // SAFETY: `norm_add(y, norm, scale, is_added, x, n, next, out, stride)`. y, x: m rows of n;
        // norm, next: of n channels; out: null, or m rows of n, `stride` apart.
        unsafe { self.launch(&self.kernels.norm_add, [m, 1, 1], 256, 0, args) }
    }

    /// What kernels take of a norm, which has been checked.
    fn norm_args(&self, norm: Option<Norm<'_>>) -> NormArgs {
        let Some(Norm { weight, bias, epsilon }) = norm else { return NormArgs::default() };
        let bias = bias.map_or(0, |bias| self.vector_input(bias));
        NormArgs { weight: self.vector_input(weight), bias, epsilon, unused: 0 }
    }

    /// `out = activation(gate) * up`, or `activation(gate)` without `up`; all `[m, n]`.
    ///
    /// # Errors
    /// `ShapeMismatch` if the arguments do not fit each other; `Driver`.
    pub fn activate(
        &self,
        activation: Activation,
        gate: View<'_, f32>,
        up: Option<View<'_, f32>>,
        n: usize,
        m: usize,
        out: &mut Operands,
    ) -> Result<()> {
        for inputs in [Some(gate), up].into_iter().flatten() {
            check_room("inputs of neurons", inputs, m * n)?;
        }
        check_operands(out, n, m)?;
        let (gate, up) = (self.input(gate), up.map_or(0, |up| self.input(up)));
        let (activation, stride) = (code_of(activation)?, out.stride() as u32);
        let (out, width) = (self.output(&mut out.values.view_mut()), n as u32);
        let args = &mut [
            argument(&gate),
            argument(&up),
            argument(&width),
            argument(&activation),
            argument(&out),
            argument(&stride),
        ];
        // SAFETY: `activate(gate, up, n, activation, out, stride)`. gate, and up if it is not null:
        // m rows of n; out: m rows of n, `stride` apart.
        unsafe { self.launch(&self.kernels.activate, [n.div_ceil(ELEMENTS), m, 1], 256, 0, args) }
    }

    /// `logits = scale * logits`, then `c * tanh(logits / c)` if they are capped at c.
    ///
    /// # Errors
    /// `TooLarge` for 2^31 logits or more; `Driver`.
    pub fn finish_logits(
        &self,
        logits: &mut ViewMut<'_, f32>,
        scale: f32,
        softcap: Option<f32>,
    ) -> Result<()> {
        let n = logits.as_view().len();
        check_limit("logits", n, i32::MAX as usize)?;
        let (logits, count, cap) = (self.output(logits), n as u32, softcap.unwrap_or(0.0));
        let args = &mut [argument(&logits), argument(&count), argument(&scale), argument(&cap)];
        // SAFETY: `finish_logits(x, n, scale, c)`. x: n.
        unsafe {
            self.launch(&self.kernels.finish_logits, [n.div_ceil(ELEMENTS), 1, 1], 256, 0, args)
        }
    }

    /// Norms and rotates `q: [m, heads, head_dim]` in place by the positions of its tokens, and
    /// stores keys (treated likewise) and values `[m, kv_heads, head_dim]` in the cache.
    ///
    /// # Errors
    /// `ShapeMismatch` if the arguments do not fit each other; `TooLarge` for positions that the
    /// cache has not; `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`], for more than one token.
    pub fn rope_store(
        &self,
        attention: &Attention,
        q: &mut ViewMut<'_, f32>,
        [k, v]: [View<'_, f32>; 2],
        rotation: Rotation<'_>,
        tokens: Tokens<'_>,
        cache: &mut KvCache,
    ) -> Result<()> {
        self.check_tokens(attention, cache, tokens)?;
        let (m, heads, kv_heads) = (tokens.m, attention.heads, cache.kv_heads);
        check_room("queries", q.as_view(), m * heads * cache.head_dim)?;
        for (what, x) in [("keys", k), ("values", v)] {
            check_room(what, x, m * kv_heads * cache.head_dim)?;
        }
        let rotation = self.rotation(rotation, tokens, cache)?;
        let (q, k, v) = (self.output(q), self.input(k), self.input(v));
        let position = self.input(tokens.position.buffer.view());
        let (width, args) = (heads as u32, self.cache(cache));
        let kernel = match cache.kv_type {
            KvType::F16 => &self.kernels.rope_store_f16,
            KvType::Q8 => &self.kernels.rope_store_q8,
        };
        let grid = [(heads + 2 * kv_heads).div_ceil(ROPE_WARPS), m, 1];
        let args = &mut [
            argument(&q),
            argument(&k),
            argument(&v),
            argument(&position),
            argument(&width),
            argument(&args),
            argument(&rotation),
        ];
        // SAFETY: `rope_store_*(q, k, v, position, heads, cache, rotation)`. q: m rows of all
        // heads; k, v: m rows of the cache's heads; cache: of the kernel's type, with m positions
        // from `position` on (`check_tokens`); rotation: angles up to the last position that
        // `position` can hold, of at most half a head, and norms of a head (`rotation`).
        unsafe { self.launch(kernel, grid, ROPE_WARPS as u32 * 32, 0, args) }
    }

    /// What `rope_store_*` takes of a rotation.
    fn rotation(
        &self,
        rotation: Rotation<'_>,
        tokens: Tokens<'_>,
        cache: &KvCache,
    ) -> Result<RotationArgs> {
        let mut args = RotationArgs {
            cos: 0,
            sin: 0,
            q_norm: 0,
            k_norm: 0,
            pairs: 0,
            epsilon: 0.0,
            beta: 0.0,
            context: 1,
        };
        if let Some(tables) = rotation.tables {
            check_equal("channels of the angles", tables.head_dim, cache.head_dim)?;
            check_limit("pairs of a head", tables.pairs, cache.head_dim / 2)?;
            check_limit("positions", tokens.position.capacity(), tables.positions())?;
            (args.cos, args.sin) = (self.input(tables.cos.view()), self.input(tables.sin.view()));
            args.pairs = tables.pairs as u32;
        }
        if let Some(norms) = rotation.norms {
            for weight in norms.weights {
                check_equal("weights of the norm of a head", weight.len(), cache.head_dim)?;
            }
            [args.q_norm, args.k_norm] = norms.weights.map(|weight| self.input(weight));
            args.epsilon = norms.epsilon;
        }
        if let Some(scaling) = rotation.query_scaling {
            check_limit("tokens of the scale of queries", scaling.context, u32::MAX as usize)?;
            (args.beta, args.context) = (scaling.beta, scaling.context.max(1) as u32);
        }
        Ok(args)
    }

    /// Causal attention of `q: [m, heads, head_dim]` over the cache, which holds the positions of
    /// all tokens.
    ///
    /// # Errors
    /// `ShapeMismatch` if the arguments do not fit each other; `TooLarge` for positions that the
    /// cache has not; `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`], for more than one token.
    pub fn attention(
        &self,
        attention: &mut Attention,
        q: View<'_, f32>,
        scores: Scores,
        cache: &KvCache,
        tokens: Tokens<'_>,
        out: &mut Operands,
    ) -> Result<()> {
        self.check_tokens(attention, cache, tokens)?;
        let (m, width) = (tokens.m, attention.heads * attention.head_dim);
        check_room("queries", q, m * width)?;
        check_operands(out, width, m)?;
        match m {
            1 => self.attention_decode(attention, q, scores, cache, tokens, out),
            _ => self.attention_prefill(attention, q, scores, cache, tokens, out),
        }
    }

    fn attention_decode(
        &self,
        attention: &mut Attention,
        q: View<'_, f32>,
        scores: Scores,
        cache: &KvCache,
        tokens: Tokens<'_>,
        out: &mut Operands,
    ) -> Result<()> {
        let (q, position) = (self.vector_input(q), self.input(tokens.position.buffer.view()));
        let (args, heads) = (self.cache(cache), attention.heads as u32);
        let scores = scores_args(scores, cache);
        let partial = self.output(&mut attention.partial.view_mut());
        let counters = self.output(&mut attention.counters.view_mut());
        let out = self.output(&mut out.values.view_mut());
        let kernel = match cache.kv_type {
            KvType::F16 => &self.kernels.attention_decode_f16,
            KvType::Q8 => &self.kernels.attention_decode_q8,
        };
        let grid = [attention.kv_heads, attention.splits, attention.head_groups()];
        let args = &mut [
            argument(&q),
            argument(&args),
            argument(&position),
            argument(&heads),
            argument(&scores),
            argument(&partial),
            argument(&counters),
            argument(&out),
        ];
        // SAFETY: `attention_decode_*(q, cache, position, heads, scores, partial, counters, out)`.
        // q, out: one row of all heads; cache: of the kernel's type, with the position
        // (`check_tokens`); partial, counters: as large as the grid asks for (`Attention::new`),
        // the counters zero.
        unsafe { self.launch(kernel, grid, 128, 0, args) }
    }

    fn attention_prefill(
        &self,
        attention: &Attention,
        q: View<'_, f32>,
        scores: Scores,
        cache: &KvCache,
        tokens: Tokens<'_>,
        out: &mut Operands,
    ) -> Result<()> {
        let (q, position) = (self.vector_input(q), self.input(tokens.position.buffer.view()));
        let (args, heads) = (self.cache(cache), attention.heads as u32);
        let scores = scores_args(scores, cache);
        let (m, stride) = (tokens.m as u32, out.stride() as u32);
        let out = self.output(&mut out.values.view_mut());
        let kernel = match cache.kv_type {
            KvType::F16 => &self.kernels.attention_prefill_f16,
            KvType::Q8 => &self.kernels.attention_prefill_q8,
        };
        let rows = tokens.m * (attention.heads / attention.kv_heads);
        let grid = [rows.div_ceil(PREFILL_ROWS), attention.kv_heads, 1];
        let shared = shared::prefill(attention.head_dim as u32);
        let args = &mut [
            argument(&q),
            argument(&args),
            argument(&position),
            argument(&m),
            argument(&heads),
            argument(&scores),
            argument(&out),
            argument(&stride),
        ];
        // SAFETY: `attention_prefill_*(q, cache, position, m, heads, scores, out, stride)`. q: m
        // rows of all heads; out: the same, `stride` apart; cache: of the kernel's type, with m
        // positions from `position` on (`check_tokens`).
        unsafe { self.launch(kernel, grid, 128, shared, args) }
    }

    /// Whether the positions of the tokens are in a cache that `attention` is made for, now and
    /// when a graph is launched again.
    fn check_tokens(
        &self,
        attention: &Attention,
        cache: &KvCache,
        tokens: Tokens<'_>,
    ) -> Result<()> {
        let Tokens { position, m } = tokens;
        check_equal("kv heads of the cache", cache.kv_heads, attention.kv_heads)?;
        check_equal("channels of a head", cache.head_dim, attention.head_dim)?;
        check_limit("positions", position.capacity(), cache.capacity)?;
        check_limit("positions", position.value().saturating_add(m), position.capacity())?;
        assert!(
            m == 1 || !self.is_capturing(),
            "a graph of several tokens, which may be launched at any position"
        );
        Ok(())
    }

    fn cache(&self, cache: &KvCache) -> KvCacheArgs {
        KvCacheArgs {
            keys: self.input(cache.keys.view()),
            values: self.input(cache.values.view()),
            key_scales: self.input(cache.key_scales.view()),
            value_scales: self.input(cache.value_scales.view()),
            capacity: cache.capacity as u32,
            kv_heads: cache.kv_heads as u32,
            head_dim: cache.head_dim as u32,
            unused: 0,
        }
    }

    /// `x[t] = scale * w[tokens[t]]`, `[m, cols]`, for the m = `tokens.len()` tokens; NaN for a
    /// token that `w` has no row for.
    ///
    /// # Errors
    /// `ShapeMismatch` if `x` does not fit; `TooLarge` for more than 65535 tokens; `Driver`.
    pub fn embed(
        &self,
        w: &Matrix,
        tokens: View<'_, u32>,
        scale: f32,
        x: &mut ViewMut<'_, f32>,
    ) -> Result<()> {
        let m = tokens.len();
        check_room("outputs", x.as_view(), m * w.cols())?;
        let rows = Rows { tokens: self.input(tokens), position: 0, first: 0, scale };
        call_of_kind!(w.kind(), self.embed_rows(w, rows, x, m))
    }

    /// `x[t] += w[first + position]`, `[m, cols]`, for the positions of m tokens; NaN for one that
    /// `w` has no row for.
    ///
    /// # Errors
    /// As [`Self::embed`]; `TooLarge` for rows beyond 2^32.
    pub fn embed_positions(
        &self,
        w: &Matrix,
        Tokens { position, m }: Tokens<'_>,
        first: usize,
        x: &mut ViewMut<'_, f32>,
    ) -> Result<()> {
        check_room("outputs", x.as_view(), m * w.cols())?;
        check_limit("rows", first.saturating_add(position.capacity()), u32::MAX as usize)?;
        let position = self.input(position.buffer.view());
        let rows = Rows { tokens: 0, position, first: first as u32, scale: 1.0 };
        call_of_kind!(w.kind(), self.embed_rows(w, rows, x, m))
    }

    /// `m` rows of a matrix of kind `K`. All shapes have been checked.
    fn embed_rows<K: Kind>(
        &self,
        w: &Matrix,
        rows: Rows,
        x: &mut ViewMut<'_, f32>,
        m: usize,
    ) -> Result<()> {
        let bands = self.bands::<K>(w, self.output(x));
        let blocks = bands.iter().map(|band| band.w.embed_blocks()).max().unwrap_or(0);
        let args = EmbedArgs {
            band: filled(&bands),
            tokens: rows.tokens,
            position: rows.position,
            first: rows.first,
            bands: bands.len() as u32,
            scale: rows.scale,
            unused: 0,
        };
        // SAFETY: `embed_*(Embed args)`. band: one to 16 of the kernel's kind, all of `w`, as
        // `Matrix` lays them out, their `out` m rows of its columns; tokens: m, or null and
        // position one; a row is looked up if `w` has it.
        unsafe { self.launch(K::embed(self), [blocks, m, 1], 128, 0, &mut [argument(&args)]) }
    }

    /// The `k` largest of `logits`, where [`TopK::read`] finds them.
    ///
    /// # Errors
    /// `TooLarge` for more than 2^26 logits; `Driver`.
    pub fn top_k(&self, logits: View<'_, f32>, out: &mut TopK) -> Result<()> {
        check_limit("logits", logits.len(), TopK::MAX_LOGITS)?;
        let (n, k) = (logits.len() as u32, out.k() as u32);
        let blocks = TopK::blocks(logits.len());
        let logits = self.input(logits);
        let partial = self.output(&mut out.partial.view_mut());
        let counter = self.counter();
        let tokens = self.output(&mut out.tokens.view_mut());
        let values = self.output(&mut out.values.view_mut());
        let args = &mut [
            argument(&logits),
            argument(&n),
            argument(&k),
            argument(&partial),
            argument(&counter),
            argument(&tokens),
            argument(&values),
        ];
        // SAFETY: `top_k(logits, n, k, partial, counter, tokens, values)`. logits: n; partial: k
        // for each of `blocks`, at most as many as `TopK` has room for; counter: zero; tokens,
        // values: k. k is 1 to 128 (`TopK::new`).
        unsafe { self.launch(&self.kernels.top_k, [blocks, 1, 1], 1024, 0, args) }
    }

    /// `c[i, j] = beta * c[i, j] + alpha * sum over l of a[i, l] * b[j, l]`; rows of
    /// `c: [a.rows, b.rows]` lie `c_row` floats apart. `c` is not read if `beta` is 0.
    ///
    /// # Errors
    /// `ShapeMismatch` if the arguments do not fit each other; `TooLarge` for more than 2^32 rows
    /// or columns; `Driver`.
    pub fn gemm(
        &self,
        alpha: f32,
        a: Strided<'_>,
        b: Strided<'_>,
        beta: f32,
        c: &mut ViewMut<'_, f32>,
        c_row: usize,
    ) -> Result<()> {
        let (m, n, k) = (a.rows, b.rows, a.cols);
        check_equal("columns of b", b.cols, k)?;
        a.check("values of a")?;
        b.check("values of b")?;
        Strided { values: c.as_view(), rows: m, cols: n, row_stride: c_row, col_stride: 1 }
            .check("values of c")?;
        if c_row < n {
            return Err(KernelError::ShapeMismatch {
                what: "floats of a row of c",
                found: c_row,
                expected: n,
            });
        }
        for (what, size) in [("rows of a", m), ("rows of b", n), ("columns of a", k)] {
            check_limit(what, size, u32::MAX as usize)?;
        }
        let args = GemmArgs {
            a: self.input(a.values),
            b: self.input(b.values),
            c: self.output(c),
            a_row: a.row_stride as u64,
            a_col: a.col_stride as u64,
            b_row: b.row_stride as u64,
            b_col: b.col_stride as u64,
            c_row: c_row as u64,
            m: m as u32,
            n: n as u32,
            k: k as u32,
            alpha,
            beta,
            unused: 0,
        };
        let grid = [n.div_ceil(GEMM_TILE), m.div_ceil(GEMM_TILE), 1];
        // SAFETY: `gemm_f32(GemmArgs args)`. a: [m, k], b: [n, k], c: [m, n], all inside their
        // views (checked above), c apart from the others (borrowed mutably).
        unsafe { self.launch(&self.kernels.gemm_f32, grid, 256, 0, &mut [argument(&args)]) }
    }
}

impl Norm<'_> {
    /// Whether it is one of `n` channels.
    fn check(&self, n: usize) -> Result<()> {
        let vectors = [Some(self.weight), self.bias];
        let mut vectors = vectors.into_iter().flatten();
        vectors.try_for_each(|vector| check_equal("weights of the norm", vector.len(), n))
    }
}

impl Next<'_> {
    /// Whether it is for m vectors of `n` channels, and norms take so many.
    fn check(&self, n: usize, m: usize) -> Result<()> {
        check_equal("channels", n, n.next_multiple_of(4))?;
        check_operands(self.out, n, m)?;
        self.norm.map_or(Ok(()), |norm| norm.check(n))
    }
}

/// The rows that `embed_*` looks up, and what they are multiplied by.
struct Rows {
    tokens: u64,
    position: u64,
    first: u32,
    scale: f32,
}

/// The rings of a block of `matvec_raw`.
struct Ring {
    quad_bytes: u32,
    depth: u32,
    /// Bytes of shared memory.
    shared: u32,
}

/// Where the sums of a product go.
enum Target<'a> {
    Store,
    Add { scale: f32, next: Option<Next<'a>> },
    Neurons { has_gate: bool, activation: Activation, out: &'a mut Operands },
}

impl Target<'_> {
    fn mode(&self) -> Mode {
        match self {
            Self::Store => Mode::Store,
            Self::Add { .. } => Mode::Add,
            Self::Neurons { has_gate: false, .. } => Mode::Activate,
            Self::Neurons { has_gate: true, .. } => Mode::Gate,
        }
    }

    /// What sums are multiplied by before they are added.
    fn scale(&self) -> f32 {
        match self {
            Self::Add { scale, .. } => *scale,
            Self::Store | Self::Neurons { .. } => 1.0,
        }
    }
}

impl Neurons<'_> {
    /// Whether gate and up, if there are both, are of one kind and have the same bands.
    fn are_alike(&self) -> bool {
        let up = self.up;
        self.gate.is_none_or(|gate| {
            let rows = gate.bands.iter().map(|band| band.rows);
            gate.kind() == up.kind() && rows.eq(up.bands.iter().map(|band| band.rows))
        })
    }
}

/// `Activation` of `activation.cuh`.
pub(super) fn code_of(activation: Activation) -> Result<u32> {
    match activation {
        Activation::Silu => Ok(0),
        Activation::GeluTanh => Ok(1),
        Activation::Relu => Ok(2),
        Activation::ClampedSwish { .. } => Err(KernelError::UnsupportedActivation { activation }),
    }
}

impl Device {
    /// The address of what a kernel reads. It stays in use until the work on the stream is done:
    /// memory is freed in the order of the stream, and a graph keeps it.
    pub(super) fn input<T>(&self, view: View<'_, T>) -> u64 {
        assert!(ptr::eq(self, Arc::as_ptr(view.device())), "memory of another device");
        self.keep_for_graph(view.memory());
        address(view.memory(), view.bytes().start)
    }

    /// The address of what a kernel reads 16 bytes at a time.
    fn vector_input(&self, view: View<'_, f32>) -> u64 {
        assert!(
            view.bytes().start.is_multiple_of(16),
            "a view that does not start on a 16-byte boundary"
        );
        self.input(view)
    }

    /// The address of what a kernel writes.
    fn output<T>(&self, view: &mut ViewMut<'_, T>) -> u64 {
        self.input(view.as_view())
    }

    /// The address of a zero that a kernel counts its blocks in, and leaves as zero.
    fn counter(&self) -> u64 {
        self.keep_for_graph(&self.counters);
        address(&self.counters, 0)
    }

    /// Starts a kernel, unless there are no blocks of it.
    ///
    /// # Safety
    /// `arguments` point to the kernel's parameters, in order and of its types. Addresses among
    /// them come from `input`, `output` and `counter`, and what the kernel reads and writes there
    /// is inside the views that they were made of.
    unsafe fn launch(
        &self,
        kernel: &Kernel,
        grid: [usize; 3],
        threads: u32,
        shared_bytes: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        for (blocks, limit) in grid.into_iter().zip([i32::MAX as usize, 65535, 65535]) {
            check_limit("blocks of threads", blocks, limit)?;
        }
        let shape = LaunchShape { grid: grid.map(|blocks| blocks as u32), threads, shared_bytes };
        let start = || {
            self.stream.context().bind_to_thread()?;
            let function = kernel.function.cu_function();
            // SAFETY: the caller's promise; the module lives as long as the kernel, and its kernels
            // wait for each other if they overlap.
            unsafe { driver::launch(&self.stream, function, shape, self.overlaps, arguments) }
        };
        start().map_err(refused(format!("launch kernel `{}`", kernel.name)))?;
        self.launched(kernel)
    }
}

/// What the kernels of attention take of scores.
fn scores_args(scores: Scores, cache: &KvCache) -> ScoresArgs {
    // A window past the capacity is no window.
    let window = scores.window.filter(|&window| window < cache.capacity);
    ScoresArgs {
        window: window.map_or(0, |window| window as u32),
        scale: LOG2_E * scores.scale,
        cap: scores.softcap.map_or(0.0, |cap| LOG2_E * cap),
    }
}

/// The bands that a launch takes: those beyond `bands` repeat the last, and are not looked at.
fn filled<K: Copy, const N: usize>(bands: &[BandArgs<K>]) -> [BandArgs<K>; N] {
    std::array::from_fn(|i| bands[i.min(bands.len() - 1)])
}

/// A parameter of a kernel.
fn argument<T>(value: &T) -> *mut c_void {
    ptr::from_ref(value).cast_mut().cast()
}

/// Whether a view has room for `expected` numbers; it may be longer.
fn check_room<T>(what: &'static str, view: View<'_, T>, expected: usize) -> Result<()> {
    match view.len() >= expected {
        true => Ok(()),
        false => Err(KernelError::ShapeMismatch { what, found: view.len(), expected }),
    }
}

/// Whether `operands` hold `m` vectors of `cols` numbers.
fn check_operands(operands: &Operands, cols: usize, m: usize) -> Result<()> {
    check_equal("columns of the operands", operands.cols(), cols)?;
    operands.check(m)
}

fn check_input(w: &Matrix, x: &Operands, m: usize) -> Result<()> {
    check_operands(x, w.cols(), m)
}
