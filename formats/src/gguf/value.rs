//! Metadata: typed values under unique keys, in file order.

use std::collections::HashMap;

use crate::{FormatError, Result};

pub(super) const MAX_KEY_BYTES: usize = u16::MAX as usize;

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// A metadata array; all elements have one type.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
    /// Arrays in an array; they may differ in type and length.
    Array(Vec<Array>),
}

/// The numbers that GGUF gives the value types.
pub(super) mod type_id {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}

impl Value {
    /// The number that GGUF gives the type.
    pub(super) fn type_id(&self) -> u32 {
        match self {
            Self::U8(_) => type_id::U8,
            Self::I8(_) => type_id::I8,
            Self::U16(_) => type_id::U16,
            Self::I16(_) => type_id::I16,
            Self::U32(_) => type_id::U32,
            Self::I32(_) => type_id::I32,
            Self::U64(_) => type_id::U64,
            Self::I64(_) => type_id::I64,
            Self::F32(_) => type_id::F32,
            Self::F64(_) => type_id::F64,
            Self::Bool(_) => type_id::BOOL,
            Self::String(_) => type_id::STRING,
            Self::Array(_) => type_id::ARRAY,
        }
    }

    /// An integer of any type, `None` if it is negative or no integer.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            Self::I8(value) => value.try_into().ok(),
            Self::I16(value) => value.try_into().ok(),
            Self::I32(value) => value.try_into().ok(),
            Self::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// A float of either type.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(value) => Some(value.into()),
            Self::F64(value) => Some(value),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(value) => Some(value),
            _ => None,
        }
    }

    /// A string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(value) => Some(value),
            _ => None,
        }
    }

    /// An array.
    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Self::Array(value) => Some(value),
            _ => None,
        }
    }
}

/// Prints numbers and strings as they are, arrays by type and length: what a message can show.
impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::U8(value) => write!(f, "{value}"),
            Self::I8(value) => write!(f, "{value}"),
            Self::U16(value) => write!(f, "{value}"),
            Self::I16(value) => write!(f, "{value}"),
            Self::U32(value) => write!(f, "{value}"),
            Self::I32(value) => write!(f, "{value}"),
            Self::U64(value) => write!(f, "{value}"),
            Self::I64(value) => write!(f, "{value}"),
            Self::F32(value) => write!(f, "{value}"),
            Self::F64(value) => write!(f, "{value}"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::String(value) => write!(f, "{:?}", shortened(value)),
            Self::Array(array) => write!(f, "{} values of type {}", array.len(), array.type_name()),
        }
    }
}

/// The first characters of a string that may be megabytes long.
fn shortened(text: &str) -> &str {
    text.char_indices().nth(80).map_or(text, |(end, _)| &text[..end])
}

impl Array {
    /// The number that GGUF gives the element type.
    pub(super) fn type_id(&self) -> u32 {
        self.facts().0
    }

    /// The name of the element type, as GGUF's text spells it.
    pub fn type_name(&self) -> &'static str {
        self.facts().1
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.facts().2
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Type number, type name, length.
    fn facts(&self) -> (u32, &'static str, usize) {
        match self {
            Self::U8(values) => (type_id::U8, "u8", values.len()),
            Self::I8(values) => (type_id::I8, "i8", values.len()),
            Self::U16(values) => (type_id::U16, "u16", values.len()),
            Self::I16(values) => (type_id::I16, "i16", values.len()),
            Self::U32(values) => (type_id::U32, "u32", values.len()),
            Self::I32(values) => (type_id::I32, "i32", values.len()),
            Self::U64(values) => (type_id::U64, "u64", values.len()),
            Self::I64(values) => (type_id::I64, "i64", values.len()),
            Self::F32(values) => (type_id::F32, "f32", values.len()),
            Self::F64(values) => (type_id::F64, "f64", values.len()),
            Self::Bool(values) => (type_id::BOOL, "bool", values.len()),
            Self::String(values) => (type_id::STRING, "string", values.len()),
            Self::Array(values) => (type_id::ARRAY, "array", values.len()),
        }
    }

    /// The elements of an integer array of any type, `None` if one is negative or no integer.
    pub fn to_u64s(&self) -> Option<Vec<u64>> {
        fn convert<T: Copy + TryInto<u64>>(values: &[T]) -> Option<Vec<u64>> {
            values.iter().map(|&value| value.try_into().ok()).collect()
        }
        match self {
            Self::U8(values) => convert(values),
            Self::I8(values) => convert(values),
            Self::U16(values) => convert(values),
            Self::I16(values) => convert(values),
            Self::U32(values) => convert(values),
            Self::I32(values) => convert(values),
            Self::U64(values) => convert(values),
            Self::I64(values) => convert(values),
            _ => None,
        }
    }
}

/// `impl From<payload> for Value` for the payloads that callers write.
macro_rules! value_from {
    ($($payload:ty => $wrap:expr),* $(,)?) => {$(
        impl From<$payload> for Value {
            fn from(value: $payload) -> Self {
                $wrap(value)
            }
        }
    )*};
}

value_from! {
    u8 => Self::U8,
    u32 => Self::U32,
    u64 => Self::U64,
    f32 => Self::F32,
    bool => Self::Bool,
    String => Self::String,
    &str => |value: &str| Self::String(value.to_owned()),
    Array => Self::Array,
    Vec<u8> => |values| Self::Array(Array::U8(values)),
    Vec<i32> => |values| Self::Array(Array::I32(values)),
    Vec<u32> => |values| Self::Array(Array::U32(values)),
    Vec<f32> => |values| Self::Array(Array::F32(values)),
    Vec<String> => |values| Self::Array(Array::String(values)),
}

/// Values under unique keys, in the order in which they were inserted.
///
/// The typed getters give `None` both for an absent key and for a value of another type.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    positions: HashMap<String, usize>,
}

impl Metadata {
    /// No entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Entries whose keys are known to be valid and different.
    pub(crate) fn from_unique(entries: Vec<(String, Value)>) -> Self {
        let keys = entries.iter().map(|(key, _)| key.clone());
        Self { positions: keys.zip(0..).collect(), entries }
    }

    /// Adds an entry at the end.
    ///
    /// # Errors
    /// `InvalidArgument` for a key that exists, is empty, or is longer than GGUF's 65535 bytes.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) -> Result<()> {
        let key = key.into();
        if !(1..=MAX_KEY_BYTES).contains(&key.len()) {
            let found = format!("{} bytes", key.len());
            let expected = format!("1 to {MAX_KEY_BYTES}");
            return Err(FormatError::invalid_argument("a metadata key", found, expected));
        }
        if self.contains(&key) {
            let what = format!("metadata key `{key}`");
            return Err(FormatError::invalid_argument(what, "a second entry of this key", "one"));
        }
        self.positions.insert(key.clone(), self.entries.len());
        self.entries.push((key, value.into()));
        Ok(())
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.position(key).map(|position| &self.entries[position].1)
    }

    /// The place of a key in the order of the entries.
    pub(super) fn position(&self, key: &str) -> Option<usize> {
        self.positions.get(key).copied()
    }

    /// Whether the key exists.
    pub fn contains(&self, key: &str) -> bool {
        self.positions.contains_key(key)
    }

    /// An integer of any type that is not negative.
    pub fn u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// A float of either type.
    pub fn f64(&self, key: &str) -> Option<f64> {
        self.get(key)?.as_f64()
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }

    /// A string.
    pub fn str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Option<&[String]> {
        match self.get(key)?.as_array()? {
            Array::String(values) => Some(values),
            _ => None,
        }
    }

    /// All entries in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries whose keys start with `prefix`, in order.
    pub fn with_prefix(&self, prefix: &str) -> Self {
        let selected = self.entries.iter().filter(|(key, _)| key.starts_with(prefix));
        Self::from_unique(selected.cloned().collect())
    }
}
