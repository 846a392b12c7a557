//! Products with packed and dense weights, by the kernels of few and of many tokens.

use std::sync::Arc;

use anyhow::Result;
use slim_formats::{
    DType,
    arch::Activation,
    slim::{ScaleCoding, TILE_ROWS},
};
use slim_kernels::{
    Backend, Scalar,
    cuda::{Buffer, Device, Matrix, Neurons, Next, Norm, Operands},
    weight,
};

use super::Check;
use crate::weights::{
    Fill, HostWeight, LayerSpec, OUTLIER_ROW, TRELLIS, TWO_LEVEL, half_vector, vector,
};

/// Numbers of tokens, by case in turn.
type Tokens<'a> = &'a [&'a [usize]];

/// What no kernel may leave in an output.
const POISON: f32 = f32::NAN;

const EPSILON: f32 = 1e-5;

fn codings() -> impl Iterator<Item = ScaleCoding> {
    let two_level = [16, 32, 64].into_iter().flat_map(|sub_group| {
        [4, 6].map(|scale_bits| ScaleCoding::TwoLevel { sub_group, scale_bits })
    });
    let trellis = [16, 32, 64].map(|sub_group| ScaleCoding::Trellis { sub_group });
    two_level.chain([ScaleCoding::Paper]).chain(trellis)
}

pub fn widths(device: &Arc<Device>, check: &mut Check, tokens: Tokens<'_>) -> Result<()> {
    let mut tokens = tokens.iter().cycle();
    for coding in codings() {
        for bits in 1..=8 {
            // The last group has 48 columns.
            let widths = &[bits];
            let spec =
                LayerSpec { rows: 33, cols: 304, group_size: 128, coding, widths, size: 0.1 };
            multiply(
                device,
                check,
                &format!("{spec:?}"),
                &spec.fill(1, Fill::Random),
                tokens.next(),
            )?;
        }
    }
    Ok(())
}

pub fn shapes(device: &Arc<Device>, check: &mut Check, tokens: Tokens<'_>) -> Result<()> {
    let mut tokens = tokens.iter().cycle();
    let fine = ScaleCoding::TwoLevel { sub_group: 16, scale_bits: 6 };
    let codings = [TWO_LEVEL, fine, ScaleCoding::Paper, TRELLIS];
    let widths = [[1_u8, 2, 3], [2, 3, 4], [3, 8, 1], [1, 2, 3]];
    let mut mixes = codings.into_iter().zip(widths).cycle();
    for group_size in [16, 48, 64, 128, 160, 256] {
        for rows in [1, 17, 33, 200] {
            for (coding, widths) in mixes.by_ref().take(3) {
                let widths = &widths;
                let spec = LayerSpec { rows, cols: 400, group_size, coding, widths, size: 0.1 };
                let tokens = tokens.next();
                multiply(device, check, &format!("{spec:?}"), &spec.fill(2, Fill::Random), tokens)?;
            }
        }
    }
    Ok(())
}

pub fn columns(device: &Arc<Device>, check: &mut Check, tokens: Tokens<'_>) -> Result<()> {
    let mut tokens = tokens.iter().cycle();
    for coding in codings() {
        for cols in [1, 17, 72, 100, 172, 300] {
            let widths = &[3, 1, 8];
            let spec = LayerSpec { rows: 33, cols, group_size: 64, coding, widths, size: 0.1 };
            let tokens = tokens.next();
            multiply(device, check, &format!("{spec:?}"), &spec.fill(5, Fill::Random), tokens)?;
        }
    }
    Ok(())
}

pub fn extremes(device: &Arc<Device>, check: &mut Check, tokens: Tokens<'_>) -> Result<()> {
    let mut tokens = tokens.iter().cycle();
    for coding in codings() {
        for fill in [
            Fill::Highest,
            Fill::Lowest,
            Fill::OutlierRow,
            Fill::ZeroGroups,
            Fill::ZeroRows,
            Fill::NoFactor,
            Fill::NoOffset,
            Fill::TinyFactor,
            Fill::TinyOffset,
        ] {
            let widths = &[8, 1, 3];
            let spec = LayerSpec { rows: 33, cols: 208, group_size: 64, coding, widths, size: 0.1 };
            let case = format!("{fill:?}, {spec:?}");
            multiply(device, check, &case, &spec.fill(3, fill), tokens.next())?;
        }
    }
    Ok(())
}

pub fn dense(device: &Arc<Device>, check: &mut Check, tokens: Tokens<'_>) -> Result<()> {
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        for shape in [[1, 1], [17, 100], [33, 64], [200, 208]] {
            let w = HostWeight::dense(4, dtype, shape, 0.1);
            let tokens =
                tokens.iter().flat_map(|tokens| tokens.iter().copied()).collect::<Vec<_>>();
            multiply(device, check, &format!("{dtype:?} {shape:?}"), &w, Some(&&*tokens))?;
        }
    }
    Ok(())
}

/// Compares the products of `w` with so many tokens. Rows that [`Fill::OutlierRow`] makes large are
/// compared apart: they must not hide errors of the others.
fn multiply(
    device: &Arc<Device>,
    check: &mut Check,
    case: &str,
    w: &HostWeight,
    tokens: Option<&&[usize]>,
) -> Result<()> {
    let matrix = Matrix::upload(device, w.view())?;
    let (rows, cols) = weight::shape(w.view());
    let [mut large, mut others] = [(); 2].map(|()| (Vec::new(), Vec::new()));
    for &m in tokens.into_iter().copied().flatten() {
        let x = half_vector(m as u64, m * cols, 1.0);
        let mut out = Buffer::upload(device, &vec![POISON; m * rows])?;
        device.matmul(&[&matrix], &operands(device, &x, m)?, m, &mut [out.view_mut()])?;
        for (i, (found, expected)) in
            out.view().read()?.into_iter().zip(reference(w, &x, m)?).enumerate()
        {
            let is_large = i % rows % TILE_ROWS == OUTLIER_ROW;
            let (all_found, all_expected) = if is_large { &mut large } else { &mut others };
            all_found.push(found);
            all_expected.push(expected);
        }
    }
    for (found, expected) in [large, others].into_iter().filter(|(found, _)| !found.is_empty()) {
        check.near(format_args!("{case}, tokens {tokens:?}"), &found, &expected);
    }
    Ok(())
}

/// Matrices in one call: of different rows, widths and storage, and more bands than a launch takes.
pub fn several(device: &Arc<Device>, check: &mut Check, tokens: Tokens<'_>) -> Result<()> {
    let cols = 272;
    let packed = |rows, group_size, coding, widths: &[u8]| {
        LayerSpec { rows, cols, group_size, coding, widths, size: 0.1 }.fill(5, Fill::Random)
    };
    let bands_of = |coding, rows: &[usize]| {
        let widths = &[1, 2, 4];
        LayerSpec { rows: 0, cols, group_size: 64, coding, widths, size: 0.1 }.bands(15, rows)
    };
    let bands = |rows: &[usize]| bands_of(TWO_LEVEL, rows);
    let weights = [
        packed(200, 64, TWO_LEVEL, &[1, 2, 3]),
        packed(17, 128, ScaleCoding::Paper, &[2, 3, 4]),
        HostWeight::dense(5, DType::F16, [40, cols], 0.1),
        packed(64, 256, TWO_LEVEL, &[8]),
        bands(&[160, 16, 32, 24]),
        bands(&[16; 16]),
        bands(&[[32; 15].as_slice(), &[7]].concat()),
        packed(80, 64, TRELLIS, &[3, 1, 6]),
        bands_of(TRELLIS, &[160, 32, 64, 8]),
    ];
    let few = &weights[..4];
    for chosen in
        [&few[..2], &few[1..], few, &few[2..3], &weights[4..5], &weights[7..], &weights[..]]
    {
        let matrices = uploaded(device, chosen)?;
        for &m in tokens.iter().copied().flatten() {
            let x = half_vector(m as u64, m * cols, 1.0);
            let mut out = matrices
                .iter()
                .map(|w| Buffer::upload(device, &vec![POISON; m * w.rows()]))
                .collect::<Result<Vec<_>, _>>()?;
            let mut views: Vec<_> = out.iter_mut().map(Buffer::view_mut).collect();
            let matrices: Vec<&Matrix> = matrices.iter().collect();
            device.matmul(&matrices, &operands(device, &x, m)?, m, &mut views)?;
            for (i, (w, out)) in chosen.iter().zip(&out).enumerate() {
                let case = format!("matrix {i} of {}, {m} tokens", chosen.len());
                check.near(case, &out.view().read()?, &reference(w, &x, m)?);
            }
        }
    }
    Ok(())
}

pub fn add(device: &Arc<Device>, check: &mut Check, tokens: Tokens<'_>) -> Result<()> {
    let cols = 176;
    for rows in [4, 72, 200] {
        let spec = LayerSpec {
            rows,
            cols,
            group_size: 64,
            coding: TWO_LEVEL,
            widths: &[1, 2, 3],
            size: 0.1,
        };
        let upper = rows / 32 * 16;
        let bands = [upper, rows - upper];
        let weights = [
            spec.fill(6, Fill::Random),
            HostWeight::dense(6, DType::F16, [rows, cols], 0.1),
            spec.bands(6, if upper > 0 { &bands } else { &bands[1..] }),
            LayerSpec { coding: TRELLIS, ..spec }.fill(6, Fill::Random),
        ];
        let norm_weight = vector(7, rows, 1.0);
        let norm_buffer = Buffer::upload(device, &norm_weight)?;
        let (bias, scale) = (vector(9, rows, 1.0), 0.3);
        for (w, matrix) in weights.iter().zip(uploaded(device, &weights)?) {
            let matrix = matrix.with_bias(Buffer::upload(device, &bias)?)?;
            for &m in tokens.iter().copied().flatten() {
                let (x, residual) =
                    (half_vector(m as u64, m * cols, 1.0), vector(8, m * rows, 1.0));
                let x_on_device = operands(device, &x, m)?;
                let mut expected = residual.clone();
                let products = reference(w, &x, m)?.into_iter().zip(bias.iter().cycle());
                for (sum, (product, bias)) in expected.iter_mut().zip(products) {
                    *sum += scale * (product + bias);
                }
                let mut out = Buffer::upload(device, &residual)?;
                device.matmul_add(&matrix, &x_on_device, m, scale, &mut out.view_mut(), None)?;
                let case = format!("{rows} rows, {m} tokens");
                check.near(format_args!("sums, {case}"), &out.view().read()?, &expected);

                let mut out = Buffer::upload(device, &residual)?;
                let mut normed = Operands::zeros(device, m, rows)?;
                let weight = norm_buffer.view();
                let norm = Some(Norm { weight, bias: None, epsilon: EPSILON });
                let next = Next { norm, out: &mut normed };
                let sums = &mut out.view_mut();
                device.matmul_add(&matrix, &x_on_device, m, scale, sums, Some(next))?;
                check.near(
                    format_args!("sums before a norm, {case}"),
                    &out.view().read()?,
                    &expected,
                );
                let mut expected_normed = vec![0.0; m * rows];
                Scalar.rms_norm(&expected, &norm_weight, EPSILON, &mut expected_normed);
                check.near(format_args!("norm, {case}"), &normed.read(m)?, &expected_normed);
            }
        }
    }
    Ok(())
}

pub fn neurons(device: &Arc<Device>, check: &mut Check, tokens: Tokens<'_>) -> Result<()> {
    let (rows, cols) = (200, 176);
    let spec =
        LayerSpec { rows, cols, group_size: 64, coding: TWO_LEVEL, widths: &[1, 2, 3], size: 0.1 };
    let packed = [spec.fill(9, Fill::Random), spec.fill(10, Fill::Random)];
    let half = [9, 10].map(|seed| HostWeight::dense(seed, DType::F16, [rows, cols], 0.1));
    let rows_of_bands = [[16; 12].as_slice(), &[8]].concat();
    let bands = [9, 10].map(|seed| spec.bands(seed, &rows_of_bands));
    let others = spec.bands(11, &[32, 32, 112, 24]);
    let of_trellis = LayerSpec { coding: TRELLIS, ..spec };
    let trellis = [9, 10].map(|seed| of_trellis.bands(seed, &[32, 96, 64, 8]));
    for (kind, [gate, up]) in [
        ("packed", [&packed[0], &packed[1]]),
        ("dense", [&half[0], &half[1]]),
        ("both", [&packed[0], &half[1]]),
        ("bands", [&bands[0], &bands[1]]),
        ("bands of other rows", [&bands[0], &others]),
        ("bands and packed", [&bands[0], &packed[1]]),
        ("trellis", [&trellis[0], &trellis[1]]),
        ("bands and trellis", [&bands[0], &trellis[1]]),
    ] {
        let (gate_matrix, up_matrix) =
            (Matrix::upload(device, gate.view())?, Matrix::upload(device, up.view())?);
        for &m in tokens.iter().copied().flatten() {
            let x = half_vector(m as u64, m * cols, 1.0);
            let mut scratch = [Buffer::zeros(device, m * rows)?, Buffer::zeros(device, m * rows)?];
            let [a, b] = &mut scratch;
            let mut out = Operands::zeros(device, m, rows)?;
            let x_on_device = operands(device, &x, m)?;
            let (gates, ups) = (reference(gate, &x, m)?, reference(up, &x, m)?);
            for (activation, is_gated) in
                [(Activation::Silu, true), (Activation::GeluTanh, true), (Activation::Relu, false)]
            {
                let gate = is_gated.then_some(&gate_matrix);
                let neurons = Neurons { gate, up: &up_matrix, activation };
                let scratch = [&mut a.view_mut(), &mut b.view_mut()];
                device.matmul_activate(neurons, &x_on_device, m, scratch, &mut out)?;
                let mut expected = if is_gated { gates.clone() } else { ups.clone() };
                match is_gated {
                    true => Scalar.gated(activation, &mut expected, &ups),
                    false => Scalar.activate(activation, &mut expected),
                }
                let case = format!("{kind}, {activation:?}, {m} tokens");
                check.near(case, &out.read(m)?, &expected);
            }
        }
    }
    Ok(())
}

pub fn uploaded(device: &Arc<Device>, weights: &[HostWeight]) -> Result<Vec<Matrix>> {
    weights.iter().map(|w| Ok(Matrix::upload(device, w.view())?)).collect()
}

pub fn operands(device: &Arc<Device>, x: &[f32], m: usize) -> Result<Operands> {
    let mut operands = Operands::zeros(device, m, x.len() / m)?;
    operands.write(x, m)?;
    Ok(operands)
}

pub fn reference(w: &HostWeight, x: &[f32], m: usize) -> Result<Vec<f32>> {
    let mut out = vec![0.0; m * weight::shape(w.view()).0];
    Scalar.matmul(w.view(), x, m, &mut out)?;
    Ok(out)
}
