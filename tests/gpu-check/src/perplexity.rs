//! The perplexity of a model on the CPU and on the device.

use std::{fs, path::Path, sync::Arc};

use anyhow::{Context, Result, ensure};
use slim_formats::{ModelSource, open_model};
use slim_kernels::{Cpu, KvType, cuda::Device};
use slim_runtime::{CudaSettings, InBatches, Model, Protocol, Tokenizer, evaluate};

use crate::report::{Bound, Report};

const CONTEXT: usize = 512;
/// Difference of the perplexities, in percent.
const MAX_DIFFERENCE: f64 = 0.2;

/// Evaluates the first `windows` windows of a text.
pub fn compare(
    device: &Arc<Device>,
    model: &Path,
    text: &Path,
    windows: usize,
    report: &mut Report,
) -> Result<()> {
    let source: Arc<dyn ModelSource> = open_model(model)?.into();
    let text =
        fs::read_to_string(text).with_context(|| format!("cannot read `{}`", text.display()))?;
    let tokens = Tokenizer::of(&*source)?.encode(&text.replace("\r\n", "\n"))?;
    let available = tokens.len() / CONTEXT;
    ensure!(windows <= available, "the text has {available} windows of {CONTEXT} tokens");
    let settings = CudaSettings {
        devices: vec![(0, Arc::clone(device))],
        blocks: Some(source.config().block_count),
        kv_type: KvType::F16,
        context: CONTEXT,
    };
    let protocol = Protocol { context: CONTEXT, windows };
    let mut perplexity = |name: &str, model: &Model| -> Result<f64> {
        let mut model = InBatches { model, batch: CONTEXT };
        let found = evaluate(&mut model, None, &tokens, protocol, |_, _| ())?.perplexity;
        let what = format!("perplexity, {windows} windows of {CONTEXT}: {name}");
        report.fact(&what, format!("{found:.5}"));
        Ok(found)
    };
    let on_device = perplexity("device", &Model::load_on_cuda(Arc::clone(&source), &settings)?)?;
    let on_cpu = perplexity("CPU", &Model::load(source, &Cpu)?)?;
    let difference = 100.0 * (on_device / on_cpu - 1.0).abs();
    let bound =
        Bound { text: format!("<= {MAX_DIFFERENCE} %"), is_kept: difference <= MAX_DIFFERENCE };
    report.tested("perplexity, difference", format!("{difference:.4} %"), &bound);
    Ok(())
}
