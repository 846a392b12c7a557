//! What chats and completions have in common: how texts are drawn, and when they end.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value as Json, json};
use slim_runtime::{Sampler, SamplerSettings, random_seed};

use super::{ApiError, Limits, fields::Fields};
use crate::{engine::Penalties, grammar::Form, served::Served};

/// Texts that end a text, at most.
const MAX_STOPS: usize = 16;

/// Bytes of one of them, at most.
const MAX_STOP_BYTES: usize = 256;

/// Entries of `logit_bias`, at most.
const MAX_BIASES: usize = 1024;

/// The most likely tokens that are told with each.
pub const MAX_LIKELY: usize = 20;

/// Fields of OpenAI's API that change nothing here.
const WITHOUT_EFFECT: [&str; 7] = [
    "user",
    "store",
    "metadata",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
];

/// How the texts of a request are written.
pub struct Parameters {
    /// Texts of each prompt.
    pub n: usize,
    pub stream: bool,
    pub include_usage: bool,
    /// Tokens of each text, at most.
    pub limit: Option<usize>,
    pub stops: Vec<String>,
    pub penalties: Penalties,
    /// The form of the texts, and the field that asked for it.
    pub form: Option<Form>,
    pub form_name: &'static str,
    /// As in [`crate::engine::Draw`].
    pub likely: Option<usize>,
    /// Whether the texts are to be the same each time: the request has a seed.
    pub are_repeatable: bool,
    settings: SamplerSettings,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
    /// Of no use between machines that trust each other.
    #[serde(default, rename = "include_obfuscation")]
    _include_obfuscation: bool,
}

impl Parameters {
    /// # Errors
    /// A field that cannot be used.
    pub fn take(fields: &mut Fields, served: &Served, limits: &Limits) -> Result<Self, ApiError> {
        fields.ignore(&WITHOUT_EFFECT);
        let options = fields.take::<StreamOptions>("stream_options")?;
        let (form, form_name) = match fields.take("grammar")? {
            Some(text) => (Some(Form::Lark(text)), "grammar"),
            None => (None, "response_format"),
        };
        let seed = fields.take::<i64>("seed")?.map(|seed| seed as u64);
        let limit = fields.take_in("max_tokens", 0..=limits.context)?;
        Ok(Self {
            n: fields.take_in("n", 1..=limits.parallel)?.unwrap_or(1),
            stream: fields.take("stream")?.unwrap_or(false),
            include_usage: options.is_some_and(|options| options.include_usage),
            limit: fields.take_in("max_completion_tokens", 0..=limits.context)?.or(limit),
            stops: stops(fields)?,
            penalties: penalties(fields)?,
            form,
            form_name,
            likely: None,
            are_repeatable: seed.is_some(),
            settings: settings(fields, seed, served)?,
        })
    }

    /// Takes `response_format`.
    ///
    /// # Errors
    /// If it is none that is known, or if there is a `grammar` besides.
    pub fn take_response_format(&mut self, fields: &mut Fields) -> Result<(), ApiError> {
        const NAME: &str = "response_format";
        let Some(format) = fields.take::<Json>(NAME)? else { return Ok(()) };
        let form = match format["type"].as_str() {
            Some("text") => return Ok(()),
            Some("json_object") => Form::Json(json!({"type": "object"})),
            Some("json_schema") => match &format["json_schema"]["schema"] {
                schema @ (Json::Object(_) | Json::Bool(_)) => Form::Json(schema.clone()),
                _ => return Err(ApiError::value(NAME, "`json_schema.schema` is no schema")),
            },
            _ => {
                let expected = "`type`: expected `text`, `json_object` or `json_schema`";
                return Err(ApiError::value(NAME, expected));
            }
        };
        self.set_form(form, NAME)
    }

    /// # Errors
    /// If another field asks for a form already.
    pub fn set_form(&mut self, form: Form, name: &'static str) -> Result<(), ApiError> {
        if self.form.is_some() {
            let message = format!("`{}` asks for another form already", self.form_name);
            return Err(ApiError::value(name, message));
        }
        (self.form, self.form_name) = (Some(form), name);
        Ok(())
    }

    /// What draws the tokens of one of the texts.
    ///
    /// # Errors
    /// A setting outside its range.
    pub fn sampler(&self, choice: usize, served: &Served) -> Result<Sampler, ApiError> {
        let seed = self.settings.seed.wrapping_add(choice as u64);
        let sampler = Sampler::new(SamplerSettings { seed, ..self.settings.clone() })
            .map_err(|error| ApiError::bad(error.to_string()))?;
        let rows = served.model().config().vocab_size;
        Ok(sampler.limited_to(served.tokenizer().vocab_size(), rows))
    }
}

fn settings(
    fields: &mut Fields,
    seed: Option<u64>,
    served: &Served,
) -> Result<SamplerSettings, ApiError> {
    let temperature = fields.take_in("temperature", 0.0..=2.0)?;
    let base = SamplerSettings::at(temperature, &served.model().config().generation);
    Ok(SamplerSettings {
        top_p: fields.take_in("top_p", 0.0..=1.0)?.unwrap_or(base.top_p),
        top_k: fields.take("top_k")?.unwrap_or(base.top_k),
        min_p: fields.take_in("min_p", 0.0..=1.0)?.unwrap_or(base.min_p),
        repeat_penalty: fields
            .take_in("repeat_penalty", 0.01..=100.0)?
            .unwrap_or(base.repeat_penalty),
        seed: seed.unwrap_or_else(random_seed),
        ..base
    })
}

fn penalties(fields: &mut Fields) -> Result<Penalties, ApiError> {
    const BIAS: &str = "logit_bias";
    let biases = fields.take::<BTreeMap<String, f32>>(BIAS)?.unwrap_or_default();
    if biases.len() > MAX_BIASES {
        let message = format!("found {} tokens, expected {MAX_BIASES} at most", biases.len());
        return Err(ApiError::value(BIAS, message));
    }
    let bias = biases.into_iter().map(|(token, bias)| match (token.parse(), bias) {
        (Ok(token), -100.0..=100.0) => Ok((token, bias)),
        _ => {
            let message = format!("found {token:?}: {bias}, expected a token and -100 to 100");
            Err(ApiError::value(BIAS, message))
        }
    });
    Ok(Penalties {
        presence: fields.take_in("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency: fields.take_in("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        bias: bias.collect::<Result<_, _>>()?,
    })
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.take("stop")? {
        None => Vec::new(),
        Some(OneOrMany::One(stop)) => vec![stop],
        Some(OneOrMany::Many(stops)) => stops,
    };
    if stops.len() > MAX_STOPS {
        let message = format!("found {} texts, expected {MAX_STOPS} at most", stops.len());
        return Err(ApiError::value("stop", message));
    }
    match stops.iter().find(|stop| !(1..=MAX_STOP_BYTES).contains(&stop.len())) {
        None => Ok(stops),
        Some(stop) => {
            let message =
                format!("found a text of {} bytes, expected 1 to {MAX_STOP_BYTES}", stop.len());
            Err(ApiError::value("stop", message))
        }
    }
}
