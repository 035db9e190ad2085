//! From the link to the guest. The driver's buffers are taken ahead of the frames that will fill them, so that one
//! `readv` goes straight into as many as a frame may need; what a frame did not need waits for the next one. Where the driver
//! has few left, a frame may turn out to be longer than they are: it is kept until there are more.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_HDR_GSO_NONE,
};

use super::aside::Server;
use super::tap::Link;
use super::{HEADER_LEN, MAX_FRAME_LEN, NetMetrics};
use crate::Memory;
use crate::metrics::DeviceMetrics;
use crate::virtio::limiter::Limiter;
use crate::virtio::{Buffers, Chain, Virtqueue};

/// Frames that are handed over, and faulty chains that are returned, before other events are looked at: a driver that
/// never pauses cannot keep a reset waiting.
const ROUND: usize = 256;
/// Offsets in the header.
const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
const NUM_BUFFERS: usize = 10;
/// An Ethernet header and a VLAN tag, which an MTU does not count.
const LINK_HEADER_LEN: usize = 18;

/// What the link should be watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// A frame may come.
    Frame,
    /// The driver has to offer buffers first, and will notify.
    Buffers,
    /// The limiter has to have credit, and will say when.
    Credit,
    /// Nothing: the link has failed.
    Nothing,
}

/// What the driver that there is may be given: Virtio 1.2, 5.1.4.1 and 5.1.6.4.1.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// One frame may fill several chains.
    mergeable: bool,
    /// It has to be told nothing about checksums: all are right.
    plain: bool,
    /// Bytes of a frame without its header, unless it stands for several.
    longest: usize,
}

impl Rules {
    /// For a driver with these features, whom the device offered this MTU.
    pub(super) fn new(features: u64, mtu: Option<u16>) -> Self {
        let has = |feature: u32| features & 1 << feature != 0;
        let mtu = mtu.filter(|_| has(VIRTIO_NET_F_MTU));
        Self {
            mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
            plain: !has(VIRTIO_NET_F_GUEST_CSUM),
            longest: mtu.map_or(MAX_FRAME_LEN, |mtu| usize::from(mtu) + LINK_HEADER_LEN),
        }
    }
}

/// A chain in hand.
struct Held {
    head: u16,
    pieces: usize,
    len: usize,
}

/// Buffers in hand, and the state of one session.
pub(super) struct Receiver {
    chain: Chain,
    held: VecDeque<Held>,
    /// Of all chains that are held, in order.
    buffers: Buffers,
    rules: Rules,
    /// Takes what of a frame does not fit, and then all of a frame that waits for buffers.
    overflow: Box<[u8]>,
    /// Bytes of the frame that waits there, with its header.
    kept: Option<usize>,
}

impl Receiver {
    pub(super) fn new(memory: &Memory, rules: Rules) -> Self {
        let buffers = Buffers::new(Arc::clone(memory));
        let overflow = vec![0; MAX_FRAME_LEN].into_boxed_slice();
        Self { chain: Chain::new(memory), held: VecDeque::new(), buffers, rules, overflow, kept: None }
    }

    /// Hands frames over until there are none, or no buffers; returns what to wait for, and how many bytes were in them. After
    /// a round of them the queue's own event brings the worker back.
    pub(super) fn run(
        &mut self,
        link: &impl Link,
        queue: &mut Virtqueue,
        limiter: &Limiter,
        metrics: &DeviceMetrics,
        counts: &NetMetrics,
    ) -> (Next, usize) {
        queue.suppress_notifications();
        let mut next = Next::Frame;
        let (mut budget, mut carried) = (ROUND, 0);
        loop {
            self.refill(queue, metrics, &mut budget);
            if budget == 0 {
                // Notifications are off, and a frame need not come: without this, what is left might wait for ever.
                queue.poke();
                break;
            }
            budget -= 1;
            if !self.has_enough() && queue.want_notifications() {
                queue.suppress_notifications();
                continue;
            }
            if self.held.is_empty() || self.kept.is_some_and(|len| self.can_wait(len, queue)) {
                next = Next::Buffers;
                break;
            }
            if !limiter.ready() {
                counts.rx_throttled.increment();
                next = Next::Credit;
                break;
            }
            match self.receive(link, queue, counts) {
                Ok(Some(len)) => {
                    carried += len;
                    limiter.pay(len as u64);
                }
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A frame that the kernel cannot describe in a header, and has thrown away.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => counts.rx_dropped.increment(),
                Err(error) => {
                    metrics.host_fault(|| format!("cannot read from a tap device: {error}"));
                    next = Next::Nothing;
                    break;
                }
            }
        }
        queue.announce();
        (next, carried)
    }

    /// Whether the largest frame that may come fits, or what comes could not have more than there is.
    fn has_enough(&self) -> bool {
        if self.rules.mergeable { self.buffers.len() >= MAX_FRAME_LEN } else { !self.held.is_empty() }
    }

    /// Whether a frame of `len` bytes has to wait for buffers, and may: its driver can offer more chains than are in hand. It
    /// waits as long as the driver does not.
    fn can_wait(&self, len: usize, queue: &Virtqueue) -> bool {
        let has_more = self.held.len() < usize::from(queue.state().size) && !queue.is_broken();
        self.buffers.len() < len && len <= MAX_FRAME_LEN && self.rules.mergeable && has_more
    }

    /// Takes chains until there are enough, or no more. Faulty ones are returned, at most `budget`.
    fn refill(&mut self, queue: &mut Virtqueue, metrics: &DeviceMetrics, budget: &mut usize) {
        while *budget > 0 && !self.has_enough() && queue.pop(&mut self.chain) {
            let chain = &mut self.chain;
            let len = chain.writable.len();
            if chain.fault.is_some() || len < HEADER_LEN {
                if chain.fault.is_none() {
                    metrics.guest_faults.increment();
                }
                queue.push(chain.head, 0);
                *budget -= 1;
                continue;
            }
            self.held.push_back(Held { head: chain.head, pieces: chain.writable.pieces(), len });
            self.buffers.append(&mut chain.writable);
        }
    }

    /// Hands one frame over, the one that waited first; how many bytes it had. `None` if it waits now.
    fn receive(&mut self, link: &impl Link, queue: &mut Virtqueue, counts: &NetMetrics) -> io::Result<Option<usize>> {
        let view = self.buffers.view();
        let len = match self.kept.take() {
            Some(len) => {
                view.copy_from(&self.overflow[..len]);
                len
            }
            None => view.read_once(link.as_fd(), &mut self.overflow)?,
        };
        if len < HEADER_LEN || self.is_too_long(len) {
            counts.rx_dropped.increment();
            return Ok(Some(0));
        }
        if self.can_wait(len, queue) {
            let fit = view.len();
            self.overflow.copy_within(..len - fit, fit);
            view.copy_to(&mut self.overflow[..fit]);
            self.kept = Some(len);
            return Ok(None);
        }
        if len > view.len() {
            counts.rx_dropped.increment();
            return Ok(Some(0));
        }
        if self.rules.plain {
            // A tap says of what it has checked that it is right, also to who has not asked.
            self.buffers.view().copy_from(&[0; FLAGS + 1]);
        }
        Ok(Some(self.complete(len, queue, counts)))
    }

    /// Whether a frame of `len` bytes, whose header is in the buffers, is longer than the driver was told to expect.
    fn is_too_long(&self, len: usize) -> bool {
        if len - HEADER_LEN <= self.rules.longest {
            return false;
        }
        let mut header = [0; HEADER_LEN];
        self.buffers.view().copy_to(&mut header);
        u32::from(header[GSO_TYPE]) == VIRTIO_NET_HDR_GSO_NONE
    }

    /// Hands over the frames of `aside` while there are buffers.
    pub(super) fn inject(
        &mut self,
        aside: &mut Server,
        queue: &mut Virtqueue,
        metrics: &DeviceMetrics,
        counts: &NetMetrics,
    ) {
        let mut budget = ROUND;
        while let Some(frame) = aside.frame() {
            self.refill(queue, metrics, &mut budget);
            if budget == 0 {
                queue.poke();
                break;
            }
            budget -= 1;
            let len = HEADER_LEN + frame.len();
            if self.buffers.len() < len {
                if self.rules.mergeable || self.held.is_empty() {
                    if queue.want_notifications() {
                        queue.suppress_notifications();
                        continue;
                    }
                    break;
                }
                // A frame is one chain here, and the next one is too short for it.
                counts.rx_dropped.increment();
                aside.drop_frame();
                continue;
            }
            if let Some((header, rest)) = self.buffers.view().split_at(HEADER_LEN) {
                header.copy_from(&[0; HEADER_LEN]);
                rest.copy_from(frame);
            }
            self.complete(len, queue, counts);
            aside.drop_frame();
        }
        queue.announce();
    }

    /// Returns as many chains as a frame of `len` bytes, which is in the buffers, has filled; how many bytes it had without
    /// its header.
    fn complete(&mut self, len: usize, queue: &mut Virtqueue, counts: &NetMetrics) -> usize {
        let (mut left, mut chains, mut pieces) = (len, 0, 0);
        while left > 0 {
            left = left.saturating_sub(self.held[chains].len);
            pieces += self.held[chains].pieces;
            chains += 1;
        }
        if let Some((_, count)) = self.buffers.view().split_at(NUM_BUFFERS) {
            count.copy_from(&(chains as u16).to_le_bytes());
        }
        let mut left = len;
        // A broken ring takes none of them; they are out of hand all the same.
        queue.push_all(self.held.drain(..chains).map(|held| {
            let used = left.min(held.len);
            left -= used;
            (held.head, used as u32)
        }));
        self.buffers.drop_front(pieces);
        counts.rx_frames.increment();
        counts.rx_bytes.add((len - HEADER_LEN) as u64);
        len - HEADER_LEN
    }

    /// Gives the buffers in hand back to the queue they came from.
    pub(super) fn give_back(&mut self, queue: &mut Virtqueue) {
        queue.undo_pop(self.held.len() as u16);
        self.held.clear();
        self.buffers.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vm_memory::{Address, Bytes, GuestAddress};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::testing::{Machine, Wire};
    use crate::virtio::limiter::{BucketConfig, LimiterConfig};
    use crate::virtio::{Interrupt, QueueConfig};

    struct Silent;

    impl Interrupt for Silent {
        fn used(&self, _queue: u16) {}
        fn config_changed(&self) {}
        fn needs_reset(&self) {}
    }

    /// A receiver with its ring, and the far end of its link.
    struct Side {
        machine: Machine,
        wire: Wire,
        peer: std::os::unix::net::UnixDatagram,
        notify: Arc<EventFd>,
        queue: Virtqueue,
        receiver: Receiver,
        limiter: Limiter,
        metrics: Arc<DeviceMetrics>,
        counts: NetMetrics,
        offered: u16,
    }

    impl Side {
        /// With a ring of `size` entries, none of which is available.
        fn new(size: u16) -> Self {
            let machine = Machine::new();
            let (wire, peer, _) = Wire::new();
            let mut config = QueueConfig::new(size);
            (config.enabled, config.descriptors, config.driver, config.device) = (true, 0x1000, 0x6000, 0x8000);
            let ring = config.activate(&machine.memory, false).unwrap();
            let notify = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
            let (metrics, counts) = (Arc::<DeviceMetrics>::default(), NetMetrics::default());
            let queue = Virtqueue::new(0, ring, Arc::clone(&notify), Arc::new(Silent), Arc::clone(&metrics));
            let receiver = Receiver::new(&machine.memory, Rules::new(1 << VIRTIO_NET_F_MRG_RXBUF, None));
            let limiter = Limiter::open(LimiterConfig::NONE).unwrap();
            Self { machine, wire, peer, notify, queue, receiver, limiter, metrics, counts, offered: 0 }
        }

        fn set_available(&self, index: u16) {
            self.machine.memory.write_obj(index, GuestAddress(0x6002)).unwrap();
        }

        /// One more chain, of one buffer to be written; they lie 64 KiB apart.
        fn offer(&mut self, len: u32) {
            let at = GuestAddress(0x1000 + 16 * u64::from(self.offered));
            self.machine.memory.write_obj(Self::buffer(self.offered).0, at).unwrap();
            self.machine.memory.write_obj([len, 2], at.unchecked_add(8)).unwrap();
            self.machine.memory.write_obj(self.offered, GuestAddress(0x6004 + 2 * u64::from(self.offered))).unwrap();
            self.offered += 1;
            self.set_available(self.offered);
        }

        fn buffer(head: u16) -> GuestAddress {
            GuestAddress(0x10_0000 + u64::from(head) * 0x1_0000)
        }

        fn run(&mut self) -> Next {
            self.receiver.run(&self.wire, &mut self.queue, &self.limiter, &self.metrics, &self.counts).0
        }

        /// Number and length of the chain that was returned as the `n`th.
        fn used(&self, n: u64) -> [u32; 2] {
            self.machine.memory.read_obj(GuestAddress(0x8004 + 8 * n)).unwrap()
        }

        fn used_index(&self) -> u16 {
            self.machine.memory.read_obj(GuestAddress(0x8002)).unwrap()
        }

        /// Whether the driver was told to notify.
        fn is_told(&self) -> bool {
            self.machine.memory.read_obj::<u16>(GuestAddress(0x8000)).unwrap() == 0
        }
    }

    #[test]
    fn faulty_chains_are_returned_in_rounds_and_the_worker_comes_back_for_the_rest() {
        const OFFERED: u16 = 1000;
        // In memory full of zeros, every entry is a chain without room for a header.
        let mut side = Side::new(1024);
        side.set_available(OFFERED);
        for round in 1..=3 {
            assert_eq!((side.run(), side.used_index()), (Next::Frame, 256 * round));
            assert_eq!(side.notify.read().unwrap(), 1, "nobody would come back");
        }
        assert_eq!((side.run(), side.used_index()), (Next::Buffers, OFFERED));
        assert!(side.notify.read().is_err() && side.is_told(), "the driver will notify");
    }

    #[test]
    fn a_frame_longer_than_what_is_offered_waits_for_more() {
        let mut side = Side::new(16);
        let frame: Vec<u8> = (0..4000).map(|at| if at < HEADER_LEN { 0 } else { (at / 3) as u8 }).collect();
        side.peer.send(&frame).unwrap();
        side.peer.send(&frame[..100]).unwrap();
        for len in [1000, 1500, 1400] {
            side.offer(len);
            assert_eq!((side.run(), side.used_index()), (Next::Buffers, 0));
            assert!(side.is_told(), "the driver would say nothing of the next one");
        }
        // Three are short of it by 100 bytes; of the fifth a second frame is made.
        side.offer(200);
        side.offer(200);
        assert_eq!((side.run(), side.used_index()), (Next::Buffers, 5));
        assert_eq!([0, 1, 2, 3, 4].map(|n| side.used(n)), [[0, 1000], [1, 1500], [2, 1400], [3, 100], [4, 100]]);
        let mut whole = vec![0; 4000];
        let mut rest = &mut whole[..];
        for (head, len) in [(0, 1000), (1, 1500), (2, 1400), (3, 100)] {
            let (part, after) = rest.split_at_mut(len);
            side.machine.memory.read_slice(part, Side::buffer(head)).unwrap();
            rest = after;
        }
        assert_eq!(whole[NUM_BUFFERS..HEADER_LEN], [4, 0]);
        whole[NUM_BUFFERS] = 0;
        assert!(whole == frame, "the frame was changed");
        assert_eq!((side.counts.rx_frames.value(), side.counts.rx_dropped.value()), (2, 0));
    }

    #[test]
    fn a_frame_that_has_waited_is_paid_for_once() {
        let mut side = Side::new(16);
        // Two in an hour.
        let bucket = BucketConfig { size: 2, one_time_burst: 0, refill_time: Duration::from_secs(3600) };
        side.limiter = Limiter::open(LimiterConfig { operations: Some(bucket), ..LimiterConfig::NONE }).unwrap();
        for len in [2000, 100, 100] {
            side.peer.send(&vec![0; len]).unwrap();
        }
        side.offer(1500);
        assert_eq!((side.run(), side.used_index()), (Next::Buffers, 0));
        (0..3).for_each(|_| side.offer(1500));
        assert_eq!((side.run(), side.used_index()), (Next::Credit, 3), "a frame of two buffers, and one of one");
    }

    #[test]
    fn a_frame_longer_than_all_that_a_ring_can_offer_is_dropped_whole() {
        let mut side = Side::new(2);
        side.peer.send(&[0; 4000]).unwrap();
        side.peer.send(&[0; 1000]).unwrap();
        side.offer(1500);
        assert_eq!((side.run(), side.used_index()), (Next::Buffers, 0));
        side.offer(1500);
        assert_eq!((side.run(), side.used_index()), (Next::Frame, 1));
        assert_eq!((side.used(0), side.counts.rx_dropped.value()), ([0, 1000], 1));
    }

    #[test]
    fn a_ring_that_breaks_with_buffers_in_hand_takes_no_more_frames() {
        let mut side = Side::new(16);
        // No fewer hold the largest frame.
        (0..3).for_each(|_| side.offer(0x8000));
        assert_eq!(side.run(), Next::Frame);
        // More chains than the ring has places for.
        side.set_available(0x4000);
        // The first goes where there is a place already, and then it is seen. The last is longer than what is in hand.
        for len in [0x8000, 0x8000, 0xc000] {
            side.peer.send(&vec![0; len]).unwrap();
            side.run();
        }
        assert_eq!((side.counts.rx_frames.value(), side.counts.rx_dropped.value()), (2, 1));
        assert_eq!(side.used_index(), 1, "a broken ring was written to");
    }
}
