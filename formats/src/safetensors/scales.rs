//! Scales of matrices that are quantized.

use super::{
    fp8::Fp8Scales,
    index::{Shards, StoredTensor},
    mxfp4,
};
use crate::BlockScales;

/// What blocks of a matrix are multiplied by.
#[derive(Debug, Clone)]
pub(super) enum Scales {
    Fp8(Fp8Scales),
    /// Where they are stored.
    Mxfp4(Box<StoredTensor>),
}

impl Scales {
    pub fn view<'a>(&'a self, shards: &'a Shards) -> BlockScales<'a> {
        match self {
            Self::Fp8(scales) => scales.view(),
            Self::Mxfp4(scales) => mxfp4::view(scales, shards),
        }
    }
}
