//! From the control thread to a device's worker: what shall change while the device works.
//!
//! A device has one inbox for all its orders, a `T` with one field for each kind. Orders that nobody has taken yet are
//! merged, so that it never grows; the lock is held for a change of a field, and never while a request is served.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Orders that wait for a worker.
pub(super) struct Inbox<T> {
    orders: Mutex<T>,
    event: EventFd,
}

impl<T: Default> Inbox<T> {
    /// No orders.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { orders: Mutex::default(), event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    /// Adds an order and wakes the worker. One that does not run takes it when it starts.
    pub(super) fn post(&self, order: impl FnOnce(&mut T)) {
        order(&mut self.orders.lock().unwrap_or_else(|e| e.into_inner()));
        // Fails only if it is signalled already.
        let _ = self.event.write(1);
    }

    /// Takes all orders.
    pub(super) fn take(&self) -> T {
        // Before the orders: one that comes in between is taken, and the worker woken once for nothing.
        let _ = self.event.read();
        std::mem::take(&mut *self.orders.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

impl<T> AsRawFd for Inbox<T> {
    /// Readable while there are orders.
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}
