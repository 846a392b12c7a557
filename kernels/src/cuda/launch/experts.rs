//! Experts: their choice, their neurons, and what these add.

use slim_formats::{arch, slim::TILE_ROWS};

use super::{
    BandArgs, DenseArgs, Device, Kernel, Kind, Matrix, Norm, NormArgs, Operands, PackedArgs,
    StorageKind, TrellisArgs, View, ViewMut, argument, check_operands, check_room, code_of,
};
use crate::{
    Result,
    cuda::{
        Buffer, Experts, Routed,
        arguments::{ExpertLayerArgs, ExpertProductArgs, RouterArgs},
        check_equal, check_limit,
        experts::ExpertLayer,
    },
};

/// Experts that a block of `route` scores.
const ROUTE_WARPS: usize = 8;
/// Numbers of a block of `weigh_rows`.
const ELEMENTS: usize = 256;

impl Device {
    /// Chooses the experts of m tokens, whose residual stream is `x: [m, hidden]`, by its norm.
    ///
    /// # Errors
    /// `ShapeMismatch` or `TooLarge` if the arguments do not fit each other; `Driver`.
    ///
    /// # Panics
    /// If `x` or a vector of the norm does not start on a 16-byte boundary.
    pub fn route(
        &self,
        experts: &Experts,
        x: View<'_, f32>,
        norm: Option<Norm<'_>>,
        m: usize,
        routed: &mut Routed,
    ) -> Result<()> {
        let Experts { spec, router, router_bias, correction, share, .. } = experts;
        let n = experts.hidden_size();
        routed.check(spec, m)?;
        check_room("inputs", x, m * n)?;
        check_equal("channels", n, n.next_multiple_of(4))?;
        if let Some(norm) = &norm {
            norm.check(n)?;
        }
        let vector = |vector: &Option<Buffer<f32>>| {
            vector.as_ref().map_or(0, |vector| self.input(vector.view()))
        };
        let arch::Routing { scores, normalizes, sharpness, scale, .. } = spec.routing;
        let router = RouterArgs {
            weight: self.input(router.view()),
            bias: vector(router_bias),
            correction: vector(correction),
            share: vector(share),
            count: spec.count.into(),
            used: spec.used.into(),
            scoring: match scores {
                arch::Scores::Softmax => 0,
                arch::Scores::Sigmoid => 1,
            },
            normalizes: normalizes.into(),
            sharpness,
            scale,
        };
        let norm = norm.map_or(NormArgs::default(), |norm| self.norm_args(Some(norm)));
        let (x, width, counter) = (self.vector_input(x), n as u32, self.counter());
        let scores = self.output(&mut routed.scores.view_mut());
        let chosen = self.output(&mut routed.chosen.view_mut());
        let weights = self.output(&mut routed.weights.view_mut());
        let shares = self.output(&mut routed.shares.view_mut());
        let args = &mut [
            argument(&x),
            argument(&norm),
            argument(&width),
            argument(&router),
            argument(&scores),
            argument(&counter),
            argument(&chosen),
            argument(&weights),
            argument(&shares),
        ];
        let grid = [(usize::from(spec.count) + 1).div_ceil(ROUTE_WARPS), m, 1];
        // SAFETY: `route(x, norm, n, router, scores, counter, experts, weights, shares)`. x: m rows
        // of n, a multiple of 4; norm: of n channels; router: of n columns and `count` rows, with
        // vectors of as many, which `used` does not exceed (`Experts::upload`); scores, experts,
        // weights, shares: of m tokens (`Routed::check`); counter: zero.
        unsafe { self.launch(&self.kernels.route, grid, ROUTE_WARPS as u32 * 32, 0, args) }
    }

    /// The neurons of the experts that [`Self::route`] chose for m tokens, whose normed inputs are
    /// `x`.
    ///
    /// # Errors
    /// As [`Self::route`]; `UnsupportedActivation`.
    pub fn expert_neurons(
        &self,
        experts: &Experts,
        x: &Operands,
        m: usize,
        routed: &mut Routed,
    ) -> Result<()> {
        let spec = &experts.spec;
        routed.check(spec, m)?;
        check_operands(x, experts.hidden_size(), m)?;
        let [gate, up] = &experts.neurons;
        let args = ExpertProductArgs {
            layer: self.expert_layer(gate),
            up: self.expert_layer(up),
            experts: self.input(routed.chosen.view()),
            weights: self.input(routed.weights.view()),
            input: self.input(x.values.view()),
            stride: x.stride() as u32,
            neuron_stride: routed.neurons.stride() as u32,
            neurons: self.output(&mut routed.neurons.values.view_mut()),
            used: spec.used.into(),
            rows: spec.ffn.width as u32,
            activation: code_of(spec.ffn.activation)?,
            ..ExpertProductArgs::default()
        };
        self.multiply_experts(gate, [spec.used.into(), m], &args)
    }

    /// `x[t] += scale * sum of what the experts of token t make of their neurons`, `[m, hidden]`.
    ///
    /// # Errors
    /// As [`Self::route`].
    pub fn add_experts(
        &self,
        experts: &Experts,
        routed: &Routed,
        m: usize,
        scale: f32,
        x: &mut ViewMut<'_, f32>,
    ) -> Result<()> {
        let (spec, n) = (&experts.spec, experts.hidden_size());
        routed.check(spec, m)?;
        check_room("sums", x.as_view(), m * n)?;
        let args = ExpertProductArgs {
            layer: self.expert_layer(&experts.down),
            experts: self.input(routed.chosen.view()),
            input: self.input(routed.neurons.values.view()),
            stride: routed.neurons.stride() as u32,
            x: self.output(x),
            used: spec.used.into(),
            rows: n as u32,
            scale,
            ..ExpertProductArgs::default()
        };
        self.multiply_experts(&experts.down, [1, m], &args)
    }

    /// Multiplies the first m rows of `x` with the shares that [`Self::route`] found.
    ///
    /// # Errors
    /// `ShapeMismatch` if there are fewer; `TooLarge` for more tokens than were routed; `Driver`.
    pub fn weigh_rows(&self, x: &mut Operands, routed: &Routed, m: usize) -> Result<()> {
        x.check(m)?;
        check_limit("tokens", m, routed.shares.len())?;
        let (stride, weights) = (x.stride() as u32, self.input(routed.shares.view()));
        let x = self.output(&mut x.values.view_mut());
        let grid = [(stride as usize).div_ceil(ELEMENTS), m, 1];
        let args = &mut [argument(&x), argument(&stride), argument(&weights)];
        // SAFETY: `weigh_rows(x, stride, weights)`. x: m rows of `stride`; weights: m.
        unsafe { self.launch(&self.kernels.weigh_rows, grid, ELEMENTS as u32, 0, args) }
    }

    fn multiply_experts(
        &self,
        layer: &ExpertLayer,
        [slots, m]: [usize; 2],
        args: &ExpertProductArgs,
    ) -> Result<()> {
        let matrix = &layer.matrices[0];
        let (kernel, strips) = call_of_kind!(matrix.kind(), self.expert_kernel(matrix));
        // SAFETY: `experts_*(ExpertProduct args)`. layer, up: bands of the kernel's kind, of all
        // experts, whose shapes are those of the first (`Experts::upload`), with `rows` rows;
        // experts: `used` of m tokens, all below their number (`route`); in, neurons, x: m rows, or
        // m * used, as the callers have checked.
        unsafe { self.launch(kernel, [strips, slots, m], 256, 0, &mut [argument(args)]) }
    }

    fn expert_kernel<K: Kind>(&self, matrix: &Matrix) -> (&Kernel, usize) {
        let strips = matrix.rows().div_ceil(K::STRIP_TILES * TILE_ROWS);
        (K::experts(self), strips)
    }

    /// What the kernels take of a layer. A graph keeps its matrices.
    fn expert_layer(&self, layer: &ExpertLayer) -> ExpertLayerArgs {
        if self.is_capturing() {
            for matrix in &layer.matrices {
                self.band_table(matrix);
            }
        }
        ExpertLayerArgs {
            bands: self.input(layer.bands.view()),
            first: self.input(layer.first.view()),
        }
    }

    /// The bands of a matrix as they lie in device memory. A graph that is being captured keeps
    /// them.
    pub(in crate::cuda) fn band_table(&self, matrix: &Matrix) -> Vec<u8> {
        call_of_kind!(matrix.kind(), self.band_bytes(matrix))
    }

    fn band_bytes<K: Kind>(&self, matrix: &Matrix) -> Vec<u8> {
        let bands = self.bands::<K>(matrix, 0);
        bands.into_iter().flat_map(BandArgs::to_bytes).collect()
    }
}
