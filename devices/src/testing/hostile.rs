//! A driver that does anything: bytes, from a fuzzer or from a property test, become register writes, descriptors, ring
//! indices and notifications.
//!
//! The promise that is tested: whatever it did, a reset is complete when its write returns, and the device then serves an
//! honest driver. What a test does with that driver afterwards is its own.

use super::driver::{Driver, DriverQueue, Piece};
use super::host::Machine;
use crate::pci::Slot;

/// Takes numbers from a fuzzer's bytes; zeroes when they are used up.
struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn number(&mut self, bytes: u8) -> u64 {
        (0..bytes).fold(0, |value, _| value << 8 | u64::from(self.byte()))
    }

    /// An address: mostly in buffers or rings, at times nowhere.
    fn address(&mut self) -> u64 {
        match self.byte() {
            0..=160 => Driver::BUFFERS + self.number(2) * 16,
            161..=220 => self.number(2) * 16,
            221..=235 => Machine::RAM as u64 - self.number(1),
            236..=245 => u64::MAX - self.number(1),
            _ => self.number(8),
        }
    }

    /// A length: mostly one that requests have.
    fn len(&mut self) -> u32 {
        match self.byte() {
            0..=100 => [1, 16, 44, 512, 4096, 12, 1526, 65562][usize::from(self.byte() % 8)],
            101..=200 => self.number(1) as u32,
            201..=235 => self.number(2) as u32,
            _ => self.number(4) as u32,
        }
    }

    fn width(&mut self) -> usize {
        1 << (self.byte() % 4)
    }
}

/// A driver gone bad, over a device.
pub struct Hostile {
    driver: Driver,
}

impl Hostile {
    /// Takes over the driver of a device.
    pub fn new(driver: Driver) -> Self {
        Self { driver }
    }

    /// Does what `bytes` say, then resets the device and brings it up properly.
    pub fn run(&mut self, bytes: &[u8]) -> (&Driver, Vec<DriverQueue>) {
        let mut source = Source(bytes);
        let by_message = source.byte().is_multiple_of(2);
        let mut queues = self.prepare(&mut source);
        while !source.0.is_empty() {
            self.step(&mut source, &mut queues);
        }
        self.restore_bars();
        self.driver.by_message = by_message;
        let queues = self.driver.up();
        (&self.driver, queues)
    }

    /// Puts the BARs to where they belong, in case that they were moved.
    fn restore_bars(&self) {
        let Driver { machine, slot, bar, .. } = &self.driver;
        machine.write_config(*slot, 4, 0);
        machine.write_config(*slot, 0x10, *bar as u32);
        machine.write_config(*slot, 0x14, (*bar >> 32) as u32);
        machine.write_config(*slot, 0x18, self.driver.notify_port(0).into());
        machine.write_config(*slot, 4, 7);
    }

    /// A session with any features, of which one has to be, and either kind of interrupts.
    fn prepare(&mut self, source: &mut Source<'_>) -> Vec<DriverQueue> {
        self.restore_bars();
        self.driver.by_message = source.byte().is_multiple_of(2);
        self.driver.prepare_all(source.number(5) & !(1 << 32))
    }

    fn step(&mut self, source: &mut Source<'_>, queues: &mut Vec<DriverQueue>) {
        let driver = &self.driver;
        let count = queues.len();
        let queue = &mut queues[usize::from(source.byte()) % count];
        match source.byte() % 16 {
            0..=5 => {
                // Half of the links go on to the next descriptor, as honest ones would.
                let index = u16::from(source.byte()) % 16;
                let next = if source.byte() < 128 { index + 1 } else { source.number(2) as u16 };
                let flags = u16::from(source.byte()) % 8;
                queue.set_descriptor(index, source.address(), source.len(), flags, next);
            }
            6 | 7 => {
                let head = if source.byte() < 240 { u16::from(source.byte()) % 16 } else { source.number(2) as u16 };
                queue.offer(head);
            }
            8 => queue.set_avail_index(source.number(2) as u16),
            9 | 10 => driver.kick(queue),
            11 => {
                // The beginning of a buffer: what the device takes for a header.
                let mut bytes = [0; 48];
                bytes.iter_mut().for_each(|byte| *byte = source.byte());
                driver.put(Driver::BUFFERS + source.number(2) % 64 * 16, &bytes);
            }
            12 => driver.start(),
            13 => {
                let value = source.number(8).to_le_bytes();
                let (offset, width) = (source.number(2) % 0x6800, source.width());
                match offset.checked_sub(0x6000) {
                    None => driver.machine.write(driver.bar + offset, &value[..width]),
                    // Notifications of all kinds, also of queues that there are not.
                    Some(port) => {
                        driver.machine.write_port(driver.notify_port(0) + port as u16 % 64, &value[..width.min(4)])
                    }
                }
            }
            14 => configuration(
                &driver.machine,
                driver.slot,
                &[source.byte(), source.byte(), source.byte(), source.byte()],
            ),
            _ => *queues = self.prepare(source),
        }
    }
}

/// Writes and reads configuration space of one function as `bytes` say, through both ways.
pub fn configuration(machine: &Machine, slot: Slot, bytes: &[u8]) {
    let mut source = Source(bytes);
    while !source.0.is_empty() {
        let register = source.number(1) + if source.byte() < 16 { 0xf00 } else { 0 };
        let width = source.width();
        let value = (source.number(2) << 48 | source.number(2)).to_le_bytes();
        machine.write(Machine::config(slot, register), &value[..width]);
        machine.bus.read(Machine::config(slot, register), &mut [0; 8][..width]);
    }
}

/// Does one thing of use with a device that is up, whichever it is, and checks the answer.
pub fn honest(driver: &Driver, queues: &mut [DriverQueue]) {
    let at = Driver::BUFFERS;
    driver.put(at, &[0; 4096]);
    let device = driver.machine.read_config(driver.slot, 0) >> 16;
    let (queue, chain, len) = match device - 0x1040 {
        // A read of sector 0, an empty frame, 8 bytes of entropy, a page for the balloon,
        // a request for no memory, a flush, a packet of nobody's.
        2 => (0, vec![Piece::Read(at, 16), Piece::Write(at + 0x1000, 513)], 513),
        1 => (1, vec![Piece::Read(at, 60)], 0),
        4 => (0, vec![Piece::Write(at, 8)], 8),
        5 => (0, vec![Piece::Read(at + 0x800, 4)], 0),
        24 => (0, vec![Piece::Read(at, 24), Piece::Write(at + 0x800, 10)], 10),
        27 => (0, vec![Piece::Read(at, 4), Piece::Write(at + 0x800, 4)], 4),
        _ => (1, vec![Piece::Read(at, 44)], 0),
    };
    assert_eq!(driver.run(&mut queues[queue], &chain), len);
}
