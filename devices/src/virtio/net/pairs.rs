//! Pairs of queues, of which a driver that can use several says how many it does: Virtio 1.2, 5.1.6.5.6.
//!
//! A pair that is not used is off: its worker leaves its queues alone, and the tap has no queue for it, so that all frames
//! come to the others. Which are on is changed by the thread of the control queue, and by a vCPU while that does not run.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::tap::Link;

/// One pair, to be switched on and off.
pub(super) trait Pair: Send + Sync + 'static {
    /// When it returns, frames come to the pair; or nobody touches its queues any more.
    ///
    /// # Errors
    /// The host cannot.
    fn switch(&self, on: bool) -> io::Result<()>;
}

impl<P: Pair> Pair for Arc<P> {
    fn switch(&self, on: bool) -> io::Result<()> {
        (**self).switch(on)
    }
}

/// All pairs of a device. The first is always on.
pub(super) struct Pairs<P> {
    all: Vec<P>,
    counts: Mutex<Counts>,
}

struct Counts {
    on: usize,
    /// Those that the driver has made ready, from the first on.
    ready: usize,
}

/// Why there are as many pairs as before.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The driver asked for what it cannot have.
    Guest,
    Host(io::Error),
}

impl<P: Pair> Pairs<P> {
    /// Only the first pair is on, whatever they are.
    ///
    /// # Errors
    /// A pair cannot be switched off.
    pub(super) fn new(all: Vec<P>) -> io::Result<Self> {
        all.iter().skip(1).try_for_each(|pair| pair.switch(false))?;
        Ok(Self { all, counts: Mutex::new(Counts { on: 1, ready: 1 }) })
    }

    pub(super) fn all(&self) -> &[P] {
        &self.all
    }

    /// A new driver has made `ready` pairs ready, and uses one until it says something else.
    ///
    /// # Errors
    /// Others were on and cannot be switched off.
    pub(super) fn begin(&self, ready: usize) -> io::Result<()> {
        let mut counts = self.lock();
        counts.ready = ready.clamp(1, self.all.len());
        self.change(&mut counts, 1)
    }

    /// The driver uses `count` pairs from now on.
    ///
    /// # Errors
    /// There are not so many, or the host refuses; then as many are on as before.
    pub(super) fn use_pairs(&self, count: usize) -> Result<(), Refusal> {
        let mut counts = self.lock();
        if !(1..=counts.ready).contains(&count) {
            return Err(Refusal::Guest);
        }
        let before = counts.on;
        self.change(&mut counts, count).map_err(|error| {
            // What worked in one direction works in the other, or the first error says enough.
            let _ = self.change(&mut counts, before);
            Refusal::Host(error)
        })
    }

    fn change(&self, counts: &mut Counts, count: usize) -> io::Result<()> {
        while counts.on < count {
            self.all[counts.on].switch(true)?;
            counts.on += 1;
        }
        while counts.on > count {
            self.all[counts.on - 1].switch(false)?;
            counts.on -= 1;
        }
        Ok(())
    }

    /// Held while pairs are switched. Lock order: before any gate's.
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A pair that a worker of ours serves: the link's queue, and whether the worker may.
pub(super) struct Gate<L> {
    pub(super) link: L,
    /// Held by the worker for a round of its work, so that who closes the gate knows that it has stopped. Nobody else
    /// wants it but then.
    open: Mutex<bool>,
    /// Signalled when there may be something to do that no queue and no link says.
    wake: Arc<EventFd>,
}

impl<L: Link> Gate<L> {
    /// An open one.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub(super) fn open(link: L) -> io::Result<Self> {
        Ok(Self { link, open: Mutex::new(true), wake: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?) })
    }

    /// What the worker watches.
    pub(super) const fn wake(&self) -> &Arc<EventFd> {
        &self.wake
    }

    /// Held while the worker works, if what it holds is true.
    pub(super) fn enter(&self) -> MutexGuard<'_, bool> {
        self.open.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl<L: Link + 'static> Pair for Gate<L> {
    fn switch(&self, on: bool) -> io::Result<()> {
        if on {
            self.link.attach(true)?;
            *self.enter() = true;
        } else {
            *self.enter() = false;
            self.link.attach(false)?;
        }
        wake(&self.wake);
        Ok(())
    }
}

/// Has a worker look at everything.
pub(super) fn wake(event: &EventFd) {
    // Fails only if it is signalled already.
    let _ = event.write(1);
}
