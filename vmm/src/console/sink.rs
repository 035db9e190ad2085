//! Between the serial port and the console thread: bytes that wait to be carried.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

/// Bytes that may wait. A console thread that stands still (a stopped terminal) loses the newest beyond it.
const MAX_WAITING: usize = 1 << 20;

/// Writes never block. Clones are the same sink.
#[derive(Clone)]
pub struct Sink {
    shared: Arc<Shared>,
}

struct Shared {
    waiting: Mutex<Vec<u8>>,
    event: EventFd,
}

impl Sink {
    /// An empty one.
    ///
    /// # Errors
    /// The host has no event descriptor left.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { shared: Arc::new(Shared { waiting: Mutex::default(), event }) })
    }

    /// Readable while bytes wait.
    pub fn event(&self) -> &EventFd {
        &self.shared.event
    }

    /// All bytes that wait.
    pub fn take(&self) -> Vec<u8> {
        let mut waiting = self.shared.waiting.lock().unwrap_or_else(|e| e.into_inner());
        // Fails only if nothing was signalled.
        let _ = self.shared.event.read();
        std::mem::take(&mut *waiting)
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut waiting = self.shared.waiting.lock().unwrap_or_else(|e| e.into_inner());
        if waiting.len() + bytes.len() <= MAX_WAITING {
            // One signal for all that gathers until the console thread comes.
            if waiting.is_empty() {
                let _ = self.shared.event.write(1);
            }
            waiting.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
