//! A whole model on the device against the scalar reference: the CPU itself rounds what it decodes
//! to 8 bits.

use std::sync::Arc;

use anyhow::Result;
use slim_formats::{Features, Generation, ModelConfig, Rope};
use slim_kernels::{KvType, Scalar, cuda::Device};
use slim_runtime::{CudaSettings, Model, Sampler, SamplerSettings, Sequence, Turn, Workspace};

use super::Check;
use crate::source::{RandomModel, Storage};

/// The reference computes with f32 where the device rounds to fp16: activations, keys and values.
/// Errors of several layers add up: measured 1.4e-3.
pub const LOGITS_ERROR: f64 = 4e-3;
/// Keys and values of 8 bits are 0.6 % off, at random, before attention averages them: measured
/// 8.2e-3.
pub const Q8_ERROR: f64 = 2e-2;
/// A block on the CPU rounds the inputs of its layers to 8 bits when it decodes: measured 1.3e-2.
pub const SPLIT_ERROR: f64 = 3e-2;

const CONTEXT: usize = 640;
const PROMPT_TOKENS: usize = 40;
const DECODED_TOKENS: usize = 12;

fn tiny_model() -> RandomModel {
    let head_dim = 32;
    let config = ModelConfig {
        family: &slim_formats::arch::Llama,
        name: None,
        block_count: 2,
        hidden_size: 96,
        ffn_size: 208,
        head_count: 4,
        kv_head_count: 2,
        head_dim,
        vocab_size: 300,
        context_length: CONTEXT,
        norm_epsilon: 1e-5,
        rope: Rope::new(1e4, vec![1.0; head_dim / 2]),
        features: Features::default(),
        sliding_window: None,
        tied_embeddings: false,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        add_bos: false,
        generation: Generation::default(),
    };
    RandomModel::new(config, 2, 64, Storage::Packed(&[3]))
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i + 7 * i) % 300).collect()
}

fn settings(device: &Arc<Device>, blocks: usize, kv_type: KvType) -> CudaSettings {
    let devices = vec![(0, Arc::clone(device))];
    CudaSettings { devices, blocks: Some(blocks), kv_type, context: CONTEXT }
}

pub fn logits(device: &Arc<Device>, check: &mut Check) -> Result<()> {
    compare(check, &settings(device, 2, KvType::F16))
}

pub fn q8(device: &Arc<Device>, check: &mut Check) -> Result<()> {
    compare(check, &settings(device, 2, KvType::Q8))
}

pub fn split(device: &Arc<Device>, check: &mut Check) -> Result<()> {
    compare(check, &settings(device, 1, KvType::F16))
}

/// The tiny model in the reference and on the device.
fn on_both(settings: &CudaSettings) -> Result<(Model, Model)> {
    let source = Arc::new(tiny_model());
    Ok((Model::load(source.clone(), &Scalar)?, Model::load_on_cuda(source, settings)?))
}

/// Compares the logits of every token of a prompt, of tokens that follow one by one, and of a
/// prompt of several batches.
fn compare(check: &mut Check, settings: &CudaSettings) -> Result<()> {
    let (scalar, cuda) = on_both(settings)?;
    let text = tokens(PROMPT_TOKENS + DECODED_TOKENS);
    let (prompt, decoded) = text.split_at(PROMPT_TOKENS);
    let run = |model: &Model| -> Result<Vec<(String, Vec<f32>)>> {
        let (sequence, workspace) = (&mut model.sequence(CONTEXT)?, &mut model.workspace()?);
        let hidden = model.forward(Turn { tokens: prompt, sequence }, workspace)?;
        let mut found = vec![("prompt".to_owned(), model.logits(&hidden)?)];
        for tokens in decoded.chunks(1) {
            let case = format!("token at {}", sequence.tokens().len());
            found.push((case, model.step(&mut [Turn { tokens, sequence }], workspace)?));
        }
        sequence.truncate(0);
        let long = &mut [Turn { tokens: &tokens(530), sequence }];
        found.push(("long prompt".into(), model.step(long, workspace)?));
        Ok(found)
    };
    for ((case, expected), (_, found)) in run(&scalar)?.into_iter().zip(run(&cuda)?) {
        check.near(case, &found, &expected);
    }
    Ok(())
}

/// Lets both choose the tokens that follow, each after those that the reference chose.
pub fn greedy(device: &Arc<Device>, check: &mut Check) -> Result<()> {
    let (scalar, cuda) = on_both(&settings(device, 2, KvType::F16))?;
    let [mut of_scalar, mut of_cuda] = [
        (scalar.sequence(CONTEXT)?, scalar.workspace()?),
        (cuda.sequence(CONTEXT)?, cuda.workspace()?),
    ];
    let mut sampler = Sampler::new(SamplerSettings::greedy())?;
    let mut text = tokens(PROMPT_TOKENS);
    let mut fed = 0;
    for _ in 0..DECODED_TOKENS {
        let mut next = |model: &Model, (sequence, workspace): &mut (Sequence, Workspace)| {
            let turn = Turn { tokens: &text[fed..], sequence };
            model.next_token(turn, workspace, &mut sampler, &text)
        };
        let expected = next(&scalar, &mut of_scalar)?;
        let found = next(&cuda, &mut of_cuda)?;
        check.same(format_args!("token {}", text.len()), &found, &expected);
        fed = text.len();
        text.push(expected);
    }
    Ok(())
}
