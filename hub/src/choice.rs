//! Which files of a repository are needed.

use std::{collections::BTreeSet, path::Path};

use serde_json::Value;
use slim_formats::{Limits, NumberedFile};

use crate::{HubError, HubId, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What is read beside safetensors, by `formats/src/folder.rs`.
const COMPANIONS: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/default.jinja",
];

/// Those of them without which a model is not whole.
pub const NEEDED: [&str; 2] = ["config.json", "tokenizer.json"];

const GGUF: &str = ".gguf";

/// What may stand before the ending of a name.
const MARKS: [char; 4] = ['-', '.', '_', '/'];

/// Names that a sentence lists.
const SHOWN: usize = 32;

/// What most people take.
const USUAL: &str = "Q4_K_M";

/// The files that hold the weights of a model.
#[derive(Debug, PartialEq, Eq)]
pub enum Weights {
    /// The one file in safetensors.
    Single(String),
    /// The list of the files in safetensors.
    Index(String),
    /// A GGUF model, in all its parts.
    Gguf(Vec<String>),
}

impl Weights {
    /// Those that an id means of a repository with files of these names.
    ///
    /// # Errors
    /// `NoModel` if there are none, or if several could be meant.
    pub fn among(names: &BTreeSet<&str>, id: &HubId) -> Result<Self> {
        let no_model = |found: String, hint: String| {
            Err(HubError::NoModel { id: id.to_string(), found, hint })
        };
        if id.gguf().is_none()
            && let Some(weights) = safetensors(names)
        {
            return Ok(weights);
        }
        let mut models = gguf_models(names, id.gguf());
        match (models.len(), id.gguf()) {
            (1, _) => Ok(Self::Gguf(models.remove(0))),
            (0, Some(ending)) => {
                let hint = match endings(names, None) {
                    all if all.is_empty() => "leave out what stands behind the `:`".to_owned(),
                    all => format!("it has {}", list(&all)),
                };
                no_model(format!("no GGUF model whose name ends with `{ending}`"), hint)
            }
            (0, None) => {
                let (instead, hint) = instead(names);
                no_model(format!("no safetensors and no GGUF, {instead}"), hint.to_owned())
            }
            (count, None) => {
                let all = endings(names, None);
                let usual = all.iter().find(|ending| *ending == USUAL).unwrap_or(&all[0]);
                let hint = format!("say which, as in `{id}:{usual}`; it has {}", list(&all));
                no_model(format!("{count} GGUF models"), hint)
            }
            (count, Some(ending)) => no_model(
                format!("{count} GGUF models whose names end with `{ending}`"),
                format!("give more of the name: {}", list(&endings(names, Some(ending)))),
            ),
        }
    }
}

/// The weights in safetensors, if there are any.
pub fn safetensors(names: &BTreeSet<&str>) -> Option<Weights> {
    if names.contains(SINGLE) {
        return Some(Weights::Single(SINGLE.to_owned()));
    }
    names.contains(INDEX).then(|| Weights::Index(INDEX.to_owned()))
}

/// The GGUF models whose names have an ending, in all their parts.
pub fn gguf_models(names: &BTreeSet<&str>, ending: Option<&str>) -> Vec<Vec<String>> {
    let ending = ending.map(str::to_ascii_lowercase);
    let ending = ending.as_deref().map(|ending| ending.strip_suffix(GGUF).unwrap_or(ending));
    let is_meant = |name: &str| {
        let Some(stem) = stem(name) else { return false };
        let Some(ending) = ending else { return true };
        let begins_at_mark = |before: &str| before.is_empty() || before.ends_with(MARKS);
        stem.to_ascii_lowercase().strip_suffix(ending).is_some_and(begins_at_mark)
    };
    names.iter().filter(|name| is_meant(name)).map(|name| all_parts(name)).collect()
}

/// The name of a GGUF model without its extension and the number of its part; `None` for further
/// parts, and for files that are no model by themselves.
fn stem(name: &str) -> Option<String> {
    let (folder, file) = split_path(name);
    let stem = match NumberedFile::of(file) {
        Some(part) if part.number > 1 => return None,
        Some(part) if name.ends_with(GGUF) => part.stem().to_owned(),
        _ => file.strip_suffix(GGUF)?.to_owned(),
    };
    let is_addition = ["mmproj", "imatrix"].iter().any(|kind| stem.contains(kind));
    (!is_addition).then(|| folder.to_owned() + &stem)
}

/// What tells each GGUF model whose name has an ending from all others: as much of its end as it
/// takes.
fn endings(names: &BTreeSet<&str>, ending: Option<&str>) -> Vec<String> {
    let shortest = |parts: &Vec<String>| {
        let name = stem(&parts[0]).expect("it is the name of a model");
        let marks = name.rmatch_indices(['-', '.', '/']).map(|(mark, _)| &name[mark + 1..]);
        let tells = |ending: &&str| gguf_models(names, Some(ending)).len() == 1;
        marks.chain([name.as_str()]).find(tells).unwrap_or(&name).to_owned()
    };
    gguf_models(names, ending).iter().map(shortest).collect()
}

/// The names of all parts of the model to whose first part `name` belongs.
fn all_parts(name: &str) -> Vec<String> {
    let (folder, file) = split_path(name);
    match NumberedFile::of(file) {
        Some(part) => (1..=part.count).map(|n| folder.to_owned() + &part.name_of(n)).collect(),
        None => vec![name.to_owned()],
    }
}

/// The folder of a name, with the slash at its end, and the rest.
fn split_path(name: &str) -> (&str, &str) {
    name.split_at(name.rfind('/').map_or(0, |slash| slash + 1))
}

/// What there is of the files that are read beside safetensors.
pub fn companions(names: &BTreeSet<&str>) -> Vec<String> {
    let there = COMPANIONS.iter().filter(|name| names.contains(*name));
    there.map(|&name| name.to_owned()).collect()
}

/// The names of the files that an index names, and its own.
///
/// # Errors
/// `Answer` if it is no index; `Io`.
pub fn shards(index: &Path) -> Result<Vec<String>> {
    let limit = Limits::default().string_bytes;
    let no_index = |found: String| HubError::Answer {
        of: index.display().to_string(),
        found,
        expected: "a list of tensors and their files",
    };
    let io = |source| HubError::io(index, "read", source);
    let bytes = index.metadata().map_err(io)?.len();
    if bytes > limit {
        return Err(no_index(format!("{bytes} bytes")));
    }
    let text = std::fs::read(index).map_err(io)?;
    let json: Value = serde_json::from_slice(&text).map_err(|error| no_index(error.to_string()))?;
    let map = json["weight_map"].as_object().ok_or_else(|| no_index("no `weight_map`".into()))?;
    let files: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    Ok(files.into_iter().chain([INDEX]).map(str::to_owned).collect())
}

/// What a repository has in place of weights that are read, and what to do.
fn instead(names: &BTreeSet<&str>) -> (&'static str, &'static str) {
    const ELSEWHERE: &str = "take a repository that has the model as safetensors or GGUF";
    let has = |extensions: &[&str]| {
        names.iter().any(|name| extensions.iter().any(|extension| name.ends_with(extension)))
    };
    match () {
        () if has(&["adapter_config.json"]) => (
            "but a LoRA adapter",
            "merge it into its base model with PEFT: `merge_and_unload()`, then \
             `save_pretrained(...)`",
        ),
        () if has(&[".safetensors"]) => ("but safetensors under other names", ELSEWHERE),
        () if has(&[".onnx"]) => (
            "but ONNX graphs, which are not fetched",
            "download it with `hf download`, and give the `.onnx` file",
        ),
        () if has(&[".bin", ".pt", ".pth", ".ckpt"]) => (
            "but PyTorch pickles, which are not read",
            "take a repository that has the model as safetensors or GGUF, or load it with \
             transformers and save it with `save_pretrained`, which writes safetensors",
        ),
        () => ("and no other weights", ELSEWHERE),
    }
}

/// The first of a list, and how many there are besides.
fn list(endings: &[String]) -> String {
    let shown: Vec<_> = endings.iter().take(SHOWN).map(|ending| format!("`{ending}`")).collect();
    match endings.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str], id: &str) -> Result<Weights> {
        Weights::among(&names.iter().copied().collect(), &id.parse().unwrap())
    }

    fn gguf(names: &[&str]) -> Weights {
        Weights::Gguf(names.iter().map(|&name| name.to_owned()).collect())
    }

    #[test]
    fn safetensors_come_before_gguf_unless_it_is_named() {
        let names = [SINGLE, INDEX, "a-Q8_0.gguf", "pytorch_model.bin"];
        assert_eq!(chosen(&names, "o/n").unwrap(), Weights::Single(SINGLE.to_owned()));
        assert_eq!(chosen(&names[1..], "o/n").unwrap(), Weights::Index(INDEX.to_owned()));
        assert_eq!(chosen(&names, "o/n:q8_0").unwrap(), gguf(&["a-Q8_0.gguf"]));
    }

    #[test]
    fn gguf_models_are_told_by_their_endings() {
        let names = [
            "m-Q4_K_M.gguf",
            "m-UD-Q4_K_M.gguf",
            "m.Q8_0.gguf",
            "mmproj-m-Q8_0.gguf",
            "BF16/m-BF16-00001-of-00002.gguf",
            "BF16/m-BF16-00002-of-00002.gguf",
        ];
        let parts = gguf(&names[4..]);
        assert_eq!(chosen(&names, "o/n:BF16").unwrap(), parts);
        assert_eq!(chosen(&names, "o/n:bf16/m-bf16").unwrap(), parts);
        assert_eq!(chosen(&names, "o/n:Q8_0").unwrap(), gguf(&["m.Q8_0.gguf"]));
        assert_eq!(chosen(&names, "o/n:UD-Q4_K_M").unwrap(), gguf(&["m-UD-Q4_K_M.gguf"]));
        assert_eq!(chosen(&names, "o/n:m-Q4_K_M.gguf").unwrap(), gguf(&["m-Q4_K_M.gguf"]));
        for (id, found) in [
            ("o/n:Q4_K_M", "2 GGUF models whose names end with `Q4_K_M`"),
            ("o/n:8_0", "no GGUF model whose name ends with `8_0`"),
            ("o/n", "4 GGUF models"),
        ] {
            let error = chosen(&names, id).unwrap_err().to_string();
            assert!(error.contains(found), "{error}");
        }
        assert_eq!(chosen(&names[2..4], "o/n").unwrap(), gguf(&["m.Q8_0.gguf"]));
        for (id, hint) in [
            ("o/n:Q4_K_M", "give more of the name: `m-Q4_K_M`, `UD-Q4_K_M`"),
            ("o/n", "say which, as in `o/n:BF16`; it has `BF16`, `m-Q4_K_M`, `UD-Q4_K_M`, `Q8_0`"),
        ] {
            assert_eq!(chosen(&names, id).unwrap_err().hint().unwrap(), hint);
        }
        let hint = chosen(&["m-Q2_K.gguf", "m-Q4_K_M.gguf"], "o/n").unwrap_err().hint().unwrap();
        assert_eq!(hint, "say which, as in `o/n:Q4_K_M`; it has `Q2_K`, `Q4_K_M`");
    }

    #[test]
    fn what_is_there_instead_is_named() {
        for (name, found) in [
            ("pytorch_model.bin", "pickles"),
            ("onnx/model.onnx", "ONNX"),
            ("consolidated.safetensors", "other names"),
            ("README.md", "no other weights"),
        ] {
            let error = chosen(&[name], "o/n").unwrap_err().to_string();
            assert!(error.contains(found), "{error}");
        }
    }
}
