//! Who is told how far a download is.

use std::time::Duration;

use crate::{HubError, HubId};

/// Is told what happens while a model is fetched.
pub trait Watch {
    /// So many bytes are to be fetched now. What earlier downloads have left is not among them.
    fn begin(&mut self, _bytes: u64) {}

    /// So many of them that belong to `file` are there; fewer than before if it begins anew.
    fn received(&mut self, _file: &str, _bytes: u64) {}

    /// The file is there, and is what it should be; so many of the bytes were its own.
    fn received_whole(&mut self, _file: &str, _bytes: u64) {}

    /// Something went wrong that may pass; the next try is after a pause.
    fn pauses(&mut self, _error: &HubError, _pause: Duration) {}

    /// Another process is fetching `file`; its end is waited for.
    fn waits_for_another(&mut self, _file: &str) {}

    /// Everything is there.
    fn end(&mut self, _id: &HubId, _commit: &str) {}
}

/// Nobody is told.
pub struct Unwatched;

impl Watch for Unwatched {}
