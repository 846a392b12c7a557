//! `slimllm logits`: the logits of each position, for comparing runtimes.

use std::io::Write;

use anyhow::{Context as _, Result};
use safetensors::{Dtype, tensor::TensorView};
use slim_formats::AtomicFile;

use crate::{args::LogitsArgs, open::check_target};

pub fn run(args: &LogitsArgs) -> Result<()> {
    args.execution.start()?;
    let source = args.model.open()?;
    check_target(&args.output, &source.files())?;
    let model = args.execution.load(&*source, args.tokens.len())?;
    let mut cache = model.new_cache(args.tokens.len())?;
    let hidden = model.forward(&args.tokens, &mut cache)?;
    let logits = model.logits(&hidden)?;

    let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
    let shape = vec![args.tokens.len(), model.config().vocab_size];
    let tensor = TensorView::new(Dtype::F32, shape, &bytes)?;
    let file = safetensors::serialize([("logits", tensor)], None)?;
    let mut out = AtomicFile::create(&args.output)?;
    out.write_all(&file).with_context(|| format!("`{}`: cannot write", args.output.display()))?;
    Ok(out.commit()?)
}
