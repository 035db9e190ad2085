//! The network device, Virtio 1.2, 5.1: one pair of queues over a tap device.
//!
//! The tap speaks virtio headers, so that checksums and segmentation pass through in both directions and nobody here
//! looks at a frame. Both ways go without a copy in this process: `readv` into, and `writev` out of the guest's buffers.
//! There is no control queue; the device forwards whatever comes, and the host's bridge and firewall decide. Only frames
//! to the guest's metadata server, where there is one, go aside to it.

mod aside;
mod receive;
mod tap;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use self::aside::Aside;
use self::receive::{Next, Receiver};
pub use self::tap::{Link, Tap, TapError};
use super::limiter::{Limiter, LimiterConfig, LimiterUpdate};
use super::{Active, Answer, Chain, Handler, Inbox, Session, VirtioDevice, Virtqueue, Worker, read_image};
use crate::metadata::Responder;
use crate::metrics::{Counter, DeviceMetrics};

/// Bytes of `struct virtio_net_hdr_v1`, which precedes every frame.
const HEADER_LEN: usize = 12;
/// The largest frame with its header: 64 KiB of segments, an Ethernet header and a VLAN tag (5.1.6.3.1).
const MAX_FRAME_LEN: usize = HEADER_LEN + 65535 + 18;
const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;
/// The worker's descriptors: the link, orders from the control thread, the limiters' timers, the metadata server's timer.
const LINK: u32 = 0;
const ORDERS: u32 = 1;
const RX_CREDIT: u32 = 2;
const TX_CREDIT: u32 = 3;
const TIMER: u32 = 4;

/// What a network device is like.
#[derive(Debug, Clone, Copy, Default)]
pub struct NetConfig {
    /// Address of the guest's interface.
    pub mac: [u8; 6],
    /// The MTU that the guest should use; its own choice if there is none.
    pub mtu: Option<u16>,
    /// How much the guest may receive in a time.
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

/// What the control thread asks of a device that works.
#[derive(Default)]
struct Orders {
    rx: LimiterUpdate,
    tx: LimiterUpdate,
}

/// An interface, from outside of the guest. Outlives the device harmlessly.
#[derive(Clone)]
pub struct NetControl {
    inbox: Arc<Inbox<Orders>>,
}

impl NetControl {
    /// The interface gets other limits.
    pub fn limit(&self, rx: LimiterUpdate, tx: LimiterUpdate) {
        self.inbox.post(|orders| {
            orders.rx.merge(rx);
            orders.tx.merge(tx);
        });
    }
}

/// A virtio network device.
pub struct Net<L: Link> {
    features: u64,
    config: [u8; 12],
    net_metrics: Arc<NetMetrics>,
    control: NetControl,
    worker: Worker<NetHandler<L>>,
}

impl<L: Link + 'static> Net<L> {
    /// A device that is connected to `link`.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(link: L, config: NetConfig) -> io::Result<Self> {
        let mut features = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
        ]
        .iter()
        .fold(0, |bits, feature| bits | 1u64 << feature);
        // 5.1.4: address, status, number of queue pairs (not offered), MTU.
        let mut space = [0; 12];
        space[..6].copy_from_slice(&config.mac);
        space[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        if let Some(mtu) = config.mtu {
            features |= 1 << VIRTIO_NET_F_MTU;
            space[10..].copy_from_slice(&mtu.to_le_bytes());
        }
        let net_metrics = Arc::<NetMetrics>::default();
        let control = NetControl { inbox: Arc::new(Inbox::open()?) };
        let handler = NetHandler {
            link,
            counts: Arc::clone(&net_metrics),
            inbox: Arc::clone(&control.inbox),
            aside: None,
            rx: Limiter::open(config.rx_limits)?,
            tx: Limiter::open(config.tx_limits)?,
            receiver: None,
            next: Next::Nothing,
            sending: Sending::Free,
            watched: None,
            gone: false,
        };
        let worker = Worker::new("net", handler, Arc::default());
        Ok(Self { features, config: space, net_metrics, control, worker })
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
        if let Some(handler) = self.worker.handler() {
            handler.aside = Some(Aside::open(responder)?);
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
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_image(&self.config, offset, data);
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

/// What the transmit queue waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sending {
    /// The driver's notification.
    Free,
    /// The link, to take frames again.
    Link,
    /// The limiter.
    Credit,
}

struct NetHandler<L> {
    link: L,
    counts: Arc<NetMetrics>,
    inbox: Arc<Inbox<Orders>>,
    /// A server that the guest reaches over this interface.
    aside: Option<Aside>,
    rx: Limiter,
    tx: Limiter,
    /// While the driver has a receive queue.
    receiver: Option<Receiver>,
    next: Next,
    sending: Sending,
    /// What the link is watched for, if it is.
    watched: Option<EventSet>,
    /// The link has failed for good.
    gone: bool,
}

impl<L: Link + 'static> NetHandler<L> {
    fn receive(&mut self, session: &mut Session<'_, '_>) {
        let metrics = session.metrics;
        if let (Some(receiver), Some(queue)) = (&mut self.receiver, session.queue(RX)) {
            if let Some(aside) = &mut self.aside {
                receiver.inject(aside, queue, metrics, &self.counts);
            }
            self.next = receiver.run(&self.link, queue, &mut self.rx, metrics, &self.counts);
        } else {
            self.next = Next::Nothing;
        }
    }

    fn transmit(&mut self, session: &mut Session<'_, '_>) {
        let metrics = session.metrics;
        self.sending = Sending::Free;
        if let Some(queue) = session.queue(TX) {
            queue.drain(|chain| self.send(chain, metrics));
        }
        if self.aside.as_ref().is_some_and(|aside| aside.frame().is_some()) {
            self.receive(session);
        }
    }

    fn send(&mut self, chain: &Chain, metrics: &DeviceMetrics) -> Answer {
        let frame = chain.readable.view();
        if chain.fault.is_some() {
            return Answer::Used(0);
        }
        if frame.len() < HEADER_LEN || frame.len() > MAX_FRAME_LEN {
            metrics.guest_faults.increment();
            return Answer::Used(0);
        }
        // The limits are the link's: what does not reach it is not under them.
        if self.aside.as_mut().is_some_and(|aside| aside.take(frame)) {
            return Answer::Used(0);
        }
        if !self.tx.ready() {
            self.counts.tx_throttled.increment();
            self.sending = Sending::Credit;
            return Answer::Wait;
        }
        loop {
            match frame.write_once(self.link.as_fd()) {
                Ok(_) => {
                    self.counts.tx_frames.increment();
                    self.counts.tx_bytes.add((frame.len() - HEADER_LEN) as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.sending = Sending::Link;
                    return Answer::Wait;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The kernel checks the header; and an interface may be down. A wire would not tell either.
                Err(_) => self.counts.tx_dropped.increment(),
            }
            self.tx.pay((frame.len() - HEADER_LEN) as u64);
            return Answer::Used(0);
        }
    }

    /// Watches the link for what there is a use for.
    fn watch(&mut self, session: &mut Session<'_, '_>) {
        if self.gone {
            return;
        }
        let mut wanted = EventSet::empty();
        wanted.set(EventSet::IN, self.next == Next::Frame);
        wanted.set(EventSet::OUT, self.sending == Sending::Link);
        let fd = self.link.as_fd();
        let result = match self.watched {
            Some(watched) if watched == wanted => Ok(()),
            Some(_) => session.rewatch(&fd, LINK, wanted),
            None => session.watch(&fd, LINK, wanted),
        };
        match result {
            Ok(()) => self.watched = Some(wanted),
            Err(error) => session.metrics.host_fault(|| format!("cannot watch a tap device: {error}")),
        }
    }
}

impl<L: Link + 'static> Handler for NetHandler<L> {
    fn started(&mut self, session: &mut Session<'_, '_>) {
        (self.next, self.sending, self.watched, self.gone) = (Next::Nothing, Sending::Free, None, false);
        for (fd, token) in
            [(self.inbox.as_raw_fd(), ORDERS), (self.rx.as_raw_fd(), RX_CREDIT), (self.tx.as_raw_fd(), TX_CREDIT)]
        {
            if let Err(error) = session.watch(&fd, token, EventSet::IN) {
                session.metrics.host_fault(|| format!("cannot watch a network device's events: {error}"));
            }
        }
        let mergeable = session.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        self.receiver = session.queue(RX).map(|queue| Receiver::new(queue.memory(), mergeable));
        if let Some(aside) = &mut self.aside {
            aside.reset();
            if let Err(error) = session.watch(aside.timer(), TIMER, EventSet::IN) {
                session.metrics.host_fault(|| format!("cannot watch a timer: {error}"));
            }
        }
        if let Err(error) = self.link.set_offloads(session.features) {
            session.metrics.host_fault(|| format!("cannot set the offloads of a tap device: {error}"));
        }
    }

    fn notified(&mut self, queue: usize, session: &mut Session<'_, '_>) {
        match queue {
            RX => self.receive(session),
            _ => self.transmit(session),
        }
        self.watch(session);
    }

    fn ready(&mut self, token: u32, events: EventSet, session: &mut Session<'_, '_>) {
        match token {
            LINK => return self.link_ready(events, session),
            TIMER => return self.aside_ready(session),
            RX_CREDIT => self.rx.expired(),
            TX_CREDIT => self.tx.expired(),
            _ => {
                let Orders { rx, tx } = self.inbox.take();
                self.rx.update(&rx);
                self.tx.update(&tx);
            }
        }
        if self.next == Next::Credit {
            self.receive(session);
        }
        if self.sending == Sending::Credit {
            self.transmit(session);
        }
        self.watch(session);
    }

    fn stopping(&mut self, session: &mut Session<'_, '_>) {
        if let (Some(mut receiver), Some(Some(queue))) = (self.receiver.take(), session.queues.get_mut(RX)) {
            receiver.give_back(queue);
        }
    }
}

impl<L: Link + 'static> NetHandler<L> {
    fn aside_ready(&mut self, session: &mut Session<'_, '_>) {
        if let Some(aside) = &mut self.aside {
            aside.go_on();
        }
        self.receive(session);
        self.watch(session);
    }

    fn link_ready(&mut self, events: EventSet, session: &mut Session<'_, '_>) {
        if events.contains(EventSet::ERROR) {
            // Reported again and again whatever is watched for: the interface was removed.
            session.metrics.host_fault(|| "a tap device is gone".to_owned());
            self.gone = true;
            return session.unwatch(&self.link.as_fd());
        }
        if events.contains(EventSet::OUT) {
            self.transmit(session);
        }
        if events.contains(EventSet::IN) {
            self.receive(session);
        }
        self.watch(session);
    }
}
