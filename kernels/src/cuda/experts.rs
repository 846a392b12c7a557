//! Experts on a device, and what a router says of the tokens of a batch.

use std::sync::Arc;

use slim_formats::{Weight, arch};

use super::{Buffer, Device, Matrix, Operands, check_equal, check_limit, launch::code_of};
use crate::{
    Result,
    weight::{dequantize_rows, shape},
};

/// Where the weights of the experts of a block, and of their router, are on the host.
pub struct ExpertWeights<'a> {
    /// `[count, hidden]`.
    pub router: Weight<'a>,
    /// `[count]`, added to the outputs of the router.
    pub router_bias: Option<&'a [f32]>,
    /// `[count]`, added to scores where experts are chosen.
    pub correction: Option<&'a [f32]>,
    /// `[hidden]`, of the network beside them.
    pub share: Option<&'a [f32]>,
    /// `[neurons, hidden]`, of each expert.
    pub gate: Vec<Weight<'a>>,
    /// `[neurons, hidden]`, of each expert.
    pub up: Vec<Weight<'a>>,
    /// `[hidden, neurons]`, of each expert.
    pub down: Vec<Weight<'a>>,
}

/// The experts of a block on a device. What chooses them is f32 there.
pub struct Experts {
    pub(super) spec: arch::Experts,
    pub(super) router: Buffer<f32>,
    pub(super) router_bias: Option<Buffer<f32>>,
    pub(super) correction: Option<Buffer<f32>>,
    pub(super) share: Option<Buffer<f32>>,
    /// Gate and inputs, which are of one kind.
    pub(super) neurons: [ExpertLayer; 2],
    pub(super) down: ExpertLayer,
}

/// A layer of all experts, which are of one kind and shape.
pub(super) struct ExpertLayer {
    pub matrices: Vec<Matrix>,
    /// `Band`s of `bands.cuh`, those of all experts one after the other.
    pub bands: Buffer<u8>,
    /// Where each expert has its first, `[count + 1]`.
    pub first: Buffer<u32>,
}

impl Experts {
    /// Copies them to the device.
    ///
    /// # Errors
    /// `ShapeMismatch` if weights are not of as many experts, or of other shapes; `TooLarge` if a
    /// token goes through more than there are; as [`Matrix::upload`].
    pub fn upload(
        device: &Arc<Device>,
        spec: arch::Experts,
        weights: &ExpertWeights<'_>,
    ) -> Result<Self> {
        let ExpertWeights { router, router_bias, correction, share, gate, up, down } = weights;
        let (count, hidden) = shape(*router);
        check_equal("rows of the router", count, spec.count.into())?;
        check_limit("experts of a token", usize::from(spec.used).max(1), count)?;
        let layers = [("gate", gate), ("inputs", up), ("outputs", down)];
        for (what, layer) in layers {
            check_equal(what, layer.len(), count)?;
        }
        for (layer, rows, cols) in [
            (gate, spec.ffn.width, hidden),
            (up, spec.ffn.width, hidden),
            (down, hidden, spec.ffn.width),
        ] {
            for &weight in layer {
                check_equal("rows of an expert", shape(weight).0, rows)?;
                check_equal("columns of an expert", shape(weight).1, cols)?;
            }
        }
        let mut values = vec![0.0; count * hidden];
        dequantize_rows(*router, 0..count, &mut values)?;
        let vector = |vector: &Option<&[f32]>, len: usize| {
            let checked = vector.map(|vector| {
                check_equal("numbers of the router", vector.len(), len)?;
                Buffer::upload(device, vector)
            });
            checked.transpose()
        };
        let [gate, up] = ExpertLayer::upload_alike(device, [gate, up])?;
        let [down] = ExpertLayer::upload_alike(device, [down])?;
        Ok(Self {
            spec,
            router: Buffer::upload(device, &values)?,
            router_bias: vector(router_bias, count)?,
            correction: vector(correction, count)?,
            share: vector(share, hidden)?,
            neurons: [gate, up],
            down,
        })
    }

    /// Whether their neurons may have this activation.
    pub fn takes(activation: arch::Activation) -> bool {
        code_of(activation).is_ok()
    }

    /// Channels of the residual stream.
    pub(super) fn hidden_size(&self) -> usize {
        self.down.matrices[0].rows()
    }

    /// Bytes of device memory that they take.
    pub fn device_bytes(&self) -> u64 {
        let layers = self.neurons.iter().chain([&self.down]);
        layers.flat_map(|layer| &layer.matrices).map(Matrix::device_bytes).sum()
    }

    /// Bytes of them that a token reads.
    pub fn bytes_per_token(&self) -> u64 {
        self.device_bytes() * u64::from(self.spec.used) / u64::from(self.spec.count)
    }
}

impl ExpertLayer {
    /// Copies layers to the device, all as one kind: fp16, if they are not of one.
    fn upload_alike<const N: usize>(
        device: &Arc<Device>,
        layers: [&Vec<Weight<'_>>; N],
    ) -> Result<[Self; N]> {
        let upload = |weights: &Vec<Weight<'_>>| {
            weights.iter().map(|&weight| Matrix::upload(device, weight)).collect::<Result<Vec<_>>>()
        };
        let mut uploaded =
            layers.iter().map(|weights| upload(weights)).collect::<Result<Vec<_>>>()?;
        let kind = uploaded[0][0].kind();
        if uploaded.iter().flatten().any(|matrix| matrix.kind() != kind) {
            for (matrices, weights) in uploaded.iter_mut().zip(layers) {
                for (matrix, &weight) in matrices.iter_mut().zip(weights) {
                    *matrix = Matrix::upload_dense(device, weight)?;
                }
            }
        }
        let made = uploaded.into_iter().map(|matrices| Self::new(device, matrices));
        let made: Vec<_> = made.collect::<Result<_>>()?;
        Ok(made.try_into().unwrap_or_else(|_| unreachable!("as many layers as before")))
    }

    fn new(device: &Arc<Device>, matrices: Vec<Matrix>) -> Result<Self> {
        let mut first = vec![0];
        for matrix in &matrices {
            first.push(first[first.len() - 1] + matrix.bands.len() as u32);
        }
        let bands: Vec<u8> = matrices.iter().flat_map(|matrix| device.band_table(matrix)).collect();
        let (bands, first) = (Buffer::upload(device, &bands)?, Buffer::upload(device, &first)?);
        Ok(Self { matrices, bands, first })
    }
}

/// What a router says of the tokens of a batch, and the neurons of the experts that it chose.
pub struct Routed {
    used: usize,
    /// [batch, 2, count]: scores, and what they are worth.
    pub(super) scores: Buffer<f32>,
    /// [batch, used].
    pub(super) chosen: Buffer<u32>,
    pub(super) weights: Buffer<f32>,
    /// [batch]; of the network beside the experts.
    pub(super) shares: Buffer<f32>,
    /// [batch * used, neurons].
    pub(super) neurons: Operands,
}

impl Routed {
    /// Room for up to `batch` tokens of a block with such experts.
    ///
    /// # Errors
    /// `TooLarge`; `OutOfDeviceMemory`; `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn zeros(device: &Arc<Device>, batch: usize, experts: &arch::Experts) -> Result<Self> {
        let (count, used) = (usize::from(experts.count), usize::from(experts.used));
        Ok(Self {
            used,
            scores: Buffer::zeros(device, batch * 2 * count)?,
            chosen: Buffer::zeros(device, batch * used)?,
            weights: Buffer::zeros(device, batch * used)?,
            shares: Buffer::zeros(device, batch)?,
            neurons: Operands::zeros(device, batch * used, experts.ffn.width)?,
        })
    }

    /// Whether it has room for m tokens of such experts.
    pub(super) fn check(&self, experts: &arch::Experts, m: usize) -> Result<()> {
        let (count, used) = (usize::from(experts.count), usize::from(experts.used));
        check_equal("experts of a token", self.used, used)?;
        check_equal("neurons of an expert", self.neurons.cols(), experts.ffn.width)?;
        check_limit("tokens", m, self.shares.len())?;
        check_limit("scores", m * 2 * count, self.scores.len())
    }
}
