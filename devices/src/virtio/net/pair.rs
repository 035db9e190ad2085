//! The work of one pair of queues, on a thread of its own: between a queue of the link and the guest.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::aside::Aside;
use super::pace::Pace;
use super::pairs::{self, Gate};
use super::receive::{Next, Receiver, Rules};
use super::tap::Link;
use super::{HEADER_LEN, MAX_FRAME_LEN, NetMetrics};
use crate::metrics::DeviceMetrics;
use crate::virtio::limiter::Limiter;
use crate::virtio::{Answer, Chain, Handler, Session};

/// The worker's descriptors: the link, what is said from outside, the limiters' timers, the metadata server's timer.
const LINK: u32 = 0;
const WAKE: u32 = 1;
const RX_CREDIT: u32 = 2;
const TX_CREDIT: u32 = 3;
const TIMER: u32 = 4;

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

/// What all pairs of an interface have in common.
pub(super) struct Common {
    pub(super) counts: Arc<NetMetrics>,
    /// A server that the guest reaches over this interface.
    pub(super) aside: Option<Arc<Aside>>,
    /// Of the first pair, over which the guest hears from that server.
    pub(super) first: Arc<EventFd>,
    /// What the driver is told of, if it is.
    pub(super) mtu: Option<u16>,
}

/// Serves one pair.
pub(super) struct PairHandler<L> {
    gate: Arc<Gate<L>>,
    /// Number of the pair.
    index: usize,
    pub(super) common: Common,
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
    /// Bytes both ways since the worker was woken.
    carried: usize,
    pace: Pace,
}

impl<L: Link + 'static> PairHandler<L> {
    /// Pair `index`, behind `gate`.
    pub(super) const fn new(index: usize, gate: Arc<Gate<L>>, common: Common, rx: Limiter, tx: Limiter) -> Self {
        Self {
            gate,
            index,
            common,
            rx,
            tx,
            receiver: None,
            next: Next::Nothing,
            sending: Sending::Free,
            watched: None,
            gone: false,
            carried: 0,
            pace: Pace::new(),
        }
    }

    const fn rx_queue(&self) -> usize {
        2 * self.index
    }

    const fn tx_queue(&self) -> usize {
        2 * self.index + 1
    }

    fn is_first(&self) -> bool {
        self.index == 0
    }

    /// Does `work`, unless the pair is off; then looks for what the link is to be watched.
    fn inside(&mut self, session: &mut Session<'_, '_>, work: impl FnOnce(&mut Self, &mut Session<'_, '_>)) {
        let gate = Arc::clone(&self.gate);
        let open = gate.enter();
        if *open {
            work(self, session);
        } else {
            (self.next, self.sending) = (Next::Nothing, Sending::Free);
        }
        self.watch(session);
        self.pace.carried(std::mem::take(&mut self.carried));
    }

    fn receive(&mut self, session: &mut Session<'_, '_>) {
        let metrics = session.metrics;
        let counts = &self.common.counts;
        let (first, rx) = (self.is_first(), self.rx_queue());
        if let (Some(receiver), Some(queue)) = (&mut self.receiver, session.queue(rx)) {
            if let Some(aside) = self.common.aside.as_ref().filter(|_| first) {
                receiver.inject(&mut aside.lock(), queue, metrics, counts);
            }
            let (next, carried) = receiver.run(&self.gate.link, queue, &self.rx, metrics, counts);
            self.next = next;
            self.carried += carried;
        } else {
            self.next = Next::Nothing;
        }
    }

    fn transmit(&mut self, session: &mut Session<'_, '_>) {
        let metrics = session.metrics;
        self.sending = Sending::Free;
        let mut aside = false;
        if let Some(queue) = session.queue(self.tx_queue()) {
            queue.drain(|chain| self.send(chain, &mut aside, metrics));
        }
        match aside {
            true if self.is_first() => self.receive(session),
            true => pairs::wake(&self.common.first),
            false => {}
        }
    }

    /// Sends one frame; `aside` becomes true if it was for the server beside the link.
    fn send(&mut self, chain: &Chain, aside: &mut bool, metrics: &DeviceMetrics) -> Answer {
        let frame = chain.readable.view();
        if chain.fault.is_some() {
            return Answer::Used(0);
        }
        if frame.len() < HEADER_LEN || frame.len() > MAX_FRAME_LEN {
            metrics.guest_faults.increment();
            return Answer::Used(0);
        }
        // The limits are the link's: what does not reach it is not under them.
        if self.common.aside.as_ref().is_some_and(|aside| aside.take(frame)) {
            *aside = true;
            return Answer::Used(0);
        }
        let counts = &self.common.counts;
        if !self.tx.ready() {
            counts.tx_throttled.increment();
            self.sending = Sending::Credit;
            return Answer::Wait;
        }
        loop {
            match frame.write_once(self.gate.link.as_fd()) {
                Ok(_) => {
                    self.carried += frame.len();
                    counts.tx_frames.increment();
                    counts.tx_bytes.add((frame.len() - HEADER_LEN) as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.sending = Sending::Link;
                    return Answer::Wait;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The kernel checks the header; and an interface may be down. A wire would not tell either.
                Err(_) => counts.tx_dropped.increment(),
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
        let fd = self.gate.link.as_fd();
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

    /// The interface was removed. The kernel says so again and again, whatever is watched for, also to a pair that is off.
    fn link_gone(&mut self, session: &mut Session<'_, '_>) {
        session.metrics.host_fault(|| "a tap device is gone".to_owned());
        self.gone = true;
        session.unwatch(&self.gate.link.as_fd());
    }

    fn link_ready(&mut self, events: EventSet, session: &mut Session<'_, '_>) {
        if events.contains(EventSet::OUT) {
            self.transmit(session);
        }
        if events.contains(EventSet::IN) {
            self.receive(session);
        }
    }
}

impl<L: Link + 'static> Handler for PairHandler<L> {
    fn started(&mut self, session: &mut Session<'_, '_>) {
        (self.next, self.sending, self.watched, self.gone) = (Next::Nothing, Sending::Free, None, false);
        // The thread is another one.
        (self.carried, self.pace) = (0, Pace::new());
        for (fd, token) in
            [(self.gate.wake().as_raw_fd(), WAKE), (self.rx.as_raw_fd(), RX_CREDIT), (self.tx.as_raw_fd(), TX_CREDIT)]
        {
            if let Err(error) = session.watch(&fd, token, EventSet::IN) {
                session.metrics.host_fault(|| format!("cannot watch a network device's events: {error}"));
            }
        }
        let rules = Rules::new(session.features, self.common.mtu);
        self.receiver = session.queue(self.rx_queue()).map(|queue| Receiver::new(queue.memory(), rules));
        if !self.is_first() {
            return;
        }
        if let Some(aside) = &self.common.aside {
            aside.reset();
            if let Err(error) = session.watch(aside.timer(), TIMER, EventSet::IN) {
                session.metrics.host_fault(|| format!("cannot watch a timer: {error}"));
            }
        }
        if let Err(error) = self.gate.link.set_offloads(session.features) {
            session.metrics.host_fault(|| format!("cannot set the offloads of a tap device: {error}"));
        }
    }

    fn notified(&mut self, queue: usize, session: &mut Session<'_, '_>) {
        let (rx, tx) = (self.rx_queue(), self.tx_queue());
        self.inside(session, |pair, session| match queue {
            _ if queue == rx => pair.receive(session),
            _ if queue == tx => pair.transmit(session),
            _ => {}
        });
    }

    fn ready(&mut self, token: u32, events: EventSet, session: &mut Session<'_, '_>) {
        match token {
            LINK if events.contains(EventSet::ERROR) => return self.link_gone(session),
            LINK => return self.inside(session, |pair, session| pair.link_ready(events, session)),
            RX_CREDIT => self.rx.expired(),
            TX_CREDIT => self.tx.expired(),
            TIMER => {
                if let Some(aside) = &self.common.aside {
                    aside.go_on();
                }
            }
            // Non-blocking; fails only if there was nothing to take.
            _ => drop(self.gate.wake().read()),
        }
        self.inside(session, |pair, session| {
            // A switch, other limits, a timer: they are rare, and to look twice costs little.
            pair.transmit(session);
            pair.receive(session);
        });
    }

    fn stopping(&mut self, session: &mut Session<'_, '_>) {
        if let (Some(mut receiver), Some(Some(queue))) = (self.receiver.take(), session.queues.get_mut(self.rx_queue()))
        {
            receiver.give_back(queue);
        }
    }
}
