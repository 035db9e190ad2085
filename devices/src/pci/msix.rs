//! MSI-X, PCI Local Bus 3.0, 6.8.2: the table and the pending bits of one function, and the way from a device's worker to
//! an interrupt.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::{ReadWriteFlags, preadv2};
use vmm_sys_util::eventfd::EventFd;

use crate::host::MsiVector;

/// Bytes of a table entry: address, upper address, data, control.
const ENTRY_LEN: usize = 16;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK: u16 = 1 << 14;
/// What the guest may write of an entry: the two low address bits are zero, and of control only the mask bit exists.
const ENTRY_WRITABLE: [u32; 4] = [!3, !0, !0, 1];

/// For a descriptor that has no positions.
const NO_OFFSET: u64 = u64::MAX;

/// What happens to a signal.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Delivery {
    /// MSI-X is off: dropped.
    Off,
    /// Masked: remembered in the pending bit.
    Held,
    Live,
}

struct Vector {
    line: Box<dyn MsiVector>,
    delivery: Delivery,
    pending: bool,
    routed: Option<(u64, u32)>,
    /// Somebody signals the line without asking here. So it has a route only while it may, and keeps what comes meanwhile.
    direct: bool,
}

impl Vector {
    /// Without a route, signals that come to the line itself wait in it.
    fn hold(&mut self) -> io::Result<()> {
        if self.direct && self.routed.take().is_some() { self.line.unroute() } else { Ok(()) }
    }

    /// Takes the signals that wait in the line. Does not wait for one, even where somebody else who has the descriptor has
    /// made it one that blocks.
    fn take_direct(&self) -> bool {
        let mut count = [0; 8];
        let mut parts = [IoSliceMut::new(&mut count)];
        self.direct && preadv2(borrow(self.line.trigger()), &mut parts, NO_OFFSET, ReadWriteFlags::NOWAIT).is_ok()
    }
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor stays open as long as the event that is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The signalling side: held by workers. Each vector has its own lock, taken last and for a moment.
pub struct Vectors {
    vectors: Vec<Mutex<Vector>>,
}

impl Vectors {
    /// Raises vector `index`, from any thread; one that does not exist is ignored.
    ///
    /// # Errors
    /// The host's event descriptor could not be written.
    pub fn signal(&self, index: u16) -> io::Result<()> {
        let Some(mut vector) = self.lock(usize::from(index)) else { return Ok(()) };
        match vector.delivery {
            Delivery::Off => Ok(()),
            Delivery::Held => {
                vector.pending = true;
                Ok(())
            }
            Delivery::Live => vector.line.trigger().write(1),
        }
    }

    /// The descriptor of vector `index`, for somebody who signals it without asking here; none if there is no such vector.
    ///
    /// # Errors
    /// The host has no descriptors left, or refuses.
    pub fn direct(&self, index: u16) -> io::Result<Option<EventFd>> {
        let Some(mut vector) = self.lock(usize::from(index)) else { return Ok(None) };
        vector.direct = true;
        if vector.delivery != Delivery::Live {
            vector.hold()?;
        }
        vector.line.trigger().try_clone().map(Some)
    }

    fn lock(&self, index: usize) -> Option<MutexGuard<'_, Vector>> {
        self.vectors.get(index).map(|v| v.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

/// The register side: held by the function.
pub struct Msix {
    vectors: Arc<Vectors>,
    table: Vec<[u32; 4]>,
    enabled: bool,
    masked: bool,
}

impl Msix {
    /// A table with an entry for each of `lines`; all masked, MSI-X off.
    pub fn new(lines: Vec<Box<dyn MsiVector>>) -> Self {
        let table = vec![[0, 0, 0, 1]; lines.len()];
        let vector =
            |line| Mutex::new(Vector { line, delivery: Delivery::Off, pending: false, routed: None, direct: false });
        let vectors = Arc::new(Vectors { vectors: lines.into_iter().map(vector).collect() });
        Self { vectors, table, enabled: false, masked: false }
    }

    /// The signalling side.
    pub fn vectors(&self) -> Arc<Vectors> {
        Arc::clone(&self.vectors)
    }

    /// Whether the guest has it in the place of INTA#.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Bytes of the capability after id and next pointer, and which bits of them the guest writes, for a table and
    /// pending bits at these offsets into BAR `bar`.
    pub fn capability(&self, bar: u32, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
        let mut body = [0; 10];
        body[0..2].copy_from_slice(&(self.table.len() as u16 - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | bar).to_le_bytes());
        body[6..10].copy_from_slice(&(pending | bar).to_le_bytes());
        (body, (CONTROL_ENABLE | CONTROL_MASK).to_le_bytes())
    }

    /// The guest has written the message control register.
    ///
    /// # Errors
    /// The host refused to route a vector; the others are routed.
    pub fn set_control(&mut self, control: u16) -> io::Result<()> {
        let (enabled, masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_MASK != 0);
        if (enabled, masked) == (self.enabled, self.masked) {
            return Ok(());
        }
        (self.enabled, self.masked) = (enabled, masked);
        (0..self.table.len()).map(|index| self.update(index)).fold(Ok(()), Result::and)
    }

    /// The guest reads the table; past its end are zeroes.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            let entry = self.table.get(at / ENTRY_LEN);
            *byte = entry.map_or(0, |entry| entry[at % ENTRY_LEN / 4].to_le_bytes()[at % 4]);
        }
    }

    /// The guest writes the table. Only aligned double and quad words mean anything; the rest is dropped.
    ///
    /// # Errors
    /// The host refused to route the vector.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let offset = offset as usize;
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len()) {
            return Ok(());
        }
        let index = offset / ENTRY_LEN;
        let Some(entry) = self.table.get_mut(index) else { return Ok(()) };
        for (word, bytes) in (offset % ENTRY_LEN / 4..).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            entry[word] = value & ENTRY_WRITABLE[word];
        }
        self.update(index)
    }

    /// The guest reads the pending bits. Writes to them have no effect.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = (0..8).fold(0, |bits, bit| {
                let pending = self.vectors.lock(at.saturating_mul(8) + bit).is_some_and(|mut v| {
                    v.pending |= v.delivery == Delivery::Held && v.take_direct();
                    v.pending
                });
                bits | u8::from(pending) << bit
            });
        }
    }

    /// Stops all vectors, as at power-on.
    ///
    /// # Errors
    /// The host refused.
    pub fn shutdown(&mut self) -> io::Result<()> {
        self.table.fill([0, 0, 0, 1]);
        self.set_control(0)
    }

    /// Makes delivery of one vector agree with the registers.
    fn update(&mut self, index: usize) -> io::Result<()> {
        let [low, high, data, control] = self.table[index];
        let Some(mut vector) = self.vectors.lock(index) else { return Ok(()) };
        if !self.enabled {
            vector.delivery = Delivery::Off;
            vector.pending = false;
            return if vector.routed.take().is_some() { vector.line.unroute() } else { Ok(()) };
        }
        if vector.delivery == Delivery::Off {
            // What came while MSI-X was off is nobody's.
            vector.take_direct();
        }
        vector.delivery = Delivery::Held;
        if self.masked || control & 1 != 0 {
            return vector.hold();
        }
        let message = (u64::from(high) << 32 | u64::from(low), data);
        // Routing is dear for the host, and guests mask and unmask around every change of affinity.
        if vector.routed != Some(message) {
            vector.pending |= vector.take_direct();
            vector.line.route(message.0, message.1)?;
            vector.routed = Some(message);
            // What came just before is delivered by the route. From here on nothing stays in the line, which somebody may
            // have filled so that the write below would wait.
            vector.take_direct();
        }
        vector.delivery = Delivery::Live;
        if std::mem::take(&mut vector.pending) { vector.line.trigger().write(1) } else { Ok(()) }
    }
}
