//! Memory that is added and taken away in blocks, Virtio 1.2, 5.15: the host names a size, the driver asks for blocks of a
//! region that lies beside the guest's RAM until it has it, or returns them until it has no more.
//!
//! The region is mapped and known to KVM from the start, and nothing of it is there until it is touched. What a block's
//! state decides is who may rely on it: a block that is unplugged is given back to the host.
//!
//! Blocks stay plugged over a reset of the device, as their contents have to when a guest's kernel hands over to another.

mod handler;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

use self::handler::MemHandler;
use super::{Active, Inbox, VirtioDevice, Virtqueue, Worker, read_image};
use crate::metrics::{Counter, DeviceMetrics};

const QUEUE_SIZE: u16 = 64;
/// The driver leaves alone what is not plugged; Linux knows this since 5.16, and does not rely on it.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// Bytes of `struct virtio_mem_config`, 5.15.4.
const CONFIG_LEN: usize = 56;

/// The region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemConfig {
    /// Where it begins: RAM of its own, that the guest's memory map does not name. A multiple of `block`.
    pub address: u64,
    /// Its bytes, a multiple of `block`.
    pub len: u64,
    /// Bytes of a block, a power of two.
    pub block: u64,
}

/// What such a device counts beyond [`DeviceMetrics`].
#[derive(Debug, Default)]
pub struct MemMetrics {
    /// Blocks that the driver was given.
    pub plugged: Counter,
    /// Blocks that it returned.
    pub unplugged: Counter,
    /// Requests that were refused.
    pub refused: Counter,
}

/// What registers, worker and control thread share.
#[derive(Default)]
struct Shared {
    requested: AtomicU64,
    plugged: AtomicU64,
}

/// The region, from outside of the guest. Outlives the device harmlessly.
#[derive(Clone)]
pub struct MemControl {
    shared: Arc<Shared>,
    inbox: Arc<Inbox<bool>>,
    config: MemConfig,
}

impl MemControl {
    /// The region.
    pub fn config(&self) -> MemConfig {
        self.config
    }

    /// Bytes that the guest shall have.
    pub fn requested(&self) -> u64 {
        self.shared.requested.load(Ordering::SeqCst)
    }

    /// Bytes that it has.
    pub fn plugged(&self) -> u64 {
        self.shared.plugged.load(Ordering::SeqCst)
    }

    /// The guest shall have so many bytes: a multiple of the block, at most the region. What is more is cut.
    pub fn request(&self, bytes: u64) {
        let bytes = bytes.min(self.config.len) / self.config.block * self.config.block;
        self.shared.requested.store(bytes, Ordering::SeqCst);
        self.inbox.post(|changed| *changed = true);
    }
}

/// A virtio memory device.
pub struct Mem {
    metrics: Arc<MemMetrics>,
    control: MemControl,
    worker: Worker<MemHandler>,
}

impl Mem {
    /// A region of which nothing is plugged.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(config: MemConfig) -> io::Result<Self> {
        let control = MemControl { shared: Arc::default(), inbox: Arc::new(Inbox::open()?), config };
        let metrics = Arc::<MemMetrics>::default();
        let handler = MemHandler::new(&control, &metrics);
        Ok(Self { metrics, control, worker: Worker::new("mem", handler, Arc::default()) })
    }

    /// The counters that only such a device has.
    pub fn mem_metrics(&self) -> &Arc<MemMetrics> {
        &self.metrics
    }

    /// For changes from outside of the guest.
    pub fn control(&self) -> MemControl {
        self.control.clone()
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let MemConfig { address, len, block } = self.control.config;
        let mut config = [0; CONFIG_LEN];
        // All of the region is usable at any time; node 0 has it.
        let fields = [(0, block), (16, address), (24, len), (32, len)];
        let (plugged, requested) = (self.control.plugged(), self.control.requested());
        for (at, value) in fields.into_iter().chain([(40, plugged), (48, requested)]) {
            config[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        read_image(&config, offset, data);
    }

    fn activate(&mut self, active: Active) -> io::Result<()> {
        self.worker.start(active)
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        self.worker.stop()
    }

    fn metrics(&self) -> &Arc<DeviceMetrics> {
        self.worker.metrics()
    }
}
