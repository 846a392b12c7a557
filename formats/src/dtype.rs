//! Element types of stored tensors.

/// The type of a tensor's elements. Block types (`Q4_0`, ...) are ggml's: a fixed number of
/// elements share one block of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs)]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    /// 4 bits of exponent, 3 of mantissa, no infinity.
    F8_E4M3,
    /// Powers of two ([`crate::power_of_two`]).
    F8_E8M0,
    /// A sign, 2 bits of exponent, 1 of mantissa; two numbers in a byte, the first in the low bits.
    F4_E2M1,
    I8,
    I16,
    I32,
    I64,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    MXFP4,
    /// A GGUF type number that this program knows no layout for.
    Unknown(u32),
}

impl DType {
    /// `(elements, bytes)` of one block, `None` for an unknown type. Plain types have one element.
    pub fn block(self) -> Option<(u64, u64)> {
        Some(match self {
            Self::F64 | Self::I64 => (1, 8),
            Self::F32 | Self::I32 => (1, 4),
            Self::F16 | Self::BF16 | Self::I16 => (1, 2),
            Self::I8 | Self::F8_E4M3 | Self::F8_E8M0 => (1, 1),
            Self::F4_E2M1 => (2, 1),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2_K => (256, 84),
            Self::Q3_K => (256, 110),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
            Self::MXFP4 => (32, 17),
            Self::Unknown(_) => return None,
        })
    }

    /// Bytes that `elements` of this type take: `None` for an unknown type, a count that does not
    /// fill whole blocks, or an overflow.
    pub fn size_in_bytes(self, elements: u64) -> Option<u64> {
        let (block_elements, block_bytes) = self.block()?;
        elements
            .is_multiple_of(block_elements)
            .then(|| (elements / block_elements).checked_mul(block_bytes))
            .flatten()
    }

    /// Whether the type is a quantized one, so that its values are already approximations.
    pub fn is_quantized(self) -> bool {
        self == Self::F8_E4M3 || self.block().is_some_and(|(elements, _)| elements > 1)
    }
}
