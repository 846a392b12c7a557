//! Models of a hub: found in its cache, or fetched into it.
//!
//! Two types to know: a [`HubId`] names a model as users type it, and [`Hub::locate`] gives the
//! path where it lies. What is in the cache opens without a request. What is read, written and
//! checked, and what may go wrong, is in `docs/hub.md`. Nothing here prints: a [`Watch`] is told.
//!
//! ```no_run
//! use slim_hub::{Hub, HubId, Settings, Unwatched};
//!
//! let id: HubId = "org/name@main".parse().expect("it is an id");
//! let path = Hub::new(Settings::from_environment()?).locate(&id, &mut Unwatched)?;
//! println!("{}", path.display());
//! # Ok::<(), slim_hub::HubError>(())
//! ```

mod cache;
mod choice;
mod client;
mod download;
mod error;
mod fetch;
mod id;
mod listing;
mod patience;
mod settings;
mod watch;

use std::path::PathBuf;

use self::{cache::Repository, fetch::Fetch};
pub use self::{
    error::{HubError, Refusal, Result},
    id::{HubId, NoHubId},
    settings::{Settings, Token},
    watch::{Unwatched, Watch},
};

/// A hub, and the cache of what was fetched from it.
pub struct Hub {
    settings: Settings,
}

impl Hub {
    /// The hub that settings describe. Nothing is asked yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }

    /// Where a model lies, for `open_model`. It is fetched if the cache does not have it whole.
    ///
    /// # Errors
    /// A sentence of [`HubError`]. The cache stays usable, and what was received of a file stays
    /// for the next time.
    pub fn locate(&self, id: &HubId, watch: &mut dyn Watch) -> Result<PathBuf> {
        let repository = Repository::of(&self.settings.cache, id);
        let commit = repository.commit(id.revision());
        let cached = commit.and_then(|commit| repository.snapshot(&commit).model(id.gguf()));
        match cached {
            Some(path) => Ok(path),
            None if self.settings.is_offline => Err(HubError::Offline {
                id: id.to_string(),
                folder: repository.folder().to_owned(),
            }),
            None => Fetch::begin(&self.settings, id, &repository, watch)?.model(watch),
        }
    }
}
