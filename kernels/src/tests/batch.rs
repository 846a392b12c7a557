//! Many tokens times packed codes and ggml's blocks: as exact as one token, whatever is beside it.

use slim_formats::{DenseTensor, Layout, Weight};

use super::{
    Fill, INPUT_NMSE, Layer, MATMUL_NMSE, Noise, assert_nmse, bit_widths, codings,
    dense::{TYPES, blocks, in_order_of_use},
    product, widened,
};
use crate::{
    Backend, Cpu,
    matvec::{Method, batch::multiply_by},
    weight::shape,
};

/// Blocks of tokens of all sizes, and more tokens than are multiplied before the next panel.
const TOKENS: [usize; 5] = [2, 3, 8, 33, 200];

/// Many tokens against each of them alone: only the order of f32 operations differs. Measured
/// 1.2e-13.
const ALONE_NMSE: f64 = 1e-11;

/// Calls `check` with a name, a matrix of each kind and its values.
fn for_each_weight(check: impl Fn(&str, Weight<'_>, &[f64])) {
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
                head_dim => Layout::Interleaved { head_dim, rotated: head_dim },
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

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().copied().map(f32::to_bits).collect()
}

#[test]
fn batch_agrees_with_each_token_alone_and_with_floats() {
    for_each_weight(|what, weight, values| {
        let (rows, cols) = shape(weight);
        let x = Noise(36).vector(TOKENS[4] * cols, 1.0);
        let alone: Vec<f64> =
            x.chunks(cols).flat_map(|x| widened(&multiplied(weight, x))).collect();
        let exact = product(&x, values, cols);
        let mut out = Vec::new();
        for m in TOKENS {
            out = multiplied(weight, &x[..m * cols]);
            assert_nmse(&format!("{what}, {m} tokens"), &out, &alone[..m * rows], ALONE_NMSE);
        }
        assert_nmse(what, &out, &exact, INPUT_NMSE);
    });
}

/// With outliers, too, whose steps have second codes.
#[test]
fn batch_of_every_method_gives_the_same_bits() {
    for_each_weight(|what, weight, _| {
        let (rows, cols) = shape(weight);
        let mut x = Noise(37).vector(33 * cols, 1.0);
        x.iter_mut().step_by(137).for_each(|x| *x *= 1e3);
        let alone: Vec<f64> =
            x.chunks(cols).flat_map(|x| widened(&multiplied(weight, x))).collect();
        let expected = bits(&multiplied(weight, &x));
        for method in Method::all() {
            let mut out = vec![f32::NAN; 33 * rows];
            if multiply_by(method, weight, &x, 33, &mut out).is_some() {
                assert_nmse(&format!("{method:?}, {what}"), &out, &alone, MATMUL_NMSE);
                assert_eq!(bits(&out), expected, "{method:?}, {what}");
            }
        }
    });
}

#[test]
fn batch_row_does_not_depend_on_the_others_nor_on_threads() {
    for_each_weight(|what, weight, _| {
        let (rows, cols) = shape(weight);
        let x = Noise(38).vector(TOKENS[4] * cols, 1.0);
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
