//! Parity: one suite for every backend, against expectations that are computed here in f64.
//!
//! Packed layers are filled from known codes and scales, and what they are worth is worked out from
//! those by the formulas of `docs/format.md`, not by unpacking.

mod batch;
mod cuda;
mod dense;

use half::{bf16, f16};
use rayon::prelude::*;
use slim_formats::{
    DType, DenseTensor, Layout, Weight,
    arch::Activation,
    slim::{
        Bands, BitWidth, CodeColumn, LayerLayout, PackedLayer, PackedTensor, ScaleCoding,
        TILE_ROWS, TileMut,
    },
};

use crate::{
    AttentionCall, AttentionShape, Backend, Cpu, KernelError, KvCache, KvRows, KvType, RopeAngles,
    Scalar, kl_divergence,
    linalg::{self, Mat, Method, Precision, Store},
    log_softmax,
    matvec::{self, Input, Rounding, batch::multiply_by, matvec_by},
    weight::{dequantize_rows, stored_bytes},
};

/// Bounds of the normalized mean square error (`sum (found - expected)^2 / sum expected^2`) against
/// f64.
///
/// Measured 1.3e-11 where a layer of one row gives a single output near zero; 1e-13 for usual ones.
const MATMUL_NMSE: f64 = 1e-10;
/// 8-bit codes of uniform noise: steps of 1/127 have an error of 1/127^2/12, which is 1.6e-5 of a
/// mean square of 1/3. Measured 1.5e-5.
const INPUT_NMSE: f64 = 2e-5;
const DEQUANTIZE_NMSE: f64 = 1e-12;
const RMS_NORM_NMSE: f64 = 1e-12;
const ROPE_NMSE: f64 = 1e-12;
const SWIGLU_NMSE: f64 = 1e-12;
/// Measured 1.04e-11 for scores of several hundred, whose f32 rounding goes into the exponent;
/// 1e-13 for usual ones.
const ATTENTION_NMSE: f64 = 1e-10;
const FAER_NMSE: f64 = 1e-11;
/// AMX rounds factors to 17 bits: a product is off by 2^-17.8 in root mean square, which is 1.9e-11
/// squared. Measured 5.7e-11, for five outputs.
const BF16_FINE_NMSE: f64 = 5e-10;
/// The same for 8 bits.
const BF16_COARSE_NMSE: f64 = 5e-5;
/// Measured 5.3e-9 where a layer of one row gives two outputs near zero.
const MATMUL_AMX_NMSE: f64 = 5e-8;
/// Measured 3.7e-9 for scores of several hundred, whose rounding goes into the exponent.
const ATTENTION_AMX_NMSE: f64 = 4e-8;
/// Bounds of the largest error of one value.
const LOG_SOFTMAX_ERROR: f64 = 3e-6;
const KL_DIVERGENCE_ERROR: f64 = 1e-7;
const INVERSE_ERROR: f64 = 1e-4;

/// `amx` for a backend whose products use it on this machine.
fn product_nmse(backend: &str, amx: f64, otherwise: f64) -> f64 {
    match Method::fastest(Precision::Fine) {
        Method::Bf16(_) if backend == "cpu" => amx,
        _ => otherwise,
    }
}

fn backends() -> [(&'static str, &'static dyn Backend); 2] {
    [("scalar", &Scalar), ("cpu", &Cpu)]
}

/// Numbers without a pattern, the same on every run (SplitMix64).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between -1 and 1.
    fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn vector(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| scale * self.signed()).collect()
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.next() as usize % choices.len()]
    }
}

/// Asserts a bound on the normalized mean square error; zeros must be met exactly.
#[track_caller]
fn assert_nmse(what: &str, found: &[f32], expected: &[f64], bound: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let error: f64 = found.iter().zip(expected).map(|(&f, e)| (f64::from(f) - e).powi(2)).sum();
    let power: f64 = expected.iter().map(|e| e * e).sum();
    assert!(error <= bound * power, "{what}: NMSE {:e}", error / power);
}

#[track_caller]
fn assert_near(what: &str, found: &[f32], expected: &[f64], absolute: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(error <= absolute, "{what}: value {i} is {found}, not {expected}");
    }
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// `a[m, k] * b[n, k]^T` in f64.
fn product(a: &[f32], b: &[f64], k: usize) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f64]| a.iter().zip(b).map(|(&a, b)| f64::from(a) * b).sum();
    a.chunks_exact(k).flat_map(|a| b.chunks_exact(k).map(move |b| dot(a, b))).collect()
}

/// How the codes and scales of a layer are chosen.
#[derive(Clone, Copy)]
enum Fill {
    Random,
    /// The largest code and scale everywhere, with minimum and zero point 0.
    Highest,
    /// Code 0 everywhere, with the largest minimum and zero point.
    Lowest,
    /// Random, and the scales of row 3 are 10,000 times those of the others.
    OutlierRow,
}

const OUTLIER_ROW: usize = 3;

/// A packed layer and what it is worth.
struct Layer {
    packed: PackedLayer,
    /// [rows, cols].
    weights: Vec<f64>,
}

impl Layer {
    fn new(
        noise: &mut Noise,
        fill: Fill,
        [rows, cols, group_size]: [usize; 3],
        coding: ScaleCoding,
        bits: &[u8],
    ) -> Self {
        let widths: Vec<_> = bits.iter().map(|&bits| BitWidth::new(bits).unwrap()).collect();
        let layout = LayerLayout::new(rows, cols, group_size, coding, &widths).unwrap();
        let mut packed = PackedLayer::zeroed(layout);
        let mut weights = vec![0.0; rows * cols];
        let tiles = packed.tiles_mut();
        for (mut tile, weights) in tiles.into_iter().zip(weights.chunks_mut(TILE_ROWS * cols)) {
            TileFiller { noise, fill, used: weights.len() / cols }.fill(&mut tile, weights);
        }
        if let ScaleCoding::Trellis { .. } = coding {
            fill_trellis_weights(packed.view(), &mut weights);
        }
        Self { packed, weights }
    }

    fn weight(&self) -> Weight<'_> {
        Weight::Packed(self.packed.view())
    }
}

/// What the entries of a trellis are worth, which `slim-formats` tests bit by bit.
fn fill_trellis_weights(packed: PackedTensor<'_>, weights: &mut [f64]) {
    let layout = packed.layout();
    for (tile, weights) in weights.chunks_mut(TILE_ROWS * layout.cols()).enumerate() {
        let (d, _) = packed.row_scales(tile);
        for group in layout.groups() {
            let mut entries = vec![[0; TILE_ROWS]; group.cols.len()];
            packed.codes(tile, group, &mut entries);
            let step = if group.bit_width.bits() == 8 { 0.5 } else { 1.0 };
            for (run, cols) in group.runs(layout.coding()).enumerate() {
                let (_, offset) = packed.scales(tile, group, run);
                for (r, row) in weights.chunks_exact_mut(layout.cols()).enumerate() {
                    let scale = f64::from(d[r]) * f64::from(offset[r]) / -64.0;
                    for col in cols.clone() {
                        let entry = f64::from(entries[col - group.cols.start][r]);
                        row[col] = scale * (step * entry - 64.0);
                    }
                }
            }
        }
    }
}

/// Fills the first `used` rows of a tile.
struct TileFiller<'a> {
    noise: &'a mut Noise,
    fill: Fill,
    used: usize,
}

impl TileFiller<'_> {
    /// Codes, or scale codes, up to `max` for the rows in use, zero for the padding.
    fn codes(&mut self, max: u8) -> CodeColumn {
        self.column(max, 0)
    }

    /// Minimum codes or zero points.
    fn offsets(&mut self, max: u8) -> CodeColumn {
        self.column(0, max)
    }

    fn column(&mut self, highest: u8, lowest: u8) -> CodeColumn {
        let max = highest | lowest;
        std::array::from_fn(|r| match self.fill {
            _ if r >= self.used => 0,
            Fill::Highest => highest,
            Fill::Lowest => lowest,
            Fill::Random | Fill::OutlierRow => self.noise.next() as u8 & max,
        })
    }

    fn scales(&mut self, size: f32) -> [f16; TILE_ROWS] {
        std::array::from_fn(|r| {
            let value = match self.fill {
                _ if r >= self.used => 0.0,
                Fill::Highest | Fill::Lowest => size,
                Fill::Random => size * self.noise.signed(),
                Fill::OutlierRow if r == OUTLIER_ROW => 1e4 * size,
                Fill::OutlierRow => size * self.noise.signed(),
            };
            f16::from_f32(value)
        })
    }

    fn fill(&mut self, tile: &mut TileMut<'_>, weights: &mut [f64]) {
        let layout = tile.layout().clone();
        let (cols, coding) = (layout.cols(), layout.coding());
        let (d, m) = (self.scales(1.0 / 64.0), self.scales(1.0 / 64.0));
        if coding != ScaleCoding::Paper {
            tile.set_row_scales(&d, &m);
        }
        for (index, group) in layout.groups().iter().enumerate() {
            let max = group.bit_width.max_code();
            let codes: Vec<_> = group.cols.clone().map(|_| self.codes(max)).collect();
            tile.set_codes(index, &codes);
            for (run, run_cols) in group.runs(coding).enumerate() {
                let value: Box<dyn Fn(usize, f64) -> f64> = match coding {
                    ScaleCoding::TwoLevel { scale_bits, .. } => {
                        let max = u8::MAX >> (8 - scale_bits);
                        let (s, z) = (self.codes(max), self.offsets(max));
                        tile.set_two_level(index, run, &s, &z);
                        Box::new(move |r, code| {
                            d[r].to_f64() * f64::from(s[r]) * code - m[r].to_f64() * f64::from(z[r])
                        })
                    }
                    ScaleCoding::Trellis { .. } => {
                        tile.set_trellis_scales(index, run, &self.codes(15));
                        // The codes of the other tile belong to it: `Layer::new` sees both.
                        continue;
                    }
                    ScaleCoding::Paper if max == 1 => {
                        let (scale, mean) = (self.scales(1.0), self.scales(0.5));
                        tile.set_binary(index, &scale, &mean);
                        Box::new(move |r, code| {
                            mean[r].to_f64() + scale[r].to_f64() * (2.0 * code - 1.0)
                        })
                    }
                    ScaleCoding::Paper => {
                        let (scale, zero_point) = (self.scales(1.0 / 16.0), self.offsets(max));
                        tile.set_affine(index, &scale, &zero_point);
                        Box::new(move |r, code| {
                            scale[r].to_f64() * (code - f64::from(zero_point[r]))
                        })
                    }
                };
                for col in run_cols {
                    for r in 0..self.used {
                        let code = codes[col - group.cols.start][r];
                        weights[r * cols + col] = value(r, code.into());
                    }
                }
            }
        }
    }
}

const TWO_LEVEL: ScaleCoding = ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 4 };

fn codings() -> impl Iterator<Item = ScaleCoding> {
    let two_level = [16, 32, 64].into_iter().flat_map(|sub_group| {
        [4, 6].map(|scale_bits| ScaleCoding::TwoLevel { sub_group, scale_bits })
    });
    let trellis = [16, 32, 64].map(|sub_group| ScaleCoding::Trellis { sub_group });
    two_level.chain([ScaleCoding::Paper]).chain(trellis)
}

/// The bit-widths of a layer: the same for all groups, or (0) all of them in turn.
fn bit_widths(noise: &mut Noise, bits: u8, groups: usize) -> Vec<u8> {
    let first = noise.next() as usize;
    (0..groups)
        .map(|group| if bits == 0 { 1 + ((first + group) % 8) as u8 } else { bits })
        .collect()
}

/// One token as `method` multiplies packed codes with it: rounded to 8 bits by methods in integers.
/// How far rounding may take it is tested apart.
fn as_multiplied(method: matvec::Method, layout: &LayerLayout, x: &[f32]) -> Vec<f32> {
    match method {
        matvec::Method::Integer(..) => Rounding::of_layer(layout).values(x),
        matvec::Method::Float => x.to_vec(),
    }
}

/// The same for what `backend` does with `x: [m, cols]`.
fn as_input_of(backend: &str, weight: Weight<'_>, x: &[f32], cols: usize) -> Vec<f32> {
    let by_token =
        |rounded: &dyn Fn(&[f32]) -> Vec<f32>| x.chunks(cols).flat_map(rounded).collect();
    match (weight, weight.bands(), matvec::Method::fastest()) {
        _ if backend != "cpu" => x.to_vec(),
        (_, Some(bands), method) => by_token(&|x| as_multiplied(method, bands.get(0).layout(), x)),
        (Weight::Dense(dense), _, matvec::Method::Integer(..)) if dense.dtype == DType::Q8_0 => {
            by_token(&|x| Input::in_whole_steps(x).values())
        }
        _ => x.to_vec(),
    }
}

/// Multiplies with every backend, and a packed layer with one token in every way that this machine
/// has.
#[track_caller]
fn check_matmul(what: &str, weight: Weight<'_>, weights: &[f64], cols: usize, x: &[f32]) {
    let m = x.len() / cols;
    let mut out = vec![f32::NAN; weights.len() / cols * m];
    // Of the backend in hand; it is dear, and wanted again for the last one, `cpu`.
    let mut expected = Vec::new();
    for (name, backend) in backends() {
        expected = product(&as_input_of(name, weight, x, cols), weights, cols);
        out.fill(f32::NAN);
        backend.matmul(weight, x, m, &mut out).unwrap();
        // One token, and codes in integers, are multiplied without the general product.
        let bound = match m {
            1 => MATMUL_NMSE,
            _ => product_nmse(name, MATMUL_AMX_NMSE, MATMUL_NMSE),
        };
        assert_nmse(&format!("{name}, {what}"), &out, &expected, bound);
    }
    if m > 1 {
        let mut in_integers: Option<Vec<f32>> = None;
        for method in matvec::Method::all() {
            out.fill(f32::NAN);
            if multiply_by(method, weight, x, m, &mut out).is_some() {
                assert_nmse(&format!("{method:?}, {what}"), &out, &expected, MATMUL_NMSE);
                let first = in_integers.get_or_insert_with(|| out.clone());
                assert_eq!(&out, first, "{method:?} rounds in its own way, {what}");
            }
        }
    }
    if let (Some(bands), 1) = (weight.bands(), m) {
        let mut in_integers: Option<Vec<f32>> = None;
        let layout = bands.get(0).layout();
        for method in matvec::Method::all() {
            let expected = product(&as_multiplied(method, layout, x), weights, cols);
            out.fill(f32::NAN);
            matvec_by(method, bands, x, &mut out);
            assert_nmse(&format!("{method:?}, {what}"), &out, &expected, MATMUL_NMSE);
            if matches!(method, matvec::Method::Integer(..)) {
                let first = in_integers.get_or_insert_with(|| out.clone());
                assert_eq!(&out, first, "{method:?} rounds in its own way, {what}");
            }
        }
    }
}

#[test]
fn matmul_packed_layers_of_every_kind_agree() {
    let mut noise = Noise(1);
    for (coding, bits) in codings().flat_map(|coding| (0..=8).map(move |bits| (coding, bits))) {
        let mut cases = Vec::new();
        for cols in [16_usize, 48, 80, 160, 576] {
            for group_size in [16, 48, 64, 128] {
                let rows = noise.pick(&[1, 15, 16, 17, 33, 65, 129, 270]);
                let widths = bit_widths(&mut noise, bits, cols.div_ceil(group_size));
                let shape = [rows, cols, group_size];
                let layer = Layer::new(&mut noise, Fill::Random, shape, coding, &widths);
                let tokens = [1, noise.pick(&[2, 7, 130])];
                cases.push((shape, widths, layer, tokens.map(|m| noise.vector(m * cols, 1.0))));
            }
        }
        // Drawn one by one, checked on all cores: under an emulator it takes minutes.
        cases.into_par_iter().for_each(|(shape, widths, layer, inputs)| {
            let cols = shape[1];
            for x in &inputs {
                let m = x.len() / cols;
                let what = format!("{coding:?}, {shape:?}, bits {widths:?}, m {m}");
                check_matmul(&what, layer.weight(), &layer.weights, cols, x);
            }
        });
    }
}

/// Codes are stored for whole units of 16 columns: what is past the last column counts for nothing.
#[test]
fn matmul_packed_layers_of_any_columns_agree() {
    let mut noise = Noise(31);
    for coding in codings() {
        for bits in [0, 1, 3, 8] {
            for cols in [1_usize, 7, 15, 17, 31, 33, 72, 100, 172] {
                for group_size in [16, 48, 128] {
                    let rows = noise.pick(&[16, 33, 130]);
                    let widths = bit_widths(&mut noise, bits, cols.div_ceil(group_size));
                    let shape = [rows, cols, group_size];
                    let layer = Layer::new(&mut noise, Fill::Random, shape, coding, &widths);
                    for m in [1, noise.pick(&[2, 7, 130])] {
                        let x = noise.vector(m * cols, 1.0);
                        let what = format!("{coding:?}, {shape:?}, bits {widths:?}, m {m}");
                        check_matmul(&what, layer.weight(), &layer.weights, cols, &x);
                    }
                }
            }
        }
    }
}

/// Bands of so many rows, all but the last in whole strips, the bit-widths of each different, and
/// what they are worth.
fn bands(noise: &mut Noise, rows: &[usize], coding: ScaleCoding) -> (Vec<PackedLayer>, Vec<f64>) {
    let layer = |(index, &of_band): (usize, &usize)| {
        let widths = bit_widths(noise, 0, 3);
        let of_band = match index + 1 == rows.len() {
            true => of_band,
            false => of_band.next_multiple_of(coding.strip_rows()),
        };
        Layer::new(noise, Fill::Random, [of_band, 176, 64], coding, &widths)
    };
    let layers =
        rows.iter().enumerate().map(layer).map(|Layer { packed, weights }| (packed, weights));
    let (layers, weights): (_, Vec<_>) = layers.unzip();
    (layers, weights.concat())
}

#[test]
fn matmul_bands_agree() {
    let mut noise = Noise(11);
    for coding in codings() {
        for rows in [&[16, 1][..], &[48, 128, 17], &[256, 16, 16, 70], &[33]] {
            let (layers, weights) = bands(&mut noise, rows, coding);
            for m in [1, 7, 130] {
                let x = noise.vector(m * 176, 1.0);
                let what = format!("{coding:?}, bands of {rows:?} rows, m {m}");
                let weight = Weight::Bands(Bands::new(&layers));
                check_matmul(&what, weight, &weights, 176, &x);
            }
        }
    }
}

#[test]
fn dequantize_rows_of_several_bands_gives_what_was_packed() {
    let mut noise = Noise(12);
    for coding in codings() {
        let (layers, weights) = bands(&mut noise, &[32, 48, 21], coding);
        let weight = Weight::Bands(Bands::new(&layers));
        for rows in [0..101, 0..32, 31..33, 32..80, 5..99, 79..101, 40..40, 101..101] {
            let mut out = vec![f32::NAN; rows.len() * 176];
            dequantize_rows(weight, rows.clone(), &mut out).unwrap();
            let expected = &weights[rows.start * 176..rows.end * 176];
            assert_nmse(&format!("{coding:?}, rows {rows:?}"), &out, expected, DEQUANTIZE_NMSE);
        }
        let bytes: u64 =
            layers.iter().map(|layer| stored_bytes(Weight::Packed(layer.view()))).sum();
        assert_eq!(stored_bytes(weight), bytes);
    }
}

#[test]
fn matmul_extreme_codes_agree() {
    let mut noise = Noise(2);
    for (coding, fill) in
        codings().flat_map(|coding| [(coding, Fill::Highest), (coding, Fill::Lowest)])
    {
        for bits in 0..=8 {
            let widths = bit_widths(&mut noise, bits, 5);
            let layer = Layer::new(&mut noise, fill, [33, 272, 64], coding, &widths);
            for m in [1, 7] {
                let x = noise.vector(m * 272, 1.0);
                let what = format!("{coding:?}, bits {widths:?}, m {m}");
                check_matmul(&what, layer.weight(), &layer.weights, 272, &x);
            }
        }
    }
}

#[test]
fn matmul_zero_layer_gives_zeros() {
    for coding in codings() {
        let widths = [1, 3, 8].map(|bits| BitWidth::new(bits).unwrap());
        let layout = LayerLayout::new(17, 80, 32, coding, &widths).unwrap();
        let layer = PackedLayer::zeroed(layout);
        for m in [1, 7] {
            let x = Noise(3).vector(m * 80, 1e6);
            let what = format!("{coding:?}, m {m}");
            check_matmul(&what, Weight::Packed(layer.view()), &[0.0; 17 * 80], 80, &x);
        }
    }
}

#[test]
fn matmul_outlier_inputs_agree() {
    let mut noise = Noise(4);
    let layer = Layer::new(&mut noise, Fill::Random, [33, 160, 64], TWO_LEVEL, &[2, 3, 4]);
    for m in [1, 7] {
        let mut x = noise.vector(m * 160, 1.0);
        x[77] = 1e6;
        check_matmul("an outlier", layer.weight(), &layer.weights, 160, &x);
        check_matmul("no input", layer.weight(), &layer.weights, 160, &vec![0.0; m * 160]);
    }
}

/// A large row must not cost its neighbours in the tile their accuracy.
#[test]
fn matmul_outlier_row_leaves_the_others_alone() {
    let mut noise = Noise(5);
    let (rows, cols) = (16, 160);
    for coding in codings() {
        let layer = Layer::new(&mut noise, Fill::OutlierRow, [rows, cols, 64], coding, &[2, 3, 4]);
        for m in [1, 7] {
            let x = noise.vector(m * cols, 1.0);
            for (name, backend) in backends() {
                let input = as_input_of(name, layer.weight(), &x, cols);
                let expected = product(&input, &layer.weights, cols);
                let mut out = vec![f32::NAN; m * rows];
                backend.matmul(layer.weight(), &x, m, &mut out).unwrap();
                let split = |row: usize| row % rows == OUTLIER_ROW;
                for outlier in [true, false] {
                    let chosen = |i: &usize| split(*i) == outlier;
                    let found: Vec<_> = (0..out.len()).filter(chosen).map(|i| out[i]).collect();
                    let expected: Vec<_> =
                        (0..out.len()).filter(chosen).map(|i| expected[i]).collect();
                    let what = format!("{name}, {coding:?}, m {m}, outlier {outlier}");
                    assert_nmse(&what, &found, &expected, MATMUL_NMSE);
                }
            }
        }
    }
}

/// Every test of `matvec` runs all methods of the machine. Where one of them has to be there, its
/// absence is no pass.
#[test]
fn matvec_instruction_set_to_be_tested_is_there() {
    let found: Vec<_> = matvec::Method::all().iter().map(|method| format!("{method:?}")).collect();
    println!("products with one token are tested in: {}", found.join(", "));
    if let Ok(expected) = std::env::var("SLIMLLM_TEST_ISA") {
        assert!(found.contains(&expected), "{expected} is not among {found:?}");
    }
}

/// Where all scales are 1 and the input is integers up to 127, sums are integers that f32 holds
/// exactly.
#[test]
fn matvec_integer_products_are_exact() {
    let mut noise = Noise(24);
    for (bits, sub_group, extreme) in (1..=8).flat_map(|bits| {
        [16, 32, 64].into_iter().flat_map(move |sub| [(bits, sub, false), (bits, sub, true)])
    }) {
        let (rows, cols) = (40, 432);
        let width = BitWidth::new(bits).unwrap();
        let coding = ScaleCoding::TwoLevel { sub_group, scale_bits: 6 };
        let layout = LayerLayout::new(rows, cols, 112, coding, &[width; 4]).unwrap();
        let mut packed = PackedLayer::zeroed(layout.clone());
        let mut codes = vec![0i32; packed.layout().tiles() * TILE_ROWS * cols];
        for mut tile in packed.tiles_mut() {
            tile.set_row_scales(&[f16::ONE; TILE_ROWS], &[f16::ZERO; TILE_ROWS]);
            let first_row = tile.index() * TILE_ROWS;
            for (index, group) in layout.groups().iter().enumerate() {
                let least = if extreme { width.max_code() } else { 0 };
                let mut column = || -> CodeColumn {
                    std::array::from_fn(|_| noise.next() as u8 & width.max_code() | least)
                };
                let columns: Vec<_> = group.cols.clone().map(|_| column()).collect();
                tile.set_codes(index, &columns);
                for (col, column) in group.cols.clone().zip(&columns) {
                    for (r, &code) in column.iter().enumerate() {
                        codes[(first_row + r) * cols + col] = code.into();
                    }
                }
                for run in 0..group.runs(coding).len() {
                    tile.set_two_level(index, run, &[1; TILE_ROWS], &[9; TILE_ROWS]);
                }
            }
        }
        // The largest value of each 16 columns is 127, so that codes of the input are the input.
        let x: Vec<i32> = (0..cols)
            .map(|col| match col % 16 {
                _ if extreme => 127 - 254 * i32::from(bits % 2),
                3 => noise.pick(&[127, -127]),
                _ => noise.pick(&[-127, -1, 0, 1, 127, (col % 100) as i32]),
            })
            .collect();
        let expected: Vec<f32> = codes
            .chunks_exact(cols)
            .take(rows)
            .map(|row| row.iter().zip(&x).map(|(code, x)| code * x).sum::<i32>() as f32)
            .collect();
        let x: Vec<f32> = x.into_iter().map(|x| x as f32).collect();
        for method in matvec::Method::all() {
            let mut out = vec![f32::NAN; rows];
            matvec_by(method, packed.view(), &x, &mut out);
            assert_eq!(out, expected, "{method:?}, {bits} bits, {sub_group}, extreme {extreme}");
        }
    }
}

/// Each value by half a code at most, and all by what the documentation states.
#[test]
fn matvec_input_is_rounded_as_stated() {
    let mut noise = Noise(25);
    let width = BitWidth::new(3).unwrap();
    let layout = LayerLayout::new(16, 592, 128, TWO_LEVEL, &[width; 5]).unwrap();
    for size in [1.0, 1e-30, 1e30, 0.0] {
        let x = noise.vector(592, size);
        let found = Rounding::of_layer(&layout).values(&x);
        assert_nmse(&format!("values up to {size}"), &found, &widened(&x), INPUT_NMSE);
        for (found, x) in found.chunks(32).zip(x.chunks(32)) {
            let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            for (found, x) in found.iter().zip(x) {
                assert!((found - x).abs() <= largest / 253.9, "{found} for {x} of {largest}");
            }
        }
    }
    // A step with an outlier has second codes, and costs no other step anything.
    let mut x = noise.vector(592, 1.0);
    x[77] = 1e3;
    let found = Rounding::of_layer(&layout).values(&x);
    for (found, x) in found[64..96].iter().zip(&x[64..96]) {
        assert!((found - x).abs() <= 1e3 / 64_000.0, "{found} for {x}");
    }
    let others = |values: &[f32]| [&values[..64], &values[96..]].concat();
    assert_nmse("beside an outlier", &others(&found), &widened(&others(&x)), INPUT_NMSE);
}

#[test]
fn matvec_with_outliers_multiplies_second_codes() {
    let mut noise = Noise(27);
    for (coding, bits) in codings().flat_map(|coding| (1..=8).map(move |b| (coding, b))) {
        let layer = Layer::new(&mut noise, Fill::Random, [33, 112, 64], coding, &[bits, bits]);
        let mut x = noise.vector(112, 1.0);
        for outlier in x.iter_mut().step_by(37) {
            *outlier *= 1e3;
        }
        let input = Rounding::of_layer(layer.packed.layout()).values(&x);
        let (expected, mut out) = (product(&input, &layer.weights, 112), vec![0.0; 33]);
        for method in matvec::Method::all() {
            if matches!(method, matvec::Method::Integer(..)) {
                matvec_by(method, layer.packed.view(), &x, &mut out);
                assert_nmse(
                    &format!("{method:?}, {coding:?}, {bits}"),
                    &out,
                    &expected,
                    MATMUL_NMSE,
                );
            }
        }
    }
}

#[test]
fn matvec_what_is_not_finite_stays_so() {
    let mut noise = Noise(26);
    for coding in codings() {
        let layer = Layer::new(&mut noise, Fill::Random, [33, 112, 64], coding, &[3, 8]);
        for value in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for col in [0, 31, 70, 111] {
                let mut x = noise.vector(112, 1.0);
                x[col] = value;
                for method in matvec::Method::all() {
                    let mut out = vec![0.0; 33];
                    matvec_by(method, layer.packed.view(), &x, &mut out);
                    // A weight of zero hides an infinite input from a product in f32.
                    let finite = out.iter().filter(|value| value.is_finite()).count();
                    let all = matches!(method, matvec::Method::Integer(..)) || value.is_nan();
                    assert!(finite == 0 || !all, "{method:?}, {coding:?}, {value} at {col}");
                }
            }
        }
    }
}

/// The bytes of a dense tensor and what they are worth.
fn dense_bytes(noise: &mut Noise, dtype: DType, len: usize) -> (Vec<u8>, Vec<f64>) {
    let values = noise.vector(len, 1.0);
    match dtype {
        DType::F32 => (values.iter().flat_map(|v| v.to_le_bytes()).collect(), widened(&values)),
        DType::F16 => {
            let values: Vec<f16> = values.into_iter().map(f16::from_f32).collect();
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (bytes, values.iter().map(|v| v.to_f64()).collect())
        }
        DType::BF16 => {
            let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (bytes, values.iter().map(|v| v.to_f64()).collect())
        }
        DType::Q8_0 => {
            let (mut bytes, mut worth) = (Vec::new(), Vec::new());
            for block in values.chunks_exact(32) {
                let d = f16::from_f32(block[0] / 64.0);
                let codes: Vec<i8> = block.iter().map(|v| (v * 127.0) as i8).collect();
                bytes.extend(d.to_le_bytes());
                bytes.extend(codes.iter().map(|code| code.cast_unsigned()));
                worth.extend(codes.iter().map(|&code| d.to_f64() * f64::from(code)));
            }
            (bytes, worth)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn matmul_dense_weights_agree() {
    let mut noise = Noise(6);
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::Q8_0] {
        for (rows, cols) in [(1, 32), (15, 96), (128, 64), (129, 160), (270, 576)] {
            let (bytes, weights) = dense_bytes(&mut noise, dtype, rows * cols);
            let layout = Layout::AsStored;
            let tensor = DenseTensor { dtype, rows, cols, bytes: &bytes, layout, scales: None };
            for m in [1, 2, 7, 130] {
                let x = noise.vector(m * cols, 1.0);
                let what = format!("{dtype:?} [{rows}, {cols}], m {m}");
                check_matmul(&what, Weight::Dense(tensor), &weights, cols, &x);
            }
        }
    }
}

#[test]
fn matmul_interleaved_rows_come_in_the_order_of_use() {
    let (rows, cols, head_dim) = (136, 32, 8);
    let mut noise = Noise(7);
    let (bytes, stored) = dense_bytes(&mut noise, DType::F16, rows * cols);
    let layout = Layout::Interleaved { head_dim, first: 0, rotated: head_dim };
    let tensor = DenseTensor { dtype: DType::F16, rows, cols, bytes: &bytes, layout, scales: None };
    let used: Vec<f64> = (0..rows)
        .flat_map(|row| {
            let (head, channel) = (row / head_dim, row % head_dim);
            let pair = channel % (head_dim / 2);
            let stored_row = head * head_dim + 2 * pair + channel / (head_dim / 2);
            stored[stored_row * cols..][..cols].to_vec()
        })
        .collect();
    for m in [1, 7] {
        let x = noise.vector(m * cols, 1.0);
        check_matmul("interleaved", Weight::Dense(tensor), &used, cols, &x);
    }
}

#[test]
fn matmul_transposed_part_of_a_fused_weight_agrees() {
    let mut noise = Noise(9);
    for (rows, cols, first, stride, step) in
        [(15, 96, 0, 15, 1), (270, 80, 32, 334, 1), (270, 80, 1, 540, 2), (17, 40, 0, 51, 3)]
    {
        let (bytes, fused) = dense_bytes(&mut noise, DType::F16, cols * stride);
        let len = (cols - 1) * stride + (rows - 1) * step + 1;
        let bytes = &bytes[2 * first..2 * (first + len)];
        let layout = Layout::Transposed { stride, step };
        let tensor = DenseTensor { dtype: DType::F16, rows, cols, bytes, layout, scales: None };
        let weights: Vec<f64> =
            (0..rows * cols).map(|i| fused[i % cols * stride + first + i / cols * step]).collect();
        for m in [1, 7, 130] {
            let x = noise.vector(m * cols, 1.0);
            check_matmul("transposed", Weight::Dense(tensor), &weights, cols, &x);
        }
    }
}

#[test]
fn matmul_wrong_lengths_are_refused() {
    let layer = Layer::new(&mut Noise(8), Fill::Random, [17, 48, 48], TWO_LEVEL, &[3]);
    let (bytes, _) = dense_bytes(&mut Noise(8), DType::F16, 17 * 48);
    let layout = Layout::AsStored;
    let dense =
        DenseTensor { dtype: DType::F16, rows: 17, cols: 48, bytes: &bytes, layout, scales: None };
    for weight in [layer.weight(), Weight::Dense(dense)] {
        for m in [1, 2] {
            for (x, out) in [(-1, 0), (1, 0), (-48, 0), (0, -1), (0, 1), (48, 17)] {
                let x = vec![0.0; (m as isize * 48 + x) as usize];
                let mut out = vec![0.0; (m as isize * 17 + out) as usize];
                for (name, backend) in backends() {
                    let error = backend.matmul(weight, &x, m, &mut out).unwrap_err();
                    assert!(matches!(error, KernelError::ShapeMismatch { .. }), "{name}: {error}");
                }
            }
        }
    }
}

#[test]
fn matmul_weights_that_are_no_numbers_are_refused() {
    let layout = Layout::AsStored;
    let dense =
        DenseTensor { dtype: DType::I8, rows: 2, cols: 16, bytes: &[0; 32], layout, scales: None };
    for m in [1, 2] {
        for (name, backend) in backends() {
            let (x, mut out) = (vec![0.0; m * 16], vec![0.0; m * 2]);
            let error = backend.matmul(Weight::Dense(dense), &x, m, &mut out).unwrap_err();
            assert!(matches!(error, KernelError::UnsupportedType { .. }), "{name}: {error}");
        }
    }
}

#[test]
fn dequantize_any_rows_gives_what_was_packed() {
    let mut noise = Noise(9);
    for coding in codings() {
        for bits in 0..=8 {
            let widths = bit_widths(&mut noise, bits, 4);
            let layer = Layer::new(&mut noise, Fill::Random, [37, 176, 48], coding, &widths);
            for rows in [0..37, 0..1, 15..17, 5..36, 36..37, 20..20] {
                let mut out = vec![f32::NAN; rows.len() * 176];
                dequantize_rows(layer.weight(), rows.clone(), &mut out).unwrap();
                let expected = &layer.weights[rows.start * 176..rows.end * 176];
                let what = format!("{coding:?}, bits {widths:?}, rows {rows:?}");
                assert_nmse(&what, &out, expected, DEQUANTIZE_NMSE);
            }
            let (codes, scales, row_scales) = layer.packed.parts();
            let parts = codes.len() + scales.len() + row_scales.len() + widths.len();
            assert_eq!(stored_bytes(layer.weight()), parts as u64);
        }
    }
}

#[test]
fn rms_norm_agrees() {
    const EPSILON: f32 = 1e-5;
    let mut noise = Noise(10);
    for n in [1, 8, 13, 576] {
        for (m, size) in [(1, 1.0), (3, 1e4), (130, 1e-3), (2, 1e-30), (2, 0.0)] {
            let (x, weight) = (noise.vector(m * n, size), noise.vector(n, 2.0));
            let expected: Vec<f64> = x
                .chunks_exact(n)
                .flat_map(|x| {
                    let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
                    let scale = 1.0 / (squares / n as f64 + f64::from(EPSILON)).sqrt();
                    let pairs = x.iter().zip(&weight);
                    pairs
                        .map(move |(&x, &w)| f64::from(x) * scale * f64::from(w))
                        .collect::<Vec<_>>()
                })
                .collect();
            for (name, backend) in backends() {
                let mut out = vec![f32::NAN; m * n];
                backend.rms_norm(&x, &weight, EPSILON, &mut out);
                let what = format!("{name}, n {n}, m {m}, values up to {size}");
                assert_nmse(&what, &out, &expected, RMS_NORM_NMSE);
            }
        }
    }
}

#[test]
fn rope_angles_follow_the_formula() {
    let (dim, theta, factors) = (8, 10_000.0, [1.0, 2.0, 4.0, 8.0]);
    for (start, m) in [(0, 3), (500, 2)] {
        let angles = RopeAngles::new(dim, theta, &factors, start, m);
        let expected = |f: fn(f64) -> f64| -> Vec<f64> {
            (start..start + m)
                .flat_map(|position| {
                    (0..dim / 2).map(move |i| {
                        let frequency = f64::from(theta).powf(-2.0 * i as f64 / dim as f64);
                        f(position as f64 * frequency / f64::from(factors[i]))
                    })
                })
                .collect()
        };
        assert_near("cos", &angles.cos, &expected(f64::cos), 5e-5);
        assert_near("sin", &angles.sin, &expected(f64::sin), 5e-5);
    }
}

#[test]
fn rope_agrees() {
    let mut noise = Noise(11);
    for (heads, dim, start, m) in [(1, 2, 0, 1), (4, 16, 0, 7), (3, 64, 1000, 130), (2, 10, 5, 1)] {
        let angles = RopeAngles::new(dim, 10_000.0, &vec![1.0; dim / 2], start, m);
        let x = noise.vector(m * heads * dim, 1.0);
        let mut expected = widened(&x);
        for (index, head) in expected.chunks_exact_mut(dim).enumerate() {
            let at = index / heads * (dim / 2);
            for i in 0..dim / 2 {
                let (cos, sin) = (f64::from(angles.cos[at + i]), f64::from(angles.sin[at + i]));
                let (a, b) = (head[i], head[i + dim / 2]);
                (head[i], head[i + dim / 2]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
        for (name, backend) in backends() {
            let mut rotated = x.clone();
            backend.rope(&mut rotated, heads, &angles);
            let what = format!("{name}, {heads} heads of {dim}, m {m}");
            assert_nmse(&what, &rotated, &expected, ROPE_NMSE);
        }
    }
}

fn silu(gate: f32) -> f64 {
    let gate = f64::from(gate);
    gate / (1.0 + (-gate).exp())
}

#[test]
fn swiglu_agrees() {
    let mut noise = Noise(12);
    for (len, size) in [(1, 1.0), (7, 10.0), (4096, 1.0), (8197, 100.0)] {
        let (gate, up) = (noise.vector(len, size), noise.vector(len, 1.0));
        let expected: Vec<_> =
            gate.iter().zip(&up).map(|(&gate, &up)| silu(gate) * f64::from(up)).collect();
        for (name, backend) in backends() {
            let mut out = gate.clone();
            backend.gated(Activation::Silu, &mut out, &up);
            assert_nmse(&format!("{name}, {len} values"), &out, &expected, SWIGLU_NMSE);
        }
    }
}

#[test]
fn clamped_swiglu_agrees() {
    let mut noise = Noise(21);
    let (alpha, limit) = (1.702, 7.0);
    let activation = Activation::ClampedSwish { alpha, limit };
    let swish = |gate: f32| {
        let gate = f64::from(gate.min(limit));
        gate / (1.0 + (-f64::from(alpha) * gate).exp())
    };
    for (len, size) in [(1, 1.0), (7, 10.0), (4096, 20.0), (8197, 100.0)] {
        let (gate, up) = (noise.vector(len, size), noise.vector(len, size));
        let gated: Vec<f64> = gate
            .iter()
            .zip(&up)
            .map(|(&gate, &up)| swish(gate) * (1.0 + f64::from(up.clamp(-limit, limit))))
            .collect();
        let activated: Vec<f64> = gate.iter().copied().map(swish).collect();
        for (name, backend) in backends() {
            let what = format!("{name}, {len} values");
            let mut out = gate.clone();
            backend.gated(activation, &mut out, &up);
            assert_nmse(&what, &out, &gated, SWIGLU_NMSE);
            let mut out = gate.clone();
            backend.activate(activation, &mut out);
            assert_nmse(&what, &out, &activated, SWIGLU_NMSE);
        }
    }
}

#[test]
fn swiglu_large_inputs_saturate() {
    let gate = [0.0, -0.0, -20.0, 20.0, -86.9, -87.5, -88.5, 88.5, -104.0, -1e4, 1e4, -1e6, 1e30];
    let up = [1.5; 13];
    for (name, backend) in backends() {
        let mut out = gate;
        backend.gated(Activation::Silu, &mut out, &up);
        for (found, &gate) in out.iter().zip(&gate) {
            let (found, expected) = (f64::from(*found), 1.5 * silu(gate));
            // A result that f32 holds as a normal number is accurate; below that it only has to be
            // tiny.
            let bound = 1e-6 * expected.abs() + 1e-31;
            assert!((found - expected).abs() <= bound, "{name}: silu({gate}) is {found}");
        }
        let mut out = [f32::MIN, f32::MAX];
        backend.gated(Activation::Silu, &mut out, &[1.0; 2]);
        assert!(out.iter().all(|value| value.is_finite()), "{name}: {out:?}");
    }
}

/// Keys and values of random tokens; positions that no query sees are NaN.
fn cache(noise: &mut Noise, mut cache: KvCache, shape: &AttentionShape, spare: usize) -> KvCache {
    let (seen, end) = (shape.visible(0).start, shape.start + shape.m);
    let mut fill = || -> Vec<f32> {
        let size = |position| if (seen..end).contains(&position) { 1.0 } else { f32::NAN };
        (0..end + spare).flat_map(|p| noise.vector(shape.kv_stride(), size(p))).collect()
    };
    cache.store(&fill(), &fill(), 0);
    cache
}

/// Caches of every type with room for so many positions.
fn caches(shape: &AttentionShape, capacity: usize) -> [(&'static str, KvCache); 3] {
    let AttentionShape { kv_heads, head_dim, .. } = *shape;
    let new = |kv_type| KvCache::new(kv_type, kv_heads, capacity, head_dim);
    [
        ("f32", KvCache::exact(kv_heads, capacity, head_dim)),
        ("f16", new(KvType::F16)),
        ("q8", new(KvType::Q8)),
    ]
}

fn expected_attention(
    q: &[f32],
    cache: &KvCache,
    sinks: Option<&[f32]>,
    shape: &AttentionShape,
) -> Vec<f64> {
    let dim = shape.head_dim;
    let mut out = Vec::new();
    for (index, query) in q.chunks_exact(dim).enumerate() {
        let (t, head) = (index / shape.heads, index % shape.heads);
        let kv_head = head * shape.kv_heads / shape.heads;
        let first = match shape.window {
            Some(window) => (shape.start + t + 1).saturating_sub(window),
            None => 0,
        };
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let keys = cache.keys.read(kv_head, first..shape.start + t + 1, &mut keys);
        let values = cache.values.read(kv_head, first..shape.start + t + 1, &mut values);
        let score = |key: &[f32]| {
            let dot: f64 = query.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
            let score = dot * f64::from(shape.scale);
            shape.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
        };
        let scores: Vec<f64> = keys.chunks_exact(dim).map(score).collect();
        let sink = sinks.map(|sinks| f64::from(sinks[head]));
        let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().copied().chain(sink).map(|score| (score - max).exp()).sum();
        out.extend((0..dim).map(|i| {
            let terms = scores.iter().zip(values.chunks_exact(dim));
            let terms = terms.map(|(score, v)| (score - max).exp() / sum * f64::from(v[i]));
            terms.sum::<f64>()
        }));
    }
    out
}

/// Attention of one text.
fn attend(backend: &dyn Backend, q: &[f32], kv: &KvCache, shape: AttentionShape) -> Vec<f32> {
    attend_with(backend, q, kv, None, shape)
}

/// The same with sinks.
fn attend_with(
    backend: &dyn Backend,
    q: &[f32],
    kv: &KvCache,
    sinks: Option<&[f32]>,
    shape: AttentionShape,
) -> Vec<f32> {
    let mut out = vec![f32::NAN; q.len()];
    backend.attention(&mut [AttentionCall { shape, q, kv, sinks, out: &mut out }]).unwrap();
    out
}

#[test]
fn attention_agrees() {
    let mut noise = Noise(13);
    // heads, kv_heads, head_dim, start, m, window
    for (heads, kv_heads, head_dim, start, m, window) in [
        (1, 1, 2, 0, 1, None),
        (4, 2, 8, 0, 5, None),
        (6, 1, 16, 3, 7, None),
        (2, 2, 8, 0, 127, None),
        (2, 2, 8, 0, 128, None),
        (8, 2, 8, 0, 129, None),
        (4, 2, 10, 70, 257, None),
        (2, 1, 8, 0, 129, Some(16)),
        (2, 1, 8, 0, 5, Some(16)),
        (4, 4, 8, 100, 130, Some(50)),
        (4, 2, 8, 100, 130, Some(300)),
        (2, 1, 8, 0, 300, Some(1)),
        (2, 1, 8, 40, 1, Some(16)),
        (3, 1, 72, 600, 3, Some(290)),
        (160, 1, 8, 40, 2, None),
        (12, 4, 80, 511, 2, None),
        (4, 2, 64, 4095, 1, None),
        (2, 1, 64, 1900, 140, Some(1024)),
    ] {
        let scale = 1.0 / (head_dim as f32).sqrt();
        for (spare, size, softcap, sink_size) in [
            (0, 1.0, None, None),
            (9, 300.0, None, None),
            (1, 30.0, Some(20.0), None),
            (0, 1.0, None, Some(5.0)),
        ] {
            let shape =
                AttentionShape { heads, kv_heads, head_dim, start, m, window, scale, softcap };
            for (kind, empty) in caches(&shape, start + m + spare) {
                let cache = cache(&mut noise, empty, &shape, spare);
                let q = noise.vector(m * heads * head_dim, size);
                let sinks = sink_size.map(|size| noise.vector(heads, size));
                let expected = expected_attention(&q, &cache, sinks.as_deref(), &shape);
                for (name, backend) in backends() {
                    let out = attend_with(backend, &q, &cache, sinks.as_deref(), shape);
                    let what =
                        format!("{name}, {kind}, {shape:?}, queries up to {size}, sinks {sinks:?}");
                    let bound = product_nmse(name, ATTENTION_AMX_NMSE, ATTENTION_NMSE);
                    assert_nmse(&what, &out, &expected, bound);
                }
            }
        }
    }
}

#[test]
fn attention_of_several_texts_is_that_of_each() {
    let mut noise = Noise(18);
    let shape = |start, m| AttentionShape {
        heads: 6,
        kv_heads: 2,
        head_dim: 16,
        start,
        m,
        window: Some(400),
        scale: 0.25,
        softcap: None,
    };
    let shapes = [shape(0, 1), shape(700, 1), shape(3, 90), shape(299, 2), shape(0, 300)];
    let texts: Vec<(AttentionShape, KvCache, Vec<f32>)> = shapes
        .into_iter()
        .map(|shape| {
            let [_, (_, empty), _] = caches(&shape, shape.start + shape.m);
            let kv = cache(&mut noise, empty, &shape, 0);
            (shape, kv, noise.vector(shape.m * shape.query_stride(), 1.0))
        })
        .collect();
    let mut together: Vec<Vec<f32>> = texts.iter().map(|(.., q)| vec![0.0; q.len()]).collect();
    let calls = texts.iter().zip(&mut together);
    let calls = calls.map(|((shape, kv, q), out)| {
        let (shape, sinks) = (*shape, None);
        AttentionCall { shape, q, kv, sinks, out }
    });
    Cpu.attention(&mut calls.collect::<Vec<_>>()).unwrap();
    for ((shape, kv, q), together) in texts.iter().zip(&together) {
        assert_eq!(together, &attend(&Cpu, q, kv, *shape), "{shape:?}");
    }
}

#[test]
fn cache_holds_what_its_type_can() {
    let row = [0.0, 1.0, -0.3, 1e-6, 70_000.0, f32::INFINITY, -1e30, 65_519.0];
    let read = |rows: &KvRows, position: usize| {
        rows.read(1, position..position + 1, &mut Vec::new()).to_vec()
    };
    let stored = |mut cache: KvCache, row: &[f32]| {
        let two_heads = [&[7.0; 8], row].concat();
        cache.store(&two_heads, &two_heads, 2);
        let bits = |rows: &KvRows| read(rows, 2).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&cache.keys), bits(&cache.values));
        assert_eq!(read(&cache.keys, 1), [0.0; 8], "another position");
        read(&cache.keys, 2)
    };
    let stored_bits = |cache, row: &[f32]| -> Vec<u32> {
        stored(cache, row).into_iter().map(f32::to_bits).collect()
    };
    assert_eq!(stored(KvCache::exact(2, 3, 8), &row), row);
    let halves = row.map(|x| f16::from_f32(x.clamp(-65_504.0, 65_504.0)).to_f32());
    assert_eq!(stored(KvCache::new(KvType::F16, 2, 3, 8), &row), halves);
    let row = [-0.0, 6e-8, -5e-5, 1e-9, f32::NAN, 1.0, 6.1e-5, -65_504.0];
    let halves = row.map(|x| f16::from_f32(x).to_f32().to_bits());
    assert_eq!(&*stored_bits(KvCache::new(KvType::F16, 2, 3, 8), &row), halves);
    let row = [0.0, 127.0, -126.6, 63.4, -0.5, 1.5, -127.0, 0.2];
    let codes = [0.0, 127.0, -127.0, 63.0, 0.0, 2.0, -127.0, 0.0];
    assert_eq!(stored(KvCache::new(KvType::Q8, 2, 3, 8), &row), codes);
    assert_eq!(stored(KvCache::new(KvType::Q8, 2, 3, 8), &[0.0; 8]), [0.0; 8]);
}

fn expected_log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - max - sum.ln()).collect()
}

#[test]
fn log_softmax_agrees() {
    let mut noise = Noise(14);
    for (n, size) in [(1, 1.0), (7, 1.0), (320, 20.0), (320, 0.0), (128_256, 10.0)] {
        let logits = noise.vector(n, size);
        let mut found = logits.clone();
        log_softmax(&mut found);
        let what = format!("{n} logits up to {size}");
        assert_near(&what, &found, &expected_log_softmax(&logits), LOG_SOFTMAX_ERROR);
    }
    let mut certain = [1e4, -1e4, 0.0, f32::NEG_INFINITY];
    log_softmax(&mut certain);
    assert_eq!(certain, [0.0, -2e4, -1e4, f32::NEG_INFINITY]);
}

#[test]
fn kl_divergence_agrees() {
    let mut noise = Noise(15);
    for (n, difference) in [(2, 1.0), (320, 0.1), (320, 3.0), (32_000, 0.01), (128_256, 1.0)] {
        let mut p = noise.vector(n, 10.0);
        let mut q: Vec<f32> = p.iter().map(|p| p + difference * noise.signed()).collect();
        log_softmax(&mut p);
        log_softmax(&mut q);
        let pairs = || p.iter().zip(&q).map(|(&p, &q)| (f64::from(p), f64::from(q)));
        let expected: f64 = pairs().map(|(p, q)| p.exp() * (p - q)).sum();
        let found = kl_divergence(&p, &q);
        println!("{n} values: {found:e}, exactly {expected:e}");
        assert!(
            (found - expected).abs() <= KL_DIVERGENCE_ERROR * (1.0 + expected),
            "{n}: {found:e}"
        );
        assert_eq!(kl_divergence(&p, &p), 0.0);
    }
}

/// Every operation once, on sizes that are split among threads.
fn run_everything() -> Vec<Vec<u32>> {
    let mut noise = Noise(16);
    let mut results = Vec::new();
    let layer = Layer::new(&mut noise, Fill::Random, [270, 576, 128], TWO_LEVEL, &[1, 2, 3, 4, 5]);
    for m in [1, 2, 130] {
        let x = noise.vector(m * 576, 1.0);
        let mut out = vec![0.0; m * 270];
        Cpu.matmul(layer.weight(), &x, m, &mut out).unwrap();
        results.push(out);
    }
    let layer = Layer::new(&mut noise, Fill::Random, [1300, 576, 128], TWO_LEVEL, &[8; 5]);
    for method in matvec::Method::all() {
        let (x, mut out) = (noise.vector(576, 1.0), vec![0.0; 1300]);
        matvec_by(method, layer.packed.view(), &x, &mut out);
        results.push(out);
    }
    let (x, weight) = (noise.vector(50 * 576, 1.0), noise.vector(576, 1.0));
    let mut out = vec![0.0; x.len()];
    Cpu.rms_norm(&x, &weight, 1e-5, &mut out);
    Cpu.gated(Activation::Silu, &mut out, &x);
    Cpu.rope(&mut out, 9, &RopeAngles::new(64, 10_000.0, &[1.0; 32], 7, 50));
    results.push(out);
    let (heads, kv_heads, head_dim) = (4, 2, 16);
    let (window, scale, softcap) = (Some(200), 1.0 / (head_dim as f32).sqrt(), None);
    let shape =
        AttentionShape { heads, kv_heads, head_dim, start: 5, m: 300, window, scale, softcap };
    for (_, empty) in caches(&shape, 305) {
        let cache = cache(&mut noise, empty, &shape, 0);
        let q = noise.vector(300 * 64, 1.0);
        results.push(attend(&Cpu, &q, &cache, shape));
        let last = AttentionShape { start: 304, m: 1, window: None, ..shape };
        results.push(attend(&Cpu, &q[..64], &cache, last));
    }
    let (left, right) = (noise.vector(700 * 300, 1.0), noise.vector(300 * 4200, 1.0));
    for method in Method::all() {
        let mut gram = vec![0.0; 300 * 300];
        linalg::add_gram_by(method, &mut gram, &left, 300);
        results.push(gram);
        let mut out = vec![0.0; 700 * 4200];
        let (left, right) = (Mat::new(&left, 700, 300), Mat::new(&right, 300, 4200));
        linalg::matmul_by(method, &mut out, 4200, Store::REPLACE, left, right);
        results.push(out);
    }
    results.into_iter().map(|values| values.into_iter().map(f32::to_bits).collect()).collect()
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let with_threads = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(run_everything)
    };
    let one = with_threads(1);
    for threads in [2, 3] {
        let many = with_threads(threads);
        let equal: Vec<bool> = one.iter().zip(&many).map(|(one, many)| one == many).collect();
        assert_eq!(equal, vec![true; one.len()], "{threads} threads");
    }
}

/// A random symmetric positive definite matrix; the lower triangle, which nobody may read, is NaN
/// in the first.
fn positive_definite(noise: &mut Noise, n: usize) -> (Vec<f32>, Vec<f64>) {
    let tokens = 2 * n + 3;
    let x = noise.vector(tokens * n, 1.0);
    let mut full = vec![0.0; n * n];
    for row in x.chunks_exact(n) {
        for i in 0..n {
            for j in 0..n {
                full[i * n + j] += f64::from(row[i]) * f64::from(row[j]) / tokens as f64;
            }
        }
    }
    let rounded: Vec<f32> = full.iter().map(|&value| value as f32).collect();
    let upper = (0..n * n).map(|at| if at / n <= at % n { rounded[at] } else { f32::NAN });
    (upper.collect(), widened(&rounded))
}

#[test]
fn inverse_cholesky_inverts() {
    let mut noise = Noise(17);
    for n in [1, 5, 64, 129, 300] {
        let (h, full) = positive_definite(&mut noise, n);
        let u = linalg::inverse_cholesky(&h, n, 0.0).unwrap();
        for i in 0..n {
            assert!(u[i * n + i] > 0.0, "n {n}: diagonal");
            assert!(u[i * n..][..i].iter().all(|&below| below == 0.0), "n {n}: lower triangle");
        }
        // u h, then u^T (u h), which is the identity.
        let u = widened(&u);
        let uh: Vec<f64> = (0..n * n)
            .map(|at| (0..n).map(|k| u[at / n * n + k] * full[k * n + at % n]).sum())
            .collect();
        for at in 0..n * n {
            let (i, j) = (at / n, at % n);
            let found: f64 = (0..n).map(|k| u[k * n + i] * uh[k * n + j]).sum();
            let error = (found - f64::from(u8::from(i == j))).abs();
            assert!(error <= INVERSE_ERROR, "n {n}: ({i}, {j}) is off by {error:e}");
        }
    }
}

#[test]
fn inverse_cholesky_not_positive_definite_is_refused() {
    const NAN: f32 = f32::NAN;
    for (name, n, h) in [
        ("zero", 1, vec![0.0]),
        ("negative", 1, vec![-1.0]),
        ("NaN", 1, vec![NAN]),
        ("indefinite", 2, vec![1.0, 2.0, NAN, 1.0]),
        ("NaN beside the diagonal", 2, vec![1.0, NAN, NAN, 1.0]),
        ("one zero channel", 3, vec![1.0, 0.0, 0.0, NAN, 0.0, 0.0, NAN, NAN, 1.0]),
        ("infinite", 2, vec![f32::INFINITY, 0.0, NAN, 1.0]),
        ("large and indefinite", 200, {
            let mut h = positive_definite(&mut Noise(18), 200).0;
            h[100 * 200 + 100] = -1e-3;
            h
        }),
    ] {
        let refused = matches!(
            linalg::inverse_cholesky(&h, n, 0.0),
            Err(KernelError::NotPositiveDefinite { size }) if size == n
        );
        assert!(refused, "{name}");
    }
}

#[test]
fn add_gram_adds_to_the_upper_triangle() {
    let mut noise = Noise(19);
    for (n, tokens) in
        [(0, 0), (1, 1), (5, 3), (33, 31), (96, 130), (97, 1), (200, 70), (16, 0), (530, 33)]
    {
        let start = noise.vector(n * n, 1.0);
        let x = noise.vector(tokens * n, 1.0);
        let upper = || (0..n * n).filter(|at| at / n <= at % n);
        let expected: Vec<f64> = upper()
            .map(|at| {
                let products =
                    x.chunks_exact(n).map(|x| f64::from(x[at / n]) * f64::from(x[at % n]));
                f64::from(start[at]) + products.sum::<f64>()
            })
            .collect();
        for method in Method::all() {
            let mut h = start.clone();
            linalg::add_gram_by(method, &mut h, &x, n);
            let found: Vec<f32> = upper().map(|at| h[at]).collect();
            let what = format!("{method:?}, n {n}, {tokens} tokens");
            assert_nmse(&what, &found, &expected, linalg_nmse(method));
        }
    }
}

/// The first `cols` of every `stride` values.
fn gather<T: Copy>(values: &[T], rows: usize, cols: usize, stride: usize) -> Vec<T> {
    (0..rows).flat_map(|row| values[row * stride..][..cols].to_vec()).collect()
}

fn linalg_nmse(method: Method) -> f64 {
    match method {
        Method::Bf16(unit) => match unit.precision() {
            Precision::Fine => BF16_FINE_NMSE,
            Precision::Coarse => BF16_COARSE_NMSE,
        },
        Method::Faer => FAER_NMSE,
    }
}

/// Sizes around those of tiles, sides, panels and pieces.
const SHAPES: [[usize; 3]; 16] = [
    [1, 1, 1],
    [2, 3, 5],
    [5, 4, 1],
    [1, 5, 4],
    [7, 33, 16],
    [15, 16, 17],
    [16, 15, 33],
    [17, 31, 15],
    [31, 32, 33],
    [32, 33, 31],
    [33, 17, 32],
    [127, 129, 31],
    [129, 127, 64],
    [513, 130, 70],
    [70, 65, 513],
    [3, 4100, 9],
];

#[test]
fn matmul_with_strides_leaves_the_gaps_alone() {
    let mut noise = Noise(20);
    for [m, n, k] in SHAPES {
        for (gap_a, gap_b, gap_out) in [(0, 0, 0), (3, 0, 2), (0, 5, 1)] {
            let (stride_a, stride_out) = (k + gap_a, n + gap_out);
            let a = noise.vector(m * stride_a, 1.0);
            let a_values = gather(&a, m, k, stride_a);
            let start = noise.vector(m * stride_out, 1.0);
            // `b` is [n, k] for the product with the transpose, and [k, n] for the other.
            for transposed in [true, false] {
                let (b_rows, b_cols) = if transposed { (n, k) } else { (k, n) };
                let stride_b = b_cols + gap_b;
                let b = noise.vector(b_rows * stride_b, 1.0);
                let b_values = gather(&b, b_rows, b_cols, stride_b);
                let b_rows_of_k: Vec<f64> = (0..n * k)
                    .map(|at| if transposed { b_values[at] } else { b_values[at % k * n + at / k] })
                    .map(f64::from)
                    .collect();
                let exact = product(&a_values, &b_rows_of_k, k);
                let b = Mat::strided(&b, b_rows, b_cols, stride_b);
                let b = if transposed { b.transposed() } else { b };
                let before = gather(&start, m, n, stride_out);
                for (method, add) in
                    Method::all().into_iter().flat_map(|method| [(method, true), (method, false)])
                {
                    let alpha = if transposed { 0.25 } else { 1.0 };
                    let mut out = start.clone();
                    let a = Mat::strided(&a, m, k, stride_a);
                    linalg::matmul_by(method, &mut out, stride_out, Store { alpha, add }, a, b);
                    let expected: Vec<f64> = before
                        .iter()
                        .zip(&exact)
                        .map(|(&before, exact)| {
                            f64::from(alpha) * exact + if add { f64::from(before) } else { 0.0 }
                        })
                        .collect();
                    let what =
                        format!("{method:?}, {m} x {n} x {k}, transposed {transposed}, add {add}");
                    let found = gather(&out, m, n, stride_out);
                    assert_nmse(&what, &found, &expected, linalg_nmse(method));
                    for (row, start) in out.chunks(stride_out).zip(start.chunks(stride_out)) {
                        assert_eq!(row[n..], start[n..], "{what}: the gap");
                    }
                }
            }
        }
    }
}

/// What `matmul` says about its accuracy, on products of one value with one value, of any usual
/// size.
#[test]
fn matmul_single_products_are_as_accurate_as_stated() {
    let mut noise = Noise(23);
    let mut values = |len| -> Vec<f32> {
        (0..len).map(|_| noise.signed() * 10f32.powi((noise.next() % 16) as i32 - 8)).collect()
    };
    let (m, n) = (513, 511);
    let (a, b) = (values(m), values(n));
    for (method, largest, root_mean_square) in
        Method::all().into_iter().map(|method| match method {
            Method::Bf16(unit) => match unit.precision() {
                Precision::Fine => (method, 2f64.powi(-15), 2f64.powf(-17.5)),
                Precision::Coarse => (method, 2f64.powi(-7), 2f64.powf(-8.7)),
            },
            Method::Faer => (method, 2f64.powi(-24), 2f64.powi(-25)),
        })
    {
        let mut out = vec![f32::NAN; m * n];
        linalg::matmul_by(
            method,
            &mut out,
            n,
            Store::REPLACE,
            Mat::new(&a, m, 1),
            Mat::new(&b, 1, n),
        );
        let errors: Vec<f64> = product(&a, &widened(&b), 1)
            .iter()
            .zip(&out)
            .map(|(expected, &found)| (f64::from(found) / expected - 1.0).abs())
            .collect();
        let max = errors.iter().copied().fold(0.0, f64::max);
        let mean = (errors.iter().map(|error| error * error).sum::<f64>() / (m * n) as f64).sqrt();
        println!(
            "{method:?}: 2^{:.2} at most, 2^{:.2} in root mean square",
            max.log2(),
            mean.log2()
        );
        assert!(max <= largest && mean <= root_mean_square, "{method:?}: {max:e}, {mean:e}");
    }
}

/// Both factors transposed, as in a gram.
#[test]
fn matmul_with_a_transposed_left_factor_agrees() {
    let mut noise = Noise(21);
    for [m, n, k] in SHAPES {
        let (a, b) = (noise.vector(k * m, 1.0), noise.vector(n * k, 1.0));
        let a_rows: Vec<f32> = (0..m * k).map(|at| a[at % k * m + at / k]).collect();
        let expected = product(&a_rows, &widened(&b), k);
        for method in Method::all() {
            let mut out = vec![f32::NAN; m * n];
            let (a, b) = (Mat::new(&a, k, m).transposed(), Mat::new(&b, n, k).transposed());
            linalg::matmul_by(method, &mut out, n, Store::REPLACE, a, b);
            let what = format!("{method:?}, {m} x {n} x {k}");
            assert_nmse(&what, &out, &expected, linalg_nmse(method));
        }
    }
}

#[test]
fn matmul_of_nothing_gives_zeros() {
    for method in Method::all() {
        for [m, n, k] in [[0, 0, 0], [0, 3, 2], [3, 0, 2], [40, 33, 0]] {
            let (a, b) = (vec![1.0; m * k], vec![1.0; k * n]);
            for transposed in [true, false] {
                for (store, expected) in [(Store::REPLACE, 0.0), (Store::ADD, 7.0)] {
                    let mut out = vec![7.0; m * n];
                    let (a, b) = match transposed {
                        true => (Mat::new(&a, k, m).transposed(), Mat::new(&b, n, k).transposed()),
                        false => (Mat::new(&a, m, k), Mat::new(&b, k, n)),
                    };
                    linalg::matmul_by(method, &mut out, n, store, a, b);
                    assert_eq!(out, vec![expected; m * n], "{method:?}, {m} x {n} x {k}");
                }
            }
        }
    }
}

/// In the row of the product, or its column, and nowhere else.
#[test]
fn matmul_what_is_not_finite_stays_so() {
    let (m, n, k) = (40, 37, 50);
    let finite = Noise(22).vector(m * k + k * n, 1.0);
    let (row, col, inner) = (35, 3, 41);
    for method in Method::all() {
        for value in
            [f32::NAN, -f32::NAN, f32::from_bits(0x7fff_ffff), f32::INFINITY, f32::NEG_INFINITY]
        {
            for in_left in [true, false] {
                let (mut a, mut b) = (finite[..m * k].to_vec(), finite[m * k..].to_vec());
                match in_left {
                    true => a[row * k + inner] = value,
                    false => b[inner * n + col] = value,
                }
                let mut out = vec![0.0; m * n];
                let (a, b) = (Mat::new(&a, m, k), Mat::new(&b, k, n));
                linalg::matmul_by(method, &mut out, n, Store::REPLACE, a, b);
                for (at, found) in out.iter().enumerate() {
                    let is_hit = if in_left { at / n == row } else { at % n == col };
                    assert_eq!(found.is_finite(), !is_hit, "{method:?}, {value}: {at} is {found}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "8 values for 9")]
fn matmul_into_too_short_a_matrix_panics() {
    let a = Mat::new(&[0.0; 9], 3, 3);
    linalg::matmul(Precision::Fine, &mut [0.0; 8], 3, Store::REPLACE, a, a);
}

#[test]
#[should_panic(expected = "8 values for 9")]
fn matmul_with_too_short_a_matrix_panics() {
    let a = Mat::strided(&[0.0; 8], 3, 3, 3);
    linalg::matmul(Precision::Fine, &mut [0.0; 9], 3, Store::REPLACE, a, a);
}
