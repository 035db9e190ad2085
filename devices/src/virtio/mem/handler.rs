//! The driver's requests, Virtio 1.2, 5.15.6.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use event_manager::EventSet;
use vm_memory::GuestAddress;

use super::{MemConfig, MemControl, MemMetrics, Shared};
use crate::metrics::DeviceMetrics;
use crate::virtio::{Answer, Buffers, Chain, Handler, Inbox, Session};

/// The worker's descriptor: the control thread has named another size.
const ORDERS: u32 = 0;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Largest stretch that is given back by one call: a buffer's length has 32 bits.
const STRETCH: u64 = 1 << 30;

/// `type` of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reply {
    Ack,
    /// Not allowed now.
    Nack,
    /// Not now.
    Busy,
    /// Never.
    Error,
}

/// What blocks are, all together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Plugged,
    Unplugged,
    Mixed,
}

pub(super) struct MemHandler {
    config: MemConfig,
    shared: Arc<Shared>,
    inbox: Arc<Inbox<bool>>,
    counts: Arc<MemMetrics>,
    /// For each block whether it is plugged.
    blocks: Vec<bool>,
    /// A stretch that is given back.
    stretch: Option<Buffers>,
}

impl MemHandler {
    pub(super) fn new(control: &MemControl, counts: &Arc<MemMetrics>) -> Self {
        let config = control.config;
        Self {
            config,
            shared: Arc::clone(&control.shared),
            inbox: Arc::clone(&control.inbox),
            counts: Arc::clone(counts),
            // The configuration bounds it: a TiB of the smallest blocks has half a million.
            blocks: vec![false; (config.len / config.block) as usize],
            stretch: None,
        }
    }

    fn serve(&mut self, chain: &Chain, metrics: &DeviceMetrics) -> Answer {
        /// Bytes up to `state`, and with it.
        const REPLY_LEN: usize = 10;
        if chain.fault.is_some() {
            return Answer::Used(0);
        }
        let place = chain.writable.view();
        // type and padding; address; count and padding.
        let request = chain.readable.view().split_value::<[u16; 4]>().and_then(|(kind, rest)| {
            let (address, rest) = rest.split_value::<u64>()?;
            let (count, _) = rest.split_value::<[u16; 4]>()?;
            Some((u16::from_le(kind[0]), u64::from_le(address), u16::from_le(count[0])))
        });
        let Some((kind, address, count)) = request.filter(|_| place.len() >= REPLY_LEN) else {
            metrics.guest_faults.increment();
            return Answer::Used(0);
        };
        let range = self.range(address, count);
        let mut state = State::Plugged;
        let reply = match (kind, range) {
            (PLUG, Some(range)) => self.plug(range),
            (UNPLUG, Some(range)) => self.unplug(range, metrics),
            (UNPLUG_ALL, _) => self.unplug_all(metrics),
            (STATE, Some(range)) => {
                state = self.state(&range);
                Reply::Ack
            }
            _ => Reply::Error,
        };
        match reply {
            Reply::Error => metrics.guest_faults.increment(),
            Reply::Nack | Reply::Busy => self.counts.refused.increment(),
            Reply::Ack => {}
        }
        let mut bytes = [0; REPLY_LEN];
        bytes[..2].copy_from_slice(&(reply as u16).to_le_bytes());
        bytes[8..].copy_from_slice(&(state as u16).to_le_bytes());
        place.copy_from(&bytes);
        Answer::Used(REPLY_LEN as u32)
    }

    /// The blocks that a request names, if they are blocks of this region.
    fn range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.config.address)?;
        let first = usize::try_from(offset / self.config.block).ok()?;
        let end = first.checked_add(count.into())?;
        let good = count > 0 && offset.is_multiple_of(self.config.block) && end <= self.blocks.len();
        good.then_some(first..end)
    }

    fn state(&self, range: &Range<usize>) -> State {
        let mut blocks = self.blocks[range.clone()].iter();
        match blocks.next() {
            Some(first) if !blocks.all(|block| block == first) => State::Mixed,
            Some(true) => State::Plugged,
            _ => State::Unplugged,
        }
    }

    fn bytes(&self, blocks: usize) -> u64 {
        blocks as u64 * self.config.block
    }

    fn plug(&mut self, range: Range<usize>) -> Reply {
        if self.state(&range) != State::Unplugged {
            return Reply::Error;
        }
        let more = self.bytes(range.len());
        let plugged = self.shared.plugged.load(Ordering::SeqCst);
        if plugged + more > self.shared.requested.load(Ordering::SeqCst) {
            return Reply::Nack;
        }
        self.counts.plugged.add(range.len() as u64);
        self.blocks[range].fill(true);
        self.shared.plugged.store(plugged + more, Ordering::SeqCst);
        Reply::Ack
    }

    fn unplug(&mut self, range: Range<usize>, metrics: &DeviceMetrics) -> Reply {
        if self.state(&range) != State::Plugged {
            return Reply::Error;
        }
        if !self.give_back(&range, metrics) {
            return Reply::Busy;
        }
        self.counts.unplugged.add(range.len() as u64);
        let plugged = self.shared.plugged.load(Ordering::SeqCst);
        self.shared.plugged.store(plugged - self.bytes(range.len()), Ordering::SeqCst);
        self.blocks[range].fill(false);
        Reply::Ack
    }

    fn unplug_all(&mut self, metrics: &DeviceMetrics) -> Reply {
        // Also what is not plugged and was touched against the rules.
        if !self.give_back(&(0..self.blocks.len()), metrics) {
            return Reply::Busy;
        }
        self.counts.unplugged.add(self.blocks.iter().filter(|plugged| **plugged).count() as u64);
        self.blocks.fill(false);
        self.shared.plugged.store(0, Ordering::SeqCst);
        Reply::Ack
    }

    /// Gives the memory of blocks back to the host; false if it refuses.
    fn give_back(&mut self, range: &Range<usize>, metrics: &DeviceMetrics) -> bool {
        let Some(stretch) = &mut self.stretch else { return false };
        let end = self.config.address + range.end as u64 * self.config.block;
        let mut at = self.config.address + range.start as u64 * self.config.block;
        while at < end {
            let len = (end - at).min(STRETCH);
            stretch.clear();
            let result = match stretch.push(GuestAddress(at), len as u32) {
                Ok(()) => stretch.view().release().map(|_| ()).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = result {
                metrics.host_fault(|| format!("cannot give back unplugged memory: {error}"));
                return false;
            }
            at += len;
        }
        true
    }
}

impl Handler for MemHandler {
    fn started(&mut self, session: &mut Session<'_, '_>) {
        self.stretch = session.queues.iter().flatten().next().map(|queue| Buffers::new(Arc::clone(queue.memory())));
        if let Err(error) = session.watch(&*self.inbox, ORDERS, EventSet::IN) {
            session.metrics.host_fault(|| format!("cannot watch a memory device's events: {error}"));
        }
    }

    fn notified(&mut self, queue: usize, session: &mut Session<'_, '_>) {
        let metrics = session.metrics;
        if let Some(queue) = session.queue(queue) {
            queue.drain(|chain| self.serve(chain, metrics));
        }
    }

    fn ready(&mut self, _token: u32, _events: EventSet, session: &mut Session<'_, '_>) {
        if self.inbox.take() {
            session.interrupt.config_changed();
        }
    }
}
