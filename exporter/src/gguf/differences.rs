//! Where llama.cpp computes something else than the model does.

use slim_formats::{Decoder, ModelConfig, ModelSource, Scaling, arch::Mixer};

/// What it would compute wrongly from the first token on.
pub(crate) fn lacks(model: &dyn ModelSource) -> Option<String> {
    let (config, decoder) = (model.config(), model.decoder());
    let Some(computed) = config.family.in_llama_cpp(config) else {
        let architecture = config.family.architecture();
        return Some(format!("an `{architecture}` model, for which it has no code,"));
    };
    if config.rope.scaling == Scaling::Factors && computed.rope.factors != config.rope.factors {
        return Some("a model with a RoPE factor for each pair of channels".into());
    }
    let computed = Decoder::new(&computed);
    let mut blocks = decoder.blocks.iter().zip(&computed.blocks).enumerate();
    blocks.find_map(|(index, (block, computed))| {
        if let Mixer::Latent(_) = block.mixer {
            return Some("latent attention, whose keys it has in another order,".into());
        }
        let (Some(own), Some(theirs)) = (block.attention(), computed.attention()) else {
            let reordered = "value heads in another order than in files for llama.cpp";
            return (block.mixer != computed.mixer)
                .then(|| format!("block {index}, which has {reordered},"));
        };
        if (own.scale - theirs.scale).abs() > 1e-5 * own.scale {
            return Some(format!("attention scaled by {} instead of {}", own.scale, theirs.scale));
        }
        if own.rope.is_some() != theirs.rope.is_some() {
            let turns = if own.rope.is_some() { "has" } else { "lacks" };
            return Some(format!("block {index}, which {turns} a rotary embedding,"));
        }
        if block.activation() != computed.activation() {
            return Some(format!("block {index}, whose neurons are clamped at other numbers,"));
        }
        if block.experts != computed.experts {
            return Some(format!("block {index}, whose experts have other weights,"));
        }
        let mut biases = block.vectors().filter(|&part| !computed.has(part));
        biases.next().map(|part| format!("a model with `{}`", part.gguf_name()))
    })
}

/// What it computes otherwise for long texts.
pub(crate) fn warnings(config: &ModelConfig) -> Vec<String> {
    let computed = config.family.in_llama_cpp(config).unwrap_or_else(|| config.clone());
    let window = config.sliding_window.filter(|&window| window < config.context_length);
    let window = window.filter(|_| computed.sliding_window.is_none()).map(|window| {
        format!(
            "llama.cpp attends to all tokens: texts longer than the sliding window of {window} \
             tokens will differ"
        )
    });
    let rope = (computed.rope != config.rope).then(|| match config.rope.scaling {
        Scaling::Dynamic { context, .. } => format!(
            "llama.cpp does not know RoPE scaling `dynamic`: texts longer than {context} tokens \
             will differ"
        ),
        _ => "llama.cpp rounds the limits of YaRN: what it computes will differ somewhat".into(),
    });
    window.into_iter().chain(rope).collect()
}
