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
mod id;
mod listing;
mod patience;
mod settings;
mod watch;

use std::path::PathBuf;

use self::{
    cache::Repository,
    choice::{Weights, companions, shards},
    client::Client,
    download::download,
    listing::{Listing, RemoteFile},
};
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
        let cached = repository.commit(id.revision()).and_then(|commit| {
            let snapshot = repository.snapshot(&commit);
            snapshot.model(id.gguf())
        });
        match cached {
            Some(path) => Ok(path),
            None if self.settings.is_offline => Err(HubError::Offline {
                id: id.to_string(),
                folder: repository.folder().to_owned(),
            }),
            None => self.fetch(id, &repository, watch),
        }
    }

    /// Fetches what the cache lacks of a model.
    fn fetch(&self, id: &HubId, repository: &Repository, watch: &mut dyn Watch) -> Result<PathBuf> {
        let client = Client::new(&self.settings, id);
        let listing = Listing::request(&client, watch)?;
        let weights = Weights::among(&listing.names(), id)?;
        let snapshot = repository.snapshot(listing.commit());
        let fetch = |files: &[&RemoteFile], watch: &mut dyn Watch| {
            let missing: Vec<_> =
                files.iter().copied().filter(|file| !repository.has_blob(file)).collect();
            repository.require_room(&missing)?;
            watch.begin(missing.iter().map(|file| file.size).sum());
            missing.iter().try_for_each(|file| download(&client, repository, file, watch))?;
            files.iter().try_for_each(|file| snapshot.link(file))
        };
        let needed = match &weights {
            Weights::Gguf(names) => names.clone(),
            Weights::Single(name) => [companions(&listing.names()), vec![name.clone()]].concat(),
            Weights::Index(name) => {
                // It says which other files there are.
                fetch(&[listing.file(name)?], watch)?;
                let shards = shards(&snapshot.path(name))?;
                [companions(&listing.names()), shards].concat()
            }
        };
        let files: Result<Vec<_>> = needed.iter().map(|name| listing.file(name)).collect();
        fetch(&files?, watch)?;
        repository.write_ref(id.revision(), listing.commit())?;
        watch.end(id, listing.commit());
        Ok(match &weights {
            Weights::Gguf(names) => snapshot.path(&names[0]),
            Weights::Single(_) | Weights::Index(_) => snapshot.folder().to_owned(),
        })
    }
}
