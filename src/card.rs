//! What model cards have in common: a `README.md` for a hub.

use crate::{output::one_line, target::Kind};

/// A card is such a file.
pub const CARD: Kind = Kind::File("md");

/// What hubs read by machine: the repository of the source, if it is known, and the library that
/// runs the files.
pub fn front_matter(repository: Option<&str>, library: &str) -> String {
    let base = repository
        .map(|name| format!("base_model: {name}\nbase_model_relation: quantized\n"))
        .unwrap_or_default();
    format!(
        "---\n{base}library_name: {library}\npipeline_tag: text-generation\n\
         tags:\n- slim-llm\n- quantized\n---\n"
    )
}

/// A text from a file as code: on one line, and nothing that ends it.
pub fn code(text: &str) -> String {
    format!("`{}`", one_line(text).replace('`', "'"))
}
