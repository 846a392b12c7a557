//! What kernels take as arguments, byte for byte.

use bytemuck::{Pod, Zeroable, bytes_of};
use slim_formats::slim::{MAX_BANDS, TILE_ROWS};

use super::{
    Device,
    device::{Kernel, shared},
    matrix::{Band, Packed, QUARTERS, Storage},
};

/// Bands that one launch of `matvec_*` takes: those of two matrices.
pub(super) const MATVEC_BANDS: usize = 2 * MAX_BANDS;

/// Columns of a block of `embed_*`.
const EMBED_COLS: usize = 128;

/// What a product does with its sums: `mode` of `matvec.cu` and `matmul.cu`.
#[derive(Clone, Copy)]
pub(super) enum Mode {
    Store = 0,
    Add = 1,
    Activate = 2,
    Gate = 3,
}

/// `PackedMatrix` of `packed.cuh`, of layers that are no trellis.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct PackedArgs {
    pub codes: u64,
    pub scales: u64,
    pub row_scales: u64,
    pub units: u64,
    pub row_factors: u64,
    pub items: u64,
    pub quads: u64,
    pub rows: u32,
    pub cols: u32,
    pub item_count: u32,
    pub tile_code_bytes: u32,
    pub tile_scale_bytes: u32,
    pub coding: u32,
    sub_group_log2: u32,
    pub max_width: u32,
    pub plain_units: u32,
    pub quad_count: u32,
}

/// `TrellisMatrix` of `trellis.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(transparent)]
pub(super) struct TrellisArgs(PackedArgs);

/// `DenseMatrix` of `dense.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct DenseArgs {
    pub fragments: u64,
    pub rows: u32,
    pub cols: u32,
    pub steps: u32,
    pub unused: u32,
}

/// `Band` of `bands.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct BandArgs<M> {
    pub w: M,
    pub out: u64,
    pub bias: u64,
    pub first_row: u32,
    pub matrix_rows: u32,
}

impl<M: Pod> BandArgs<M> {
    /// As it lies in device memory.
    pub fn to_bytes(self) -> Vec<u8> {
        let Self { w, out, bias, first_row, matrix_rows } = self;
        let (addresses, rows) = ([out, bias], [first_row, matrix_rows]);
        let parts = [bytes_of(&w), bytes_of(&addresses), bytes_of(&rows)];
        debug_assert_eq!(parts.iter().map(|part| part.len()).sum::<usize>(), size_of::<Self>());
        parts.concat()
    }
}

/// `Norm` of `norm.cuh`; of zeros, none.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct NormArgs {
    pub weight: u64,
    pub bias: u64,
    pub epsilon: f32,
    pub unused: u32,
}

/// `Matvec` of `matvec.cu`.
#[repr(C)]
pub(super) struct MatvecArgs<M> {
    pub band: [BandArgs<M>; MATVEC_BANDS],
    pub x: u64,
    pub x_stride: u32,
    pub m: u32,
    pub bands: u32,
    pub mode: u32,
    pub operands: u64,
    pub operand_stride: u32,
    pub activation: u32,
    pub norm: NormArgs,
    pub normed: u64,
    pub normed_stride: u32,
    pub scale: f32,
    pub counter: u64,
    pub quad_bytes: u32,
    pub depth: u32,
}

/// `Router` of `experts.cu`.
#[repr(C)]
pub(super) struct RouterArgs {
    pub weight: u64,
    pub bias: u64,
    pub correction: u64,
    pub share: u64,
    pub count: u32,
    pub used: u32,
    pub scoring: u32,
    pub normalizes: u32,
    pub sharpness: f32,
    pub scale: f32,
}

/// `ExpertLayer` of `experts.cu`; of zeros, none.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct ExpertLayerArgs {
    pub bands: u64,
    pub first: u64,
}

/// `ExpertProduct` of `experts.cu`.
#[derive(Default)]
#[repr(C)]
pub(super) struct ExpertProductArgs {
    pub layer: ExpertLayerArgs,
    pub up: ExpertLayerArgs,
    pub experts: u64,
    pub weights: u64,
    pub input: u64,
    pub neurons: u64,
    pub x: u64,
    pub stride: u32,
    pub neuron_stride: u32,
    pub used: u32,
    pub rows: u32,
    pub activation: u32,
    pub scale: f32,
}

/// `Matmul` of `matmul.cu`.
#[repr(C)]
pub(super) struct MatmulArgs<M> {
    pub band: [BandArgs<M>; MAX_BANDS],
    pub x: u64,
    pub x_stride: u32,
    pub m: u32,
    pub mode: u32,
    pub stages: u32,
    pub bands: u32,
    pub scale: f32,
}

/// `Embed` of `embed.cu`.
#[repr(C)]
pub(super) struct EmbedArgs<M> {
    pub band: [BandArgs<M>; MAX_BANDS],
    pub tokens: u64,
    pub position: u64,
    pub first: u32,
    pub bands: u32,
    pub scale: f32,
    pub unused: u32,
}

/// `GemmArgs` of `gemm.cu`.
#[repr(C)]
pub(super) struct GemmArgs {
    pub a: u64,
    pub b: u64,
    pub c: u64,
    pub a_row: u64,
    pub a_col: u64,
    pub b_row: u64,
    pub b_col: u64,
    pub c_row: u64,
    pub m: u32,
    pub n: u32,
    pub k: u32,
    pub alpha: f32,
    pub beta: f32,
    pub unused: u32,
}

/// `KvCache` of `kv_cache.cuh`.
#[repr(C)]
pub(super) struct KvCacheArgs {
    pub keys: u64,
    pub values: u64,
    pub key_scales: u64,
    pub value_scales: u64,
    pub capacity: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub unused: u32,
}

/// `Rotation` of `rope.cu`.
#[repr(C)]
pub(super) struct RotationArgs {
    pub cos: u64,
    pub sin: u64,
    pub q_norm: u64,
    pub k_norm: u64,
    pub pairs: u32,
    pub epsilon: f32,
    pub beta: f32,
    pub context: u32,
}

/// `Scores` of `kv_cache.cuh`.
#[repr(C)]
pub(super) struct ScoresArgs {
    pub window: u32,
    pub scale: f32,
    pub cap: f32,
}

/// A storage of weights, and the kernels that multiply with it.
pub(super) trait Kind: Pod {
    /// Tiles whose codes belong together.
    const STRIP_TILES: usize = 1;

    /// What the kernels take of a band, which must be of this kind.
    fn of(device: &Device, w: &Band) -> Self;
    fn matvec(device: &Device) -> &Kernel;
    /// What `matvec_raw` takes of shared memory for a quad, in bytes, if its kernel can multiply a
    /// token with these weights.
    fn quad_bytes(&self) -> Option<u32>;
    fn matmul(device: &Device) -> &Kernel;
    fn experts(device: &Device) -> &Kernel;
    fn embed(device: &Device) -> &Kernel;
    /// Blocks of `embed_*` for a token.
    fn embed_blocks(&self) -> usize;
    /// Bytes of shared memory that `matmul_*` takes for an item of all tiles and tokens of a block.
    fn matmul_item_bytes(&self) -> u32;
    fn rows(&self) -> u32;

    /// What a block of `matvec` works on, one after the other: a tile, or two that belong together.
    fn strips(&self) -> usize {
        (self.rows() as usize).div_ceil(Self::STRIP_TILES * TILE_ROWS)
    }

    /// Tiles of 16 rows, the last ones padded.
    fn tiles(&self) -> usize {
        Self::STRIP_TILES * self.strips()
    }
}

impl PackedArgs {
    fn new(device: &Device, w: &Band, packed: &Packed) -> Self {
        let Packed { codes, scales, row_scales, units, row_factors, items, quads, .. } = packed;
        Self {
            codes: device.input(codes.view()),
            scales: device.input(scales.view()),
            row_scales: device.input(row_scales.view()),
            units: device.input(units.view()),
            row_factors: device.input(row_factors.view()),
            items: device.input(items.view()),
            quads: device.input(quads.view()),
            rows: w.rows as u32,
            cols: w.cols as u32,
            item_count: items.len() as u32,
            tile_code_bytes: packed.tile_code_bytes,
            tile_scale_bytes: packed.tile_scale_bytes,
            coding: packed.coding,
            sub_group_log2: packed.sub_group_log2,
            max_width: packed.max_width,
            plain_units: packed.plain_units,
            // The last has nothing.
            quad_count: (quads.len() / QUARTERS).saturating_sub(1) as u32,
        }
    }
}

impl Kind for PackedArgs {
    fn of(device: &Device, w: &Band) -> Self {
        let Storage::Packed(packed) = &w.storage else { unreachable!("a packed band") };
        Self::new(device, w, packed)
    }

    fn matvec(device: &Device) -> &Kernel {
        &device.kernels.matvec_packed
    }

    fn quad_bytes(&self) -> Option<u32> {
        (self.quad_count > 0).then(|| shared::quad(self.max_width))
    }

    fn matmul(device: &Device) -> &Kernel {
        &device.kernels.matmul_packed
    }

    fn experts(device: &Device) -> &Kernel {
        &device.kernels.experts_packed
    }

    fn embed(device: &Device) -> &Kernel {
        &device.kernels.embed_packed
    }

    fn embed_blocks(&self) -> usize {
        self.item_count as usize
    }

    fn matmul_item_bytes(&self) -> u32 {
        shared::matmul_item(self.max_width)
    }

    fn rows(&self) -> u32 {
        self.rows
    }
}

impl Kind for TrellisArgs {
    const STRIP_TILES: usize = 2;

    fn of(device: &Device, w: &Band) -> Self {
        let Storage::Trellis(packed) = &w.storage else { unreachable!("a band of a trellis") };
        Self(PackedArgs::new(device, w, packed))
    }

    fn matvec(device: &Device) -> &Kernel {
        &device.kernels.matvec_trellis
    }

    fn quad_bytes(&self) -> Option<u32> {
        None
    }

    fn matmul(device: &Device) -> &Kernel {
        &device.kernels.matmul_trellis
    }

    fn experts(device: &Device) -> &Kernel {
        &device.kernels.experts_trellis
    }

    fn embed(device: &Device) -> &Kernel {
        &device.kernels.embed_trellis
    }

    fn embed_blocks(&self) -> usize {
        self.0.embed_blocks()
    }

    fn matmul_item_bytes(&self) -> u32 {
        self.0.matmul_item_bytes()
    }

    fn rows(&self) -> u32 {
        self.0.rows
    }
}

impl Kind for DenseArgs {
    fn of(device: &Device, w: &Band) -> Self {
        let Storage::Dense(dense) = &w.storage else { unreachable!("a dense band") };
        Self {
            fragments: device.input(dense.fragments.view()),
            rows: w.rows as u32,
            cols: w.cols as u32,
            steps: dense.steps,
            unused: 0,
        }
    }

    fn matvec(device: &Device) -> &Kernel {
        &device.kernels.matvec_dense
    }

    fn quad_bytes(&self) -> Option<u32> {
        None
    }

    fn matmul(device: &Device) -> &Kernel {
        &device.kernels.matmul_dense
    }

    fn experts(device: &Device) -> &Kernel {
        &device.kernels.experts_dense
    }

    fn embed(device: &Device) -> &Kernel {
        &device.kernels.embed_dense
    }

    fn embed_blocks(&self) -> usize {
        (self.cols as usize).div_ceil(EMBED_COLS)
    }

    fn matmul_item_bytes(&self) -> u32 {
        shared::MATMUL_STEP
    }

    fn rows(&self) -> u32 {
        self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::device::PTX;

    /// Bytes of each parameter that the PTX declares for a kernel.
    fn declared_parameters(kernel: &str) -> Vec<usize> {
        let entry = format!(".entry {kernel}(");
        let (_, after) =
            PTX.split_once(&entry).unwrap_or_else(|| panic!("no `{kernel}` in the PTX"));
        let (parameters, _) = after.split_once(')').unwrap();
        let bytes_of = |parameter: &str| match parameter.split_once('[') {
            Some((_, count)) => count.trim_end_matches(']').parse().unwrap(),
            None if parameter.contains(".u64") => 8,
            None => 4,
        };
        parameters.split(',').map(|parameter| bytes_of(parameter.trim())).collect()
    }

    /// The driver takes as many bytes from each argument as the PTX says.
    #[test]
    fn parameters_are_those_of_the_ptx() {
        let (cache, scores) = (size_of::<KvCacheArgs>(), size_of::<ScoresArgs>());
        let rotation = size_of::<RotationArgs>();
        let norm = size_of::<NormArgs>();
        let kernels: [(&str, &[usize]); 27] = [
            ("activate", &[8, 8, 4, 4, 8, 4]),
            ("attention_decode_f16", &[8, cache, 8, 4, scores, 8, 8, 8]),
            ("attention_decode_q8", &[8, cache, 8, 4, scores, 8, 8, 8]),
            ("attention_prefill_f16", &[8, cache, 8, 4, 4, scores, 8, 4]),
            ("attention_prefill_q8", &[8, cache, 8, 4, 4, scores, 8, 4]),
            ("embed_dense", &[size_of::<EmbedArgs<DenseArgs>>()]),
            ("embed_packed", &[size_of::<EmbedArgs<PackedArgs>>()]),
            ("embed_trellis", &[size_of::<EmbedArgs<TrellisArgs>>()]),
            ("experts_dense", &[size_of::<ExpertProductArgs>()]),
            ("experts_packed", &[size_of::<ExpertProductArgs>()]),
            ("experts_trellis", &[size_of::<ExpertProductArgs>()]),
            ("finish_logits", &[8, 4, 4, 4]),
            ("gemm_f32", &[size_of::<GemmArgs>()]),
            ("matmul_dense", &[size_of::<MatmulArgs<DenseArgs>>()]),
            ("matmul_packed", &[size_of::<MatmulArgs<PackedArgs>>()]),
            ("matmul_trellis", &[size_of::<MatmulArgs<TrellisArgs>>()]),
            ("matvec_dense", &[size_of::<MatvecArgs<DenseArgs>>()]),
            ("matvec_packed", &[size_of::<MatvecArgs<PackedArgs>>()]),
            ("matvec_trellis", &[size_of::<MatvecArgs<TrellisArgs>>()]),
            ("matvec_raw", &[size_of::<MatvecArgs<PackedArgs>>()]),
            ("norm_add", &[8, norm, 4, 4, 8, 4, norm, 8, 4]),
            ("norm_rows", &[8, norm, 4, 8, 4]),
            ("rope_store_f16", &[8, 8, 8, 8, 4, cache, rotation]),
            ("rope_store_q8", &[8, 8, 8, 8, 4, cache, rotation]),
            ("route", &[8, norm, 4, size_of::<RouterArgs>(), 8, 8, 8, 8, 8]),
            ("weigh_rows", &[8, 4, 8]),
            ("top_k", &[8, 4, 4, 8, 8, 8, 8]),
        ];
        for (kernel, expected) in kernels {
            assert_eq!(declared_parameters(kernel), expected, "{kernel}");
        }
        assert_eq!(PTX.matches(".entry ").count(), kernels.len());
    }
}
