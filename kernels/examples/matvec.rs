//! How fast one token times a packed layer is, in each way that this machine has, next to a plain read of as many bytes.
//!
//! `cargo run --release -p slim-kernels --example matvec [-- THREADS [MEBIBYTES]]`. The layers come from memory, as those of a model
//! do: copies of one layer, more than the caches hold, take turns. With few mebibytes they come from a cache.

use std::{hint::black_box, time::Instant};

use rayon::prelude::*;
use slim_formats::slim::{BitWidth, LayerLayout, PackedLayer, ScaleCoding, TILE_ROWS};
use slim_kernels::matvec::{Method, matvec_by};

/// Mebibytes of all copies of a layer.
const TOTAL: usize = 768;
/// Passes over all copies, of which the median counts.
const PASSES: usize = 5;
const SHAPES: [(usize, usize); 4] = [(576, 576), (1536, 576), (576, 1536), (4096, 4096)];
const WIDTHS: [u8; 4] = [2, 3, 4, 8];

fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse().expect("a number"));
    let all_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = arguments.next().map_or_else(|| vec![1, all_threads], |threads| vec![threads]);
    let total_bytes = arguments.next().unwrap_or(TOTAL) << 20;
    for threads in threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| measure_all(total_bytes));
    }
}

fn measure_all(total_bytes: usize) {
    let words = vec![1u64; total_bytes / 8];
    println!("{} threads, {} MiB", rayon::current_num_threads(), total_bytes >> 20);
    println!("rows x cols   bits  method          time/us   MB      GB/s   of a plain read");
    for (rows, cols) in SHAPES {
        for bits in WIDTHS {
            let layer = layer(rows, cols, bits);
            let bytes = layer.layout().stored_bits() as usize / 8;
            let copies = vec![layer; (total_bytes / bytes).max(1)];
            let x: Vec<f32> = (0..cols).map(|col| (col as f32).sin()).collect();
            for method in Method::all() {
                let read = bytes_per_s(size_of_val(&words[..]), || {
                    let sum = |part: &[u64]| part.iter().fold(0, |sum: u64, word| sum ^ word);
                    black_box(words.par_chunks(1 << 16).map(sum).reduce(|| 0, |a, b| a ^ b));
                });
                let mut out = vec![0.0; rows];
                let found = bytes_per_s(copies.len() * bytes, || {
                    for layer in &copies {
                        matvec_by(method, layer.view(), &x, black_box(&mut out));
                    }
                });
                println!(
                    "{:<13} {bits}     {:<14} {:>8.1} {:>6.2} {:>8.2}  {:>5.2}",
                    format!("{rows} x {cols}"),
                    format!("{method:?}"),
                    bytes as f64 / found * 1e6,
                    bytes as f64 / 1e6,
                    found / 1e9,
                    found / read
                );
            }
        }
    }
}

/// The median speed of `pass`, which reads `bytes`.
fn bytes_per_s(bytes: usize, mut pass: impl FnMut()) -> f64 {
    pass();
    let mut seconds: Vec<f64> = (0..PASSES)
        .map(|_| {
            let start = Instant::now();
            pass();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    bytes as f64 / seconds[PASSES / 2]
}

/// A layer of codes without a pattern.
fn layer(rows: usize, cols: usize, bits: u8) -> PackedLayer {
    const GROUP_SIZE: usize = 128;
    let coding = ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 4 };
    let width = BitWidth::new(bits).expect("1 to 8 bits");
    let widths = vec![width; cols.div_ceil(GROUP_SIZE)];
    let layout = LayerLayout::new(rows, cols, GROUP_SIZE, coding, &widths).expect("a valid layer");
    let mut packed = PackedLayer::zeroed(layout);
    let mut noise = 1u64;
    let mut column = |max: u8| {
        std::array::from_fn::<u8, TILE_ROWS, _>(|_| {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (noise >> 56) as u8 & max
        })
    };
    for mut tile in packed.tiles_mut() {
        for group in 0..widths.len() {
            let cols = GROUP_SIZE.min(cols - group * GROUP_SIZE);
            let codes: Vec<_> = (0..cols).map(|_| column(width.max_code())).collect();
            tile.set_codes(group, &codes);
            for sub_group in 0..cols.div_ceil(32) {
                tile.set_two_level(group, sub_group, &column(15), &column(15));
            }
        }
    }
    packed
}
