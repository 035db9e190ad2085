//! Address → device, for port I/O and for memory-mapped I/O.

use std::sync::{Arc, Mutex, RwLock};

/// Registers that a guest reaches through an address range. Called on vCPU threads, one access at a time per device.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes (1, 2, 4 or 8) at `offset` from the start of the range. All of `data` must be
    /// written; what the device does not implement reads as the spec says, or as all ones.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset` from the start of the range. Never fails: a guest fault gets the answer that
    /// the device's spec gives.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A range that is asked for overlaps one that is taken.
#[derive(Debug, thiserror::Error)]
#[error("bus range {start:#x}..{end:#x} overlaps one that is in use")]
pub struct OverlapError {
    start: u64,
    end: u64,
}

struct Entry {
    start: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// One address space of devices. Looked up on every exit, changed when a device comes, goes or moves.
#[derive(Default)]
pub struct Bus {
    /// In order of their first addresses: some twenty, found in half the instructions that a tree takes. Held for the
    /// look-up only, never while a device handles an access, so that a device may change the bus it sits on (a BAR that the
    /// guest moves).
    entries: RwLock<Vec<Entry>>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `start..start + len`.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps another; the bus is unchanged.
    pub fn insert(&self, start: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), OverlapError> {
        let error = OverlapError { start, end: start.saturating_add(len) };
        let Some(last) = len.checked_sub(1).and_then(|l| start.checked_add(l)) else { return Err(error) };
        let mut entries = self.entries.write().unwrap_or_else(|e| e.into_inner());
        let place = entries.partition_point(|entry| entry.start <= last);
        if let Some(entry) = place.checked_sub(1).and_then(|before| entries.get(before))
            && entry.start + (entry.len - 1) >= start
        {
            return Err(error);
        }
        entries.insert(place, Entry { start, len, device });
        Ok(())
    }

    /// Takes away what starts at `start`, if anything does.
    pub fn remove(&self, start: u64) {
        self.entries.write().unwrap_or_else(|e| e.into_inner()).retain(|entry| entry.start != start);
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<Mutex<dyn BusDevice>>)> {
        let entries = self.entries.read().unwrap_or_else(|e| e.into_inner());
        let after = entries.partition_point(|entry| entry.start <= address);
        let entry = entries.get(after.checked_sub(1)?)?;
        let offset = address - entry.start;
        (offset < entry.len && len as u64 <= entry.len - offset).then(|| (offset, Arc::clone(&entry.device)))
    }

    /// A guest read. Returns false, with `data` all ones, where nobody answers.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else {
            data.fill(0xff);
            return false;
        };
        device.lock().unwrap_or_else(|e| e.into_inner()).read(offset, data);
        true
    }

    /// A guest write. Returns false where nobody answers.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else { return false };
        device.lock().unwrap_or_else(|e| e.into_inner()).write(offset, data);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u64);
    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill((self.0 + offset) as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0 = offset + u64::from(data[0]);
        }
    }

    fn echo() -> Arc<Mutex<Echo>> {
        Arc::new(Mutex::new(Echo(0)))
    }

    #[test]
    fn ranges_do_not_overlap_and_accesses_do_not_cross_an_edge() {
        let bus = Bus::new();
        bus.insert(0x10, 4, echo()).unwrap();
        for (start, len) in [(0x0f, 2), (0x10, 4), (0x13, 1), (0, 0x100), (0x11, 1), (0x20, 0), (u64::MAX, 2)] {
            assert!(bus.insert(start, len, echo()).is_err(), "{start:#x} {len}");
        }
        bus.insert(0x14, 1, echo()).unwrap();
        bus.insert(u64::MAX, 1, echo()).unwrap();

        let mut data = [0; 2];
        assert!(bus.read(0x12, &mut data));
        assert_eq!(data, [2, 2]);
        assert!(!bus.read(0x13, &mut data), "crosses from one device into the next");
        assert_eq!(data, [0xff, 0xff]);
        assert!(!bus.write(0x0f, &[1]));
        bus.remove(0x10);
        assert!(!bus.write(0x10, &[1]));
    }
}
