//! Protocol buffers as they lie in the file: fields one after the other, nothing copied, nothing
//! decoded twice.
//!
//! A [`Message`] is a range of the file. Whoever reads one names the fields that matter and opens
//! nested messages by itself, so no depth of nesting in a file can make this code recurse.
//!
//! # Source
//! The encoding page of the Protocol Buffers documentation (protobuf.dev).

use std::{ops::Range, path::Path};

use crate::{FormatError, Result};

/// A message: a run of fields.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    path: &'a Path,
    /// What it should be, for errors: `NodeProto`.
    kind: &'static str,
    /// Where in the file it starts.
    start: usize,
    bytes: &'a [u8],
}

/// A field of a message.
#[derive(Debug, Clone, Copy)]
pub struct Field<'a> {
    /// The message that it belongs to.
    message: Message<'a>,
    /// Its number in the message's definition.
    pub number: u64,
    value: Value<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    Varint(u64),
    Fixed64,
    Fixed32([u8; 4]),
    /// Where in the file the bytes start, and the bytes: a text, a message, or packed numbers.
    Bytes(usize, &'a [u8]),
}

impl<'a> Message<'a> {
    /// A whole file as one message.
    pub fn new(path: &'a Path, kind: &'static str, bytes: &'a [u8]) -> Self {
        Self { path, kind, start: 0, bytes }
    }

    /// What it should be.
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// Its fields in the order of the file; nothing follows an error.
    pub fn fields(self) -> impl Iterator<Item = Result<Field<'a>>> {
        let mut cursor = Cursor { message: self, position: 0 };
        std::iter::from_fn(move || {
            if cursor.position == self.bytes.len() {
                return None;
            }
            let field = cursor.field();
            if field.is_err() {
                cursor.position = self.bytes.len();
            }
            Some(field)
        })
    }

    /// A broken rule at byte `position` of the message.
    fn malformed(&self, position: usize, found: &str, expected: &str) -> FormatError {
        let place = format!("{} at byte {}", self.kind, self.start + position);
        FormatError::malformed(self.path, place, "", found, expected)
    }
}

impl<'a> Field<'a> {
    /// A whole number, whatever its sign: `int64` values are cast.
    pub fn varint(&self) -> Result<u64> {
        match self.value {
            Value::Varint(value) => Ok(value),
            _ => Err(self.other_kind("a whole number")),
        }
    }

    /// A `float`.
    pub fn f32(&self) -> Result<f32> {
        match self.value {
            Value::Fixed32(bytes) => Ok(f32::from_le_bytes(bytes)),
            _ => Err(self.other_kind("a 32-bit number")),
        }
    }

    /// Where in the file the bytes of the value are: `bytes`, or packed numbers of fixed size.
    pub fn range(&self) -> Result<Range<usize>> {
        match self.value {
            Value::Bytes(start, bytes) => Ok(start..start + bytes.len()),
            _ => Err(self.other_kind("bytes")),
        }
    }

    /// A `string`.
    pub fn text(&self) -> Result<&'a str> {
        match self.value {
            Value::Bytes(_, bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
        .ok_or_else(|| self.other_kind("a text in UTF-8"))
    }

    /// A nested message.
    pub fn message(&self, kind: &'static str) -> Result<Message<'a>> {
        match self.value {
            Value::Bytes(start, bytes) => {
                Ok(Message { path: self.message.path, kind, start, bytes })
            }
            _ => Err(self.other_kind("a message")),
        }
    }

    /// The values of a repeated field of whole numbers: one, or packed ones.
    pub fn varints(&self) -> impl Iterator<Item = Result<u64>> {
        let (single, packed) = match self.value {
            Value::Bytes(start, bytes) => (
                None,
                Some(Cursor { message: Message { start, bytes, ..self.message }, position: 0 }),
            ),
            _ => (Some(self.varint()), None),
        };
        let packed = packed.into_iter().flat_map(|mut cursor| {
            std::iter::from_fn(move || {
                let is_left = cursor.position < cursor.message.bytes.len();
                is_left.then(|| cursor.varint())
            })
        });
        single.into_iter().chain(packed)
    }

    fn other_kind(&self, expected: &str) -> FormatError {
        let place = format!(
            "field {} of a {} at byte {}",
            self.number, self.message.kind, self.message.start
        );
        FormatError::malformed(self.message.path, place, "", "another kind of value", expected)
    }
}

/// A place in a message.
struct Cursor<'a> {
    message: Message<'a>,
    position: usize,
}

impl<'a> Cursor<'a> {
    fn field(&mut self) -> Result<Field<'a>> {
        let start = self.position;
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Value::Fixed64
            }
            2 => {
                let length = self.varint()?;
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                let bytes = self.take(length)?;
                Value::Bytes(self.message.start + self.position - bytes.len(), bytes)
            }
            5 => Value::Fixed32(*self.take(4)?.as_array().expect("four bytes")),
            kind => {
                let found = format!("wire type {kind}");
                return Err(self.message.malformed(start, &found, "0, 1, 2 or 5"));
            }
        };
        match tag >> 3 {
            0 => Err(self.message.malformed(start, "field number 0", "at least 1")),
            number => Ok(Field { message: self.message, number, value }),
        }
    }

    /// A number of up to 64 bits, seven in each byte, the lowest ones first.
    fn varint(&mut self) -> Result<u64> {
        let start = self.position;
        let mut value = 0;
        for shift in (0..70).step_by(7) {
            let byte = u64::from(self.take(1)?[0]);
            if shift == 63 && byte > 1 {
                break;
            }
            value |= (byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.message.malformed(start, "a number of more than 64 bits", "at most 64"))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let left = &self.message.bytes[self.position..];
        let Some(taken) = left.get(..length) else {
            let found = format!("{length} bytes from there on");
            let expected = format!("at most the {} that are left", left.len());
            return Err(self.message.malformed(self.position, &found, &expected));
        };
        self.position += length;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(bytes: &[u8]) -> Message<'_> {
        Message::new(Path::new("model.onnx"), "ModelProto", bytes)
    }

    fn only_field(bytes: &[u8]) -> Result<Field<'_>> {
        let mut fields = message(bytes).fields();
        let field = fields.next().expect("a field");
        assert!(fields.next().is_none());
        field
    }

    #[test]
    fn fields_of_each_kind_are_read() {
        // Field 1: the varint 300 of the documentation's example; 2: fixed64; 3: "hi"; 4: fixed32.
        let bytes = [
            &[0x08, 0xac, 0x02][..],
            &[0x11, 1, 2, 3, 4, 5, 6, 7, 8],
            &[0x1a, 2, b'h', b'i'],
            &[0x25, 0, 0, 0xc0, 0x3f],
        ]
        .concat();
        let fields: Vec<_> = message(&bytes).fields().map(Result::unwrap).collect();
        assert_eq!(fields.iter().map(|field| field.number).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(fields[0].varint().unwrap(), 300);
        assert!(fields[1].varint().is_err());
        assert_eq!(fields[2].text().unwrap(), "hi");
        assert_eq!(fields[3].f32().unwrap(), 1.5);
        let error = fields[0].text().unwrap_err().to_string();
        assert!(error.contains("field 1 of a ModelProto at byte 0: found another kind"), "{error}");
    }

    #[test]
    fn repeated_numbers_are_read_packed_or_one_by_one() {
        let packed = only_field(&[0x0a, 3, 0xac, 0x02, 7]).unwrap();
        assert_eq!(packed.varints().map(Result::unwrap).collect::<Vec<_>>(), [300, 7]);
        let single = only_field(&[0x08, 7]).unwrap();
        assert_eq!(single.varints().map(Result::unwrap).collect::<Vec<_>>(), [7]);
        let cut = only_field(&[0x0a, 2, 7, 0x80]).unwrap();
        assert!(cut.varints().last().unwrap().is_err());
    }

    #[test]
    fn nested_message_tells_its_place_in_the_file() {
        let bytes = [0x08, 1, 0x12, 2, 0x18, 0x80];
        let outer = message(&bytes).fields().nth(1).unwrap().unwrap();
        let error = outer.message("GraphProto").unwrap().fields().next().unwrap().unwrap_err();
        let error = error.to_string();
        assert!(error.contains("GraphProto at byte 6: found 1 bytes"), "{error}");
    }

    #[test]
    fn bad_encodings_are_refused() {
        let too_long = [&[0x08][..], &[0xff; 9], &[0x02]].concat();
        for (bytes, fragment) in [
            (&[0x08][..], "at most the 0 that are left"),
            (&[0x80], "at most the 0"),
            (&[0x0b], "wire type 3"),
            (&[0x0c], "wire type 4"),
            (&[0x0e], "wire type 6"),
            (&[0x00, 1], "field number 0"),
            (&[0x0a, 2, 1], "2 bytes from there on, expected at most the 1"),
            (&[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1], "at most the 0"),
            (&[0x0d, 1, 2, 3], "4 bytes from there on"),
            (&[0x09, 1, 2, 3], "8 bytes from there on"),
            (&too_long, "more than 64 bits"),
        ] {
            let error = only_field(bytes).unwrap_err().to_string();
            assert!(error.contains(fragment), "{bytes:?}: {error}");
        }
        let largest = [&[0x08][..], &[0xff; 9], &[0x01]].concat();
        assert_eq!(only_field(&largest).unwrap().varint().unwrap(), u64::MAX);
    }
}
