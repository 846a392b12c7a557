//! How fast the CPU's kernels are, next to a plain read of memory.
//!
//! `cargo bench -p slim-kernels --bench kernels [-- THREADS [MEBIBYTES [NAME]]]`: kernels whose
//! name contains NAME. Layers and caches come from memory, as those of a model do: copies, more
//! than the processor's caches hold, take turns. With few mebibytes they come from a cache.
//!
//! What counts for one token is the share of a plain read, for many that of the processor's peak in
//! 8-bit products, which on a shared machine only measurements in turn give. Benchmark harnesses
//! measure one function after the other and print no ratios: hence no divan or criterion.

mod peak;

use std::{hint::black_box, time::Instant};

use rayon::prelude::*;
use slim_formats::{
    DType, DenseTensor, Layout, Weight,
    slim::{BitWidth, LayerLayout, PackedLayer, ScaleCoding, TILE_ROWS},
};
use slim_kernels::{
    AttentionCall, AttentionShape, Backend, Cpu, KvCache, KvType,
    matvec::{Method, dense_by, matvec_by},
};

/// Mebibytes of all copies that a kernel reads.
const TOTAL: usize = 768;
/// Measurements, of which the median counts.
const PASSES: usize = 5;
const SHAPES: [(usize, usize); 2] = [(1536, 576), (4096, 4096)];
const TWO_LEVEL: ScaleCoding = ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 4 };
const TRELLIS: ScaleCoding = ScaleCoding::Trellis { sub_group: 32 };
/// Columns of a group, as files have them by default.
const GROUP_SIZE: usize = 64;
/// Columns in a block of ggml's K types.
const BLOCK: usize = 256;
const GGML_TYPES: [DType; 10] = [
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Q2_K,
    DType::Q3_K,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
];
/// Tokens of a prefill, and positions of a cache.
const TOKENS: usize = 512;

fn main() {
    // `cargo bench` adds an option of its own.
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let mut number = || arguments.next().map(|text| text.parse::<usize>().expect("a number"));
    let all_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = number().map_or_else(|| vec![1, all_threads], |threads| vec![threads]);
    let total_bytes = number().unwrap_or(TOTAL) << 20;
    let name = arguments.next().unwrap_or_default();
    for threads in threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| measure_all(&Machine::new(total_bytes, &name)));
    }
}

fn measure_all(machine: &Machine) {
    println!("{} threads, {} MiB", rayon::current_num_threads(), machine.bytes() >> 20);
    println!("{:<44} time/us  G mul-add/s      MB    GB/s  of a plain read  of the peak", "kernel");
    for (rows, cols) in SHAPES {
        for coding in [TWO_LEVEL, TRELLIS] {
            for bits in 1..=8 {
                measure_matvec(machine, [rows, cols], coding, bits);
            }
        }
        for dtype in GGML_TYPES {
            measure_dense(machine, rows, cols, dtype);
        }
    }
    for (rows, cols) in SHAPES {
        for m in [2, 4, 8, 64, TOKENS] {
            for bits in [2, 3, 4, 8] {
                measure_matmul(machine, [m, rows, cols], bits);
            }
        }
    }
    for m in [1, TOKENS] {
        measure_attention(machine, m);
    }
    measure_rms_norm(machine);
}

/// One token times a packed layer, in each way that this machine has.
fn measure_matvec(machine: &Machine, [rows, cols]: [usize; 2], coding: ScaleCoding, bits: u8) {
    let kind = if coding == TRELLIS { ", trellis" } else { "" };
    let layer = || layer(rows, cols, coding, bits);
    let bytes = layer_bytes(rows, cols, coding, bits);
    let (x, mut out) = (waves(cols), vec![0.0; rows]);
    for method in Method::all() {
        let name = format!("matvec {rows} x {cols}, {bits} bits{kind}, {method:?}");
        machine.measure(&name, rows * cols, bytes, layer, |layer| {
            matvec_by(method, layer.view(), &x, black_box(&mut out));
        });
    }
}

/// One token times codes of one of ggml's types, whatever they are worth.
fn measure_dense(machine: &Machine, rows: usize, cols: usize, dtype: DType) {
    let cols = cols / BLOCK * BLOCK;
    let len = dtype.size_in_bytes((rows * cols) as u64).expect("whole blocks") as usize;
    let (x, mut out) = (waves(cols), vec![0.0; rows]);
    for method in Method::all() {
        let name = format!("matvec {rows} x {cols}, {dtype:?}, {method:?}");
        machine.measure(
            &name,
            rows * cols,
            len,
            || vec![0x31; len],
            |bytes| {
                let tensor = DenseTensor {
                    dtype,
                    rows,
                    cols,
                    bytes,
                    layout: Layout::AsStored,
                    scales: None,
                };
                dense_by(method, &tensor, &x, black_box(&mut out)).expect("a type of weights");
            },
        );
    }
}

/// Many tokens times a packed layer.
fn measure_matmul(machine: &Machine, [m, rows, cols]: [usize; 3], bits: u8) {
    let (x, mut out) = (waves(m * cols), vec![0.0; m * rows]);
    let bytes = layer_bytes(rows, cols, TWO_LEVEL, bits);
    let name = format!("matmul {m} x {rows} x {cols}, {bits} bits");
    let layer = || layer(rows, cols, TWO_LEVEL, bits);
    machine.measure(&name, m * rows * cols, bytes, layer, |layer| {
        let weight = Weight::Packed(layer.view());
        Cpu.matmul(weight, &x, m, black_box(&mut out)).expect("lengths that fit");
    });
}

/// The queries of the last `m` tokens and a cache of all.
fn measure_attention(machine: &Machine, m: usize) {
    let (heads, kv_heads, head_dim) = (9, 3, 64);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let shape = AttentionShape {
        heads,
        kv_heads,
        head_dim,
        start: TOKENS - m,
        m,
        window: None,
        scale,
        softcap: None,
    };
    let seen: usize = (0..m).map(|t| shape.visible(t).len()).sum();
    let (q, mut out) = (waves(m * heads * head_dim), vec![0.0; m * heads * head_dim]);
    let tokens = waves(TOKENS * kv_heads * head_dim);
    let bytes = TOKENS * kv_heads * KvType::F16.row_bytes(head_dim) + size_of_val(&q[..]);
    let cache = || {
        let mut cache = KvCache::new(KvType::F16, kv_heads, TOKENS, head_dim);
        cache.store(&tokens, &tokens, 0);
        cache
    };
    let name = format!("attention {m} of {TOKENS} tokens, {heads} heads");
    machine.measure(&name, 2 * seen * heads * head_dim, bytes, cache, |kv| {
        let call = AttentionCall { shape, q: &q, kv, sinks: None, out: black_box(&mut out) };
        Cpu.attention(&mut [call]).expect("lengths that fit");
    });
}

fn measure_rms_norm(machine: &Machine) {
    let cols = 576;
    let (x, weight, mut out) = (waves(TOKENS * cols), waves(cols), vec![0.0; TOKENS * cols]);
    let bytes = size_of_val(&x[..]);
    let name = format!("rms_norm {TOKENS} x {cols}");
    machine.measure(
        &name,
        2 * TOKENS * cols,
        bytes,
        || x.clone(),
        |x| {
            Cpu.rms_norm(x, &weight, 1e-5, black_box(&mut out));
        },
    );
}

/// What a plain read reads, and which kernels are measured beside it.
struct Machine<'a> {
    words: Vec<u64>,
    /// What the names of chosen kernels contain.
    name: &'a str,
    /// Multiply-adds of 8-bit numbers a second, if they have been measured.
    peak: Option<f64>,
}

impl<'a> Machine<'a> {
    fn new(bytes: usize, name: &'a str) -> Self {
        Self { words: vec![1; bytes / 8], name, peak: peak::multiply_adds_per_second() }
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.words[..])
    }

    fn read(&self) {
        let sum = |part: &[u64]| part.iter().fold(0, |sum: u64, word| sum ^ word);
        black_box(self.words.par_chunks(1 << 16).map(sum).reduce(|| 0, |a, b| a ^ b));
    }

    /// Prints what a kernel takes for one of as many copies of an input as fit, that is for so many
    /// multiplications and bytes read.
    fn measure<T: Clone>(
        &self,
        name: &str,
        multiply_adds: usize,
        bytes: usize,
        input: impl FnOnce() -> T,
        mut kernel: impl FnMut(&T),
    ) {
        // What takes long does not wait for memory.
        const ENOUGH: usize = 4_000_000_000;
        if !name.contains(self.name) {
            return;
        }
        let copies = (self.bytes() / bytes).min(ENOUGH / multiply_adds).max(1);
        let inputs = vec![input(); copies];
        let (mut seconds, mut shares) = (Vec::new(), Vec::new());
        for _ in 0..PASSES {
            let read = seconds_of(|| self.read()) * bytes as f64 / self.bytes() as f64;
            let pass = seconds_of(|| inputs.iter().for_each(&mut kernel)) / inputs.len() as f64;
            seconds.push(pass);
            shares.push(read / pass);
        }
        let seconds = median(seconds);
        let (megabytes, giga_multiply_adds) = (bytes as f64 / 1e6, multiply_adds as f64 / 1e9);
        let of_peak = self.peak.map_or(f64::NAN, |peak| 1e9 * giga_multiply_adds / seconds / peak);
        println!(
            "{name:<42} {:>9.1} {:>12.1} {megabytes:>7.2} {:>7.2} {:>16.2} {of_peak:>12.2}",
            seconds * 1e6,
            giga_multiply_adds / seconds,
            megabytes / 1e3 / seconds,
            median(shares)
        );
    }
}

fn seconds_of(mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn waves(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32).sin()).collect()
}

/// Where every group has as many bits.
fn layout(rows: usize, cols: usize, coding: ScaleCoding, bits: u8) -> LayerLayout {
    let widths = vec![BitWidth::new(bits).expect("1 to 8 bits"); cols.div_ceil(GROUP_SIZE)];
    LayerLayout::new(rows, cols, GROUP_SIZE, coding, &widths).expect("a valid layer")
}

fn layer_bytes(rows: usize, cols: usize, coding: ScaleCoding, bits: u8) -> usize {
    layout(rows, cols, coding, bits).stored_bits() as usize / 8
}

/// A layer of codes without a pattern.
fn layer(rows: usize, cols: usize, coding: ScaleCoding, bits: u8) -> PackedLayer {
    let layout = layout(rows, cols, coding, bits);
    let (groups, max_code) = (layout.groups().len(), layout.groups()[0].bit_width.max_code());
    let mut packed = PackedLayer::zeroed(layout);
    let mut noise = 1u64;
    let mut column = |max: u8| {
        std::array::from_fn::<u8, TILE_ROWS, _>(|_| {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (noise >> 56) as u8 & max
        })
    };
    for mut tile in packed.tiles_mut() {
        for group in 0..groups {
            let cols = GROUP_SIZE.min(cols - group * GROUP_SIZE);
            let codes: Vec<_> = (0..cols).map(|_| column(max_code)).collect();
            tile.set_codes(group, &codes);
            for sub_group in 0..cols.div_ceil(32) {
                match coding {
                    TRELLIS => tile.set_trellis_scales(group, sub_group, &column(15)),
                    _ => tile.set_two_level(group, sub_group, &column(15), &column(15)),
                }
            }
        }
    }
    packed
}
