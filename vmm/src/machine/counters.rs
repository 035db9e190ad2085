//! Exits of a vCPU: counted by reason, and the last of them kept, without any contention.

use std::array;
use std::sync::atomic::{AtomicU64, Ordering};

use bedplate_api::vmm::{ExitCounts, ExitKind, ExitRecord};

/// Exits that are kept. A power of two.
const KEPT: usize = 32;

/// A number that one thread counts up and others read.
#[derive(Debug, Default)]
pub struct Tally(AtomicU64);

impl Tally {
    /// Adds one; says how many there were. For the one thread that owns it: there is no read-modify-write instruction.
    #[inline]
    pub fn count(&self) -> u64 {
        let before = self.0.load(Ordering::Relaxed);
        self.0.store(before.wrapping_add(1), Ordering::Relaxed);
        before
    }

    fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The exits of one vCPU; the tallies are the fields of [`ExitCounts`]. Aligned, so that two vCPUs share no cache line.
#[derive(Debug)]
#[repr(align(128))]
pub struct ExitCounters {
    port_read: Tally,
    port_write: Tally,
    mmio_read: Tally,
    mmio_write: Tally,
    msr_read: Tally,
    msr_write: Tally,
    interrupted: Tally,
    other: Tally,
    /// Accesses to ports that nothing answers at; the vCPU loop counts them beside the exit.
    pub unknown_port: Tally,
    /// Likewise, to memory.
    pub unknown_mmio: Tally,
    unknown_msr: Tally,
    /// All exits; the next one is kept at this, modulo [`KEPT`].
    all: Tally,
    kept: [AtomicU64; KEPT],
}

impl Default for ExitCounters {
    fn default() -> Self {
        Self {
            port_read: Tally::default(),
            port_write: Tally::default(),
            mmio_read: Tally::default(),
            mmio_write: Tally::default(),
            msr_read: Tally::default(),
            msr_write: Tally::default(),
            interrupted: Tally::default(),
            other: Tally::default(),
            unknown_port: Tally::default(),
            unknown_mmio: Tally::default(),
            unknown_msr: Tally::default(),
            all: Tally::default(),
            kept: array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl ExitCounters {
    /// A read of `len` bytes at a port.
    #[inline]
    pub fn port_read(&self, port: u16, len: usize) {
        self.port_read.count();
        self.keep(1, port.into(), len);
    }

    /// A write of `len` bytes to a port.
    #[inline]
    pub fn port_write(&self, port: u16, len: usize) {
        self.port_write.count();
        self.keep(2, port.into(), len);
    }

    /// A read of `len` bytes of memory that is not RAM.
    #[inline]
    pub fn mmio_read(&self, address: u64, len: usize) {
        self.mmio_read.count();
        self.keep(3, address, len);
    }

    /// A write of `len` bytes to memory that is not RAM.
    #[inline]
    pub fn mmio_write(&self, address: u64, len: usize) {
        self.mmio_write.count();
        self.keep(4, address, len);
    }

    /// A read or write of a model-specific register that KVM does not have.
    pub fn msr(&self, register: u32, write: bool, faults: bool) {
        let (tally, kind) = if write { (&self.msr_write, 8) } else { (&self.msr_read, 7) };
        tally.count();
        if faults {
            self.unknown_msr.count();
        }
        self.keep(kind, register.into(), 8);
    }

    /// A kick, or a signal.
    pub fn interrupted(&self) {
        self.interrupted.count();
        self.keep(5, 0, 0);
    }

    /// Any other one.
    pub fn other(&self) {
        self.other.count();
        self.keep(6, 0, 0);
    }

    /// One word for an exit, so that a reader sees it whole: kind in the top byte, below it the length, then the address.
    #[inline]
    fn keep(&self, kind: u8, address: u64, len: usize) {
        let len = len.min(usize::from(u8::MAX)) as u64;
        let word = u64::from(kind) << 56 | len << 48 | address & ADDRESS;
        self.kept[self.all.count() as usize % KEPT].store(word, Ordering::Relaxed);
    }

    /// How many exits there were.
    pub fn all(&self) -> u64 {
        self.all.value()
    }

    /// The last exits, the newest first. One that happens meanwhile may stand for one that was overwritten.
    pub fn last(&self) -> Vec<ExitRecord> {
        let next = self.all.value() as usize;
        (1..=KEPT).map_while(|back| record(self.kept[next.wrapping_sub(back) % KEPT].load(Ordering::Relaxed))).collect()
    }

    /// The counts of this vCPU.
    pub fn counts(&self) -> ExitCounts {
        let mut counts = ExitCounts::default();
        self.add_to(&mut counts);
        counts
    }

    /// Adds these to `sum`.
    pub fn add_to(&self, sum: &mut ExitCounts) {
        sum.port_read += self.port_read.value();
        sum.port_write += self.port_write.value();
        sum.mmio_read += self.mmio_read.value();
        sum.mmio_write += self.mmio_write.value();
        sum.msr_read += self.msr_read.value();
        sum.msr_write += self.msr_write.value();
        sum.interrupted += self.interrupted.value();
        sum.other += self.other.value();
        sum.unknown_port += self.unknown_port.value();
        sum.unknown_mmio += self.unknown_mmio.value();
        sum.unknown_msr += self.unknown_msr.value();
    }
}

const ADDRESS: u64 = (1 << 48) - 1;

/// What [`ExitCounters::keep`] has put together; none of a place that was never used.
fn record(word: u64) -> Option<ExitRecord> {
    let kind = match word >> 56 {
        1 => ExitKind::PortRead,
        2 => ExitKind::PortWrite,
        3 => ExitKind::MmioRead,
        4 => ExitKind::MmioWrite,
        5 => ExitKind::Interrupted,
        6 => ExitKind::Other,
        7 => ExitKind::MsrRead,
        8 => ExitKind::MsrWrite,
        _ => return None,
    };
    let access = !matches!(kind, ExitKind::Interrupted | ExitKind::Other);
    Some(ExitRecord { kind, address: access.then_some(word & ADDRESS), len: access.then_some((word >> 48) as u8) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_exits_are_kept_and_all_are_counted() {
        let counters = ExitCounters::default();
        assert!(counters.last().is_empty());
        counters.mmio_write(0xffff_8000_0000_1234, 300);
        counters.interrupted();
        counters.port_read(0x3fd, 1);
        let last = counters.last();
        let shape = |kind, address, len| ExitRecord { kind, address, len };
        assert_eq!(
            last,
            [
                shape(ExitKind::PortRead, Some(0x3fd), Some(1)),
                shape(ExitKind::Interrupted, None, None),
                shape(ExitKind::MmioWrite, Some(0x8000_0000_1234), Some(255)),
            ]
        );
        for port in 0..1000 {
            counters.port_write(port, 4);
        }
        let ports: Vec<_> = counters.last().iter().filter_map(|exit| exit.address).collect();
        assert_eq!(ports, (1000 - KEPT as u64..1000).rev().collect::<Vec<_>>());
        let counts = counters.counts();
        assert_eq!((counts.port_write, counts.port_read, counts.mmio_write, counts.interrupted), (1000, 1, 1, 1));
    }
}
