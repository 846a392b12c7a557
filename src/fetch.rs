//! Models that are named by their id on a hub.

use std::{borrow::Cow, path::Path, time::Duration};

use anyhow::Result;
use slim_hub::{Hub, HubError, HubId, Settings, Watch};

use crate::{
    failure::advised,
    interrupt::Fetching,
    output::{note, one_line, size, warn},
    progress::Progress,
};

/// What progress is counted in.
const MIB: u64 = 1 << 20;

/// Where a model lies that the user names: the path itself, or, if nothing is there and it can be
/// an id of a hub, where the hub's cache has it. It is fetched if it is not there yet; quietly, if
/// only warnings are wanted.
pub fn locate(path: &Path, is_quiet: bool) -> Result<Cow<'_, Path>> {
    if path.symlink_metadata().is_ok() {
        return Ok(path.into());
    }
    let text = path.to_str().unwrap_or_default();
    if let Some(id) = HubId::of_address(text) {
        let message = format!("`{text}`: an address, and a model of the hub is named by its id");
        return Err(advised(message, format!("give `{id}`")));
    }
    if format!("org/{text}").parse::<HubId>().is_ok() {
        let hint = "check the spelling; a model of the hub is named by its id, `org/name`";
        return Err(advised(format!("`{text}`: there is no such file"), hint));
    }
    let Ok(id) = text.parse::<HubId>() else { return Ok(path.into()) };
    let hub = Hub::new(Settings::from_environment()?);
    let _fetching = Fetching::begin(id.to_string())?;
    let mut talk = Talk { is_quiet, progress: None, done: 0, total: 0, shown: 0 };
    Ok(hub.locate(&id, &mut talk)?.into())
}

/// Tells how far a download is.
struct Talk {
    /// Whether nothing is told but warnings.
    is_quiet: bool,
    progress: Option<Progress>,
    /// Bytes of the files that are there, and of all.
    done: u64,
    total: u64,
    /// The step that was told last.
    shown: u64,
}

impl Watch for Talk {
    fn begin(&mut self, bytes: u64) {
        let is_told = bytes > 0 && !self.is_quiet;
        (self.done, self.total, self.shown) = (0, bytes, 0);
        self.progress = is_told.then(|| Progress::new("MiB", bytes.div_ceil(MIB) as usize));
    }

    fn received(&mut self, file: &str, bytes: u64) {
        // What is fetched anew may be more than was told.
        let reached = (self.done + bytes).min(self.total);
        // The last step may be shorter than the others.
        let step = if reached == self.total { reached.div_ceil(MIB) } else { reached / MIB };
        let Some(progress) = &mut self.progress else { return };
        match step > self.shown {
            true => progress.step(step as usize, file),
            false => progress.detail(file),
        }
        self.shown = self.shown.max(step);
    }

    fn received_whole(&mut self, file: &str, bytes: u64) {
        self.received(file, bytes);
        self.done += bytes;
    }

    fn pauses(&mut self, error: &HubError, pause: Duration) {
        let when = match pause.is_zero() {
            true => "it is fetched anew".to_owned(),
            false => format!("next try in {:.1} s", pause.as_secs_f64()),
        };
        let line = format!("{}; {when}", one_line(&error.to_string()));
        match &self.progress {
            Some(progress) => progress.warn(&line),
            None => warn(&line),
        }
    }

    fn waits_for_another(&mut self, file: &str) {
        note(format_args!("another process is fetching `{}`; waiting for it", one_line(file)));
    }

    fn end(&mut self, id: &HubId, commit: &str) {
        if let Some(progress) = self.progress.take() {
            progress.finish();
            note(format_args!("fetched {} of `{id}`, commit {commit}", size(self.total)));
        }
    }
}
