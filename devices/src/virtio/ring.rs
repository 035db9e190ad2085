//! The three parts of a split virtqueue, where they lie in the host's memory. Virtio 1.2, 2.7.
//!
//! They are found once, when the driver has enabled the queue: what a request needs of them is then a few loads and stores,
//! with no search for the region of RAM that an address is in. The invariant that `unsafe` here rests on: a part is a range
//! of the memory that the same [`Ring`] keeps alive, and mappings never change while that handle lives. The guest may write
//! to it at any time, so that everything is read once, and checked after that.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice};

use super::queue::QueueError;
use crate::Memory;

/// Bytes of a descriptor.
const DESCRIPTOR: usize = size_of::<Descriptor>();
/// Flags and index, with which both the available and the used ring begin.
const HEADER: usize = 4;
/// Bytes of an element of the available ring, and of an event index.
const AVAILABLE: usize = 2;
/// Of the used ring.
const USED: usize = 8;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, `VIRTQ_USED_F_NO_NOTIFY`.
const NOT_ME: u16 = 1;

/// The driver's index is further ahead than the ring is long: nothing of the ring can be trusted.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken;

/// A ring, and how far the device is in it.
#[derive(Debug)]
pub struct Ring {
    memory: Memory,
    descriptors: VolatileSlice<'static>,
    available: VolatileSlice<'static>,
    used: VolatileSlice<'static>,
    state: QueueState,
}

// SAFETY: the pointers in the parts are to `memory`, which may be accessed from any thread.
unsafe impl Send for Ring {}

impl Ring {
    /// The ring that `state` tells of.
    ///
    /// # Errors
    /// It is misaligned or of a size that is none, or a part of it is not in one region of RAM.
    pub(super) fn new(state: QueueState, memory: &Memory) -> Result<Self, QueueError> {
        let state = Queue::try_from(state).map_err(QueueError::Shape)?.state();
        let size = usize::from(state.size);
        let part = |start: u64, len: usize| {
            let slice = GuestMemoryBackend::get_slice(&**memory, GuestAddress(start), len);
            let start = slice.map_err(|_| QueueError::OutsideRam)?.ptr_guard_mut().as_ptr();
            // SAFETY: these are the bytes of the slice, which are valid for as long as `memory`, of which a handle is kept
            // beside the part (module documentation).
            Ok(unsafe { VolatileSlice::new(start, len) })
        };
        Ok(Self {
            descriptors: part(state.desc_table, DESCRIPTOR * size)?,
            // An index of which the other side wants to hear comes behind both.
            available: part(state.avail_ring, HEADER + AVAILABLE * (size + 1))?,
            used: part(state.used_ring, HEADER + USED * size + AVAILABLE)?,
            memory: Memory::clone(memory),
            state,
        })
    }

    /// The memory that it is in.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Where it is, and how far the device.
    pub(super) fn state(&self) -> QueueState {
        self.state
    }

    /// Elements.
    pub(super) fn size(&self) -> u16 {
        self.state.size
    }

    /// The device goes on with this element.
    pub(super) fn set_next_available(&mut self, position: u16) {
        self.state.next_avail = position;
    }

    /// What has been used ends before this element.
    pub(super) fn set_next_used(&mut self, position: u16) {
        self.state.next_used = position;
    }

    /// The end of what has been used.
    pub(super) fn next_used(&self) -> u16 {
        self.state.next_used
    }

    /// Takes the next available chain: the index of its first descriptor, as the driver wrote it.
    pub(super) fn next(&mut self) -> Result<Option<u16>, Broken> {
        let next = self.state.next_avail;
        match load(&self.available, 2, Ordering::Acquire).wrapping_sub(next) {
            0 => Ok(None),
            offered if offered > self.state.size => Err(Broken),
            _ => {
                let at = HEADER + AVAILABLE * usize::from(next % self.state.size);
                self.state.next_avail = next.wrapping_add(1);
                Ok(Some(load(&self.available, at, Ordering::Relaxed)))
            }
        }
    }

    /// The descriptor table.
    pub(super) fn table(&self) -> Table<'_> {
        Table(self.descriptors)
    }

    /// The table that an indirect descriptor names, 2.7.5.3; `None` if it is none, or not in one region of RAM.
    pub(super) fn indirect(&self, descriptor: &Descriptor) -> Option<Table<'_>> {
        let len = descriptor.len() as usize;
        let is_table = len.is_multiple_of(DESCRIPTOR) && len / DESCRIPTOR <= usize::from(u16::MAX);
        let slice = || GuestMemoryBackend::get_slice(&*self.memory, descriptor.addr(), len).ok();
        is_table.then(slice)?.map(Table)
    }

    /// Writes elements of the used ring, and shows them to the driver, all at once.
    pub(super) fn push(&mut self, chains: impl IntoIterator<Item = (u16, u32)>) {
        let mut next = self.state.next_used;
        for (head, len) in chains {
            let at = HEADER + USED * usize::from(next % self.state.size);
            let element = u64::from(head) | u64::from(len) << 32;
            match self.used.get_ref::<u64>(at) {
                Ok(place) => place.store(element.to_le()),
                Err(_) => unreachable!("{INSIDE}"),
            }
            next = next.wrapping_add(1);
        }
        self.state.next_used = next;
        // Whoever sees the index sees the elements before it.
        store(&self.used, 2, next, Ordering::Release);
    }

    /// Whether the driver wants to hear of what was used since `announced`: by the index that it waits for, or by its flag
    /// (2.7.7).
    pub(super) fn driver_wants_interrupt(&self, announced: u16) -> bool {
        // The used index must be visible before the driver's wish is read, or both sides could miss each other.
        fence(Ordering::SeqCst);
        if !self.state.event_idx_enabled {
            return load(&self.available, 0, Ordering::Relaxed) & NOT_ME == 0;
        }
        let at = HEADER + AVAILABLE * usize::from(self.state.size);
        let event = load(&self.available, at, Ordering::Relaxed);
        let next = self.state.next_used;
        next.wrapping_sub(event).wrapping_sub(1) < next.wrapping_sub(announced)
    }

    /// Tells the driver not to notify. With an index to wait for it does not, once it has.
    pub(super) fn suppress_notifications(&self) {
        if !self.state.event_idx_enabled {
            store(&self.used, 0, NOT_ME, Ordering::Relaxed);
        }
    }

    /// Tells the driver to notify of the next chain; whether one has become available before it could know.
    pub(super) fn want_notifications(&self) -> bool {
        let next = self.state.next_avail;
        if self.state.event_idx_enabled {
            store(&self.used, HEADER + USED * usize::from(self.state.size), next, Ordering::Relaxed);
        } else {
            store(&self.used, 0, 0, Ordering::Relaxed);
        }
        // As above, the other way round.
        fence(Ordering::SeqCst);
        load(&self.available, 2, Ordering::Relaxed) != next
    }
}

/// A table of descriptors: the ring's, or an indirect one.
pub(super) struct Table<'a>(VolatileSlice<'a>);

impl Table<'_> {
    /// Number `index`, if there are as many.
    pub(super) fn get(&self, index: u16) -> Option<Descriptor> {
        Some(self.0.get_ref::<Descriptor>(DESCRIPTOR * usize::from(index)).ok()?.load())
    }
}

const INSIDE: &str = "the ring's parts are as long as its size says, and aligned";

fn load(part: &VolatileSlice<'_>, at: usize, order: Ordering) -> u16 {
    match part.load::<u16>(at, order) {
        Ok(value) => u16::from_le(value),
        Err(_) => unreachable!("{INSIDE}"),
    }
}

fn store(part: &VolatileSlice<'_>, at: usize, value: u16, order: Ordering) {
    match part.store(value.to_le(), at, order) {
        Ok(()) => {}
        Err(_) => unreachable!("{INSIDE}"),
    }
}
