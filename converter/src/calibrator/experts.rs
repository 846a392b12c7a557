//! The experts of a block, each calibrated on the tokens that go through it.

use slim_formats::{PartMap, arch::Stage};
use slim_runtime::{Block, Route};

use super::{Calibrator, Layer, Stream, Visitor, Walk, with_layers};
use crate::{
    Activations, Result,
    activations::{FloatInputs, StageInputs},
};

/// Tokens that tell enough about an expert; with fewer, what all tokens of the block would say
/// tells more.
pub const ENOUGH_TOKENS: usize = 64;

impl Calibrator<'_> {
    /// Leads `visitor` to the experts of a block, one after the other, and the samples through what
    /// it makes of them. `layers` are those of the block so far.
    ///
    /// Each is calibrated on the inputs that the router sends to it, times their weights, as the
    /// layers so far make them. The float model runs along by routes of its own; what an expert
    /// should give, it tells for the same tokens.
    pub(super) fn pass_experts(
        &mut self,
        index: usize,
        block: &Block<'_>,
        layers: &mut PartMap<Layer>,
        visitor: &mut dyn Visitor,
    ) -> Result<()> {
        if block.spec.has_expert_norms() {
            self.pass_stage(Stage::Router, index, block, layers, visitor)?;
        }
        let Self { engine, context, positions, stream, float, embedded, before } = self;
        let walk =
            Walk { engine, context: *context, positions, index, embedded: embedded.as_ref() };
        let tensor = |&part: &_| (context.decoder.tensor(index, part), block.layers[part]);
        let follows = before.is_none();
        let routes = stream.routes(walk, block)?;
        let float_routes = match float {
            Some(float) => float.stream.routes(walk, block)?,
            None => Vec::new(),
        };
        if block.spec.has_expert_norms() {
            stream.begin_experts(walk, block)?;
            if let Some(float) = float {
                float.stream.begin_experts(walk, block)?;
            }
        }
        for (expert, route) in (0..).zip(&routes) {
            visitor.expert(index, expert, route.tokens.len());
            let is_seldom = route.tokens.len() < ENOUGH_TOKENS;
            let seen = if is_seldom { all_tokens(&stream.normed) } else { route.clone() };
            let mut inputs = gathered(&stream.normed, &seen);
            let mut of_float = float.as_ref().map(|float| gathered(&float.stream.normed, &seen));
            for stage in [Stage::Expert(expert), Stage::ExpertOutput(expert)] {
                if let Stage::ExpertOutput(_) = stage {
                    let so_far = with_layers(block, layers);
                    let running = if follows { &so_far } else { block };
                    inputs = neurons(expert, walk, running, &inputs, &seen)?;
                    if let Some(of_float) = &mut of_float {
                        *of_float = neurons(expert, walk, block, of_float, &seen)?;
                    }
                }
                let parts = block.spec.layers_of(stage);
                let tensors: Vec<_> = parts.iter().map(tensor).collect();
                let float = of_float.as_ref();
                let float = float.map(|activations| FloatInputs { activations, missing: None });
                let inputs = StageInputs { activations: &inputs, float };
                let of_stage = visitor.stage(&tensors, inputs, engine)?;
                layers.extend(parts.into_iter().zip(of_stage));
            }
            let so_far = with_layers(block, layers);
            let running = if follows { &so_far } else { block };
            // What calibrated its last layer, if that was of its own tokens.
            let neurons = if is_seldom { None } else { Some(inputs) };
            stream.add_expert(expert, walk, running, route, neurons)?;
            if let Some(float) = float {
                let route = &float_routes[usize::from(expert)];
                float.stream.add_expert(expert, walk, block, route, None)?;
            }
        }
        if block.spec.has_expert_norms() {
            stream.join(walk, block)?;
            if let Some(float) = float {
                float.stream.join(walk, block)?;
            }
        }
        Ok(())
    }
}

/// A route for all tokens of `normed`, all of which count the same.
fn all_tokens(normed: &Activations) -> Route {
    let count = normed.tokens();
    Route { tokens: (0..count).collect(), weights: vec![1.0; count] }
}

/// The rows of a route's tokens, as samples of one token each.
fn gathered(normed: &Activations, route: &Route) -> Activations {
    let (rows, width) = (normed.batch(0..normed.samples()), normed.width());
    Activations::of_tokens(&route.gather(rows, width), width)
}

/// The weighted activations of an expert's neurons for its `inputs`.
fn neurons(
    expert: u16,
    walk: Walk<'_>,
    block: &Block<'_>,
    inputs: &Activations,
    route: &Route,
) -> Result<Activations> {
    let width = block.spec.experts.map_or(0, |experts| experts.ffn.width);
    let _held = walk.hold(Stage::Expert(expert), block)?;
    let mut neurons = Activations::of_tokens(&vec![0.0; inputs.samples() * width], width);
    neurons.fill(walk.engine, |batch| {
        let weights = &route.weights[batch.clone()];
        Ok(block.expert_neurons(expert, walk.context, inputs.batch(batch), weights)?)
    })?;
    Ok(neurons)
}

impl Stream {
    /// The routes of all tokens, counted through the samples.
    fn routes(&self, walk: Walk<'_>, block: &Block<'_>) -> Result<Vec<Route>> {
        let mut routes = Vec::new();
        let mut first = 0;
        for batch in self.normed.batches() {
            let normed = self.normed.batch(batch);
            let of_batch = block.routes(walk.context, normed)?;
            routes.resize(of_batch.len(), Route::default());
            for (route, of_batch) in routes.iter_mut().zip(of_batch) {
                route.tokens.extend(of_batch.tokens.iter().map(|token| first + token));
                route.weights.extend(of_batch.weights);
            }
            first += normed.len() / self.normed.width();
        }
        Ok(routes)
    }

    /// Adds what an expert gives for the tokens of its `route` to the residual stream, or to
    /// what is joined later; `known` are their neurons, where they have been computed.
    fn add_expert(
        &mut self,
        expert: u16,
        walk: Walk<'_>,
        block: &Block<'_>,
        route: &Route,
        known: Option<Activations>,
    ) -> Result<()> {
        if route.tokens.is_empty() {
            return Ok(());
        }
        let neurons = match known {
            Some(known) => known,
            None => neurons(expert, walk, block, &gathered(&self.normed, route), route)?,
        };
        let _held = walk.hold(Stage::ExpertOutput(expert), block)?;
        let neurons = neurons.batch(0..neurons.samples());
        let to = match &mut self.joint {
            Some([_, experts]) if block.spec.has_expert_norms() => experts,
            _ => &mut self.residual,
        };
        let to = to.batch_mut(0..to.samples());
        Ok(block.add_expert(expert, walk.context, neurons, route, to)?)
    }

    /// Makes the inputs of experts with a norm of their own, once tokens have been routed.
    fn begin_experts(&mut self, walk: Walk<'_>, block: &Block<'_>) -> Result<()> {
        self.enter(Stage::Experts, walk, block)?;
        let [_, experts] = self.joint.as_mut().expect("a model with such experts");
        let residual = &self.residual;
        experts.fill(walk.engine, |batch| Ok(vec![0.0; residual.batch(batch).len()]))
    }

    /// Adds to the residual stream what such experts and the network beside them have given.
    fn join(&mut self, walk: Walk<'_>, block: &Block<'_>) -> Result<()> {
        let [beside, experts] = self.joint.as_ref().expect("a model with such experts");
        self.residual.update(walk.engine, |batch, residual| {
            let beside = beside.batch(batch.clone()).to_vec();
            block.join(walk.context, beside, experts.batch(batch), residual);
            Ok(())
        })
    }
}
