//! Answers to what users of llama.cpp are used to type.

use std::ffi::OsStr;

/// What is typed there, and what it is here; only what clap would answer beside the point.
const HABITS: [(&str, &str); 6] = [
    ("-ngl", "the number of blocks on the GPU is `--gpu-layers N`"),
    ("-cnv", "a chat is `--chat`"),
    ("-i", "a chat is `--chat`"),
    ("-sys", "the system prompt is `--system TEXT`"),
    ("-m", "the model has no flag: `slimllm run MODEL`"),
    ("--model", "the model has no flag: `slimllm run MODEL`"),
];

/// The habit among arguments that could not be read, and what to type instead.
pub fn explain(
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> Option<(&'static str, &'static str)> {
    arguments
        .into_iter()
        .find_map(|argument| HABITS.into_iter().find(|(habit, _)| argument.as_ref() == *habit))
}
