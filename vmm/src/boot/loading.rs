//! Kernel and initial RAM disk come into RAM while the guest runs.
//!
//! It begins with the part of RAM in which its first instruction lies. A thread reads the rest, what the guest waits for before
//! all others. Where the host cannot do that, everything is read before the guest begins.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

use bedplate_api::vmm::ExitReason;
use bedplate_devices::threads;

use super::BootError;
use super::contents::Contents;
use crate::machine::lifecycle::Lifecycle;
use crate::memory::{Absent, Ram};
use crate::sandbox;

/// Fewer bytes than these are read at once: a thread would cost more.
const WORTH: u64 = 4 << 20;

/// What is still to be read. Dropped before its end, what is missing is zeros for the guest.
pub struct Loading {
    contents: Contents,
    absent: Absent,
    waiting: VecDeque<Range<u64>>,
}

impl Loading {
    /// Reads all that the guest needs at `entry`, and the rest if it has to. The first part of RAM is never absent: others write
    /// there, too. Nothing may touch the rest until [`Loading::start`]: it would wait for ever.
    pub(super) fn begin(contents: Contents, ram: &Ram, entry: u64) -> Result<Option<Self>, BootError> {
        let parts = contents.parts(ram.low_end());
        let is_needed = |part: &Range<u64>| part.start == 0 || part.contains(&entry);
        let later: Vec<_> = parts.iter().filter(|part| !is_needed(part)).cloned().collect();
        let len: u64 = later.iter().map(|part| part.end - part.start).sum();
        // Refused without CAP_SYS_PTRACE, by old kernels, and where others have this memory. Then the guest only begins later.
        let absent = if len < WORTH { None } else { ram.without(&later).ok() };
        for part in parts.iter().filter(|part| absent.is_none() || is_needed(part)) {
            contents.fill(&ram.memory, part)?;
        }
        if absent.is_none() {
            contents.check()?;
        }
        Ok(absent.map(|absent| Self { contents, absent, waiting: later.into() }))
    }

    /// Starts the thread. It ends by itself: when all is read, or with the machine, which it ends if something cannot be read.
    ///
    /// # Errors
    /// The host has no threads left. The machine ends.
    pub fn start(self, life: &Arc<Lifecycle>) -> io::Result<Loader> {
        let (working, ended) = mpsc::sync_channel(0);
        let mut reader = Reader { loading: self, life: Arc::clone(life), is_done: false, _working: working };
        let thread = threads::named("loader").spawn(move || {
            sandbox::narrow(sandbox::Thread::Worker);
            if let Err(error) = reader.run() {
                reader.life.end(ExitReason::HostFault, error.to_string());
            }
        })?;
        Ok(Loader { thread: Some(thread), ended })
    }

    /// What is read next.
    fn next(&mut self) -> Option<Range<u64>> {
        let wanted = self.absent.wanted();
        let place = |address| self.waiting.iter().position(|part| part.contains(&address));
        self.waiting.remove(wanted.and_then(place).unwrap_or(0))
    }
}

/// The thread. Dropped, it is waited for: it ends soon after its machine.
pub struct Loader {
    thread: Option<JoinHandle<()>>,
    ended: Receiver<Infallible>,
}

impl Loader {
    /// Waits until all is read or the machine has ended; false after `patience`.
    pub fn wait(&self, patience: Duration) -> bool {
        self.ended.recv_timeout(patience) != Err(RecvTimeoutError::Timeout)
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic of it has been reported by the panic hook, and has ended the machine.
            let _ = thread.join();
        }
    }
}

/// Reads, and does not let the guest go on without what was not read.
struct Reader {
    loading: Loading,
    life: Arc<Lifecycle>,
    /// Nothing is missing.
    is_done: bool,
    /// Nothing is sent: who waits sees it go.
    _working: SyncSender<Infallible>,
}

impl Reader {
    fn run(&mut self) -> Result<(), BootError> {
        let Self { loading, life, is_done, .. } = self;
        while let Some(part) = loading.next() {
            if life.exit().is_some() {
                return Ok(());
            }
            loading.contents.fill(loading.absent.view(), &part)?;
            loading.absent.present(&part).map_err(BootError::Present)?;
        }
        loading.contents.check()?;
        *is_done = true;
        Ok(())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if !self.is_done {
            // Who has ended it before has said why.
            self.life.end(ExitReason::HostFault, "the kernel is not loaded: its thread could not start, or failed");
        }
    }
}
