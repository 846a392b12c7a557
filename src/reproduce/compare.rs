//! What differs between a file and its repetition.

use anyhow::Result;
use slim_formats::gguf::GgufFile;

/// Tensors that are named at most.
const NAMED: usize = 4;

/// A sentence for each thing in which `repeated` is not `file`; none if they have the same bytes.
pub fn differences(file: &GgufFile, repeated: &GgufFile) -> Result<Vec<String>> {
    if file.parts().map(|part| part.bytes()).eq(repeated.parts().map(|part| part.bytes())) {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let (theirs, ours) = (file.metadata(), repeated.metadata());
    let is_hash = |key: &str| key.ends_with(".xxh3");
    let keys = theirs.iter().map(|(key, _)| key);
    let more = ours.iter().map(|(key, _)| key).filter(|key| !theirs.contains(key));
    for key in keys.chain(more).filter(|key| !is_hash(key)) {
        if theirs.get(key) != ours.get(key) {
            let shown = |value: Option<&slim_formats::gguf::Value>| match value {
                Some(value) => value.as_str().map_or_else(|| format!("{value:?}"), str::to_owned),
                None => "absent".to_owned(),
            };
            let (theirs, ours) = (shown(theirs.get(key)), shown(ours.get(key)));
            found.push(format!("`{key}`: `{}` in the file, `{}` now", cut(&theirs), cut(&ours)));
        }
    }
    let differs = |name: &str| {
        file.tensor(name).map(|info| file.bytes_of(info))
            != repeated.tensor(name).map(|info| repeated.bytes_of(info))
    };
    let names = file.tensors().iter().map(|info| info.name.as_str());
    let other: Vec<&str> = names.filter(|name| differs(name)).collect();
    if !other.is_empty() {
        let named = other[..other.len().min(NAMED)].join("`, `");
        let rest = if other.len() > NAMED { ", ..." } else { "" };
        let (other, all) = (other.len(), file.tensors().len());
        found.push(format!("{other} of {all} tensors: `{named}`{rest}"));
    }
    if found.is_empty() {
        found.push("the order of tensors, or their padding".to_owned());
    }
    Ok(found)
}

fn cut(text: &str) -> String {
    const CHARACTERS: usize = 80;
    match text.char_indices().nth(CHARACTERS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
