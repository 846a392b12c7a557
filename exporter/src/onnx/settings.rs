//! The settings of ONNX Runtime GenAI.

use serde_json::{Value, json};
use slim_formats::ModelConfig;

use super::decoder::context_length;

/// Hugging Face's types that GenAI runs as plain decoders under the same name. It does so with a
/// `phi3`, too, but throws its cache away at 4,097 tokens: these graphs have one table of angles.
///
/// # Source
/// `src/models/model_type.h` and `src/generators.cpp` of onnxruntime-genai.
const DECODERS: [&str; 8] =
    ["gemma2", "gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3", "smollm3"];

/// GenAI's type for a model: its own, or else that of any decoder.
fn model_type(config: &ModelConfig) -> &'static str {
    let own = config.family.hf_type(config).model_type;
    if DECODERS.contains(&own) { own } else { "decoder" }
}

/// `genai_config.json`: where ONNX Runtime GenAI finds what in the graph, and how it samples.
pub fn genai_config(config: &ModelConfig) -> Value {
    let context = context_length(config);
    let ids = &config.eos_token_ids;
    let mut settings = json!({
        "model": {
            "type": model_type(config),
            "vocab_size": config.vocab_size,
            "context_length": context,
            "eos_token_id": ids,
            // GenAI asks for one; only batches of texts of different lengths have use for it.
            "pad_token_id": ids.first().or(config.bos_token_id.as_ref()).unwrap_or(&0),
            "decoder": {
                "session_options": { "log_id": "onnxruntime-genai", "provider_options": [] },
                "filename": "model.onnx",
                "hidden_size": config.hidden_size,
                "head_size": config.head_dim,
                "num_attention_heads": config.head_count,
                "num_key_value_heads": config.kv_head_count,
                "num_hidden_layers": config.block_count,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": false,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": true,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    });
    // Settings that it does not know would be refused.
    for (key, value) in config.generation.to_hugging_face() {
        if let Some(known) = settings["search"].get_mut(key) {
            *known = value;
        }
    }
    // `null` would be refused.
    if let Some(id) = config.bos_token_id {
        settings["model"]["bos_token_id"] = id.into();
    }
    settings
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use slim_formats::open_model;

    use super::*;

    #[test]
    fn genai_config_has_the_numbers_of_the_model_and_no_nulls() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/archs/llama");
        let mut config = open_model(&folder).unwrap().config().clone();
        let model = |config: &ModelConfig| genai_config(config)["model"].take();
        let found = model(&config);
        assert_eq!(found["context_length"], 512);
        assert_eq!(found["bos_token_id"], 267);
        assert_eq!(found["eos_token_id"], json!([268, 270]));
        assert_eq!(found["decoder"]["num_key_value_heads"], 2);
        assert_eq!(found["decoder"]["head_size"], 16);
        config.bos_token_id = None;
        config.context_length = 1 << 30;
        assert_eq!(model(&config).get("bos_token_id"), None);
        assert_eq!(model(&config)["context_length"], 1 << 17);
    }

    #[test]
    fn genai_config_names_a_type_that_genai_knows() {
        for (name, expected) in [
            ("gemma3", "gemma3_text"),
            ("mistral-swa", "mistral"),
            ("phi3", "decoder"),
            ("olmo2", "decoder"),
            ("opt", "decoder"),
        ] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/archs");
            let model = open_model(&folder.join(name)).unwrap();
            assert_eq!(genai_config(model.config())["model"]["type"], expected, "{name}");
        }
    }

    #[test]
    fn genai_config_samples_as_the_model_wants_where_genai_can() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/archs/llama");
        let mut config = open_model(&folder).unwrap().config().clone();
        assert_eq!(genai_config(&config)["search"]["do_sample"], false);
        config.generation.temperature = Some(0.6);
        config.generation.min_p = Some(0.1);
        let search = &genai_config(&config)["search"];
        assert_eq!((&search["do_sample"], &search["temperature"]), (&json!(true), &json!(0.6)));
        assert_eq!(search.get("min_p"), None);
    }
}
