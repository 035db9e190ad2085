//! A driver, in the order of steps of Virtio 1.2, 3.1.1.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};

use super::host::{DEADLINE, FakeVector, Machine};
use crate::Memory;
use crate::bus::Bus;
use crate::pci::Slot;
use crate::virtio::VirtioDevice;
use crate::virtio::pci::VirtioPciDevice;

const EVENT_IDX: u64 = 1 << 29;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// Guest memory below this is the rings'; tests put their buffers above.
const RINGS_END: u64 = 0x10_0000;
const RING_SPACING: u64 = 0x1_0000;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub enum Piece {
    /// The device reads: address, length.
    Read(u64, u32),
    /// The device writes: address, length.
    Write(u64, u32),
}

/// The driver of one device, and the machine that it is in.
pub struct Driver {
    /// The machine.
    pub machine: Machine,
    /// Where the device is.
    pub slot: Slot,
    /// Of the first BAR.
    pub bar: u64,
    /// Feature bits that were negotiated.
    pub features: u64,
    /// Where the structures are in memory, by `cfg_type`;
    structures: BTreeMap<u8, u64>,
    /// and the ports for notifications.
    ports: u16,
    /// Where the MSI-X capability is.
    pub msix: u64,
    /// Whether it has messages, or INTA#, from the next start on.
    pub by_message: bool,
}

impl Driver {
    /// Addresses from here on are free for buffers.
    pub const BUFFERS: u64 = RINGS_END;

    /// Puts `device` into a machine and finds its structures; the device is not started.
    pub fn attach(device: impl VirtioDevice + 'static) -> Self {
        Self::attach_to(Machine::new(), device)
    }

    /// As [`Self::attach`], for a device that knows the machine's memory already.
    pub fn attach_to(machine: Machine, device: impl VirtioDevice + 'static) -> Self {
        let function = VirtioPciDevice::new(device, &machine.memory, &machine.transport_host()).unwrap();
        let slot = machine.add(function);
        let bar = u64::from(machine.read_config(slot, 0x14)) << 32 | u64::from(machine.read_config(slot, 0x10) & !0xf);
        machine.write_config(slot, 4, 0x7);
        let mut structures = BTreeMap::new();
        let (mut msix, mut ports) = (0, 0);
        let mut at = u64::from(machine.read_config(slot, 0x34) & 0xff);
        while at != 0 {
            let head = machine.read_config(slot, at);
            match head & 0xff {
                0x09 => {
                    let offset = u64::from(machine.read_config(slot, at + 8));
                    match machine.read_config(slot, at + 4) as u8 {
                        0 => drop(structures.insert((head >> 24) as u8, bar + offset)),
                        number => {
                            let register = machine.read_config(slot, 0x10 + 4 * u64::from(number));
                            assert_eq!((head >> 24, register & 3), (2, 1), "only notifications go to ports");
                            ports = (register & !3) as u16 + offset as u16;
                        }
                    }
                }
                0x11 => msix = at,
                _ => {}
            }
            at = u64::from(head >> 8 & 0xff);
        }
        Self { machine, slot, bar, features: 0, structures, ports, msix, by_message: true }
    }

    /// Address of a register of the common configuration.
    pub fn common(&self, register: u64) -> u64 {
        self.structures[&1] + register
    }

    /// Address of a byte of the device's configuration.
    pub fn device_config(&self, offset: u64) -> u64 {
        self.structures[&4] + offset
    }

    /// Port at which queue `index` is notified.
    pub fn notify_port(&self, index: u16) -> u16 {
        self.ports + 4 * index
    }

    /// Address at which a driver does so that has no ports.
    pub fn notify_address(&self, index: u16) -> u64 {
        self.structures[&2] + 4 * u64::from(index)
    }

    /// Reads the ISR status, which clears it.
    pub fn take_isr(&self) -> u8 {
        self.machine.read::<1>(self.structures[&3])[0]
    }

    /// The device status register.
    pub fn status(&self) -> u8 {
        self.machine.read::<1>(self.common(20))[0]
    }

    /// Writes the device status register.
    pub fn set_status(&self, status: u8) {
        self.machine.write(self.common(20), &[status]);
    }

    /// Feature bits that the device offers.
    pub fn offered(&self) -> u64 {
        (0..2).fold(0, |bits, half: u32| {
            self.machine.write(self.common(0), &half.to_le_bytes());
            bits | u64::from(u32::from_le_bytes(self.machine.read(self.common(4)))) << (32 * half)
        })
    }

    /// Resets the device, negotiates `features`, routes MSI-X vectors and sets all queues up; the device is not yet
    /// started, so that a test can put chains into the rings first.
    pub fn prepare(&mut self, features: u64) -> Vec<DriverQueue> {
        self.prepare_some(features, &[])
    }

    /// All that the device offers but `without`, and without the queues `skipped`.
    pub fn prepare_without(&mut self, without: u64, skipped: &[u16]) -> Vec<DriverQueue> {
        let offered = self.offered();
        self.prepare_some(offered & !without, skipped)
    }

    fn prepare_some(&mut self, features: u64, skipped: &[u16]) -> Vec<DriverQueue> {
        self.set_status(0);
        assert_eq!(self.status(), 0, "a reset is complete when its write returns");
        self.set_status(1);
        self.set_status(3);
        for half in 0..2u32 {
            self.machine.write(self.common(8), &half.to_le_bytes());
            self.machine.write(self.common(12), &((features >> (32 * half)) as u32).to_le_bytes());
        }
        self.set_status(11);
        assert_eq!(self.status(), 11, "features {features:#x} were refused");
        self.features = features;
        match self.by_message {
            true => {
                self.enable_msix();
                self.machine.write(self.common(16), &0u16.to_le_bytes());
            }
            false => self.machine.write_config(self.slot, self.msix, 0),
        }
        let count = u16::from_le_bytes(self.machine.read(self.common(18)));
        (0..count).filter(|index| !skipped.contains(index)).map(|index| self.prepare_queue(index)).collect()
    }

    /// All that the device offers but `without`.
    pub fn prepare_all(&mut self, without: u64) -> Vec<DriverQueue> {
        self.prepare_without(without, &[])
    }

    /// Says that the driver is ready.
    pub fn start(&self) {
        self.set_status(15);
    }

    /// Brings the device up with everything that it offers.
    pub fn up(&mut self) -> Vec<DriverQueue> {
        let queues = self.prepare_all(0);
        self.start();
        queues
    }

    fn enable_msix(&self) {
        let control = self.machine.read_config(self.slot, self.msix);
        let table = self.bar + u64::from(self.machine.read_config(self.slot, self.msix + 4) & !7);
        for vector in 0..=u64::from(control >> 16 & 0x7ff) {
            let entry = [0xfee0_0000u32, 0, 0x20 + vector as u32, 0];
            for (word, value) in (0..).zip(entry) {
                self.machine.write(table + vector * 16 + word * 4, &value.to_le_bytes());
            }
        }
        self.machine.write_config(self.slot, self.msix, control & !(1 << 30) | 1 << 31);
    }

    fn prepare_queue(&self, index: u16) -> DriverQueue {
        let write = |register, bytes: &[u8]| self.machine.write(self.common(register), bytes);
        write(22, &index.to_le_bytes());
        let size = u16::from_le_bytes(self.machine.read(self.common(24)));
        let vector = match self.by_message {
            true => Arc::clone(&self.machine.host.vectors.lock().unwrap()[usize::from(index) + 1]),
            false => self.machine.host.intx_of(self.slot).0,
        };
        vector.take();
        let mut queue = DriverQueue::new(index, size, self.features, &self.machine.memory, vector);
        queue.isr = (!self.by_message).then(|| (Arc::clone(&self.machine.bus), self.structures[&3]));
        if self.by_message {
            write(26, &(index + 1).to_le_bytes());
        }
        for (register, address) in [(32, queue.table), (40, queue.avail), (48, queue.used)] {
            write(register, &address.to_le_bytes());
        }
        write(28, &1u16.to_le_bytes());
        queue
    }

    /// Notifies the device of queue `queue`.
    pub fn kick(&self, queue: &DriverQueue) {
        self.machine.write_port(self.notify_port(queue.index), &queue.index.to_le_bytes());
    }

    /// Offers one chain, notifies, waits for it; returns the length that the device reports.
    pub fn run(&self, queue: &mut DriverQueue, chain: &[Piece]) -> u32 {
        let head = queue.add(chain);
        self.kick(queue);
        let (id, len) = queue.wait();
        assert_eq!(id, u32::from(head));
        len
    }

    /// Writes bytes to guest memory.
    pub fn put(&self, address: u64, data: &[u8]) {
        self.machine.memory.write_slice(data, GuestAddress(address)).unwrap();
    }

    /// Reads them.
    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.machine.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}

/// One queue, from the driver's side. Descriptors are handed out round and round: at most a ring full may be in flight.
pub struct DriverQueue {
    /// Number of the queue.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Address of the descriptor table.
    pub table: u64,
    /// Address of the available ring.
    pub avail: u64,
    /// Address of the used ring.
    pub used: u64,
    /// The vector of the queue, or INTA#.
    pub vector: Arc<FakeVector>,
    /// The bus, and where on it the ISR status is that is read at each INTA#.
    pub isr: Option<(Arc<Bus>, u64)>,
    event_idx: bool,
    memory: Memory,
    next_descriptor: u16,
    next_avail: u16,
    next_used: u16,
}

impl DriverQueue {
    /// An empty queue in its place in `memory`, of which the device has to be told.
    pub(crate) fn new(index: u16, size: u16, features: u64, memory: &Memory, vector: Arc<FakeVector>) -> Self {
        assert!(index < 15 && size <= 1024, "the rings' part of memory is too small");
        let base = RING_SPACING * u64::from(index) + 0x1000;
        memory.write_slice(&vec![0; 0xc000], GuestAddress(base)).unwrap();
        Self {
            index,
            size,
            table: base,
            avail: base + 0x6000,
            used: base + 0x8000,
            event_idx: features & EVENT_IDX != 0,
            memory: Arc::clone(memory),
            vector,
            isr: None,
            next_descriptor: 0,
            next_avail: 0,
            next_used: 0,
        }
    }

    /// Writes one descriptor.
    pub fn set_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.table + 16 * u64::from(index);
        self.write_descriptor(at, address, len, flags, next);
    }

    fn write_descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Offers a chain; returns its head.
    pub fn add(&mut self, chain: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        for (count, piece) in chain.iter().enumerate() {
            let (address, len, write) = match *piece {
                Piece::Read(address, len) => (address, len, 0),
                Piece::Write(address, len) => (address, len, F_WRITE),
            };
            let next = (self.next_descriptor + 1) % self.size;
            let more = if count + 1 < chain.len() { F_NEXT } else { 0 };
            self.set_descriptor(self.next_descriptor, address, len, write | more, next);
            self.next_descriptor = next;
        }
        self.offer(head);
        head
    }

    /// Offers a chain by an indirect table at `table`.
    pub fn add_indirect(&mut self, table: u64, chain: &[Piece]) -> u16 {
        for (at, piece) in chain.iter().enumerate() {
            let (address, len, write) = match *piece {
                Piece::Read(address, len) => (address, len, 0),
                Piece::Write(address, len) => (address, len, F_WRITE),
            };
            let more = if at + 1 < chain.len() { F_NEXT } else { 0 };
            self.write_descriptor(table + 16 * at as u64, address, len, write | more, at as u16 + 1);
        }
        let head = self.next_descriptor;
        self.set_descriptor(head, table, 16 * chain.len() as u32, F_INDIRECT, 0);
        self.next_descriptor = (head + 1) % self.size;
        self.offer(head);
        head
    }

    /// Puts a head into the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        self.memory.write_obj(head, GuestAddress(self.avail + 4 + 2 * slot)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_avail_index(self.next_avail);
    }

    /// Sets the available index, whatever it was.
    pub fn set_avail_index(&self, index: u16) {
        self.memory.store(index, GuestAddress(self.avail + 2), std::sync::atomic::Ordering::SeqCst).unwrap();
    }

    /// The device's used index.
    pub fn used_index(&self) -> u16 {
        self.memory.load(GuestAddress(self.used + 2), std::sync::atomic::Ordering::SeqCst).unwrap()
    }

    /// Takes the next used chain, if there is one: head and length.
    pub fn take(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.next_used {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        let id = self.memory.read_obj(GuestAddress(at)).unwrap();
        Some((id, self.memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    /// Asks for an interrupt at the next used chain.
    pub fn arm(&self) {
        if self.event_idx {
            let at = GuestAddress(self.avail + 4 + 2 * u64::from(self.size));
            self.memory.store(self.next_used, at, std::sync::atomic::Ordering::SeqCst).unwrap();
        }
    }

    /// Waits for a used chain, by its interrupt.
    pub fn wait(&mut self) -> (u32, u32) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.arm();
            if let Some((bus, isr)) = &self.isr {
                // Whatever there is a reason for is looked at now; what comes later is another edge.
                bus.read(*isr, &mut [0]);
            }
            if let Some(used) = self.take() {
                return used;
            }
            assert!(self.vector.wait(deadline), "no interrupt for queue {} before the deadline", self.index);
        }
    }
}
