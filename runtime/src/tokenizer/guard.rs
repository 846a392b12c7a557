//! Panics of the tokenizer library, as errors: a `tokenizer.json` comes from a file of unknown
//! origin, and the library trusts it.

use std::{
    cell::Cell,
    panic::{self, AssertUnwindSafe},
    sync::Once,
};

use crate::{Result, RuntimeError};

thread_local! {
    /// Whether a panic of this thread is going to be an error, and nothing to be printed.
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// What `call` gives.
///
/// # Errors
/// `Tokenizer` if it panics. What it was called on may be called again: at worst it panics again.
pub(super) fn guarded<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !IS_GUARDED.get() {
                before(info);
            }
        }));
    });
    let was_guarded = IS_GUARDED.replace(true);
    let answer = panic::catch_unwind(AssertUnwindSafe(call));
    IS_GUARDED.set(was_guarded);
    answer.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason");
        Err(RuntimeError::tokenizer(format!("the tokenizer library fails on it: {text}")))
    })
}
