//! The neurons of a feed-forward network, in the order of what the loss minds about them.
//!
//! Neuron `i` is row `i` of `ffn_gate` and of `ffn_up` and column `i` of `ffn_down`: the network
//! gives the same in whatever order they stand. Sorted, neurons of like worth share the groups of
//! `ffn_down` and the bands of `ffn_gate` and `ffn_up` (`docs/accuracy.md` has the effect).

use rayon::prelude::*;
use slim_runtime::Block;

use crate::{
    Result,
    backward::{Linear, Sensitivity, dense},
    convert::finite_rows,
};

/// The weights of a feed-forward network.
pub struct Ffn {
    neurons: usize,
    /// `[neurons, hidden]`.
    gate: Vec<f32>,
    /// `[neurons, hidden]`.
    up: Vec<f32>,
    /// `[hidden, neurons]`.
    down: Vec<f32>,
}

impl Ffn {
    /// Those of `block`, number `index` of its model.
    ///
    /// # Errors
    /// `NotFinite` for a weight that is no number.
    pub fn load(block: &Block<'_>, index: usize) -> Result<Self> {
        let (neurons, hidden) = slim_kernels::weight::shape(block.ffn_gate);
        let all =
            |layer: Linear, weight, rows| finite_rows(&layer.tensor_name(index), weight, 0..rows);
        Ok(Self {
            neurons,
            gate: all(Linear::FfnGate, block.ffn_gate, neurons)?,
            up: all(Linear::FfnUp, block.ffn_up, neurons)?,
            down: all(Linear::FfnDown, block.ffn_down, hidden)?,
        })
    }

    /// The neurons, those first whose weights the loss minds most: by the sum over the weights of
    /// all three matrices of their squares times the means that belong to them, which are in the
    /// order of the fields.
    pub fn order(&self, sensitivities: [&Sensitivity; 3]) -> Vec<usize> {
        let [of_gate, of_up, of_down] = sensitivities;
        let hidden = self.gate.len() / self.neurons;
        let mut losses = vec![0.0; self.neurons];
        for (of, weights) in [(of_gate, &self.gate), (of_up, &self.up)] {
            let rows = weights.chunks_exact(hidden).zip(&of.outputs);
            for (loss, (row, output)) in losses.iter_mut().zip(rows) {
                let squares = row.iter().zip(&of.inputs).map(|(&w, input)| square(w) * input);
                *loss += output * squares.sum::<f64>();
            }
        }
        for (row, output) in self.down.chunks_exact(self.neurons).zip(&of_down.outputs) {
            for ((loss, &w), input) in losses.iter_mut().zip(row).zip(&of_down.inputs) {
                *loss += output * square(w) * input;
            }
        }
        let mut order: Vec<usize> = (0..self.neurons).collect();
        order.sort_by(|&a, &b| losses[b].total_cmp(&losses[a]));
        order
    }

    /// The same network with neuron `order[i]` in place `i`.
    pub fn sorted(self, order: &[usize]) -> Self {
        let Self { neurons, gate, up, down } = self;
        let hidden = gate.len() / neurons;
        // Each matrix is let go of before the next is copied.
        let rows = |weights: Vec<f32>| -> Vec<f32> {
            let row = |&row: &usize| weights[row * hidden..][..hidden].iter().copied();
            order.par_iter().flat_map_iter(row).collect()
        };
        let columns = |weights: Vec<f32>| -> Vec<f32> {
            let rows = weights.par_chunks_exact(neurons);
            rows.flat_map_iter(|row| order.iter().map(|&col| row[col])).collect()
        };
        Self { neurons, gate: rows(gate), up: rows(up), down: columns(down) }
    }

    /// `block` with this network in place of its own.
    pub fn within<'a>(&'a self, block: &Block<'a>) -> Block<'a> {
        let (neurons, hidden) = (self.neurons, self.gate.len() / self.neurons);
        Block {
            ffn_gate: dense(&self.gate, neurons, hidden),
            ffn_up: dense(&self.up, neurons, hidden),
            ffn_down: dense(&self.down, hidden, neurons),
            ..block.clone()
        }
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
        Ffn { neurons: NEURONS, gate: matrix(1), up: matrix(2), down: matrix(3) }
    }

    /// What the network makes of `x`.
    fn output(ffn: &Ffn, x: &[f32]) -> Vec<f64> {
        let product = |row: &[f32]| -> f64 {
            row.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum()
        };
        let rows = ffn.gate.chunks_exact(HIDDEN).zip(ffn.up.chunks_exact(HIDDEN));
        let activation: Vec<f64> = rows
            .map(|(gate, up)| product(gate) / (1.0 + (-product(gate)).exp()) * product(up))
            .collect();
        let sum = |row: &[f32]| row.iter().zip(&activation).map(|(&w, a)| f64::from(w) * a).sum();
        ffn.down.chunks_exact(NEURONS).map(sum).collect()
    }

    #[test]
    fn sorted_network_gives_the_same() {
        let x = noise(HIDDEN, 4);
        let expected = output(&ffn(), &x);
        let order: Vec<usize> = (0..NEURONS).map(|i| (i * 7 + 3) % NEURONS).collect();
        let sorted = ffn().sorted(&order);
        assert_eq!(sorted.gate[..HIDDEN], ffn().gate[3 * HIDDEN..4 * HIDDEN]);
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
        let order = ffn().order([&gate, &up, &down]);
        assert_eq!(order[..3], [2, 9, 30]);
        let losses = |i: usize| -> f64 {
            let row = |w: &[f32]| w[i * HIDDEN..][..HIDDEN].iter().map(|&w| square(w)).sum::<f64>();
            let ffn = ffn();
            let column = (0..HIDDEN).map(|row| square(ffn.down[row * NEURONS + i])).sum::<f64>();
            row(&ffn.gate) + row(&ffn.up) + column
        };
        assert!(order[3..].is_sorted_by(|&a, &b| losses(a) >= losses(b)));
        let mut all = order.clone();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..NEURONS));
    }
}
