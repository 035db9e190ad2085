//! A register to which the guest says that it is up: Firecracker's boot timer, by which its users measure.
//!
//! | a hostile guest may | what happens |
//! | --- | --- |
//! | write anything, at any width and offset | only a byte of 123 at the start counts, and only the first one |

use crate::bus::BusDevice;

/// Bytes of the range.
pub const BOOT_TIMER_LEN: u64 = 0x1000;
/// What the guest writes when it is up.
const UP: u8 = 123;

/// Told that the guest is up, at most once, on a vCPU's thread.
pub type Booted = Box<dyn FnOnce() + Send>;

/// The register.
pub struct BootTimer {
    booted: Option<Booted>,
}

impl BootTimer {
    /// `booted` knows when the VM was started.
    pub fn new(booted: Booted) -> Self {
        Self { booted: Some(booted) }
    }
}

impl BusDevice for BootTimer {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if (offset, data) == (0, &[UP])
            && let Some(booted) = self.booted.take()
        {
            booted();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn the_first_true_sign_counts() {
        let count = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&count);
        let mut timer = BootTimer::new(Box::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        for (offset, data) in [(0, &[122][..]), (1, &[UP]), (0, &[UP, 0]), (0, &[])] {
            timer.write(offset, data);
        }
        assert_eq!(count.load(Ordering::SeqCst), 0);
        timer.write(0, &[UP]);
        timer.write(0, &[UP]);
        assert_eq!(count.load(Ordering::SeqCst), 1);
        let mut data = [7; 4];
        timer.read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
