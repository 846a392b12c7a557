//! Properties of one layer's quantization, on random layers.

use std::borrow::Cow;

use half::f16;
use slim_formats::{
    Weight,
    slim::{Bands, BitWidth, ScaleCoding},
};
use slim_kernels::{linalg::Precision, weight};

use crate::{
    Activations, Engine, Method, Settings,
    activations::StageInputs,
    coder::{Coder, RunScales},
    hessian::Hessian,
    layer::{
        FactoredHessian, LayerInputs, QuantizedLayer, layout, quantize_layer, stream_layer,
        sweep_layer,
    },
    rows::{OutputHessian, Targets},
    sweep::{Curvature, REFINEMENTS, SweptTile, sweep},
};

const COLS: usize = 80;
const ROWS: usize = 40;
pub const CODINGS: [ScaleCoding; 4] = [
    ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 4 },
    ScaleCoding::TwoLevel { sub_group: 16, scale_bits: 6 },
    ScaleCoding::Paper,
    ScaleCoding::Trellis { sub_group: 32 },
];

pub fn settings(bits: u8, coding: ScaleCoding, method: Method) -> Settings {
    Settings {
        bits,
        group_size: 32,
        coding,
        method,
        embed_bits: Some(8),
        samples: 2,
        context: 96,
        seed: 0,
        steps: 0,
        draws_text: false,
        split_max_bytes: None,
        target: None,
    }
}

/// Values with roughly the bell shape of weights.
pub fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..len).map(|_| (0..4).map(|_| uniform()).sum()).collect()
}

/// Inputs whose channels are correlated and differ in size, as those of real layers are.
fn activations() -> Activations {
    let tokens = 2 * 96;
    let mut x = noise(tokens * COLS, 7);
    for token in x.chunks_exact_mut(COLS) {
        for j in 1..COLS {
            token[j] = 0.7 * token[j - 1] + token[j] * if j % 11 == 0 { 6.0 } else { 1.0 };
        }
    }
    let mut activations = Activations::new(2, 96, COLS, &mut (1 << 20)).unwrap();
    activations
        .fill(&Engine::Cpu, |batch| Ok(x[batch.start * 96 * COLS..batch.end * 96 * COLS].to_vec()))
        .unwrap();
    activations
}

/// A layer whose rows are on their own.
fn quantized(weights: &[f32], inputs: &LayerInputs<'_>, settings: &Settings) -> QuantizedLayer {
    let mut targets =
        Targets::new(weights.to_vec(), COLS, None, settings.coding.strip_rows()).unwrap();
    quantize_layer(&mut targets, 0..ROWS, inputs, settings, None)
}

fn dequantized(packed: &slim_formats::slim::PackedLayer) -> Vec<f32> {
    let mut out = vec![0.0; ROWS * COLS];
    weight::dequantize_rows(Weight::Packed(packed.view()), 0..ROWS, &mut out).unwrap();
    out
}

#[test]
fn packed_layer_holds_the_quantizers_own_weights_to_the_last_bit() {
    let (weights, activations) = (noise(ROWS * COLS, 1), activations());
    for coding in CODINGS {
        for bits in 1..=8 {
            let settings = settings(bits, coding, Method::Slim);
            let inputs = LayerInputs::new(
                StageInputs { activations: &activations, float: None },
                &settings,
                &Engine::Cpu,
            )
            .unwrap();
            let (_, tiles) = sweep_layer(&weights, &inputs, &settings);
            let layer = quantized(&weights, &inputs, &settings);
            let packed = dequantized(&layer.packed);
            for (row, values) in packed.chunks_exact(COLS).enumerate() {
                for (col, value) in values.iter().enumerate() {
                    let own = tiles[row / 16].dequantized[col][row % 16];
                    assert_eq!(*value, own, "{coding:?}, {bits} bits, row {row}, column {col}");
                }
            }
        }
    }
}

#[test]
fn error_falls_with_bits_and_with_the_sweep() {
    let (weights, activations) = (noise(ROWS * COLS, 2), activations());
    for coding in CODINGS {
        let error = |bits, method| {
            let settings = settings(bits, coding, method);
            let inputs = LayerInputs::new(
                StageInputs { activations: &activations, float: None },
                &settings,
                &Engine::Cpu,
            )
            .unwrap();
            quantized(&weights, &inputs, &settings).error
        };
        for bits in 2..=5 {
            assert!(error(bits, Method::Gptq) < error(bits, Method::RoundToNearest));
            assert!(error(bits + 1, Method::Gptq) < error(bits, Method::Gptq));
        }
    }
}

#[test]
fn reported_error_is_that_of_the_layers_outputs() {
    let (weights, activations) = (noise(ROWS * COLS, 3), activations());
    let settings = settings(3, CODINGS[0], Method::Slim);
    let inputs = LayerInputs::new(
        StageInputs { activations: &activations, float: None },
        &settings,
        &Engine::Cpu,
    )
    .unwrap();
    let layer = quantized(&weights, &inputs, &settings);
    let packed = dequantized(&layer.packed);
    let (mut error, mut total) = (0.0, 0.0);
    for sample in 0..2 {
        for x in activations.sample(sample).chunks_exact(COLS) {
            for (w, q) in weights.chunks_exact(COLS).zip(packed.chunks_exact(COLS)) {
                let dot = |w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(x * w)).sum::<f64>();
                error += (dot(w) - dot(q)).powi(2);
                total += dot(w).powi(2);
            }
        }
    }
    let reported = f64::from(layer.error);
    assert!((reported / (error / total) - 1.0).abs() < 1e-3, "{reported} for {}", error / total);
}

#[test]
fn rows_that_make_up_for_each_other_cost_the_loss_less() {
    const ROWS: usize = 192;
    let (weights, activations) = (noise(ROWS * COLS, 12), activations());
    let hessian = Hessian::of(&activations, &Engine::Cpu, Precision::Fine).unwrap();
    // Gradients at an output resemble those at the one 64 rows before it.
    let mut dy = noise(500 * ROWS, 13);
    dy.chunks_exact_mut(ROWS).for_each(|dy| (64..ROWS).for_each(|i| dy[i] += 2.0 * dy[i - 64]));
    let outputs = || {
        let mut outputs = OutputHessian::zeros(ROWS, &mut (1 << 20)).unwrap();
        outputs.add(&dy);
        outputs
    };
    let cost = |quantized: &[f32]| -> f64 {
        let errors: Vec<f32> = quantized.iter().zip(&weights).map(|(q, w)| q - w).collect();
        let of_token = |dy: &[f32]| {
            let col = |j: usize| dy.iter().zip(errors[j..].iter().step_by(COLS));
            (0..COLS).map(|j| col(j).map(|(dy, e)| dy * e).sum()).collect::<Vec<f32>>()
        };
        let through: Vec<f32> = dy.chunks_exact(ROWS).flat_map(of_token).collect();
        hessian.quadratic(&through)
    };
    for bits in [2, 4] {
        let settings = settings(bits, CODINGS[0], Method::Slim);
        let inputs = LayerInputs::new(
            StageInputs { activations: &activations, float: None },
            &settings,
            &Engine::Cpu,
        )
        .unwrap();
        let [alone, together] = [None, Some(outputs())].map(|outputs| {
            let mut targets =
                Targets::new(weights.clone(), COLS, outputs.as_ref(), settings.coding.strip_rows())
                    .unwrap();
            // Two bands.
            let quantize = |rows| quantize_layer(&mut targets, rows, &inputs, &settings, None);
            let bands = [0..48, 48..ROWS].map(quantize);
            let bands: Vec<_> = bands.into_iter().map(|band| band.packed).collect();
            let mut out = vec![0.0; ROWS * COLS];
            let weight = Weight::Bands(Bands::new(&bands));
            weight::dequantize_rows(weight, 0..ROWS, &mut out).unwrap();
            cost(&out)
        });
        assert!(together < 0.9 * alone, "{bits} bits: {together} for {alone}");
    }
}

#[test]
fn zero_layer_and_zero_inputs_give_zeros() {
    let zero_inputs = Activations::new(2, 96, COLS, &mut (1 << 20)).unwrap();
    for coding in CODINGS {
        for activations in [&activations(), &zero_inputs] {
            let settings = settings(2, coding, Method::Slim);
            let inputs =
                LayerInputs::new(StageInputs { activations, float: None }, &settings, &Engine::Cpu)
                    .unwrap();
            let layer = quantized(&vec![0.0; ROWS * COLS], &inputs, &settings);
            assert!(dequantized(&layer.packed).iter().all(|&w| w == 0.0));
            assert_eq!(layer.error, 0.0);
        }
    }
}

#[test]
fn result_does_not_depend_on_the_number_of_threads() {
    let (weights, activations) = (noise(ROWS * COLS, 6), activations());
    let settings = settings(3, CODINGS[0], Method::Slim);
    let quantize = || {
        let inputs = LayerInputs::new(
            StageInputs { activations: &activations, float: None },
            &settings,
            &Engine::Cpu,
        )
        .unwrap();
        quantized(&weights, &inputs, &settings).packed
    };
    let with_threads = |threads| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(quantize)
    };
    assert_eq!(with_threads(1), with_threads(3));
}

#[test]
fn tall_layer_is_the_same_in_slabs() {
    const TALL: usize = 2 * 1024 + 40;
    let weights = noise(TALL * 16, 8);
    let settings = settings(8, CODINGS[1], Method::RoundToNearest);
    let rows = |rows: std::ops::Range<usize>| Ok(weights[rows.start * 16..rows.end * 16].to_vec());
    let tall = stream_layer(TALL, 16, &settings, None, None, rows).unwrap();
    let last = |range: std::ops::Range<usize>| rows(range.start + TALL - 40..range.end + TALL - 40);
    let last = stream_layer(40, 16, &settings, None, None, last).unwrap();
    for tile in 0..3 {
        assert_eq!(tall.view().tile_codes(TALL / 16 - 2 + tile), last.view().tile_codes(tile));
    }
}

#[test]
fn rows_that_come_in_slabs_are_swept_by_their_hessian() {
    let (weights, activations) = (noise(ROWS * COLS, 9), activations());
    let hessian = Hessian::of(&activations, &Engine::Cpu, Precision::Fine).unwrap();
    for coding in CODINGS {
        let settings = settings(3, coding, Method::Slim);
        let cost = |factored: Option<&FactoredHessian>| {
            let rows = |rows: std::ops::Range<usize>| {
                Ok(weights[rows.start * COLS..rows.end * COLS].to_vec())
            };
            let layer = stream_layer(ROWS, COLS, &settings, factored, None, rows).unwrap();
            let errors = weights.iter().zip(dequantized(&layer)).map(|(a, b)| a - b);
            hessian.quadratic(&errors.collect::<Vec<_>>())
        };
        let factored = FactoredHessian::new(hessian.clone(), &settings).unwrap();
        let (swept, rounded) = (cost(Some(&factored)), cost(None));
        assert!(swept < 0.5 * rounded, "{coding:?}: {swept} for {rounded}");
    }
}

const WIDE: usize = 336;

/// A row of a quantized layer, one column after the other, in widths of 3 bits and runs of 32
/// columns in groups of 64.
struct Row {
    /// Scale and minimum code of each column.
    scales: Vec<(f64, f64)>,
    d: f64,
    m: f64,
    codes: Vec<f64>,
}

impl Row {
    /// Row `lane` of a tile, its columns in `order`.
    fn new(tile: &SweptTile, lane: usize, order: &[usize]) -> Self {
        let scales = order.iter().map(|col| {
            let of_col =
                |(group, number, _): &&(usize, usize, _)| 64 * group + 32 * number == col / 32 * 32;
            match tile.runs.iter().find(of_col).unwrap().2 {
                RunScales::TwoLevel { scale, minimum } => {
                    (scale[lane].into(), minimum[lane].into())
                }
                _ => unreachable!("two-level scales"),
            }
        });
        Self {
            scales: scales.collect(),
            d: tile.rows.d[lane].into(),
            m: tile.rows.m[lane].into(),
            codes: order.iter().map(|&col| tile.codes[col][lane].into()).collect(),
        }
    }

    fn value(&self, i: usize) -> f64 {
        let (s, z) = self.scales[i];
        self.d * s * self.codes[i] - self.m * z
    }

    fn values(&self) -> Vec<f64> {
        (0..self.codes.len()).map(|i| self.value(i)).collect()
    }

    /// Takes the code of column `i` that is nearest to `w`.
    fn round(&mut self, i: usize, w: f64) {
        let (s, z) = self.scales[i];
        self.codes[i] = ((w + self.m * z) / (self.d * s)).round_ties_even().clamp(0.0, 7.0);
    }

    /// Takes the row scales with the least `e H e^T`, for errors `e` from the weights `w`.
    fn refit(&mut self, w: &[f64], h: impl Fn(usize, usize) -> f64) {
        let n = w.len();
        let errors: Vec<f64> = w.iter().zip(self.values()).map(|(w, value)| w - value).collect();
        let a: Vec<f64> = (0..n).map(|i| self.scales[i].0 * self.codes[i]).collect();
        let z: Vec<f64> = (0..n).map(|i| -self.scales[i].1).collect();
        let form = |x: &[f64], y: &[f64]| -> f64 {
            (0..n).map(|i| x[i] * (0..n).map(|j| h(i, j) * y[j]).sum::<f64>()).sum()
        };
        let (aa, az, zz) = (form(&a, &a), form(&a, &z), form(&z, &z));
        let (of_d, of_m) = (form(&a, &errors), form(&z, &errors));
        let determinant = aa * zz - az * az;
        let stored = |scale: f64| f16::from_f64(scale).to_f64();
        self.d = stored(self.d + (of_d * zz - of_m * az) / determinant);
        self.m = stored(self.m + (of_m * aa - of_d * az) / determinant);
    }
}

/// Blocks of columns and their products only save time.
#[test]
fn wide_layer_is_quantized_as_if_column_by_column() {
    let weights = noise(ROWS * WIDE, 9);
    let mut activations = Activations::new(1, 600, WIDE, &mut (1 << 20)).unwrap();
    let mut x = noise(600 * WIDE, 10);
    (1..x.len()).for_each(|i| x[i] += 0.7 * x[i - 1]);
    activations.fill(&Engine::Cpu, |_| Ok(x.clone())).unwrap();
    let runs = (0..WIDE).step_by(32).map(|first| first..WIDE.min(first + 32));
    let order: Vec<usize> = runs.rev().flatten().collect();
    let hessian =
        Hessian::of(&activations, &Engine::Cpu, Precision::Fine).unwrap().reordered(&order);
    let factor = hessian.factor(0.01).unwrap().0;
    let layout = layout(ROWS, WIDE, 64, CODINGS[0], &[BitWidth::new(3).unwrap(); 6]);
    let curvature = |hessian| Curvature {
        factor: Some(factor.values()),
        importance: Cow::Owned(vec![1.0; WIDE]),
        order: Cow::Borrowed(&order),
        hessian,
    };
    let quantize = |hessian| sweep(&weights, &curvature(hessian), &layout, Coder::Best(CODINGS[0]));
    let (swept, refined) = (quantize(None), quantize(Some(hessian.values())));

    let at = |matrix: &[f32], i: usize, j: usize| f64::from(matrix[i * WIDE + j]);
    let h = |i, j| at(hessian.values(), i, j);
    let (mut swept_otherwise, mut refined_otherwise, mut changed) = (0, 0, 0);
    for row in 0..ROWS {
        let (tile, lane) = (row / 16, row % 16);
        let start: Vec<f64> =
            order.iter().map(|&col| f64::from(weights[row * WIDE + col])).collect();
        let found = Row::new(&swept[tile], lane, &order);
        let (mut w, mut expected) = (start.clone(), Row::new(&swept[tile], lane, &order));
        for i in 0..WIDE {
            expected.round(i, w[i]);
            swept_otherwise += usize::from(expected.codes[i] != found.codes[i]);
            let error = (w[i] - found.value(i)) / at(factor.values(), i, i);
            (i + 1..WIDE).for_each(|j| w[j] -= error * at(factor.values(), i, j));
        }
        let mut expected = Row::new(&swept[tile], lane, &order);
        expected.refit(&start, h);
        for i in (0..REFINEMENTS).flat_map(|_| 0..WIDE) {
            let errors = start.iter().zip(expected.values()).enumerate();
            let gradient: f64 = errors.map(|(j, (w, value))| (w - value) * h(i, j)).sum();
            expected.round(i, expected.value(i) + gradient / h(i, i));
        }
        expected.refit(&start, h);
        let refined = Row::new(&refined[tile], lane, &order);
        for (i, (value, expected)) in refined.values().iter().zip(expected.values()).enumerate() {
            // Row scales may be rounded to the neighbour; a step is a tenth.
            refined_otherwise += usize::from((value - expected).abs() > 0.01);
            changed += usize::from(refined.codes[i] != found.codes[i]);
        }
    }
    // A code at a rounding tie may fall to either side.
    let few = ROWS * WIDE / 1000;
    assert!(
        swept_otherwise <= few && refined_otherwise <= few,
        "{swept_otherwise}, {refined_otherwise}"
    );
    assert!(changed > 10 * few, "{changed}");
}

#[test]
fn inputs_that_are_not_finite_are_refused() {
    for value in [f32::NAN, f32::INFINITY, f32::MAX] {
        let mut activations = activations();
        activations.sample_mut(1)[17] = value;
        assert!(
            LayerInputs::new(
                StageInputs { activations: &activations, float: None },
                &settings(3, CODINGS[0], Method::Slim),
                &Engine::Cpu
            )
            .is_err()
        );
    }
}
