//! The bytes of tokens, as a vocabulary spells them.

use tokenizers::decoders::DecoderWrapper as Decoder;

/// The bytes that a token adds to a text; none if there is no such token.
pub(super) fn of_token(tokenizer: &tokenizers::Tokenizer, token: u32) -> Vec<u8> {
    let Some(text) = tokenizer.id_to_token(token) else { return Vec::new() };
    if tokenizer.get_added_vocabulary().get_added_tokens_decoder().contains_key(&token) {
        return text.into_bytes();
    }
    match tokenizer.get_decoder().is_some_and(is_byte_level) {
        true => text.chars().flat_map(byte_level).collect(),
        false => byte_token(&text)
            .map_or_else(|| text.replace('\u{2581}', " ").into_bytes(), |byte| vec![byte]),
    }
}

fn is_byte_level(decoder: &Decoder) -> bool {
    match decoder {
        Decoder::ByteLevel(_) => true,
        Decoder::Sequence(sequence) => sequence.get_decoders().iter().any(is_byte_level),
        _ => false,
    }
}

/// The byte of SentencePiece's `<0x0A>`.
fn byte_token(text: &str) -> Option<u8> {
    u8::from_str_radix(text.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

/// What a letter of a byte-level vocabulary stands for: printable bytes for themselves, the others,
/// in their order, are letters from U+0100 on. A letter of no byte stays.
///
/// # Source
/// `bytes_to_unicode` of GPT-2.
fn byte_level(letter: char) -> Vec<u8> {
    let is_printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let byte = match (u8::try_from(letter), (letter as usize).checked_sub(0x100)) {
        (Ok(byte), _) => Some(byte).filter(is_printable),
        (_, Some(place)) => (0..=u8::MAX).filter(|byte| !is_printable(byte)).nth(place),
        _ => None,
    };
    byte.map_or_else(|| letter.to_string().into_bytes(), |byte| vec![byte])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_and_byte_tokens_stand_for_bytes() {
        for (letter, byte) in [('a', b'a'), ('Ġ', b' '), ('Ċ', b'\n'), ('é', 0xe9), ('Ń', 0xad)]
        {
            assert_eq!(byte_level(letter), [byte], "{letter}");
        }
        assert_eq!(byte_level('漢'), "漢".as_bytes());
        assert_eq!(byte_token("<0x0A>"), Some(b'\n'));
        assert_eq!(byte_token("<s>"), None);
    }
}
