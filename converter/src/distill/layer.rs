//! A linear layer whose scales are trained: scale codes, minimum codes where the coding has them,
//! and the row scales of both.

use half::f16;
use rayon::prelude::*;
use slim_formats::slim::{
    CodeColumn, Group, PackedLayer, PackedTensor, ScaleCoding, TILE_ROWS, TRELLIS_CENTER, TileMut,
    value_step,
};

use super::parameters::Parameters;
use crate::lanes::Lanes;

/// How far a scale or minimum code moves in a step, as a share of the largest one.
const SCALE_RATE: f32 = 0.001;
/// How far a row scale moves in a step, as a share of it.
const ROW_SCALE_RATE: f32 = 0.0003;

/// The real numbers behind the scales of a packed layer: each scale and minimum code is the nearest
/// integer to such a number. Gradients pass through the rounding as if it were not there.
pub struct TrainedLayer {
    tiles: Vec<TrainedTile>,
}

/// The numbers of the 16 rows of a tile: two of each kind, or one in a trellis, which has no
/// minimums.
struct TrainedTile {
    /// Scale codes and minimum codes, `[runs, 16]`.
    scales: Vec<Parameters>,
    /// What the row scales `d` and `m` are multiplied with.
    factors: Vec<Parameters>,
    /// The row scales before the training.
    row_scales: Vec<Lanes>,
}

/// Gradients of the numbers of a tile, in their order.
struct TileGradients {
    scales: Vec<Vec<f32>>,
    factors: Vec<Vec<f32>>,
}

impl TrainedLayer {
    /// Starts at the scales of `layer`; `None` if it has no scale codes.
    pub fn new(layer: PackedTensor<'_>) -> Option<Self> {
        layer.layout().coding().sub_groups()?;
        let tiles = 0..layer.layout().tiles();
        Some(Self {
            tiles: tiles.into_par_iter().map(|tile| TrainedTile::new(layer, tile)).collect(),
        })
    }

    /// Takes a step at `rate` times the full rates, number `step` counted from 1, against the
    /// gradient `dw: [rows, cols]` of the loss at the weights of `layer`.
    pub fn descend(&mut self, layer: &PackedLayer, dw: &[f32], rate: f32, step: usize) {
        let layout = layer.layout();
        let tiles = self.tiles.par_iter_mut().zip(dw.par_chunks(TILE_ROWS * layout.cols()));
        tiles.enumerate().for_each(|(index, (tile, dw))| {
            let gradients = tile.gradients(layer.view(), index, dw);
            tile.descend(layout.coding(), &gradients, rate, step);
        });
    }

    /// What is trained.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameters> {
        self.tiles.iter().flat_map(|tile| tile.scales.iter().chain(&tile.factors))
    }

    /// As [`Self::parameters`].
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameters> {
        self.tiles.iter_mut().flat_map(|tile| tile.scales.iter_mut().chain(&mut tile.factors))
    }

    /// Rounds the numbers into `layer`.
    pub fn store(&self, layer: &mut PackedLayer) {
        let slots = layer.tiles_mut();
        slots.into_par_iter().zip(&self.tiles).for_each(|(mut slot, tile)| tile.store(&mut slot));
    }
}

impl TrainedTile {
    fn new(layer: PackedTensor<'_>, tile: usize) -> Self {
        let layout = layer.layout();
        let kinds = if has_minimums(layout.coding()) { 2 } else { 1 };
        let mut scales = vec![Vec::new(); kinds];
        for group in layout.groups() {
            for run in 0..group.runs(layout.coding()).len() {
                let (factor, offset) = layer.scales(tile, group, run);
                let codes =
                    [factor.map(|s| s / unit(layout.coding(), group)), offset.map(|z| 0.0 - z)];
                scales.iter_mut().zip(codes).for_each(|(scales, codes)| scales.extend(codes));
            }
        }
        let (d, m) = layer.row_scales(tile);
        Self {
            scales: scales.into_iter().map(Parameters::new).collect(),
            factors: vec![Parameters::new(vec![1.0; TILE_ROWS]); kinds],
            row_scales: [d, m][..kinds].to_vec(),
        }
    }

    /// From the gradient `dw` at the weights of the tile's rows. With `w = (d s) v - m z` and codes
    /// or values `v`, those of the scales follow from two sums over each run: that of `dw v` and
    /// that of `dw`.
    fn gradients(&self, layer: PackedTensor<'_>, tile: usize, dw: &[f32]) -> TileGradients {
        let layout = layer.layout();
        let row_scales = layer.row_scales(tile);
        let row_scales = [row_scales.0, row_scales.1];
        let zeros = |like: &Parameters| vec![0.0; like.values.len()];
        let mut gradients = TileGradients {
            scales: self.scales.iter().map(zeros).collect(),
            factors: self.factors.iter().map(zeros).collect(),
        };
        let mut record = 0..TILE_ROWS;
        for group in layout.groups() {
            let columns = multiplied(layer, tile, group);
            for (run, cols) in group.runs(layout.coding()).enumerate() {
                let (factor, offset) = layer.scales(tile, group, run);
                let codes = [factor.map(|s| s / unit(layout.coding(), group)), offset];
                let columns = &columns[cols.start - group.cols.start..];
                for (lane, dw) in dw.chunks_exact(layout.cols()).enumerate() {
                    let (mut with_values, mut plain) = (0.0, 0.0);
                    for (dw, column) in dw[cols.clone()].iter().zip(columns) {
                        with_values += dw * column[lane];
                        plain += dw;
                    }
                    let of_kinds = gradients.scales.iter_mut().zip(&mut gradients.factors);
                    let sums = [(with_values, with_values), (-plain, plain)];
                    for (kind, (scales, factors)) in of_kinds.enumerate() {
                        let (of_code, of_factor) = sums[kind];
                        scales[record.start + lane] = row_scales[kind][lane] * of_code;
                        factors[lane] +=
                            self.row_scales[kind][lane] * codes[kind][lane] * of_factor;
                    }
                }
                record = record.end..record.end + TILE_ROWS;
            }
        }
        gradients
    }

    fn descend(&mut self, coding: ScaleCoding, gradients: &TileGradients, rate: f32, step: usize) {
        let (_, scale_bits) = coding.sub_groups().expect("checked by `TrainedLayer::new`");
        let max_scale = (1u8 << scale_bits) - 1;
        for (scales, gradient) in self.scales.iter_mut().zip(&gradients.scales) {
            scales.step(gradient, rate * SCALE_RATE * f32::from(max_scale), step);
            clamp(&mut scales.values, max_scale);
        }
        for (factors, gradient) in self.factors.iter_mut().zip(&gradients.factors) {
            factors.step(gradient, rate * ROW_SCALE_RATE, step);
        }
    }

    fn store(&self, slot: &mut TileMut<'_>) {
        let layout = slot.layout().clone();
        let row_scales = |kind: usize| {
            std::array::from_fn(|lane| {
                let value = self.row_scales[kind][lane] * self.factors[kind].values[lane];
                f16::from_f32(value.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
            })
        };
        let codes = |kind: usize, record: usize| {
            rounded(&self.scales[kind].values[record * TILE_ROWS..][..TILE_ROWS])
        };
        let runs = layout.groups().iter().enumerate().flat_map(|(index, group)| {
            (0..group.runs(layout.coding()).len()).map(move |run| (index, run))
        });
        // A trellis takes the first of each.
        let last = self.factors.len() - 1;
        slot.set_row_scales(&row_scales(0), &row_scales(last));
        for (record, (group, run)) in runs.enumerate() {
            match has_minimums(layout.coding()) {
                true => slot.set_two_level(group, run, &codes(0, record), &codes(1, record)),
                false => slot.set_trellis_scales(group, run, &codes(0, record)),
            }
        }
    }
}

/// Whether a minimum is taken off each weight.
fn has_minimums(coding: ScaleCoding) -> bool {
    matches!(coding, ScaleCoding::TwoLevel { .. })
}

/// What the codes of a group are worth in what its scale codes multiply.
fn unit(coding: ScaleCoding, group: &Group) -> f32 {
    if has_minimums(coding) { 1.0 } else { value_step(group.bit_width) }
}

/// What the scale codes of a group multiply, one entry per column: codes, or values of a trellis.
fn multiplied(layer: PackedTensor<'_>, tile: usize, group: &Group) -> Vec<Lanes> {
    let mut columns = vec![[0; TILE_ROWS]; group.cols.len()];
    layer.codes(tile, group, &mut columns);
    let coding = layer.layout().coding();
    let unit = unit(coding, group);
    let center = if has_minimums(coding) { 0.0 } else { f32::from(TRELLIS_CENTER) };
    let column = |codes: CodeColumn| codes.map(|code| unit * f32::from(code) - center);
    columns.into_iter().map(column).collect()
}

/// Keeps numbers where gradients can bring them back from.
fn clamp(values: &mut [f32], max: u8) {
    values.iter_mut().for_each(|value| *value = value.clamp(0.0, max.into()));
}

fn rounded(values: &[f32]) -> CodeColumn {
    std::array::from_fn(|lane| values[lane].round_ties_even() as u8)
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

    const CODINGS: [ScaleCoding; 3] = [
        ScaleCoding::TwoLevel { sub_group: 16, scale_bits: 4 },
        ScaleCoding::TwoLevel { sub_group: 16, scale_bits: 6 },
        ScaleCoding::Trellis { sub_group: 16 },
    ];

    /// Groups of 2, 3 and 8 bits, the last one short; scale codes away from both ends.
    fn layer(coding: ScaleCoding) -> PackedLayer {
        let widths = [2, 3, 8].map(|bits| BitWidth::new(bits).unwrap());
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
                    let (s, z) = (scales(300 + seed), scales(400 + seed));
                    match coding {
                        ScaleCoding::Trellis { .. } => tile.set_trellis_scales(index, run, &s),
                        _ => tile.set_two_level(index, run, &s, &z),
                    }
                }
            }
        }
        packed
    }

    /// `like` with the scales of `trained`.
    fn stored(trained: &TrainedLayer, like: &PackedLayer) -> PackedLayer {
        let mut layer = like.clone();
        trained.store(&mut layer);
        layer
    }

    #[test]
    fn untouched_numbers_are_stored_as_they_were() {
        for coding in CODINGS {
            let layer = layer(coding);
            let trained = TrainedLayer::new(layer.view()).unwrap();
            assert_eq!(stored(&trained, &layer), layer);
        }
    }

    /// A loss that is linear in the weights, with gradient `dw`.
    fn loss(layer: &PackedLayer, dw: &[f32]) -> f64 {
        let mut w = vec![0.0; ROWS * COLS];
        weight::dequantize_rows(Weight::Packed(layer.view()), 0..ROWS, &mut w).unwrap();
        w.iter().zip(dw).map(|(w, dw)| f64::from(w * dw)).sum()
    }

    /// The numbers of a tile that the last index of a gradient counts through, and that gradient.
    type Numbers = (fn(&mut TrainedTile) -> &mut Vec<f32>, fn(&TileGradients) -> &Vec<f32>);

    /// The loss is linear in each number: a finite difference is the gradient.
    #[test]
    fn gradients_are_finite_differences() {
        let dw: Vec<f32> =
            noise(ROWS * COLS, 9).iter().map(|&v| (v % 17) as f32 / 8.0 - 1.0).collect();
        // Those that every coding has come first.
        let numbers: [Numbers; 4] = [
            (|t| &mut t.scales[0].values, |g| &g.scales[0]),
            (|t| &mut t.factors[0].values, |g| &g.factors[0]),
            (|t| &mut t.scales[1].values, |g| &g.scales[1]),
            (|t| &mut t.factors[1].values, |g| &g.factors[1]),
        ];
        for coding in CODINGS {
            let layer = layer(coding);
            let mut trained = TrainedLayer::new(layer.view()).unwrap();
            let before = loss(&layer, &dw);
            for (tile, dw_tile) in dw.chunks(TILE_ROWS * COLS).enumerate() {
                let gradients = trained.tiles[tile].gradients(layer.view(), tile, dw_tile);
                let of_coding = 2 * trained.tiles[tile].scales.len();
                for (kind, (values, gradient)) in numbers[..of_coding].iter().enumerate() {
                    for (at, gradient) in gradient(&gradients).iter().enumerate() {
                        let lane = at % TILE_ROWS;
                        if tile * TILE_ROWS + lane >= ROWS {
                            assert_eq!(*gradient, 0.0);
                            continue;
                        }
                        values(&mut trained.tiles[tile])[at] += 1.0;
                        let found = loss(&stored(&trained, &layer), &dw) - before;
                        values(&mut trained.tiles[tile])[at] -= 1.0;
                        let error = (found - f64::from(*gradient)).abs();
                        assert!(error < 1e-3, "{kind}, {at} of tile {tile}: {gradient}, {found}");
                    }
                }
            }
        }
    }

    #[test]
    fn descending_leaves_numbers_in_range() {
        let layer = layer(CODINGS[0]);
        let mut trained = TrainedLayer::new(layer.view()).unwrap();
        for (index, tile) in trained.tiles.iter_mut().enumerate() {
            let dw = vec![0.0; TILE_ROWS * COLS];
            let mut gradients = tile.gradients(layer.view(), index, &dw);
            gradients.scales[0].fill(1.0);
            gradients.scales[1].fill(-1.0);
            for step in 1..=50 {
                tile.descend(layer.layout().coding(), &gradients, 100.0, step);
            }
            assert!(tile.scales[0].values.iter().all(|&code| code == 0.0));
            assert!(tile.scales[1].values.iter().all(|&code| code == 15.0));
        }
    }
}
