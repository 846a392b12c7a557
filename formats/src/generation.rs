//! How a model's makers want text to be drawn from it.

use std::path::Path;

use serde_json::{Map, Value as Json};

use crate::{
    FormatError, Result,
    config::shortest,
    gguf::{Metadata, Value},
};

/// A model's own settings for drawing text; `None` where it leaves one open.
///
/// # Source
/// `generation_config.json` as `GenerationConfig` of transformers reads it, and the keys
/// `general.sampling.*` that llama.cpp's converter makes of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Generation {
    /// Divides the logits before the draw; 0 always takes the most likely token.
    pub temperature: Option<f32>,
    /// Keeps this many most likely tokens; 0 keeps all.
    pub top_k: Option<usize>,
    /// Keeps the most likely tokens until their probabilities add up to this; 1 keeps all.
    pub top_p: Option<f32>,
    /// Keeps tokens at least this fraction as likely as the most likely one; 0 keeps all.
    pub min_p: Option<f32>,
    /// Makes recent tokens less likely; 1 changes nothing.
    pub repeat_penalty: Option<f32>,
    /// How many of the recent tokens the penalty looks at; `usize::MAX` for all.
    pub repeat_window_tokens: Option<usize>,
}

/// The names of one setting in both spellings.
struct Key {
    hugging_face: &'static str,
    gguf: &'static str,
}

const TEMPERATURE: Key = Key { hugging_face: "temperature", gguf: "general.sampling.temp" };
const TOP_K: Key = Key { hugging_face: "top_k", gguf: "general.sampling.top_k" };
const TOP_P: Key = Key { hugging_face: "top_p", gguf: "general.sampling.top_p" };
const MIN_P: Key = Key { hugging_face: "min_p", gguf: "general.sampling.min_p" };
const REPEAT_PENALTY: Key =
    Key { hugging_face: "repetition_penalty", gguf: "general.sampling.penalty_repeat" };
/// Hugging Face's penalty always looks at all tokens.
const REPEAT_WINDOW: &str = "general.sampling.penalty_last_n";

/// The largest count of tokens that a setting may name.
const MAX_COUNT: f64 = i32::MAX as f64;

impl Generation {
    /// Whether the model leaves every setting open.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Reads `generation_config.json`, whose path is `path`. `do_sample: false` is temperature 0;
    /// the penalty looks at all tokens, as that of transformers does.
    ///
    /// # Errors
    /// `Malformed` for a value of the wrong kind or outside its range.
    pub fn from_hugging_face(path: &Path, config: &Json) -> Result<Self> {
        let numbers = Numbers {
            path,
            get: &|key| match &config[key] {
                Json::Null => None,
                value => Some((value.as_f64(), value.to_string())),
            },
        };
        let mut generation = numbers.read(|key| key.hugging_face)?;
        match &config["do_sample"] {
            Json::Bool(false) => generation.temperature = Some(0.0),
            Json::Null | Json::Bool(true) => {}
            other => return Err(malformed(path, "do_sample", other, "true or false")),
        }
        generation.repeat_window_tokens = generation.repeat_penalty.map(|_| usize::MAX);
        Ok(generation)
    }

    /// Reads the keys `general.sampling.*` of a GGUF file.
    ///
    /// # Errors
    /// `Malformed` for a value of the wrong kind or outside its range.
    pub fn from_gguf(path: &Path, metadata: &Metadata) -> Result<Self> {
        let numbers = Numbers {
            path,
            get: &|key| metadata.get(key).map(|value| (as_number(value), value.to_string())),
        };
        let mut generation = numbers.read(|key| key.gguf)?;
        generation.repeat_window_tokens = numbers.count(REPEAT_WINDOW, usize::MAX)?;
        Ok(generation)
    }

    /// The keys that [`from_gguf`](Self::from_gguf) reads back.
    pub fn to_gguf(&self) -> impl Iterator<Item = (String, Value)> {
        let count = |count: usize| Value::I32(i32::try_from(count).unwrap_or(-1));
        let entries = [
            (TEMPERATURE.gguf, self.temperature.map(Value::F32)),
            (TOP_K.gguf, self.top_k.map(count)),
            (TOP_P.gguf, self.top_p.map(Value::F32)),
            (MIN_P.gguf, self.min_p.map(Value::F32)),
            (REPEAT_PENALTY.gguf, self.repeat_penalty.map(Value::F32)),
            (REPEAT_WINDOW, self.repeat_window_tokens.map(count)),
        ];
        entries.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)))
    }

    /// The keys that [`from_hugging_face`](Self::from_hugging_face) reads back, all but the window
    /// of the penalty.
    pub fn to_hugging_face(&self) -> Map<String, Json> {
        let number = |number: f32| Json::from(shortest(number));
        // transformers refuses a temperature of 0, and draws only where it is told to.
        let greedy = self.temperature == Some(0.0);
        let entries = [
            ("do_sample", (!self.is_empty()).then(|| Json::from(!greedy))),
            (TEMPERATURE.hugging_face, self.temperature.filter(|_| !greedy).map(number)),
            (TOP_K.hugging_face, self.top_k.map(Json::from)),
            (TOP_P.hugging_face, self.top_p.map(number)),
            (MIN_P.hugging_face, self.min_p.map(number)),
            (REPEAT_PENALTY.hugging_face, self.repeat_penalty.map(number)),
        ];
        entries.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }
}

/// The value of a key if it is a number, and its text.
type Found = (Option<f64>, String);

/// The numbers of a file, by their keys.
struct Numbers<'a> {
    path: &'a Path,
    get: &'a dyn Fn(&str) -> Option<Found>,
}

impl Numbers<'_> {
    /// The settings that both spellings share.
    fn read(&self, spelling: impl Fn(Key) -> &'static str) -> Result<Generation> {
        let share = (0.0..=1.0, "a number from 0 to 1");
        let positive = (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX), "a number above 0");
        let temperature = (0.0..=f64::from(f32::MAX), "a number, 0 or more");
        let number = |key, (range, expected): &(std::ops::RangeInclusive<f64>, &str)| {
            let value = self.value(spelling(key), |value| range.contains(&value), expected)?;
            Ok(value.map(|value| value as f32))
        };
        Ok(Generation {
            temperature: number(TEMPERATURE, &temperature)?,
            top_k: self.count(spelling(TOP_K), 0)?,
            top_p: number(TOP_P, &share)?,
            min_p: number(MIN_P, &share)?,
            repeat_penalty: number(REPEAT_PENALTY, &positive)?,
            repeat_window_tokens: None,
        })
    }

    /// A count of tokens, where -1 stands for `all`.
    fn count(&self, key: &str, all: usize) -> Result<Option<usize>> {
        let is_count = |value: f64| value.fract() == 0.0 && (-1.0..=MAX_COUNT).contains(&value);
        let value = self.value(key, is_count, "a whole number, 0 or more, or -1 for all tokens")?;
        Ok(value.map(|value| if value < 0.0 { all } else { value as usize }))
    }

    fn value(
        &self,
        key: &str,
        is_allowed: impl Fn(f64) -> bool,
        expected: &str,
    ) -> Result<Option<f64>> {
        match (self.get)(key) {
            None => Ok(None),
            Some((Some(value), _)) if is_allowed(value) => Ok(Some(value)),
            Some((_, found)) => Err(malformed(self.path, key, found, expected)),
        }
    }
}

/// A float or an integer.
fn as_number(value: &Value) -> Option<f64> {
    match *value {
        Value::I8(value) => Some(value.into()),
        Value::I16(value) => Some(value.into()),
        Value::I32(value) => Some(value.into()),
        Value::I64(value) => Some(value as f64),
        _ => value.as_f64().or_else(|| value.as_u64().map(|value| value as f64)),
    }
}

fn malformed(path: &Path, key: &str, found: impl ToString, expected: &str) -> FormatError {
    FormatError::malformed(path, format!("key `{key}`"), "", found, expected)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of_json(config: &Json) -> Result<Generation> {
        Generation::from_hugging_face(Path::new("generation_config.json"), config)
    }

    fn of_gguf(entries: &[(&str, Value)]) -> Result<Generation> {
        let entries = entries.iter().map(|(key, value)| ((*key).to_owned(), value.clone()));
        let metadata = Metadata::from_unique(entries.collect());
        Generation::from_gguf(Path::new("a.gguf"), &metadata)
    }

    /// Every setting, as Qwen2.5 gives some of them.
    fn every() -> Generation {
        Generation {
            temperature: Some(0.7),
            top_k: Some(20),
            top_p: Some(0.8),
            min_p: Some(0.05),
            repeat_penalty: Some(1.05),
            repeat_window_tokens: Some(usize::MAX),
        }
    }

    #[test]
    fn hugging_face_settings_are_read_and_written() {
        let config = json!({
            "do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05,
            "repetition_penalty": 1.05, "eos_token_id": 2,
        });
        assert_eq!(of_json(&config).unwrap(), every());
        let written = Json::Object(every().to_hugging_face());
        assert_eq!(of_json(&written).unwrap(), every());
        assert_eq!(written["temperature"].to_string(), "0.7");
    }

    #[test]
    fn settings_that_are_absent_stay_open() {
        let config = json!({"eos_token_id": 2, "temperature": null});
        assert!(of_json(&config).unwrap().is_empty());
        assert!(of_gguf(&[("general.name", "a".into())]).unwrap().is_empty());
        assert_eq!(Generation::default().to_gguf().count(), 0);
        assert!(Generation::default().to_hugging_face().is_empty());
    }

    #[test]
    fn without_drawing_the_temperature_is_0() {
        let greedy = of_json(&json!({"do_sample": false, "temperature": 0.6})).unwrap();
        assert_eq!(greedy.temperature, Some(0.0));
        let written = Json::Object(greedy.to_hugging_face());
        assert_eq!(written, json!({"do_sample": false}));
    }

    #[test]
    fn gguf_settings_are_read_and_written() {
        let metadata = Metadata::from_unique(every().to_gguf().collect());
        assert_eq!(metadata.get("general.sampling.top_k"), Some(&Value::I32(20)));
        assert_eq!(metadata.get("general.sampling.penalty_last_n"), Some(&Value::I32(-1)));
        assert_eq!(Generation::from_gguf(Path::new("a.gguf"), &metadata).unwrap(), every());
    }

    #[test]
    fn minus_one_counts_as_all_tokens() {
        assert_eq!(of_json(&json!({"top_k": -1})).unwrap().top_k, Some(0));
        let window = of_gguf(&[("general.sampling.penalty_last_n", Value::I32(-1))]).unwrap();
        assert_eq!(window.repeat_window_tokens, Some(usize::MAX));
    }

    #[test]
    fn values_out_of_range_are_refused_by_their_key() {
        for (key, value) in [
            ("temperature", json!(-0.1)),
            ("temperature", json!("warm")),
            ("temperature", json!(1e300)),
            ("top_k", json!(2.5)),
            ("top_k", json!(-2)),
            ("top_p", json!(1.1)),
            ("min_p", json!(-1)),
            ("repetition_penalty", json!(0)),
            ("do_sample", json!("no")),
        ] {
            let error = of_json(&json!({key: value})).unwrap_err().to_string();
            let place = format!("`generation_config.json`: key `{key}`: found {value}, expected ");
            assert!(error.starts_with(&place), "{error}");
        }
        for (key, value) in [
            ("general.sampling.temp", Value::F32(f32::NAN)),
            ("general.sampling.temp", Value::F32(f32::INFINITY)),
            ("general.sampling.penalty_repeat", Value::F32(-1.0)),
            ("general.sampling.top_k", "many".into()),
        ] {
            let error = of_gguf(&[(key, value)]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("`a.gguf`: key `{key}`: found ")), "{error}");
        }
    }
}
