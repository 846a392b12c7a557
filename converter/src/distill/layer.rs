//! A linear layer whose two-level scales are trained.

use half::f16;
use rayon::prelude::*;
use slim_formats::slim::{PackedLayer, PackedTensor, ScaleCoding, TILE_ROWS, unpack_codes};

use super::parameters::Parameters;
use crate::backward::weight_gradient;

/// How far a scale or minimum code moves in a step, as a share of the largest code.
const CODE_RATE: f32 = 0.003;
/// How far a row scale moves in a step, as a share of it.
const ROW_SCALE_RATE: f32 = 0.003;

/// The packed layer runs; behind each of its scales is a real number, of which it is the nearest that the file can hold.
/// Gradients pass through the rounding as if it were not there.
pub struct TrainedLayer {
    packed: PackedLayer,
    /// Scale codes and minimum codes, `[tiles, runs, 16]`.
    codes: [Parameters; 2],
    /// What the row scales `d` and `m` are multiplied with, `[tiles, 16]`.
    factors: [Parameters; 2],
    /// The row scales before the training, `[tiles, 16]`.
    row_scales: [Vec<f32>; 2],
    max_code: f32,
}

/// Gradients of the parameters of a layer, in their order.
pub struct LayerGradients {
    codes: [Vec<f32>; 2],
    factors: [Vec<f32>; 2],
}

impl TrainedLayer {
    /// Starts at the scales of `layer`; `None` unless they are two-level.
    pub fn new(layer: PackedTensor<'_>) -> Option<Self> {
        let layout = layer.layout();
        let ScaleCoding::TwoLevel { scale_bits, .. } = layout.coding() else { return None };
        let (mut s, mut z, mut d, mut m) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for tile in 0..layout.tiles() {
            let row_scales = layer.row_scales(tile);
            d.extend(row_scales.0);
            m.extend(row_scales.1);
            for group in layout.groups() {
                for run in 0..group.runs(layout.coding()).len() {
                    let (scale, minus_z) = layer.scales(tile, group, run);
                    s.extend(scale);
                    z.extend(minus_z.map(|z| 0.0 - z));
                }
            }
        }
        let ones = vec![1.0; d.len()];
        Some(Self {
            packed: layer.to_layer(),
            codes: [s, z].map(Parameters::new),
            factors: [ones.clone(), ones].map(Parameters::new),
            row_scales: [d, m],
            max_code: f32::from((1u8 << scale_bits) - 1),
        })
    }

    /// The layer as it runs.
    pub fn packed(&self) -> &PackedLayer {
        &self.packed
    }

    /// For inputs `x: [tokens, cols]` and the gradient `dy: [tokens, rows]` of the loss at the outputs.
    pub fn gradients(&self, x: &[f32], dy: &[f32]) -> LayerGradients {
        let layout = self.packed.layout();
        let dw = weight_gradient(x, dy, layout.rows(), layout.cols());
        let zeros = |like: &[Parameters; 2]| like.each_ref().map(|p| vec![0.0; p.values.len()]);
        let mut gradients =
            LayerGradients { codes: zeros(&self.codes), factors: zeros(&self.factors) };
        let per_tile = self.codes[0].values.len() / layout.tiles();
        let ([ds, dz], [dd, dm]) = (&mut gradients.codes, &mut gradients.factors);
        let codes = ds.par_chunks_mut(per_tile).zip(dz.par_chunks_mut(per_tile));
        let factors = dd.par_chunks_mut(TILE_ROWS).zip(dm.par_chunks_mut(TILE_ROWS));
        let tiles = codes.zip(factors).zip(dw.par_chunks(TILE_ROWS * layout.cols()));
        tiles.enumerate().for_each(|(tile, ((codes, factors), dw))| {
            self.tile_gradients(tile, dw, codes, factors);
        });
        gradients
    }

    /// From the gradient `dw` at the weights of a tile's rows. With `w = (d s) code - m z`, all follow from two sums over
    /// each run: that of `dw code` and that of `dw`.
    fn tile_gradients(
        &self,
        tile: usize,
        dw: &[f32],
        (ds, dz): (&mut [f32], &mut [f32]),
        (dd, dm): (&mut [f32], &mut [f32]),
    ) {
        let packed = self.packed.view();
        let layout = packed.layout();
        let (d, m) = packed.row_scales(tile);
        let first = tile * TILE_ROWS;
        let mut columns = Vec::new();
        let mut records = ds.chunks_exact_mut(TILE_ROWS).zip(dz.chunks_exact_mut(TILE_ROWS));
        for group in layout.groups() {
            columns.resize(group.cols.len(), [0; TILE_ROWS]);
            let bytes = &packed.tile_codes(tile)[group.codes_offset..][..group.code_bytes()];
            unpack_codes(bytes, group.bit_width, &mut columns);
            for (run, cols) in group.runs(layout.coding()).enumerate() {
                let (s, minus_z) = packed.scales(tile, group, run);
                let (ds, dz) = records.next().expect("a record per run");
                let columns = &columns[cols.start - group.cols.start..];
                for (lane, dw) in dw.chunks_exact(layout.cols()).enumerate() {
                    let (mut with_codes, mut plain) = (0.0, 0.0);
                    for (dw, column) in dw[cols.clone()].iter().zip(columns) {
                        with_codes += dw * f32::from(column[lane]);
                        plain += dw;
                    }
                    ds[lane] = d[lane] * with_codes;
                    dz[lane] = -m[lane] * plain;
                    dd[lane] += self.row_scales[0][first + lane] * s[lane] * with_codes;
                    dm[lane] += self.row_scales[1][first + lane] * minus_z[lane] * plain;
                }
            }
        }
    }

    /// Takes a step at `rate` times the full rates; `step` counts from 1.
    pub fn update(&mut self, gradients: &LayerGradients, rate: f32, step: usize) {
        for (codes, gradient) in self.codes.iter_mut().zip(&gradients.codes) {
            codes.step(gradient, rate * CODE_RATE * self.max_code, step);
            // Stays where gradients can bring it back from.
            codes.values.iter_mut().for_each(|code| *code = code.clamp(0.0, self.max_code));
        }
        for (factors, gradient) in self.factors.iter_mut().zip(&gradients.factors) {
            factors.step(gradient, rate * ROW_SCALE_RATE, step);
        }
        self.store();
    }

    /// Rounds the parameters into the packed layer.
    fn store(&mut self) {
        let coding = self.packed.layout().coding();
        let row_scales = |which: usize, tile: usize| -> [f16; TILE_ROWS] {
            std::array::from_fn(|lane| {
                let at = tile * TILE_ROWS + lane;
                let value = self.row_scales[which][at] * self.factors[which].values[at];
                f16::from_f32(value.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
            })
        };
        let [s, z] = &self.codes;
        let records = s.values.chunks_exact(TILE_ROWS).zip(z.values.chunks_exact(TILE_ROWS));
        let mut records = records.map(|(s, z)| (rounded(s), rounded(z)));
        for mut tile in self.packed.tiles_mut() {
            tile.set_row_scales(&row_scales(0, tile.index()), &row_scales(1, tile.index()));
            let runs = tile.layout().groups().iter().map(|group| group.runs(coding).len());
            for (group, runs) in runs.collect::<Vec<_>>().into_iter().enumerate() {
                for run in 0..runs {
                    let (s, z) = records.next().expect("a record per run");
                    tile.set_two_level(group, run, &s, &z);
                }
            }
        }
    }
}

fn rounded(codes: &[f32]) -> [u8; TILE_ROWS] {
    std::array::from_fn(|lane| codes[lane].round_ties_even() as u8)
}

#[cfg(test)]
mod tests {
    use slim_formats::{
        Weight,
        slim::{BitWidth, LayerLayout},
    };
    use slim_kernels::weight;

    use super::*;

    const ROWS: usize = 20;
    const COLS: usize = 80;

    fn noise(len: usize, seed: u32) -> Vec<u32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        (0..len).map(|_| next()).collect()
    }

    /// Groups of 2, 3 and 1 bits, the last one short; scale codes away from both ends.
    fn layer(scale_bits: u8) -> TrainedLayer {
        let coding = ScaleCoding::TwoLevel { sub_group: 16, scale_bits };
        let widths = [2, 3, 1].map(|bits| BitWidth::new(bits).unwrap());
        let layout = LayerLayout::new(ROWS, COLS, 32, coding, &widths).unwrap();
        let mut packed = PackedLayer::zeroed(layout.clone());
        for mut tile in packed.tiles_mut() {
            let used = (ROWS - tile.index() * TILE_ROWS).min(TILE_ROWS);
            let values = |seed, below: u32| -> [u8; TILE_ROWS] {
                let values = noise(TILE_ROWS, seed);
                std::array::from_fn(|r| if r < used { (values[r] % below) as u8 } else { 0 })
            };
            let scales = |seed| values(seed, 10).map(|code| if code > 0 { code + 2 } else { 0 });
            let unit = |seed| values(seed, 7).map(|i| f16::from_f32(0.125 * f32::from(i + 1)));
            tile.set_row_scales(&unit(1), &unit(2));
            for (index, group) in layout.groups().iter().enumerate() {
                let below = u32::from(group.bit_width.max_code()) + 1;
                let columns: Vec<_> =
                    group.cols.clone().map(|col| values(100 + col as u32, below)).collect();
                tile.set_codes(index, &columns);
                for run in 0..group.runs(coding).len() {
                    let seed = (10 * index + run) as u32;
                    tile.set_two_level(index, run, &scales(300 + seed), &scales(400 + seed));
                }
            }
        }
        TrainedLayer::new(packed.view()).unwrap()
    }

    /// A loss that is linear in the weights, with gradient `dw`.
    fn loss(layer: &TrainedLayer, dw: &[f32]) -> f64 {
        let mut w = vec![0.0; ROWS * COLS];
        weight::dequantize_rows(Weight::Packed(layer.packed.view()), 0..ROWS, &mut w).unwrap();
        w.iter().zip(dw).map(|(w, dw)| f64::from(w * dw)).sum()
    }

    #[test]
    fn untouched_parameters_are_stored_as_they_were() {
        for scale_bits in [4, 6] {
            let mut layer = layer(scale_bits);
            let before = layer.packed.clone();
            layer.store();
            assert_eq!(layer.packed, before);
        }
    }

    /// The loss is linear in each parameter: a finite difference is the gradient.
    #[test]
    fn gradients_are_finite_differences() {
        let mut x = vec![0.0; COLS * COLS];
        (0..COLS).for_each(|i| x[i * COLS + i] = 1.0);
        let dy: Vec<f32> =
            noise(COLS * ROWS, 9).iter().map(|&v| (v % 17) as f32 / 8.0 - 1.0).collect();
        let dw: Vec<f32> = (0..ROWS * COLS).map(|i| dy[i % COLS * ROWS + i / COLS]).collect();
        for scale_bits in [4, 6] {
            let mut layer = layer(scale_bits);
            let gradients = layer.gradients(&x, &dy);
            let before = loss(&layer, &dw);
            let check = |layer: &mut TrainedLayer, gradient: f32, place: String| {
                layer.store();
                let found = loss(layer, &dw) - before;
                assert!((found - f64::from(gradient)).abs() < 1e-3, "{place}: {gradient}, {found}");
            };
            for which in [0, 1] {
                for at in 0..layer.codes[which].values.len() {
                    let lane = at % TILE_ROWS;
                    let is_used = at / (TILE_ROWS * COLS / 16) * TILE_ROWS + lane < ROWS;
                    let gradient = gradients.codes[which][at];
                    if is_used {
                        layer.codes[which].values[at] += 1.0;
                        check(&mut layer, gradient, format!("code {which} {at}"));
                        layer.codes[which].values[at] -= 1.0;
                    } else {
                        assert_eq!(gradient, 0.0);
                    }
                }
                for at in 0..ROWS {
                    layer.factors[which].values[at] = 2.0;
                    check(&mut layer, gradients.factors[which][at], format!("row {which} {at}"));
                    layer.factors[which].values[at] = 1.0;
                }
            }
        }
    }

    #[test]
    fn update_leaves_codes_in_range() {
        let mut layer = layer(4);
        let ones = |p: &Parameters| vec![1.0; p.values.len()];
        let mut gradients = LayerGradients {
            codes: layer.codes.each_ref().map(ones),
            factors: layer.factors.each_ref().map(ones),
        };
        gradients.codes[1].iter_mut().for_each(|g| *g = -1.0);
        for step in 1..=50 {
            layer.update(&gradients, 10.0, step);
        }
        assert!(layer.codes[0].values.iter().all(|&code| code == 0.0));
        assert!(layer.codes[1].values.iter().all(|&code| code == 15.0));
    }
}
