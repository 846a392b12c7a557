use half::f16;
use slim_formats::slim::{BitWidth, CodeColumn, PackedLayer, ScaleCoding};

use super::*;

const TWO_LEVEL: ScaleCoding = ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 4 };

/// A layer, and what each of its weights is worth by the formulas of section 4 of `docs/format.md`.
struct Layer {
    packed: PackedLayer,
    /// `[rows, cols]`.
    weights: Vec<f64>,
}

/// A number without a pattern, the same on every run.
fn noise(seed: usize, limit: usize) -> usize {
    (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % limit
}

/// Codes, scale codes and minimum codes without a pattern; some scale codes are 0.
fn layer(rows: usize, cols: usize, group_size: usize, coding: ScaleCoding, bits: &[u8]) -> Layer {
    let widths: Vec<_> = bits.iter().map(|&bits| BitWidth::new(bits).unwrap()).collect();
    let layout = LayerLayout::new(rows, cols, group_size, coding, &widths).unwrap();
    let mut packed = PackedLayer::zeroed(layout.clone());
    let mut weights = vec![0.0; layout.tiles() * TILE_ROWS * cols];
    for mut tile in packed.tiles_mut() {
        let first_row = tile.index() * TILE_ROWS;
        let lane = |value: &dyn Fn(usize) -> usize| -> CodeColumn {
            std::array::from_fn(|lane| value(first_row + lane) as u8)
        };
        let half_lane = |value: &dyn Fn(usize) -> usize, unit: f32| -> [f16; TILE_ROWS] {
            std::array::from_fn(|lane| f16::from_f32(value(first_row + lane) as f32 * unit))
        };
        let d = half_lane(&|row| 1 + noise(row, 200), 1e-4);
        let m = half_lane(&|row| 1 + noise(row + 7, 300), 2e-4);
        if coding != ScaleCoding::Paper {
            tile.set_row_scales(&d, &m);
        }
        for (index, group) in layout.groups().iter().enumerate() {
            let limit = 1 << group.bit_width.bits();
            let codes: Vec<CodeColumn> =
                group.cols.clone().map(|col| lane(&|row| noise(row * cols + col, limit))).collect();
            tile.set_codes(index, &codes);
            for (run, run_cols) in group.runs(coding).enumerate() {
                let seed = index * 100 + run;
                // The factor and the offset of each row of the run.
                let (factor, offset): (Vec<f64>, Vec<f64>) = match (coding, limit) {
                    (ScaleCoding::TwoLevel { scale_bits, .. }, _) => {
                        let limit = 1 << scale_bits;
                        let s = lane(&|row| noise(row + seed, limit));
                        let z = lane(&|row| noise(row + seed + 50, limit));
                        tile.set_two_level(index, run, &s, &z);
                        let products = |row: &[f16; TILE_ROWS], codes: CodeColumn, sign: f64| {
                            row.iter()
                                .zip(codes)
                                .map(|(x, c)| sign * x.to_f64() * f64::from(c))
                                .collect()
                        };
                        (products(&d, s, 1.0), products(&m, z, -1.0))
                    }
                    (ScaleCoding::Trellis { .. }, _) => unreachable!("no affine codes"),
                    (ScaleCoding::Paper, 2) => {
                        let scale = half_lane(&|row| noise(row + seed, 90), 1e-3);
                        let mean = half_lane(&|row| noise(row + seed + 50, 90), 1e-3);
                        tile.set_binary(index, &scale, &mean);
                        let pairs = scale
                            .iter()
                            .zip(&mean)
                            .map(|(s, mean)| (2.0 * s.to_f64(), mean.to_f64() - s.to_f64()));
                        pairs.unzip()
                    }
                    (ScaleCoding::Paper, _) => {
                        let scale = half_lane(&|row| noise(row + seed, 90), 1e-3);
                        let zero = lane(&|row| noise(row + seed + 50, limit));
                        tile.set_affine(index, &scale, &zero);
                        let pairs = scale
                            .iter()
                            .zip(zero)
                            .map(|(s, zero)| (s.to_f64(), -s.to_f64() * f64::from(zero)));
                        pairs.unzip()
                    }
                };
                for col in run_cols {
                    let codes = codes[col - group.cols.start];
                    for lane in 0..TILE_ROWS {
                        weights[(first_row + lane) * cols + col] =
                            factor[lane] * f64::from(codes[lane]) + offset[lane];
                    }
                }
            }
        }
    }
    weights.truncate(rows * cols);
    Layer { packed, weights }
}

/// What `MatMulNBits` takes the weights for, as its documentation says, and the offsets added.
fn worth(blocks: &Blocks, rows: usize, cols: usize) -> Vec<f64> {
    let bits = usize::from(blocks.bits);
    let middle = (1 << (bits - 1)) as f64;
    let value = |index: usize| {
        let (row, col) = (index / cols, index % cols);
        let byte = blocks.codes[(row * blocks.row_blocks * blocks.block + col) * bits / 8];
        let code = f64::from(byte >> (col * bits % 8) & (u8::MAX >> (8 - bits)));
        let place = row * blocks.row_blocks + col / blocks.block;
        f64::from(blocks.scales[place]) * (code - middle) + f64::from(blocks.offsets[place])
    };
    (0..rows * cols).map(value).collect()
}

#[track_caller]
fn check(layer: &Layer, bits: u8, block: usize) {
    check_bands(layer.packed.view().into(), &layer.weights, bits, block);
}

#[track_caller]
fn check_bands(bands: Bands<'_>, weights: &[f64], bits: u8, block: usize) {
    let blocks = Blocks::new(bands, 2);
    assert_eq!((blocks.bits, blocks.block), (bits, block));
    let (rows, cols) = bands.shape();
    let found = worth(&blocks, rows, cols);
    assert_eq!(found.len(), weights.len());
    let largest = weights.iter().fold(0.0_f64, |largest, w| largest.max(w.abs()));
    for (index, (found, expected)) in found.iter().zip(weights).enumerate() {
        let difference = (found - expected).abs();
        assert!(
            difference <= 4.0 * f64::from(f32::EPSILON) * largest,
            "weight {index}: {found}, {expected}"
        );
    }
}

#[test]
fn blocks_of_every_width_are_worth_what_the_layer_is() {
    for width in 1..=8_u8 {
        let bits = [2, 2, 4, 4, 8, 8, 8, 8][usize::from(width) - 1];
        let widths = [width; 3];
        check(&layer(32, 192, 64, TWO_LEVEL, &widths), bits, 32);
        let six_bits = ScaleCoding::TwoLevel { sub_group: 64, scale_bits: 6 };
        check(&layer(32, 192, 64, six_bits, &widths), bits, 64);
        check(&layer(32, 192, 64, ScaleCoding::Paper, &widths), bits, 64);
    }
}

#[test]
fn blocks_of_bands_are_worth_what_the_bands_are() {
    let bands = [[1, 2, 1], [2, 4, 3], [1, 1, 1]];
    let rows = [32, 16, 21];
    let layers = rows.into_iter().zip(&bands);
    let layers: Vec<_> =
        layers.map(|(rows, widths)| layer(rows, 192, 64, TWO_LEVEL, widths)).collect();
    let (packed, weights): (Vec<_>, Vec<_>) =
        layers.into_iter().map(|layer| (layer.packed, layer.weights)).unzip();
    check_bands(Bands::new(&packed), &weights.concat(), 4, 32);
}

#[test]
fn blocks_of_mixed_widths_take_the_widest() {
    check(&layer(16, 192, 64, TWO_LEVEL, &[1, 3, 2]), 4, 32);
    check(&layer(16, 192, 64, ScaleCoding::Paper, &[1, 2, 5]), 8, 64);
}

#[test]
fn blocks_of_ragged_shapes_are_worth_what_the_layer_is() {
    // Rows that do not fill a tile; a last group, and a last sub-group, that is shorter.
    check(&layer(5, 160, 64, TWO_LEVEL, &[3, 4, 2]), 4, 32);
    check(&layer(17, 80, 64, TWO_LEVEL, &[1, 1]), 4, 16);
    check(&layer(17, 80, 48, TWO_LEVEL, &[2, 7]), 8, 16);
    check(&layer(33, 576, 128, ScaleCoding::Paper, &[2, 2, 1, 2, 2]), 2, 64);
    check(&layer(16, 1024, 512, ScaleCoding::Paper, &[2, 2]), 2, 256);
    // Columns that do not fill a block.
    check(&layer(17, 172, 64, TWO_LEVEL, &[3, 1, 2]), 4, 16);
    check(&layer(16, 100, 128, ScaleCoding::Paper, &[7]), 8, 16);
    check(&layer(3, 1, 16, TWO_LEVEL, &[1]), 4, 16);
}

#[test]
fn blocks_of_a_constant_run_are_its_offset() {
    let mut layer = layer(16, 32, 32, TWO_LEVEL, &[4]);
    let d = [f16::ONE; TILE_ROWS];
    let m = [f16::from_f32(0.25); TILE_ROWS];
    for mut tile in layer.packed.tiles_mut() {
        tile.set_row_scales(&d, &m);
        tile.set_two_level(0, 0, &[0; TILE_ROWS], &[3; TILE_ROWS]);
    }
    layer.weights.fill(-0.75);
    check(&layer, 4, 32);
}

#[test]
fn blocks_are_at_least_as_wide_as_asked() {
    let layer = layer(16, 32, 32, TWO_LEVEL, &[3]);
    let blocks = Blocks::new(layer.packed.view().into(), 8);
    assert_eq!(blocks.bits, 8);
    let narrow = Blocks::new(layer.packed.view().into(), 2);
    assert_eq!(worth(&blocks, 16, 32), worth(&narrow, 16, 32));
}
