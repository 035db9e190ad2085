//! How long the process took until it could be used, from times that whoever started it has taken.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Readings of clocks, in microseconds, before the process was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StartTimes {
    /// Of the monotonic clock.
    pub monotonic_us: Option<u64>,
    /// Of the processor time of the process, which may have been another program before.
    pub cpu_us: Option<u64>,
    /// Processor time that its parent has spent for it.
    pub parent_cpu_us: Option<u64>,
}

/// Microseconds that the start took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct StartupTimes {
    pub elapsed_us: Option<u64>,
    pub cpu_us: Option<u64>,
}

impl StartTimes {
    /// From then to now.
    pub(super) fn until_now(self) -> StartupTimes {
        let (elapsed, cpu) = (reading(ClockId::Monotonic), reading(ClockId::ProcessCPUTime));
        StartupTimes {
            elapsed_us: self.monotonic_us.map(|start| elapsed.saturating_sub(start)),
            cpu_us: self
                .cpu_us
                .map(|start| cpu.saturating_sub(start).saturating_add(self.parent_cpu_us.unwrap_or_default())),
        }
    }
}

fn reading(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    // Clocks that count from a start are not negative.
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}

/// Processor time of the process so far.
pub(super) fn cpu_time() -> Duration {
    Duration::from_micros(reading(ClockId::ProcessCPUTime))
}
