//! The neurons of a feed-forward network, in the order of what the loss minds about them.
//!
//! Neuron `i` is row `i` of `ffn_gate` and of `ffn_up` and column `i` of `ffn_down`: the network
//! gives the same in whatever order they stand, with their biases. Sorted, neurons of like worth
//! share the groups of `ffn_down` and the bands of `ffn_gate` and `ffn_up`
//! (`docs/notes/accuracy.md` has the effect).

use rayon::prelude::*;
use slim_formats::{Decoder, Part, PartMap, arch::Rows};
use slim_kernels::weight;
use slim_runtime::Block;

use crate::{
    Result,
    backward::{Sensitivity, dense},
    finite::finite_rows,
};

/// The weights of a feed-forward network.
pub struct Ffn {
    neurons: usize,
    /// With a row for each neuron, `[neurons, hidden]`.
    into: PartMap<Vec<f32>>,
    /// With a column for each neuron, `[hidden, neurons]`.
    out: PartMap<Vec<f32>>,
    /// With a value for each neuron.
    biases: PartMap<Vec<f32>>,
}

impl Ffn {
    /// That of all tokens in `block`, number `index` of its model, if it has one.
    ///
    /// # Errors
    /// `NotFinite` for a weight that is no number.
    pub fn load(block: &Block<'_>, decoder: &Decoder, index: usize) -> Result<Option<Self>> {
        let Some(network) = block.spec.ffn else { return Ok(None) };
        let of_block = |part: Part| {
            let (name, found) = (&decoder.tensor(index, part).name, block.layers[part]);
            Ok((part, finite_rows(name, found, 0..weight::shape(found).0)?))
        };
        let into = block.spec.layers().filter(|part| part.rows() == Rows::Neurons);
        let (into, out) = (into.map(of_block), [Part::FfnDown].into_iter().map(of_block));
        let neurons = network.width;
        let biases = block.vectors.iter().filter(|(part, _)| part.rows() == Rows::Neurons);
        let biases = biases.map(|(part, bias)| (part, bias.clone())).collect();
        let (into, out) = (into.collect::<Result<_>>()?, out.collect::<Result<_>>()?);
        Ok(Some(Self { neurons, into, out, biases }))
    }

    fn hidden(&self) -> usize {
        self.out[Part::FfnDown].len() / self.neurons
    }

    /// The neurons, those first whose weights the loss minds most: by the sum over the weights of
    /// all matrices of their squares times the means that belong to them.
    pub fn order(&self, sensitivities: &PartMap<Sensitivity>) -> Vec<usize> {
        let hidden = self.hidden();
        let mut losses = vec![0.0; self.neurons];
        for (part, weights) in self.into.iter() {
            let of = &sensitivities[part];
            let rows = weights.chunks_exact(hidden).zip(&of.outputs);
            for (loss, (row, output)) in losses.iter_mut().zip(rows) {
                let squares = row.iter().zip(&of.inputs).map(|(&w, input)| square(w) * input);
                *loss += output * squares.sum::<f64>();
            }
        }
        for (part, weights) in self.out.iter() {
            let of = &sensitivities[part];
            for (row, output) in weights.chunks_exact(self.neurons).zip(&of.outputs) {
                for ((loss, &w), input) in losses.iter_mut().zip(row).zip(&of.inputs) {
                    *loss += output * square(w) * input;
                }
            }
        }
        let mut order: Vec<usize> = (0..self.neurons).collect();
        order.sort_by(|&a, &b| losses[b].total_cmp(&losses[a]));
        order
    }

    /// Brings what is known of the neurons into another order: neuron `order[i]` in place `i`.
    pub fn sort_sensitivities(&self, of: &mut PartMap<Sensitivity>, order: &[usize]) {
        let sort = |means: &mut Vec<f64>| *means = order.iter().map(|&i| means[i]).collect();
        self.into.iter().for_each(|(part, _)| sort(&mut of[part].outputs));
        self.out.iter().for_each(|(part, _)| sort(&mut of[part].inputs));
    }

    /// The same network with neuron `order[i]` in place `i`.
    pub fn sorted(self, order: &[usize]) -> Self {
        let (neurons, hidden) = (self.neurons, self.hidden());
        // Each matrix is let go of before the next is copied.
        let rows = |(part, weights): (Part, Vec<f32>)| -> (Part, Vec<f32>) {
            let row = |&row: &usize| weights[row * hidden..][..hidden].iter().copied();
            (part, order.par_iter().flat_map_iter(row).collect())
        };
        let columns = |(part, weights): (Part, Vec<f32>)| -> (Part, Vec<f32>) {
            let rows = weights.par_chunks_exact(neurons);
            (part, rows.flat_map_iter(|row| order.iter().map(|&col| row[col])).collect())
        };
        let values = |(part, bias): (Part, Vec<f32>)| -> (Part, Vec<f32>) {
            (part, order.iter().map(|&neuron| bias[neuron]).collect())
        };
        let into = self.into.into_iter().map(rows).collect();
        let out = self.out.into_iter().map(columns).collect();
        Self { neurons, into, out, biases: self.biases.into_iter().map(values).collect() }
    }

    /// `block` with this network in place of its own.
    pub fn within<'a>(&'a self, block: &Block<'a>) -> Block<'a> {
        let (neurons, hidden) = (self.neurons, self.hidden());
        let mut block = block.clone();
        let into = self.into.iter().map(|(part, w)| (part, dense(w, neurons, hidden)));
        let out = self.out.iter().map(|(part, w)| (part, dense(w, hidden, neurons)));
        block.layers.extend(into.chain(out));
        block.vectors.extend(self.biases.iter().map(|(part, bias)| (part, bias.clone())));
        block
    }
}

fn square(weight: f32) -> f64 {
    f64::from(weight) * f64::from(weight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::noise;

    const NEURONS: usize = 40;
    const HIDDEN: usize = 16;

    fn ffn() -> Ffn {
        let matrix = |seed| noise(NEURONS * HIDDEN, seed);
        let into = PartMap::from_iter([(Part::FfnGate, matrix(1)), (Part::FfnUp, matrix(2))]);
        let out = PartMap::from_iter([(Part::FfnDown, matrix(3))]);
        Ffn { neurons: NEURONS, into, out, biases: PartMap::new() }
    }

    /// What the network makes of `x`.
    fn output(ffn: &Ffn, x: &[f32]) -> Vec<f64> {
        let product = |row: &[f32]| -> f64 {
            row.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum()
        };
        let [gate, up] =
            [Part::FfnGate, Part::FfnUp].map(|part| ffn.into[part].chunks_exact(HIDDEN));
        let rows = gate.zip(up);
        let activation: Vec<f64> = rows
            .map(|(gate, up)| product(gate) / (1.0 + (-product(gate)).exp()) * product(up))
            .collect();
        let sum = |row: &[f32]| row.iter().zip(&activation).map(|(&w, a)| f64::from(w) * a).sum();
        ffn.out[Part::FfnDown].chunks_exact(NEURONS).map(sum).collect()
    }

    #[test]
    fn sorted_network_gives_the_same() {
        let x = noise(HIDDEN, 4);
        let expected = output(&ffn(), &x);
        let order: Vec<usize> = (0..NEURONS).map(|i| (i * 7 + 3) % NEURONS).collect();
        let sorted = ffn().sorted(&order);
        let [gate, unsorted] = [&sorted, &ffn()].map(|ffn| ffn.into[Part::FfnGate].clone());
        assert_eq!(gate[..HIDDEN], unsorted[3 * HIDDEN..4 * HIDDEN]);
        for (found, expected) in output(&sorted, &x).into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    }

    #[test]
    fn neurons_come_in_the_order_of_what_their_weights_may_cost() {
        let even = |rows: usize, cols: usize| Sensitivity {
            inputs: vec![1.0; cols],
            outputs: vec![1.0; rows],
        };
        let (wide, tall) = (even(NEURONS, HIDDEN), even(HIDDEN, NEURONS));
        let with = |neuron: usize, factor: f64, of: &Sensitivity| {
            let mut of = of.clone();
            let means = if of.outputs.len() == NEURONS { &mut of.outputs } else { &mut of.inputs };
            means[neuron] = factor;
            of
        };
        let (gate, up, down) = (with(9, 1e4, &wide), with(30, 1e3, &wide), with(2, 1e5, &tall));
        let parts = [(Part::FfnGate, gate), (Part::FfnUp, up), (Part::FfnDown, down)];
        let order = ffn().order(&parts.into_iter().collect());
        assert_eq!(order[..3], [2, 9, 30]);
        let losses = |i: usize| -> f64 {
            let row = |w: &[f32]| w[i * HIDDEN..][..HIDDEN].iter().map(|&w| square(w)).sum::<f64>();
            let ffn = ffn();
            let column = (0..HIDDEN)
                .map(|row| square(ffn.out[Part::FfnDown][row * NEURONS + i]))
                .sum::<f64>();
            row(&ffn.into[Part::FfnGate]) + row(&ffn.into[Part::FfnUp]) + column
        };
        assert!(order[3..].is_sorted_by(|&a, &b| losses(a) >= losses(b)));
        let mut all = order.clone();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..NEURONS));
    }
}
