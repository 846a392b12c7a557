//! Feed-forward networks on their way forward and back: the one of all tokens, and the experts of
//! which each token goes through some.

use rayon::prelude::*;
use slim_formats::{
    Part,
    arch::{Activation, ExpertPart, Experts, Ffn, Scores, Stage},
};
use slim_kernels::{Backend, Cpu};
use slim_runtime::{Route, routes, shares, weigh};

use super::{Visitor, block::Walk, elementwise};
use crate::Result;

/// The layers of a network.
#[derive(Clone, Copy)]
pub struct Layers {
    gate: Part,
    up: Part,
    down: Part,
}

impl Layers {
    /// Of the network of all tokens.
    pub const OF_ALL: Self = Self { gate: Part::FfnGate, up: Part::FfnUp, down: Part::FfnDown };

    fn of_expert(index: u16) -> Self {
        let [gate, up, down] = [ExpertPart::Gate, ExpertPart::Up, ExpertPart::Down]
            .map(|part| Part::Expert(index, part));
        Self { gate, up, down }
    }
}

/// The activations of a network's `n` tokens.
pub struct Neurons {
    /// `[n, neurons]`, of networks with a gate.
    gate: Option<Vec<f32>>,
    /// `[n, neurons]`.
    up: Vec<f32>,
    /// `[n, neurons]`, times the weights of their tokens: input of the last layer.
    weighted: Vec<f32>,
    /// `[n]`, of networks whose tokens have weights.
    weights: Option<Vec<f32>>,
}

impl Neurons {
    /// The input of the last layer, `[n, neurons]`.
    pub fn output(&self) -> &[f32] {
        &self.weighted
    }
}

/// The experts of a block, for all `m` tokens.
pub struct Mixture {
    /// `[m, experts]`.
    scores: Vec<f32>,
    routes: Vec<Route>,
    /// Of each expert that has tokens: its input, and its neurons.
    networks: Vec<Option<(Vec<f32>, Neurons)>>,
}

impl Walk<'_> {
    /// The network of all tokens, for its `input: [m, hidden]`, if the block has one.
    pub fn network(&self, input: &[f32]) -> Result<Option<Neurons>> {
        let Some(ffn) = self.block.spec.ffn else { return Ok(None) };
        let share = self.block.vectors.get(Part::FfnShare);
        let weights = share.map(|share| shares(share, input));
        Ok(Some(self.neurons(&ffn, Layers::OF_ALL, input, weights)?))
    }

    /// Adds the gradient at the `input` of the network of all tokens to `d_input`, for the gradient
    /// `dy` at its output; all `[m, hidden]`.
    pub fn reverse_network(
        &self,
        neurons: Neurons,
        input: &[f32],
        dy: &[f32],
        d_input: &mut [f32],
        visit: &mut Visitor<'_>,
    ) -> Result<()> {
        let ffn = self.block.spec.ffn.expect("a block with such a network");
        let shares = neurons.weights.clone();
        let d_shares =
            self.reverse_neurons(&ffn, Layers::OF_ALL, neurons, input, dy, d_input, visit)?;
        let Some(vector) = self.block.vectors.get(Part::FfnShare) else { return Ok(()) };
        for ((dx, share), d_share) in
            d_input.chunks_exact_mut(vector.len()).zip(shares.into_iter().flatten()).zip(d_shares)
        {
            let slope = d_share * share * (1.0 - share);
            dx.iter_mut().zip(vector).for_each(|(dx, w)| *dx += slope * w);
        }
        Ok(())
    }

    /// The experts for their `input: [m, hidden]` and that of their router, if the block has some.
    pub fn mixture(&self, to_router: &[f32], input: &[f32]) -> Result<Option<Mixture>> {
        let Some(experts) = self.block.spec.experts else { return Ok(None) };
        let mut scores = self.product(Part::Router, to_router)?;
        let vector = |part| self.block.vectors.get(part).map(Vec::as_slice);
        let (correction, scales) = (vector(Part::RouterCorrection), vector(Part::ExpertScale));
        let routes = routes(&experts, &mut scores, correction, scales);
        let networks = (0..).zip(&routes).map(|(index, route)| -> Result<_> {
            if route.tokens.is_empty() {
                return Ok(None);
            }
            let input = route.gather(input, self.decoder.hidden_size);
            let (layers, weights) = (Layers::of_expert(index), Some(route.weights.clone()));
            let neurons = self.neurons(&experts.ffn, layers, &input, weights)?;
            Ok(Some((input, neurons)))
        });
        let networks = networks.collect::<Result<_>>()?;
        Ok(Some(Mixture { scores, routes, networks }))
    }

    /// Adds what the experts give to `x: [m, hidden]`.
    pub fn add_mixture(&self, mixture: &Mixture, x: &mut [f32]) -> Result<()> {
        let networks = (0..).zip(mixture.networks.iter().zip(&mixture.routes));
        for (index, (network, route)) in networks {
            let Some((_, neurons)) = network else { continue };
            let down = Layers::of_expert(index).down;
            let mut output = self.product_without_bias(down, &neurons.weighted)?;
            if let Some(bias) = self.bias(down) {
                route.add_bias(bias, &mut output);
            }
            route.scatter(&output, self.block.spec.scale_of(Stage::ExpertOutput(index)), x);
        }
        Ok(())
    }

    /// Adds the gradient at the input of the experts to `d_input`, for the gradient `dy` at what
    /// they give; gives that at the outputs of their router, `[m, experts]`.
    pub fn reverse_mixture(
        &self,
        mixture: Mixture,
        dy: &[f32],
        d_input: &mut [f32],
        visit: &mut Visitor<'_>,
    ) -> Result<Vec<f32>> {
        let experts = self.block.spec.experts.expect("a block with experts");
        let hidden = self.decoder.hidden_size;
        let Mixture { mut scores, routes, networks } = mixture;
        // At the weights of chosen experts, [m, experts].
        let mut d_weights = vec![0.0; scores.len()];
        for (index, (network, route)) in (0..).zip(networks.into_iter().zip(&routes)) {
            let Some((input, neurons)) = network else { continue };
            let (layers, dy) = (Layers::of_expert(index), route.gather(dy, hidden));
            let mut dx = vec![0.0; input.len()];
            let of_tokens =
                self.reverse_neurons(&experts.ffn, layers, neurons, &input, &dy, &mut dx, visit)?;
            route.scatter(&dx, 1.0, d_input);
            let scales = self.block.vectors.get(Part::ExpertScale);
            let scale = scales.map_or(1.0, |scales| scales[usize::from(index)]);
            for (&token, d_weight) in route.tokens.iter().zip(of_tokens) {
                d_weights[token * routes.len() + usize::from(index)] = scale * d_weight;
            }
        }
        let chosen = chosen_of_tokens(&routes, scores.len() / routes.len());
        let tokens =
            scores.chunks_exact_mut(routes.len()).zip(d_weights.chunks_exact(routes.len()));
        for ((scores, d_weights), chosen) in tokens.zip(chosen) {
            reverse_weights(&experts, scores, d_weights, &chosen);
        }
        Ok(scores)
    }

    /// The neurons of a network for its `input: [n, hidden]`, times the `weights` of its tokens.
    fn neurons(
        &self,
        ffn: &Ffn,
        layers: Layers,
        input: &[f32],
        weights: Option<Vec<f32>>,
    ) -> Result<Neurons> {
        let up = self.product(layers.up, input)?;
        let gate = match ffn.is_gated {
            true => Some(self.product(layers.gate, input)?),
            false => None,
        };
        let mut weighted = activated(ffn.activation, gate.as_deref(), &up);
        if let Some(weights) = &weights {
            weigh(&mut weighted, weights);
        }
        Ok(Neurons { gate, up, weighted, weights })
    }

    /// Adds the gradient at the `input` of a network to `d_input`, for the gradient `dy` at what
    /// its last layer gives; gives the gradient at the weights of its tokens, if they have any.
    #[expect(clippy::too_many_arguments, reason = "a network, what went through it, and back")]
    fn reverse_neurons(
        &self,
        ffn: &Ffn,
        layers: Layers,
        neurons: Neurons,
        input: &[f32],
        dy: &[f32],
        d_input: &mut [f32],
        visit: &mut Visitor<'_>,
    ) -> Result<Vec<f32>> {
        let Neurons { gate, up, weighted, weights } = neurons;
        visit(self.linear(layers.down, &weighted, dy))?;
        let mut d_neurons = weighted;
        d_neurons.fill(0.0);
        self.add_product(&mut d_neurons, dy, layers.down)?;
        let d_weights = match weights {
            None => Vec::new(),
            Some(weights) => {
                let plain = activated(ffn.activation, gate.as_deref(), &up);
                let mut d_weights = products(&plain, &d_neurons, ffn.width);
                if let Some(bias) = self.bias(layers.down) {
                    let of_bias =
                        dy.chunks_exact(bias.len()).map(|dy| products(bias, dy, bias.len()));
                    d_weights.iter_mut().zip(of_bias.flatten()).for_each(|(d, bias)| *d += bias);
                }
                weigh(&mut d_neurons, &weights);
                d_weights
            }
        };
        let (d_gate, d_up) = reverse_activation(ffn.activation, gate, up, d_neurons);
        let of_layers = [(layers.gate, d_gate.as_deref()), (layers.up, Some(&d_up[..]))];
        let of_layers = of_layers.map(|(part, dy)| dy.map(|dy| (part, dy)));
        for (part, dy) in of_layers.into_iter().flatten() {
            visit(self.linear(part, input, dy))?;
        }
        for (part, dy) in of_layers.into_iter().flatten() {
            self.add_product(d_input, dy, part)?;
        }
        Ok(d_weights)
    }
}

/// The activations of neurons.
fn activated(activation: Activation, gate: Option<&[f32]>, up: &[f32]) -> Vec<f32> {
    match gate {
        Some(gate) => {
            let mut neurons = gate.to_vec();
            Cpu.gated(activation, &mut neurons, up);
            neurons
        }
        None => {
            let mut neurons = up.to_vec();
            Cpu.activate(activation, &mut neurons);
            neurons
        }
    }
}

/// The product of each row of `a` with that of `b`, both `[n, width]`.
fn products(a: &[f32], b: &[f32], width: usize) -> Vec<f32> {
    let rows = a.chunks_exact(width).zip(b.chunks_exact(width));
    rows.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a * b).sum()).collect()
}

/// The experts of each of `count` tokens.
fn chosen_of_tokens(routes: &[Route], count: usize) -> Vec<Vec<usize>> {
    let mut chosen = vec![Vec::new(); count];
    for (expert, route) in routes.iter().enumerate() {
        route.tokens.iter().for_each(|&token| chosen[token].push(expert));
    }
    chosen
}

/// Turns the `scores` of a token into the gradient at the outputs of its router, for the gradient
/// at the weights of its `chosen` experts, before scales of their own.
///
/// Which experts are chosen has no gradient.
fn reverse_weights(experts: &Experts, scores: &mut [f32], d_weights: &[f32], chosen: &[usize]) {
    let routing = &experts.routing;
    let mut d_scores = vec![0.0; scores.len()];
    let (sum, mean) = match routing.normalizes {
        true => {
            let sum: f32 = chosen.iter().map(|&expert| scores[expert]).sum();
            let along =
                chosen.iter().map(|&expert| d_weights[expert] * scores[expert]).sum::<f32>();
            (sum, along / sum)
        }
        false => (1.0, 0.0),
    };
    for &expert in chosen {
        d_scores[expert] = routing.scale * (d_weights[expert] - mean) / sum;
    }
    match routing.scores {
        Scores::Sigmoid => {
            let pairs = scores.iter_mut().zip(&d_scores);
            pairs.for_each(|(score, d_score)| *score *= (1.0 - *score) * d_score);
        }
        Scores::Softmax => {
            let mean: f32 = scores.iter().zip(&d_scores).map(|(score, d)| score * d).sum();
            let pairs = scores.iter_mut().zip(&d_scores);
            pairs.for_each(|(score, d_score)| *score *= d_score - mean);
        }
    }
    scores.iter_mut().for_each(|score| *score *= routing.sharpness);
}

/// The gradients at `gate`, if there is one, and `up`, for the gradient `dy` at the activations;
/// all of one length.
fn reverse_activation(
    activation: Activation,
    gate: Option<Vec<f32>>,
    mut up: Vec<f32>,
    mut dy: Vec<f32>,
) -> (Option<Vec<f32>>, Vec<f32>) {
    const PIECE: usize = 1 << 12;
    let Some(mut gate) = gate else {
        let pieces = dy.par_chunks_mut(PIECE).zip(up.par_chunks(PIECE));
        pieces.for_each(|(dy, up)| elementwise::reverse_activation(activation, up, dy));
        return (None, dy);
    };
    let pieces = gate.par_chunks_mut(PIECE).zip(up.par_chunks_mut(PIECE)).zip(dy.par_chunks(PIECE));
    pieces.for_each(|((gate, up), dy)| elementwise::reverse_gated(activation, gate, up, dy));
    (Some(gate), up)
}

#[cfg(test)]
mod tests {
    use slim_formats::arch::Routing;

    use super::*;

    /// The weights of chosen experts among the outputs of a router, as the formulas read.
    fn weights(routing: &Routing, outputs: &[f64], chosen: &[usize]) -> Vec<f64> {
        let outputs: Vec<f64> = outputs.iter().map(|x| f64::from(routing.sharpness) * x).collect();
        let sum: f64 = outputs.iter().map(|x| x.exp()).sum();
        let score = |x: f64| match routing.scores {
            Scores::Softmax => x.exp() / sum,
            Scores::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        };
        let of_chosen: f64 = chosen.iter().map(|&expert| score(outputs[expert])).sum();
        let divisor = if routing.normalizes { of_chosen } else { 1.0 };
        let scale = f64::from(routing.scale);
        chosen.iter().map(|&expert| scale * score(outputs[expert]) / divisor).collect()
    }

    #[test]
    fn gradients_of_weights_are_finite_differences() {
        const STEP: f64 = 1e-5;
        let outputs = [0.3, -1.2, 0.8, 0.1, 2.0];
        let (chosen, d_weights) = ([1, 2, 4], [0.0, 0.7, -0.4, 0.0, 1.1]);
        let ffn = Ffn { width: 8, activation: Activation::Silu, is_gated: true, has_bias: false };
        for scores in [Scores::Softmax, Scores::Sigmoid] {
            for normalizes in [false, true] {
                let (has_bias, is_corrected, groups, scale) = (false, false, None, 1.5);
                let sharpness = 0.5;
                let routing = Routing {
                    sharpness,
                    scores,
                    has_bias,
                    is_corrected,
                    groups,
                    normalizes,
                    scale,
                };
                let (count, used) = (5, 3);
                let (shares, has_norms, are_fused, are_mxfp4) = (false, false, false, false);
                let experts =
                    Experts { count, used, ffn, routing, shares, has_norms, are_fused, are_mxfp4 };
                let sharp = outputs.map(|x| f64::from(sharpness) * x);
                let sum: f64 = sharp.iter().map(|x| x.exp()).sum();
                let mut found: Vec<f32> = sharp
                    .iter()
                    .map(|x| match scores {
                        Scores::Softmax => (x.exp() / sum) as f32,
                        Scores::Sigmoid => (1.0 / (1.0 + (-x).exp())) as f32,
                    })
                    .collect();
                reverse_weights(&experts, &mut found, &d_weights, &chosen);
                for (index, found) in found.iter().enumerate() {
                    let moved = |by: f64| -> f64 {
                        let mut outputs = outputs;
                        outputs[index] += by;
                        let weights = weights(&routing, &outputs, &chosen);
                        let along = |(&expert, w): (&usize, f64)| f64::from(d_weights[expert]) * w;
                        chosen.iter().zip(weights).map(along).sum()
                    };
                    let expected = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
                    assert!((f64::from(*found) - expected).abs() < 1e-5, "{routing:?}, {index}");
                }
            }
        }
    }
}
