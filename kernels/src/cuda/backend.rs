//! The operations of a forward pass on activations in host memory, with the products and attention
//! on the device.

use std::{
    collections::HashMap,
    marker::PhantomData,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rayon::prelude::*;
use slim_formats::{Layout, Weight, arch::Activation};

use super::{
    Attention, Buffer, Device, KvCache, Matrix, Operands, Position, Scores, Strided, Tokens,
    operands::saturated,
};
use crate::{
    AttentionCall, AttentionShape, Backend, Cpu, KvType, Result, RopeAngles, check_matmul,
    weight::{dequantize_rows, shape},
};

/// Tokens that are multiplied together: bounds the device memory of activations.
const BATCH_TOKENS: usize = 512;

/// Bytes of f32 rows of a dense weight that are on the device at a time.
const PIECE_BYTES: usize = 256 << 20;

/// Rows of a dense weight that become f32 in one task.
const TASK_ROWS: usize = 64;

/// A backend whose matrix products and attention run on a CUDA device.
///
/// Dense weights are multiplied in f32. Packed ones, whose codes are worth no more, take fp16
/// inputs, as on the device alone. What costs little next to a transfer is left to [`Cpu`].
pub struct CudaBackend {
    device: Arc<Device>,
    held: Arc<Mutex<HeldWeights>>,
}

/// The weights that stay on the device.
type HeldWeights = HashMap<Key, Arc<Resident>>;

/// The address of a weight's bytes, its rows and columns, and the layout of a dense one: a matrix
/// and its transpose can share their bytes.
type Key = (usize, usize, usize, Option<Layout>);

/// A weight on the device.
enum Resident {
    Packed(Matrix),
    /// [rows, cols].
    Dense(Buffer<f32>),
}

/// Keeps a weight on the device until it is dropped.
#[must_use]
pub struct Held<'w> {
    held: Arc<Mutex<HeldWeights>>,
    key: Key,
    /// While the bytes are borrowed nothing else lies at their address.
    weight: PhantomData<Weight<'w>>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        lock(&self.held).remove(&self.key);
    }
}

impl CudaBackend {
    /// A backend on `device`.
    pub fn new(device: Arc<Device>) -> Self {
        Self { device, held: Arc::default() }
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Copies a weight to the device; until the guard is dropped, products with it need no copy.
    ///
    /// # Errors
    /// As [`Matrix::upload`].
    pub fn hold<'w>(&self, weight: Weight<'w>) -> Result<Held<'w>> {
        let resident = match weight {
            Weight::Packed(_) | Weight::Bands(_) => {
                Resident::Packed(Matrix::upload(&self.device, weight)?)
            }
            Weight::Dense(dense) => Resident::Dense(self.upload_rows(weight, 0, dense.rows)?),
        };
        let key = key(weight);
        lock(&self.held).insert(key, Arc::new(resident));
        Ok(Held { held: Arc::clone(&self.held), key, weight: PhantomData })
    }

    /// The sum of `x^T x` over inputs of `n` columns, on the device.
    ///
    /// # Errors
    /// `OutOfDeviceMemory`; `Driver`.
    pub fn gram(&self, n: usize) -> Result<Gram> {
        let sum = Buffer::zeros(&self.device, n * n)?;
        Ok(Gram { device: Arc::clone(&self.device), sum, n })
    }

    fn held(&self, weight: Weight<'_>) -> Option<Arc<Resident>> {
        lock(&self.held).get(&key(weight)).cloned()
    }

    /// Rows `first .. first + n` of a dense weight in f32.
    fn upload_rows(&self, weight: Weight<'_>, first: usize, n: usize) -> Result<Buffer<f32>> {
        let cols = shape(weight).1;
        let mut rows = Buffer::zeros(&self.device, n * cols)?;
        let piece_rows = (PIECE_BYTES / size_of::<f32>() / cols.max(1)).max(1);
        let mut values = vec![0.0; piece_rows.min(n) * cols];
        for start in (0..n).step_by(piece_rows) {
            let values = &mut values[..piece_rows.min(n - start) * cols];
            values.par_chunks_mut(TASK_ROWS * cols).enumerate().try_for_each(|(i, values)| {
                let row = first + start + i * TASK_ROWS;
                dequantize_rows(weight, row..row + values.len() / cols, values)
            })?;
            rows.view_mut().slice(start * cols..start * cols + values.len()).write(values)?;
        }
        Ok(rows)
    }

    fn multiply_packed(&self, w: &Matrix, x: &[f32], m: usize, out: &mut [f32]) -> Result<()> {
        let batch = m.min(BATCH_TOKENS);
        let mut operands = Operands::zeros(&self.device, batch, w.cols())?;
        let mut product = Buffer::<f32>::zeros(&self.device, batch * w.rows())?;
        for (x, out) in x.chunks(batch * w.cols()).zip(out.chunks_mut(batch * w.rows())) {
            let m = out.len() / w.rows();
            operands.write(x, m)?;
            self.device.matmul(&[w], &operands, m, &mut [product.view_mut()])?;
            out.copy_from_slice(&product.view().slice(0..out.len()).read()?);
        }
        Ok(())
    }

    /// Multiplies with `w: [n, cols]`, rows `first ..` of a weight of `rows` rows.
    fn multiply_rows(
        &self,
        w: &Buffer<f32>,
        first: usize,
        rows: usize,
        x: &[f32],
        m: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let cols = x.len() / m;
        let n = w.len() / cols;
        let batch = m.min(BATCH_TOKENS);
        let mut product = Buffer::<f32>::zeros(&self.device, batch * n)?;
        for (x, out) in x.chunks(batch * cols).zip(out.chunks_mut(batch * rows)) {
            let m = out.len() / rows;
            let inputs = Buffer::upload(&self.device, x)?;
            let (a, b) = (Strided::new(inputs.view(), m, cols), Strided::new(w.view(), n, cols));
            self.device.gemm(1.0, a, b, 0.0, &mut product.view_mut(), n)?;
            let product = product.view().slice(0..m * n).read()?;
            for (out, product) in out.chunks_exact_mut(rows).zip(product.chunks_exact(n)) {
                out[first..first + n].copy_from_slice(product);
            }
        }
        Ok(())
    }

    /// A call of `attention` of the trait, on the device.
    fn attend(&self, call: &mut AttentionCall<'_>) -> Result<()> {
        let AttentionCall { shape, q, kv, out, .. } = call;
        let device = &self.device;
        let (positions, dim) = (shape.start + shape.m, shape.head_dim);
        let mut cache = KvCache::new(device, KvType::F16, shape.kv_heads, positions, dim)?;
        for (cache, rows) in [(&mut cache.keys, &kv.keys), (&mut cache.values, &kv.values)] {
            let heads = (0..shape.kv_heads).into_par_iter().flat_map_iter(|head| {
                let mut scratch = Vec::new();
                let numbers = rows.read(head, 0..positions, &mut scratch);
                numbers.iter().map(|&x| saturated(x).to_bits()).collect::<Vec<_>>()
            });
            let halves: Vec<u16> = heads.collect();
            cache.view_mut().write(bytemuck::cast_slice(&halves))?;
        }
        let AttentionShape { window, scale, softcap, .. } = *shape;
        let scores = Scores { window, scale, softcap };
        let mut attention = Attention::new(device, shape.heads, &cache)?;
        let mut position = Position::new(device, positions)?;
        position.set(shape.start)?;
        let queries = Buffer::upload(device, q)?;
        let mut operands = Operands::zeros(device, shape.m, shape.query_stride())?;
        let tokens = Tokens { position: &position, m: shape.m };
        device.attention(&mut attention, queries.view(), scores, &cache, tokens, &mut operands)?;
        out.copy_from_slice(&operands.read(shape.m)?);
        Ok(())
    }
}

impl Backend for CudaBackend {
    fn matmul(&self, w: Weight<'_>, x: &[f32], m: usize, out: &mut [f32]) -> Result<()> {
        check_matmul(w, x, m, out)?;
        if out.is_empty() {
            return Ok(());
        }
        let (rows, cols) = shape(w);
        match (self.held(w).as_deref(), w) {
            (Some(Resident::Packed(w)), _) => self.multiply_packed(w, x, m, out),
            (Some(Resident::Dense(w)), _) => self.multiply_rows(w, 0, rows, x, m, out),
            (None, Weight::Packed(_) | Weight::Bands(_)) => {
                self.multiply_packed(&Matrix::upload(&self.device, w)?, x, m, out)
            }
            (None, Weight::Dense(_)) => {
                let piece_rows = (PIECE_BYTES / size_of::<f32>() / cols).max(1);
                (0..rows).step_by(piece_rows).try_for_each(|first| {
                    let piece = self.upload_rows(w, first, piece_rows.min(rows - first))?;
                    self.multiply_rows(&piece, first, rows, x, m, out)
                })
            }
        }
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        Cpu.rms_norm(x, weight, epsilon, out);
    }

    fn layer_norm(&self, x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
        Cpu.layer_norm(x, weight, bias, epsilon, out);
    }

    fn rope(&self, x: &mut [f32], heads: usize, angles: &RopeAngles) {
        Cpu.rope(x, heads, angles);
    }

    /// On the processor if the kernels do not take heads of this size, or with sinks.
    fn attention(&self, calls: &mut [AttentionCall<'_>]) -> Result<()> {
        let is_taken = |call: &AttentionCall<'_>| {
            call.sinks.is_none() && KvCache::takes_head_dim(call.shape.head_dim)
        };
        match calls.iter().all(is_taken) {
            true => calls.iter_mut().try_for_each(|call| self.attend(call)),
            false => Cpu.attention(calls),
        }
    }

    fn gated(&self, activation: Activation, gate: &mut [f32], up: &[f32]) {
        Cpu.gated(activation, gate, up);
    }

    fn activate(&self, activation: Activation, x: &mut [f32]) {
        Cpu.activate(activation, x);
    }
}

/// A sum of `x^T x`, on the device.
pub struct Gram {
    device: Arc<Device>,
    /// [n, n].
    sum: Buffer<f32>,
    n: usize,
}

impl Gram {
    /// Adds `x^T x` of `x: [tokens, n]`.
    ///
    /// # Errors
    /// `OutOfDeviceMemory`; `Driver`.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn add(&mut self, x: &[f32]) -> Result<()> {
        assert!(x.len().is_multiple_of(self.n), "whole rows of {}", self.n);
        let inputs = Buffer::upload(&self.device, x)?;
        let columns = Strided::new(inputs.view(), x.len() / self.n, self.n).transposed();
        self.device.gemm(1.0, columns, columns, 1.0, &mut self.sum.view_mut(), self.n)
    }

    /// The sum, `[n, n]`.
    ///
    /// # Errors
    /// `Driver`, also for an earlier kernel that failed.
    pub fn read(&self) -> Result<Vec<f32>> {
        self.sum.view().read()
    }
}

fn key(weight: Weight<'_>) -> Key {
    let (rows, cols) = shape(weight);
    let (bytes, layout) = match weight {
        Weight::Dense(dense) => (dense.bytes, Some(dense.layout)),
        Weight::Packed(packed) => (packed.parts().0, None),
        Weight::Bands(bands) => (bands.get(0).parts().0, None),
    };
    (bytes.as_ptr().addr(), rows, cols, layout)
}

/// A panic elsewhere leaves nothing half done in the table.
fn lock(held: &Mutex<HeldWeights>) -> MutexGuard<'_, HeldWeights> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}
