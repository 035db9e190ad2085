//! From the link to the guest. The driver's buffers are taken ahead of the frames that will fill them, so that one
//! `readv` goes straight into as many as a frame may need; what a frame did not need waits for the next one.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::tap::Link;
use super::{HEADER_LEN, MAX_FRAME_LEN, NetMetrics};
use crate::Memory;
use crate::metrics::DeviceMetrics;
use crate::virtio::{Buffers, Chain, Virtqueue};

/// Frames that are handed over before other events are looked at.
const ROUND: usize = 256;
/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

/// What the link should be watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// A frame may come.
    Frame,
    /// The driver has to offer buffers first, and will notify.
    Buffers,
    /// Nothing: the link has failed.
    Nothing,
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
    /// One frame may fill several chains.
    mergeable: bool,
    /// Takes what does not fit, so that a frame that was cut is known.
    overflow: Box<[u8]>,
}

impl Receiver {
    pub(super) fn new(memory: &Memory, mergeable: bool) -> Self {
        let buffers = Buffers::new(Arc::clone(memory));
        let overflow = vec![0; MAX_FRAME_LEN].into_boxed_slice();
        Self { chain: Chain::new(memory), held: VecDeque::new(), buffers, mergeable, overflow }
    }

    /// Hands frames over until there are none, or no buffers.
    pub(super) fn run(
        &mut self,
        link: &impl Link,
        queue: &mut Virtqueue,
        metrics: &DeviceMetrics,
        counts: &NetMetrics,
    ) -> Next {
        queue.suppress_notifications();
        let mut next = Next::Frame;
        for _ in 0..ROUND {
            self.refill(queue, metrics);
            if self.held.is_empty() {
                if queue.want_notifications() {
                    queue.suppress_notifications();
                    continue;
                }
                next = Next::Buffers;
                break;
            }
            match self.receive(link, queue, counts) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    metrics.host_fault(|| format!("cannot read from a tap device: {error}"));
                    next = Next::Nothing;
                    break;
                }
            }
        }
        queue.announce();
        next
    }

    /// Takes chains until the largest frame fits, or there are no more.
    fn refill(&mut self, queue: &mut Virtqueue, metrics: &DeviceMetrics) {
        let enough = |receiver: &Self| {
            if receiver.mergeable { receiver.buffers.len() >= MAX_FRAME_LEN } else { !receiver.held.is_empty() }
        };
        while !enough(self) && queue.pop(&mut self.chain) {
            let chain = &mut self.chain;
            let len = chain.writable.len();
            if chain.fault.is_some() || len < HEADER_LEN {
                if chain.fault.is_none() {
                    metrics.guest_faults.increment();
                }
                queue.push(chain.head, 0);
                continue;
            }
            self.held.push_back(Held { head: chain.head, pieces: chain.writable.pieces(), len });
            self.buffers.append(&mut chain.writable);
        }
    }

    fn receive(&mut self, link: &impl Link, queue: &mut Virtqueue, counts: &NetMetrics) -> io::Result<()> {
        let view = self.buffers.view();
        let len = view.read_once(link.as_fd(), &mut self.overflow)?;
        if len > view.len() || len < HEADER_LEN {
            counts.rx_dropped.increment();
            return Ok(());
        }
        let mut left = len;
        let mut chains = 0;
        while left > 0 {
            left = left.saturating_sub(self.held[chains].len);
            chains += 1;
        }
        if let Some((_, count)) = view.split_at(NUM_BUFFERS) {
            count.copy_from(&(chains as u16).to_le_bytes());
        }
        let mut left = len;
        let mut pieces = 0;
        queue.push_all(self.held.drain(..chains).map(|held| {
            let used = left.min(held.len);
            left -= used;
            pieces += held.pieces;
            (held.head, used as u32)
        }));
        self.buffers.drop_front(pieces);
        counts.rx_frames.increment();
        counts.rx_bytes.add((len - HEADER_LEN) as u64);
        Ok(())
    }

    /// Gives the buffers in hand back to the queue they came from.
    pub(super) fn give_back(&mut self, queue: &mut Virtqueue) {
        queue.undo_pop(self.held.len() as u16);
        self.held.clear();
        self.buffers.clear();
    }
}
