//! Virtio devices, and what they stand on.
//!
//! A device is split in two. Its [`VirtioDevice`] side has the registers and stays with the transport ([`pci`], [`mmio`]), on
//! vCPU threads. Its [`Handler`] side has the backend and works through the queues, on a thread of its own that a
//! [`Worker`] starts at activation and joins at reset. A notification comes to that thread by an ioeventfd, an interrupt
//! leaves it by an irqfd; no lock is shared with a vCPU but the moment's one of an interrupt vector.
//!
//! Guest faults get the answer of the specification and a count in [`DeviceMetrics`]: a bad request its error status, a
//! bad chain is returned with length 0, a bad ring stops the device with `DEVICE_NEEDS_RESET`. Nothing is logged.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use crate::metrics::DeviceMetrics;

pub mod balloon;
pub mod block;
mod buffers;
pub mod console;
#[cfg(test)]
mod contract_tests;
mod inbox;
pub mod limiter;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod pmem;
mod queue;
mod ring;
pub mod rng;
mod timer;
mod transport;
pub mod vhost_user;
pub mod vsock;
mod worker;

pub use buffers::{Buffers, OutsideRam, View};
use inbox::Inbox;
pub use queue::{Answer, Chain, ChainFault, Drained, QueueConfig, QueueError, QueuePosition, Virtqueue};
pub use worker::{Handler, MAX_TOKEN, Session, Worker};

/// Feature bits that every device of ours has, by the queues that all are built on.
pub const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What a device needs to begin its work.
pub struct Active {
    /// By number; `None` for those that the driver has not enabled.
    pub queues: Vec<Option<Virtqueue>>,
    /// Negotiated feature bits.
    pub features: u64,
    /// To the driver, for what concerns no queue.
    pub interrupt: Arc<dyn Interrupt>,
}

/// From a device to its driver. Called from worker threads.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `queue` were used.
    fn used(&self, queue: u16);

    /// The descriptor whose signal interrupts the driver for queue `queue`, for a device that has somebody else signal it;
    /// none if the driver has chosen no vector. While the vector is masked the descriptor keeps signals. Good until
    /// [`VirtioDevice::vector_changed`] or a reset.
    ///
    /// # Errors
    /// The host has no descriptors left, or refuses.
    fn direct(&self, _queue: u16) -> io::Result<Option<EventFd>> {
        Ok(None)
    }

    /// The device's configuration space has changed.
    fn config_changed(&self);

    /// The device is in an error state that only a reset ends.
    fn needs_reset(&self);
}

/// A virtio device, as its transport sees it. Called with exclusive access, on vCPU threads.
pub trait VirtioDevice: Send {
    /// Device type, Virtio 1.2, chapter 5.
    fn device_type(&self) -> u32;

    /// Feature bits of this type that are offered; the transport adds [`Self::ring_features`].
    fn features(&self) -> u64;

    /// What of [`COMMON_FEATURES`] whoever works on the queues has: all of them, if it is we.
    fn ring_features(&self) -> u64 {
        COMMON_FEATURES
    }

    /// Whether a notification that comes to this process, and not to KVM, may be signalled from here. Not where somebody
    /// shares the event who is not trusted: it would be in his hands how long that takes.
    fn may_be_notified_here(&self) -> bool {
        true
    }

    /// Size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// The driver reads configuration space. All of `data` must be written; zeroes past the end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes configuration space.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready: start to work on the queues. Called when the device is stopped, and not again before
    /// [`VirtioDevice::stop`].
    ///
    /// # Errors
    /// The host cannot. The device stays stopped, and can be activated again.
    fn activate(&mut self, active: Active) -> io::Result<()>;

    /// Stops all work. When it returns no thread of the device touches guest memory, everything that was taken from the
    /// queues has been returned, and the device can be activated again. Idempotent: a stopped device has no queues.
    fn stop(&mut self) -> Vec<Virtqueue>;

    /// The driver has chosen another vector for queue `queue`, or INTA# in the place of all vectors, or these in its place. The
    /// device may be stopped: then it has nothing to do.
    fn vector_changed(&mut self, _queue: u16) {}

    /// The device's counters.
    fn metrics(&self) -> &Arc<DeviceMetrics>;
}

/// Answers a read of a configuration space that is `image`.
fn read_image(image: &[u8], offset: u64, data: &mut [u8]) {
    for (at, byte) in (offset..).zip(data) {
        *byte = usize::try_from(at).ok().and_then(|at| image.get(at)).copied().unwrap_or(0);
    }
}
