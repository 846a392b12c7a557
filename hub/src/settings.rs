//! Where hub and cache are: the environment variables that other programs read, too.

use std::{
    env, fmt,
    path::{Path, PathBuf},
};

use crate::{HubError, Result};

/// The hub that is meant where nobody names another.
const ENDPOINT: &str = "https://huggingface.co";

/// Where hub and cache are, and who asks.
#[derive(Debug)]
pub struct Settings {
    /// The address of the hub, without a slash at its end.
    pub endpoint: String,
    /// The folder of all models.
    pub cache: PathBuf,
    /// Who asks, if that is told.
    pub token: Option<Token>,
    /// Whether only the cache may be read.
    pub is_offline: bool,
}

impl Settings {
    /// As `docs/hub.md` lists the variables.
    ///
    /// # Errors
    /// `Environment` for a value that cannot be used.
    pub fn from_environment() -> Result<Self> {
        let home = home();
        let cache = variable("HF_HUB_CACHE").map(PathBuf::from).unwrap_or(home.join("hub"));
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            return Err(HubError::Environment {
                variable: "HF_ENDPOINT",
                found: endpoint,
                expected: "an address that begins with `https://`",
            });
        }
        let is_on = |value: String| {
            ["1", "true", "yes", "on"].contains(&value.to_ascii_lowercase().as_str())
        };
        let is_offline = variable("HF_HUB_OFFLINE").is_some_and(is_on);
        Ok(Self { endpoint, cache, token: Token::find(&home)?, is_offline })
    }
}

/// The folder of everything that belongs to the hub.
fn home() -> PathBuf {
    let cache = || match variable("XDG_CACHE_HOME") {
        Some(cache) => PathBuf::from(cache),
        None => env::home_dir().unwrap_or_default().join(".cache"),
    };
    variable("HF_HOME").map_or_else(|| cache().join("huggingface"), PathBuf::from)
}

/// A variable that is set to something.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.trim().is_empty())
}

/// A secret that tells the hub who asks.
pub struct Token {
    secret: String,
    /// Where it was found.
    origin: String,
}

impl Token {
    /// That of the environment, or the one that a login has left in a file.
    fn find(home: &Path) -> Result<Option<Self>> {
        let (secret, origin) = match variable("HF_TOKEN") {
            Some(secret) => (secret, "`HF_TOKEN`".to_owned()),
            None => {
                let named = variable("HF_TOKEN_PATH").map(PathBuf::from);
                let path = named.unwrap_or_else(|| home.join("token"));
                match std::fs::read_to_string(&path) {
                    Ok(secret) => (secret, format!("the file `{}`", path.display())),
                    // Who has no token has none in a file either.
                    Err(_) => return Ok(None),
                }
            }
        };
        let secret = secret.trim().to_owned();
        if !secret.chars().all(|c| c.is_ascii_graphic()) {
            return Err(HubError::Environment {
                variable: "HF_TOKEN",
                found: format!("other characters in {origin}"),
                expected: "a token of letters, digits and marks",
            });
        }
        Ok((!secret.is_empty()).then_some(Self { secret, origin }))
    }

    /// The header that carries it.
    pub(crate) fn header(&self) -> String {
        format!("Bearer {}", self.secret)
    }

    /// Where it was found.
    pub(crate) fn origin(&self) -> &str {
        &self.origin
    }
}

impl fmt::Debug for Token {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the token of {}", self.origin)
    }
}
