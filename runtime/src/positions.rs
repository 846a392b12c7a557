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
    /// The positions `start .. start + count` of a text of up to `context` tokens.
    pub fn new(decoder: &Decoder, start: usize, count: usize, context: usize) -> Self {
        let angles = decoder.ropes.iter().enumerate().map(|(index, rope)| {
            let mut blocks = decoder.blocks.iter();
            let head_dim = blocks.find_map(|block| block.mixer.turned_head_dim(index)).unwrap_or(0);
            let factors = rope.factors_for(context);
            RopeAngles::new(head_dim, rope.theta, &factors, start, count).scaled(rope.amplitude)
        });
        Self { start, count, angles: angles.collect() }
    }
}
