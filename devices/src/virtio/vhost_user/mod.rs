//! Devices whose work another process does, over the vhost-user protocol: its backend.
//!
//! ```text
//! guest's notification → ioeventfd → backend, on the rings in guest memory
//!                                      └ event of the MSI-X vector, or of a pin → irqfd → guest
//! ```
//!
//! No thread of this process is in that way. What is left is the registers, the conversation with the backend
//! ([`Frontend`]), and a thread that waits for its end ([`watch`]). A driver that has INTA# is told by one more
//! (`transport/relay.rs`).
//!
//! **When.** The backend is connected to, and says what it can do, when the device is made: outside of a sandbox. It gets
//! memory and rings when a driver is ready, and lets go of the rings at a reset, on the vCPU that says so. All of these have
//! a deadline.
//!
//! **Who is trusted.** A backend has all of guest memory, as the guest's kernel has: it can do anything to the guest. It
//! is not trusted by this process. It knows no address of it; what it answers is bounded and checked; memory cannot be made
//! shorter under us (who makes it sees to that, see [`crate::Memory`]); and of the events that it shares with us none is
//! read or written in a way that can wait, because who shares an event decides whether that does.
//!
//! A backend that has failed once is not spoken to again. Its device stays on the bus, and says that it needs a reset.

mod block;
mod connection;
mod frontend;
mod fs;
#[cfg(test)]
mod tests;
mod watch;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use self::block::VhostUserBlockControl;
pub use self::frontend::{Frontend, VhostUserError};
use self::frontend::{MemoryTable, Ring};
pub use self::fs::TAG_LEN;
use self::watch::Watch;
use super::{Active, Interrupt, VirtioDevice, Virtqueue, Worker, read_image};
use crate::Memory;
use crate::metrics::DeviceMetrics;

/// The rings of a device, which a backend works on while there is a driver.
pub(super) struct Rings {
    frontend: Arc<Frontend>,
    table: MemoryTable,
    metrics: Arc<DeviceMetrics>,
    watch: Worker<Watch>,
    /// Takes signals that nobody wants.
    nowhere: EventFd,
    /// With the backend.
    queues: Vec<Virtqueue>,
    interrupt: Option<Arc<dyn Interrupt>>,
}

impl Rings {
    /// None yet, in `memory`.
    ///
    /// # Errors
    /// The memory cannot be shared, or descriptors have run out.
    pub(super) fn open(frontend: &Arc<Frontend>, memory: &Memory) -> Result<Self, VhostUserError> {
        let metrics = Arc::<DeviceMetrics>::default();
        Ok(Self {
            table: MemoryTable::new(memory)?,
            watch: Worker::new("vhost-user", Watch::new(Arc::clone(frontend)), Arc::clone(&metrics)),
            frontend: Arc::clone(frontend),
            metrics,
            nowhere: event()?,
            queues: Vec::new(),
            interrupt: None,
        })
    }

    pub(super) fn ring_features(&self) -> u64 {
        self.frontend.ring_features()
    }

    pub(super) const fn metrics(&self) -> &Arc<DeviceMetrics> {
        &self.metrics
    }

    /// Has the backend work on the queues of a driver that is ready; on those of which `is_on` is false, later.
    ///
    /// # Errors
    /// It does not, or the host cannot. Then nothing is started, and a backend that failed is given up.
    pub(super) fn start(&mut self, active: Active, is_on: &dyn Fn(u16) -> bool) -> Result<(), VhostUserError> {
        let Active { queues, features, interrupt } = active;
        let queues: Vec<_> = queues.into_iter().flatten().collect();
        let error = event()?;
        let calls = queues.iter().map(|queue| self.vector(queue.index(), &*interrupt));
        let calls = calls.collect::<Result<Vec<_>, _>>()?;
        let ring = |(queue, call)| Ring { queue, call, error: &error };
        let rings: Vec<_> = queues.iter().zip(&calls).map(ring).collect();
        if let Err(error) = self.frontend.start(features, &self.table, &rings, is_on) {
            if let VhostUserError::Backend { fault, .. } = &error {
                self.frontend.give_up(fault);
            }
            return Err(error);
        }
        if let Some(watch) = self.watch.handler() {
            watch.prepare(error);
        }
        // It has the rings: from here on they are taken from it, whatever happens.
        self.queues = queues;
        self.interrupt = Some(Arc::clone(&interrupt));
        let watched = self.watch.start(Active { queues: Vec::new(), features, interrupt });
        watched.map_err(|error| {
            self.stop();
            VhostUserError::Host(error)
        })
    }

    /// Takes the queues from the backend.
    pub(super) fn stop(&mut self) -> Vec<Virtqueue> {
        self.watch.stop();
        self.interrupt = None;
        let mut queues = std::mem::take(&mut self.queues);
        let numbers: Vec<_> = queues.iter().map(Virtqueue::index).collect();
        if !numbers.is_empty() && !self.frontend.is_given_up() {
            let result = self.frontend.stop(numbers.into_iter(), |ring, position| {
                queues.iter_mut().filter(|queue| queue.index() == ring).for_each(|queue| queue.moved_to(position));
            });
            self.host_fault("take virtqueues from a backend", result);
        }
        queues
    }

    /// The driver has chosen another vector for a queue.
    pub(super) fn vector_changed(&self, queue: u16) {
        let Some(interrupt) = self.interrupt.as_deref() else { return };
        if !self.queues.iter().any(|ours| ours.index() == queue) || self.frontend.is_given_up() {
            return;
        }
        let result = self.vector(queue, interrupt).and_then(|event| self.frontend.call(queue, &event));
        if result.is_err() {
            interrupt.needs_reset();
        }
        self.host_fault("move an interrupt", result);
    }

    /// The event that interrupts the driver for a queue.
    fn vector(&self, queue: u16, interrupt: &dyn Interrupt) -> Result<EventFd, VhostUserError> {
        let vector = interrupt.direct(queue).map_err(VhostUserError::Host)?;
        vector.map_or_else(|| self.nowhere.try_clone(), Ok).map_err(VhostUserError::Host)
    }

    /// Counts what went wrong, and is done with a backend that did it.
    fn host_fault(&self, what: &str, result: Result<(), VhostUserError>) {
        let Err(error) = result else { return };
        self.metrics.host_fault(|| format!("cannot {what}: {error}"));
        if let VhostUserError::Backend { fault, .. } = &error {
            self.frontend.give_up(fault);
        }
    }
}

fn event() -> Result<EventFd, VhostUserError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VhostUserError::Host)
}

/// A device of which the backend does everything but the registers.
pub struct VhostUser {
    device_type: u32,
    features: u64,
    queue_sizes: Vec<u16>,
    registers: Arc<Registers>,
    rings: Rings,
}

/// Configuration space, which a backend may change.
struct Registers {
    config: Mutex<Vec<u8>>,
    /// To the driver that is there.
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Registers {
    fn new(config: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { config: Mutex::new(config), interrupt: Mutex::new(None) })
    }

    /// Shows the driver something else, and tells it.
    fn change(&self, config: Vec<u8>) {
        *lock(&self.config) = config;
        // Held, so that a device that has been stopped interrupts nobody.
        if let Some(interrupt) = &*lock(&self.interrupt) {
            interrupt.config_changed();
        }
    }
}

/// Held for a look or a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl VirtioDevice for VhostUser {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn ring_features(&self) -> u64 {
        self.rings.ring_features()
    }

    fn may_be_notified_here(&self) -> bool {
        false
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_image(&lock(&self.registers.config), offset, data);
    }

    fn activate(&mut self, active: Active) -> io::Result<()> {
        let interrupt = Arc::clone(&active.interrupt);
        self.rings.start(active, &|_| true).map_err(io::Error::other)?;
        *lock(&self.registers.interrupt) = Some(interrupt);
        Ok(())
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        *lock(&self.registers.interrupt) = None;
        self.rings.stop()
    }

    fn vector_changed(&mut self, queue: u16) {
        self.rings.vector_changed(queue);
    }

    fn metrics(&self) -> &Arc<DeviceMetrics> {
        self.rings.metrics()
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        // A backend that goes on without us finds out by this, if not by the socket.
        self.stop();
    }
}
