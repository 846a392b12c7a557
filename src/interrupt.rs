//! Commands that write clean up when they are interrupted.

#[cfg(unix)]
use std::{
    fs::File,
    io::{self, IsTerminal, Write},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use std::{
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

#[cfg(unix)]
use signal_hook::{
    consts::{SIGBUS, SIGHUP, SIGINT, SIGTERM},
    flag,
    iterator::Signals,
    low_level::{self, exit},
};
use slim_converter::has_records;
#[cfg(unix)]
use slim_formats::remove_temporaries;
use slim_formats::{Removed, remove_leftovers, removed_unfinished};

use crate::output::{note, size, visible};

/// The exit code of a process that Ctrl-C has ended, as a shell says it.
pub const EXIT_INTERRUPTED: u8 = 130;

/// Exceeding the limit on the size of a file; of all Unix systems.
#[cfg(unix)]
const SIGXFSZ: i32 = 25;

/// Where a command leaves what it has done, if it ends early.
static KEPT: OnceLock<Kept> = OnceLock::new();

struct Kept {
    folder: PathBuf,
    /// What is told where it is not known whether there is anything in it.
    if_any: String,
}

/// How a conversion goes on that ended early.
const GO_ON: &str = "the same command with `--resume` goes on there, as long as source and \
                     settings are the same; with `--force` it begins anew";

/// The id of what is being fetched, whose beginning stays in the hub's cache.
static FETCHED: Mutex<Option<String>> = Mutex::new(None);

/// Whether the command handles signals itself, downloads aside.
#[cfg(unix)]
static IS_HANDLED: AtomicBool = AtomicBool::new(false);

/// While this value lives, a signal ends the command at once, and it tells that the download can go
/// on.
pub struct Fetching(());

impl Fetching {
    /// The model with this id is fetched from here on, if it is not there yet.
    pub fn begin(id: String) -> std::io::Result<Self> {
        *fetched() = Some(id);
        let fetching = Self(());
        tell_interrupted_downloads()?;
        Ok(fetching)
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        *fetched() = None;
    }
}

fn fetched() -> MutexGuard<'static, Option<String>> {
    FETCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From here on, whatever ends the command before its end tells that `folder` has what is done, if
/// it has any.
pub fn keep(folder: &Path) {
    let shown = folder.display().to_string();
    let if_any =
        format!("if there is a folder `{}`, it has what is done: {GO_ON}\n", visible(&shown));
    // A command converts once.
    let _ = KEPT.set(Kept { folder: folder.to_owned(), if_any });
}

/// From here on, a page of a mapped file that cannot be read ends the process with a sentence: the
/// file was shortened, or its disk has failed. What it leaves, the next command removes.
#[cfg(unix)]
#[allow(unsafe_code)]
pub fn explain_lost_pages() -> io::Result<()> {
    const SENTENCE: &[u8] =
        b"error: a file of the model was shortened while it was read, or its disk has failed\n";
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let end = move || {
        let _ = (&stderr).write(SENTENCE);
        if let Some(kept) = KEPT.get() {
            let _ = (&stderr).write(kept.if_any.as_bytes());
        }
        exit(2)
    };
    // SAFETY: `end` reads a variable that is set once, and makes system calls, `write` and `_exit`,
    // which a handler may; it neither allocates nor locks.
    unsafe { low_level::register(SIGBUS, end) }.map(drop)
}

/// Elsewhere the system ends the process.
#[cfg(not(unix))]
pub fn explain_lost_pages() -> std::io::Result<()> {
    Ok(())
}

/// From here on, Ctrl-C and what else ends a command removes its temporary files first, and tells
/// which. Writing beyond the limit on the size of a file becomes an error, after which they are
/// removed, too.
#[cfg(unix)]
pub fn clean_up_when_interrupted() -> io::Result<()> {
    watch(end)
}

/// As [`clean_up_when_interrupted`], but the first Ctrl-C only sets what is given back: for a
/// command that can go on later.
#[cfg(unix)]
pub fn stop_when_interrupted() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let given = Arc::clone(&stop);
    watch(move |signal| {
        if signal != SIGINT || fetched().is_some() || stop.swap(true, Ordering::Relaxed) {
            end(signal);
        }
        below_the_bar();
        note("the step at hand is finished first; Ctrl-C again ends at once");
    })?;
    Ok(given)
}

/// The first Ctrl-C, or what else asks a command to end, calls `wish`; the second one ends at once.
#[cfg(unix)]
pub fn on_wish_to_end(wish: impl Fn() + Send + 'static) -> io::Result<()> {
    let was_told = AtomicBool::new(false);
    watch(move |signal| match was_told.swap(true, Ordering::Relaxed) {
        false => {
            below_the_bar();
            wish();
        }
        true => exit(128 + signal),
    })
}

/// From here on, a download that is interrupted is told. Signals that come at other times do what
/// they would without this, until the command handles them itself.
#[cfg(unix)]
fn tell_interrupted_downloads() -> io::Result<()> {
    static IS_DONE: AtomicBool = AtomicBool::new(false);
    if IS_HANDLED.load(Ordering::Relaxed) || IS_DONE.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    listen(|signal| {
        if fetched().is_some() {
            end(signal);
        }
        if !IS_HANDLED.load(Ordering::Relaxed) {
            // It fails for signals that it does not know, which these are not.
            let _ = low_level::emulate_default_handler(signal);
        }
    })
}

/// The command handles signals itself.
#[cfg(unix)]
pub fn are_handled() {
    IS_HANDLED.store(true, Ordering::Relaxed);
}

#[cfg(unix)]
fn watch(on_signal: impl Fn(i32) + Send + 'static) -> io::Result<()> {
    are_handled();
    listen(on_signal)?;
    flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
    Ok(())
}

#[cfg(unix)]
fn listen(on_signal: impl Fn(i32) + Send + 'static) -> io::Result<()> {
    let ignored = ignored_signals();
    let heeded = |signal: &i32| ignored & (1 << (signal - 1)) == 0;
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP].into_iter().filter(heeded))?;
    std::thread::spawn(move || signals.forever().for_each(on_signal));
    Ok(())
}

/// Elsewhere temporary files of an interrupted command stay until the next one.
#[cfg(not(unix))]
pub fn clean_up_when_interrupted() -> std::io::Result<()> {
    Ok(())
}

/// Elsewhere nothing is told.
#[cfg(not(unix))]
fn tell_interrupted_downloads() -> std::io::Result<()> {
    Ok(())
}

/// Elsewhere nothing else handles them.
#[cfg(not(unix))]
pub fn are_handled() {}

/// As [`clean_up_when_interrupted`].
#[cfg(not(unix))]
pub fn stop_when_interrupted() -> std::io::Result<std::sync::Arc<std::sync::atomic::AtomicBool>> {
    Ok(std::sync::Arc::default())
}

/// Elsewhere the system ends the process.
#[cfg(not(unix))]
pub fn on_wish_to_end(_wish: impl Fn() + Send + 'static) -> std::io::Result<()> {
    Ok(())
}

/// The signals that the command is to ignore, a bit each from the lowest: of `nohup`, it is SIGHUP.
/// Linux tells.
#[cfg(unix)]
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(unix)]
fn end(signal: i32) {
    // As long as this value lives, nothing new comes into being.
    let cleared = remove_temporaries();
    below_the_bar();
    note("interrupted");
    cleared.removed.iter().for_each(|removed| note(told(removed)));
    tell_kept();
    if let Some(id) = &*fetched() {
        note(format_args!("what is there of `{id}` stays; the same command goes on from there"));
    }
    exit(128 + signal);
}

#[cfg(unix)]
fn below_the_bar() {
    if io::stderr().is_terminal() {
        note("");
    }
}

/// Removes what killed commands have left in the folder of an output, and tells it.
pub fn clear_leftovers(folder: &Path) {
    for removed in remove_leftovers(folder) {
        note(format_args!("{}, which an earlier run had left", told(&removed)));
    }
}

/// Tells what a command that has failed has removed, and what it leaves.
pub fn tell_leftovers() {
    removed_unfinished().iter().for_each(|removed| note(told(removed)));
    tell_kept();
}

fn tell_kept() {
    if let Some(Kept { folder, .. }) = KEPT.get()
        && has_records(folder)
    {
        note(format_args!("`{}` has what is done: {GO_ON}", folder.display()));
    }
}

fn told(removed: &Removed) -> String {
    format!("removed the temporary `{}` ({})", removed.path.display(), size(removed.bytes))
}
