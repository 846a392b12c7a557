//! Rotation, the cache, and attention over it.

use std::sync::Arc;

use anyhow::Result;
use slim_formats::arch::QueryScaling;
use slim_kernels::{
    AttentionCall, AttentionShape, Backend, KvType, RopeAngles, Scalar,
    cuda::{
        Attention, Buffer, Device, HeadNorms, KvCache, Operands, Position, RopeTables, Rotation,
        Scores, Tokens,
    },
};

use super::Check;
use crate::weights::vector;

const THETA: f32 = 1e4;
const EPSILON: f32 = 1e-5;
const QUERY_SCALING: QueryScaling = QueryScaling { beta: 0.3, context: 20 };

/// `m` queries after `start` tokens.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub start: usize,
    pub m: usize,
    pub window: Option<usize>,
    pub kv_type: KvType,
    /// Whether half of a head is rotated, behind norms, queries are scaled and scores capped.
    pub is_special: bool,
}

impl Case {
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        let kv_type = KvType::F16;
        let (start, m, window, is_special) = (100, 1, None, false);
        Self { heads, kv_heads, head_dim, start, m, window, kv_type, is_special }
    }

    fn angles(&self, start: usize, m: usize) -> RopeAngles {
        let pairs = self.head_dim / if self.is_special { 4 } else { 2 };
        RopeAngles::new(self.head_dim, THETA, &vec![1.0; pairs], start, m)
    }

    /// Weights of the norms of queries and keys.
    fn norms(&self) -> [Vec<f32>; 2] {
        [vector(34, self.head_dim, 1.0), vector(35, self.head_dim, 1.0)]
    }

    fn scores(&self) -> Scores {
        let Self { window, head_dim, .. } = *self;
        let softcap = self.is_special.then_some(3.0);
        Scores { window, scale: 1.0 / (head_dim as f32).sqrt(), softcap }
    }
}

/// One query at a time.
pub fn decode(device: &Arc<Device>, check: &mut Check, kv_type: KvType) -> Result<()> {
    let heads = [(4, 4), (4, 2), (12, 4), (8, 1), (32, 1)];
    for ((heads, kv_heads), head_dim) in heads.into_iter().cycle().zip([8, 16, 64, 80, 128, 256]) {
        for (start, window) in
            [(0, None), (5, Some(1)), (63, None), (64, Some(7)), (300, Some(130))]
        {
            for is_special in [false, true] {
                let case = Case::new(heads, kv_heads, head_dim);
                compare(device, check, &Case { start, window, kv_type, is_special, ..case })?;
            }
        }
    }
    for (heads, kv_heads, window) in [(32, 1, None), (40, 2, Some(1000)), (3, 3, None)] {
        let case = Case { start: 2047, window, kv_type, ..Case::new(heads, kv_heads, 64) };
        compare(device, check, &case)?;
    }
    Ok(())
}

/// Many queries at once.
pub fn prefill(device: &Arc<Device>, check: &mut Check, kv_type: KvType) -> Result<()> {
    let heads = [(4, 4), (4, 2), (12, 4), (8, 1), (3, 1)];
    for ((heads, kv_heads), head_dim) in heads.into_iter().cycle().zip([8, 16, 64, 80, 128, 256]) {
        for (start, m, window) in [(0, 2, None), (0, 70, None), (61, 17, Some(9)), (130, 33, None)]
        {
            for is_special in [false, true] {
                let case = Case::new(heads, kv_heads, head_dim);
                compare(device, check, &Case { start, m, window, kv_type, is_special, ..case })?;
            }
        }
    }
    for window in [None, Some(150)] {
        let case = Case { start: 1000, m: 40, window, kv_type, ..Case::new(4, 2, 64) };
        compare(device, check, &case)?;
    }
    Ok(())
}

fn compare(device: &Arc<Device>, check: &mut Check, case: &Case) -> Result<()> {
    let Case { heads, kv_heads, head_dim, start, m, kv_type, .. } = *case;
    let mut on_device = OnDevice::new(device, case)?;
    on_device.launch(device)?;

    let positions = start + m;
    let [mut q, mut k, v] = numbers(case);
    if case.is_special {
        for (x, weight) in [&mut q, &mut k].into_iter().zip(case.norms()) {
            Scalar.rms_norm(&x.clone(), &weight, EPSILON, x);
        }
    }
    Scalar.rope(&mut q, heads, &case.angles(start, m));
    Scalar.rope(&mut k, kv_heads, &case.angles(0, positions));
    if case.is_special {
        for (t, q) in q.chunks_exact_mut(heads * head_dim).enumerate() {
            q.iter_mut().for_each(|q| *q *= QUERY_SCALING.at(start + t));
        }
    }
    check.near(format_args!("rotated queries, {case:?}"), &on_device.q.view().read()?, &q);
    // Rounded as on the device: what a type costs is not an error of the kernels.
    let mut kv = slim_kernels::KvCache::new(kv_type, kv_heads, positions, head_dim);
    kv.store(&k, &v, 0);
    let Scores { window, scale, softcap } = case.scores();
    let shape = AttentionShape { heads, kv_heads, head_dim, start, m, window, scale, softcap };
    let mut expected = vec![0.0; q.len()];
    let call = AttentionCall { shape, q: &q, kv: &kv, sinks: None, out: &mut expected };
    Scalar.attention(&mut [call])?;
    check.near(format_args!("{kv_type:?}, {case:?}"), &on_device.out.read(m)?, &expected);
    Ok(())
}

/// Queries `[m, heads, head_dim]`; keys and values of all positions,
/// `[start + m, kv_heads, head_dim]`.
fn numbers(case: &Case) -> [Vec<f32>; 3] {
    let kv_len = (case.start + case.m) * case.kv_heads * case.head_dim;
    let q = vector(31, case.m * case.heads * case.head_dim, 2.0);
    [q, vector(32, kv_len, 1.0), vector(33, kv_len, 1.0)]
}

/// A case whose first `start` tokens are in the cache.
pub struct OnDevice {
    attention: Attention,
    cache: KvCache,
    tables: RopeTables,
    norms: Option<[Buffer<f32>; 2]>,
    query_scaling: Option<QueryScaling>,
    scores: Scores,
    position: Position,
    m: usize,
    /// The queries as they come, and rotated after a launch.
    fresh_q: Vec<f32>,
    q: Buffer<f32>,
    k: Buffer<f32>,
    v: Buffer<f32>,
    out: Operands,
}

impl OnDevice {
    pub fn new(device: &Arc<Device>, case: &Case) -> Result<Self> {
        let Case { heads, kv_heads, head_dim, start, m, kv_type, is_special, .. } = *case;
        let capacity = start + m + 3;
        let mut cache = KvCache::new(device, kv_type, kv_heads, capacity, head_dim)?;
        let attention = Attention::new(device, heads, &cache)?;
        let tables = RopeTables::upload(device, &case.angles(0, capacity))?;
        let [q_norm, k_norm] = case.norms();
        let norms = [Buffer::upload(device, &q_norm)?, Buffer::upload(device, &k_norm)?];
        let norms = is_special.then_some(norms);
        let query_scaling = is_special.then_some(QUERY_SCALING);
        let mut position = Position::new(device, capacity)?;
        let [q, k, v] = numbers(case);
        let kv_row = kv_heads * head_dim;
        if start > 0 {
            let (k, v) = (&k[..start * kv_row], &v[..start * kv_row]);
            let (k, v) = (Buffer::upload(device, k)?, Buffer::upload(device, v)?);
            let mut q = Buffer::zeros(device, start * heads * head_dim)?;
            let tokens = Tokens { position: &position, m: start };
            let kv = [k.view(), v.view()];
            let rotation = rotation(&tables, &norms, query_scaling);
            device.rope_store(&attention, &mut q.view_mut(), kv, rotation, tokens, &mut cache)?;
        }
        position.set(start)?;
        Ok(Self {
            attention,
            cache,
            tables,
            norms,
            query_scaling,
            scores: case.scores(),
            position,
            m,
            q: Buffer::upload(device, &q)?,
            fresh_q: q,
            k: Buffer::upload(device, &k[start * kv_row..])?,
            v: Buffer::upload(device, &v[start * kv_row..])?,
            out: Operands::zeros(device, m, heads * head_dim)?,
        })
    }

    /// Stores the keys and values of the new tokens, and attends.
    pub fn launch(&mut self, device: &Arc<Device>) -> slim_kernels::Result<()> {
        let tokens = Tokens { position: &self.position, m: self.m };
        let kv = [self.k.view(), self.v.view()];
        let q = &mut self.q.view_mut();
        let rotation = rotation(&self.tables, &self.norms, self.query_scaling);
        device.rope_store(&self.attention, q, kv, rotation, tokens, &mut self.cache)?;
        let (cache, out) = (&self.cache, &mut self.out);
        device.attention(&mut self.attention, q.as_view(), self.scores, cache, tokens, out)
    }

    /// Makes the queries fresh, and puts them elsewhere.
    pub fn set_position(&mut self, position: usize) -> Result<()> {
        self.q.view_mut().write(&self.fresh_q)?;
        Ok(self.position.set(position)?)
    }

    /// The bits of the result.
    pub fn read(&self) -> Result<Vec<u32>> {
        Ok(self.out.read(self.m)?.into_iter().map(f32::to_bits).collect())
    }

    pub fn attend(mut self, device: &Arc<Device>) -> Result<Vec<u32>> {
        self.launch(device)?;
        self.read()
    }
}

fn rotation<'a>(
    tables: &'a RopeTables,
    norms: &'a Option<[Buffer<f32>; 2]>,
    query_scaling: Option<QueryScaling>,
) -> Rotation<'a> {
    let norms = norms.as_ref().map(|weights| HeadNorms {
        weights: weights.each_ref().map(Buffer::view),
        epsilon: EPSILON,
    });
    Rotation { norms, tables: Some(tables), query_scaling }
}
