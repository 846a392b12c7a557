//! How long work takes, measured on the device.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, sys::CUevent_flags};
use rayon::prelude::*;

use super::{Device, driver::refused};
use crate::Result;

/// Calls that go before those that are measured: they load code, and give the host time to run
/// ahead.
const WARM_UP_RUNS: usize = 3;
const COPY_RUNS: usize = 9;

impl Device {
    /// Seconds that the device takes for each of `runs` calls of `work`.
    ///
    /// The calls are queued without a pause between them. Launches cost nothing as long as the host
    /// is faster than the device, so `work` should be large, or a [`super::Graph`].
    ///
    /// # Errors
    /// Those of `work`; `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn time(&self, runs: usize, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
        (0..WARM_UP_RUNS).try_for_each(|_| work())?;
        let mut events = vec![self.event()?];
        for _ in 0..runs {
            work()?;
            events.push(self.event()?);
        }
        let seconds =
            |pair: &[CudaEvent]| pair[0].elapsed_ms(&pair[1]).map(|ms| f64::from(ms) / 1e3);
        let times: std::result::Result<_, _> = events.windows(2).map(seconds).collect();
        times.map_err(refused("time work on the device"))
    }

    /// Bytes per second that a copy of `bytes` bytes within the device's memory reads and writes,
    /// the median of some.
    ///
    /// # Errors
    /// `OutOfDeviceMemory`; `Driver`.
    ///
    /// # Panics
    /// Inside [`Device::capture`].
    pub fn copy_bandwidth(&self, bytes: usize) -> Result<f64> {
        let (from, mut to) = (self.allocate(bytes)?, self.allocate(bytes)?);
        // Zeros may be copied faster than numbers.
        let number = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
        let numbers: Vec<u8> = (0..bytes as u64).into_par_iter().map(number).collect();
        self.upload(&from, 0, &numbers)?;
        let mut seconds = self.time(COPY_RUNS, || {
            let copied = self.stream.memcpy_dtod(&from, &mut to);
            copied.map_err(refused("copy within the device's memory"))
        })?;
        seconds.sort_by(f64::total_cmp);
        Ok(2.0 * bytes as f64 / seconds[COPY_RUNS / 2])
    }

    /// The stream that all work goes to, for other libraries whose work is to be timed.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// A point in the stream that time can be told by.
    fn event(&self) -> Result<CudaEvent> {
        let event = self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        event.map_err(refused("record an event"))
    }
}
