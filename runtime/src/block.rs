//! One transformer block, cut where a linear layer's input is ready: execution calls the stages one
//! after the other, calibration quantizes between them.

use slim_formats::{
    Decoder, FormatError, ModelSource, Part, PartMap, Weight,
    arch::{BlockSpec, ExpertPart, Ffn, Norm, Stage, Tensor},
};
use slim_kernels::{Backend, weight};

use crate::{
    Positions, Result, State,
    router::{Route, routes, shares, weigh},
};

/// What every stage needs.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// What the model computes.
    pub decoder: &'a Decoder,
    /// Where the operations run.
    pub backend: &'a dyn Backend,
}

/// Consecutive tokens of one text, among those that go through a block together.
pub struct Passage<'a> {
    /// Where they stand in the text.
    pub positions: &'a Positions,
    /// What the block keeps of every position before, or the block that it shares with.
    pub state: &'a mut State,
    /// What its tokens say to the block by themselves, `[count, embedded]`; empty if they do not.
    pub embedded: &'a [f32],
}

/// A block: what it computes, and its weights.
#[derive(Clone)]
pub struct Block<'a> {
    /// What it computes.
    pub spec: BlockSpec,
    /// The linear layers, `[rows, cols]`.
    pub layers: PartMap<Weight<'a>>,
    /// What has no columns; of a convolution the taps, `[taps, channels]`.
    pub vectors: PartMap<Vec<f32>>,
}

impl<'a> Block<'a> {
    /// Finds the tensors of block `index`.
    ///
    /// # Errors
    /// `Malformed` if one is missing or has the wrong shape.
    pub fn load(source: &'a dyn ModelSource, index: usize) -> Result<Self> {
        let decoder = source.decoder();
        let (mut layers, mut vectors) = (PartMap::new(), PartMap::new());
        for tensor in decoder.tensors_of(index) {
            match tensor.part {
                Part::Convolution => vectors.insert(tensor.part, find_taps(source, tensor)?),
                part if tensor.is_matrix() => layers.insert(part, find_weight(source, tensor)?),
                part => vectors.insert(part, find_vector(source, tensor)?),
            }
        }
        Ok(Self { spec: decoder.blocks[index], layers, vectors })
    }

    /// Bytes of weights that one token reads.
    pub(crate) fn bytes_per_token(&self) -> u64 {
        let bytes = |is_of_expert: bool| -> u64 {
            let layers = self.layers.iter();
            let alike = layers.filter(|(part, _)| matches!(part, Part::Expert(..)) == is_of_expert);
            alike.map(|(_, &layer)| weight::stored_bytes(layer)).sum()
        };
        let of_experts = self
            .spec
            .experts
            .map_or(0, |experts| bytes(true) * u64::from(experts.used) / u64::from(experts.count));
        bytes(false) + of_experts
    }

    /// The whole block: `x: [m, hidden]`, the tokens of all `passages`, is updated in place.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn forward(
        &self,
        context: Context<'_>,
        x: &mut [f32],
        passages: &mut [Passage<'_>],
    ) -> Result<()> {
        let normed = self.input(Stage::Mixer, context, x, passages)?;
        let attended = self.input(Stage::MixerOutput, context, &normed, passages)?;
        self.add(Stage::MixerOutput, context, &attended, x)?;
        self.add_networks(context, x, passages)?;
        if self.spec.embedded.is_some() {
            let gated = self.input(Stage::EmbeddedOutput, context, x, passages)?;
            self.add(Stage::EmbeddedOutput, context, &gated, x)?;
        }
        self.finish(x);
        Ok(())
    }

    /// Adds what the networks of the block make of the residual stream `x` to it.
    fn add_networks(
        &self,
        context: Context<'_>,
        x: &mut [f32],
        passages: &mut [Passage<'_>],
    ) -> Result<()> {
        let normed = self.input(Stage::Ffn, context, x, passages)?;
        let neurons = match self.spec.ffn {
            Some(_) => Some(self.input(Stage::FfnOutput, context, &normed, passages)?),
            None => None,
        };
        let add_beside = |x: &mut [f32]| match &neurons {
            Some(neurons) => self.add(Stage::FfnOutput, context, neurons, x),
            None => Ok(()),
        };
        if !self.spec.has_expert_norms() {
            add_beside(x)?;
            return self.add_experts(context, &self.routes(context, &normed)?, &normed, x);
        }
        let to_router = self.input(Stage::Router, context, x, passages)?;
        let to_experts = self.input(Stage::Experts, context, x, passages)?;
        let [mut beside, mut experts] = [vec![0.0; x.len()], vec![0.0; x.len()]];
        add_beside(&mut beside)?;
        let routes = self.routes(context, &to_router)?;
        self.add_experts(context, &routes, &to_experts, &mut experts)?;
        self.join(context, beside, &experts, x);
        Ok(())
    }

    /// Adds what the experts of `routes` make of their `input: [m, hidden]` to `x`.
    fn add_experts(
        &self,
        context: Context<'_>,
        routes: &[Route],
        input: &[f32],
        x: &mut [f32],
    ) -> Result<()> {
        for (index, route) in (0..).zip(routes) {
            if !route.tokens.is_empty() {
                let input = route.gather(input, context.decoder.hidden_size);
                let neurons = self.expert_neurons(index, context, &input, &route.weights)?;
                self.add_expert(index, context, &neurons, route, x)?;
            }
        }
        Ok(())
    }

    /// Adds to the residual stream `x` what `experts` with norms of their own give, and the network
    /// `beside` them, whose norm it is behind.
    pub fn join(&self, context: Context<'_>, beside: Vec<f32>, experts: &[f32], x: &mut [f32]) {
        let mut sum = beside;
        add(&mut sum, &self.normed(Part::ExpertsPostNorm, context, experts));
        let mut sum = self.normed(Part::FfnPostNorm, context, &sum);
        scale(&mut sum, self.spec.residual_scale);
        add(x, &sum);
    }

    /// What the block does at last to the residual stream `x`.
    pub fn finish(&self, x: &mut [f32]) {
        if let Some(factor) = self.vectors.get(Part::BlockScale) {
            scale(x, factor[0]);
        }
    }

    /// The input of a stage's layers, `[m, cols]`, made `from` the residual stream or from the
    /// input of the stage before, whichever the stage reads. Its tokens are those of all
    /// `passages`, one behind the other, and go through each layer together. Only the mixer tells
    /// passages apart: each has a state of its own.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    ///
    /// # Panics
    /// For a stage of an expert: [`Self::routes`] tells its tokens.
    pub fn input(
        &self,
        stage: Stage,
        context: Context<'_>,
        from: &[f32],
        passages: &mut [Passage<'_>],
    ) -> Result<Vec<f32>> {
        match stage {
            Stage::Query => self.query_input(context, from),
            Stage::Latent => Ok(self.latents(context, from)?.0),
            Stage::MixerOutput => self.mix(context, from, passages),
            Stage::FfnOutput => self.neurons(context, from),
            Stage::EmbeddedOutput => self.gated_embedded(context, from, passages),
            Stage::Mixer | Stage::Ffn | Stage::Router | Stage::Experts | Stage::Embedded => {
                match stage.norm() {
                    Some(norm) if self.spec.has(norm) => Ok(self.normed(norm, context, from)),
                    _ => Ok(from.to_vec()),
                }
            }
            Stage::Expert(_) | Stage::ExpertOutput(_) => panic!("{stage:?} has tokens of its own"),
        }
    }

    /// Which tokens of `input: [m, hidden]`, that of the router's stage, go through which expert: a
    /// route for each expert, none in a block without experts.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn routes(&self, context: Context<'_>, input: &[f32]) -> Result<Vec<Route>> {
        let Some(experts) = self.spec.experts else { return Ok(Vec::new()) };
        let mut outputs = self.linear(Part::Router, context, input)?;
        let vector = |part| self.vectors.get(part).map(Vec::as_slice);
        let (correction, scales) = (vector(Part::RouterCorrection), vector(Part::ExpertScale));
        Ok(routes(&experts, &mut outputs, correction, scales))
    }

    /// What the `passages` say to the block, gated by the residual stream `x`: `[m, embedded]`.
    fn gated_embedded(
        &self,
        context: Context<'_>,
        x: &[f32],
        passages: &[Passage<'_>],
    ) -> Result<Vec<f32>> {
        let mut gate = self.linear(Part::EmbeddedGate, context, x)?;
        let embedded: Vec<&[f32]> = passages.iter().map(|passage| passage.embedded).collect();
        context.backend.gated(self.spec.activation(), &mut gate, &embedded.concat());
        Ok(gate)
    }

    /// The activations of an expert's neurons for the `input: [n, hidden]` of its tokens, times
    /// their `weights`: `[n, neurons]`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    ///
    /// # Panics
    /// If the block has no experts.
    pub fn expert_neurons(
        &self,
        index: u16,
        context: Context<'_>,
        input: &[f32],
        weights: &[f32],
    ) -> Result<Vec<f32>> {
        let ffn = self.spec.experts.expect("a block with experts").ffn;
        let [gate, up] = [ExpertPart::Gate, ExpertPart::Up].map(|part| Part::Expert(index, part));
        let mut neurons = self.activate(&ffn, gate, up, context, input)?;
        weigh(&mut neurons, weights);
        Ok(neurons)
    }

    /// Adds what an expert makes of the weighted `neurons: [n, neurons]` of its tokens to their
    /// rows of the residual stream `x`.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    pub fn add_expert(
        &self,
        index: u16,
        context: Context<'_>,
        neurons: &[f32],
        route: &Route,
        x: &mut [f32],
    ) -> Result<()> {
        let part = Part::Expert(index, ExpertPart::Down);
        let mut added = linear(context, self.layers[part], neurons)?;
        if let Some(bias) = part.bias().and_then(|bias| self.vectors.get(bias)) {
            route.add_bias(bias, &mut added);
        }
        route.scatter(&added, self.spec.scale_of(Stage::ExpertOutput(index)), x);
        Ok(())
    }

    /// Adds what the layer of a stage makes of its `input` to `x`: the residual stream, or what
    /// [`Self::join`] takes.
    ///
    /// # Errors
    /// A kernel refuses its arguments.
    ///
    /// # Panics
    /// If the stage does not add to it, or is an expert's.
    pub fn add(
        &self,
        stage: Stage,
        context: Context<'_>,
        input: &[f32],
        x: &mut [f32],
    ) -> Result<()> {
        let part = self.spec.output_layer(stage).expect("a stage that adds");
        let mut added = self.linear(part, context, input)?;
        if let Some(norm) = self.spec.branch_norm(stage) {
            added = self.normed(norm, context, &added);
        }
        scale(&mut added, self.spec.scale_of(stage));
        add(x, &added);
        if let Some(norm) = self.spec.sum_norm(stage) {
            x.copy_from_slice(&self.normed(norm, context, x));
        }
        Ok(())
    }

    /// A linear layer with its bias, `[m, cols]` to `[m, rows]`.
    pub(crate) fn linear(&self, part: Part, context: Context<'_>, x: &[f32]) -> Result<Vec<f32>> {
        let [y] = self.linears([part], context, x)?;
        Ok(y)
    }

    /// Linear layers with their biases that have the same input.
    pub(crate) fn linears<const L: usize>(
        &self,
        parts: [Part; L],
        context: Context<'_>,
        x: &[f32],
    ) -> Result<[Vec<f32>; L]> {
        let weights = parts.map(|part| self.layers[part]);
        let mut ys = linears(context, weights, x)?;
        for (part, y) in parts.iter().zip(&mut ys) {
            if let Some(bias) = part.bias().and_then(|bias| self.vectors.get(bias)) {
                y.chunks_exact_mut(bias.len()).for_each(|y| add(y, bias));
            }
        }
        Ok(ys)
    }

    fn normed(&self, part: Part, context: Context<'_>, x: &[f32]) -> Vec<f32> {
        let bias = part.bias().and_then(|bias| self.vectors.get(bias));
        norm(context, self.spec.norm, x, &self.vectors[part], bias.map(Vec::as_slice))
    }

    /// The activations of neurons; of a network that shares its tokens with experts, times its
    /// share of each.
    fn neurons(&self, context: Context<'_>, input: &[f32]) -> Result<Vec<f32>> {
        let ffn = self.spec.ffn.expect("a block with such a network");
        let mut neurons = self.activate(&ffn, Part::FfnGate, Part::FfnUp, context, input)?;
        if let Some(share) = self.vectors.get(Part::FfnShare) {
            weigh(&mut neurons, &shares(share, input));
        }
        Ok(neurons)
    }

    /// The activations of the neurons of a network.
    fn activate(
        &self,
        ffn: &Ffn,
        gate: Part,
        up: Part,
        context: Context<'_>,
        input: &[f32],
    ) -> Result<Vec<f32>> {
        if !ffn.is_gated {
            let mut up = self.linear(up, context, input)?;
            context.backend.activate(ffn.activation, &mut up);
            return Ok(up);
        }
        let [mut gate, up] = self.linears([gate, up], context, input)?;
        context.backend.gated(ffn.activation, &mut gate, &up);
        Ok(gate)
    }
}

/// `[m, cols]` to `[m, rows]`.
pub(crate) fn linear(context: Context<'_>, w: Weight<'_>, x: &[f32]) -> Result<Vec<f32>> {
    let [out] = linears(context, [w], x)?;
    Ok(out)
}

/// The same for weights with the same input.
fn linears<const L: usize>(
    context: Context<'_>,
    weights: [Weight<'_>; L],
    x: &[f32],
) -> Result<[Vec<f32>; L]> {
    let m = x.len() / weight::shape(weights[0]).1;
    let mut outs = weights.map(|w| vec![0.0; m * weight::shape(w).0]);
    context.backend.matmul_each(&weights, x, m, &mut outs.each_mut().map(Vec::as_mut_slice))?;
    Ok(outs)
}

/// `x` normed in pieces as long as `weight`; [`Norm::Layer`] has a bias.
pub(crate) fn norm(
    context: Context<'_>,
    norm: Norm,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let (backend, epsilon) = (context.backend, context.decoder.norm_epsilon);
    let mut out = vec![0.0; x.len()];
    match (norm, bias) {
        (Norm::Layer, Some(bias)) => backend.layer_norm(x, weight, bias, epsilon, &mut out),
        _ => backend.rms_norm(x, weight, epsilon, &mut out),
    }
    out
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

pub(crate) fn scale(x: &mut [f32], factor: f32) {
    if factor != 1.0 {
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

/// A tensor of the model, which must have its shape.
///
/// # Errors
/// `Malformed` if it is missing or has another shape.
pub fn find_weight<'a>(source: &'a dyn ModelSource, tensor: &Tensor) -> Result<Weight<'a>> {
    let (rows, cols) = tensor.shape();
    let place = format!("tensor `{}`", tensor.name);
    let expected = format!("[{rows}, {cols}] by the model's hyperparameters");
    let malformed =
        |found: String| FormatError::malformed(source.path(), place, "", found, expected);
    let Some(found) = source.tensor(&tensor.name)? else {
        return Err(malformed("none".into()).into());
    };
    match weight::shape(found) {
        shape if shape == (rows, cols) => Ok(found),
        (rows, cols) => Err(malformed(format!("[{rows}, {cols}]")).into()),
    }
}

/// A vector of the model as f32.
///
/// # Errors
/// As [`find_weight`]; `UnsupportedType` if it holds no numbers.
pub fn find_vector(source: &dyn ModelSource, tensor: &Tensor) -> Result<Vec<f32>> {
    let found = find_weight(source, tensor)?;
    let mut values = vec![0.0; tensor.dims[0]];
    weight::dequantize_rows(found, 0..1, &mut values)?;
    Ok(values)
}

/// The taps of a convolution as f32, `[taps, channels]`.
fn find_taps(source: &dyn ModelSource, tensor: &Tensor) -> Result<Vec<f32>> {
    let found = find_weight(source, tensor)?;
    let (channels, taps) = tensor.shape();
    let mut values = vec![0.0; channels * taps];
    weight::dequantize_rows(found, 0..channels, &mut values)?;
    let value = |tap: usize, channel: usize| values[channel * taps + tap];
    let rows = (0..taps).map(|tap| (0..channels).map(move |channel| (tap, channel)));
    Ok(rows.flatten().map(|(tap, channel)| value(tap, channel)).collect())
}
