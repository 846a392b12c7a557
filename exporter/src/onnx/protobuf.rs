//! Protocol Buffers, as far as writing an ONNX model needs them.

/// The serialized fields of a message, in the order in which they were added.
#[derive(Debug, Default)]
pub struct Message {
    bytes: Vec<u8>,
}

/// How the value of a field is stored: the low bits of its tag.
#[derive(Clone, Copy)]
enum WireType {
    Varint = 0,
    LengthDelimited = 2,
    FourBytes = 5,
}

impl Message {
    /// Adds an integer (`int32`, `int64`, an enum).
    pub fn int(&mut self, field: u32, value: i64) -> &mut Self {
        self.tag(field, WireType::Varint);
        self.varint(value as u64);
        self
    }

    /// Adds a `float`.
    pub fn float(&mut self, field: u32, value: f32) -> &mut Self {
        self.tag(field, WireType::FourBytes);
        self.bytes.extend(value.to_le_bytes());
        self
    }

    /// Adds `bytes`.
    pub fn bytes(&mut self, field: u32, value: &[u8]) -> &mut Self {
        self.tag(field, WireType::LengthDelimited);
        self.varint(value.len() as u64);
        self.bytes.extend(value);
        self
    }

    /// Adds a `string`.
    pub fn text(&mut self, field: u32, value: &str) -> &mut Self {
        self.bytes(field, value.as_bytes())
    }

    /// Adds a message.
    pub fn message(&mut self, field: u32, value: &Self) -> &mut Self {
        self.bytes(field, &value.bytes)
    }

    /// The message as it lies in a file.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn tag(&mut self, field: u32, wire_type: WireType) {
        self.varint(u64::from(field) << 3 | wire_type as u64);
    }

    /// Seven bits a byte, the lowest first; the highest bit of a byte says that more follow.
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of the encoding's documentation (protobuf.dev/programming-guides/encoding), and
    /// its corners.
    #[test]
    fn fields_are_encoded_as_documented() {
        let encoded = |message: &mut Message| message.as_bytes().to_vec();
        let new = Message::default;
        assert_eq!(encoded(new().int(1, 150)), [0x08, 0x96, 0x01]);
        assert_eq!(encoded(new().int(1, 0)), [0x08, 0x00]);
        assert_eq!(
            encoded(new().int(1, -2)),
            [0x08, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]
        );
        assert_eq!(encoded(new().text(2, "testing")), b"\x12\x07testing");
        assert_eq!(encoded(new().message(3, new().int(1, 150))), [0x1a, 0x03, 0x08, 0x96, 0x01]);
        assert_eq!(encoded(new().float(2, 1.0)), [0x15, 0, 0, 0x80, 0x3f]);
        assert_eq!(encoded(new().int(20, 1)), [0xa0, 0x01, 0x01]);
        let long = [7; 128];
        assert_eq!(encoded(new().bytes(1, &long))[..4], [0x0a, 0x80, 0x01, 7]);
    }

    #[test]
    fn fields_follow_each_other_as_added() {
        let mut message = Message::default();
        message.int(2, 1).int(1, 2).int(2, 3);
        assert_eq!(message.as_bytes(), [0x10, 1, 0x08, 2, 0x10, 3]);
    }
}
