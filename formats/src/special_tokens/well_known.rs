//! Tokens that are known by their text to end a turn or a text.

use super::Vocabulary;

/// They count whatever kind of token they are, since no ordinary text has them: files that type
/// them as ordinary tokens are wrong.
///
/// # Source
/// The tokens that llama.cpp counts as the end of a generation (`llama_vocab::impl::load` in
/// `src/llama-vocab.cpp`), as far as their spelling is beyond doubt.
const UNMISTAKABLE: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<turn|>",
    "_<EOT>",
];

/// They count as control tokens only: as ordinary tokens they can be text (`</s>` closes an HTML
/// element; Gemma's vocabulary has it for that). The first five are llama.cpp's, too.
const AS_CONTROL_TOKENS: &[&str] = &[
    "</s>",
    "<eos>",
    "<EOT>",
    "[EOT]",
    "[EOS]",
    "<|eot|>",
    "<|eom|>",
    "<|EOT|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "[|endofturn|]",
    "<｜end▁of▁sentence｜>",
];

/// What code models write between two files or repositories: llama.cpp stops there. As control
/// tokens only.
const CODE_ENDS: &[&str] = &[
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<reponame>",
    "<|file_sep|>",
];

/// The ends among the tokens of a vocabulary, in the order of the lists.
pub(super) fn ends(vocabulary: &Vocabulary) -> Vec<u32> {
    // In vocabularies with these, `<|end|>` ends a part of a message.
    let has = |text: &str| vocabulary.id(text).is_some();
    let has_parts = (has("<|return|>") && has("<|call|>"))
        || (has("<|flush|>") && (has("<|call|>") || has("<|calls|>")));
    let unmistakable = UNMISTAKABLE.iter().filter(|&&text| !(has_parts && text == "<|end|>"));
    let as_control = AS_CONTROL_TOKENS.iter().chain(CODE_ENDS);
    let ids = unmistakable.map(|text| vocabulary.id(text));
    ids.chain(as_control.map(|text| vocabulary.control_id(text))).flatten().collect()
}
