//! Properties of one layer's quantization, on random layers.

use std::borrow::Cow;

use slim_formats::{
    Weight,
    slim::{BitWidth, ScaleCoding},
};
use slim_kernels::{linalg::Precision, weight};

use crate::{
    Activations, Engine, Method, Settings,
    calibrator::Stage,
    coder::Coder,
    hessian::Hessian,
    layer::{LayerInputs, layout, quantize_layer, round_layer, sweep_layer},
    sweep::{Curvature, REFINEMENTS, SweptTile, sweep},
};

const COLS: usize = 80;
const ROWS: usize = 40;
pub const CODINGS: [ScaleCoding; 3] = [
    ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 4 },
    ScaleCoding::TwoLevel { sub_group: 16, scale_bits: 6 },
    ScaleCoding::Paper,
];

pub fn settings(bits: u8, coding: ScaleCoding, method: Method) -> Settings {
    Settings {
        bits,
        group_size: 32,
        coding,
        method,
        reference: false,
        embed_bits: 8,
        samples: 2,
        context: 96,
        seed: 0,
        steps: 0,
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
            let inputs =
                LayerInputs::new(Stage::new(&activations, None, None), &settings, &Engine::Cpu)
                    .unwrap();
            let (_, tiles) = sweep_layer(&weights, &inputs, &settings);
            let layer = quantize_layer(&weights, &inputs, &settings, None);
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
            let inputs =
                LayerInputs::new(Stage::new(&activations, None, None), &settings, &Engine::Cpu)
                    .unwrap();
            quantize_layer(&weights, &inputs, &settings, None).error
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
    let inputs =
        LayerInputs::new(Stage::new(&activations, None, None), &settings, &Engine::Cpu).unwrap();
    let layer = quantize_layer(&weights, &inputs, &settings, None);
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
fn zero_layer_and_zero_inputs_give_zeros() {
    let zero_inputs = Activations::new(2, 96, COLS, &mut (1 << 20)).unwrap();
    for coding in CODINGS {
        for activations in [&activations(), &zero_inputs] {
            let settings = settings(2, coding, Method::Slim);
            let inputs =
                LayerInputs::new(Stage::new(activations, None, None), &settings, &Engine::Cpu)
                    .unwrap();
            let layer = quantize_layer(&vec![0.0; ROWS * COLS], &inputs, &settings, None);
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
        let inputs =
            LayerInputs::new(Stage::new(&activations, None, None), &settings, &Engine::Cpu)
                .unwrap();
        quantize_layer(&weights, &inputs, &settings, None).packed
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
    let tall = round_layer(TALL, 16, &settings, rows).unwrap();
    let last = |range: std::ops::Range<usize>| rows(range.start + TALL - 40..range.end + TALL - 40);
    let last = round_layer(40, 16, &settings, last).unwrap();
    for tile in 0..3 {
        assert_eq!(tall.view().tile_codes(TALL / 16 - 2 + tile), last.view().tile_codes(tile));
    }
}

const WIDE: usize = 336;

/// What column `col` is worth with the code nearest to `w`, for widths of 3 bits and runs of 32 columns in groups of 64.
fn nearest(tile: &SweptTile, lane: usize, col: usize, w: f64) -> f64 {
    let of_col =
        |(group, number, _): &&(usize, usize, _)| 64 * group + 32 * number == col / 32 * 32;
    let (_, _, scales) = tile.runs.iter().find(of_col).unwrap();
    let (factor, offset) = scales.affine(&tile.rows);
    let (factor, offset) = (f64::from(factor[lane]), f64::from(offset[lane]));
    factor * ((w - offset) / factor).round_ties_even().clamp(0.0, 7.0) + offset
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

    let (u, h) = (factor.values(), hessian.values());
    let at = |matrix: &[f32], i: usize, j: usize| f64::from(matrix[i * WIDE + j]);
    let (mut swept_otherwise, mut refined_otherwise, mut changed) = (0, 0, 0);
    for row in 0..ROWS {
        let (tile, lane) = (&swept[row / 16], row % 16);
        let of_row = |tile: &SweptTile| -> Vec<f64> {
            order.iter().map(|&col| f64::from(tile.dequantized[col][lane])).collect()
        };
        let start: Vec<f64> =
            order.iter().map(|&col| f64::from(weights[row * WIDE + col])).collect();
        let (mut w, found) = (start.clone(), of_row(tile));
        for i in 0..WIDE {
            let expected = nearest(tile, lane, order[i], w[i]);
            swept_otherwise += usize::from((found[i] - expected).abs() > 1e-5);
            let error = (w[i] - found[i]) / at(u, i, i);
            (i + 1..WIDE).for_each(|j| w[j] -= error * at(u, i, j));
        }
        let mut values = found.clone();
        for i in (0..REFINEMENTS).flat_map(|_| 0..WIDE) {
            let errors = start.iter().zip(&values).enumerate();
            let gradient: f64 = errors.map(|(j, (w, value))| (w - value) * at(h, j, i)).sum();
            values[i] = nearest(tile, lane, order[i], values[i] + gradient / at(h, i, i));
        }
        for ((refined, expected), swept) in
            of_row(&refined[row / 16]).iter().zip(&values).zip(&found)
        {
            refined_otherwise += usize::from((refined - expected).abs() > 1e-5);
            changed += usize::from((refined - swept).abs() > 1e-5);
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
                Stage::new(&activations, None, None),
                &settings(3, CODINGS[0], Method::Slim),
                &Engine::Cpu
            )
            .is_err()
        );
    }
}
