//! The two ways in which a guest reaches configuration space.

use std::sync::{Arc, Mutex, MutexGuard};

use super::root::Functions;
use super::{CONFIG_LEN, Slot};
use crate::bus::BusDevice;
use crate::platform::{PowerRequest, PowerSink};

fn lock(functions: &Mutex<Functions>) -> MutexGuard<'_, Functions> {
    functions.lock().unwrap_or_else(|e| e.into_inner())
}

/// Memory-mapped configuration space, PCI Express Base 7.2.2: 4 KiB for each function of the bus.
pub struct Ecam {
    pub(super) functions: Arc<Mutex<Functions>>,
}

impl Ecam {
    /// Device, function and register of an offset into the window.
    fn decode(offset: u64, len: usize) -> Option<(Slot, u16)> {
        let register = (offset % CONFIG_LEN as u64) as u16;
        let function = offset >> 12 & 7;
        let bus = offset >> 20;
        // An access that runs into the next function has no meaning.
        let inside = usize::from(register) + len <= CONFIG_LEN;
        let slot = Slot::new((offset >> 15 & 0x1f) as u8)?;
        (bus == 0 && function == 0 && inside).then_some((slot, register))
    }
}

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match Self::decode(offset, data.len()) {
            Some((slot, register)) => lock(&self.functions).read_config(slot, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = Self::decode(offset, data.len()) {
            lock(&self.functions).write_config(slot, register, data);
        }
    }
}

/// Configuration mechanism #1, PCI Local Bus 3.0, 3.2.2.3.2: an address port at 0xCF8 and a data port at 0xCFC. Chipsets
/// have their reset control register among these ports, at 0xCF9, and so has this one when it is asked to.
pub struct ConfigPorts {
    pub(super) functions: Arc<Mutex<Functions>>,
    pub(super) address: u32,
    pub(super) reset: Option<PowerSink>,
}

impl ConfigPorts {
    /// Offset of the reset control register, one byte.
    const RESET: u64 = 1;
    /// The bit of it that resets the processors.
    const RESET_NOW: u8 = 1 << 2;
    /// Offset of the data port from the address port.
    const DATA: u64 = 4;
    const ENABLE: u32 = 1 << 31;
    /// Enable, bus, device, function, register; bits 30..24 and 1..0 read as zero.
    const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;

    /// From now on there is a reset control register, which reports to `sink`.
    pub fn set_reset(&mut self, sink: PowerSink) {
        self.reset = Some(sink);
    }

    fn decode(&self, offset: u64, len: usize) -> Option<(Slot, u16)> {
        let byte = offset.checked_sub(Self::DATA)?;
        let bus_and_function = self.address & 0x00ff_0700;
        let target = self.address & Self::ENABLE != 0 && bus_and_function == 0 && byte + len as u64 <= 4;
        let slot = Slot::new((self.address >> 11 & 0x1f) as u8)?;
        target.then(|| (slot, (self.address & 0xfc) as u16 + byte as u16))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match self.decode(offset, data.len()) {
            Some((slot, register)) => lock(&self.functions).read_config(slot, register, data),
            None if offset == 0 && data.len() == 4 => data.copy_from_slice(&self.address.to_le_bytes()),
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // Only a whole double word reaches the address register; narrower writes there are I/O to nobody.
        if let (0, &[a, b, c, d]) = (offset, data) {
            self.address = u32::from_le_bytes([a, b, c, d]) & Self::ADDRESS_WRITABLE;
        } else if let (Self::RESET, &[byte]) = (offset, data) {
            if let (Some(sink), true) = (&self.reset, byte & Self::RESET_NOW != 0) {
                sink(PowerRequest::Reset);
            }
        } else if let Some((slot, register)) = self.decode(offset, data.len()) {
            lock(&self.functions).write_config(slot, register, data);
        }
    }
}
