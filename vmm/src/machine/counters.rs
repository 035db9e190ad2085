//! Exits by reason, counted per vCPU without any contention.

use std::sync::atomic::{AtomicU64, Ordering};

use bedplate_api::vmm::ExitCounts;

/// A number that one thread counts up and others read.
#[derive(Debug, Default)]
pub struct Tally(AtomicU64);

impl Tally {
    /// Adds one. For the one thread that owns it: there is no read-modify-write instruction.
    #[inline]
    pub fn count(&self) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The exits of one vCPU; the fields are those of [`ExitCounts`]. Aligned, so that two vCPUs share no cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
#[allow(missing_docs)]
pub struct ExitCounters {
    pub port_read: Tally,
    pub port_write: Tally,
    pub mmio_read: Tally,
    pub mmio_write: Tally,
    pub interrupted: Tally,
    pub other: Tally,
    pub unknown_port: Tally,
    pub unknown_mmio: Tally,
}

impl ExitCounters {
    /// Adds these to `sum`.
    pub fn add_to(&self, sum: &mut ExitCounts) {
        sum.port_read += self.port_read.value();
        sum.port_write += self.port_write.value();
        sum.mmio_read += self.mmio_read.value();
        sum.mmio_write += self.mmio_write.value();
        sum.interrupted += self.interrupted.value();
        sum.other += self.other.value();
        sum.unknown_port += self.unknown_port.value();
        sum.unknown_mmio += self.unknown_mmio.value();
    }
}
