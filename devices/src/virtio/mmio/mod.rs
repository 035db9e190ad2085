//! The virtio transport over memory-mapped registers: Virtio 1.2, 4.2, version 2, without the legacy interface.
//!
//! A device that sits on PCI has a window of such registers beside it, for a guest without PCI: `pci=off`, or a kernel that
//! was built so, as nearly all are that were made for Firecracker. It is the same device with the same registers at
//! other places. Once a guest has begun to configure what is on PCI, the window is empty as the specification has it, with
//! a device number of 0, so that no driver takes the device a second time.
//!
//! What it costs beside PCI: one interrupt for all queues, which the guest has to ask for its reason and to
//! acknowledge, two exits; and notifications that are writes to memory.

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK;

use super::pci::VirtioPciDevice;
use super::transport::Transport;
use crate::bus::BusDevice;

/// Bytes of a window.
pub const WINDOW_LEN: u64 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// No number of a vendor is assigned; the one of virtio's PCI devices.
const VENDOR: u32 = 0x1af4;

const DEVICE_ID: u64 = 0x008;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACKNOWLEDGE: u64 = 0x064;
const STATUS: u64 = 0x070;
/// Selection, length and address of shared memory, of which no device has any.
const SHARED_MEMORY: std::ops::Range<u64> = 0x0ac..0x0c0;
/// The device's own configuration space.
const CONFIG: u64 = 0x100;

/// Where a window is, and which pin of the interrupt controllers is its device's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// First address.
    pub address: u64,
    /// GSI; edges.
    pub pin: u32,
}

/// The window of one device.
pub struct Window {
    /// Not an owner: a device that is taken off PCI is gone here, too.
    device: Weak<Mutex<VirtioPciDevice>>,
    place: Place,
    /// The guest takes devices from PCI.
    on_pci: Arc<AtomicBool>,
}

impl Window {
    /// Of `device`, at `place` of a bus. `on_pci` is [`crate::pci::PciRoot::written`] of its root.
    pub fn new(device: &Arc<Mutex<VirtioPciDevice>>, place: Place, on_pci: Arc<AtomicBool>) -> Self {
        Self { device: Arc::downgrade(device), place, on_pci }
    }
}

impl BusDevice for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let device = self.device.upgrade();
        let mut device = device.as_ref().map(|device| device.lock().unwrap_or_else(|e| e.into_inner()));
        let transport = device.as_mut().map(|device| &mut device.transport);
        match (transport, u32::try_from(data.len())) {
            (Some(transport), _) if offset >= CONFIG => transport.device.read_config(offset - CONFIG, data),
            (transport, Ok(4)) if offset.is_multiple_of(4) => {
                let there = transport.filter(|t| t.lines.by_pin() || !self.on_pci.load(Ordering::SeqCst));
                data.copy_from_slice(&read(there.as_deref(), offset).to_le_bytes());
            }
            (Some(transport), _) => transport.guest_fault(),
            (None, _) => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Some(device) = self.device.upgrade() else { return };
        let transport = &mut device.lock().unwrap_or_else(|e| e.into_inner()).transport;
        match *data {
            _ if offset >= CONFIG => transport.device.write_config(offset - CONFIG, data),
            [a, b, c, d] if offset.is_multiple_of(4) => {
                write(transport, offset, u32::from_le_bytes([a, b, c, d]), self.place)
            }
            _ => transport.guest_fault(),
        }
    }
}

/// Value of a register of the device, or of an empty window.
fn read(transport: Option<&Transport>, offset: u64) -> u32 {
    match (offset, transport) {
        (0x000, _) => MAGIC,
        (0x004, _) => VERSION,
        (0x00c, _) => VENDOR,
        (_, None) => 0,
        (DEVICE_ID, Some(transport)) => transport.device.device_type(),
        (0x034, Some(transport)) => transport.registers.queue_max_size().into(),
        (INTERRUPT_STATUS, Some(transport)) => transport.lines.isr().into(),
        (offset, Some(_)) if SHARED_MEMORY.contains(&offset) => u32::MAX,
        (offset, Some(transport)) => {
            let (at, len) = match offset {
                // Features of the device, whether a queue is enabled, status, generation of the configuration.
                0x010 => (4, 4),
                QUEUE_READY => (28, 2),
                STATUS => (20, 1),
                0x0fc => (21, 1),
                // Nothing, or for writing only.
                _ => return 0,
            };
            let mut value = [0; 4];
            transport.registers.read(at, &mut value[..len]);
            u32::from_le_bytes(value)
        }
    }
}

/// The driver writes a register.
fn write(transport: &mut Transport, offset: u64, value: u32, place: Place) {
    let bytes = value.to_le_bytes();
    // What does not fit into a register of PCI's is too much for any device.
    let word = u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes();
    match offset {
        // Which half of the device's features, of the driver's, and the latter.
        0x014 => transport.write(0, &bytes),
        0x024 => transport.write(8, &bytes),
        0x020 => transport.write(12, &bytes),
        QUEUE_SELECT => transport.write(22, &word),
        QUEUE_NUM => transport.write(24, &word),
        QUEUE_READY if value == 0 => {
            if !transport.registers.disable_queue() {
                transport.guest_fault();
            }
        }
        QUEUE_READY => transport.write(28, &word),
        QUEUE_NOTIFY => transport.notify(value.into()),
        INTERRUPT_ACKNOWLEDGE => transport.lines.acknowledge(bytes[0]),
        STATUS => {
            // From here on it may be interrupted.
            let starts = value & VIRTIO_CONFIG_S_DRIVER_OK != 0;
            if !starts || transport.use_register(place.address + QUEUE_NOTIFY, place.pin) {
                transport.write(20, &bytes[..1]);
            }
        }
        // Descriptors, the driver's ring and the device's, in two halves.
        0x080 => transport.write(32, &bytes),
        0x084 => transport.write(36, &bytes),
        0x090 => transport.write(40, &bytes),
        0x094 => transport.write(44, &bytes),
        0x0a0 => transport.write(48, &bytes),
        0x0a4 => transport.write(52, &bytes),
        // The selection of shared memory.
        0x0ac => {}
        _ => transport.guest_fault(),
    }
}
