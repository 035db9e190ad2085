//! A file or terminal that may stall: a thread of its own writes to it, and the end of the VM waits for it only so long.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use bedplate_devices::threads;

use super::backlog::Backlog;
use crate::sandbox;

/// What may wait; beyond it, the oldest is lost.
const MAX_WAITING: usize = 1 << 20;

/// Writes never block. Dropped, it waits until all is written, but not for ever.
pub(super) struct Outlet {
    shared: Arc<Shared>,
    /// Until the thread has it.
    file: Option<File>,
    /// How long the end may take; what is not written by then is lost.
    grace: Duration,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    waiting: Backlog,
    /// No more will come.
    closed: bool,
    /// The thread has ended.
    done: bool,
}

impl Outlet {
    /// Writes nothing before [`Outlet::start`].
    pub fn new(file: File, grace: Duration) -> Self {
        let state = State { waiting: Backlog::new(MAX_WAITING), closed: false, done: true };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        Self { shared, file: Some(file), grace }
    }

    /// Starts the thread.
    pub fn start(&mut self) -> io::Result<()> {
        let Some(file) = self.file.take() else { return Ok(()) };
        let theirs = Arc::clone(&self.shared);
        self.shared.lock().done = false;
        threads::named("console-out").spawn(move || {
            sandbox::narrow(sandbox::Thread::Console);
            theirs.carry(file);
        })?;
        Ok(())
    }

    pub fn push(&self, bytes: &[u8]) {
        self.shared.lock().waiting.push(bytes);
        self.shared.changed.notify_all();
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        // A thread that is stuck in a write is left behind; it ends with the process.
        let _ = self.shared.changed.wait_timeout_while(self.shared.lock(), self.grace, |state| !state.done);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The thread: writes what there is until no more will come.
    fn carry(&self, mut file: File) {
        while let Some(bytes) = self.next() {
            // A terminal that went away takes nothing, and the guest does not care.
            let _ = file.write_all(&bytes);
        }
        self.lock().done = true;
        self.changed.notify_all();
    }

    /// Waits for bytes; None at the end.
    fn next(&self) -> Option<Vec<u8>> {
        let idle = |state: &mut State| state.waiting.is_empty() && !state.closed;
        let mut state = self.changed.wait_while(self.lock(), idle).unwrap_or_else(|e| e.into_inner());
        let bytes = state.waiting.front().to_vec();
        state.waiting.consume(bytes.len());
        (!bytes.is_empty()).then_some(bytes)
    }
}
