//! Which rows of a matrix share the bit-widths of its groups.
//!
//! The loss minds some heads, some neurons and some tokens far more than others. So `attn_q` comes
//! in bands of heads, `ffn_gate` and `ffn_up`, whose neurons are sorted by what the loss minds
//! about them (`neurons.rs`), in bands of neurons, and the embedding and the output layer in bands
//! of tokens (`docs/notes/accuracy.md` has the effect).

use slim_formats::{
    Decoder,
    arch::{Rows, Tensor},
    slim::MAX_BANDS,
};

/// Rows that the blocks of many-token kernels take: bands of large matrices are multiples of them.
const BLOCK_ROWS: usize = 128;

/// The rows of each band of a matrix, from the first to the last, all but the last multiples of
/// `strip`; `None` for one that is not cut.
pub fn bands(tensor: &Tensor, decoder: &Decoder, strip: usize) -> Option<Vec<usize>> {
    let (rows, _) = tensor.shape();
    let bands = match (tensor.part.rows(), tensor.block) {
        (Rows::Heads, Some(block)) => {
            let head_dim = decoder.blocks[block].mixer.query_head_dim()?;
            of_heads(rows / head_dim, head_dim, strip)
        }
        (Rows::Neurons, _) => of_neurons(rows, strip),
        (Rows::Tokens, _) => of_tokens(rows, strip),
        (Rows::Heads | Rows::Channels | Rows::OfExpert, _) => return None,
    };
    (bands.len() > 1).then_some(bands)
}

/// Halves, the first of which is cut again and again. The ids of tokens rise as they get rarer:
/// byte-pair encoders number them in the order in which they were merged.
fn of_tokens(vocab: usize, strip: usize) -> Vec<usize> {
    in_shares(vocab, strip, &[64, 64, 32, 16, 8, 4])
}

/// Equally many heads each, as few as there may be.
fn of_heads(heads: usize, head_dim: usize, strip: usize) -> Vec<usize> {
    if !head_dim.is_multiple_of(strip) {
        return vec![heads * head_dim];
    }
    let of_band = heads.div_ceil(MAX_BANDS).max(1);
    (0..heads).step_by(of_band).map(|first| of_band.min(heads - first) * head_dim).collect()
}

/// Two twelfths and five sixths.
fn of_neurons(neurons: usize, strip: usize) -> Vec<usize> {
    in_shares(neurons, strip, &[12, 12, 6, 6, 6, 6])
}

/// One in so many rows for each of `shares`, the first of which is the smallest band, and a last
/// band. Of a small matrix that has not as many strips, some are missing.
fn in_shares(rows: usize, strip: usize, shares: &[usize]) -> Vec<usize> {
    let unit = if rows < shares[0] * BLOCK_ROWS { strip } else { BLOCK_ROWS };
    let mut left = rows;
    let mut take = |rows: usize| {
        let rows = rows.next_multiple_of(unit).min(left);
        left -= rows;
        rows
    };
    let mut bands: Vec<usize> = shares.iter().map(|share| take(rows / share)).collect();
    bands.push(left);
    bands.retain(|&rows| rows > 0);
    bands
}

#[cfg(test)]
mod tests {
    use slim_formats::slim::{STRIP_ROWS, TILE_ROWS};

    use super::*;

    #[test]
    fn bands_of_neurons_hold_every_neuron_once_and_whole_tiles() {
        assert_eq!(of_neurons(1536, TILE_ROWS), [128, 128, 256, 256, 256, 256, 256]);
        assert_eq!(of_neurons(11008, TILE_ROWS), [1024, 1024, 1920, 1920, 1920, 1920, 1280]);
        assert_eq!(of_neurons(176, TILE_ROWS), [16, 16, 32, 32, 32, 32, 16]);
        assert_eq!(of_neurons(40, TILE_ROWS), [16, 16, 8]);
        assert_eq!(of_neurons(8, TILE_ROWS), [8]);
        for neurons in 1..2000 {
            for strip in [TILE_ROWS, STRIP_ROWS] {
                check(&of_neurons(neurons, strip), neurons, strip);
            }
        }
    }

    #[test]
    fn bands_of_tokens_hold_every_token_once_and_whole_tiles() {
        assert_eq!(of_tokens(49152, TILE_ROWS), [768, 768, 1536, 3072, 6144, 12288, 24576]);
        assert_eq!(of_tokens(320, TILE_ROWS), [16, 16, 16, 32, 48, 80, 112]);
        assert_eq!(of_tokens(16, TILE_ROWS), [16]);
        assert_eq!(of_heads(9, 16, STRIP_ROWS), [144]);
        for tokens in 33..2000 {
            for strip in [TILE_ROWS, STRIP_ROWS] {
                check(&of_tokens(tokens, strip), tokens, strip);
            }
        }
    }

    #[test]
    fn bands_of_heads_hold_every_head_once_and_whole_tiles() {
        assert_eq!(of_heads(9, 64, TILE_ROWS), [64; 9]);
        assert_eq!(of_heads(32, 128, TILE_ROWS), [256; 16]);
        assert_eq!(of_heads(20, 64, TILE_ROWS), [128; 10]);
        assert_eq!(of_heads(33, 16, TILE_ROWS), [48; 11]);
        assert_eq!(of_heads(4, 24, TILE_ROWS), [96]);
        for heads in 1..100 {
            for strip in [TILE_ROWS, STRIP_ROWS] {
                check(&of_heads(heads, 80, strip), heads * 80, strip);
            }
        }
    }

    fn check(bands: &[usize], rows: usize, strip: usize) {
        let (last, above) = bands.split_last().unwrap();
        assert_eq!(above.iter().sum::<usize>() + last, rows);
        assert!(*last > 0 && above.iter().all(|rows| rows % strip == 0), "{bands:?}");
        assert!(bands.len() <= MAX_BANDS, "{bands:?}");
    }
}
