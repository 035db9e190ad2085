//! The block device, Virtio 1.2, 5.2: a disk over any [`Backend`].
//!
//! Several request queues, so that each vCPU has its own, and one worker for all of them. A request goes one of two ways:
//! by a call of the backend, and it is returned before the next one is looked at, unless the backend lacks something for
//! it: then it is put aside and tried again when that has come; or through io_uring ([`Uring`]), where the backend is a
//! file. The device stops when nothing is in flight, and what still waits for its backend is answered with an error. The
//! cache is write-back: what was written is durable after a flush that succeeded, or at once for drivers that did not
//! negotiate flushing.

mod backend;
mod file;
mod request;
#[cfg(test)]
mod ring_tests;
#[cfg(test)]
mod tests;
mod uring;
#[cfg(test)]
mod wait_tests;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::EventSet;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

pub use self::backend::Backend;
pub use self::file::{OpenError, RawFile};
use self::request::Disk;
pub use self::uring::Uring;
use super::limiter::{Limiter, LimiterConfig, LimiterUpdate};
use super::{Active, COMMON_FEATURES, Drained, Handler, Inbox, Session, VirtioDevice, Virtqueue, Worker, read_image};
use crate::metrics::{Counter, DeviceMetrics};

/// Bytes of a sector: the unit of all requests.
pub const SECTOR: u64 = 512;
/// Request queues of one disk, at most: beyond it vCPUs share them.
pub const MAX_QUEUES: u16 = 8;
/// Entries of a request queue: four requests of the most buffers, which is what a disk is kept busy with.
const QUEUE_SIZE: u16 = 1024;
/// Data buffers of one request, which has a header and a status beside them.
const SEG_MAX: u32 = QUEUE_SIZE as u32 / 4 - 2;
/// Bytes of the configuration space up to `write_zeroes_may_unmap` and its padding.
const CONFIG_LEN: usize = 60;
/// The worker's descriptors: orders from the control thread, the limiter's timer, the ring, what the backend waits for.
const ORDERS: u32 = 0;
const CREDIT: u32 = 1;
const RING: u32 = 2;
const PROGRESS: u32 = 3;

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
    /// Request queues, from 1 to [`MAX_QUEUES`]; what is beyond is cut.
    pub queues: u16,
    /// How much may be read and written in a time.
    pub limits: LimiterConfig,
}

/// The contents of a disk, and the way to them.
pub struct Medium<B> {
    /// The contents.
    pub backend: B,
    /// Reads, writes and flushes go through it, where there is one; it must have been made for the backend's file.
    pub ring: Option<Uring>,
}

impl<B> From<B> for Medium<B> {
    fn from(backend: B) -> Self {
        Self { backend, ring: None }
    }
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
    /// Times that a request had to wait for the limiter.
    pub throttled: Counter,
}

/// What the control thread asks of a disk that works.
struct Orders<B> {
    medium: Option<Medium<B>>,
    limits: LimiterUpdate,
}

impl<B> Default for Orders<B> {
    fn default() -> Self {
        Self { medium: None, limits: LimiterUpdate::default() }
    }
}

/// A disk, from outside of the guest. Outlives the device harmlessly.
pub struct BlockControl<B> {
    inbox: Arc<Inbox<Orders<B>>>,
    sectors: Arc<AtomicU64>,
}

impl<B> Clone for BlockControl<B> {
    fn clone(&self) -> Self {
        Self { inbox: Arc::clone(&self.inbox), sectors: Arc::clone(&self.sectors) }
    }
}

impl<B: Backend> BlockControl<B> {
    /// The disk gets other contents, or the same ones after they have grown; the guest is told of the size. Requests
    /// that are being done are finished with the old ones, which are flushed.
    pub fn replace(&self, medium: Medium<B>) {
        self.sectors.store(medium.backend.size() / SECTOR, Ordering::SeqCst);
        self.inbox.post(|orders| orders.medium = Some(medium));
    }

    /// The disk gets other limits.
    pub fn limit(&self, update: LimiterUpdate) {
        self.inbox.post(|orders| orders.limits.merge(update));
    }
}

/// A virtio block device.
pub struct Block<B: Backend> {
    features: u64,
    config: [u8; CONFIG_LEN],
    queue_sizes: Vec<u16>,
    block_metrics: Arc<BlockMetrics>,
    control: BlockControl<B>,
    worker: Worker<BlockHandler<B>>,
}

impl<B: Backend + 'static> Block<B> {
    /// A disk that calls `backend`.
    ///
    /// # Errors
    /// As [`Block::over`].
    pub fn new(backend: B, config: BlockConfig) -> io::Result<Self> {
        Self::over(backend.into(), config)
    }

    /// A disk with the contents of `medium`. A last part of less than a sector is not visible to the guest.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn over(medium: Medium<B>, config: BlockConfig) -> io::Result<Self> {
        let sectors = Arc::new(AtomicU64::new(medium.backend.size() / SECTOR));
        let metrics = Arc::<DeviceMetrics>::default();
        let block_metrics = Arc::<BlockMetrics>::default();
        let queue_sizes = vec![QUEUE_SIZE; config.queues.clamp(1, MAX_QUEUES).into()];
        let limiter = Limiter::open(config.limits)?;
        let disk = Disk::new(medium, &config, limiter, Arc::clone(&metrics), Arc::clone(&block_metrics));
        let control = BlockControl { inbox: Arc::new(Inbox::open()?), sectors };
        let handler = BlockHandler { disk, inbox: Arc::clone(&control.inbox), short: 0, crowded: 0 };
        Ok(Self {
            features: features(&config),
            config: config_space(queue_sizes.len() as u16),
            queue_sizes,
            block_metrics,
            control,
            worker: Worker::new("block", handler, metrics),
        })
    }

    /// The counters that only a block device has.
    pub fn block_metrics(&self) -> &Arc<BlockMetrics> {
        &self.block_metrics
    }

    /// For changes from outside of the guest.
    pub fn control(&self) -> BlockControl<B> {
        self.control.clone()
    }
}

fn features(config: &BlockConfig) -> u64 {
    let mut features = 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_GEOMETRY
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_TOPOLOGY
        | 1 << VIRTIO_BLK_F_MQ;
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

/// Cylinders, heads and sectors of a disk, for who still counts in them: those that every BIOS takes, which reach up to 8 GB
/// of a larger one.
fn geometry(sectors: u64) -> [u8; 4] {
    const HEADS: u8 = 16;
    const SECTORS: u8 = 63;
    let cylinders = (sectors / (u64::from(HEADS) * u64::from(SECTORS))).clamp(1, 16383) as u16;
    let [low, high] = cylinders.to_le_bytes();
    [low, high, HEADS, SECTORS]
}

/// `struct virtio_blk_config`, 5.2.4, without what the size says: capacity and geometry.
fn config_space(queues: u16) -> [u8; CONFIG_LEN] {
    let mut config = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // Topology: 4 KiB physical blocks (2^3 sectors), aligned, of which one is the least I/O that is worth it.
    put(24, &[3, 0]);
    put(26, &8u16.to_le_bytes());
    put(34, &queues.to_le_bytes());
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

    /// No tables beside the ring: a driver allocates one for each request, and the ring is long enough without.
    fn ring_features(&self) -> u64 {
        COMMON_FEATURES & !(1 << VIRTIO_RING_F_INDIRECT_DESC)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.config;
        let sectors = self.control.sectors.load(Ordering::SeqCst);
        config[..8].copy_from_slice(&sectors.to_le_bytes());
        config[16..20].copy_from_slice(&geometry(sectors));
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

struct BlockHandler<B> {
    disk: Disk<B>,
    inbox: Arc<Inbox<Orders<B>>>,
    /// A bit for each queue whose next request waits for credit, or for others that wait for the backend.
    short: u32,
    /// A bit for each queue whose next request waits for room in the ring.
    crowded: u32,
}

impl<B: Backend + 'static> BlockHandler<B> {
    fn drain(&mut self, index: usize, session: &mut Session<'_, '_>) {
        let (disk, bit) = (&mut self.disk, 1 << index);
        let Some(queue) = session.queue(index) else { return };
        disk.begin_turn();
        if queue.drain(|chain| disk.serve(index as u16, chain)) != Drained::Waiting {
            return;
        }
        if disk.has_had_its_turn() {
            return queue.poke();
        }
        match disk.ring() {
            Some(ring) if !ring.has_room() => self.crowded |= bit,
            _ => self.short |= bit,
        }
    }

    /// Hands what was found to the kernel, and returns to the driver what is done already.
    fn exchange(&mut self, session: &mut Session<'_, '_>) {
        self.submit(session);
        let touched = self.give_back(session, |disk, used| while disk.land(used) {});
        // What was done in part only, or has to be flushed, goes on.
        self.submit(session);
        if touched == 0 {
            return;
        }
        let crowded = std::mem::take(&mut self.crowded);
        for (index, queue) in session.queues.iter_mut().enumerate() {
            if let Some(queue) = queue
                && crowded & 1 << index != 0
            {
                // Not at once: the other events have their turn, too.
                queue.poke();
            }
        }
    }

    /// Returns to the driver the requests that `land` says are done, and tells it. A bit for each queue that had some.
    fn give_back(
        &mut self,
        session: &mut Session<'_, '_>,
        land: impl FnOnce(&mut Disk<B>, &mut dyn FnMut(u16, u16, u32)),
    ) -> u32 {
        let mut touched = 0u32;
        let queues = &mut *session.queues;
        land(&mut self.disk, &mut |index, head, len| {
            if let Some(Some(queue)) = queues.get_mut(usize::from(index)) {
                queue.push(head, len);
                touched |= 1 << index;
            }
        });
        for (index, queue) in queues.iter_mut().enumerate() {
            if let Some(queue) = queue
                && touched & 1 << index != 0
            {
                queue.announce();
            }
        }
        touched
    }

    /// What requests waited for may be here.
    fn proceed(&mut self, session: &mut Session<'_, '_>) {
        if self.disk.proceed() {
            self.retry(session);
        }
    }

    fn retry(&mut self, session: &mut Session<'_, '_>) {
        self.give_back(session, Disk::retry);
        // There may be room for others now.
        self.resume(session);
    }

    fn submit(&mut self, session: &mut Session<'_, '_>) {
        if self.disk.ring().is_some_and(|ring| ring.submit().is_err()) {
            // The kernel is short of memory for the moment. What is queued stays so, and the worker comes back for it.
            if let Some(queue) = session.queues.iter().flatten().next() {
                queue.poke();
            }
        }
    }

    /// Waits for all that is in flight.
    fn finish(&mut self, session: &mut Session<'_, '_>) {
        while self.disk.ring().is_some_and(|ring| ring.in_flight() > 0) {
            if let Some(Err(error)) = self.disk.ring().map(Uring::wait)
                && !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy)
            {
                return session.metrics.host_fault(|| format!("cannot wait for a disk: {error}"));
            }
            self.exchange(session);
        }
    }

    /// Does what the control thread has asked for. True if the disk has other contents.
    fn follow_orders(&mut self, session: &mut Session<'_, '_>) -> bool {
        let Orders { medium, limits } = self.inbox.take();
        self.disk.limiter.update(&limits);
        let Some(medium) = medium else { return false };
        self.finish(session);
        if let Some(ring) = self.disk.ring() {
            session.unwatch(ring);
        }
        if let Some(progress) = self.disk.progress() {
            session.unwatch(&progress);
        }
        self.disk.replace(medium);
        true
    }

    fn watch_medium(&mut self, session: &mut Session<'_, '_>) {
        if let Some(progress) = self.disk.progress() {
            watch(session, &progress, PROGRESS);
        }
        let memory = session.queues.iter().flatten().next().map(|queue| Arc::clone(queue.memory()));
        if let (Some(memory), Some(ring)) = (memory, self.disk.ring()) {
            ring.prepare(&memory);
            watch(session, ring, RING);
        }
    }

    /// There is credit again, or there are other limits.
    fn resume(&mut self, session: &mut Session<'_, '_>) {
        let short = std::mem::take(&mut self.short);
        (0..MAX_QUEUES.into()).filter(|index| short & 1 << index != 0).for_each(|index| self.drain(index, session));
        self.exchange(session);
    }
}

fn watch(session: &mut Session<'_, '_>, fd: &impl AsRawFd, token: u32) {
    if let Err(error) = session.watch(fd, token, EventSet::IN) {
        session.metrics.host_fault(|| format!("cannot watch a disk's events: {error}"));
    }
}

impl<B: Backend + 'static> Handler for BlockHandler<B> {
    fn started(&mut self, session: &mut Session<'_, '_>) {
        (self.short, self.crowded) = (0, 0);
        self.follow_orders(session);
        self.disk.set_flush_negotiated(session.features & 1 << VIRTIO_BLK_F_FLUSH != 0);
        watch(session, &*self.inbox, ORDERS);
        watch(session, &self.disk.limiter, CREDIT);
        self.watch_medium(session);
    }

    fn notified(&mut self, queue: usize, session: &mut Session<'_, '_>) {
        self.drain(queue, session);
        self.exchange(session);
    }

    fn ready(&mut self, token: u32, _events: EventSet, session: &mut Session<'_, '_>) {
        match token {
            ORDERS => {
                if self.follow_orders(session) {
                    self.watch_medium(session);
                    session.interrupt.config_changed();
                    // What waited for the old contents gets the new ones.
                    self.give_back(session, Disk::retry);
                }
                self.resume(session);
            }
            CREDIT => {
                self.disk.limiter.expired();
                self.resume(session);
            }
            PROGRESS => self.proceed(session),
            _ => self.exchange(session),
        }
    }

    fn stopping(&mut self, session: &mut Session<'_, '_>) {
        self.finish(session);
        self.give_back(session, Disk::abandon);
        self.disk.settle();
    }
}
