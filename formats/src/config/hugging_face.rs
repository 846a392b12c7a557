//! Hyperparameters from `config.json` and `generation_config.json`.

use std::{cell::RefCell, collections::HashSet, path::Path};

use serde_json::{Value, json};

use super::{
    Features, GlobalHeads, Keys, LongRope, ModelConfig, Rope, Scaling, Yarn,
    keys::every,
    llama3::Llama3,
    rope::yarn_amplitude,
    rope_pairs,
    unread::{Unread, is_about, unread},
};
use crate::{
    FormatError, Generation, Result,
    arch::{self, Family},
    special_tokens::{SpecialTokens, TokenFiles, Vocabulary},
};

/// The kinds of blocks that a configuration may have, and whether they have a window.
const LAYER_TYPES: [(&str, bool); 2] = [("full_attention", false), ("sliding_attention", true)];

/// The kinds of blocks of models some of which have a state, and whether they have one.
const RECURRENT_TYPES: [(&str, bool); 3] =
    [("full_attention", false), ("linear_attention", true), ("conv", true)];

/// Characters of an unread value that a message shows.
const SHOWN_CHARACTERS: usize = 60;

impl ModelConfig {
    /// Reads the configuration of a model of a known family; `path` is that of `config.json`.
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
        let Some((family, kind)) = arch::by_model_type(model_type) else {
            let known = arch::FAMILIES.iter().flat_map(|family| family.hf_types());
            let known: Vec<&str> = known.map(|kind| kind.model_type).collect();
            let what = format!("model type `{model_type}`");
            return json.unsupported(what, &format!("supported are {}", known.join(", ")));
        };
        let json = Json { family: Some(family), ..json };
        refuse_other_classes(&json, kind.class)?;

        let hidden_size = json.size("hidden_size")?;
        let head_count = json.size("num_attention_heads")?;
        let kv_head_count = match model_type {
            "mistral" => json.size("num_key_value_heads")?,
            _ => json.optional_size("num_key_value_heads")?.unwrap_or(head_count),
        };
        let head_dim = match json.optional_size(family.hf_key("head_dim"))? {
            Some(head_dim) => head_dim,
            None => hidden_size.checked_div(head_count).unwrap_or(0),
        };
        let vocab_size = json.size("vocab_size")?;
        let context_length = json.size("max_position_embeddings")?;
        let local_pairs = rotated_pairs(&json, head_dim)?;
        let global_heads = match family.has_global_heads() {
            true => Some(GlobalHeads {
                head_dim: json.global_head_dim(head_dim)?,
                kv_heads: kv_head_count,
                values_are_keys: false,
            }),
            false => None,
        };
        let pairs = global_heads.map_or(local_pairs, |global| rope_pairs(global.head_dim));
        let ropes = Ropes { json: &json, family, pairs, local_pairs, context_length };
        let (rope, local_rope) = ropes.read()?;
        let guessing_blocks = json.optional_size("num_nextn_predict_layers")?.unwrap_or(0);
        let mut config = Self {
            family,
            name: None,
            block_count: json.size("num_hidden_layers")?,
            hidden_size,
            ffn_size: json.size(family.hf_key("intermediate_size"))?,
            head_count,
            kv_head_count,
            head_dim,
            vocab_size,
            context_length,
            norm_epsilon: json.require_number(family.hf_key("rms_norm_eps"))? as f32,
            rope,
            sliding_window: None,
            features: Features { local_rope, guessing_blocks, global_heads, ..Features::default() },
            tied_embeddings: json.flag("tie_word_embeddings")?,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            add_bos: false,
            generation: Generation::default(),
        };
        // What a family reads is as long as the model has blocks.
        config = config.validated(path)?;
        family.read(&json, &mut config)?;
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
        let (kind, key) = (self.family.hf_type(self), |key| self.family.hf_key(key));
        let activation = self.family.block(self, 0).activation();
        let token_ids = json!({
            "bos_token_id": self.bos_token_id,
            "eos_token_id": match self.eos_token_ids[..] {
                [] => Value::Null,
                [id] => id.into(),
                _ => self.eos_token_ids.clone().into(),
            },
        });
        let mut config = json!({
            "architectures": [kind.class],
            "model_type": kind.model_type,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "hidden_size": self.hidden_size,
            (key("intermediate_size")): self.ffn_size,
            "num_hidden_layers": self.block_count,
            "num_attention_heads": self.head_count,
            "num_key_value_heads": self.kv_head_count,
            (key("head_dim")): self.head_dim,
            (key("hidden_act")): activation.hf_names()[0],
            (key("rms_norm_eps")): shortest(self.norm_epsilon),
            "rope_theta": shortest(self.rope.theta),
            "rope_scaling": rope_scaling(path, &self.rope)?,
            "tie_word_embeddings": self.tied_embeddings,
            "attention_bias": self.features.has_attention_bias,
            "mlp_bias": self.features.has_ffn_bias,
            "bos_token_id": token_ids["bos_token_id"],
            "eos_token_id": token_ids["eos_token_id"],
        });
        if let Some(ropes) = self.ropes_by_kind(path)? {
            // Of the two spellings one, or readers would compare them.
            arch::leave_out(&mut config, &["rope_scaling"]);
            config["rope_parameters"] = ropes;
        }
        self.family.write(self, &mut config);
        let class_pad = self.family.default("pad_token_id");
        if class_pad.is_some_and(|id| id >= self.vocab_size as f64) {
            // An embedding with this row would be asked for.
            config["pad_token_id"] = Value::Null;
        }
        let mut generation_config = token_ids;
        for (key, value) in self.generation.to_hugging_face() {
            generation_config[key] = value;
        }
        Ok((config, generation_config))
    }
}

impl ModelConfig {
    /// `rope_parameters` of a model with another rotary embedding in blocks with a window.
    fn ropes_by_kind(&self, path: &Path) -> Result<Option<Value>> {
        let Some(local) = &self.features.local_rope else { return Ok(None) };
        let mut parameters = json!({});
        for ((kind, _), rope) in LAYER_TYPES.into_iter().zip([&self.rope, local]) {
            let mut one = rope_scaling(path, rope)?;
            if one.is_null() {
                one = json!({"rope_type": "default"});
            }
            one["rope_theta"] = shortest(rope.theta).into();
            parameters[kind] = one;
        }
        Ok(Some(parameters))
    }
}

/// The number with the fewest digits that is this f32: 1e-5, not 9.999999747378752e-6.
pub(crate) fn shortest(number: f32) -> f64 {
    number.to_string().parse().expect("a number was printed")
}

/// The old spelling, which older and newer readers know.
fn rope_scaling(path: &Path, rope: &Rope) -> Result<Value> {
    match &rope.scaling {
        Scaling::Factors => factors_scaling(path, rope),
        Scaling::Yarn(yarn) => Ok(json!({
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.context,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "truncate": yarn.truncate,
            "attention_factor": shortest(rope.amplitude),
        })),
        Scaling::Long(long) => Ok(json!({
            "rope_type": "longrope",
            "short_factor": numbers(&rope.factors),
            "long_factor": numbers(&long.factors),
            "original_max_position_embeddings": long.context,
            "attention_factor": shortest(rope.amplitude),
        })),
        Scaling::Dynamic { factor, .. } => {
            Ok(json!({"rope_type": "dynamic", "factor": shortest(*factor)}))
        }
    }
}

fn numbers(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(shortest).collect()
}

/// The kind of scaling that gives these factors.
fn factors_scaling(path: &Path, rope: &Rope) -> Result<Value> {
    match rope.linear_factor() {
        Some(1.0) => return Ok(Value::Null),
        Some(factor) => return Ok(json!({"rope_type": "linear", "factor": shortest(factor)})),
        None => {}
    }
    if let Some(turned) = rope.proportion() {
        let factor = turned as f64 / rope.factors.len() as f64;
        return Ok(json!({"rope_type": "proportional", "partial_rotary_factor": factor}));
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
fn refuse_other_classes(json: &Json<'_>, class: &str) -> Result<()> {
    let is_known =
        |value: &Value| value.as_str().is_some_and(|found| found.eq_ignore_ascii_case(class));
    match json.optional("architectures", "a list of classes", Value::as_array)? {
        Some(classes) if !classes.is_empty() && !classes.iter().any(is_known) => {
            json.unsupported(format!("the class {}", classes[0]), &format!("supported is {class}"))
        }
        _ => Ok(()),
    }
}

/// Pairs of channels of a head that are turned; of a head that [`ModelConfig::validated`] will
/// refuse, no more than memory can hold.
fn rotated_pairs(json: &Json<'_>, head_dim: usize) -> Result<usize> {
    let pairs = rope_pairs(head_dim);
    let Some(default) = json.default("partial_rotary_factor") else { return Ok(pairs) };
    let turned = json.optional_size("rotary_dim")?.map(|turned| turned as f64 / head_dim as f64);
    let stated = json.stated("partial_rotary_factor")?;
    let factor = stated.or(turned).unwrap_or(default);
    if !(factor > 0.0 && factor <= 1.0) {
        return Err(json.malformed("partial_rotary_factor", factor, "a part of 1"));
    }
    Ok((2.0 * pairs as f64 * factor) as usize / 2)
}

/// Reads rotary embeddings in the new spelling, one object `rope_parameters`, and the old one,
/// `rope_theta` beside `rope_scaling`. Releases of transformers differ in which they prefer, so
/// they must agree.
struct Ropes<'j, 'a> {
    json: &'j Json<'a>,
    family: &'static dyn Family,
    /// Turned pairs of channels of blocks that see all tokens.
    pairs: usize,
    /// Those of blocks with a window.
    local_pairs: usize,
    context_length: usize,
}

impl Ropes<'_, '_> {
    /// That of blocks that see all tokens, and that of blocks with a window, if it is another.
    fn read(&self) -> Result<(Rope, Option<Rope>)> {
        let json = self.json;
        let outer_theta = json.stated("rope_theta")?;
        let mut found: Option<(Rope, Option<Rope>)> = None;
        for key in ["rope_parameters", "rope_scaling"] {
            let object =
                json.optional(key, "an object", |value| value.is_object().then_some(value))?;
            let Some(object) = object.filter(|object| *object != &json!({})) else { continue };
            let ropes = self.read_objects(object, key, outer_theta)?;
            match &found {
                Some(first) if *first != ropes => {
                    let expected = "the same as in `rope_parameters`";
                    return Err(json.malformed("rope_scaling", object, expected));
                }
                _ => found = Some(ropes),
            }
        }
        let theta = outer_theta.unwrap_or_else(|| self.default_theta());
        let (global, local) = found.unwrap_or_else(|| {
            let global = match json.default("proportional_rotary_factor") {
                Some(factor) => Rope::proportional(theta as f32, self.pairs, factor),
                None => plain(theta, self.pairs),
            };
            (global, None)
        });
        if !self.family.has_local_rope() {
            return Ok((global, None));
        }
        let local_theta = json.number("rope_local_base_freq")?;
        let local = local.unwrap_or_else(|| {
            plain(local_theta.unwrap_or_else(|| global.theta.into()), self.local_pairs)
        });
        let local = Some(local).filter(|local| *local != global);
        Ok((global, local))
    }

    /// Reads the object under `key`: of one rotary embedding, or of one for each kind of block.
    fn read_objects(
        &self,
        object: &Value,
        key: &str,
        outer_theta: Option<f64>,
    ) -> Result<(Rope, Option<Rope>)> {
        let path = self.json.path;
        let kinds = LAYER_TYPES.map(|(kind, _)| object.get(kind).filter(|kind| kind.is_object()));
        match kinds {
            [Some(global), local] if self.family.has_local_rope() => {
                let pairs = self.pairs;
                let global = self.read_object(&Json::new(path, global), key, outer_theta, pairs)?;
                // The theta beside it is that of blocks that see all tokens.
                let local = local.map(|local| {
                    self.read_object(&Json::new(path, local), key, None, self.local_pairs)
                });
                Ok((global, local.transpose()?))
            }
            _ => {
                let object = Json::new(path, object);
                Ok((self.read_object(&object, key, outer_theta, self.pairs)?, None))
            }
        }
    }

    fn default_theta(&self) -> f64 {
        self.json.default("rope_theta").unwrap_or(10_000.0)
    }

    /// Reads the description `scaling` of one that turns `pairs`, in either spelling; `outer_theta`
    /// is that beside it.
    fn read_object(
        &self,
        scaling: &Json<'_>,
        key: &str,
        outer_theta: Option<f64>,
        pairs: usize,
    ) -> Result<Rope> {
        let theta = match (scaling.number("rope_theta")?, outer_theta) {
            (Some(inner), Some(outer)) if inner != outer => {
                let expected = format!("{inner} as in `{key}`");
                return Err(scaling.malformed("rope_theta", outer, expected));
            }
            (inner, outer) => inner.or(outer).unwrap_or_else(|| self.default_theta()),
        };
        let kind_of = |spelling| scaling.optional(spelling, "a string", Value::as_str);
        let kind = match (kind_of("rope_type")?, kind_of("type")?) {
            (Some(new), Some(old)) if new != old => {
                let expected = format!("`{new}` as in `rope_type`");
                return Err(scaling.malformed("type", format!("`{old}`"), expected));
            }
            (new, old) => new.or(old).unwrap_or("default"),
        };
        let has_short_factors = scaling.object.get("short_factor").is_some();
        let rope = match kind {
            "default" => plain(theta, pairs),
            "linear" => {
                let factor = scaling.require("factor", "a number", Value::as_f64)?;
                Rope::new(theta as f32, vec![factor as f32; pairs])
            }
            "proportional" => {
                let factor = scaling.number("partial_rotary_factor")?.unwrap_or(1.0);
                if !(factor > 0.0 && factor <= 1.0) {
                    return Err(scaling.malformed("partial_rotary_factor", factor, "a part of 1"));
                }
                Rope::proportional(theta as f32, pairs, factor)
            }
            "llama3" => Rope::new(theta as f32, llama3_factors(scaling, theta, pairs)?),
            // The old names of `longrope`, of the first Phi-3.
            "longrope" | "su" | "yarn" if has_short_factors => {
                self.long_rope(scaling, theta, pairs)?
            }
            "yarn" => self.yarn(scaling, theta, pairs)?,
            "dynamic" => {
                let factor = scaling.require("factor", "a number", Value::as_f64)? as f32;
                let scaling = Scaling::Dynamic { factor, context: self.context_length };
                Rope { scaling, ..plain(theta, pairs) }
            }
            other => return scaling.unsupported(format!("RoPE scaling `{other}`"), ""),
        };
        for (part, value) in scaling.unread() {
            let is_neutral = match part {
                // What the model was stretched from, which only some kinds of scaling ask.
                "original_max_position_embeddings" | "finetuned" => true,
                "partial_rotary_factor" | "llama_4_scaling_beta" => {
                    self.json.default(part).is_some()
                        || value.as_f64().is_some_and(|factor| is_about(factor, 1.0))
                }
                "factor" | "attention_factor" => {
                    value.as_f64().is_some_and(|factor| is_about(factor, 1.0))
                }
                _ => false,
            };
            if !is_neutral {
                let what = format!("key `{part}` of `{key}` with RoPE scaling `{kind}`: {value}");
                return scaling.unsupported(what, "");
            }
        }
        Ok(rope)
    }

    /// Tokens that the model had before it was stretched; what the model says counts more than
    /// what its `scaling` says.
    fn original_context(&self, scaling: &Json<'_>) -> Result<usize> {
        const KEY: &str = "original_max_position_embeddings";
        let inner = scaling.optional_size(KEY)?;
        Ok(self.json.optional_size(KEY)?.or(inner).unwrap_or(self.context_length))
    }

    fn yarn(&self, scaling: &Json<'_>, theta: f64, pairs: usize) -> Result<Rope> {
        let factor = scaling.require("factor", "a number", Value::as_f64)?;
        let truncate = scaling.optional("truncate", "true or false", Value::as_bool)?;
        let yarn = Yarn {
            factor,
            context: self.original_context(scaling)?,
            beta_fast: scaling.number("beta_fast")?.unwrap_or(32.0),
            beta_slow: scaling.number("beta_slow")?.unwrap_or(1.0),
            truncate: truncate.unwrap_or(true),
        };
        let mscale = scaling.number("mscale")?.filter(|&mscale| mscale != 0.0);
        let all_dims = scaling.number("mscale_all_dim")?.filter(|&mscale| mscale != 0.0);
        let amplitude = match (scaling.number("attention_factor")?, mscale, all_dims) {
            (Some(amplitude), ..) => amplitude,
            (None, Some(mscale), Some(all_dims)) => {
                yarn_amplitude(factor, mscale) / yarn_amplitude(factor, all_dims)
            }
            _ => yarn_amplitude(factor, 1.0),
        };
        Ok(Rope::yarn(theta as f32, pairs, yarn, amplitude as f32))
    }

    /// # Source
    /// `modeling_rope_utils.py::_compute_longrope_parameters` of transformers.
    fn long_rope(&self, scaling: &Json<'_>, theta: f64, pairs: usize) -> Result<Rope> {
        let factors = |key: &str| -> Result<Vec<f32>> {
            let list = scaling.require(key, "a list of numbers", Value::as_array)?;
            let values: Option<Vec<f32>> =
                list.iter().map(|value| value.as_f64().map(|value| value as f32)).collect();
            match values {
                Some(values) if values.len() == pairs => Ok(values),
                _ => {
                    let expected = format!("{pairs} numbers, one per turned pair");
                    Err(scaling.malformed(key, format!("{} entries", list.len()), expected))
                }
            }
        };
        let context = self.original_context(scaling)?;
        let stretch = scaling.number("factor")?;
        let stretch = stretch.unwrap_or(self.context_length as f64 / context as f64);
        let amplitude = match scaling.number("attention_factor")? {
            Some(amplitude) => amplitude,
            None if stretch <= 1.0 => 1.0,
            None => (1.0 + stretch.ln() / (context as f64).ln()).sqrt(),
        };
        let long = LongRope { factors: factors("long_factor")?, context };
        Ok(Rope {
            theta: theta as f32,
            factors: factors("short_factor")?,
            amplitude: amplitude as f32,
            scaling: Scaling::Long(long),
        })
    }
}

/// A rotary embedding without scaling.
fn plain(theta: f64, pairs: usize) -> Rope {
    Rope::new(theta as f32, vec![1.0; pairs])
}

fn llama3_factors(scaling: &Json<'_>, theta: f64, pairs: usize) -> Result<Vec<f32>> {
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
    Ok(llama3.factors(theta, pairs))
}

/// A JSON object, the file that it comes from, and which of its keys were asked for. A `null`
/// counts as absent.
struct Json<'a> {
    path: &'a Path,
    object: &'a Value,
    /// Whose class has defaults for absent keys.
    family: Option<&'static dyn Family>,
    asked: RefCell<HashSet<&'a str>>,
}

impl<'a> Json<'a> {
    fn new(path: &'a Path, object: &'a Value) -> Self {
        Self { path, object, family: None, asked: RefCell::default() }
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

    /// What the family's class takes for an absent key.
    fn default(&self, key: &str) -> Option<f64> {
        self.family?.default(key)
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let found = self.optional(key, "a whole number", as_size)?;
        Ok(found.or_else(|| self.default(key).map(|default| default as usize)))
    }

    fn size(&self, key: &str) -> Result<usize> {
        match self.optional_size(key)? {
            Some(size) => Ok(size),
            None => self.require(key, "a whole number", as_size),
        }
    }

    /// A number of the model, or of its rotary embedding.
    fn stated(&self, key: &str) -> Result<Option<f64>> {
        match self.optional(key, "a number", Value::as_f64)? {
            Some(number) => Ok(Some(number)),
            None => {
                let rope = ["rope_parameters", "rope_scaling"].map(|rope| self.object.get(rope));
                Ok(rope.into_iter().flatten().find_map(|rope| rope.get(key)?.as_f64()))
            }
        }
    }

    fn require_number(&self, key: &str) -> Result<f64> {
        match (self.get(key), self.default(key)) {
            (None, Some(default)) => Ok(default),
            _ => self.require(key, "a number", Value::as_f64),
        }
    }
}

impl Keys for Json<'_> {
    fn model_type(&self) -> Option<&str> {
        self.object.get("model_type")?.as_str()
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let is_null = self.object.get(key).is_some_and(Value::is_null);
        let default = self.default(key).filter(|_| !is_null);
        Ok(self.stated(key)?.or(default))
    }

    fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.said(key)?.unwrap_or(false))
    }

    fn unsupported(&self, what: String) -> FormatError {
        FormatError::unsupported(self.path, what, "")
    }

    fn said(&self, key: &str) -> Result<Option<bool>> {
        let found = self.optional(key, "true or false", Value::as_bool)?;
        Ok(found.or_else(|| self.default(key).map(|default| default != 0.0)))
    }

    fn count(&self, key: &str) -> Result<Option<usize>> {
        self.optional_size(key)
    }

    fn numbers(&self, key: &str) -> Result<Vec<usize>> {
        let kind = "a list of whole numbers";
        let list = self.optional(key, kind, |value| {
            value.as_array()?.iter().map(as_size).collect::<Option<Vec<usize>>>()
        })?;
        Ok(list.unwrap_or_default())
    }

    fn flags(&self, key: &str, blocks: usize) -> Result<Option<Vec<bool>>> {
        let Some(list) = self.optional(key, "a list", Value::as_array)? else { return Ok(None) };
        let flags = list.iter().map(|flag| flag.as_bool().or(flag.as_u64().map(|flag| flag != 0)));
        match flags.collect::<Option<Vec<bool>>>() {
            Some(flags) if flags.len() == blocks => Ok(Some(flags)),
            _ => {
                let expected = format!("{blocks} flags, one per block");
                Err(self.malformed(key, format!("{} entries", list.len()), expected))
            }
        }
    }

    fn windowed(&self, blocks: usize) -> Result<Option<Vec<bool>>> {
        let intervals = ["sliding_window_pattern", "_sliding_window_pattern"]
            .map(|key| self.optional(key, "a whole number", as_size));
        let Some(windowed) = self.layer_types("layer_types", blocks, &LAYER_TYPES)? else {
            for interval in intervals {
                if let Some(interval) = interval?.filter(|&interval| interval > 0) {
                    return Ok(Some(every(interval, blocks)));
                }
            }
            return Ok(None);
        };
        Ok(Some(windowed))
    }

    fn recurrent(&self, blocks: usize) -> Result<Option<Vec<bool>>> {
        self.layer_types("layer_types", blocks, &RECURRENT_TYPES)
    }

    fn sparse(&self, blocks: usize) -> Result<Option<Vec<bool>>> {
        self.layer_types("mlp_layer_types", blocks, &[("dense", false), ("sparse", true)])
    }

    /// The newer spelling says what is otherwise block by block, the older one for all.
    fn global_heads(&self, config: &ModelConfig) -> Result<GlobalHeads> {
        let base = (config.head_dim, config.kv_head_count);
        let values_are_keys = self.flag("attention_k_eq_v")?;
        let head_dim = self.optional_size("global_head_dim")?.unwrap_or(base.0);
        let kv_heads = self.optional_size("num_global_key_value_heads")?;
        let kv_heads = kv_heads.filter(|_| values_are_keys).unwrap_or(base.1);
        let old = GlobalHeads { head_dim, kv_heads, values_are_keys };
        let Some(of_blocks) = self.of_blocks()? else { return Ok(old) };
        let mut found = None;
        for index in 0..config.block_count {
            let own = match of_blocks.get(&index.to_string()) {
                None => base,
                Some(own) => {
                    let own = Json::new(self.path, own);
                    let head_dim = own.optional_size("head_dim")?.unwrap_or(base.0);
                    let kv_heads = own.optional_size("num_key_value_heads")?.unwrap_or(base.1);
                    if let Some((key, value)) = own.unread().next() {
                        let what = format!("key `{key}` of {value} for block {index}");
                        return self.unsupported(what, "");
                    }
                    (head_dim, kv_heads)
                }
            };
            let expected = if config.is_windowed(index) { base } else { *found.get_or_insert(own) };
            if own != expected {
                let what = format!("heads of block {index} unlike those of others of its kind");
                return self.unsupported(what, "");
            }
        }
        let (head_dim, kv_heads) = found.unwrap_or(base);
        Ok(GlobalHeads { head_dim, kv_heads, values_are_keys })
    }

    fn is_text(&self, key: &str, text: &str) -> Result<bool> {
        Ok(self.optional(key, "a string", Value::as_str)? == Some(text))
    }
}

impl Json<'_> {
    /// What some blocks have otherwise, by their numbers.
    fn of_blocks(&self) -> Result<Option<&serde_json::Map<String, Value>>> {
        self.optional("per_layer_config", "an object", Value::as_object)
    }

    /// Channels of heads of blocks without a window, before it is known which these are.
    fn global_head_dim(&self, head_dim: usize) -> Result<usize> {
        let Some(of_blocks) = self.of_blocks()? else {
            return Ok(self.optional_size("global_head_dim")?.unwrap_or(head_dim));
        };
        let other = of_blocks.values().find_map(|own| as_size(own.get("head_dim")?));
        Ok(other.unwrap_or(head_dim))
    }

    /// What `kinds` say of each block by its name in the list under `key`.
    fn layer_types(
        &self,
        key: &str,
        blocks: usize,
        kinds: &[(&str, bool)],
    ) -> Result<Option<Vec<bool>>> {
        let Some(list) = self.optional(key, "a list of kinds", Value::as_array)? else {
            return Ok(None);
        };
        if list.len() != blocks {
            let expected = format!("{blocks} kinds, one per block");
            return Err(self.malformed(key, format!("{} entries", list.len()), expected));
        }
        let flags = list.iter().map(|found| match kinds.iter().find(|(kind, _)| found == kind) {
            Some(&(_, flag)) => Ok(flag),
            None => self.unsupported(format!("key `{key}` with {found}"), ""),
        });
        flags.collect::<Result<_>>().map(Some)
    }
}

fn as_size(value: &Value) -> Option<usize> {
    value.as_u64()?.try_into().ok()
}
