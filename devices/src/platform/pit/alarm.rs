//! A thread that pulses an interrupt line at times that are set from elsewhere.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::platform::IrqLine;
use crate::threads;

/// An alarm. Its thread starts when it is set first, and ends with it.
pub(super) struct Alarm {
    line: Arc<dyn IrqLine>,
    ringer: Option<Ringer>,
}

struct Ringer {
    timer: Arc<OwnedFd>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Alarm {
    pub fn new(line: Box<dyn IrqLine>) -> Self {
        Self { line: line.into(), ringer: None }
    }

    /// Pulses the line after `first`, and each time after `period`, until it is set anew. A pulse that the thread was too late
    /// for is left out.
    ///
    /// # Errors
    /// The host has no thread or no descriptor left: nothing is pulsed.
    pub fn set(&mut self, first: Duration, period: Option<Duration>) -> io::Result<()> {
        let ringer = match &self.ringer {
            Some(ringer) => ringer,
            None => self.ringer.insert(Ringer::start(Arc::clone(&self.line))?),
        };
        ringer.set(first, period.unwrap_or_default())
    }

    /// Nothing is pulsed any more, but for what is under way.
    pub fn stop(&self) {
        if let Some(ringer) = &self.ringer {
            // Cannot fail: it is a timer, and the times are good.
            let _ = ringer.set(Duration::ZERO, Duration::ZERO);
        }
    }

    /// There is no thread yet.
    #[cfg(test)]
    pub const fn is_silent(&self) -> bool {
        self.ringer.is_none()
    }
}

impl Ringer {
    fn start(line: Arc<dyn IrqLine>) -> io::Result<Self> {
        let timer = Arc::new(timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?);
        let ended = Arc::new(AtomicBool::new(false));
        let (theirs, end) = (Arc::clone(&timer), Arc::clone(&ended));
        let thread = threads::worker("timer", move || {
            loop {
                let mut count = [0; 8];
                match rustix::io::read(&theirs, &mut count) {
                    Err(Errno::INTR) => continue,
                    // It cannot happen to a timer.
                    Err(_) => return,
                    Ok(_) if end.load(Ordering::Acquire) => return,
                    Ok(_) => {}
                }
                line.set(true);
                line.set(false);
            }
        })?;
        Ok(Self { timer, ended, thread: Some(thread) })
    }

    fn set(&self, first: Duration, period: Duration) -> io::Result<()> {
        let spec = |time: Duration| Timespec { tv_sec: time.as_secs() as _, tv_nsec: time.subsec_nanos().into() };
        let times = Itimerspec { it_value: spec(first), it_interval: spec(period) };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &times)?;
        Ok(())
    }
}

impl Drop for Ringer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        let woken = self.set(Duration::from_nanos(1), Duration::ZERO);
        if let (Ok(()), Some(thread)) = (woken, self.thread.take()) {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}
