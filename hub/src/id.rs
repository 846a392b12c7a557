//! How users name a model of a hub.

use std::{fmt, str::FromStr};

/// The revision of those who name none.
const MAIN: &str = "main";

/// `org/name`, `org/name@revision`, `org/name:Q4_K_M` or `org/name@revision:Q4_K_M`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    repository: String,
    revision: Option<String>,
    gguf: Option<String>,
}

impl HubId {
    /// `org/name`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// A branch, a tag, a commit, or a name such as `refs/pr/1`.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(MAIN)
    }

    /// How the name of the GGUF file ends that is meant, if one is.
    pub fn gguf(&self) -> Option<&str> {
        self.gguf.as_deref()
    }
}

/// A text that is no id of a hub's model.
#[derive(Debug, PartialEq, Eq)]
pub struct NoHubId;

impl FromStr for HubId {
    type Err = NoHubId;

    fn from_str(text: &str) -> Result<Self, NoHubId> {
        let (rest, gguf) = split_off(text, ':');
        let (repository, revision) = split_off(rest, '@');
        let (organization, name) = repository.split_once('/').ok_or(NoHubId)?;
        let is_id = is_name(organization)
            && is_name(name)
            && !is_file_name(name)
            && revision.is_none_or(|revision| revision.split('/').all(is_name))
            && gguf.is_none_or(|gguf| gguf.split('/').all(is_name));
        is_id
            .then(|| Self {
                repository: repository.to_owned(),
                revision: revision.map(str::to_owned),
                gguf: gguf.map(str::to_owned),
            })
            .ok_or(NoHubId)
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))?;
        self.gguf.iter().try_for_each(|gguf| write!(f, ":{gguf}"))
    }
}

/// What stands before a mark, and what behind it.
fn split_off(text: &str, mark: char) -> (&str, Option<&str>) {
    text.split_once(mark).map_or((text, None), |(before, behind)| (before, Some(behind)))
}

/// Whether a text names something on a hub, and nothing else as a part of a path.
fn is_name(text: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.len() <= 255
        && text.chars().all(is_plain)
        && !text.contains("..")
}

fn is_file_name(name: &str) -> bool {
    [".gguf", ".safetensors", ".onnx", ".json"].iter().any(|extension| name.ends_with(extension))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_and_shown() {
        for (text, repository, revision, gguf) in [
            ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", "main", None),
            ("org/name@v1.0", "org/name", "v1.0", None),
            ("org/name.v2@refs/pr/1", "org/name.v2", "refs/pr/1", None),
            ("org/name:Q4_K_M", "org/name", "main", Some("Q4_K_M")),
            ("org/name@abc:BF16/name.gguf", "org/name", "abc", Some("BF16/name.gguf")),
        ] {
            let id: HubId = text.parse().unwrap();
            assert_eq!((id.repository(), id.revision(), id.gguf()), (repository, revision, gguf));
            assert_eq!(id.to_string(), text);
        }
    }

    #[test]
    fn paths_and_what_could_leave_the_cache_are_no_ids() {
        for text in [
            "name",
            "./org/name",
            "/org/name",
            "a/b/c",
            "models/x.gguf",
            "../x",
            "org/",
            "org/..",
            "org/na me",
            "org/name@",
            "org/name@../../x",
            "org/name@a//b",
            "org/name@/a",
            "org/name:",
            "org/name:../x",
            "C:\\org\\name",
        ] {
            assert_eq!(text.parse::<HubId>(), Err(NoHubId), "{text}");
        }
    }
}
