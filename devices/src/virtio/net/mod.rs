//! The network device, Virtio 1.2, 5.1: pairs of queues over the queues of a tap device.
//!
//! The tap speaks virtio headers, so that checksums and segmentation pass through in both directions and nobody here
//! looks at a frame. Both ways go without a copy in this process: `readv` into, and `writev` out of the guest's buffers.
//! The device forwards whatever comes, and the host's bridge and firewall decide. Only frames to the guest's metadata
//! server, where there is one, go aside to it.
//!
//! **Threads.** Each pair has a worker and a queue of the tap to itself, so that as many vCPUs send and receive at the same
//! time as there are pairs; they share the limits and the metadata server, and nothing else. With several pairs there is
//! a control queue, by which the driver says how many of them it uses, and a worker for that: see [`pairs`].

mod aside;
mod commands;
mod pace;
mod pair;
mod pairs;
mod receive;
mod registers;
mod tap;
#[cfg(test)]
mod tests;
mod vhost;
mod vhost_user;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vmm_sys_util::eventfd::EventFd;

use self::aside::Aside;
use self::commands::Commands;
use self::pair::{Common, PairHandler};
use self::pairs::{Gate, Pairs};
use self::registers::Registers;
#[cfg(any(test, feature = "testing"))]
pub(crate) use self::tap::tap_features;
pub use self::tap::{Link, Tap, TapError, TapQueues};
pub use self::vhost::{Seen, VhostError, VhostNet, VhostNetControl};
pub use self::vhost_user::VhostUserNet;
use super::limiter::{Limiter, LimiterConfig, LimiterUpdate, Limits};
use super::{Active, VirtioDevice, Virtqueue, Worker, read_image};
use crate::metadata::Responder;
use crate::metrics::{Counter, DeviceMetrics};

/// Bytes of `struct virtio_net_hdr_v1`, which precedes every frame.
const HEADER_LEN: usize = 12;
/// The largest frame with its header: 64 KiB of segments, an Ethernet header and a VLAN tag (5.1.6.3.1).
const MAX_FRAME_LEN: usize = HEADER_LEN + 65535 + 18;
/// Pairs of one device, at most: each takes two threads' worth of descriptors and vectors from the host.
pub const MAX_PAIRS: usize = 8;

/// What a network device is like.
#[derive(Debug, Clone, Copy, Default)]
pub struct NetConfig {
    /// Address of the guest's interface.
    pub mac: [u8; 6],
    /// The MTU that the guest should use; its own choice if there is none.
    pub mtu: Option<u16>,
    /// How much the guest may receive in a time, over all pairs.
    pub rx_limits: LimiterConfig,
    /// How much it may send.
    pub tx_limits: LimiterConfig,
}

/// What a network device counts beyond [`DeviceMetrics`]. Receive and transmit are the guest's.
#[derive(Debug, Default)]
pub struct NetMetrics {
    /// Frames that the guest has received.
    pub rx_frames: Counter,
    /// Bytes in them.
    pub rx_bytes: Counter,
    /// Frames for which the guest had no room.
    pub rx_dropped: Counter,
    /// Frames that the guest has sent.
    pub tx_frames: Counter,
    /// Bytes in them.
    pub tx_bytes: Counter,
    /// Frames that the host did not take: malformed, or the interface is down.
    pub tx_dropped: Counter,
    /// Times that frames for the guest had to wait for the limiter.
    pub rx_throttled: Counter,
    /// Times that frames of the guest had to.
    pub tx_throttled: Counter,
}

/// An interface, from outside of the guest. Outlives the device harmlessly.
#[derive(Clone)]
pub struct NetControl {
    rx: Limits,
    tx: Limits,
    /// Of all workers.
    wakes: Vec<Arc<EventFd>>,
}

impl NetControl {
    /// The interface gets other limits.
    pub fn limit(&self, rx: LimiterUpdate, tx: LimiterUpdate) {
        self.rx.update(&rx);
        self.tx.update(&tx);
        self.wakes.iter().for_each(|event| pairs::wake(event));
    }
}

/// A virtio network device.
pub struct Net<L: Link + 'static> {
    registers: Registers,
    metrics: Arc<DeviceMetrics>,
    net_metrics: Arc<NetMetrics>,
    control: NetControl,
    pairs: Arc<Pairs<Arc<Gate<L>>>>,
    workers: Vec<Worker<PairHandler<L>>>,
    /// Of the control queue, with several pairs.
    commands: Option<Worker<Commands<Arc<Gate<L>>>>>,
    /// Queues that nobody works on, while the driver is there.
    unused: Vec<Virtqueue>,
}

impl<L: Link + 'static> Net<L> {
    /// A device with a pair of queues for each of `links`, 1 to [`MAX_PAIRS`], which are the queues of one tap.
    ///
    /// # Errors
    /// The host has no descriptors left, or a link cannot be switched off.
    pub fn new(links: Vec<L>, config: NetConfig) -> io::Result<Self> {
        let count = links.len();
        if !(1..=MAX_PAIRS).contains(&count) {
            return Err(io::Error::other(format!("{count} pairs of queues: a network device has 1 to {MAX_PAIRS}")));
        }
        let registers = Registers::new(&config, count, links[0].features());
        let gates = links.into_iter().map(|link| Gate::open(link).map(Arc::new)).collect::<io::Result<Vec<_>>>()?;
        let (rx, tx) = (Limiter::open(config.rx_limits)?, Limiter::open(config.tx_limits)?);
        let wakes: Vec<_> = gates.iter().map(|gate| Arc::clone(gate.wake())).collect();
        let (metrics, net_metrics) = (Arc::<DeviceMetrics>::default(), Arc::<NetMetrics>::default());
        let mut workers = Vec::with_capacity(count);
        for (index, gate) in gates.iter().enumerate() {
            let (counts, first) = (Arc::clone(&net_metrics), Arc::clone(&wakes[0]));
            let common = Common { counts, aside: None, first, mtu: config.mtu };
            let handler = PairHandler::new(index, Arc::clone(gate), common, rx.share()?, tx.share()?);
            workers.push(Worker::new("net", handler, Arc::clone(&metrics)));
        }
        let control = NetControl { rx: rx.limits(), tx: tx.limits(), wakes };
        let pairs = Arc::new(Pairs::new(gates)?);
        let commands = if count > 1 {
            Some(Worker::new("net-control", Commands::open(&pairs)?, Arc::clone(&metrics)))
        } else {
            None
        };
        Ok(Self { registers, metrics, net_metrics, control, pairs, workers, commands, unused: Vec::new() })
    }

    /// For changes from outside of the guest.
    pub fn control(&self) -> NetControl {
        self.control.clone()
    }

    /// The guest reaches `responder` over this interface. To be called before the device is used.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn set_responder(&mut self, responder: Responder) -> io::Result<()> {
        let aside = Arc::new(Aside::open(responder)?);
        for handler in self.workers.iter_mut().filter_map(Worker::handler) {
            handler.common.aside = Some(Arc::clone(&aside));
        }
        Ok(())
    }

    /// The counters that only a network device has.
    pub fn net_metrics(&self) -> &Arc<NetMetrics> {
        &self.net_metrics
    }
}

impl<L: Link + 'static> VirtioDevice for Net<L> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.registers.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.registers.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_image(&self.registers.config, offset, data);
    }

    fn activate(&mut self, active: Active) -> io::Result<()> {
        let Active { mut queues, features, interrupt } = active;
        let session = self.registers.session(features, &queues);
        self.pairs.begin(session.pairs)?;
        // Each worker gets its own queues, at the places where all know them.
        let mut part = |owns: &dyn Fn(usize) -> bool| {
            let own = queues.iter_mut().enumerate().map(|(index, queue)| queue.take_if(|_| owns(index)));
            Active { queues: own.collect(), features, interrupt: Arc::clone(&interrupt) }
        };
        let mut started = Ok(());
        for (index, worker) in self.workers.iter_mut().enumerate().take(session.pairs) {
            started = started.and_then(|()| worker.start(part(&|queue| queue / 2 == index && session.is_data(queue))));
        }
        if let (Some(commands), Some(control)) = (&mut self.commands, session.control) {
            started = started.and_then(|()| commands.start(part(&|queue| queue == control)));
        }
        self.unused = queues.into_iter().flatten().collect();
        if started.is_err() {
            self.stop();
        }
        started
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        let mut queues = std::mem::take(&mut self.unused);
        // First, so that no pair is switched any more.
        queues.extend(self.commands.iter_mut().flat_map(Worker::stop));
        queues.extend(self.workers.iter_mut().flat_map(Worker::stop));
        queues.sort_by_key(Virtqueue::index);
        queues
    }

    fn metrics(&self) -> &Arc<DeviceMetrics> {
        &self.metrics
    }
}
