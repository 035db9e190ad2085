//! A thread that pulses an interrupt line at moments that are set from elsewhere.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::Clock;
use crate::platform::IrqLine;
use crate::threads;

/// An alarm. There is a thread for it while it is set.
pub(super) struct Alarm {
    line: Arc<dyn IrqLine>,
    clock: Clock,
    ringer: Option<Ringer>,
}

/// When to pulse, in ticks of the clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// The next time.
    pub at: u64,
    /// And then each time after so many, at least 1.
    pub period: Option<u64>,
}

struct Ringer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    clock: Clock,
    /// Goes off at the plan's next time. It is set with the plan locked.
    timer: OwnedFd,
    plan: Mutex<Wish>,
}

#[derive(Clone, Copy)]
enum Wish {
    Pulse(Plan),
    /// It was a delay, and is over.
    Nothing,
    End,
}

impl Alarm {
    pub fn new(line: Box<dyn IrqLine>, clock: Clock) -> Self {
        Self { line: line.into(), clock, ringer: None }
    }

    /// Pulses the line by `plan` from now on. A pulse that the thread was too late for is left out.
    ///
    /// # Errors
    /// The host has no thread or no descriptor left: nothing is pulsed.
    pub fn set(&mut self, plan: Plan) -> io::Result<()> {
        let ringer = match &self.ringer {
            Some(ringer) => ringer,
            None => self.ringer.insert(Ringer::start(Arc::clone(&self.line), self.clock)?),
        };
        ringer.shared.wish(&mut ringer.shared.lock(), Wish::Pulse(plan));
        Ok(())
    }

    /// Nothing is pulsed any more.
    pub fn stop(&mut self) {
        self.ringer = None;
    }

    /// There is no thread.
    #[cfg(test)]
    pub const fn is_silent(&self) -> bool {
        self.ringer.is_none()
    }
}

impl Ringer {
    fn start(line: Arc<dyn IrqLine>, clock: Clock) -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
        let shared = Arc::new(Shared { clock, timer, plan: Mutex::new(Wish::Nothing) });
        let theirs = Arc::clone(&shared);
        let thread = threads::worker("timer", move || theirs.run(line.as_ref()))?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Drop for Ringer {
    fn drop(&mut self) {
        self.shared.wish(&mut self.shared.lock(), Wish::End);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Wish> {
        self.plan.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Makes `wish` the plan, and has the timer go off for it.
    fn wish(&self, plan: &mut Wish, wish: Wish) {
        *plan = wish;
        let after = match wish {
            Wish::Pulse(plan) => self.clock.until(plan.at),
            Wish::Nothing => return,
            Wish::End => Duration::ZERO,
        };
        // Zero would mean never.
        let after = after.max(Duration::from_nanos(1));
        let time = Timespec { tv_sec: after.as_secs() as _, tv_nsec: after.subsec_nanos().into() };
        let once = Itimerspec { it_value: time, it_interval: Timespec { tv_sec: 0, tv_nsec: 0 } };
        // Cannot fail: it is a timer, and the time is a good one.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
    }

    /// The thread.
    fn run(&self, line: &dyn IrqLine) {
        loop {
            match rustix::io::read(&self.timer, &mut [0; 8]) {
                Ok(_) | Err(Errno::INTR) => {}
                // It cannot happen to a timer.
                Err(_) => return,
            }
            match self.due() {
                Some(true) => {
                    line.set(true);
                    line.set(false);
                }
                Some(false) => {}
                None => return,
            }
        }
    }

    /// Whether it is time for a pulse, and goes on in the plan then; nothing at the end.
    fn due(&self) -> Option<bool> {
        let mut wish = self.lock();
        let now = self.clock.now();
        match *wish {
            Wish::End => None,
            Wish::Nothing => Some(false),
            Wish::Pulse(Plan { at, .. }) if at > now => {
                // It was set anew in between.
                let same = *wish;
                self.wish(&mut wish, same);
                Some(false)
            }
            Wish::Pulse(Plan { at, period }) => {
                // From the time that was due, and not from now: so it stays with the count.
                let next = period.map(|period| at + ((now - at) / period + 1) * period);
                let next = next.map_or(Wish::Nothing, |at| Wish::Pulse(Plan { at, period }));
                self.wish(&mut wish, next);
                Some(true)
            }
        }
    }
}
