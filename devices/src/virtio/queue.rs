//! Virtqueues: what the driver programs ([`QueueConfig`]) and what a device works on ([`Virtqueue`]).
//!
//! A configuration becomes a working queue once, at activation, and everything is checked there. The ring is then owned
//! by the device's worker until the device is stopped. Virtio 1.2, 2.6 and 2.7.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::ring::{Broken, Ring};
use super::{Buffers, Interrupt};
use crate::Memory;
use crate::metrics::DeviceMetrics;

/// So many chains are served at most before the worker looks at its other events again, so that a driver that never
/// pauses cannot keep a reset waiting.
const PATIENCE: usize = 1024;

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
    /// A part of a ring is not in RAM, or not in one region of it.
    #[error("virtqueue rings are outside of guest memory, or cross from one region of it into the next")]
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
    pub fn activate(&self, memory: &Memory, event_idx: bool) -> Result<Ring, QueueError> {
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
        Ring::new(state, memory)
    }
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

    /// Follows the descriptors of the chain that begins with number `head` to its end.
    fn fill(&mut self, head: u16, ring: &Ring) {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        self.fault = self.walk(head, ring).err();
        if matches!(self.fault, Some(ChainFault::Shape | ChainFault::Order)) {
            self.readable.clear();
            self.writable.clear();
        }
    }

    /// Virtio 1.2, 2.7.5. No longer than the ring, so that one that loops ends, too.
    fn walk(&mut self, head: u16, ring: &Ring) -> Result<(), ChainFault> {
        let (mut table, mut index, mut is_indirect) = (ring.table(), head, false);
        let (mut count, mut bytes) = (0, 0u32);
        let mut result = Ok(());
        loop {
            let descriptor = table.get(index).ok_or(ChainFault::Shape)?;
            if descriptor.refers_to_indirect_table() {
                if is_indirect {
                    return Err(ChainFault::Shape);
                }
                table = ring.indirect(&descriptor).ok_or(ChainFault::Shape)?;
                (index, is_indirect) = (0, true);
                continue;
            }
            count += 1;
            bytes = bytes.checked_add(descriptor.len()).ok_or(ChainFault::Shape)?;
            if count > ring.size() {
                return Err(ChainFault::Shape);
            }
            let writes = descriptor.is_write_only();
            if !writes && !self.writable.is_empty() {
                return Err(ChainFault::Order);
            }
            let list = if writes { &mut self.writable } else { &mut self.readable };
            if list.push(descriptor.addr(), descriptor.len()).is_err() {
                result = Err(ChainFault::Address);
            }
            if !descriptor.has_next() {
                return result;
            }
            index = descriptor.next();
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
    ring: Ring,
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
        ring: Ring,
        notify: Arc<EventFd>,
        interrupt: Arc<dyn Interrupt>,
        metrics: Arc<DeviceMetrics>,
    ) -> Self {
        let chain = Some(Chain::new(ring.memory()));
        Self { index, ring, notify, interrupt, metrics, chain, announced: 0, broken: false }
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
        self.ring.memory()
    }

    /// Whether the ring was found broken.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Position of the ring, for saving: what is behind it has been used, nothing is in flight.
    pub fn state(&self) -> QueueState {
        self.ring.state()
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
        let mut budget = PATIENCE;
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
        let head = match self.ring.next() {
            Ok(Some(head)) => head,
            Ok(None) => return false,
            Err(Broken) => {
                self.break_ring();
                return false;
            }
        };
        chain.fill(head, &self.ring);
        if chain.fault.is_some() {
            self.metrics.guest_faults.increment();
        }
        // By such a number the chain could not even be returned.
        if head >= self.ring.size() {
            self.break_ring();
            return false;
        }
        true
    }

    /// Puts the last `count` chains back, as if they had never been taken.
    pub fn undo_pop(&mut self, count: u16) {
        self.ring.set_next_available(self.ring.state().next_avail.wrapping_sub(count));
    }

    /// Somebody else has worked on the ring, and everything up to `position` has been used.
    pub fn moved_to(&mut self, position: u16) {
        self.ring.set_next_available(position);
        self.ring.set_next_used(position);
        self.announced = position;
    }

    /// Returns a chain to the driver, `len` bytes of which were written.
    pub fn push(&mut self, head: u16, len: u32) {
        self.push_all([(head, len)]);
    }

    /// Returns several chains, which the driver sees all at once: it needs that for a packet in several buffers.
    pub fn push_all(&mut self, chains: impl IntoIterator<Item = (u16, u32)>) {
        if !self.broken {
            let chains = chains.into_iter().inspect(|_| self.metrics.chains.increment());
            self.ring.push(chains);
        }
    }

    /// Interrupts the driver for what was returned since the last time, if it wants to be.
    pub fn announce(&mut self) {
        if self.broken || self.announced == self.ring.next_used() {
            return;
        }
        if self.ring.driver_wants_interrupt(self.announced) {
            self.metrics.interrupts.increment();
            self.interrupt.used(self.index);
        }
        self.announced = self.ring.next_used();
    }

    /// Tells the driver not to notify.
    pub fn suppress_notifications(&mut self) {
        if !self.broken {
            self.ring.suppress_notifications();
        }
    }

    /// Tells the driver to notify. Returns true if chains have become available meanwhile, of which it will not.
    pub fn want_notifications(&mut self) -> bool {
        !self.broken && self.ring.want_notifications()
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
    fn each_part_of_a_ring_lies_in_one_mapping() {
        // Two regions that touch for the guest, and not here.
        let regions = [(GuestAddress(0), 0x10_0000), (GuestAddress(0x10_0000), 0x10_0000)];
        let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap());
        // Bytes of the parts of a ring of 16: 256, 38, 134.
        for (descriptors, driver, device, fits) in [
            (0, 0x1000, 0x2000, true),
            (0xf_ff00, 0xf_fe00, 0xf_fc00, true),
            (0xf_ff10, 0x1000, 0x2000, false),
            (0, 0xf_fff0, 0x2000, false),
            (0, 0x1000, 0xf_ff80, false),
            (0x10_0000, 0x10_1000, 0x1f_ff78, true),
            (0x1f_ff10, 0x1000, 0x2000, false),
            (0x20_0000, 0x1000, 0x2000, false),
            (0, 0x1000, 0xffff_ffff_ffff_fffc, false),
        ] {
            let config = QueueConfig { size: 16, enabled: true, descriptors, driver, device, ..QueueConfig::new(16) };
            assert_eq!(config.activate(&memory, true).is_ok(), fits, "{config:x?}");
        }
    }
}
