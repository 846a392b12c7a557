//! How users name a model of a hub.

use std::{fmt, str::FromStr};

/// The revision of those who name none.
const MAIN: &str = "main";

/// Hosts of the hub in addresses that users copy.
const HOSTS: [&str; 2] = ["huggingface.co", "hf.co"];

/// `org/name`, `org/name@revision`, `org/name:Q4_K_M` or `org/name@revision:Q4_K_M`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    repository: String,
    revision: Option<String>,
    gguf: Option<String>,
}

impl HubId {
    /// That of the model whose page on the hub has an address, as
    /// `https://huggingface.co/org/name/tree/v1`, or one that other programs take, as
    /// `hf.co/org/name:Q4_K_M`.
    pub fn of_address(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
        let path = match scheme {
            "hf" => rest,
            _ => HOSTS.iter().find_map(|host| rest.strip_prefix(host)?.strip_prefix('/'))?,
        };
        let mut parts = path.split('/');
        let repository = format!("{}/{}", parts.next()?, parts.next()?);
        let revision = match (parts.next(), parts.next()) {
            (Some("tree" | "blob" | "resolve"), Some(revision)) => format!("@{revision}"),
            _ => String::new(),
        };
        format!("{repository}{}", revision.trim_end_matches("@main")).parse().ok()
    }

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
    fn ids_are_found_in_addresses() {
        for (address, id) in [
            ("https://huggingface.co/org/name", Some("org/name")),
            ("https://huggingface.co/org/name/", Some("org/name")),
            ("https://huggingface.co/org/name/tree/main", Some("org/name")),
            ("https://huggingface.co/org/name/blob/v1/config.json", Some("org/name@v1")),
            ("hf.co/org/name:Q4_K_M", Some("org/name:Q4_K_M")),
            ("hf://org/name", Some("org/name")),
            ("https://huggingface.co/org", None),
            ("https://huggingface.company/org/name", None),
            ("hf.co/../name", None),
            ("org/name", None),
        ] {
            let found = HubId::of_address(address).map(|id| id.to_string());
            assert_eq!(found.as_deref(), id, "{address}");
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
