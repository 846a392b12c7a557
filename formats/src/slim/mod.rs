//! The SliM container: quantized layers with a bit-width per group, inside a GGUF file.
//!
//! `docs/format.md` is the specification; rules are cited as `F1`, `F2`, ...

mod bands;
mod file;
mod group;
mod layout;
mod outline;
mod parts;
#[cfg(test)]
mod refusals;
#[cfg(test)]
mod tests;
mod trellis;
mod verify;
mod writer;

pub use bands::{Bands, MAX_BANDS, band_name, matrix_of};
pub use file::{Fault, LayerInfo, SlimFile};
pub use group::{BitWidth, Group, LayerLayout, ScaleCoding};
pub use layout::{CodeColumn, PackedLayer, PackedTensor, TILE_ROWS, TileMut, UNIT_COLS, planes};
pub use outline::Outline;
pub use parts::parts_beside;
pub use trellis::{STRIP_ROWS, TRELLIS_CENTER, WindowTable, ring_place, value_step};
pub use writer::{SlimWriter, WrittenFile};
