//! Many tokens times packed codes and ggml's blocks: each as if it were alone.

use slim_formats::{DenseTensor, Layout, Weight};

use super::{
    Fill, INPUT_NMSE, Layer, Noise, assert_nmse, bit_widths, codings,
    dense::{TYPES, blocks, in_order_of_use},
    product, widened,
};
use crate::{
    Backend, Cpu,
    matvec::{Method, batch::multiply_by},
    weight::shape,
};

/// Blocks of tokens of all sizes, and more tokens than are multiplied before the next panel.
const TOKENS: [usize; 7] = [2, 3, 7, 8, 9, 33, 200];

/// Many tokens times ggml's blocks against each of them alone: the order of f32 operations differs.
/// Measured 1.2e-13. Times packed codes the bits are the same.
const ALONE_NMSE: f64 = 1e-11;

/// Calls `check` with a name, a matrix of each kind and its values.
fn for_each_weight(check: impl Fn(&str, Weight<'_>, &[f64])) {
    if let Method::Float = Method::fastest() {
        eprintln!("skipped: this processor does not multiply bytes");
        return;
    }
    let mut noise = Noise(35);
    for coding in codings() {
        for bits in 0..=8 {
            let (rows, cols, group_size) = (40, 1328_usize, 128);
            let bits = bit_widths(&mut noise, bits, cols.div_ceil(group_size));
            let shape = [rows, cols, group_size];
            let layer = Layer::new(&mut noise, Fill::Random, shape, coding, &bits);
            check(&format!("{coding:?}, {bits:?}"), layer.weight(), &layer.weights);
        }
    }
    for (dtype, halves) in TYPES {
        for head_dim in [0, 24] {
            let (rows, cols) = if head_dim == 0 { (15, 512) } else { (48, 2304) };
            let layout = match head_dim {
                0 => Layout::AsStored,
                head_dim => Layout::Interleaved { head_dim, first: 0, rotated: head_dim },
            };
            let (bytes, stored) = blocks(&mut noise, dtype, halves, rows * cols);
            let tensor = DenseTensor { dtype, rows, cols, bytes: &bytes, layout, scales: None };
            let values = in_order_of_use(layout, &stored, cols);
            check(&format!("{dtype:?} [{rows}, {cols}]"), Weight::Dense(tensor), &values);
        }
    }
}

/// `x[m, cols]` times a matrix.
fn multiplied(weight: Weight<'_>, x: &[f32]) -> Vec<f32> {
    let (rows, cols) = shape(weight);
    let mut out = vec![f32::NAN; x.len() / cols * rows];
    Cpu.matmul(weight, x, x.len() / cols, &mut out).unwrap();
    out
}

/// The same, token by token.
fn multiplied_alone(weight: Weight<'_>, x: &[f32]) -> Vec<f32> {
    x.chunks(shape(weight).1).flat_map(|x| multiplied(weight, x)).collect()
}

#[track_caller]
fn assert_as_alone(what: &str, weight: Weight<'_>, found: &[f32], alone: &[f32]) {
    match weight {
        Weight::Dense(_) => assert_nmse(what, found, &widened(alone), ALONE_NMSE),
        _ => assert_eq!(bits(found), bits(alone), "{what}"),
    }
}

/// With a few outliers, whose steps have second codes.
fn inputs(seed: u64, len: usize) -> Vec<f32> {
    let mut x = Noise(seed).vector(len, 1.0);
    x.iter_mut().step_by(137).for_each(|x| *x *= 1e3);
    x
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().copied().map(f32::to_bits).collect()
}

#[test]
fn batch_agrees_with_each_token_alone_and_with_floats() {
    for_each_weight(|what, weight, values| {
        let (rows, cols) = shape(weight);
        let x = Noise(36).vector(TOKENS[6] * cols, 1.0);
        let alone = multiplied_alone(weight, &x);
        let exact = product(&x, values, cols);
        let mut out = Vec::new();
        for m in TOKENS {
            out = multiplied(weight, &x[..m * cols]);
            assert_as_alone(&format!("{what}, {m} tokens"), weight, &out, &alone[..m * rows]);
        }
        assert_nmse(what, &out, &exact, INPUT_NMSE);
    });
}

#[test]
fn batch_of_every_method_gives_the_same_bits() {
    for_each_weight(|what, weight, _| {
        let (rows, cols) = shape(weight);
        let x = inputs(37, 33 * cols);
        let alone = multiplied_alone(weight, &x);
        let expected = bits(&multiplied(weight, &x));
        for method in Method::all() {
            let mut out = vec![f32::NAN; 33 * rows];
            if multiply_by(method, weight, &x, 33, &mut out).is_some() {
                assert_eq!(bits(&out), expected, "{method:?}, {what}");
                assert_as_alone(&format!("{method:?}, {what}"), weight, &out, &alone);
            }
        }
    });
}

/// Matrices with one input, which round it alike or not, give what each gives alone.
#[test]
fn matrices_with_one_input_agree_with_each_alone() {
    let mut noise = Noise(38);
    let cols = 1328_usize;
    let mut layer = |rows, group_size, coding, bits| {
        let bits = bit_widths(&mut noise, bits, cols.div_ceil(group_size));
        Layer::new(&mut noise, Fill::Random, [rows, cols, group_size], coding, &bits)
    };
    for coding in codings() {
        let layers =
            [layer(40, 128, coding, 2), layer(7, 128, coding, 0), layer(64, 64, coding, 3)];
        let x = inputs(39, 20 * cols);
        for m in [1, 3, 20] {
            for count in [1, 2, 3] {
                let weights: Vec<_> = layers[..count].iter().map(Layer::weight).collect();
                let x = &x[..m * cols];
                let outs = weights.iter().map(|w| vec![f32::NAN; m * shape(*w).0]);
                let mut outs: Vec<Vec<f32>> = outs.collect();
                let mut slices: Vec<&mut [f32]> = outs.iter_mut().map(Vec::as_mut_slice).collect();
                Cpu.matmul_each(&weights, x, m, &mut slices).unwrap();
                for (index, (weight, out)) in weights.iter().zip(&outs).enumerate() {
                    let alone = bits(&multiplied(*weight, x));
                    assert_eq!(bits(out), alone, "{coding:?}, {m} tokens, {index} of {count}");
                }
            }
        }
    }
}

#[test]
fn batch_row_does_not_depend_on_the_others_nor_on_threads() {
    for_each_weight(|what, weight, _| {
        let (rows, cols) = shape(weight);
        let x = inputs(38, TOKENS[6] * cols);
        let expected = multiplied(weight, &x);
        for m in TOKENS {
            // The last `m` tokens by themselves: each lies elsewhere, beside other ones.
            let out = multiplied(weight, &x[x.len() - m * cols..]);
            let expected = &expected[expected.len() - m * rows..];
            assert_eq!(bits(&out), bits(expected), "{what}, {m} tokens");
        }
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let out = pool.install(|| multiplied(weight, &x));
            assert_eq!(bits(&out), bits(&expected), "{what}, {threads} threads");
        }
    });
}
