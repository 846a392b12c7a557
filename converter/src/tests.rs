//! Properties of one layer's quantization, on random layers.

use slim_formats::{Weight, slim::ScaleCoding};
use slim_kernels::weight;

use crate::{
    Activations, Engine, Method, Settings,
    calibrator::Stage,
    layer::{LayerInputs, quantize_layer, round_layer, sweep_layer},
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
    activations.fill(|i| Ok(x[i * 96 * COLS..][..96 * COLS].to_vec())).unwrap();
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
