//! Persistent memory, Virtio 1.2, 5.19: a file of the host lies in the guest's address space, where the guest reads and
//! writes it as memory. The device says where that is, and its one queue carries the request to make durable what was
//! written.
//!
//! Who builds the VM maps the file for the guest. The device has its descriptor only, for flushes, and touches no byte of
//! the mapping: a file that has become shorter than its mapping is a signal for whoever does.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;

use super::limiter::{Limiter, LimiterConfig, LimiterUpdate};
use super::{Active, Answer, Chain, Handler, Inbox, Session, VirtioDevice, Virtqueue, Worker, read_image};
use crate::bus::BusDevice;
use crate::metrics::{Counter, DeviceMetrics};

const QUEUE_SIZE: u16 = 64;
/// The worker's descriptors: orders from the control thread, and the limiter's timer.
const ORDERS: u32 = 0;
const CREDIT: u32 = 1;

/// The only `type` of a request: make everything durable that was written before it.
const FLUSH: u32 = 0;
/// Bytes of a request, and of its answer: one little-endian number each (5.19.6).
const NUMBER_LEN: usize = 4;

/// Where the file lies in the guest's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PmemConfig {
    /// First byte.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// What a flush costs of a limit on bytes.
    pub flush_cost: u64,
    /// How often it may be flushed.
    pub limits: LimiterConfig,
}

/// What such a device counts beyond [`DeviceMetrics`].
#[derive(Debug, Default)]
pub struct PmemMetrics {
    /// Flushes that succeeded.
    pub flushes: Counter,
    /// Flushes that the host could not do.
    pub failures: Counter,
    /// Times that a flush had to wait for the limiter.
    pub throttled: Counter,
    /// Writes of the guest to memory that it may only read. They had no effect.
    pub refused_writes: Counter,
}

/// Changes a device that works. Outlives it harmlessly.
#[derive(Clone)]
pub struct PmemControl {
    inbox: Arc<Inbox<LimiterUpdate>>,
}

impl PmemControl {
    /// Flushes get other limits.
    pub fn limit(&self, update: LimiterUpdate) {
        self.inbox.post(|limits| limits.merge(update));
    }
}

/// A virtio pmem device.
pub struct Pmem {
    config: PmemConfig,
    counts: Arc<PmemMetrics>,
    control: PmemControl,
    worker: Worker<PmemHandler>,
}

impl Pmem {
    /// A device for the memory at `config`. `file` is what a flush makes durable; none where the guest cannot write, so
    /// that a flush has nothing to do.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(config: PmemConfig, file: Option<File>) -> io::Result<Self> {
        let control = PmemControl { inbox: Arc::new(Inbox::open()?) };
        let counts = Arc::<PmemMetrics>::default();
        let handler = PmemHandler {
            file,
            flush_cost: config.flush_cost,
            limiter: Limiter::open(config.limits)?,
            inbox: Arc::clone(&control.inbox),
            counts: Arc::clone(&counts),
        };
        Ok(Self { config, counts, control, worker: Worker::new("pmem", handler, Arc::default()) })
    }

    /// The counters that only such a device has.
    pub fn pmem_metrics(&self) -> &Arc<PmemMetrics> {
        &self.counts
    }

    /// For changes from outside of the guest.
    pub fn control(&self) -> PmemControl {
        self.control.clone()
    }

    /// What answers at the memory's addresses where the guest may only read it: its writes leave the guest.
    pub fn write_counter(&self) -> Arc<Mutex<dyn BusDevice>> {
        Arc::new(Mutex::new(WriteCounter(Arc::clone(&self.counts))))
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0; 16];
        image[..8].copy_from_slice(&self.config.address.to_le_bytes());
        image[8..].copy_from_slice(&self.config.len.to_le_bytes());
        read_image(&image, offset, data);
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

struct PmemHandler {
    file: Option<File>,
    flush_cost: u64,
    limiter: Limiter,
    inbox: Arc<Inbox<LimiterUpdate>>,
    counts: Arc<PmemMetrics>,
}

impl PmemHandler {
    fn serve(&mut self, chain: &Chain, metrics: &DeviceMetrics) -> Answer {
        if chain.fault.is_some() {
            return Answer::Used(0);
        }
        let place = chain.writable.view();
        let kind = chain.readable.view().split_value::<u32>().map(|(kind, _)| u32::from_le(kind));
        let Some(kind) = kind.filter(|_| place.len() >= NUMBER_LEN) else {
            metrics.guest_faults.increment();
            return Answer::Used(0);
        };
        let done = match kind {
            FLUSH if !self.limiter.admit(self.flush_cost) => {
                self.counts.throttled.increment();
                return Answer::Wait;
            }
            // Each request is a flush of its own: one that was begun before this one was offered may have missed what was
            // written between the two. A file with nothing to write is flushed quickly.
            FLUSH => self.flush(metrics),
            _ => {
                metrics.guest_faults.increment();
                false
            }
        };
        // 5.19.7: 0 for success, -1 for failure.
        let ret = if done { 0 } else { -1i32 };
        place.copy_from(&ret.to_le_bytes());
        Answer::Used(NUMBER_LEN as u32)
    }

    /// Pages that were written through a mapping belong to the file, so that the call on the file covers them.
    fn flush(&self, metrics: &DeviceMetrics) -> bool {
        let result = self.file.as_ref().map_or(Ok(()), File::sync_data);
        match &result {
            Ok(()) => self.counts.flushes.increment(),
            Err(error) => {
                self.counts.failures.increment();
                metrics.host_fault(|| format!("cannot make a pmem device's file durable: {error}"));
            }
        }
        result.is_ok()
    }
}

impl Handler for PmemHandler {
    fn started(&mut self, session: &mut Session<'_, '_>) {
        let watched = session.watch(&*self.inbox, ORDERS, EventSet::IN);
        if let Err(error) = watched.and_then(|()| session.watch(&self.limiter, CREDIT, EventSet::IN)) {
            session.metrics.host_fault(|| format!("cannot watch a pmem device's events: {error}"));
        }
    }

    fn notified(&mut self, queue: usize, session: &mut Session<'_, '_>) {
        let metrics = session.metrics;
        if let Some(queue) = session.queue(queue) {
            queue.drain(|chain| self.serve(chain, metrics));
        }
    }

    fn ready(&mut self, token: u32, _events: EventSet, session: &mut Session<'_, '_>) {
        match token {
            ORDERS => {
                let update = self.inbox.take();
                self.limiter.update(&update);
            }
            _ => self.limiter.expired(),
        }
        // There is credit again, or there are other limits.
        self.notified(0, session);
    }
}

/// Memory that the guest may only read, where a write of it ends up.
struct WriteCounter(Arc<PmemMetrics>);

impl BusDevice for WriteCounter {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // A read leaves the guest only where the host has nothing there.
        data.fill(0xff);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {
        self.0.refused_writes.increment();
    }
}
