//! The neurons of a feed-forward network, in the order of what the loss minds about them.
//!
//! Neuron `i` is row `i` of `ffn_gate` and of `ffn_up` and column `i` of `ffn_down`: the network gives the same in whatever
//! order they stand. Sorted, neurons of like worth share the groups of `ffn_down`, and those of `ffn_gate` and `ffn_up` come
//! in bands with bit-widths of their own (`docs/accuracy.md` has the effect).

use rayon::prelude::*;
use slim_formats::slim::TILE_ROWS;
use slim_runtime::Block;

use crate::{
    Result,
    backward::{Linear, Sensitivities, dense},
    convert::finite_rows,
};

/// Rows that the blocks of many-token kernels take: bands of large matrices are multiples of them.
const BLOCK_ROWS: usize = 128;

/// The rows of each band of `ffn_gate` and `ffn_up`: a sixth of the neurons, a quarter, the rest. Of a small network that
/// has not as many tiles, some are missing.
pub fn bands(neurons: usize) -> Vec<usize> {
    let unit = if neurons < 8 * BLOCK_ROWS { TILE_ROWS } else { BLOCK_ROWS };
    let first = (neurons / 6).next_multiple_of(unit).min(neurons);
    let second = (neurons / 4).next_multiple_of(unit).min(neurons - first);
    let mut bands = vec![first, second, neurons - first - second];
    bands.retain(|&rows| rows > 0);
    bands
}

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

    /// The neurons, those first whose weights the loss minds most: by the sum over the weights of all three matrices of their
    /// squares times the means that belong to them.
    pub fn order(&self, sensitivities: &Sensitivities, block: usize) -> Vec<usize> {
        let hidden = self.gate.len() / self.neurons;
        let mut losses = vec![0.0; self.neurons];
        for (layer, weights) in [(Linear::FfnGate, &self.gate), (Linear::FfnUp, &self.up)] {
            let of = sensitivities.of(block, layer);
            let rows = weights.chunks_exact(hidden).zip(&of.outputs);
            for (loss, (row, output)) in losses.iter_mut().zip(rows) {
                let squares = row.iter().zip(&of.inputs).map(|(&w, input)| square(w) * input);
                *loss += output * squares.sum::<f64>();
            }
        }
        let of = sensitivities.of(block, Linear::FfnDown);
        for (row, output) in self.down.chunks_exact(self.neurons).zip(&of.outputs) {
            for ((loss, &w), input) in losses.iter_mut().zip(row).zip(&of.inputs) {
                *loss += output * square(w) * input;
            }
        }
        let mut order: Vec<usize> = (0..self.neurons).collect();
        order.sort_by(|&a, &b| losses[b].total_cmp(&losses[a]));
        order
    }

    /// The same network with neuron `order[i]` in place `i`.
    pub fn sorted(self, order: &[usize]) -> Self {
        let hidden = self.gate.len() / self.neurons;
        let rows = |weights: &[f32]| {
            order
                .par_iter()
                .flat_map_iter(|&row| &weights[row * hidden..][..hidden])
                .copied()
                .collect()
        };
        let columns = |weights: &[f32]| {
            let rows = weights.par_chunks_exact(self.neurons);
            rows.flat_map_iter(|row| order.iter().map(|&col| row[col])).collect()
        };
        Self {
            neurons: self.neurons,
            gate: rows(&self.gate),
            up: rows(&self.up),
            down: columns(&self.down),
        }
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
