//! Measurements: products, attention, and a whole model.

use std::{sync::Arc, time::Instant};

use anyhow::Result;
use slim_formats::{DType, Features, Generation, ModelConfig, Rope, slim::ScaleCoding};
use slim_kernels::{
    KvType, RopeAngles,
    cuda::{
        Attention, Buffer, Device, KvCache, Matrix, Operands, Position, RopeTables, Rotation,
        Scores, Tokens,
    },
    weight,
};
use slim_runtime::{CudaSettings, Model, Sampler, SamplerSettings, Turn};

use crate::{
    cublas::Cublas,
    report::{Bound, Report},
    source::{RandomModel, Storage},
    weights::{Fill, HostWeight, LayerSpec, TRELLIS, TWO_LEVEL, half_vector, vector},
};

/// Widths of the groups of a layer, in turn: 2 and 3 bits per weight.
const MIXES: [(&str, &[u8]); 2] = [("1/2/3", &[1, 2, 3]), ("2/3/4", &[2, 3, 4])];
const WIDTHS: [(&str, &[u8]); 4] = [("1", &[1]), ("2", &[2]), ("3", &[3]), ("4", &[4])];
const GROUP_SIZE: usize = 128;

/// The bounds of issue 3.
const MIN_COPY_SHARE: f64 = 75.0;
const MAX_BATCH_8_TIME: f64 = 1.5;
const MIN_CUBLAS_SHARE: f64 = 50.0;
const MIN_DECODE_RATE: f64 = 600.0;
const MIN_DECODE_GAIN: f64 = 5.0;
const EXTRA_BYTES: u64 = 400_000_000;

/// How large everything is.
pub struct Scale {
    hidden: usize,
    ffn: usize,
    heads: usize,
    head_dim: usize,
    vocab: usize,
    blocks: usize,
    /// Tokens of a prefill.
    prefill: usize,
    /// Tokens before those that are decoded one by one, and how many those are.
    context: usize,
    decoded: usize,
    /// Positions of the attention measurements.
    contexts: [usize; 2],
    /// Every measurement reads so many bytes before it reads one again: more than a cache holds.
    rotated_bytes: u64,
    copied_bytes: usize,
    runs: usize,
}

impl Scale {
    /// LLaMA-7B.
    pub const FULL: Self = Self {
        hidden: 4096,
        ffn: 11008,
        heads: 32,
        head_dim: 128,
        vocab: 32000,
        blocks: 32,
        prefill: 512,
        context: 128,
        decoded: 128,
        contexts: [128, 2048],
        rotated_bytes: 256 << 20,
        copied_bytes: 1 << 30,
        runs: 21,
    };

    /// Proves that the program runs.
    pub const SMOKE: Self = Self {
        hidden: 128,
        ffn: 336,
        heads: 4,
        head_dim: 32,
        vocab: 256,
        blocks: 3,
        prefill: 24,
        context: 12,
        decoded: 3,
        contexts: [12, 70],
        rotated_bytes: 0,
        copied_bytes: 1 << 16,
        runs: 2,
    };

    /// The shapes of the linear layers: rows and columns.
    fn shapes(&self) -> [[usize; 2]; 3] {
        let (hidden, ffn) = (self.hidden, self.ffn);
        [[hidden, hidden], [ffn, hidden], [hidden, ffn]]
    }

    /// How many copies of so many bytes are used by turns.
    fn copies(&self, bytes: u64) -> usize {
        self.rotated_bytes.div_ceil(bytes).max(2) as usize
    }

    fn model(&self) -> ModelConfig {
        ModelConfig {
            family: &slim_formats::arch::Llama,
            name: None,
            block_count: self.blocks,
            hidden_size: self.hidden,
            ffn_size: self.ffn,
            head_count: self.heads,
            kv_head_count: self.heads,
            head_dim: self.head_dim,
            vocab_size: self.vocab,
            context_length: 2048,
            norm_epsilon: 1e-5,
            rope: Rope::new(1e4, vec![1.0; self.head_dim / 2]),
            features: Features::default(),
            sliding_window: None,
            tied_embeddings: false,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            add_bos: false,
            generation: Generation::default(),
        }
    }
}

/// Runs every measurement.
pub fn run(device: &Arc<Device>, scale: &Scale, report: &mut Report) -> Result<()> {
    let bandwidth = device.copy_bandwidth(scale.copied_bytes)?;
    report.fact("device copy", format!("{:.0} GB/s read and written", bandwidth / 1e9));
    few_tokens(device, scale, bandwidth, report)?;
    many_tokens(device, scale, report)?;
    for context in scale.contexts {
        attention(device, scale, context, bandwidth, report)?;
    }
    whole_model(device, scale, report)
}

/// Products with one token alone: of every mix and shape, and of square layers with one width, of
/// both codings.
pub fn one_token(device: &Arc<Device>, scale: &Scale, report: &mut Report) -> Result<()> {
    let bandwidth = device.copy_bandwidth(scale.copied_bytes)?;
    report.fact("device copy", format!("{:.0} GB/s read and written", bandwidth / 1e9));
    let square = scale.shapes()[0];
    let mixes = MIXES.iter().flat_map(|&mix| scale.shapes().map(|shape| (mix, shape)));
    let layers: Vec<_> = mixes.chain(WIDTHS.map(|width| (width, square))).collect();
    for (coding, kind) in [(TWO_LEVEL, ""), (TRELLIS, " trellis")] {
        for &((mix, widths), shape) in &layers {
            let w = packed(shape, coding, widths);
            let [seconds] = product_seconds(device, scale, &w, [1])?;
            let share = 100.0 * product_bytes(&w, 1) / seconds / bandwidth;
            let found = format!("{:.2} us, {share:.0} % of copy", 1e6 * seconds);
            report.measured(&format!("matvec {} {mix}{kind}", name(shape)), found, None);
        }
    }
    Ok(())
}

/// Products with 1 and 8 tokens.
fn few_tokens(
    device: &Arc<Device>,
    scale: &Scale,
    bandwidth: f64,
    report: &mut Report,
) -> Result<()> {
    let (mut shares, mut slowdowns) = (Vec::new(), Vec::new());
    let mut measure = |kind: &str, shape: [usize; 2], w: &HostWeight| -> Result<(f64, f64)> {
        let [one, eight] = product_seconds(device, scale, w, [1, 8])?;
        let bytes = product_bytes(w, 1);
        let share = 100.0 * bytes / one / bandwidth;
        let found = format!(
            "{:.2} us, {:.2} MB, {share:.0} % of copy; 8: {:.2} us",
            1e6 * one,
            bytes / 1e6,
            1e6 * eight,
        );
        report.measured(&format!("matvec {} {kind}", name(shape)), found, None);
        Ok((share, eight / one))
    };
    for (mix, widths) in MIXES {
        for shape in scale.shapes() {
            let (share, slowdown) = measure(mix, shape, &packed(shape, TWO_LEVEL, widths))?;
            shares.push(share);
            slowdowns.push(slowdown);
        }
    }
    for shape in scale.shapes() {
        let (mix, widths) = MIXES[0];
        measure(&format!("{mix} trellis"), shape, &packed(shape, TRELLIS, widths))?;
    }
    for shape in scale.shapes() {
        measure("fp16", shape, &HostWeight::dense(1, DType::F16, shape, 1.0))?;
    }
    let share = median(shares);
    let bound = Bound::at_least(share, MIN_COPY_SHARE, "%");
    report.measured("matvec, share of copy, median", format!("{share:.1} %"), bound);
    let slowdown = median(slowdowns);
    let bound = Bound::at_most(slowdown, MAX_BATCH_8_TIME, "x");
    report.measured("matvec, 8 tokens against 1, median", format!("{slowdown:.2} x"), bound);
    Ok(())
}

/// Products with the tokens of a prefill.
fn many_tokens(device: &Arc<Device>, scale: &Scale, report: &mut Report) -> Result<()> {
    let cublas = Cublas::find(device)?;
    let tokens = scale.prefill;
    let mut shares = Vec::new();
    for shape in scale.shapes() {
        let [rows, cols] = shape;
        let operations = 2.0 * (rows * cols * tokens) as f64;
        let mut rates = Vec::new();
        for (mix, widths) in MIXES {
            let w = packed(shape, TWO_LEVEL, widths);
            let [seconds] = product_seconds(device, scale, &w, [tokens])?;
            rates.push((mix, operations / seconds));
        }
        let packed_rates = rates.clone();
        let [seconds] =
            product_seconds(device, scale, &packed(shape, TRELLIS, MIXES[0].1), [tokens])?;
        rates.push(("1/2/3 trellis", operations / seconds));
        let dense = HostWeight::dense(1, DType::F16, shape, 1.0);
        let [seconds] = product_seconds(device, scale, &dense, [tokens])?;
        rates.push(("fp16", operations / seconds));
        if let Some(cublas) = &cublas {
            let copies = scale.copies(weight::stored_bytes(dense.view()));
            let theirs = operations / cublas.seconds(shape, tokens, copies, scale.runs)?;
            rates.push(("cuBLAS", theirs));
            shares.extend(packed_rates.into_iter().map(|(_, ours)| 100.0 * ours / theirs));
        }
        let rates: Vec<_> =
            rates.iter().map(|(what, rate)| format!("{what} {:.0}", rate / 1e12)).collect();
        let what = format!("matmul {} x {tokens}, TFLOP/s", name(shape));
        report.measured(&what, rates.join(", "), None);
    }
    if shares.is_empty() {
        report.fact("matmul, share of cuBLAS", "cuBLAS is not on this machine");
        return Ok(());
    }
    let share = median(shares);
    let bound = Bound::at_least(share, MIN_CUBLAS_SHARE, "%");
    report.measured("matmul, share of cuBLAS, median", format!("{share:.0} %"), bound);
    Ok(())
}

fn packed([rows, cols]: [usize; 2], coding: ScaleCoding, widths: &[u8]) -> HostWeight {
    let spec = LayerSpec { rows, cols, group_size: GROUP_SIZE, coding, widths, size: 0.02 };
    spec.fill(1, Fill::Random)
}

/// Median seconds of a product with so many tokens, on copies of the weight by turns.
fn product_seconds<const N: usize>(
    device: &Arc<Device>,
    scale: &Scale,
    w: &HostWeight,
    tokens: [usize; N],
) -> Result<[f64; N]> {
    let (rows, cols) = weight::shape(w.view());
    let copies = (0..scale.copies(weight::stored_bytes(w.view())))
        .map(|_| Matrix::upload(device, w.view()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut seconds = [0.0; N];
    for (seconds, m) in seconds.iter_mut().zip(tokens) {
        let mut x = Operands::zeros(device, m, cols)?;
        x.write(&half_vector(2, m * cols, 1.0), m)?;
        let mut out = Buffer::<f32>::zeros(device, m * rows)?;
        let graph = device.capture(|| {
            copies.iter().try_for_each(|w| device.matmul(&[w], &x, m, &mut [out.view_mut()]))
        })?;
        *seconds = median(device.time(scale.runs, || graph.launch())?) / copies.len() as f64;
    }
    Ok(seconds)
}

/// The bytes that a product must move (`docs/kernels.md`).
fn product_bytes(w: &HostWeight, m: usize) -> f64 {
    let (rows, cols) = weight::shape(w.view());
    (weight::stored_bytes(w.view()) + (m * (2 * cols + 4 * rows)) as u64) as f64
}

/// Attention over `context` positions, of the last one and of a batch of the last ones.
fn attention(
    device: &Arc<Device>,
    scale: &Scale,
    context: usize,
    bandwidth: f64,
    report: &mut Report,
) -> Result<()> {
    let (heads, dim) = (scale.heads, scale.head_dim);
    let width = heads * dim;
    let m = scale.prefill.min(context);
    let angles = RopeAngles::new(dim, 1e4, &vec![1.0; dim / 2], 0, context);
    let tables = RopeTables::upload(device, &angles)?;
    let rotation = Rotation { tables: Some(&tables), ..Rotation::default() };
    let scores = Scores { window: None, scale: 1.0 / (dim as f32).sqrt(), softcap: None };
    let mut position = Position::new(device, context)?;
    let k = Buffer::upload(device, &vector(3, context * width, 1.0))?;
    let v = Buffer::upload(device, &vector(4, context * width, 1.0))?;
    let mut q = Buffer::upload(device, &vector(5, context * width, 1.0))?;
    let (mut one, mut many) = (Vec::new(), Vec::new());
    for (name, kv_type) in [("fp16", KvType::F16), ("q8", KvType::Q8)] {
        let bytes = (context * heads * kv_type.row_bytes(dim)) as u64;
        let mut caches = (0..scale.copies(bytes))
            .map(|_| KvCache::new(device, kv_type, heads, context, dim))
            .collect::<Result<Vec<_>, _>>()?;
        let mut attention = Attention::new(device, heads, &caches[0])?;
        position.set(0)?;
        for cache in &mut caches {
            let tokens = Tokens { position: &position, m: context };
            let kv = [k.view(), v.view()];
            device.rope_store(&attention, &mut q.view_mut(), kv, rotation, tokens, cache)?;
        }
        let mut out = Operands::zeros(device, m, width)?;

        position.set(context - 1)?;
        let graph = device.capture(|| {
            let tokens = Tokens { position: &position, m: 1 };
            caches.iter().try_for_each(|cache| {
                let q = q.view().slice(0..width);
                device.attention(&mut attention, q, scores, cache, tokens, &mut out)
            })
        })?;
        let seconds = median(device.time(scale.runs, || graph.launch())?) / caches.len() as f64;
        let share = 100.0 * bytes as f64 / seconds / bandwidth;
        one.push(format!("{name} {:.2} us, {share:.0} % of copy", 1e6 * seconds));

        position.set(context - m)?;
        let tokens = Tokens { position: &position, m };
        let seconds = device.time(scale.runs, || {
            caches.iter().try_for_each(|cache| {
                device.attention(&mut attention, q.view(), scores, cache, tokens, &mut out)
            })
        })?;
        let seconds = median(seconds) / caches.len() as f64;
        let seen: usize = (context - m + 1..=context).sum();
        let rate = 4.0 * (seen * width) as f64 / seconds / 1e12;
        many.push(format!("{name} {:.1} us, {rate:.0} TFLOP/s", 1e6 * seconds));
    }
    report.measured(&format!("attention, decode at {context}"), one.join("; "), None);
    report.measured(&format!("attention, {m} tokens up to {context}"), many.join("; "), None);
    Ok(())
}

/// What a model does on the device.
struct Figures {
    /// Tokens per second of a prompt.
    prefill: f64,
    /// Tokens per second, one by one.
    decode: f64,
    /// Bytes of device memory.
    bytes: u64,
}

/// A model of the shape of LLaMA-7B, packed and in fp16.
fn whole_model(device: &Arc<Device>, scale: &Scale, report: &mut Report) -> Result<()> {
    let (prefill, context) = (scale.prefill, scale.context);
    let capacity = prefill.max(context + scale.decoded);
    let kv_bytes = KvType::F16.row_bytes(scale.head_dim) * scale.heads * scale.blocks * capacity;
    let mut rates = Vec::new();
    for (name, storage) in [("fp16", Storage::Half), (MIXES[0].0, Storage::Packed(MIXES[0].1))] {
        let start = Instant::now();
        let source = Arc::new(RandomModel::new(scale.model(), 1, GROUP_SIZE, storage));
        let filled = start.elapsed();
        let Figures { prefill: prefill_rate, decode, bytes } =
            measure_model(device, scale, Arc::clone(&source), capacity)?;
        println!("    weights made in {filled:.1?}, all in {:.1?}", start.elapsed());
        let found = format!("{prefill_rate:.0} tokens/s");
        report.measured(&format!("model {name}: prefill of {prefill}"), found, None);
        let bound = Bound::at_least(decode, MIN_DECODE_RATE, "tokens/s");
        let bound = bound.filter(|_| matches!(storage, Storage::Packed(_)));
        let found = format!("{decode:.1} tokens/s");
        report.measured(&format!("model {name}: decode at {context}"), found, bound);
        let needed = source.stored_bytes() + kv_bytes as u64;
        let found = format!(
            "{:.2} GB; weights {:.2} + cache {:.2}",
            bytes as f64 / 1e9,
            source.stored_bytes() as f64 / 1e9,
            kv_bytes as f64 / 1e9,
        );
        let limit = needed + EXTRA_BYTES;
        let bound =
            Bound { text: format!("<= {:.2} GB", limit as f64 / 1e9), is_kept: bytes <= limit };
        report.measured(&format!("model {name}: device memory"), found, Some(bound));
        rates.push(decode);
    }
    let gain = rates[1] / rates[0];
    let bound = Bound::at_least(gain, MIN_DECODE_GAIN, "x");
    report.measured("model: decode, packed against fp16", format!("{gain:.2} x"), bound);
    Ok(())
}

/// As a user runs it: with the copy of each token to the host.
fn measure_model(
    device: &Arc<Device>,
    scale: &Scale,
    source: Arc<RandomModel>,
    capacity: usize,
) -> Result<Figures> {
    device.synchronize()?;
    let free = device.free_memory()?;
    let settings = CudaSettings {
        devices: vec![(0, Arc::clone(device))],
        blocks: Some(scale.blocks),
        kv_type: KvType::F16,
        context: capacity,
    };
    let model = Model::load_on_cuda(source, &settings)?;
    let (sequence, workspace) = (&mut model.sequence(capacity)?, &mut model.workspace()?);
    let mut sampler = Sampler::new(SamplerSettings::greedy())?;
    let prompt: Vec<u32> = (0..scale.prefill).map(|i| (i * 7919 % scale.vocab) as u32).collect();
    let mut prefill_seconds = Vec::new();
    for _ in 0..=scale.runs / 3 {
        sequence.truncate(0);
        let turn = Turn { tokens: &prompt, sequence };
        let start = Instant::now();
        model.next_token(turn, workspace, &mut sampler, &prompt)?;
        prefill_seconds.push(start.elapsed().as_secs_f64());
    }
    sequence.truncate(0);
    let mut text = prompt[..scale.context].to_vec();
    let turn = Turn { tokens: &text, sequence };
    text.push(model.next_token(turn, workspace, &mut sampler, &text)?);
    let mut decode_seconds = Vec::new();
    for _ in 0..scale.decoded {
        let turn = Turn { tokens: &text[text.len() - 1..], sequence };
        let start = Instant::now();
        let token = model.next_token(turn, workspace, &mut sampler, &text)?;
        decode_seconds.push(start.elapsed().as_secs_f64());
        text.push(token);
    }
    Ok(Figures {
        prefill: scale.prefill as f64 / median(prefill_seconds),
        decode: 1.0 / median(decode_seconds),
        bytes: free.saturating_sub(device.free_memory()?),
    })
}

fn name([rows, cols]: [usize; 2]) -> String {
    format!("{rows}x{cols}")
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
