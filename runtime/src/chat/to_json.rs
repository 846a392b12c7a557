//! The filter `tojson`: Python's `json.dumps`, as transformers calls it.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Levels of lists and objects in each other; a value can hold itself.
const DEPTH_LIMIT: usize = 100;

/// The longest text, far above what any context holds.
const LENGTH_LIMIT_BYTES: usize = 16 << 20;

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`. Unlike Jinja's own
/// it does not escape `<`, `>`, `&` and `'` for HTML.
pub(super) fn to_json(value: &Value, args: Rest<Value>, options: Kwargs) -> Result<String, Error> {
    // Arguments may be given by place, in the order of `json.dumps`' wrapper.
    let option = |place: usize, name: &str| -> Result<Option<Value>, Error> {
        let named: Option<Value> = options.get(name)?;
        Ok(named.or_else(|| args.get(place).cloned()).filter(|value| !value.is_none()))
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let ensure_ascii = is_true(option(0, "ensure_ascii")?);
    let indent = option(1, "indent")?.map(indent_text).transpose()?;
    let (item, key) = match option(2, "separators")? {
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
        Some(pair) => separators(&pair)?,
    };
    let sort_keys = is_true(option(3, "sort_keys")?);
    options.assert_all_used()?;
    let mut json = Json { ensure_ascii, indent, item, key, sort_keys, text: String::new() };
    json.value(value, 0)?;
    Ok(json.text)
}

/// What one level is indented by: so many spaces, or the text itself.
fn indent_text(indent: Value) -> Result<String, Error> {
    if let Some(text) = indent.as_str() {
        return Ok(text.to_owned());
    }
    let width = usize::try_from(i64::try_from(indent)?.max(0)).unwrap_or(usize::MAX);
    match width <= LENGTH_LIMIT_BYTES {
        true => Ok(" ".repeat(width)),
        false => Err(too_long()),
    }
}

fn separators(pair: &Value) -> Result<(String, String), Error> {
    let texts: Vec<String> = pair.try_iter()?.map(|text| text.to_string()).collect();
    <[String; 2]>::try_from(texts)
        .map(|[item, key]| (item, key))
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, "tojson: `separators` are two texts"))
}

fn too_long() -> Error {
    let detail = format!("tojson: the text passes {LENGTH_LIMIT_BYTES} bytes");
    Error::new(ErrorKind::InvalidOperation, detail)
}

/// A text in the making, and how it is written.
struct Json {
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
    text: String,
}

impl Json {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_LIMIT {
            let detail = format!("tojson: more than {DEPTH_LIMIT} levels");
            return Err(Error::new(ErrorKind::InvalidOperation, detail));
        }
        match value.kind() {
            ValueKind::None => self.push("null"),
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.push(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.items(['[', ']'], &items, depth, |json, item| json.value(item, depth + 1))
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    entries.push((key_text(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    entries.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.items(['{', '}'], &entries, depth, |json, (key, value)| {
                    json.string(key)?;
                    json.text.push_str(&json.key);
                    json.value(value, depth + 1)
                })
            }
            other => {
                let detail = format!("tojson: a value of type {other} has no JSON");
                Err(Error::new(ErrorKind::BadSerialization, detail))
            }
        }
    }

    /// Writes items between brackets, on one line or each on its own line.
    fn items<T>(
        &mut self,
        [open, close]: [char; 2],
        items: &[T],
        depth: usize,
        write_item: impl Fn(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.text.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.text.push_str(&self.item);
            }
            self.new_line(depth + 1)?;
            write_item(self, item)?;
        }
        if !items.is_empty() {
            self.new_line(depth)?;
        }
        self.text.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) -> Result<(), Error> {
        let Some(indent) = &self.indent else { return Ok(()) };
        if indent.len() * depth > LENGTH_LIMIT_BYTES {
            return Err(too_long());
        }
        let line = format!("\n{}", indent.repeat(depth));
        self.push(&line)
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        let mut json = serde_json::Value::from(text).to_string();
        if self.ensure_ascii {
            json = as_ascii(&json);
        }
        self.push(&json)
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        if self.text.len() + text.len() > LENGTH_LIMIT_BYTES {
            return Err(too_long());
        }
        self.text.push_str(text);
        Ok(())
    }
}

/// The text of a key, as Python writes one that is no text.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.to_string()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => Ok(number(key)),
        other => {
            let detail = format!("tojson: a key of type {other} has no JSON");
            Err(Error::new(ErrorKind::BadSerialization, detail))
        }
    }
}

/// A number as Python writes it: `1.0`, `1e-05`, `NaN`.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let number = f64::try_from(value.clone()).unwrap_or(f64::NAN);
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    // The shortest digits, which Python takes, too; it writes powers below -4 and from 16 on.
    let shortest = format!("{number:e}");
    let (digits, power) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    match power.parse().unwrap_or(0) {
        power @ -4..16 => match format!("{number}") {
            text if power >= 0 && !text.contains('.') => text + ".0",
            text => text,
        },
        power => format!("{digits}e{power:+03}"),
    }
}

/// The JSON text with everything but printable ASCII as `\uXXXX`.
fn as_ascii(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for letter in json.chars() {
        if (' '..='~').contains(&letter) {
            text.push(letter);
            continue;
        }
        for unit in letter.encode_utf16(&mut [0; 2]) {
            write!(text, "\\u{unit:04x}").expect("a string takes all");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use minijinja::Environment;

    use super::*;

    fn json(expression: &str) -> Result<String, Error> {
        let mut environment = Environment::new();
        environment.add_filter("tojson", to_json);
        environment.render_str(&format!("{{{{ {expression} }}}}"), ())
    }

    #[test]
    fn to_json_writes_what_python_writes() {
        for (expression, expected) in [
            (
                r#"{"b": [1, 2.5, true, none], "a": "<é'&>\n", "c": {}} | tojson"#,
                r#"{"b": [1, 2.5, true, null], "a": "<é'&>\n", "c": {}}"#,
            ),
            (
                r#"{"a": [1, {"b": []}]} | tojson(indent=2)"#,
                "{\n  \"a\": [\n    1,\n    {\n      \"b\": []\n    }\n  ]\n}",
            ),
            (r#"[1, [2]] | tojson(indent=0)"#, "[\n1,\n[\n2\n]\n]"),
            (r#"[1] | tojson(indent="\t")"#, "[\n\t1\n]"),
            (r#"{"b": 1, "a": [2, 3]} | tojson(separators=(",", ":"))"#, r#"{"b":1,"a":[2,3]}"#),
            (r#"{"b": 1, "a": 2} | tojson(sort_keys=true)"#, r#"{"a": 2, "b": 1}"#),
            (r#""é日🦀" | tojson(ensure_ascii=True)"#, r#""\u00e9\u65e5\ud83e\udd80""#),
            (r#""é日🦀" | tojson(ensure_ascii=False)"#, r#""é日🦀""#),
            (r#"{"a": 1} | tojson(False, 2)"#, "{\n  \"a\": 1\n}"),
            (
                r#"[1.0, 0.0001, 0.00001, 1e16, 1e15, -1.5e300] | tojson"#,
                "[1.0, 0.0001, 1e-05, 1e+16, 1000000000000000.0, -1.5e+300]",
            ),
            (r#"{1: 2, none: true} | tojson"#, r#"{"1": 2, "null": true}"#),
            (r#"(1, 2) | tojson(indent=none)"#, "[1, 2]"),
        ] {
            assert_eq!(json(expression).unwrap(), expected, "{expression}");
        }
    }

    #[test]
    fn to_json_of_hostile_values_is_refused() {
        for (expression, reason) in [
            ("[1] | tojson(indent=18446744073709551615)", "cannot"),
            ("[1] | tojson(indent=9223372036854775807)", "passes 16777216 bytes"),
            ("[[[1]]] | tojson(indent=9999999)", "passes 16777216 bytes"),
            ("[1] | tojson(separators=[1])", "two texts"),
            ("absent | tojson", "undefined"),
            ("1 | tojson(colour=1)", "colour"),
        ] {
            let error = json(expression).unwrap_err().to_string();
            assert!(error.contains(reason), "{expression}: {error}");
        }
    }
}
