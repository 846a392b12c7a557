//! A model on its way into the cache.

use std::path::PathBuf;

use crate::{
    HubId, Result, Settings, Watch,
    cache::{Repository, Snapshot},
    choice::{Weights, companions, shards},
    client::Client,
    download::download,
    listing::{Listing, RemoteFile},
};

/// What is known of a model once the hub has listed its files.
pub struct Fetch<'a> {
    id: &'a HubId,
    client: Client<'a>,
    repository: &'a Repository,
    listing: Listing,
    snapshot: Snapshot,
}

impl<'a> Fetch<'a> {
    /// Asks the hub which files there are.
    pub fn begin(
        settings: &'a Settings,
        id: &'a HubId,
        repository: &'a Repository,
        watch: &mut dyn Watch,
    ) -> Result<Self> {
        let client = Client::new(settings, id);
        let listing = Listing::request(&client, watch)?;
        let snapshot = repository.snapshot(listing.commit());
        Ok(Self { id, client, repository, listing, snapshot })
    }

    /// Fetches the files of the model, its weights last; gives where it lies.
    pub fn model(&self, watch: &mut dyn Watch) -> Result<PathBuf> {
        let names = self.listing.names();
        let path = match Weights::among(&names, self.id)? {
            Weights::Gguf(parts) => {
                self.files(&parts, watch)?;
                self.snapshot.path(&parts[0])
            }
            Weights::Single(name) => {
                self.files(&[companions(&names), vec![name]].concat(), watch)?;
                self.snapshot.folder().to_owned()
            }
            Weights::Index(name) => {
                // It says which other files there are.
                let index = self.snapshot.path(&name);
                self.files(&[name], watch)?;
                self.files(&[companions(&names), shards(&index)?].concat(), watch)?;
                self.snapshot.folder().to_owned()
            }
        };
        self.repository.write_ref(self.id.revision(), self.listing.commit())?;
        watch.end(self.id, self.listing.commit());
        Ok(path)
    }

    /// Fetches files, as far as the cache lacks them, and gives them their names.
    fn files(&self, names: &[String], watch: &mut dyn Watch) -> Result<()> {
        let files: Result<Vec<_>> = names.iter().map(|name| self.listing.file(name)).collect();
        let files = files?;
        let is_missing = |file: &&RemoteFile| !self.repository.has_blob(file);
        let missing: Vec<_> = files.iter().copied().filter(is_missing).collect();
        let sizes = missing.iter().map(|file| self.repository.missing_bytes(file));
        let bytes = sizes.fold(0, u64::saturating_add);
        self.repository.require_room(bytes)?;
        watch.begin(bytes);
        for file in missing {
            download(&self.client, self.repository, file, watch)?;
        }
        files.iter().try_for_each(|file| self.snapshot.link(file))
    }
}
