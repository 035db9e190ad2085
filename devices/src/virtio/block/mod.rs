//! The block device, Virtio 1.2, 5.2: a disk over any [`Backend`].
//!
//! One request queue, one worker; a request is executed when it is found and returned before the next one is looked at,
//! so that nothing is in flight when the device stops. The cache is write-back: what was written is durable after a flush
//! that succeeded, or at once for drivers that did not negotiate flushing.

mod backend;
mod control;
mod file;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

pub use self::backend::Backend;
pub use self::control::BlockControl;
pub use self::file::{OpenError, RawFile};
use self::request::{Disk, ID_LEN};
use super::{Active, Handler, Interrupt, Session, VirtioDevice, Virtqueue, Worker, read_image};
use crate::metrics::{Counter, DeviceMetrics};

/// Bytes of a sector: the unit of all requests.
pub const SECTOR: u64 = 512;
/// Entries of the request queue.
const QUEUE_SIZE: u16 = 256;
/// Data buffers of one request: with header and status they must fit into a chain as long as the queue.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of the configuration space up to `write_zeroes_may_unmap` and its padding.
const CONFIG_LEN: usize = 60;

/// When the guest may take a write for durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// After a flush.
    #[default]
    Writeback,
    /// Never: flushing is not offered. For disks whose contents nobody will miss.
    Unsafe,
}

/// What a block device is like, apart from its contents.
#[derive(Debug, Clone, Default)]
pub struct BlockConfig {
    /// Refuse writes, and say so.
    pub read_only: bool,
    /// Durability of writes.
    pub cache: Cache,
    /// Serial number that the guest sees, cut to 20 bytes.
    pub serial: String,
}

/// What a block device counts beyond [`DeviceMetrics`].
#[derive(Debug, Default)]
pub struct BlockMetrics {
    /// Successful reads.
    pub reads: Counter,
    /// Bytes read.
    pub read_bytes: Counter,
    /// Successful writes.
    pub writes: Counter,
    /// Bytes written.
    pub write_bytes: Counter,
    /// Successful flushes.
    pub flushes: Counter,
    /// Requests that were answered with an error.
    pub failures: Counter,
}

/// A virtio block device.
pub struct Block<B: Backend> {
    features: u64,
    shared: Arc<Shared<B>>,
    block_metrics: Arc<BlockMetrics>,
    worker: Worker<BlockHandler<B>>,
}

/// What the device's three users share: registers on vCPU threads, the worker, and [`BlockControl`] on another.
struct Shared<B> {
    /// Held by the worker while it drains the queue; taken before `interrupt`.
    disk: Mutex<Disk<B>>,
    /// Sectors, as the configuration space has them.
    sectors: AtomicU64,
    /// While there is a driver to be told of changes.
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl<B> Shared<B> {
    fn disk(&self) -> MutexGuard<'_, Disk<B>> {
        self.disk.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn interrupt(&self) -> MutexGuard<'_, Option<Arc<dyn Interrupt>>> {
        self.interrupt.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl<B: Backend + 'static> Block<B> {
    /// A disk over `backend`. A last part of less than a sector is not visible to the guest.
    pub fn new(backend: B, config: BlockConfig) -> Self {
        let sectors = backend.size() / SECTOR;
        let metrics = Arc::<DeviceMetrics>::default();
        let block_metrics = Arc::<BlockMetrics>::default();
        let mut serial = [0; ID_LEN];
        serial.iter_mut().zip(config.serial.bytes()).for_each(|(to, from)| *to = from);
        let features = features(&config);
        let disk = Disk::new(backend, sectors, serial, config, Arc::clone(&metrics), Arc::clone(&block_metrics));
        let (disk, sectors) = (Mutex::new(disk), AtomicU64::new(sectors));
        let shared = Arc::new(Shared { disk, sectors, interrupt: Mutex::default() });
        let worker = Worker::new("block", BlockHandler { shared: Arc::clone(&shared) }, metrics);
        Self { features, shared, block_metrics, worker }
    }

    /// A handle to change the disk while the device works.
    pub fn control(&self) -> BlockControl<B> {
        BlockControl::new(Arc::clone(&self.shared))
    }

    /// The counters that only a block device has.
    pub fn block_metrics(&self) -> &Arc<BlockMetrics> {
        &self.block_metrics
    }
}

fn features(config: &BlockConfig) -> u64 {
    let mut features =
        1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_TOPOLOGY | 1 << VIRTIO_BLK_F_MQ;
    if config.cache == Cache::Writeback {
        features |= 1 << VIRTIO_BLK_F_FLUSH;
    }
    if config.read_only {
        features |= 1 << VIRTIO_BLK_F_RO;
    } else {
        features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    }
    features
}

/// `struct virtio_blk_config`, 5.2.4.
fn config_space(sectors: u64) -> [u8; CONFIG_LEN] {
    let mut config = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // Topology: 4 KiB physical blocks (2^3 sectors), aligned, of which one is the least I/O that is worth it.
    put(24, &[3, 0]);
    put(26, &8u16.to_le_bytes());
    put(34, &1u16.to_le_bytes());
    for at in [36, 48] {
        put(at, &request::MAX_RANGE_SECTORS.to_le_bytes());
        put(at + 4, &request::MAX_RANGES.to_le_bytes());
    }
    put(44, &8u32.to_le_bytes());
    put(56, &[1]);
    config
}

impl<B: Backend + 'static> VirtioDevice for Block<B> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_image(&config_space(self.shared.sectors.load(Ordering::SeqCst)), offset, data);
    }

    fn activate(&mut self, active: Active) -> io::Result<()> {
        let interrupt = active.queues.iter().flatten().next().map(|queue| Arc::clone(queue.interrupt()));
        self.worker.start(active)?;
        *self.shared.interrupt() = interrupt;
        Ok(())
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        *self.shared.interrupt() = None;
        self.worker.stop()
    }

    fn metrics(&self) -> &Arc<DeviceMetrics> {
        self.worker.metrics()
    }
}

struct BlockHandler<B> {
    shared: Arc<Shared<B>>,
}

impl<B: Backend + 'static> Handler for BlockHandler<B> {
    fn started(&mut self, session: &mut Session<'_, '_>) {
        self.shared.disk().set_flush_negotiated(session.features & 1 << VIRTIO_BLK_F_FLUSH != 0);
    }

    fn notified(&mut self, queue: usize, session: &mut Session<'_, '_>) {
        if let Some(queue) = session.queue(queue) {
            let mut disk = self.shared.disk();
            queue.drain(|chain| disk.serve(chain));
        }
    }

    fn stopping(&mut self, _session: &mut Session<'_, '_>) {
        self.shared.disk().settle();
    }
}
