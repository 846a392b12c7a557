//! Gradients against finite differences of an oracle in f64.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use slim_formats::{Decoder, ModelConfig, ModelSource, Part, PartMap, arch::Tensor, open_model};
use slim_kernels::{Cpu, weight};
use slim_runtime::{Block, Model, Turn};

use super::*;
use crate::contents::{MATRICES_BEFORE, MATRICES_BEHIND};

/// Those that the oracle in f64 computes.
const MODELS: [&str; 3] = ["llama", "llama-tied-rope3", "mistral-swa"];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/archs")
}

fn open(name: &str) -> Box<dyn ModelSource> {
    open_model(&folder().join(name)).unwrap()
}

/// The normed last hidden states of a text in a model that runs.
fn hidden(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let (sequence, workspace) = (&mut model.sequence(tokens.len()).unwrap(), model.workspace());
    model.forward(Turn { tokens, sequence }, &mut workspace.unwrap()).unwrap()
}

/// A tiny model of every kind.
fn every_model() -> Vec<String> {
    let entries = std::fs::read_dir(folder()).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Numbers in -0.5 .. 0.5.
fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..len).map(|_| next()).collect()
}

fn tokens(len: usize, seed: u32) -> Vec<u32> {
    noise(len, seed).iter().map(|x| ((x + 0.5) * 256.0) as u32).collect()
}

/// The tensors of a model, far enough from those of the file that attention prefers some tokens and
/// norms are uneven.
fn perturbed(source: &dyn ModelSource) -> HashMap<String, Vec<f32>> {
    let values = |(seed, name): (usize, &str)| {
        let (rows, cols) = weight::shape(source.tensor(name).unwrap().unwrap());
        let mut values = vec![0.0; rows * cols];
        weight::dequantize_rows(source.tensor(name).unwrap().unwrap(), 0..rows, &mut values)
            .unwrap();
        for (value, noise) in values.iter_mut().zip(noise(rows * cols, seed as u32)) {
            // Rates stay below 0: a state must not grow.
            *value += match name.ends_with("ssm_a") {
                true => 0.0,
                false if rows == 1 => noise,
                false => 0.6 * noise,
            };
        }
        (name.to_owned(), values)
    };
    source.tensor_names().into_iter().enumerate().map(values).collect()
}

fn model<'a>(decoder: &'a Decoder, tensors: &'a HashMap<String, Vec<f32>>) -> Backward<'a> {
    let matrix = |tensor: &Tensor| {
        let (rows, cols) = tensor.shape();
        dense(&tensors[&tensor.name], rows, cols)
    };
    let block = |index: usize| {
        let (mut layers, mut vectors) = (PartMap::new(), PartMap::new());
        for tensor in decoder.tensors_of(index) {
            let (part, values) = (tensor.part, &tensors[&tensor.name]);
            match part {
                Part::Convolution => vectors.insert(part, transposed(values, tensor.shape())),
                _ if tensor.is_matrix() => layers.insert(part, matrix(tensor)),
                _ => vectors.insert(part, values.clone()),
            }
        }
        Block { spec: decoder.blocks[index], layers, vectors }
    };
    let vector = |part| decoder.outside(part).map(|tensor| tensors[&tensor.name].clone());
    let to_blocks = decoder.outside(Part::BlockEmbedding).map(|table| ToBlocks {
        embedding: matrix(table),
        up: decoder.outside(Part::BlockEmbeddingUp).map(matrix).unwrap(),
        norm: vector(Part::BlockEmbeddingNorm).unwrap(),
    });
    let ends = Ends {
        to_blocks,
        embedding: matrix(decoder.embedding()),
        up: decoder.outside(Part::EmbeddingUp).map(matrix),
        positions: decoder.outside(Part::Positions).map(matrix),
        norm: vector(Part::OutputNorm),
        norm_bias: vector(Part::OutputNormBias),
        down: decoder.outside(Part::EmbeddingDown).map(matrix),
        output: matrix(decoder.output()),
    };
    let blocks = (0..decoder.blocks.len()).map(block).collect();
    Backward { precision: Precision::Fine, decoder, blocks, ends, source: None }
}

/// `[cols, rows]` of a matrix `[rows, cols]`.
fn transposed(values: &[f32], (rows, cols): (usize, usize)) -> Vec<f32> {
    (0..cols).flat_map(|col| (0..rows).map(move |row| values[row * cols + col])).collect()
}

/// Logits to diverge from.
fn teacher(tokens: usize, config: &ModelConfig) -> Vec<f32> {
    let logits = noise(tokens * config.vocab_size, 7);
    logits.into_iter().map(|logit| 8.0 * logit).collect()
}

/// The divergence from a teacher's logits, and the gradients of all weights, by tensor name.
fn gradients(
    model: &Backward<'_>,
    sequences: &[&[u32]],
    teacher: &[f32],
) -> (f64, HashMap<String, Vec<f64>>) {
    let decoder = model.decoder;
    let Decoder { vocab_size: vocab, embedding_size: width, .. } = *decoder;
    let [embedding, output] =
        [decoder.embedding(), decoder.output()].map(|tensor| tensor.name.as_str());
    let mut ask =
        |range: Range<usize>| Ok(teacher[range.start * vocab..range.end * vocab].to_vec());
    let mut found = HashMap::new();
    let mut of_vocabulary =
        HashMap::from([embedding, output].map(|name| (name, vec![0.0; vocab * width])));
    let loss = model.run(sequences, &mut Loss::Divergence(&mut ask), &mut |gradient| {
        let (name, values) = match gradient {
            Gradient::Linear { block, part, x, dy } => {
                let tensor = decoder.tensor(block, part);
                let (rows, cols) = tensor.shape();
                let dw = weight_gradient(model.precision, x, dy, rows, cols);
                (tensor.name.clone(), dw.into_iter().map(f64::from).collect())
            }
            Gradient::Norm { block: Some(block), part, dw } => {
                (decoder.tensor(block, part).name.clone(), dw.to_vec())
            }
            Gradient::Norm { block: None, part, dw } => {
                (decoder.outside(part).unwrap().name.clone(), dw.to_vec())
            }
            Gradient::BlockEmbedding(dx) => {
                let table = decoder.outside(Part::BlockEmbedding).unwrap();
                let (rows, cols) = table.shape();
                let mut sum = vec![0.0; rows * cols];
                for (&token, dx) in sequences.concat().iter().zip(dx.chunks_exact(cols)) {
                    let row = sum[token as usize * cols..].iter_mut();
                    row.zip(dx).for_each(|(sum, &dx)| *sum += f64::from(dx));
                }
                (table.name.clone(), sum)
            }
            Gradient::Output { x, dy } => {
                let added = weight_gradient(model.precision, x, dy, vocab, width);
                let sum = of_vocabulary.get_mut(output).unwrap();
                sum.iter_mut().zip(added).for_each(|(sum, added)| *sum += f64::from(added));
                return Ok(());
            }
            Gradient::Embedding(dx) => {
                let sum = of_vocabulary.get_mut(embedding).unwrap();
                for (&token, dx) in sequences.concat().iter().zip(dx.chunks_exact(width)) {
                    let row = sum[token as usize * width..].iter_mut();
                    row.zip(dx).for_each(|(sum, &dx)| *sum += f64::from(dx));
                }
                return Ok(());
            }
        };
        assert!(found.insert(name, values).is_none());
        Ok(())
    });
    found.extend(of_vocabulary.into_iter().map(|(name, dw)| (name.to_owned(), dw)));
    (loss.unwrap(), found)
}

/// The forward pass as its formulas read, in f64.
struct Oracle<'a> {
    config: &'a ModelConfig,
    tensors: HashMap<String, Vec<f64>>,
}

impl<'a> Oracle<'a> {
    fn new(config: &'a ModelConfig, tensors: &HashMap<String, Vec<f32>>) -> Self {
        let widen = |values: &Vec<f32>| values.iter().map(|&value| f64::from(value)).collect();
        let tensors = tensors.iter().map(|(name, values)| (name.clone(), widen(values))).collect();
        Self { config, tensors }
    }

    /// The derivative of the loss with respect to one weight, by central differences.
    fn derivative(&mut self, name: &str, at: usize, loss: impl Fn(&Self) -> f64) -> f64 {
        const STEP: f64 = 1e-5;
        let mut moved = |by: f64| {
            self.tensors.get_mut(name).unwrap()[at] += by;
            let loss = loss(self);
            self.tensors.get_mut(name).unwrap()[at] -= by;
            loss
        };
        (moved(STEP) - moved(-STEP)) / (2.0 * STEP)
    }

    fn divergence(&self, sequences: &[&[u32]], teacher: &[f32]) -> f64 {
        let vocab = self.config.vocab_size;
        let rows = sequences.iter().flat_map(|sequence| self.log_probabilities(sequence));
        let of = |(row, teacher): (Vec<f64>, &[f32])| -> f64 {
            let teacher = log_softmax_f64(teacher.iter().map(|&x| f64::from(x)).collect());
            teacher.iter().zip(row).map(|(p, q)| p.exp() * (p - q)).sum()
        };
        let tokens = teacher.len() / vocab;
        rows.zip(teacher.chunks_exact(vocab)).map(of).sum::<f64>() / tokens as f64
    }

    fn log_probabilities(&self, sequence: &[u32]) -> Vec<Vec<f64>> {
        let config = self.config;
        let embedding = &self.tensors["token_embd.weight"];
        let row =
            |&t: &u32| embedding[t as usize * config.hidden_size..][..config.hidden_size].to_vec();
        let mut x: Vec<Vec<f64>> = sequence.iter().map(row).collect();
        for index in 0..config.block_count {
            let name = |part: &str| format!("blk.{index}.{part}.weight");
            let normed = self.norm(&name("attn_norm"), &x);
            let rotated = |part: &str| -> Vec<Vec<f64>> {
                let rows = self.linear(&name(part), &normed);
                rows.into_iter().enumerate().map(|(t, row)| self.rotated(row, t)).collect()
            };
            let (q, k) = (rotated("attn_q"), rotated("attn_k"));
            let v = self.linear(&name("attn_v"), &normed);
            let attended: Vec<Vec<f64>> =
                (0..x.len()).map(|t| self.attended(&q[t], &k, &v, t)).collect();
            add_rows(&mut x, self.linear(&name("attn_output"), &attended));
            let normed = self.norm(&name("ffn_norm"), &x);
            let mut gate = self.linear(&name("ffn_gate"), &normed);
            let up = self.linear(&name("ffn_up"), &normed);
            for (gate, up) in gate.iter_mut().flatten().zip(up.iter().flatten()) {
                *gate = *gate / (1.0 + (-*gate).exp()) * up;
            }
            add_rows(&mut x, self.linear(&name("ffn_down"), &gate));
        }
        let output = if config.tied_embeddings { "token_embd.weight" } else { "output.weight" };
        let logits = self.linear(output, &self.norm("output_norm.weight", &x));
        logits.into_iter().map(log_softmax_f64).collect()
    }

    fn linear(&self, name: &str, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let rows =
            |x: &Vec<f64>| self.tensors[name].chunks_exact(x.len()).map(|w| dot(w, x)).collect();
        x.iter().map(rows).collect()
    }

    fn norm(&self, name: &str, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let of = |x: &Vec<f64>| {
            let mean = dot(x, x) / x.len() as f64;
            let scale = 1.0 / (mean + f64::from(self.config.norm_epsilon)).sqrt();
            x.iter().zip(&self.tensors[name]).map(|(x, w)| x * scale * w).collect()
        };
        x.iter().map(of).collect()
    }

    fn rotated(&self, mut row: Vec<f64>, position: usize) -> Vec<f64> {
        let (dim, rope) = (self.config.head_dim, &self.config.rope);
        for head in row.chunks_exact_mut(dim) {
            for i in 0..dim / 2 {
                let frequency = f64::from(rope.theta).powf(-2.0 * i as f64 / dim as f64);
                let angle = position as f64 * frequency / f64::from(rope.factors[i]);
                let (sin, cos) = angle.sin_cos();
                let (a, b) = (head[i], head[i + dim / 2]);
                (head[i], head[i + dim / 2]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
        row
    }

    fn attended(&self, q: &[f64], k: &[Vec<f64>], v: &[Vec<f64>], t: usize) -> Vec<f64> {
        let config = self.config;
        let dim = config.head_dim;
        let first = config.sliding_window.map_or(0, |window| (t + 1).saturating_sub(window));
        let mut out = Vec::new();
        for (head, q) in q.chunks_exact(dim).enumerate() {
            let at = head / (config.head_count / config.kv_head_count) * dim;
            let score = |s: usize| dot(q, &k[s][at..][..dim]) / (dim as f64).sqrt();
            let mut weights = log_softmax_f64((first..=t).map(score).collect());
            weights.iter_mut().for_each(|weight| *weight = weight.exp());
            let weighted = |i: usize| (first..=t).zip(&weights).map(move |(s, p)| p * v[s][at + i]);
            out.extend((0..dim).map(|i| weighted(i).sum::<f64>()));
        }
        out
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(lane, (a, b))| *lane += a * b);
    }
    lanes.iter().sum()
}

fn add_rows(x: &mut [Vec<f64>], y: Vec<Vec<f64>>) {
    x.iter_mut().flatten().zip(y.into_iter().flatten()).for_each(|(x, y)| *x += y);
}

fn log_softmax_f64(mut row: Vec<f64>) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    row.iter_mut().for_each(|x| *x -= log_sum);
    row
}

/// Compares `per_tensor` random entries of each gradient; gives the largest error, as a share of
/// the tensor's RMS gradient.
fn largest_error(
    oracle: &mut Oracle<'_>,
    found: &HashMap<String, Vec<f64>>,
    per_tensor: usize,
    loss: impl Fn(&Oracle<'_>) -> f64,
) -> f64 {
    let mut largest = 0f64;
    for (name, values) in found {
        let rms = (dot(values, values) / values.len() as f64).sqrt();
        assert!(rms > 0.0, "{name}");
        for place in noise(per_tensor, name.len() as u32) {
            let at = ((place + 0.5) * values.len() as f32) as usize;
            let expected = oracle.derivative(name, at, &loss);
            largest = largest.max((values[at] - expected).abs() / rms);
        }
    }
    largest
}

#[test]
fn hidden_states_are_those_of_the_running_model() {
    for name in every_model() {
        let source = open(&name);
        let (a, b) = (tokens(40, 1), tokens(40, 2));
        let running = Model::load(open(&name).into(), &Cpu).unwrap();
        let expected = [&a, &b].map(|tokens| hidden(&running, tokens));
        let found = Backward::load(&*source, Precision::Fine).unwrap().states(&[&a, &b]).unwrap();
        for (found, expected) in found.iter().zip(expected.concat()) {
            assert!((found - expected).abs() < 1e-4, "{name}: {found} for {expected}");
        }
    }
}

/// Where products are in AMX; elsewhere they are the same.
#[test]
fn coarse_gradients_are_near_the_fine_ones() {
    for name in MODELS {
        let source = open(name);
        let tensors = perturbed(&*source);
        let sequence = tokens(100, 11);
        let fine = model(source.decoder(), &tensors);
        let coarse = Backward { precision: Precision::Coarse, ..fine.clone() };
        let teacher = teacher(100, source.config());
        let (_, fine) = gradients(&fine, &[&sequence], &teacher);
        let (_, coarse) = gradients(&coarse, &[&sequence], &teacher);
        for (tensor, fine) in &fine {
            let squares = |values: Vec<f64>| values.iter().map(|x| x * x).sum::<f64>();
            let errors = fine.iter().zip(&coarse[tensor]).map(|(fine, coarse)| coarse - fine);
            let error = (squares(errors.collect()) / squares(fine.clone())).sqrt();
            println!("{name} {tensor}: {error:.1e}");
            assert!(error < 0.1, "{name} {tensor}: {error}");
        }
    }
}

#[test]
fn divergence_gradients_are_finite_differences() {
    for name in MODELS {
        let source = open(name);
        let (config, tensors) = (source.config(), perturbed(&*source));
        let (a, b) = (tokens(24, 5), tokens(24, 6));
        let sequences = [&a[..], &b[..]];
        let teacher = teacher(48, config);
        let model = model(source.decoder(), &tensors);
        let (loss, found) = gradients(&model, &sequences, &teacher);
        let vocabulary_matrices = if config.tied_embeddings { 1 } else { 2 };
        assert_eq!(found.len(), 9 * config.block_count + 1 + vocabulary_matrices);
        let mut oracle = Oracle::new(config, &tensors);
        let expected = oracle.divergence(&sequences, &teacher);
        assert!((loss / expected - 1.0).abs() < 1e-5, "{name}: {loss} for {expected}");
        let error = largest_error(&mut oracle, &found, 3, |o| o.divergence(&sequences, &teacher));
        println!("{name}: {error:.1e}");
        assert!(error < 1e-3, "{name}: {error}");
    }
}

/// Steps of differences, as shares of a tensor's length: one of them is small enough for the
/// curvature and large enough for f32.
const SHARES: [f64; 5] = [3e-4, 3e-3, 3e-5, 1e-5, 3e-6];

/// Along the gradient itself, and along a random direction, the loss changes as the gradient says.
#[test]
fn gradients_of_every_family_are_finite_differences() {
    every_model().into_par_iter().for_each(|name| {
        let source = open(&name);
        let tensors = perturbed(&*source);
        let (a, b) = (tokens(24, 5), tokens(24, 6));
        let sequences = [&a[..], &b[..]];
        let teacher = teacher(48, source.config());
        let mut decoder = source.decoder().clone();
        for experts in decoder.blocks.iter_mut().filter_map(|block| block.experts.as_mut()) {
            // Where a token takes another expert on the way, the loss jumps.
            (experts.used, experts.routing.groups) = (experts.count, None);
        }
        let decoder = &decoder;
        let (_, found) = gradients(&model(decoder, &tensors), &sequences, &teacher);
        let is_trained = |tensor: &&Tensor| found.contains_key(&tensor.name);
        let kept = || MATRICES_BEFORE.into_iter().chain(MATRICES_BEHIND);
        let is_kept = |tensor: &Tensor| kept().any(|part| part == tensor.part);
        let expected = decoder.tensors().iter().filter(|tensor| {
            tensor.is_matrix() && !is_kept(tensor) && !tensor.part.stays_precise()
                || tensor.name.contains("norm.weight")
        });
        assert!(expected.clone().all(|tensor| is_trained(&tensor)), "{name}");
        let last = decoder.blocks.len() - 1;
        for (tensor, gradient) in &found {
            let block = decoder.find(tensor).and_then(|tensor| tensor.block);
            if block.is_some_and(|block| block != 0 && block != last) {
                continue;
            }
            let random: Vec<f64> =
                noise(gradient.len(), 3).iter().map(|&noise| f64::from(noise)).collect();
            let length = dot(gradient, gradient).sqrt();
            for direction in [gradient, &random] {
                let unit = dot(direction, direction).sqrt();
                let loss = |step: f64| {
                    let mut moved = tensors.clone();
                    let values = moved.get_mut(tensor).unwrap();
                    for (value, direction) in values.iter_mut().zip(direction) {
                        *value += (step * direction / unit) as f32;
                    }
                    gradients(&model(decoder, &moved), &sequences, &teacher).0
                };
                let squares = tensors[tensor].iter().map(|&value| f64::from(value * value));
                let size = squares.sum::<f64>().sqrt();
                let error = |share: f64| {
                    let step = share * size;
                    let found = (loss(step) - loss(-step)) / (2.0 * step);
                    (found - dot(gradient, direction) / unit).abs() / length
                };
                let is_near = SHARES.into_iter().any(|share| error(share) < 0.03);
                assert!(is_near, "{name}, {tensor}: {:?}", SHARES.map(error));
            }
        }
    });
}

/// Longer than the pieces of queries, of products and of logits.
#[test]
fn long_sequences_gradients_are_finite_differences() {
    for (name, window) in [("llama", None), ("mistral-swa", Some(16)), ("mistral-swa", Some(140))] {
        let source = open(name);
        let tensors = perturbed(&*source);
        let config = ModelConfig { sliding_window: window, ..source.config().clone() };
        let (a, b) = (tokens(150, 8), tokens(150, 9));
        let sequences = [&a[..], &b[..]];
        let decoder = Decoder::new(&config);
        let model = model(&decoder, &tensors);
        let teacher = teacher(300, &config);
        let (loss, found) = gradients(&model, &sequences, &teacher);
        let mut oracle = Oracle::new(&config, &tensors);
        let expected = oracle.divergence(&sequences, &teacher);
        assert!((loss / expected - 1.0).abs() < 1e-5, "{name}: {loss} for {expected}");
        let first_block = found.into_iter().filter(|(name, _)| name.starts_with("blk.0.attn_"));
        let first_block = first_block.collect();
        let error =
            largest_error(&mut oracle, &first_block, 1, |o| o.divergence(&sequences, &teacher));
        println!("{name} {window:?}: {error:.1e}");
        assert!(error < 1e-3, "{name}: {error}");
    }
}

#[test]
fn divergence_from_the_running_model_is_zero_with_zero_gradients() {
    for name in every_model() {
        let source = open(&name);
        let (a, b) = (tokens(40, 1), tokens(40, 2));
        let running = Model::load(open(&name).into(), &Cpu).unwrap();
        let logits = [&a, &b].map(|tokens| running.logits(&hidden(&running, tokens)).unwrap());
        let model = Backward::load(&*source, Precision::Fine).unwrap();
        let (loss, found) = gradients(&model, &[&a, &b], &logits.concat());
        assert!(loss.abs() < 1e-6, "{name}: {loss}");
        assert!(found.values().flatten().all(|value| value.abs() < 1e-6), "{name}");
    }
}

#[test]
fn sensitivities_are_what_their_definitions_say() {
    let source = open("mistral-swa");
    let samples: Vec<Vec<u32>> = (0..3).map(|seed| tokens(400, seed)).collect();
    let found = sensitivities(&*source, &samples, &mut (1 << 30), &mut |_| {}).unwrap();
    let model = Backward::load(&*source, Precision::Coarse).unwrap();
    let of_layer = &found.blocks[1][Part::AttnK];
    let (mut input, mut gradients, mut output, mut product, mut seed) = (0.0, 0.0, 0.0, 0.0, 0);
    let square = |value: f32| f64::from(value) * f64::from(value);
    for sample in &samples {
        model
            .run(&[sample], &mut Loss::Fisher(seed), &mut |gradient| {
                if let Gradient::Linear { block: 1, part: Part::AttnK, x, dy } = gradient {
                    let tokens = x.chunks(of_layer.inputs.len());
                    for (x, dy) in tokens.zip(dy.chunks(of_layer.outputs.len())) {
                        let weight = dy.iter().copied().map(square).sum::<f64>();
                        input += weight * square(x[5]);
                        gradients += weight;
                        output += square(dy[5]);
                        product += f64::from(dy[3]) * f64::from(dy[5]);
                    }
                }
                Ok(())
            })
            .unwrap();
        seed += 400;
    }
    let expected =
        [(of_layer.inputs[5], input / gradients), (of_layer.outputs[5], output / 1200.0)];
    for (found, expected) in expected {
        assert!((found / expected - 1.0).abs() < 1e-4, "{found} for {expected}");
    }
    let hessian = &found.outputs["blk.1.attn_k.weight"].sums[3 * of_layer.outputs.len()..];
    let error = (f64::from(hessian[5]) - product).abs();
    assert!(error < 0.01 * output, "{} for {product}, {output}", hessian[5]);
    assert!(!found.outputs.contains_key("blk.1.ffn_up.weight"));
}

#[test]
fn sensitivities_do_not_depend_on_the_number_of_threads() {
    let source = open("llama");
    let samples: Vec<Vec<u32>> = (0..3).map(|seed| tokens(400, seed)).collect();
    let with_threads = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| sensitivities(&*source, &samples, &mut (1 << 30), &mut |_| {}).unwrap())
    };
    let (one, two) = (with_threads(1), with_threads(2));
    assert_eq!(one.blocks, two.blocks);
    for tensor in source.decoder().tensors() {
        let [one, two] =
            [&one, &two].map(|found| found.outputs.get(&tensor.name).map(|s| s.sums.to_vec()));
        assert_eq!(one, two);
    }
}

#[test]
fn sequences_of_unequal_or_no_length_are_refused() {
    let source = open("llama");
    let model = Backward::load(&*source, Precision::Fine).unwrap();
    for sequences in [&[][..], &[&[][..]], &[&[1, 2], &[3][..]]] {
        assert!(model.run(sequences, &mut Loss::Fisher(0), &mut |_| Ok(())).is_err());
    }
    assert!(sensitivities(&*source, &[], &mut 0, &mut |_| {}).is_err());
    assert!(sensitivities(&*source, &[vec![]], &mut 0, &mut |_| {}).is_err());
}

#[test]
fn random_gradients_have_the_covariance_of_those_of_drawn_tokens() {
    const DRAWS: usize = 40_000;
    let p = [0.9f32, 0.06, 0.0, 0.04];
    let mut gradients = p.map(|p| p.ln().max(-50.0)).repeat(DRAWS);
    let entropy = reverse_fisher(&mut gradients, p.len(), 7) / DRAWS as f64;
    assert!((entropy - 0.39239).abs() < 1e-4, "{entropy}");
    for (i, j) in (0..4).flat_map(|i| (0..4).map(move |j| (i, j))) {
        let products = gradients.chunks(p.len()).map(|g| f64::from(g[i] * g[j]));
        let found = products.sum::<f64>() / DRAWS as f64;
        let expected = f64::from(if i == j { p[i] } else { 0.0 } - p[i] * p[j]);
        assert!((found - expected).abs() < 1e-3, "{i}, {j}: {found} for {expected}");
    }
}
