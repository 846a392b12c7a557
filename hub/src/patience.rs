//! How often, and when, something is tried again.

use std::{thread::sleep, time::Duration};

use crate::{HubError, Result, Watch};

/// Tries in a row that may fail before the last one.
const MOST_PAUSES: u32 = 3;

/// The first pause; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// The longest pause that a server may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Tries that failed in a row.
#[derive(Default)]
pub struct Patience {
    pauses: u32,
}

impl Patience {
    /// Calls `attempt` until it succeeds or is not worth another try.
    pub fn with<T>(watch: &mut dyn Watch, attempt: impl Fn() -> Result<T>) -> Result<T> {
        let mut patience = Self::default();
        loop {
            match attempt() {
                Ok(done) => return Ok(done),
                Err(error) => patience.pause(error, watch)?,
            }
        }
    }

    /// The last try got somewhere.
    pub fn renew(&mut self) {
        self.pauses = 0;
    }

    /// Waits before the next try.
    ///
    /// # Errors
    /// The error itself if there should be no other try.
    pub fn pause(&mut self, error: HubError, watch: &mut dyn Watch) -> Result<()> {
        let pause = match &error {
            HubError::Busy { pause: Some(pause), .. } => *pause,
            _ => FIRST_PAUSE * 2_u32.pow(self.pauses),
        };
        if !error.may_pass() || self.pauses == MOST_PAUSES || pause > LONGEST_PAUSE {
            return Err(error);
        }
        self.pauses += 1;
        watch.pauses(&error, pause);
        sleep(pause);
        Ok(())
    }
}
