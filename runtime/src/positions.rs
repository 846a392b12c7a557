//! Where tokens stand in their texts.

use slim_formats::Decoder;
use slim_kernels::RopeAngles;

/// Consecutive positions of a text, with the angles by which each of the model's rotary embeddings
/// turns them.
pub struct Positions {
    /// The first one.
    pub start: usize,
    /// How many there are.
    pub count: usize,
    /// One for each of [`Decoder::ropes`].
    pub angles: Vec<RopeAngles>,
}

impl Positions {
    /// The positions `start .. start + count`.
    pub fn new(decoder: &Decoder, start: usize, count: usize) -> Self {
        let angles = decoder.ropes.iter().map(|rope| {
            RopeAngles::new(2 * rope.factors.len(), rope.theta, &rope.factors, start, count)
        });
        Self { start, count, angles: angles.collect() }
    }
}
