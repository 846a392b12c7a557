//! One token times weights in ggml's types.

use half::f16;
use slim_formats::{DType, DenseTensor, Layout, Weight};

use super::{MATMUL_NMSE, Noise, assert_nmse, product, widened};
use crate::{
    Backend, Cpu,
    ggml::dequantize,
    matvec::{Input, Method, dense_by},
};

/// Each quantized type, and where in a block its halves lie.
pub(super) const TYPES: [(DType, &[usize]); 10] = [
    (DType::Q4_0, &[0]),
    (DType::Q4_1, &[0, 2]),
    (DType::Q5_0, &[0]),
    (DType::Q5_1, &[0, 2]),
    (DType::Q8_0, &[0]),
    (DType::Q2_K, &[80, 82]),
    (DType::Q3_K, &[108]),
    (DType::Q4_K, &[0, 2]),
    (DType::Q5_K, &[0, 2]),
    (DType::Q6_K, &[208]),
];

/// Blocks of random codes and scales of both signs, and what they are worth.
pub(super) fn blocks(
    noise: &mut Noise,
    dtype: DType,
    halves: &[usize],
    len: usize,
) -> (Vec<u8>, Vec<f32>) {
    let (_, block_bytes) = dtype.block().unwrap();
    let len_bytes = dtype.size_in_bytes(len as u64).unwrap() as usize;
    let mut bytes: Vec<u8> = (0..len_bytes).map(|_| noise.next() as u8).collect();
    for block in bytes.chunks_exact_mut(block_bytes as usize) {
        for &at in halves {
            block[at..at + 2].copy_from_slice(&f16::from_f32(noise.signed()).to_le_bytes());
        }
    }
    let mut values = vec![f32::NAN; len];
    dequantize(dtype, &bytes, &mut values).unwrap();
    (bytes, values)
}

/// Row by row in the order of use, from the order of `layout`.
pub(super) fn in_order_of_use(layout: Layout, stored: &[f32], cols: usize) -> Vec<f64> {
    let rows = 0..stored.len() / cols;
    let row = |row| &stored[layout.stored_row(row).unwrap() * cols..][..cols];
    widened(&rows.flat_map(row).copied().collect::<Vec<_>>())
}

/// The input as `method` multiplies it.
pub(super) fn as_multiplied(method: Method, x: &[f32]) -> Vec<f32> {
    match method {
        Method::Integer(..) => Input::in_whole_steps(x).values(),
        Method::Float => x.to_vec(),
    }
}

#[test]
fn dense_matvec_of_every_quantized_type_agrees() {
    let mut noise = Noise(31);
    for (dtype, halves) in TYPES {
        for (rows, cols, head_dim) in [(1, 256, 0), (15, 512, 0), (48, 768, 24), (270, 256, 0)] {
            let layout = match head_dim {
                0 => Layout::AsStored,
                head_dim => Layout::Interleaved { head_dim, first: 0, rotated: head_dim },
            };
            let (bytes, stored) = blocks(&mut noise, dtype, halves, rows * cols);
            let weights = in_order_of_use(layout, &stored, cols);
            let tensor = DenseTensor { dtype, rows, cols, bytes: &bytes, layout, scales: None };
            let mut x = noise.vector(cols, 1.0);
            for outliers in [false, true] {
                if outliers {
                    x.iter_mut().step_by(37).for_each(|x| *x *= 1e3);
                }
                let mut in_integers: Option<Vec<f32>> = None;
                for method in Method::all() {
                    let what =
                        format!("{method:?}, {dtype:?} [{rows}, {cols}], outliers {outliers}");
                    let expected = product(&as_multiplied(method, &x), &weights, cols);
                    let mut out = vec![f32::NAN; rows];
                    dense_by(method, &tensor, &x, &mut out).unwrap();
                    assert_nmse(&what, &out, &expected, MATMUL_NMSE);
                    if matches!(method, Method::Integer(..)) {
                        let first = in_integers.get_or_insert_with(|| out.clone());
                        assert_eq!(&out, first, "{what}: rounds in its own way");
                    }
                }
            }
        }
    }
}

/// Sums of the largest products that an instruction adds up.
#[test]
fn dense_matvec_of_extreme_codes_agrees() {
    for (dtype, halves) in TYPES {
        let (rows, cols) = (5, 256);
        let (_, block_bytes) = dtype.block().unwrap();
        for byte in [0x00, 0x7f, 0x80, 0x88, 0xff] {
            let mut bytes = vec![byte; rows * dtype.size_in_bytes(cols as u64).unwrap() as usize];
            for block in bytes.chunks_exact_mut(block_bytes as usize) {
                for &at in halves {
                    block[at..at + 2].copy_from_slice(&f16::ONE.to_le_bytes());
                }
            }
            let mut weights = vec![f32::NAN; rows * cols];
            dequantize(dtype, &bytes, &mut weights).unwrap();
            let layout = Layout::AsStored;
            let tensor = DenseTensor { dtype, rows, cols, bytes: &bytes, layout, scales: None };
            for x in [127.0, -127.0] {
                let expected = product(&vec![x; cols], &widened(&weights), cols);
                for method in Method::all() {
                    let mut out = vec![f32::NAN; rows];
                    dense_by(method, &tensor, &vec![x; cols], &mut out).unwrap();
                    let what = format!("{method:?}, {dtype:?} of {byte:#x}, inputs {x}");
                    assert_nmse(&what, &out, &expected, MATMUL_NMSE);
                }
            }
        }
    }
}

/// Blocks of 32 columns fill rows that K types do not.
#[test]
fn dense_matvec_of_rows_of_any_number_of_blocks_agrees() {
    let mut noise = Noise(32);
    for (dtype, halves) in TYPES.into_iter().take(5) {
        for cols in [32, 64, 288, 576] {
            let (bytes, values) = blocks(&mut noise, dtype, halves, 17 * cols);
            let layout = Layout::AsStored;
            let tensor = DenseTensor { dtype, rows: 17, cols, bytes: &bytes, layout, scales: None };
            let x = noise.vector(cols, 1.0);
            for method in Method::all() {
                let input = as_multiplied(method, &x);
                let mut out = vec![f32::NAN; 17];
                dense_by(method, &tensor, &x, &mut out).unwrap();
                let what = format!("{method:?}, {dtype:?}, {cols} columns");
                assert_nmse(&what, &out, &product(&input, &widened(&values), cols), MATMUL_NMSE);
            }
        }
    }
}

#[test]
fn dense_matvec_what_is_not_finite_stays_so() {
    let mut noise = Noise(33);
    for (dtype, halves) in TYPES {
        let (bytes, _) = blocks(&mut noise, dtype, halves, 17 * 256);
        let layout = Layout::AsStored;
        let tensor =
            DenseTensor { dtype, rows: 17, cols: 256, bytes: &bytes, layout, scales: None };
        let mut x = noise.vector(256, 1.0);
        x[100] = f32::NAN;
        for method in Method::all() {
            let mut out = vec![0.0; 17];
            dense_by(method, &tensor, &x, &mut out).unwrap();
            assert!(out.iter().all(|value| value.is_nan()), "{method:?}, {dtype:?}: {out:?}");
        }
    }
}

#[test]
fn dense_matvec_does_not_depend_on_the_number_of_threads() {
    let mut noise = Noise(34);
    for (dtype, halves) in TYPES.into_iter().chain([(DType::F32, [].as_slice())]) {
        let (rows, cols) = (1300, 256);
        let (bytes, _) = blocks(&mut noise, dtype, halves, rows * cols);
        let layout = Layout::AsStored;
        let weight =
            Weight::Dense(DenseTensor { dtype, rows, cols, bytes: &bytes, layout, scales: None });
        let x = noise.vector(cols, 1.0);
        let with_threads = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0.0; rows];
            pool.install(|| Cpu.matmul(weight, &x, 1, &mut out)).unwrap();
            out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(with_threads(1), with_threads(3), "{dtype:?}");
    }
}
