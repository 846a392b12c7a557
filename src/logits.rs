//! `slimllm logits`: the logits of each position, for comparing runtimes.

use std::io::Write;

use anyhow::{Context as _, Result};
use safetensors::{Dtype, tensor::TensorView};
use slim_formats::AtomicFile;
use slim_runtime::Turn;

use crate::{args::LogitsArgs, interrupt::clean_up_when_interrupted, target::Kind};

/// What comes before the logits, at most.
const HEADER_BYTES: usize = 1024;

pub fn run(args: &LogitsArgs) -> Result<()> {
    clean_up_when_interrupted()?;
    args.execution.start()?;
    let source = args.model.open()?;
    let output = args.target.prepare(Kind::File("safetensors"), &source.files())?;
    let mut out = AtomicFile::create(output)?;
    let logits_bytes = args.tokens.len() * source.config().vocab_size * size_of::<f32>();
    out.reserve((logits_bytes + HEADER_BYTES) as u64)?;
    let model = args.execution.load(&source, args.tokens.len())?;
    let (mut sequence, mut workspace) = (model.sequence(args.tokens.len())?, model.workspace()?);
    let turn = Turn { tokens: &args.tokens, sequence: &mut sequence };
    let hidden = model.forward(turn, &mut workspace)?;
    let logits = model.logits(&hidden)?;

    let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
    let shape = vec![args.tokens.len(), model.config().vocab_size];
    let tensor = TensorView::new(Dtype::F32, shape, &bytes)?;
    let file = safetensors::serialize([("logits", tensor)], None)?;
    out.write_all(&file).with_context(|| format!("`{}`: cannot write", output.path.display()))?;
    Ok(out.commit()?)
}
