//! The windows of a strip of 32 rows that come closest to its weights, and scales for them.
//!
//! A column's windows are a closed path through 256 states, one step a row (`docs/format.md`,
//! F24): Viterbi's algorithm finds the best path of those that begin and end in one state. That
//! state is where the best open path passes on the opposite side of the ring.

use std::sync::LazyLock;

use slim_formats::slim::{
    BitWidth, CodeColumn, STRIP_ROWS, TILE_ROWS, TRELLIS_CENTER, WindowTable, ring_place,
    value_step,
};
use slim_kernels::per_isa;

use crate::lanes::{Lanes, zip};

/// Values of the windows of a width, in units of scale codes.
pub type Values = [f32; 256];

/// The largest scale code.
pub const MAX_SCALE_CODE: u8 = 15;

/// The deviation of the weights that the tables are made for.
const DEVIATION: f32 = 16.0;

const STATES: usize = 256;

/// What noise of deviation 1 becomes worse by at each width: the tables' mean squared errors.
const NOISE_ERRORS: [f32; 8] = [0.311, 0.0849, 0.0233, 6.5e-3, 2.28e-3, 6.9e-4, 3.3e-4, 8.2e-5];

/// How far values reach in deviations, or may be exceeded where few of them are large.
const REACHES: [f32; 8] = [1e9, 1e9, 6.0, 4.6, 3.6, 3.7, 3.9, 3.9];

/// From so many bits on, tables are as good as grids of even steps: weights should fill them, as
/// clipping costs more than coarser steps.
const EVEN_BITS: u8 = 5;

/// What the windows of groups of this width are worth.
pub fn values(width: BitWidth) -> &'static Values {
    static VALUES: LazyLock<Vec<Values>> = LazyLock::new(|| {
        let widths = (1..=8).filter_map(BitWidth::new);
        widths
            .map(|width| {
                let value =
                    |entry| value_step(width) * f32::from(entry) - f32::from(TRELLIS_CENTER);
                WindowTable::of(width).entries().map(value)
            })
            .collect()
    });
    &VALUES[usize::from(width.bits()) - 1]
}

/// The factor that suits each row of a run: `w` in units of it look like the noise that the tables
/// are made for.
pub fn suitable_factors(w: &[Lanes], importance: &[f32], width: BitWidth) -> Lanes {
    let total: f32 = importance.iter().sum();
    let (mut squares, mut largest) = ([0.0; TILE_ROWS], [0f32; TILE_ROWS]);
    for (w, importance) in w.iter().zip(importance) {
        for r in 0..TILE_ROWS {
            squares[r] += importance * w[r] * w[r];
            largest[r] = largest[r].max(w[r].abs());
        }
    }
    let reach = REACHES[usize::from(width.bits()) - 1];
    zip(&squares, &largest, |squares, largest| {
        let deviation = if width.bits() < EVEN_BITS { (squares / total).sqrt() } else { 0.0 };
        deviation.max(largest / reach) / DEVIATION
    })
}

/// About the importance-weighted squared error that a run is left with at a width.
pub fn expected_error(w: &[Lanes], importance: &[f32], width: BitWidth) -> Lanes {
    let total: f32 = importance.iter().sum();
    let noise = NOISE_ERRORS[usize::from(width.bits()) - 1];
    suitable_factors(w, importance, width)
        .map(|factor| noise * total * (DEVIATION * factor).powi(2))
}

/// The search, and its memory, which is taken at its first use.
#[derive(Default)]
pub struct Viterbi {
    /// Of the best path to each state, before the first step and after each.
    costs: Vec<[f32; STATES]>,
}

/// One value for each step along the ring, from its end to its start.
type Steps = [f32; STRIP_ROWS];

/// A column as the search walks through it: what to come close to, and what values are multiplied
/// with.
struct Walk {
    targets: Steps,
    factors: Steps,
}

impl Walk {
    fn of(w: [&Lanes; 2], factors: [&Lanes; 2]) -> Self {
        let in_order = |lanes: [&Lanes; 2]| {
            let mut steps = [0.0; STRIP_ROWS];
            for (row, &value) in lanes.into_iter().flatten().enumerate() {
                steps[STRIP_ROWS - 1 - ring_place(row)] = value;
            }
            steps
        };
        Self { targets: in_order(w), factors: in_order(factors) }
    }

    /// Beginning on the opposite side of the ring.
    fn turned(&self) -> Self {
        let turned =
            |steps: &Steps| std::array::from_fn(|i| steps[(i + STRIP_ROWS / 2) % STRIP_ROWS]);
        Self { targets: turned(&self.targets), factors: turned(&self.factors) }
    }
}

impl Viterbi {
    /// The windows of the least squared error for weights `factor * value`.
    pub fn windows(
        &mut self,
        width: BitWidth,
        w: [&Lanes; 2],
        factors: [&Lanes; 2],
    ) -> [CodeColumn; 2] {
        if is_grid(width) {
            let nearest = |tile: usize| {
                std::array::from_fn(|r| grid_code(width, w[tile][r], factors[tile][r]))
            };
            return [nearest(0), nearest(1)];
        }
        let walk = Walk::of(w, factors);
        let turned = walk.turned();
        self.search(width, &turned, None);
        let through = self.path(width, None)[STRIP_ROWS / 2 - 1];
        self.search(width, &walk, Some(through));
        let path = self.path(width, Some(through));
        by_row(&path)
    }

    /// The windows of the best open path: close to [`Self::windows`], for half of the work.
    fn open_windows(
        &mut self,
        width: BitWidth,
        w: [&Lanes; 2],
        factors: [&Lanes; 2],
    ) -> [CodeColumn; 2] {
        if is_grid(width) {
            return self.windows(width, w, factors);
        }
        let walk = Walk::of(w, factors);
        self.search(width, &walk, None);
        let path = self.path(width, None);
        by_row(&path)
    }

    fn search(&mut self, width: BitWidth, walk: &Walk, start: Option<u8>) {
        self.costs.resize(STRIP_ROWS + 1, [0.0; STATES]);
        self.costs[0] = match start {
            None => [0.0; STATES],
            Some(state) => {
                let mut costs = [f32::MAX; STATES];
                costs[usize::from(state)] = 0.0;
                costs
            }
        };
        let search = match width.bits() {
            1 => search_1,
            2 => search_2,
            3 => search_3,
            4 => search_4,
            5 => search_5,
            _ => search_6,
        };
        search(&mut self.costs, values(width), walk);
    }

    /// The states of the best path, by step; it ends in `end`.
    fn path(&self, width: BitWidth, end: Option<u8>) -> [u8; STRIP_ROWS] {
        let (bits, kept) = (usize::from(width.bits()), STATES >> width.bits());
        let least = |costs: &[f32; STATES], states: &mut dyn Iterator<Item = usize>| {
            states.min_by(|&a, &b| costs[a].total_cmp(&costs[b])).expect("a state")
        };
        let mut state = match end {
            Some(state) => usize::from(state),
            None => least(&self.costs[STRIP_ROWS], &mut (0..STATES)),
        };
        let mut path = [0; STRIP_ROWS];
        for step in (0..STRIP_ROWS).rev() {
            path[step] = state as u8;
            state = least(&self.costs[step], &mut (state >> bits..STATES).step_by(kept));
        }
        path
    }
}

/// The states of a path by the rows that they are the windows of.
fn by_row(path: &[u8; STRIP_ROWS]) -> [CodeColumn; 2] {
    let window = |row| path[STRIP_ROWS - 1 - ring_place(row)];
    [0, TILE_ROWS].map(|first| std::array::from_fn(|r| window(first + r)))
}

/// Whether the windows of a width are worth what their codes are.
fn is_grid(width: BitWidth) -> bool {
    width.bits() >= 7
}

/// The code of a grid that is nearest to `w`.
fn grid_code(width: BitWidth, w: f32, factor: f32) -> u8 {
    let per_value = f32::from(width.max_code() / 2 + 1) / f32::from(TRELLIS_CENTER);
    let value = if factor == 0.0 { 0.0 } else { w / factor };
    let code = (value + f32::from(TRELLIS_CENTER)) * per_value;
    code.round_ties_even().clamp(0.0, width.max_code().into()) as u8
}

/// The costs of the best paths to all states after each step. The state before `state` has its
/// high bits as low ones: there are `2^BITS` of them.
#[inline(always)]
fn search<const BITS: usize>(costs: &mut [[f32; STATES]], values: &Values, walk: &Walk) {
    let kept = STATES >> BITS;
    for step in 0..STRIP_ROWS {
        let (before, after) = costs.split_at_mut(step + 1);
        let (before, after) = (&before[step], &mut after[0]);
        let mut best = [0.0f32; STATES / 2];
        best[..kept].copy_from_slice(&before[..kept]);
        for before in before.chunks_exact(kept).skip(1) {
            for (best, &cost) in best[..kept].iter_mut().zip(before) {
                *best = if cost < *best { cost } else { *best };
            }
        }
        let (target, factor) = (walk.targets[step], walk.factors[step]);
        let of_kept = after.chunks_exact_mut(1 << BITS).zip(values.chunks_exact(1 << BITS));
        for ((after, values), best) in of_kept.zip(&best[..kept]) {
            for (cost, value) in after.iter_mut().zip(values) {
                let error = target - factor * value;
                *cost = best + error * error;
            }
        }
    }
}

per_isa! {
    fn search_1(costs: &mut [[f32; STATES]], values: &Values, walk: &Walk) {
        search::<1>(costs, values, walk);
    }
}
per_isa! {
    fn search_2(costs: &mut [[f32; STATES]], values: &Values, walk: &Walk) {
        search::<2>(costs, values, walk);
    }
}
per_isa! {
    fn search_3(costs: &mut [[f32; STATES]], values: &Values, walk: &Walk) {
        search::<3>(costs, values, walk);
    }
}
per_isa! {
    fn search_4(costs: &mut [[f32; STATES]], values: &Values, walk: &Walk) {
        search::<4>(costs, values, walk);
    }
}
per_isa! {
    fn search_5(costs: &mut [[f32; STATES]], values: &Values, walk: &Walk) {
        search::<5>(costs, values, walk);
    }
}
per_isa! {
    fn search_6(costs: &mut [[f32; STATES]], values: &Values, walk: &Walk) {
        search::<6>(costs, values, walk);
    }
}

/// Scale codes of a run for both tiles of a strip, whose row scales are `d`.
pub fn fit_scales(
    viterbi: &mut Viterbi,
    d: [&Lanes; 2],
    w: [&[Lanes]; 2],
    importance: &[f32],
    width: BitWidth,
) -> [CodeColumn; 2] {
    let values = values(width);
    let code = |factor: f32, d: f32| match d == 0.0 {
        true => 0.0,
        false => (factor / d).round_ties_even().clamp(1.0, MAX_SCALE_CODE.into()),
    };
    let suitable = w.map(|w| suitable_factors(w, importance, width));
    let mut tried: [Lanes; 2] = [0, 1].map(|tile| zip(&suitable[tile], d[tile], code));
    let mut best = tried;
    let mut best_errors = [[f32::INFINITY; TILE_ROWS]; 2];
    for _ in 0..SCALE_TRIALS {
        let factors = [0, 1].map(|tile| zip(&tried[tile], d[tile], |s, d| s * d));
        let mut sums = [Sums::default(); 2];
        for (i, &importance) in importance.iter().enumerate() {
            let w = w.map(|w| &w[i]);
            let windows = viterbi.open_windows(width, w, factors.each_ref());
            for tile in 0..2 {
                sums[tile].add(importance, w[tile], &windows[tile], values, &factors[tile]);
            }
        }
        for tile in 0..2 {
            let Sums { errors, products, squares } = &sums[tile];
            for r in 0..TILE_ROWS {
                if errors[r] < best_errors[tile][r] {
                    best_errors[tile][r] = errors[r];
                    best[tile][r] = tried[tile][r];
                }
                let fitted = if squares[r] > 0.0 { products[r] / squares[r] } else { 0.0 };
                let next = code(fitted, d[tile][r]);
                // The fit stays: one step more.
                tried[tile][r] = match next == tried[tile][r] {
                    true => (next + 1.0).min(MAX_SCALE_CODE.into()),
                    false => next,
                };
                if d[tile][r] == 0.0 {
                    tried[tile][r] = 0.0;
                }
            }
        }
    }
    best.map(|codes| codes.map(|code| code as u8))
}

/// Scale codes that are tried for a run.
const SCALE_TRIALS: usize = 3;

/// Sums over the columns of a run for each row: errors, and for the least-squares factor products
/// of weights and values, and squares of values.
#[derive(Clone, Copy, Default)]
struct Sums {
    errors: Lanes,
    products: Lanes,
    squares: Lanes,
}

impl Sums {
    fn add(
        &mut self,
        importance: f32,
        w: &Lanes,
        windows: &CodeColumn,
        values: &Values,
        factors: &Lanes,
    ) {
        for r in 0..TILE_ROWS {
            let value = values[usize::from(windows[r])];
            let error = w[r] - factors[r] * value;
            self.errors[r] += importance * error * error;
            self.products[r] += importance * w[r] * value;
            self.squares[r] += importance * value * value;
        }
    }
}
