//! A whole model on the device against the scalar reference: the CPU itself rounds what it decodes
//! to 8 bits.

use std::sync::Arc;

use anyhow::Result;
use slim_formats::{Features, Generation, ModelConfig, Rope};
use slim_kernels::{
    Scalar,
    cuda::{Device, KvType},
};
use slim_runtime::{CudaSettings, Model, Sampler, SamplerSettings};

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

/// Compares the logits of every token of a prompt, of tokens that follow one by one, and of a
/// prompt of several batches.
fn compare(check: &mut Check, settings: &CudaSettings) -> Result<()> {
    let source = tiny_model();
    let (scalar, cuda) = (Model::load(&source, &Scalar)?, Model::load_on_cuda(&source, settings)?);
    let text = tokens(PROMPT_TOKENS + DECODED_TOKENS);
    let (prompt, decoded) = text.split_at(PROMPT_TOKENS);
    let run = |model: &Model<'_>| -> Result<Vec<(String, Vec<f32>)>> {
        let mut cache = model.new_cache(CONTEXT)?;
        let hidden = model.forward(prompt, &mut cache)?;
        let mut found = vec![("prompt".to_owned(), model.logits(&hidden)?)];
        for token in decoded {
            let case = format!("token at {}", cache.position());
            found.push((case, model.next_logits(&[*token], &mut cache)?));
        }
        cache.clear();
        found.push(("long prompt".into(), model.next_logits(&tokens(530), &mut cache)?));
        Ok(found)
    };
    for ((case, expected), (_, found)) in run(&scalar)?.into_iter().zip(run(&cuda)?) {
        check.near(case, &found, &expected);
    }
    Ok(())
}

/// Lets both choose the tokens that follow, each after those that the reference chose.
pub fn greedy(device: &Arc<Device>, check: &mut Check) -> Result<()> {
    let source = tiny_model();
    let settings = settings(device, 2, KvType::F16);
    let (scalar, cuda) = (Model::load(&source, &Scalar)?, Model::load_on_cuda(&source, &settings)?);
    let (mut scalar_cache, mut cuda_cache) = (scalar.new_cache(CONTEXT)?, cuda.new_cache(CONTEXT)?);
    let mut sampler = Sampler::new(SamplerSettings::greedy())?;
    let mut text = tokens(PROMPT_TOKENS);
    let mut fed = 0;
    for _ in 0..DECODED_TOKENS {
        let new = &text[fed..];
        let expected = scalar.next_token(new, &mut scalar_cache, &mut sampler, &text)?;
        let found = cuda.next_token(new, &mut cuda_cache, &mut sampler, &text)?;
        check.same(format_args!("token {}", text.len()), &found, &expected);
        fed = text.len();
        text.push(expected);
    }
    Ok(())
}
