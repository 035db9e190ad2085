//! A timer that a worker waits for.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

/// A timer of the kernel's; not set in the beginning.
#[derive(Debug)]
pub(super) struct Timer(OwnedFd);

impl Timer {
    /// # Errors
    /// The host has no descriptors left.
    pub(super) fn open() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Fires once, after `wait`.
    pub(super) fn once(&self, wait: Duration) {
        // A zero would disarm it.
        self.set(wait.max(Duration::from_micros(1)), Duration::ZERO);
    }

    /// Fires at once and then each time that `interval` has passed; never, if that is zero.
    pub(super) fn every(&self, interval: Duration) {
        self.set(interval.min(Duration::from_micros(1)), interval);
    }

    fn set(&self, first: Duration, interval: Duration) {
        let time = |time: Duration| Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        let setting = Itimerspec { it_interval: time(interval), it_value: time(first) };
        // Cannot fail: the descriptor is a timer, and the times are such.
        let _ = rustix::time::timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &setting);
    }

    /// It has fired: it is taken note of.
    pub(super) fn expired(&self) {
        // Non-blocking; fails only if it has not.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsRawFd for Timer {
    /// Readable when it has fired.
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
