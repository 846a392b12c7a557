//! A calibration text that the model writes itself.

use std::sync::Arc;

use anyhow::Result;
use slim_converter::{Calibration, Settings, WorkFolder};
use slim_formats::{ModelConfig, ModelSource};
use slim_kernels::Cpu;
use slim_runtime::{Model, Sampler, SamplerSettings, SplitMix64, Tokenizer, Turn};

use crate::progress::Progress;

/// Texts that go through the model together.
const STREAMS: usize = 8;

/// As the model finds tokens likely, whatever its makers recommend.
const DRAWS: SamplerSettings = SamplerSettings {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repeat_penalty: 1.0,
    repeat_window_tokens: 0,
    seed: 0,
};

/// Draws the samples of a calibration, each a text from its beginning, with the seed of the
/// settings.
///
/// # Errors
/// As [`Model::step`]; `Interrupted` if the caller wants the conversion to stop.
pub fn draw(
    source: &Arc<dyn ModelSource>,
    tokenizer: &Tokenizer,
    settings: &Settings,
    work: &WorkFolder,
    progress: &mut Progress,
) -> Result<Calibration> {
    let model = Model::load(Arc::clone(source), &Cpu)?;
    let mut random = SplitMix64::new(settings.seed);
    let known = tokenizer.vocab_size();
    let samplers = (0..settings.samples).map(|_| {
        let sampler = Sampler::new(SamplerSettings { seed: random.bits(), ..DRAWS })?;
        Ok(sampler.limited_to(known, source.config().vocab_size))
    });
    let mut samplers: Vec<Sampler> = samplers.collect::<Result<_>>()?;
    progress.begin("token of the calibration text", settings.samples * settings.context);
    let mut samples = Vec::with_capacity(settings.samples);
    for samplers in samplers.chunks_mut(STREAMS) {
        samples.extend(draw_together(&model, samplers, settings.context, |tokens| {
            work.go_on()?;
            progress.step(samples.len() * settings.context + tokens, "");
            Ok(())
        })?);
    }
    Ok(Calibration::drawn(samples))
}

/// Draws a text of `context` tokens with each of `samplers`; `on_step` is told how many have been
/// drawn in all.
fn draw_together(
    model: &Model,
    samplers: &mut [Sampler],
    context: usize,
    mut on_step: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Vec<u32>>> {
    let mut sequences = model.sequences(samplers.len(), context)?;
    let mut workspace = model.workspace()?;
    let mut texts = vec![vec![first_token(model.config())]; samplers.len()];
    for length in 1..context {
        let turns = sequences.iter_mut().zip(&texts);
        let mut turns: Vec<Turn<'_>> =
            turns.map(|(sequence, text)| Turn { tokens: &text[length - 1..], sequence }).collect();
        let logits = model.step(&mut turns, &mut workspace)?;
        let rows = logits.chunks_exact(model.config().vocab_size);
        for ((text, sampler), logits) in texts.iter_mut().zip(&mut *samplers).zip(rows) {
            text.push(sampler.sample(logits, &[])?);
        }
        on_step(samplers.len() * length)?;
    }
    Ok(texts)
}

/// What texts begin with: the token for it, or one that ends a text, behind which models have seen
/// others begin.
fn first_token(config: &ModelConfig) -> u32 {
    config.bos_token_id.or(config.eos_token_ids.first().copied()).unwrap_or(0)
}
