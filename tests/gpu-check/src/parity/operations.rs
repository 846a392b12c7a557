//! The operations beside products and attention, and that the same work gives the same bits.

use std::sync::Arc;

use anyhow::Result;
use slim_formats::{DType, arch::Activation, slim::ScaleCoding};
use slim_kernels::{
    Backend, KvType, Scalar,
    cuda::{Buffer, Device, Matrix, Next, Norm, Operands, Strided, TopK},
    weight,
};

use super::{
    Check,
    attention::{Case, OnDevice},
    products::{operands, reference},
};
use crate::weights::{Fill, HostWeight, LayerSpec, TRELLIS, TWO_LEVEL, half_vector, vector};

pub fn embed(device: &Arc<Device>, check: &mut Check) -> Result<()> {
    let [rows, cols] = [70, 304];
    let spec =
        |coding, widths| LayerSpec { rows, cols, group_size: 128, coding, widths, size: 1.0 };
    let packed = |coding, widths| spec(coding, widths).fill(11, Fill::Random);
    let six_bit = ScaleCoding::TwoLevel { sub_group: 16, scale_bits: 6 };
    let weights = [
        packed(TWO_LEVEL, &[1, 2, 3]),
        packed(six_bit, &[8, 5, 7]),
        packed(ScaleCoding::Paper, &[1, 4, 6]),
        packed(TRELLIS, &[1, 4, 7]),
        spec(six_bit, &[7, 4, 2]).bands(11, &[16, 32, 16, 6]),
        spec(TRELLIS, &[8, 3, 2]).bands(11, &[32, 32, 6]),
        LayerSpec { cols: 100, ..spec(TWO_LEVEL, &[3]) }.fill(11, Fill::Random),
        LayerSpec { cols: 259, ..spec(ScaleCoding::Paper, &[1, 4, 6]) }.fill(11, Fill::Random),
        HostWeight::dense(11, DType::F16, [rows, cols], 1.0),
        HostWeight::dense(11, DType::F16, [rows, 100], 1.0),
    ];
    for (i, w) in weights.iter().enumerate() {
        let (rows, cols) = weight::shape(w.view());
        let matrix = Matrix::upload(device, w.view())?;
        let tokens = [rows as u32 - 1, 0, 17, 17, 35];
        let mut x = Buffer::upload(device, &vec![f32::NAN; tokens.len() * cols])?;
        let tokens_on_device = Buffer::upload(device, &tokens)?;
        device.embed(&matrix, tokens_on_device.view(), 1.0, &mut x.view_mut())?;
        let mut expected = vec![0.0; tokens.len() * cols];
        for (&token, row) in tokens.iter().zip(expected.chunks_exact_mut(cols)) {
            weight::dequantize_rows(w.view(), token as usize..token as usize + 1, row)?;
        }
        check.same(format_args!("weight {i}"), &x.view().read()?, &expected);
    }
    Ok(())
}

pub fn norm(device: &Arc<Device>, check: &mut Check) -> Result<()> {
    for (m, n) in [(1, 4), (1, 64), (3, 100), (2, 1028), (5, 4096), (1, 8192)] {
        for size in [1e-3, 3.0] {
            let (x, weight) = (vector(12, m * n, size), vector(13, n, 1.0));
            let (x_on_device, weight_on_device) =
                (Buffer::upload(device, &x)?, Buffer::upload(device, &weight)?);
            let mut out = Operands::zeros(device, m, n)?;
            let rms = Norm { weight: weight_on_device.view(), bias: None, epsilon: 1e-5 };
            let layer = Norm { bias: Some(weight_on_device.view()), ..rms };
            let mut expected = vec![0.0; m * n];
            for norm in [rms, layer] {
                match norm.bias {
                    None => Scalar.rms_norm(&x, &weight, 1e-5, &mut expected),
                    Some(_) => Scalar.layer_norm(&x, &weight, &weight, 1e-5, &mut expected),
                }
                let next = Next { norm: Some(norm), out: &mut out };
                device.norm(x_on_device.view(), m, next)?;
                check.near(format_args!("{m} x {n}, size {size}"), &out.read(m)?, &expected);

                let mut sum = Buffer::upload(device, &x)?;
                device.norm_add(x_on_device.view(), norm, 0.3, &mut sum.view_mut(), m, None)?;
                expected.iter_mut().zip(&x).for_each(|(sum, x)| *sum = x + 0.3 * *sum);
                let case = format!("added, {m} x {n}, size {size}");
                check.near(case, &sum.view().read()?, &expected);
            }
        }
    }
    Ok(())
}

pub fn activate(device: &Arc<Device>, check: &mut Check) -> Result<()> {
    for (m, n) in [(1, 1), (2, 300), (9, 1024)] {
        for size in [0.1, 100.0] {
            let (mut gate, up) = (vector(14, m * n, size), vector(15, m * n, 1.0));
            let (gate_on_device, up_on_device) =
                (Buffer::upload(device, &gate)?, Buffer::upload(device, &up)?);
            let mut out = Operands::zeros(device, m, n)?;
            let (gate_view, up_view) = (gate_on_device.view(), Some(up_on_device.view()));
            device.activate(Activation::Silu, gate_view, up_view, n, m, &mut out)?;
            Scalar.gated(Activation::Silu, &mut gate, &up);
            check.near(format_args!("{m} x {n}, size {size}"), &out.read(m)?, &gate);
        }
    }
    Ok(())
}

pub fn top_k(device: &Arc<Device>, check: &mut Check) -> Result<()> {
    for (n, k) in [(1, 3), (40, 128), (2048, 1), (2049, 40), (32000, 128), (128_256, 40)] {
        // Random, with many equal ones, all equal.
        for steps in [0.0, 8.0, 0.4] {
            let mut logits = vector(16, n, 1.0);
            if steps > 0.0 {
                logits.iter_mut().for_each(|logit| *logit = (*logit * steps).round());
            }
            let mut top = TopK::new(device, k)?;
            device.top_k(Buffer::upload(device, &logits)?.view(), &mut top)?;
            let mut order: Vec<u32> = (0..n as u32).collect();
            let logit = |token: u32| logits[token as usize];
            // -0 is 0.
            order.sort_by(|&a, &b| (logit(b) + 0.0).total_cmp(&(logit(a) + 0.0)).then(a.cmp(&b)));
            let expected: Vec<_> =
                order.into_iter().take(k).map(|token| (token, logit(token))).collect();
            check.same(format_args!("{k} of {n}, steps {steps}"), &top.read()?, &expected);
        }
    }
    Ok(())
}

pub fn gemm(device: &Arc<Device>, check: &mut Check) -> Result<()> {
    for (m, n, k) in [(1, 1, 1), (5, 130, 37), (129, 64, 200), (130, 257, 16)] {
        for (alpha, beta) in [(1.0, 0.0), (-0.5, 2.0)] {
            let (a, b, c) =
                (vector(17, m * k, 1.0), vector(18, n * k, 1.0), vector(19, m * n, 1.0));
            let b_as_weight = HostWeight::dense(18, DType::F32, [n, k], 1.0);
            let mut expected = reference(&b_as_weight, &a, m)?;
            for (sum, c) in expected.iter_mut().zip(&c) {
                *sum = beta * c + alpha * *sum;
            }
            // A is handed over as its transpose, whose rows are its columns.
            let columns: Vec<f32> = (0..m * k).map(|i| a[i % m * k + i / m]).collect();
            let (columns, b) = (Buffer::upload(device, &columns)?, Buffer::upload(device, &b)?);
            let mut out = Buffer::upload(device, &c)?;
            let a = Strided::new(columns.view(), k, m).transposed();
            let b = Strided::new(b.view(), n, k);
            device.gemm(alpha, a, b, beta, &mut out.view_mut(), n)?;
            check.near(
                format_args!("{m} x {n} x {k}, beta {beta}"),
                &out.view().read()?,
                &expected,
            );
        }
    }
    Ok(())
}

/// Work of every kind, many tokens at once and few.
pub fn twice(device: &Arc<Device>, check: &mut Check) -> Result<()> {
    for tokens in [1, 8, 130] {
        let run = || Step::new(device, tokens)?.run(device);
        check.same(format_args!("{tokens} tokens"), &run()?, &run()?);
    }
    for m in [1, 40] {
        let case = Case { m, ..Case::new(8, 2, 64) };
        let run = || OnDevice::new(device, &case)?.attend(device);
        check.same(format_args!("attention, {m} tokens"), &run()?, &run()?);
    }
    Ok(())
}

/// A graph that is launched again, at other positions, too.
pub fn graph(device: &Arc<Device>, check: &mut Check) -> Result<()> {
    for tokens in [1, 8] {
        let expected = Step::new(device, tokens)?.run(device)?;
        let mut step = Step::new(device, tokens)?;
        let graph = device.capture(|| step.launch(device))?;
        for launch in 0..2 {
            step.reset()?;
            graph.launch()?;
            check.same(format_args!("{tokens} tokens, launch {launch}"), &step.read()?, &expected);
        }
    }
    for kv_type in [KvType::F16, KvType::Q8] {
        let case = Case { kv_type, start: 200, ..Case::new(8, 2, 64) };
        let mut step = OnDevice::new(device, &case)?;
        step.set_position(7)?;
        let graph = device.capture(|| step.launch(device))?;
        for position in [7, 200, 63] {
            step.set_position(position)?;
            graph.launch()?;
            let found = step.read()?;
            step.set_position(position)?;
            step.launch(device)?;
            check.same(format_args!("{kv_type:?}, position {position}"), &found, &step.read()?);
        }
    }
    Ok(())
}

/// A product that is added, with the norm that follows.
struct Step {
    w: Matrix,
    x: Operands,
    tokens: usize,
    residual: Vec<f32>,
    out: Buffer<f32>,
    norm: Buffer<f32>,
    normed: Operands,
}

impl Step {
    fn new(device: &Arc<Device>, tokens: usize) -> Result<Self> {
        let (rows, cols) = (200, 400);
        let spec = LayerSpec {
            rows,
            cols,
            group_size: 128,
            coding: TWO_LEVEL,
            widths: &[1, 2, 3],
            size: 0.1,
        };
        let residual = vector(20, tokens * rows, 1.0);
        Ok(Self {
            w: Matrix::upload(device, spec.fill(20, Fill::Random).view())?,
            x: operands(device, &half_vector(21, tokens * cols, 1.0), tokens)?,
            tokens,
            out: Buffer::upload(device, &residual)?,
            residual,
            norm: Buffer::upload(device, &vector(22, rows, 1.0))?,
            normed: Operands::zeros(device, tokens, rows)?,
        })
    }

    fn launch(&mut self, device: &Arc<Device>) -> slim_kernels::Result<()> {
        let norm = Some(Norm { weight: self.norm.view(), bias: None, epsilon: 1e-5 });
        let next = Next { norm, out: &mut self.normed };
        device.matmul_add(&self.w, &self.x, self.tokens, 1.0, &mut self.out.view_mut(), Some(next))
    }

    fn reset(&mut self) -> Result<()> {
        Ok(self.out.view_mut().write(&self.residual)?)
    }

    fn read(&self) -> Result<Vec<u32>> {
        let numbers = self.out.view().read()?.into_iter().chain(self.normed.read(self.tokens)?);
        Ok(numbers.map(f32::to_bits).collect())
    }

    fn run(mut self, device: &Arc<Device>) -> Result<Vec<u32>> {
        self.launch(device)?;
        self.read()
    }
}
