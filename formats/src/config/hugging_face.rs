//! Hyperparameters from `config.json` and `generation_config.json`.

use std::path::Path;

use serde_json::{Value, json};

use super::{ModelConfig, Rope, llama3::Llama3, rope_pairs};
use crate::{FormatError, Result, arch};

/// What the `llama` and `mistral` classes of transformers take when `rope_theta` is absent.
const DEFAULT_ROPE_THETA: f64 = 10000.0;

impl ModelConfig {
    /// Reads the configuration of a `llama` or `mistral` model; `path` is that of `config.json`.
    ///
    /// `add_bos` is false: `tokenizer.json` itself says which tokens to add. The end tokens are those of
    /// `generation_config` if it has any.
    ///
    /// # Errors
    /// `Malformed` if a key is missing or has a value of the wrong kind, `Unsupported` if the model
    /// needs what this program does not compute.
    pub fn from_hugging_face(
        path: &Path,
        config: &Value,
        generation_config: Option<&Value>,
    ) -> Result<Self> {
        let json = Json { path, object: config };
        let model_type = json.require("model_type", "a string", Value::as_str)?;
        let Some(family) = arch::by_model_type(model_type) else {
            let known = arch::FAMILIES.iter().flat_map(|family| family.model_types());
            let known = known.copied().collect::<Vec<_>>().join(", ");
            let what = format!("model type `{model_type}`");
            return json.unsupported(what, &format!("supported are {known}"));
        };
        refuse_variants(&json)?;

        let hidden_size = json.size("hidden_size")?;
        let head_count = json.size("num_attention_heads")?;
        let kv_head_count = match model_type {
            "llama" => json.optional_size("num_key_value_heads")?.unwrap_or(head_count),
            _ => json.size("num_key_value_heads")?,
        };
        let head_dim = match json.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None => hidden_size.checked_div(head_count).unwrap_or(0),
        };
        let sliding_window = match model_type {
            "mistral" => json.optional_size("sliding_window")?,
            _ => None,
        };
        let generation = generation_config.map(|object| Json { path, object });
        let token_ids = |key| -> Result<Vec<u32>> {
            match generation.as_ref().map(|json| json.token_ids(key)).transpose()? {
                Some(ids) if !ids.is_empty() => Ok(ids),
                _ => json.token_ids(key),
            }
        };
        let config = Self {
            family,
            name: None,
            block_count: json.size("num_hidden_layers")?,
            hidden_size,
            ffn_size: json.size("intermediate_size")?,
            head_count,
            kv_head_count,
            head_dim,
            vocab_size: json.size("vocab_size")?,
            context_length: json.size("max_position_embeddings")?,
            norm_epsilon: json.require("rms_norm_eps", "a number", Value::as_f64)? as f32,
            rope: read_rope(&json, head_dim)?,
            sliding_window,
            tied_embeddings: json.flag("tie_word_embeddings")?,
            bos_token_id: token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: token_ids("eos_token_id")?,
            add_bos: false,
        };
        config.validated(path)
    }

    /// What [`from_hugging_face`](Self::from_hugging_face) reads back: `config.json`, without its element type, and
    /// `generation_config.json`. `path` is that of the model, for messages.
    ///
    /// # Errors
    /// `Unsupported` for RoPE factors that are none of Hugging Face's kinds of scaling.
    pub fn to_hugging_face(&self, path: &Path) -> Result<(Value, Value)> {
        let (model_type, class) = match self.sliding_window {
            None => ("llama", "LlamaForCausalLM"),
            Some(_) => ("mistral", "MistralForCausalLM"),
        };
        let token_ids = json!({
            "bos_token_id": self.bos_token_id,
            "eos_token_id": match self.eos_token_ids[..] {
                [] => Value::Null,
                [id] => id.into(),
                _ => self.eos_token_ids.clone().into(),
            },
        });
        let mut config = json!({
            "architectures": [class],
            "model_type": model_type,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_hidden_layers": self.block_count,
            "num_attention_heads": self.head_count,
            "num_key_value_heads": self.kv_head_count,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": shortest(self.norm_epsilon),
            "rope_theta": shortest(self.rope.theta),
            "rope_scaling": rope_scaling(path, &self.rope)?,
            "tie_word_embeddings": self.tied_embeddings,
            "attention_bias": false,
            "mlp_bias": false,
            "bos_token_id": token_ids["bos_token_id"],
            "eos_token_id": token_ids["eos_token_id"],
        });
        if let Some(window) = self.sliding_window {
            config["sliding_window"] = window.into();
        }
        Ok((config, token_ids))
    }
}

/// The number with the fewest digits that is this f32: 1e-5, not 9.999999747378752e-6.
fn shortest(number: f32) -> f64 {
    number.to_string().parse().expect("a number was printed")
}

/// The old spelling, which older and newer readers know.
fn rope_scaling(path: &Path, rope: &Rope) -> Result<Value> {
    if rope.is_unscaled() {
        return Ok(Value::Null);
    }
    let first = rope.factors[0];
    if rope.factors.iter().all(|&factor| factor == first) {
        return Ok(json!({"rope_type": "linear", "factor": shortest(first)}));
    }
    let Some(llama3) = Llama3::of(rope) else {
        let what = "RoPE factors of another kind than `linear` and `llama3` in `config.json`";
        return Err(FormatError::unsupported(path, what, "GGUF holds any factors"));
    };
    Ok(json!({
        "rope_type": "llama3",
        "factor": llama3.factor,
        "low_freq_factor": llama3.low,
        "high_freq_factor": llama3.high,
        "original_max_position_embeddings": llama3.original_context as u64,
    }))
}

/// Refuses what changes the computation and is not implemented.
fn refuse_variants(json: &Json<'_>) -> Result<()> {
    for key in ["attention_bias", "mlp_bias"] {
        if json.flag(key)? {
            return json.unsupported(format!("`{key}`"), "");
        }
    }
    if let Some(activation) = json.optional("hidden_act", "a string", Value::as_str)?
        && activation != "silu"
    {
        return json.unsupported(format!("the activation `{activation}`"), "");
    }
    if json.optional("quantization_config", "an object", Value::as_object)?.is_some() {
        return json
            .unsupported("an already quantized model", "start from the model it was made from");
    }
    Ok(())
}

/// Reads the new spelling, one object `rope_parameters`, or the old one, `rope_theta` beside `rope_scaling`.
fn read_rope(json: &Json<'_>, head_dim: usize) -> Result<Rope> {
    let key = if json.has("rope_parameters") { "rope_parameters" } else { "rope_scaling" };
    let nothing = Value::Null;
    let object = json.optional(key, "an object", |value| value.is_object().then_some(value))?;
    let scaling = Json { path: json.path, object: object.unwrap_or(&nothing) };

    let theta = match scaling.number("rope_theta")? {
        Some(theta) => theta,
        None => json.number("rope_theta")?.unwrap_or(DEFAULT_ROPE_THETA),
    };
    for part in [json, &scaling] {
        if part.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
            return json.unsupported("`partial_rotary_factor` other than 1", "");
        }
    }
    let kind_key = if scaling.has("rope_type") { "rope_type" } else { "type" };
    let kind = scaling.optional(kind_key, "a string", Value::as_str)?;
    let factors = match kind.unwrap_or("default") {
        "default" => vec![1.0; rope_pairs(head_dim)],
        "linear" => {
            let factor = scaling.require("factor", "a number", Value::as_f64)?;
            vec![factor as f32; rope_pairs(head_dim)]
        }
        "llama3" => llama3_factors(&scaling, theta, head_dim)?,
        other => return json.unsupported(format!("RoPE scaling `{other}`"), ""),
    };
    Ok(Rope { theta: theta as f32, factors })
}

fn llama3_factors(scaling: &Json<'_>, theta: f64, head_dim: usize) -> Result<Vec<f32>> {
    let number = |key| scaling.require(key, "a number", Value::as_f64);
    let llama3 = Llama3 {
        factor: number("factor")?,
        low: number("low_freq_factor")?,
        high: number("high_freq_factor")?,
        original_context: number("original_max_position_embeddings")?,
    };
    if llama3.high <= llama3.low {
        let expected = format!("more than `low_freq_factor`, {}", llama3.low);
        return Err(scaling.malformed("high_freq_factor", llama3.high, expected));
    }
    Ok(llama3.factors(theta, rope_pairs(head_dim)))
}

/// A JSON object and the file that it comes from. A `null` counts as absent.
struct Json<'a> {
    path: &'a Path,
    object: &'a Value,
}

impl<'a> Json<'a> {
    fn malformed(
        &self,
        key: &str,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> FormatError {
        FormatError::malformed(self.path, format!("key `{key}`"), "", found, expected)
    }

    fn unsupported<T>(&self, what: impl Into<String>, hint: &str) -> Result<T> {
        Err(FormatError::unsupported(self.path, what, hint))
    }

    fn has(&self, key: &str) -> bool {
        self.object.get(key).is_some_and(|value| !value.is_null())
    }

    /// The value that `read` accepts as `kind`, `None` if the key is absent.
    fn optional<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.object.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.malformed(key, value, kind)),
        }
    }

    fn require<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<T> {
        self.optional(key, kind, read)?.ok_or_else(|| self.malformed(key, "none", kind))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.optional(key, "a whole number", as_size)
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.require(key, "a whole number", as_size)
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, "a number", Value::as_f64)
    }

    fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.optional(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// One token id or a list of them; none if the key is absent.
    fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let read = |value: &Value| match value {
            Value::Array(ids) => ids.iter().map(as_token_id).collect(),
            id => as_token_id(id).map(|id| vec![id]),
        };
        Ok(self.optional(key, "token ids", read)?.unwrap_or_default())
    }
}

fn as_size(value: &Value) -> Option<usize> {
    value.as_u64()?.try_into().ok()
}

fn as_token_id(value: &Value) -> Option<u32> {
    value.as_u64()?.try_into().ok()
}
