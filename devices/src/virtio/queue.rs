//! Virtqueues: what the driver programs ([`QueueConfig`]) and what a device works on ([`Virtqueue`]).
//!
//! A configuration becomes a working queue once, at activation, and everything is checked there. The ring is then owned
//! by the device's worker until the device is stopped. Virtio 1.2, 2.6 and 2.7.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, Permissions,
};
use vmm_sys_util::eventfd::EventFd;

use super::{Buffers, Interrupt};
use crate::Memory;
use crate::metrics::DeviceMetrics;

/// A chain is served at most this many times the ring's size before the worker looks at its other events again, so that
/// a driver that never pauses cannot keep a reset waiting.
const ROUNDS: usize = 4;

/// Registers of one queue, as the driver writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueConfig {
    /// The largest size that the device takes.
    pub max_size: u16,
    /// Entries, a power of two.
    pub size: u16,
    /// Set by the driver when the rest is in place.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Of the available ring.
    pub driver: u64,
    /// Of the used ring.
    pub device: u64,
}

/// The driver has enabled a queue that cannot work.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Alignment of a ring, or the size.
    #[error("virtqueue is misaligned or of a wrong size: {0}")]
    Shape(virtio_queue::Error),
    /// A ring is not in RAM.
    #[error("virtqueue rings are outside of guest memory")]
    OutsideRam,
}

/// How far the two sides of a virtqueue are, as its rings say: Virtio 1.2, 2.7.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueuePosition {
    /// Its number.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// What the driver has made available, modulo 65536; none where the ring is not in RAM.
    pub available: Option<u16>,
    /// What the device has finished, likewise.
    pub used: Option<u16>,
}

impl QueueConfig {
    /// How far queue `index` is, if it is in use. Reads guest memory that both sides go on writing.
    pub fn position(&self, index: u16, memory: &Memory) -> Option<QueuePosition> {
        // Both rings begin with their flags.
        let count = |ring: u64| {
            let at = ring.checked_add(2)?;
            memory.load::<u16>(GuestAddress(at), Ordering::Acquire).ok().map(u16::from_le)
        };
        self.enabled.then(|| QueuePosition {
            index,
            size: self.size,
            descriptors: self.descriptors,
            available: count(self.driver),
            used: count(self.device),
        })
    }

    /// Registers after reset.
    pub fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, enabled: false, descriptors: 0, driver: 0, device: 0 }
    }

    /// Checks the registers and makes a ring of them that starts empty.
    ///
    /// # Errors
    /// Alignment, size, or a part outside of RAM.
    pub fn activate(&self, memory: &Memory, event_idx: bool) -> Result<Queue, QueueError> {
        let size = u64::from(self.size);
        let parts = [(self.descriptors, 16 * size), (self.driver, 6 + 2 * size), (self.device, 6 + 8 * size)];
        let in_ram = |&(start, len): &(u64, u64)| {
            GuestMemory::check_range(&**memory, GuestAddress(start), len as usize, Permissions::ReadWrite)
        };
        if !parts.iter().all(in_ram) {
            return Err(QueueError::OutsideRam);
        }
        let state = QueueState {
            max_size: self.max_size,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: self.enabled,
            desc_table: self.descriptors,
            avail_ring: self.driver,
            used_ring: self.device,
        };
        Queue::try_from(state).map_err(QueueError::Shape)
    }
}

/// Whether `len` bytes from `start` on lie in one region of memory.
pub(super) fn in_one_region(memory: &Memory, start: u64, len: u64) -> bool {
    let region = memory.find_region(GuestAddress(start));
    // Cannot overflow: a region ends before the last address.
    region.is_some_and(|region| len <= region.len() - (start - region.start_addr().raw_value()))
}

/// How a chain breaks the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainFault {
    /// It loops, leaves the table, is longer than the queue or has a bad indirect table. No buffers are known.
    Shape,
    /// A device-readable buffer follows a device-writable one. No buffers are known.
    Order,
    /// Buffers outside of RAM; the others are known.
    Address,
}

/// The buffers of one request. Reused from chain to chain.
pub struct Chain {
    /// Index of the first descriptor, by which the chain is returned.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers,
    /// Where the device writes.
    pub writable: Buffers,
    /// Set for a chain that breaks the rules. It was counted already and has to be returned like any other.
    pub fault: Option<ChainFault>,
}

impl Chain {
    /// An empty chain over `memory`.
    pub fn new(memory: &Memory) -> Self {
        let list = || Buffers::new(Arc::clone(memory));
        Self { head: 0, readable: list(), writable: list(), fault: None }
    }

    /// Takes the chain out of here, which is left empty: to return it later.
    pub fn take(&mut self) -> Self {
        let empty = Self { head: 0, readable: self.readable.another(), writable: self.writable.another(), fault: None };
        std::mem::replace(self, empty)
    }

    /// Follows a chain's descriptors to its end.
    fn fill<M>(&mut self, mut chain: virtio_queue::DescriptorChain<M>, limit: u16)
    where
        M: std::ops::Deref,
        M::Target: GuestMemory,
    {
        self.head = chain.head_index();
        self.readable.clear();
        self.writable.clear();
        self.fault = None;
        // The iterator ends early where a chain is broken; then the last descriptor promised another one.
        let mut promised = true;
        for (count, descriptor) in chain.by_ref().enumerate() {
            let writes = descriptor.is_write_only();
            promised = descriptor.has_next();
            if count >= usize::from(limit) {
                promised = true;
                break;
            }
            if !writes && !self.writable.is_empty() {
                self.fault = Some(ChainFault::Order);
                break;
            }
            let list = if writes { &mut self.writable } else { &mut self.readable };
            if list.push(descriptor.addr(), descriptor.len()).is_err() {
                self.fault = Some(ChainFault::Address);
            }
        }
        if promised && self.fault != Some(ChainFault::Order) {
            self.fault = Some(ChainFault::Shape);
        }
        if matches!(self.fault, Some(ChainFault::Shape | ChainFault::Order)) {
            self.readable.clear();
            self.writable.clear();
        }
    }
}

/// What a device says about a chain that it was shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done; so many bytes were written to its writable buffers, from their start.
    Used(u32),
    /// Not now: show it again at the next drain. The device knows an event of the host's that will be the time.
    Wait,
    /// Being done: the device has taken the buffers and returns the chain itself, with [`Virtqueue::push`].
    Later,
}

/// Why [`Virtqueue::drain`] came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Nothing is left; the driver will notify when there is.
    Empty,
    /// The device asked to wait.
    Waiting,
    /// There is more, and the worker will be notified of it at once.
    More,
    /// The ring is broken. The driver has been told that the device needs a reset.
    Broken,
}

/// A ring at work, owned by one worker.
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    memory: Memory,
    notify: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    metrics: Arc<DeviceMetrics>,
    /// Taken out while a device serves it.
    chain: Option<Chain>,
    /// The used index up to which the driver was last considered for an interrupt.
    announced: u16,
    broken: bool,
}

impl Virtqueue {
    /// A working queue with number `index`. `notify` is signalled by the driver's notifications.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: &Memory,
        notify: Arc<EventFd>,
        interrupt: Arc<dyn Interrupt>,
        metrics: Arc<DeviceMetrics>,
    ) -> Self {
        let chain = Some(Chain::new(memory));
        let memory = Arc::clone(memory);
        Self { index, queue, memory, notify, interrupt, metrics, chain, announced: 0, broken: false }
    }

    /// Number of the queue in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The driver's notifications.
    pub fn notify(&self) -> &Arc<EventFd> {
        &self.notify
    }

    /// The memory that the ring is in.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Whether the ring was found broken.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether each of its parts lies in one region of memory, for somebody who does not look for the next one.
    pub fn is_contiguous(&self) -> bool {
        let state = self.queue.state();
        let size = u64::from(state.size);
        let parts = [(state.desc_table, 16 * size), (state.avail_ring, 6 + 2 * size), (state.used_ring, 6 + 8 * size)];
        parts.iter().all(|(start, len)| in_one_region(&self.memory, *start, *len))
    }

    /// Position of the ring, for saving: what is behind it has been used, nothing is in flight.
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Shows every available chain to `serve`, returns the served ones to the driver, and interrupts it once, if it
    /// wants to be. All devices work through this loop.
    pub fn drain(&mut self, mut serve: impl FnMut(&mut Chain) -> Answer) -> Drained {
        let Some(mut chain) = self.chain.take() else { return Drained::Broken };
        let result = self.drain_into(&mut chain, &mut serve);
        self.chain = Some(chain);
        self.announce();
        if self.broken { Drained::Broken } else { result }
    }

    fn drain_into(&mut self, chain: &mut Chain, serve: &mut dyn FnMut(&mut Chain) -> Answer) -> Drained {
        let mut budget = usize::from(self.queue.size()) * ROUNDS;
        loop {
            self.suppress_notifications();
            while self.pop(chain) {
                match serve(chain) {
                    Answer::Used(len) => self.push(chain.head, len),
                    Answer::Later => {}
                    Answer::Wait => {
                        self.undo_pop(1);
                        return Drained::Waiting;
                    }
                }
                budget -= 1;
                if budget == 0 {
                    self.poke();
                    return Drained::More;
                }
            }
            self.announce();
            if !self.want_notifications() {
                return Drained::Empty;
            }
            // Each look costs, too: a driver that moves its index back and forth offers nothing and would never end this.
            budget -= 1;
            if budget == 0 {
                self.poke();
                return Drained::More;
            }
        }
    }

    /// Takes the next available chain. Returns false when there is none, or the ring is broken.
    pub fn pop(&mut self, chain: &mut Chain) -> bool {
        if self.broken {
            return false;
        }
        let size = self.queue.size();
        let next = match self.queue.iter(&*self.memory) {
            Ok(mut available) => available.next(),
            Err(_) => {
                self.break_ring();
                return false;
            }
        };
        let Some(found) = next else { return false };
        chain.fill(found, size);
        if chain.fault.is_some() {
            self.metrics.guest_faults.increment();
        }
        // By such a number the chain could not even be returned.
        if chain.head >= size {
            self.break_ring();
            return false;
        }
        true
    }

    /// Puts the last `count` chains back, as if they had never been taken.
    pub fn undo_pop(&mut self, count: u16) {
        let position = Wrapping(self.queue.next_avail()) - Wrapping(count);
        self.queue.set_next_avail(position.0);
    }

    /// Somebody else has worked on the ring, and everything up to `position` has been used.
    pub fn moved_to(&mut self, position: u16) {
        self.queue.set_next_avail(position);
        self.queue.set_next_used(position);
        self.announced = position;
    }

    /// Returns a chain to the driver, `len` bytes of which were written.
    pub fn push(&mut self, head: u16, len: u32) {
        self.push_all([(head, len)]);
    }

    /// Returns several chains, which the driver sees all at once: it needs that for a packet in several buffers.
    pub fn push_all(&mut self, chains: impl IntoIterator<Item = (u16, u32)>) {
        if !self.broken && self.try_push(chains).is_err() {
            self.break_ring();
        }
    }

    fn try_push(&mut self, chains: impl IntoIterator<Item = (u16, u32)>) -> Result<(), GuestMemoryError> {
        let ring = self.queue.used_ring();
        let mut next = self.queue.next_used();
        for (head, len) in chains {
            let at = ring + 4 + 8 * u64::from(next % self.queue.size());
            self.memory.write_obj([u32::from(head).to_le(), len.to_le()], GuestAddress(at))?;
            next = next.wrapping_add(1);
            self.metrics.chains.increment();
        }
        self.queue.set_next_used(next);
        // Whoever sees the index sees the elements before it.
        self.memory.store(next.to_le(), GuestAddress(ring + 2), Ordering::Release)
    }

    /// Interrupts the driver for what was returned since the last time, if it wants to be.
    pub fn announce(&mut self) {
        if self.broken || self.announced == self.queue.next_used() {
            return;
        }
        match self.driver_wants_interrupt() {
            Ok(true) => {
                self.metrics.interrupts.increment();
                self.interrupt.used(self.index);
            }
            Ok(false) => {}
            Err(_) => self.break_ring(),
        }
        self.announced = self.queue.next_used();
    }

    /// Virtio 1.2, 2.7.7: by the index of which the driver wants to hear, or by its flag.
    fn driver_wants_interrupt(&mut self) -> Result<bool, GuestMemoryError> {
        const NO_INTERRUPT: u16 = 1;
        // The used index must be visible before the driver's wish is read, or both sides could miss each other.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let read = |at: u64| self.memory.load::<u16>(GuestAddress(at), Ordering::Relaxed).map(u16::from_le);
        if !self.queue.event_idx_enabled() {
            return Ok(read(available)? & NO_INTERRUPT == 0);
        }
        let event = read(available + 4 + 2 * u64::from(self.queue.size()))?;
        let next = self.queue.next_used();
        Ok(next.wrapping_sub(event).wrapping_sub(1) < next.wrapping_sub(self.announced))
    }

    /// Tells the driver not to notify.
    pub fn suppress_notifications(&mut self) {
        if !self.broken && self.queue.disable_notification(&*self.memory).is_err() {
            self.break_ring();
        }
    }

    /// Tells the driver to notify. Returns true if chains have become available meanwhile, of which it will not.
    pub fn want_notifications(&mut self) -> bool {
        if self.broken {
            return false;
        }
        self.queue.enable_notification(&*self.memory).unwrap_or_else(|_| {
            self.break_ring();
            false
        })
    }

    /// Makes the worker look at this queue again.
    pub fn poke(&self) {
        if let Err(error) = self.notify.write(1) {
            self.metrics.host_fault(|| format!("cannot signal a virtqueue's event descriptor: {error}"));
        }
    }

    /// The rules of the ring itself are broken: nothing of it can be trusted until the driver resets the device.
    fn break_ring(&mut self) {
        if !self.broken {
            self.broken = true;
            self.metrics.guest_faults.increment();
            self.interrupt.needs_reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    #[test]
    fn a_ring_lies_in_one_mapping() {
        // Two regions that touch for the guest, and not here.
        let regions = [(GuestAddress(0), 0x10_0000), (GuestAddress(0x10_0000), 0x10_0000)];
        let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap());
        for (start, len, expected) in [
            (0, 0x1000, true),
            (0xf_f000, 0x1000, true),
            (0xf_f000, 0x1001, false),
            (0x10_0000, 0x10_0000, true),
            (0x10_0010, 0x10_0000, false),
            (0x20_0000, 1, false),
            (u64::MAX, 16, false),
        ] {
            assert_eq!(in_one_region(&memory, start, len), expected, "{start:#x} {len:#x}");
        }
    }
}
