//! Hyperparameters from `config.json` and `generation_config.json`.

use std::{cell::RefCell, collections::HashSet, path::Path};

use serde_json::{Value, json};

use super::{
    ModelConfig, Rope,
    keys::{Unread, is_about, unread},
    llama3::Llama3,
    rope_pairs,
};
use crate::{
    FormatError, Generation, Result, arch,
    special_tokens::{SpecialTokens, TokenFiles, Vocabulary},
};

/// What the `llama` and `mistral` classes of transformers take when `rope_theta` is absent.
const DEFAULT_ROPE_THETA: f64 = 10000.0;

/// Characters of an unread value that a message shows.
const SHOWN_CHARACTERS: usize = 60;

impl ModelConfig {
    /// Reads the configuration of a `llama` or `mistral` model; `path` is that of `config.json`.
    ///
    /// The special tokens are what these two files say of them; those of a tokenizer say more.
    /// `generation` is empty and the caller's to set ([`Generation::from_hugging_face`]).
    /// `warnings` gets a sentence for each key that nobody knows.
    ///
    /// # Errors
    /// `Malformed` if a key is missing, has a value of the wrong kind, or contradicts its other
    /// spelling; `Unsupported` if the model needs what this program does not compute: by its type,
    /// its class, or any key that changes the computation.
    pub fn from_hugging_face(
        path: &Path,
        config: &Value,
        generation_config: Option<&Value>,
        warnings: &mut Vec<String>,
    ) -> Result<Self> {
        let json = Json::new(path, config);
        let model_type = json.require("model_type", "a string", Value::as_str)?;
        let Some(family) = arch::by_model_type(model_type) else {
            let known = arch::FAMILIES.iter().flat_map(|family| family.model_types());
            let known = known.copied().collect::<Vec<_>>().join(" and ");
            let what = format!("model type `{model_type}`");
            return json.unsupported(what, &format!("supported are {known}"));
        };
        refuse_other_classes(&json, model_type)?;

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
        let vocab_size = json.size("vocab_size")?;
        let mut config = Self {
            family,
            name: None,
            block_count: json.size("num_hidden_layers")?,
            hidden_size,
            ffn_size: json.size("intermediate_size")?,
            head_count,
            kv_head_count,
            head_dim,
            vocab_size,
            context_length: json.size("max_position_embeddings")?,
            norm_epsilon: json.require("rms_norm_eps", "a number", Value::as_f64)? as f32,
            rope: read_rope(&json, head_dim)?,
            sliding_window,
            tied_embeddings: json.flag("tie_word_embeddings")?,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            add_bos: false,
            generation: Generation::default(),
        };
        let files = TokenFiles::of_model(json.object, generation_config);
        SpecialTokens::from_hugging_face(path, &files, &Vocabulary::default(), vocab_size)?
            .describe(&mut config);
        let config = config.validated(path)?;
        json.judge_unread(&config, model_type, warnings)?;
        Ok(config)
    }

    /// What [`from_hugging_face`](Self::from_hugging_face) reads back: `config.json`, without its
    /// element type, and `generation_config.json`. `path` is that of the model, for messages.
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
        let mut generation_config = token_ids;
        for (key, value) in self.generation.to_hugging_face() {
            generation_config[key] = value;
        }
        Ok((config, generation_config))
    }
}

/// The number with the fewest digits that is this f32: 1e-5, not 9.999999747378752e-6.
pub(crate) fn shortest(number: f32) -> f64 {
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

/// Refuses classes that end in something else than an output projection to tokens.
fn refuse_other_classes(json: &Json<'_>, model_type: &str) -> Result<()> {
    let class_of = |value: &Value| {
        value
            .as_str()
            .is_some_and(|class| class.eq_ignore_ascii_case(&format!("{model_type}ForCausalLM")))
    };
    match json.optional("architectures", "a list of classes", Value::as_array)? {
        Some(classes) if !classes.is_empty() && !classes.iter().any(class_of) => {
            let hint = "supported are LlamaForCausalLM and MistralForCausalLM";
            json.unsupported(format!("the class {}", classes[0]), hint)
        }
        _ => Ok(()),
    }
}

/// Reads the new spelling, one object `rope_parameters`, and the old one, `rope_theta` beside
/// `rope_scaling`. Releases of transformers differ in which they prefer, so they must agree.
fn read_rope(json: &Json<'_>, head_dim: usize) -> Result<Rope> {
    let outer_theta = json.number("rope_theta")?;
    let mut found: Option<Rope> = None;
    for key in ["rope_parameters", "rope_scaling"] {
        let object = json.optional(key, "an object", |value| value.is_object().then_some(value))?;
        let Some(object) = object.filter(|object| *object != &json!({})) else { continue };
        let rope = read_rope_object(&Json::new(json.path, object), key, outer_theta, head_dim)?;
        match &found {
            Some(first) if *first != rope => {
                let expected = "the same as in `rope_parameters`";
                return Err(json.malformed("rope_scaling", object, expected));
            }
            _ => found = Some(rope),
        }
    }
    Ok(found.unwrap_or_else(|| Rope {
        theta: outer_theta.unwrap_or(DEFAULT_ROPE_THETA) as f32,
        factors: vec![1.0; rope_pairs(head_dim)],
    }))
}

/// Reads the object under `key`, in either spelling; `outer_theta` is that beside it.
fn read_rope_object(
    scaling: &Json<'_>,
    key: &str,
    outer_theta: Option<f64>,
    head_dim: usize,
) -> Result<Rope> {
    let theta = match (scaling.number("rope_theta")?, outer_theta) {
        (Some(inner), Some(outer)) if inner != outer => {
            let expected = format!("{inner} as in `{key}`");
            return Err(scaling.malformed("rope_theta", outer, expected));
        }
        (inner, outer) => inner.or(outer).unwrap_or(DEFAULT_ROPE_THETA),
    };
    let kind_of = |spelling| scaling.optional(spelling, "a string", Value::as_str);
    let kind = match (kind_of("rope_type")?, kind_of("type")?) {
        (Some(new), Some(old)) if new != old => {
            let expected = format!("`{new}` as in `rope_type`");
            return Err(scaling.malformed("type", format!("`{old}`"), expected));
        }
        (new, old) => new.or(old).unwrap_or("default"),
    };
    let factors = match kind {
        "default" => vec![1.0; rope_pairs(head_dim)],
        "linear" => {
            let factor = scaling.require("factor", "a number", Value::as_f64)?;
            vec![factor as f32; rope_pairs(head_dim)]
        }
        "llama3" => llama3_factors(scaling, theta, head_dim)?,
        other => return scaling.unsupported(format!("RoPE scaling `{other}`"), ""),
    };
    for (part, value) in scaling.unread() {
        let is_neutral = match part {
            // What the model was stretched from, which only some kinds of scaling ask.
            "original_max_position_embeddings" | "finetuned" => true,
            "factor" | "partial_rotary_factor" | "attention_factor" => {
                value.as_f64().is_some_and(|factor| is_about(factor, 1.0))
            }
            _ => false,
        };
        if !is_neutral {
            let what = format!("key `{part}` of `{key}` with RoPE scaling `{kind}`: {value}");
            return scaling.unsupported(what, "");
        }
    }
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

/// A JSON object, the file that it comes from, and which of its keys were asked for. A `null`
/// counts as absent.
struct Json<'a> {
    path: &'a Path,
    object: &'a Value,
    asked: RefCell<HashSet<&'a str>>,
}

impl<'a> Json<'a> {
    fn new(path: &'a Path, object: &'a Value) -> Self {
        Self { path, object, asked: RefCell::default() }
    }

    /// The value of a key, which counts as read from then on.
    fn get(&self, key: &str) -> Option<&'a Value> {
        let (key, value) = self.object.as_object()?.get_key_value(key)?;
        self.asked.borrow_mut().insert(key);
        (!value.is_null()).then_some(value)
    }

    /// What no [`get`](Self::get) asked for.
    fn unread(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let entries = self.object.as_object().into_iter().flatten();
        entries
            .map(|(key, value)| (key.as_str(), value))
            .filter(|(key, value)| !value.is_null() && !self.asked.borrow().contains(key))
    }

    /// Refuses unread keys that change the computation, and warns of those that nobody knows.
    fn judge_unread(
        &self,
        model: &ModelConfig,
        model_type: &str,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        for (key, value) in self.unread() {
            let shown: String = value.to_string().chars().take(SHOWN_CHARACTERS).collect();
            match unread(key, value, model) {
                Unread::Harmless => {}
                Unread::Changes => {
                    let what = format!("key `{key}` of {shown} in a {model_type} model");
                    return self.unsupported(what, "");
                }
                Unread::Unknown => warnings.push(format!(
                    "`{}`: key `{key}` of {shown} is not read: it is unknown in a {model_type} model",
                    self.path.display()
                )),
            }
        }
        Ok(())
    }

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

    /// The value that `read` accepts as `kind`, `None` if the key is absent.
    fn optional<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let value = self.get(key);
        value.map(|value| read(value).ok_or_else(|| self.malformed(key, value, kind))).transpose()
    }

    fn require<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<T> {
        self.optional(key, kind, read)?.ok_or_else(|| {
            let hint = "copy the file from the model's repository again, or add the key";
            self.malformed(key, "none", kind).with_hint(hint)
        })
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
}

fn as_size(value: &Value) -> Option<usize> {
    value.as_u64()?.try_into().ok()
}
