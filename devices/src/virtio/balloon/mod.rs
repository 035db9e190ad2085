//! The memory balloon, Virtio 1.2, 5.5: memory that a guest does not need goes back to the host.
//!
//! There are three ways for it. The *balloon* itself: the host names a size, the driver takes that many pages away from
//! its guest and tells which. *Reporting*: the driver tells of pages as they become free, keeps them while they are given
//! back, and the guest takes them again when it likes; nobody on the host does anything. *Hinting*: the host asks once
//! for all free pages. A page that was given back reads as zeroes when it is next touched.
//!
//! Drivers number the queues in two ways: those of the specification leave gaps for features that were not negotiated,
//! Linux before 6.11 closes them. The order is the same, so that a queue's role is found by counting those in use.

mod handler;
mod stats;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use self::handler::{BalloonHandler, Orders};
pub use self::stats::STAT_COUNT;
use self::stats::Stats;
use super::{Active, Inbox, VirtioDevice, Virtqueue, Worker, read_image};
use crate::metrics::{Counter, DeviceMetrics};

/// Bytes of the pages that the device counts in, whatever the guest's are.
pub const PAGE: u64 = 4096;
const QUEUE_SIZE: u16 = 256;
const QUEUES: usize = 5;

/// Feature bits, 5.5.3.
const F_STATS: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_HINTING: u64 = 1 << 3;
const F_REPORTING: u64 = 1 << 5;

/// Commands of hinting that are no runs.
const STOP: u32 = 0;
const DONE: u32 = 1;

/// What a balloon offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BalloonConfig {
    /// Pages that it shall hold in the beginning.
    pub target: u32,
    /// The guest takes pages out of it before it runs out of memory.
    pub deflate_on_oom: bool,
    /// The guest reports on its memory so often; zero is never, and cannot be changed later.
    pub stats_interval: Duration,
    /// Runs of hinting can be asked for.
    pub hinting: bool,
    /// The guest reports free pages.
    pub reporting: bool,
}

/// What a balloon counts beyond [`DeviceMetrics`].
#[derive(Debug, Default)]
pub struct BalloonMetrics {
    /// Pages that were put into it.
    pub inflated: Counter,
    /// Pages that were taken out of it, where the driver tells.
    pub deflated: Counter,
    /// Bytes that were given back to the host, by inflating, reporting and hinting.
    pub released_bytes: Counter,
    /// Bytes of those, by reporting.
    pub reported_bytes: Counter,
    /// Bytes of those, by hinting.
    pub hinted_bytes: Counter,
    /// Reports on memory.
    pub stats_updates: Counter,
}

/// What registers, worker and control thread share.
#[derive(Default)]
struct Shared {
    /// `num_pages`.
    target: AtomicU32,
    /// `actual`; the driver's word.
    actual: AtomicU32,
    /// `free_page_hint_cmd_id`.
    host_command: AtomicU32,
    /// What the driver has answered last.
    guest_command: AtomicU32,
    stats: Stats,
    stats_interval: AtomicU16,
}

/// A balloon, from outside of the guest. Outlives the device harmlessly.
#[derive(Clone)]
pub struct BalloonControl {
    shared: Arc<Shared>,
    inbox: Arc<Inbox<Orders>>,
    hinting: bool,
}

impl BalloonControl {
    /// How many pages it shall hold.
    pub fn target(&self) -> u32 {
        self.shared.target.load(Ordering::SeqCst)
    }

    /// How many it holds, as its driver says.
    pub fn actual(&self) -> u32 {
        self.shared.actual.load(Ordering::SeqCst)
    }

    /// It shall hold so many pages.
    pub fn set_target(&self, pages: u32) {
        self.shared.target.store(pages, Ordering::SeqCst);
        self.inbox.post(|orders| orders.tell = true);
    }

    /// Seconds between two reports; 0 where there are none.
    pub fn stats_interval(&self) -> u16 {
        self.shared.stats_interval.load(Ordering::SeqCst)
    }

    /// Changes that, and has the first report made at once.
    pub fn set_stats_interval(&self, seconds: u16) {
        self.shared.stats_interval.store(seconds, Ordering::SeqCst);
        self.inbox.post(|orders| orders.interval = true);
    }

    /// The latest report, by the tags of 5.5.6.3.
    pub fn stats(&self) -> [Option<u64>; STAT_COUNT] {
        self.shared.stats.values()
    }

    /// Whether hinting is offered.
    pub fn hinting(&self) -> bool {
        self.hinting
    }

    /// The host's last command, and the guest's last answer: 0 for the end of a run, 1 for a run that was taken note of,
    /// else the number of a run.
    pub fn hinting_commands(&self) -> (u32, u32) {
        (self.shared.host_command.load(Ordering::SeqCst), self.shared.guest_command.load(Ordering::SeqCst))
    }

    /// Asks for a run; its pages are the guest's again when it is over, if `acknowledge`, or when it is stopped.
    pub fn start_hinting(&self, acknowledge: bool) {
        self.inbox.post(|orders| orders.hinting = Some(handler::Hinting::Start { acknowledge }));
    }

    /// Ends a run: the driver takes its pages back.
    pub fn stop_hinting(&self) {
        self.inbox.post(|orders| orders.hinting = Some(handler::Hinting::Stop));
    }
}

/// A virtio balloon.
pub struct Balloon {
    features: u64,
    metrics: Arc<BalloonMetrics>,
    control: BalloonControl,
    worker: Worker<BalloonHandler>,
}

impl Balloon {
    /// An empty balloon.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(config: BalloonConfig) -> io::Result<Self> {
        let offered = [
            (!config.stats_interval.is_zero(), F_STATS),
            (config.deflate_on_oom, F_DEFLATE_ON_OOM),
            (config.hinting, F_HINTING),
            (config.reporting, F_REPORTING),
        ];
        let shared = Arc::<Shared>::default();
        shared.target.store(config.target, Ordering::SeqCst);
        let seconds = u16::try_from(config.stats_interval.as_secs()).unwrap_or(u16::MAX);
        shared.stats_interval.store(seconds, Ordering::SeqCst);
        let control = BalloonControl { shared, inbox: Arc::new(Inbox::open()?), hinting: config.hinting };
        let metrics = Arc::<BalloonMetrics>::default();
        let handler = BalloonHandler::open(&control, &metrics)?;
        Ok(Self {
            features: offered.iter().filter(|(wanted, _)| *wanted).fold(0, |bits, (_, bit)| bits | bit),
            metrics,
            control,
            worker: Worker::new("balloon", handler, Arc::default()),
        })
    }

    /// The counters that only a balloon has.
    pub fn balloon_metrics(&self) -> &Arc<BalloonMetrics> {
        &self.metrics
    }

    /// For changes from outside of the guest.
    pub fn control(&self) -> BalloonControl {
        self.control.clone()
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let shared = &self.control.shared;
        let mut config = [0; 12];
        for (place, value) in config.chunks_exact_mut(4).zip([&shared.target, &shared.actual, &shared.host_command]) {
            place.copy_from_slice(&value.load(Ordering::SeqCst).to_le_bytes());
        }
        read_image(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // `actual` is the driver's. It is shown to people and believed by nobody.
        match (offset, data) {
            (4, &[a, b, c, d]) => {
                self.control.shared.actual.store(u32::from_le_bytes([a, b, c, d]), Ordering::SeqCst);
            }
            _ => self.metrics().guest_faults.increment(),
        }
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
