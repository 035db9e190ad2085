//! The virtio transport over memory-mapped registers: Virtio 1.2, 4.2, version 2, without the legacy interface.
//!
//! A device that sits on PCI has a window of such registers beside it, for a guest without PCI: `pci=off`, as
//! Firecracker tells its guests, or a kernel that was built so. It is the same device with the same registers at other
//! places. Once a guest has begun to configure what is on PCI, the window is empty as the specification has it, with
//! a device number of 0, so that no driver takes the device a second time.
//!
//! What it costs beside PCI: one interrupt for all queues, which the guest has to ask for its reason and to
//! acknowledge, two exits; and notifications that are writes to memory.

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::pci::VirtioPciDevice;
use super::transport::{Effect, Transport, at};
use crate::bus::BusDevice;

/// Bytes of a window.
pub const WINDOW_LEN: u64 = 0x1000;

const MAGIC_VALUE: u32 = u32::from_le_bytes(*b"virt");
const VERSION_2: u32 = 2;
/// No number of a vendor is assigned; the one of virtio's PCI devices.
const VENDOR: u32 = 0x1af4;

// Registers, 4.2.2.
const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACKNOWLEDGE: u64 = 0x064;
const STATUS: u64 = 0x070;
const DESCRIPTORS_LOW: u64 = 0x080;
const DESCRIPTORS_HIGH: u64 = 0x084;
const DRIVER_LOW: u64 = 0x090;
const DRIVER_HIGH: u64 = 0x094;
const DEVICE_LOW: u64 = 0x0a0;
const DEVICE_HIGH: u64 = 0x0a4;
const SHARED_MEMORY_SELECT: u64 = 0x0ac;
/// Length and address of shared memory, of which no device has any.
const SHARED_MEMORY: std::ops::Range<u64> = 0x0b0..0x0c0;
const CONFIG_GENERATION: u64 = 0x0fc;
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

/// The window of one device. Lock order: before the device, which has the registers.
pub struct VirtioMmioWindow {
    /// Not an owner: a device that nobody else knows is gone here, too.
    device: Weak<Mutex<VirtioPciDevice>>,
    place: Place,
    /// The guest takes devices from PCI.
    on_pci: Arc<AtomicBool>,
}

impl VirtioMmioWindow {
    /// Of `device`, at `place` of a bus. `on_pci` is [`crate::pci::PciRoot::configured`] of its root.
    pub fn new(device: &Arc<Mutex<VirtioPciDevice>>, place: Place, on_pci: Arc<AtomicBool>) -> Self {
        Self { device: Arc::downgrade(device), place, on_pci }
    }

    /// Calls `access` with the device, or with nothing where the window is empty.
    fn with<T>(&self, access: impl FnOnce(Option<&mut Transport>) -> T) -> T {
        let Some(device) = self.device.upgrade() else { return access(None) };
        let transport = &mut device.lock().unwrap_or_else(|e| e.into_inner()).transport;
        // Whoever drives it by the window already goes on.
        let is_elsewhere = self.on_pci.load(Ordering::SeqCst) && !transport.lines.by_pin();
        access((!transport.is_retired && !is_elsewhere).then_some(transport))
    }
}

impl BusDevice for VirtioMmioWindow {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.with(|transport| match (transport, data.len()) {
            (Some(transport), _) if offset >= CONFIG => transport.device.read_config(offset - CONFIG, data),
            (transport, 4) if offset.is_multiple_of(4) => {
                data.copy_from_slice(&read(transport.as_deref(), offset).to_le_bytes());
            }
            (Some(transport), _) => transport.guest_fault(),
            (None, _) => {}
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let place = self.place;
        self.with(|transport| match (transport, data) {
            (None, _) => {}
            (Some(transport), _) if offset >= CONFIG => transport.device.write_config(offset - CONFIG, data),
            (Some(transport), &[a, b, c, d]) if offset.is_multiple_of(4) => {
                write(transport, offset, u32::from_le_bytes([a, b, c, d]), place);
            }
            (Some(transport), _) => transport.guest_fault(),
        });
    }
}

/// Value of a register of the device, or of an empty window.
fn read(transport: Option<&Transport>, offset: u64) -> u32 {
    let Some(transport) = transport else {
        return match offset {
            MAGIC => MAGIC_VALUE,
            VERSION => VERSION_2,
            VENDOR_ID => VENDOR,
            _ => 0,
        };
    };
    let (at, len) = match offset {
        DEVICE_ID => return transport.device.device_type(),
        QUEUE_NUM_MAX => return transport.registers.queue_max_size().into(),
        INTERRUPT_STATUS => return transport.lines.isr().into(),
        offset if SHARED_MEMORY.contains(&offset) => return u32::MAX,
        DEVICE_FEATURES => (at::OFFERED, 4),
        QUEUE_READY => (at::QUEUE_ENABLED, 2),
        STATUS => (at::STATUS, 1),
        CONFIG_GENERATION => (at::GENERATION, 1),
        // The same for every device; or nothing, or for writing only.
        _ => return read(None, offset),
    };
    let mut value = [0; 4];
    transport.registers.read(at, &mut value[..len]);
    u32::from_le_bytes(value)
}

/// The driver writes a register.
fn write(transport: &mut Transport, offset: u64, value: u32, place: Place) {
    let bytes = value.to_le_bytes();
    // What does not fit into a register of PCI's is too much for any device.
    let word = u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes();
    match offset {
        DEVICE_FEATURES_SELECT => transport.write(at::OFFERED_SELECT, &bytes),
        DRIVER_FEATURES_SELECT => transport.write(at::ACCEPTED_SELECT, &bytes),
        DRIVER_FEATURES => transport.write(at::ACCEPTED, &bytes),
        QUEUE_SELECT => transport.write(at::QUEUE_SELECT, &word),
        QUEUE_NUM => transport.write(at::QUEUE_SIZE, &word),
        QUEUE_READY if value == 0 => {
            if !transport.registers.disable_queue() {
                transport.guest_fault();
            }
        }
        QUEUE_READY => transport.write(at::QUEUE_ENABLED, &word),
        QUEUE_NOTIFY => transport.notify(value.into()),
        INTERRUPT_ACKNOWLEDGE => transport.lines.acknowledge(bytes[0]),
        STATUS => {
            let effect = transport.registers.write(at::STATUS, &bytes[..1]);
            // As soon as it works it interrupts.
            if effect != Effect::Activate || transport.use_doorbell(place.address + QUEUE_NOTIFY, place.pin) {
                transport.perform(effect);
            }
        }
        DESCRIPTORS_LOW => transport.write(at::DESCRIPTORS, &bytes),
        DESCRIPTORS_HIGH => transport.write(at::DESCRIPTORS + 4, &bytes),
        DRIVER_LOW => transport.write(at::DRIVER, &bytes),
        DRIVER_HIGH => transport.write(at::DRIVER + 4, &bytes),
        DEVICE_LOW => transport.write(at::DEVICE, &bytes),
        DEVICE_HIGH => transport.write(at::DEVICE + 4, &bytes),
        SHARED_MEMORY_SELECT => {}
        _ => transport.guest_fault(),
    }
}
