//! The CUDA layer against the scalar reference. Without a driver the tests pass and say so, unless
//! SLIMLLM_TEST_CUDA=1 asks for them; `scripts/cuda-emulator` builds a driver that needs no card.

use std::sync::{Arc, OnceLock};

use super::*;
use slim_formats::arch::{self, QueryScaling};

use crate::cuda::{
    Attention, Buffer, CudaBackend, Device, ExpertWeights, Experts, HeadNorms, KvCache, Matrix,
    Neurons, Next, Norm, Operands, Position, RopeTables, Rotation, Routed, Scores, Strided, Tokens,
    TopK,
};

/// Bounds of the normalized mean square error. fp16 rounds inputs and weights to 11 bits.
///
/// Measured 1.8e-6 for five sums of 160 products that nearly cancel; 3e-7 for usual ones.
const PRODUCT_NMSE: f64 = 4e-6;
/// Codes as they are: in fp16 are inputs and their means alone. Measured 2.6e-7 for 4480 columns of
/// 1 bit, whose products nearly cancel, with inputs that are fp16 numbers.
const RAW_NMSE: f64 = 1e-6;
/// Measured 3.1e-7, for attention in tiles.
const HALF_NMSE: f64 = 1e-6;
/// Keys and values of 8 bits. Measured 6.9e-5.
const Q8_NMSE: f64 = 2e-4;
/// Where everything is f32. Measured 4e-14.
const FLOAT_NMSE: f64 = 1e-12;

/// The first device, opened once for all tests.
fn device() -> Option<Arc<Device>> {
    static DEVICE: OnceLock<Option<Arc<Device>>> = OnceLock::new();
    DEVICE.get_or_init(open).clone()
}

fn open() -> Option<Arc<Device>> {
    match Device::open(0) {
        Ok(device) => {
            println!("on {}", device.name());
            Some(device)
        }
        Err(KernelError::NoDriver)
            if std::env::var_os("SLIMLLM_TEST_CUDA").is_none_or(|v| v != "1") =>
        {
            println!("skipped: no NVIDIA driver was found");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

macro_rules! device_or_skip {
    () => {
        match device() {
            Some(device) => device,
            None => return,
        }
    };
}

fn operands(device: &Arc<Device>, x: &[f32], m: usize) -> Operands {
    let mut operands = Operands::zeros(device, m, x.len() / m).unwrap();
    operands.write(x, m).unwrap();
    operands
}

/// What the scalar reference gets for `x * w^T`.
fn reference(w: Weight<'_>, x: &[f32], m: usize) -> Vec<f64> {
    let mut out = vec![0.0; m * crate::weight::shape(w).0];
    Scalar.matmul(w, x, m, &mut out).unwrap();
    widened(&out)
}

fn product(device: &Arc<Device>, w: &Matrix, x: &[f32], m: usize) -> Vec<f32> {
    let x = operands(device, x, m);
    let mut out = Buffer::upload(device, &vec![f32::NAN; m * w.rows()]).unwrap();
    device.matmul(&[w], &x, m, &mut [out.view_mut()]).unwrap();
    out.view().read().unwrap()
}

/// A bias of `matrix`, which takes it.
fn biased(device: &Arc<Device>, matrix: Matrix, noise: &mut Noise) -> (Matrix, Vec<f32>) {
    let bias = noise.vector(matrix.rows(), 1.0);
    (matrix.with_bias(Buffer::upload(device, &bias).unwrap()).unwrap(), bias)
}

fn half_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect()
}

fn dense(bytes: &[u8], dtype: DType, rows: usize, cols: usize) -> Weight<'_> {
    Weight::Dense(DenseTensor { dtype, rows, cols, bytes, layout: Layout::AsStored, scales: None })
}

fn layer(noise: &mut Noise, shape: [usize; 3], coding: ScaleCoding, bits: &[u8]) -> Layer {
    Layer::new(noise, Fill::Random, shape, coding, bits)
}

#[test]
fn open_past_the_last_device_is_refused() {
    let _ = device_or_skip!();
    let count = Device::count().unwrap();
    let error = Device::open(99).err().unwrap();
    assert!(
        matches!(error, KernelError::NoSuchDevice { ordinal: 99, count: found } if found == count),
        "{error}"
    );
}

/// cudarc by itself panics.
#[test]
fn open_without_a_driver_is_an_error() {
    if device().is_none() {
        assert!(matches!(Device::count(), Err(KernelError::NoDriver)));
        assert!(matches!(Device::open(0), Err(KernelError::NoDriver)));
    }
}

#[test]
fn buffer_larger_than_the_staging_memory_comes_back() {
    let device = device_or_skip!();
    let mut values: Vec<u32> =
        (0..(40 << 20) / 4 + 3_u32).map(|i| 2654435761_u32.wrapping_mul(i)).collect();
    let mut buffer = Buffer::upload(&device, &values).unwrap();
    assert!(buffer.view().read().unwrap() == values);
    let part = 1000..(20 << 20) / 4;
    values[part.clone()].fill(7);
    buffer.view_mut().slice(part.clone()).write(&values[part]).unwrap();
    assert!(buffer.view().read().unwrap() == values);
    assert!(matches!(buffer.view_mut().write(&[1]), Err(KernelError::ShapeMismatch { .. })));
    assert_eq!(buffer.device_bytes(), 4 * values.len() as u64 + 16);
}

#[test]
fn buffer_past_the_memory_is_refused() {
    let device = device_or_skip!();
    let bytes = 2 * device.total_memory() as usize;
    match Buffer::<u8>::zeros(&device, bytes).err().unwrap() {
        KernelError::OutOfDeviceMemory { asked, free, total } => {
            assert!(asked as usize >= bytes && free <= total && total == device.total_memory());
        }
        error => panic!("{error}"),
    }
}

#[test]
fn device_says_what_it_is() {
    let device = device_or_skip!();
    assert!(!device.name().is_empty() && device.compute_capability() >= (8, 0));
    assert!(device.multiprocessors() > 0 && device.free_memory().unwrap() <= device.total_memory());
    assert!(device.copy_bandwidth(1 << 20).unwrap() > 0.0);
}

#[test]
fn errors_say_what_is_wrong_and_what_helps() {
    let name = "Tesla V100".into();
    for (error, message, hint) in [
        (KernelError::NoDriver, "no NVIDIA driver was found", "525"),
        (
            KernelError::DriverTooOld { found: (11, 8), needed: (12, 0) },
            "the NVIDIA driver supports CUDA 11.8, the kernels need 12.0",
            "525",
        ),
        (
            KernelError::NoSuchDevice { ordinal: 2, count: 2 },
            "there is no CUDA device 2: this machine has 2, numbers 0 to 1",
            "nvidia-smi",
        ),
        (
            KernelError::DeviceTooOld { name, found: (7, 0), needed: (8, 0) },
            "`Tesla V100` has compute capability 7.0, the kernels need 8.0",
            "Ampere",
        ),
        (
            KernelError::OutOfDeviceMemory { asked: 3 << 20, free: 1, total: 2 << 20 },
            "cannot allocate 3 MiB of device memory: 1 of 2 MiB are free",
            "smaller context",
        ),
    ] {
        assert_eq!(error.to_string(), message);
        assert!(error.hint().unwrap().contains(hint), "{message}");
    }
}

#[test]
fn matmul_packed_layers_agree() {
    let device = device_or_skip!();
    let mut noise = Noise(101);
    for coding in codings() {
        for bits in 0..=8 {
            let (cols, group_size) =
                noise.pick(&[(16_usize, 16_usize), (80, 48), (272, 64), (432, 256), (384, 128)]);
            let rows = noise.pick(&[7, 17, 33]);
            let widths = bit_widths(&mut noise, bits, cols.div_ceil(group_size));
            let layer = layer(&mut noise, [rows, cols, group_size], coding, &widths);
            let matrix = Matrix::upload(&device, layer.weight()).unwrap();
            assert_eq!((matrix.rows(), matrix.cols()), (rows, cols));
            for m in [1, noise.pick(&[2, 7, 8]), 9] {
                let x = noise.vector(m * cols, 1.0);
                let what = format!(
                    "{coding:?}, {rows} x {cols}, groups of {group_size}, bits {widths:?}, m {m}"
                );
                let found = product(&device, &matrix, &x, m);
                assert_nmse(&what, &found, &reference(layer.weight(), &x, m), PRODUCT_NMSE);
            }
        }
    }
}

#[test]
fn matmul_packed_layers_of_any_columns_agree() {
    let device = device_or_skip!();
    let mut noise = Noise(107);
    for coding in codings() {
        for (cols, group_size) in
            [(1_usize, 64_usize), (15, 16), (17, 64), (72, 64), (100, 32), (172, 128), (259, 256)]
        {
            let widths = bit_widths(&mut noise, 0, cols.div_ceil(group_size));
            let layer = layer(&mut noise, [33, cols, group_size], coding, &widths);
            let matrix = Matrix::upload(&device, layer.weight()).unwrap();
            for m in [1, 3, 9] {
                let x = noise.vector(m * cols, 1.0);
                let what = format!("{coding:?}, {cols} columns, bits {widths:?}, m {m}");
                let found = product(&device, &matrix, &x, m);
                assert_nmse(&what, &found, &reference(layer.weight(), &x, m), PRODUCT_NMSE);
            }
        }
    }
}

#[test]
fn matmul_raw_codes_of_a_token_agree() {
    let device = device_or_skip!();
    let mut noise = Noise(108);
    for coding in [32, 64].map(|sub_group| ScaleCoding::TwoLevel { sub_group, scale_bits: 4 }) {
        for [rows, cols, group_size] in
            [[7, 64, 64_usize], [33, 320, 64], [17, 576, 128], [48, 2304, 256], [5, 4480, 64]]
        {
            for bits in 0..=8 {
                let widths = bit_widths(&mut noise, bits, cols.div_ceil(group_size));
                let layer = layer(&mut noise, [rows, cols, group_size], coding, &widths);
                let matrix = Matrix::upload(&device, layer.weight()).unwrap();
                // What inputs lose on their way is not the kernel's.
                let x = noise.vector(cols, 1.0);
                let x: Vec<_> = x.iter().map(|&x| f16::from_f32(x).to_f32()).collect();
                let what =
                    format!("{coding:?}, {rows} x {cols}, groups of {group_size}, bits {widths:?}");
                let found = product(&device, &matrix, &x, 1);
                assert_nmse(&what, &found, &reference(layer.weight(), &x, 1), RAW_NMSE);
            }
        }
    }
}

#[test]
fn matmul_packed_extreme_codes_agree() {
    let device = device_or_skip!();
    let mut noise = Noise(102);
    for coding in codings() {
        for fill in [Fill::Highest, Fill::Lowest, Fill::OutlierRow] {
            let layer = Layer::new(&mut noise, fill, [17, 144, 64], coding, &[8, 1, 3]);
            let matrix = Matrix::upload(&device, layer.weight()).unwrap();
            let x = noise.vector(2 * 144, 1.0);
            let found = product(&device, &matrix, &x, 2);
            assert_nmse(
                &format!("{coding:?}"),
                &found,
                &reference(layer.weight(), &x, 2),
                PRODUCT_NMSE,
            );
        }
    }
}

#[test]
fn matmul_dense_weights_of_every_type_agree() {
    let device = device_or_skip!();
    let mut noise = Noise(103);
    for (rows, cols) in [(1, 1), (16, 64), (33, 100), (17, 192)] {
        let values = noise.vector(rows * cols, 1.0);
        let f32_bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let bf16_bytes: Vec<u8> =
            values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        let f16_bytes = half_bytes(&values);
        for (bytes, dtype) in
            [(&f32_bytes, DType::F32), (&bf16_bytes, DType::BF16), (&f16_bytes, DType::F16)]
        {
            let weight = dense(bytes, dtype, rows, cols);
            let matrix = Matrix::upload(&device, weight).unwrap();
            for m in [1, 8, 9, 130] {
                let x = noise.vector(m * cols, 1.0);
                let found = product(&device, &matrix, &x, m);
                let what = format!("{dtype:?}, {rows} x {cols}, m {m}");
                assert_nmse(&what, &found, &reference(weight, &x, m), PRODUCT_NMSE);
            }
        }
    }
}

#[test]
fn upload_of_weights_outside_fp16_names_the_row() {
    let device = device_or_skip!();
    for value in [f32::NAN, 7e4, f32::NEG_INFINITY] {
        let mut values = vec![65504.0_f32; 20 * 8];
        values[18 * 8 + 5] = value;
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let error = Matrix::upload(&device, dense(&bytes, DType::F32, 20, 8)).err().unwrap();
        assert!(matches!(error, KernelError::Unrepresentable { row: 18, .. }), "{error}");
    }
    let layout =
        LayerLayout::new(17, 16, 16, ScaleCoding::Paper, &[BitWidth::new(2).unwrap()]).unwrap();
    let mut packed = PackedLayer::zeroed(layout);
    let mut scales = [f16::ONE; TILE_ROWS];
    scales[0] = f16::INFINITY;
    packed.tiles_mut()[1].set_affine(0, &scales, &[0; TILE_ROWS]);
    let error = Matrix::upload(&device, Weight::Packed(packed.view())).err().unwrap();
    assert!(matches!(error, KernelError::Unrepresentable { row: 16, .. }), "{error}");
}

#[test]
fn matmul_of_packed_and_dense_together_agrees() {
    let device = device_or_skip!();
    let mut noise = Noise(104);
    let cols = 160;
    let trellis = ScaleCoding::Trellis { sub_group: 32 };
    let packed: Vec<Layer> =
        [(17, TWO_LEVEL), (32, TWO_LEVEL), (5, trellis), (48, TWO_LEVEL), (80, trellis)]
            .map(|(rows, coding)| layer(&mut noise, [rows, cols, 64], coding, &[2, 3, 4]))
            .into();
    let bytes = half_bytes(&noise.vector(20 * cols, 1.0));
    let mut weights: Vec<Weight<'_>> = packed.iter().map(Layer::weight).collect();
    weights.insert(1, dense(&bytes, DType::F16, 20, cols));
    let matrices: Vec<Matrix> =
        weights.iter().map(|&w| Matrix::upload(&device, w).unwrap()).collect();
    for m in [1, 5, 12] {
        let x = noise.vector(m * cols, 1.0);
        let mut out: Vec<Buffer<f32>> =
            matrices.iter().map(|w| Buffer::zeros(&device, m * w.rows()).unwrap()).collect();
        let mut views: Vec<_> = out.iter_mut().map(Buffer::view_mut).collect();
        let matrices: Vec<&Matrix> = matrices.iter().collect();
        device.matmul(&matrices, &operands(&device, &x, m), m, &mut views).unwrap();
        for (i, (&w, out)) in weights.iter().zip(&out).enumerate() {
            let found = out.view().read().unwrap();
            assert_nmse(&format!("matrix {i}, m {m}"), &found, &reference(w, &x, m), PRODUCT_NMSE);
        }
    }
}

#[test]
fn matmul_add_and_its_norm_agree() {
    let device = device_or_skip!();
    let mut noise = Noise(105);
    let (rows, cols) = (72, 160);
    let packed = layer(&mut noise, [rows, cols, 64], TWO_LEVEL, &[2, 3, 4]);
    let trellis = ScaleCoding::Trellis { sub_group: 32 };
    let trellis = layer(&mut noise, [rows, cols, 64], trellis, &[2, 3, 4]);
    let bytes = half_bytes(&noise.vector(rows * cols, 1.0));
    for weight in [packed.weight(), trellis.weight(), dense(&bytes, DType::F16, rows, cols)] {
        let matrix = Matrix::upload(&device, weight).unwrap();
        let (matrix, bias) = biased(&device, matrix, &mut noise);
        for (m, scale) in [(1, 1.0), (3, 0.3), (8, 1.0), (11, 0.3)] {
            let (x, residual) = (noise.vector(m * cols, 1.0), noise.vector(m * rows, 1.0));
            let norm_weight = noise.vector(rows, 1.0);
            let mut out = Buffer::upload(&device, &residual).unwrap();
            let mut normed = Operands::zeros(&device, m, rows).unwrap();
            let norm_buffer = Buffer::upload(&device, &norm_weight).unwrap();
            let norm = Norm { weight: norm_buffer.view(), bias: None, epsilon: 1e-5 };
            let next = Next { norm: Some(norm), out: &mut normed };
            let x_device = operands(&device, &x, m);
            device
                .matmul_add(&matrix, &x_device, m, scale, &mut out.view_mut(), Some(next))
                .unwrap();
            let mut expected = reference(weight, &x, m);
            for (i, (sum, &x)) in expected.iter_mut().zip(&residual).enumerate() {
                let added = *sum + f64::from(bias[i % rows]);
                *sum = f64::from(x) + f64::from(scale) * added;
            }
            assert_nmse(
                &format!("sums, m {m}"),
                &out.view().read().unwrap(),
                &expected,
                PRODUCT_NMSE,
            );
            let sums: Vec<f32> = expected.iter().map(|&x| x as f32).collect();
            let mut expected = vec![0.0; m * rows];
            Scalar.rms_norm(&sums, &norm_weight, 1e-5, &mut expected);
            assert_nmse(
                &format!("norm, m {m}"),
                &normed.read(m).unwrap(),
                &widened(&expected),
                HALF_NMSE,
            );
            device.matmul_add(&matrix, &x_device, m, 1.0, &mut out.view_mut(), None).unwrap();
        }
    }
}

#[test]
fn matmul_activate_agrees() {
    let device = device_or_skip!();
    let mut noise = Noise(106);
    let (rows, cols) = (40, 160);
    let packed =
        [0, 1].map(|_| layer(&mut noise, [rows, cols, 64], ScaleCoding::Paper, &[2, 3, 4]));
    let bytes = half_bytes(&noise.vector(rows * cols, 0.1));
    let half = dense(&bytes, DType::F16, rows, cols);
    for (gate, up, activation) in [
        (Some(packed[0].weight()), packed[1].weight(), Activation::Silu),
        (Some(half), half, Activation::GeluTanh),
        (Some(packed[0].weight()), half, Activation::Silu),
        (None, packed[1].weight(), Activation::Relu),
        (None, half, Activation::Relu),
    ] {
        let mut upload = |w| biased(&device, Matrix::upload(&device, w).unwrap(), &mut noise);
        let (gate_matrix, gate_bias) = gate.map(&mut upload).unzip();
        let (up_matrix, up_bias) = upload(up);
        for m in [1, 8, 9] {
            let x = noise.vector(m * cols, 1.0);
            let mut scratch = [0, 1].map(|_| Buffer::<f32>::zeros(&device, m * rows).unwrap());
            let [a, b] = &mut scratch;
            let scratch = [&mut a.view_mut(), &mut b.view_mut()];
            let mut out = Operands::zeros(&device, m, rows).unwrap();
            let neurons = Neurons { gate: gate_matrix.as_ref(), up: &up_matrix, activation };
            let x_device = operands(&device, &x, m);
            device.matmul_activate(neurons, &x_device, m, scratch, &mut out).unwrap();
            let product = |w, bias: &[f32]| {
                let mut out = vec![0.0; m * rows];
                Scalar.matmul(w, &x, m, &mut out).unwrap();
                out.iter_mut().zip(bias.iter().cycle()).for_each(|(out, bias)| *out += bias);
                out
            };
            let mut expected = product(up, &up_bias);
            match (gate, &gate_bias) {
                (Some(gate), Some(bias)) => {
                    let up = std::mem::replace(&mut expected, product(gate, bias));
                    Scalar.gated(activation, &mut expected, &up);
                }
                _ => Scalar.activate(activation, &mut expected),
            }
            assert_nmse(
                &format!("{activation:?}, m {m}"),
                &out.read(m).unwrap(),
                &widened(&expected),
                PRODUCT_NMSE,
            );
        }
    }
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let device = device_or_skip!();
    let mut noise = Noise(107);
    let layer = layer(&mut noise, [17, 32, 32], TWO_LEVEL, &[2]);
    let w = Matrix::upload(&device, layer.weight()).unwrap();
    let mut out = Buffer::<f32>::zeros(&device, 33).unwrap();
    for (tokens, cols, m) in [(2, 48, 2), (1, 32, 2), (2, 32, 2)] {
        let x = Operands::zeros(&device, tokens, cols).unwrap();
        let error = device.matmul(&[&w], &x, m, &mut [out.view_mut()]).err().unwrap();
        assert!(matches!(error, KernelError::ShapeMismatch { .. }), "{error}");
    }
}

#[test]
fn norms_and_activations_agree() {
    let device = device_or_skip!();
    let mut noise = Noise(108);
    for (m, n) in [(1, 64), (3, 100), (2, 1028)] {
        let (x, y, weight) =
            (noise.vector(m * n, 3.0), noise.vector(m * n, 3.0), noise.vector(n, 1.0));
        let [x_device, y_device, weight_device] =
            [&x, &y, &weight].map(|v| Buffer::upload(&device, v).unwrap());
        let mut out = Operands::zeros(&device, m, n).unwrap();
        let bias = noise.vector(n, 1.0);
        let bias_device = Buffer::upload(&device, &bias).unwrap();
        let rms = Norm { weight: weight_device.view(), bias: None, epsilon: 1e-5 };
        let layer = Norm { bias: Some(bias_device.view()), ..rms };
        let normed = |x: &[f32], norm: Option<Norm<'_>>| {
            let mut out = x.to_vec();
            match norm {
                Some(Norm { bias: None, .. }) => Scalar.rms_norm(x, &weight, 1e-5, &mut out),
                Some(_) => Scalar.layer_norm(x, &weight, &bias, 1e-5, &mut out),
                None => {}
            }
            out
        };
        for norm in [None, Some(rms), Some(layer)] {
            let next = Next { norm, out: &mut out };
            device.norm(x_device.view(), m, next).unwrap();
            let expected = widened(&normed(&x, norm));
            assert_nmse("norm", &out.read(m).unwrap(), &expected, HALF_NMSE);

            let mut sum = Buffer::upload(&device, &y).unwrap();
            let next = Some(Next { norm, out: &mut out });
            device.norm_add(x_device.view(), rms, 0.3, &mut sum.view_mut(), m, next).unwrap();
            let added = normed(&x, Some(rms));
            let expected: Vec<f32> = y.iter().zip(&added).map(|(y, x)| y + 0.3 * x).collect();
            assert_nmse("sum", &sum.view().read().unwrap(), &widened(&expected), FLOAT_NMSE);
            let expected = widened(&normed(&expected, norm));
            assert_nmse("norm of the sum", &out.read(m).unwrap(), &expected, HALF_NMSE);
        }
        let mut in_place = Buffer::upload(&device, &x).unwrap();
        device.norm_in_place(&mut in_place.view_mut(), layer, m).unwrap();
        let expected = widened(&normed(&x, Some(layer)));
        assert_nmse("in place", &in_place.view().read().unwrap(), &expected, FLOAT_NMSE);

        for activation in [Activation::Silu, Activation::GeluTanh, Activation::Relu] {
            let (x_view, y_view) = (x_device.view(), y_device.view());
            device.activate(activation, x_view, Some(y_view), n, m, &mut out).unwrap();
            let mut expected = x.clone();
            Scalar.gated(activation, &mut expected, &y);
            assert_nmse("gated", &out.read(m).unwrap(), &widened(&expected), HALF_NMSE);
            device.activate(activation, x_view, None, n, m, &mut out).unwrap();
            expected.copy_from_slice(&x);
            Scalar.activate(activation, &mut expected);
            assert_nmse("activated", &out.read(m).unwrap(), &widened(&expected), HALF_NMSE);
        }
    }
}

#[test]
fn embed_gives_rows() {
    let device = device_or_skip!();
    let mut noise = Noise(109);
    let (rows, cols) = (40, 176);
    let packed = layer(&mut noise, [rows, cols, 64], TWO_LEVEL, &[2, 5, 8]);
    let trellis = [[2, 5, 8], [1, 3, 4], [6, 7, 1]];
    let trellis = trellis.map(|widths| {
        layer(&mut noise, [rows, cols, 64], ScaleCoding::Trellis { sub_group: 32 }, &widths)
    });
    let bytes = half_bytes(&noise.vector(rows * cols, 1.0));
    let codes = [&packed].into_iter().chain(&trellis).map(Layer::weight);
    for weight in codes.chain([dense(&bytes, DType::F16, rows, cols)]) {
        let matrix = Matrix::upload(&device, weight).unwrap();
        let tokens = [39, 0, 17, 17];
        let mut x = Buffer::zeros(&device, tokens.len() * cols).unwrap();
        let tokens_device = Buffer::upload(&device, &tokens).unwrap();
        device.embed(&matrix, tokens_device.view(), 1.7, &mut x.view_mut()).unwrap();
        let found = x.view().read().unwrap();
        for (found, token) in found.chunks_exact(cols).zip(tokens) {
            let mut row = vec![0.0; cols];
            dequantize_rows(weight, token as usize..token as usize + 1, &mut row).unwrap();
            row.iter_mut().for_each(|value| *value *= 1.7);
            assert_eq!(found, row);
        }
        let mut position = Position::new(&device, rows).unwrap();
        position.set(5).unwrap();
        let mut x = Buffer::zeros(&device, 3 * cols).unwrap();
        let at = Tokens { position: &position, m: 3 };
        device.embed_positions(&matrix, at, 2, &mut x.view_mut()).unwrap();
        let mut expected = vec![0.0; 3 * cols];
        dequantize_rows(weight, 7..10, &mut expected).unwrap();
        assert_eq!(x.view().read().unwrap(), expected);
    }
}

#[test]
fn top_k_is_sorted() {
    let device = device_or_skip!();
    let mut noise = Noise(110);
    for (n, k) in [(1, 3), (5000, 1), (5000, 128)] {
        let logits = noise.vector(n, 8.0);
        let mut top = TopK::new(&device, k).unwrap();
        device.top_k(Buffer::upload(&device, &logits).unwrap().view(), &mut top).unwrap();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let expected: Vec<(u32, f32)> =
            order.into_iter().take(k).map(|i| (i as u32, logits[i])).collect();
        assert_eq!(top.read().unwrap(), expected);
    }
    assert!(matches!(TopK::new(&device, 129), Err(KernelError::TooLarge { .. })));
}

#[test]
fn logits_are_scaled_and_capped() {
    let device = device_or_skip!();
    let logits = Noise(116).vector(1000, 50.0);
    for (scale, softcap) in [(0.125, None), (1.0, Some(30.0))] {
        let mut found = Buffer::upload(&device, &logits).unwrap();
        device.finish_logits(&mut found.view_mut(), scale, softcap).unwrap();
        let mut expected: Vec<f32> = logits.iter().map(|logit| scale * logit).collect();
        if let Some(softcap) = softcap {
            crate::cap(&mut expected, softcap);
        }
        assert_nmse("logits", &found.view().read().unwrap(), &widened(&expected), FLOAT_NMSE);
    }
}

#[test]
fn gemm_of_strided_matrices_agrees() {
    let device = device_or_skip!();
    let mut noise = Noise(111);
    let (m, n, k) = (5, 130, 37);
    let (a, b) = (noise.vector(m * k, 1.0), noise.vector(n * k, 1.0));
    let c = noise.vector(m * (n + 3), 1.0);
    let [a_device, b_device] = [&a, &b].map(|v| Buffer::upload(&device, v).unwrap());
    let mut c_device = Buffer::upload(&device, &c).unwrap();
    let a_view = Strided::new(a_device.view(), k, m).transposed();
    let b_view = Strided::new(b_device.view(), n, k);
    device.gemm(2.0, a_view, b_view, 0.5, &mut c_device.view_mut(), n + 3).unwrap();
    let mut expected = widened(&c);
    for i in 0..m {
        for j in 0..n {
            let sum: f64 = (0..k).map(|l| f64::from(a[l * m + i]) * f64::from(b[j * k + l])).sum();
            expected[i * (n + 3) + j] = 0.5 * f64::from(c[i * (n + 3) + j]) + 2.0 * sum;
        }
    }
    assert_nmse("gemm", &c_device.view().read().unwrap(), &expected, FLOAT_NMSE);
    assert!(
        device.gemm(1.0, a_view, b_view, 0.0, &mut c_device.view_mut().slice(0..9), n).is_err()
    );
}

/// Norms, rotates, stores and attends: first `m` tokens, then one more. `pairs` of each head are
/// rotated, none behind neither norms nor scaling.
#[test]
fn rope_and_attention_agree() {
    let device = device_or_skip!();
    let mut noise = Noise(112);
    for (heads, kv_heads, dim, pairs, window, softcap) in [
        (4, 2, 64, 32, None, None),
        (3, 1, 40, 20, Some(5), None),
        (3, 1, 40, 6, Some(5), Some(3.0)),
        (8, 8, 128, 64, Some(70), None),
        (2, 1, 136, 0, None, Some(1.5)),
        (10, 1, 16, 8, None, None),
    ] {
        for kv_type in [KvType::F16, KvType::Q8] {
            let (m, capacity) = (75, 80);
            let angles = |start, m| RopeAngles::new(dim, 1e4, &vec![1.0; pairs], start, m);
            let tables = RopeTables::upload(&device, &angles(0, capacity)).unwrap();
            let weights = [noise.vector(dim, 1.0), noise.vector(dim, 1.0)];
            let norms = weights.each_ref().map(|weight| Buffer::upload(&device, weight).unwrap());
            let is_plain = 2 * pairs == dim;
            let query_scaling = (!is_plain).then_some(QueryScaling { beta: 0.3, context: 7 });
            let rotation = Rotation {
                norms: (!is_plain).then(|| HeadNorms {
                    weights: norms.each_ref().map(Buffer::view),
                    epsilon: 1e-5,
                }),
                tables: (pairs > 0).then_some(&tables),
                query_scaling,
            };
            let scores = Scores { window, scale: 1.1 / (dim as f32).sqrt(), softcap };
            let mut cache = KvCache::new(&device, kv_type, kv_heads, capacity, dim).unwrap();
            let mut attention = Attention::new(&device, heads, &cache).unwrap();
            let mut position = Position::new(&device, capacity).unwrap();
            let mut on_host = crate::KvCache::exact(kv_heads, capacity, dim);
            for (start, m) in [(0, m), (m, 1)] {
                position.set(start).unwrap();
                let tokens = Tokens { position: &position, m };
                let mut q = noise.vector(m * heads * dim, 3.0);
                let mut k = noise.vector(m * kv_heads * dim, 3.0);
                let v = noise.vector(m * kv_heads * dim, 3.0);
                let [mut q_device, k_device, v_device] =
                    [&q, &k, &v].map(|x| Buffer::upload(&device, x).unwrap());
                let kv = [k_device.view(), v_device.view()];
                let queries = &mut q_device.view_mut();
                device.rope_store(&attention, queries, kv, rotation, tokens, &mut cache).unwrap();
                let mut out = Operands::zeros(&device, m, heads * dim).unwrap();
                device
                    .attention(&mut attention, q_device.view(), scores, &cache, tokens, &mut out)
                    .unwrap();

                if !is_plain {
                    for (x, weight) in [&mut q, &mut k].into_iter().zip(&weights) {
                        Scalar.rms_norm(&x.clone(), weight, 1e-5, x);
                    }
                }
                Scalar.rope(&mut q, heads, &angles(start, m));
                Scalar.rope(&mut k, kv_heads, &angles(start, m));
                for (t, q) in q.chunks_exact_mut(heads * dim).enumerate() {
                    let factor = query_scaling.map_or(1.0, |scaling| scaling.at(start + t));
                    q.iter_mut().for_each(|q| *q *= factor);
                }
                assert_nmse("rope", &q_device.view().read().unwrap(), &widened(&q), FLOAT_NMSE);
                on_host.store(&k, &v, start);
                let Scores { window, scale, softcap } = scores;
                let shape = AttentionShape {
                    heads,
                    kv_heads,
                    head_dim: dim,
                    start,
                    m,
                    window,
                    scale,
                    softcap,
                };
                let expected = attend(&Scalar, &q, &on_host, shape);
                let bound = if kv_type == KvType::F16 { HALF_NMSE } else { Q8_NMSE };
                let what = format!(
                    "{heads}/{kv_heads} heads of {dim}, window {window:?}, {kv_type:?}, m {m}"
                );
                assert_nmse(&what, &out.read(m).unwrap(), &widened(&expected), bound);
            }
            let past = Tokens { position: &position, m: 6 };
            let (q, mut out) = (
                Buffer::zeros(&device, 6 * heads * dim).unwrap(),
                Operands::zeros(&device, 6, heads * dim).unwrap(),
            );
            let error = device
                .attention(&mut attention, q.view(), scores, &cache, past, &mut out)
                .err()
                .unwrap();
            assert!(matches!(error, KernelError::TooLarge { found: 81, limit: 80, .. }), "{error}");
        }
    }
}

#[test]
fn graph_runs_its_kernels_each_time_and_keeps_their_memory() {
    // Other tests allocate, which nobody may do on this one.
    let Some(device) = open() else { return };
    let mut noise = Noise(113);
    let layer = layer(&mut noise, [17, 32, 32], TWO_LEVEL, &[3]);
    let x = noise.vector(32, 1.0);
    let mut out = Buffer::<f32>::zeros(&device, 17).unwrap();
    let matrix = Matrix::upload(&device, layer.weight()).unwrap();
    let inputs = operands(&device, &x, 1);
    let graph = device
        .capture(|| {
            device.matmul_add(&matrix, &inputs, 1, 1.0, &mut out.view_mut(), None)?;
            drop((matrix, inputs));
            Ok::<_, KernelError>(())
        })
        .unwrap();
    // Would take the place of the weights, were they gone.
    let _other = Buffer::<u8>::zeros(&device, 1 << 20).unwrap();
    assert_eq!(out.view().read().unwrap(), [0.0; 17]);
    for times in 1..4 {
        graph.launch().unwrap();
        let mut expected = reference(layer.weight(), &x, 1);
        expected.iter_mut().for_each(|value| *value *= f64::from(times));
        assert_nmse("graph", &out.view().read().unwrap(), &expected, PRODUCT_NMSE);
    }
    let refused = device.capture(|| Err(KernelError::NoDriver));
    assert!(matches!(refused, Err(KernelError::NoDriver)));
    device.capture::<KernelError>(|| Ok(())).unwrap().launch().unwrap();
}

#[test]
fn backend_agrees_and_holds_weights() {
    let device = device_or_skip!();
    let backend = CudaBackend::new(device);
    let mut noise = Noise(114);
    let (rows, cols) = (40, 96);
    let packed = layer(&mut noise, [rows, cols, 32], TWO_LEVEL, &[2, 3, 4]);
    let bytes: Vec<u8> =
        noise.vector(rows * cols, 1.0).iter().flat_map(|x| x.to_le_bytes()).collect();
    for (weight, bound) in
        [(packed.weight(), PRODUCT_NMSE), (dense(&bytes, DType::F32, rows, cols), FLOAT_NMSE)]
    {
        for m in [1, 9, 600] {
            let x = noise.vector(m * cols, 1.0);
            let expected = reference(weight, &x, m);
            let mut out = vec![f32::NAN; m * rows];
            backend.matmul(weight, &x, m, &mut out).unwrap();
            assert_nmse("copied", &out, &expected, bound);
            let _held = backend.hold(weight).unwrap();
            out.fill(f32::NAN);
            backend.matmul(weight, &x, m, &mut out).unwrap();
            assert_nmse("held", &out, &expected, bound);
        }
    }
}

#[test]
fn backend_attention_and_gram_agree() {
    let device = device_or_skip!();
    let backend = CudaBackend::new(device);
    let mut noise = Noise(115);
    let (heads, kv_heads, dim, capacity) = (4, 2, 32, 50);
    let mut kv = crate::KvCache::exact(kv_heads, capacity, dim);
    let mut tokens = || noise.vector(kv_heads * capacity * dim, 1.0);
    kv.store(&tokens(), &tokens(), 0);
    for (start, m) in [(0, 20), (19, 1), (10, 30)] {
        let scale = 1.0 / (dim as f32).sqrt();
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim: dim,
            start,
            m,
            window: None,
            scale,
            softcap: None,
        };
        let q = noise.vector(m * heads * dim, 1.0);
        let found = attend(&backend, &q, &kv, shape);
        let expected = attend(&Scalar, &q, &kv, shape);
        assert_nmse("attention", &found, &widened(&expected), HALF_NMSE);
        let on_cpu = attend(&Cpu, &q, &kv, shape);
        assert_ne!(found, on_cpu, "the device has left it to the processor");
    }
    let n = 70;
    let mut gram = backend.gram(n).unwrap();
    let mut expected = vec![0.0; n * n];
    for m in [1, 40] {
        let x = noise.vector(m * n, 1.0);
        gram.add(&x).unwrap();
        for row in x.chunks_exact(n) {
            for (i, expected) in expected.iter_mut().enumerate() {
                *expected += f64::from(row[i / n]) * f64::from(row[i % n]);
            }
        }
    }
    assert_nmse("gram", &gram.read().unwrap(), &expected, FLOAT_NMSE);
}

/// What `norm` makes of a token, and which experts that chooses with which weights, the slow way.
fn chosen_experts(
    spec: &arch::Experts,
    router: &[f32],
    [bias, correction]: [&[f32]; 2],
    normed: &[f32],
) -> Vec<(usize, f64)> {
    let hidden = normed.len();
    let outputs: Vec<f64> = router
        .chunks_exact(hidden)
        .zip(bias)
        .map(|(row, &bias)| {
            let sum: f64 = row.iter().zip(normed).map(|(w, x)| f64::from(w * x)).sum();
            f64::from(spec.routing.sharpness) * sum + f64::from(bias)
        })
        .collect();
    let scores: Vec<f64> = match spec.routing.scores {
        arch::Scores::Sigmoid => outputs.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        arch::Scores::Softmax => {
            let sum: f64 = outputs.iter().map(|x| x.exp()).sum();
            outputs.iter().map(|x| x.exp() / sum).collect()
        }
    };
    let worth = |&i: &usize| scores[i] + f64::from(correction[i]);
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| worth(b).total_cmp(&worth(a)));
    order.truncate(spec.used.into());
    let sum: f64 = order.iter().map(|&i| scores[i]).sum();
    let whole = if spec.routing.normalizes { sum } else { 1.0 };
    order.into_iter().map(|i| (i, f64::from(spec.routing.scale) * scores[i] / whole)).collect()
}

/// Of each storage, of several at once, and of a share of the network beside.
#[test]
fn experts_agree() {
    const COUNT: usize = 37;
    let device = device_or_skip!();
    let mut noise = Noise(111);
    let (hidden, width) = (72, 40);
    let trellis = ScaleCoding::Trellis { sub_group: 32 };
    let half: Vec<Vec<u8>> =
        (0..3 * COUNT).map(|_| half_bytes(&noise.vector(hidden * width, 0.1))).collect();
    for (case, codings, scores, normalizes) in [
        ("two-level", vec![TWO_LEVEL], arch::Scores::Softmax, true),
        ("trellis", vec![trellis], arch::Scores::Sigmoid, true),
        ("fp16", Vec::new(), arch::Scores::Softmax, false),
        ("both codings", vec![TWO_LEVEL, trellis], arch::Scores::Sigmoid, false),
    ] {
        let ffn =
            arch::Ffn { width, activation: Activation::Silu, is_gated: true, has_bias: false };
        let routing = arch::Routing {
            sharpness: 0.7,
            scores,
            has_bias: true,
            is_corrected: true,
            groups: None,
            normalizes,
            scale: 1.3,
        };
        let spec = arch::Experts {
            count: COUNT as u16,
            used: 3,
            ffn,
            routing,
            shares: true,
            has_norms: false,
            are_fused: false,
            are_mxfp4: false,
        };
        let shapes = [[width, hidden], [width, hidden], [hidden, width]];
        let packed: Vec<Vec<Layer>> = shapes
            .iter()
            .map(|&[rows, cols]| {
                let codings =
                    codings.iter().cycle().take(if codings.is_empty() { 0 } else { COUNT });
                codings
                    .map(|&coding| {
                        layer(&mut noise, [rows, cols, 32], coding, &[3, 2, 4][..cols.div_ceil(32)])
                    })
                    .collect()
            })
            .collect();
        let weights = |which: usize| -> Vec<Weight<'_>> {
            let [rows, cols] = shapes[which];
            match packed[which].is_empty() {
                true => (0..COUNT)
                    .map(|i| dense(&half[which * COUNT + i], DType::F16, rows, cols))
                    .collect(),
                false => packed[which].iter().map(Layer::weight).collect(),
            }
        };
        let [gate, up, down] = [0, 1, 2].map(weights);
        let router = noise.vector(COUNT * hidden, 1.0);
        let router_bytes: Vec<u8> = router.iter().flat_map(|x| x.to_le_bytes()).collect();
        let (bias, correction) = (noise.vector(COUNT, 1.0), noise.vector(COUNT, 0.3));
        let share = noise.vector(hidden, 1.0);
        let host = ExpertWeights {
            router: dense(&router_bytes, DType::F32, COUNT, hidden),
            router_bias: Some(&bias),
            correction: Some(&correction),
            share: Some(&share),
            gate: gate.clone(),
            up: up.clone(),
            down: down.clone(),
        };
        let experts = Experts::upload(&device, spec, &host).unwrap();
        assert!(experts.bytes_per_token() < experts.device_bytes() / 10);
        let mut routed = Routed::zeros(&device, 9, &spec).unwrap();
        for m in [1, 9] {
            let x = noise.vector(m * hidden, 1.0);
            let norm_weight = noise.vector(hidden, 1.0);
            let mut normed = vec![0.0; m * hidden];
            Scalar.rms_norm(&x, &norm_weight, 1e-5, &mut normed);
            let norm_buffer = Buffer::upload(&device, &norm_weight).unwrap();
            let norm = Norm { weight: norm_buffer.view(), bias: None, epsilon: 1e-5 };
            let mut sums = Buffer::upload(&device, &x).unwrap();
            let inputs = operands(&device, &normed, m);
            device.route(&experts, sums.view(), Some(norm), m, &mut routed).unwrap();
            device.expert_neurons(&experts, &inputs, m, &mut routed).unwrap();
            device.add_experts(&experts, &routed, m, 0.5, &mut sums.view_mut()).unwrap();
            let mut expected = widened(&x);
            for (token, normed) in normed.chunks_exact(hidden).enumerate() {
                let vectors = [bias.as_slice(), &correction];
                for (expert, weight) in chosen_experts(&spec, &router, vectors, normed) {
                    let product = |w: Weight<'_>, x: &[f32]| reference(w, x, 1);
                    let gates = product(gate[expert], normed);
                    let neurons: Vec<f32> = gates
                        .iter()
                        .zip(product(up[expert], normed))
                        .map(|(gate, up)| (weight * up * gate / (1.0 + (-gate).exp())) as f32)
                        .collect();
                    let added = product(down[expert], &neurons);
                    let sums = &mut expected[token * hidden..][..hidden];
                    sums.iter_mut().zip(added).for_each(|(sum, added)| *sum += 0.5 * added);
                }
            }
            let found = sums.view().read().unwrap();
            assert_nmse(&format!("{case}, m {m}"), &found, &expected, PRODUCT_NMSE);

            let mut beside = operands(&device, &vec![1.0; m * width], m);
            device.weigh_rows(&mut beside, &routed, m).unwrap();
            let shares = normed.chunks_exact(hidden).map(|normed| {
                let sum: f64 = share.iter().zip(normed).map(|(w, x)| f64::from(w * x)).sum();
                1.0 / (1.0 + (-sum).exp())
            });
            let expected: Vec<f64> = shares.flat_map(|share| vec![share; width]).collect();
            assert_nmse("shares", &beside.read(m).unwrap(), &expected, HALF_NMSE);
        }
    }
}
