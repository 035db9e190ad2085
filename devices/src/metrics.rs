//! Counters that a device keeps and anybody may read.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts upwards from zero; never read back by the device, so that its order to other memory does not matter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// The value now.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What every virtio device counts.
#[derive(Debug, Default)]
pub struct DeviceMetrics {
    /// Times that the worker was woken by the driver.
    pub notifications: Counter,
    /// Descriptor chains that were returned to the driver.
    pub chains: Counter,
    /// Interrupts that were sent for used buffers.
    pub interrupts: Counter,
    /// Times that the driver broke a rule: bad registers, rings, chains or requests.
    pub guest_faults: Counter,
    /// Times that the host let the device down: I/O errors, no descriptors left.
    pub host_faults: Counter,
    /// What the first host fault was, in words for people.
    first_host_fault: OnceLock<String>,
}

impl DeviceMetrics {
    /// Counts a host fault and keeps the description of the first one.
    pub fn host_fault(&self, what: impl FnOnce() -> String) {
        self.host_faults.increment();
        self.first_host_fault.get_or_init(what);
    }

    /// The description of the first host fault, if there was one.
    pub fn first_host_fault(&self) -> Option<&str> {
        self.first_host_fault.get().map(String::as_str)
    }
}
