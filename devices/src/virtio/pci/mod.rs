//! The virtio transport over PCI: Virtio 1.2, 4.1, without the legacy interface.
//!
//! One BAR holds the four register structures, the MSI-X table and its pending bits. A driver's notification is a write
//! which an ioeventfd turns into an event of the device's worker; the ordinary write path does the same, for a host that
//! could not set the ioeventfd up. It goes to a port, in a BAR of its own: of a write to memory AMD's processors do not say
//! how long the instruction is, and KVM has to decode it. A driver without ports finds a second place for notifications in
//! the first BAR, the ordinary way only.
//!
//! How a VMM attaches a device:
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use bedplate_devices::virtio::{block::{Block, BlockConfig, RawFile}, pci::VirtioPciDevice};
//! use bedplate_devices::{Memory, bus::Bus, host::TransportHost, pci::{self, PciRoot}};
//!
//! fn attach(memory: &Memory, host: &Arc<dyn TransportHost>) -> Result<(), Box<dyn std::error::Error>> {
//!     let (mmio, ports) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
//!     // Once: a root that decodes BARs in a window of each space, with its two ways to configuration space.
//!     let root = PciRoot::new((&mmio, vec![0x80_0000_0000..0x90_0000_0000]), (&ports, vec![0xc000..0x1_0000]));
//!     mmio.insert(0xe000_0000, pci::ECAM_LEN, root.ecam())?;
//!     ports.insert(pci::CONFIG_PORT, pci::CONFIG_PORTS, root.config_ports())?;
//!     // For each device: the device over its backend, the transport over the device, a slot for the transport.
//!     let disk = Block::new(RawFile::open("disk.img".as_ref(), false)?, BlockConfig::default())?;
//!     root.add(VirtioPciDevice::new(disk, memory, host)?)?;
//!     // At the end: all workers are joined.
//!     root.shutdown();
//!     Ok(())
//! }
//! ```

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_FS, VIRTIO_ID_NET};

use super::transport::{COMMON_LEN, Transport};
use super::{QueuePosition, VirtioDevice};
use crate::Memory;
use crate::host::{Doorbell, TransportHost};
use crate::pci::{ConfigSpace, Identity, Msix, PciFunction, Slot};

/// The BAR that everything but one is in. Each structure has a page, so that a guest may map them one by one.
const BAR: usize = 0;
const BAR_LEN: u64 = 0x8000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const PAGE: u64 = 0x1000;
/// Bytes, or ports, between the notification addresses of two queues.
const NOTIFY_STRIDE: u64 = 4;
/// The BAR of ports for notifications.
const NOTIFY_BAR: usize = 2;

const VENDOR_CAPABILITY: u8 = 0x09;
const MSIX_CAPABILITY: u8 = 0x11;
/// `cfg_type` of the capabilities, 4.1.4.
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI: u8 = 5;

/// The host could not provide for a device.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// No event descriptor for a queue.
    #[error("cannot make an event descriptor for a virtqueue: {0}; raise the limit of open files")]
    Event(#[source] io::Error),
    /// No interrupt vector.
    #[error("cannot allocate an interrupt vector for a virtio device: {0}")]
    Vector(#[source] io::Error),
}

/// A virtio device as a PCI function.
pub struct VirtioPciDevice {
    pub(super) transport: Transport,
    /// Where the capabilities are that need a look after a write.
    msix_at: usize,
    window_at: usize,

    config: ConfigSpace,
    msix: Msix,
    /// The first port of the ioeventfds.
    ports: Option<u16>,
}

impl VirtioPciDevice {
    /// `device` behind this transport. Takes one interrupt vector for each queue and one for the device from `host`.
    ///
    /// # Errors
    /// The host has no vectors or descriptors left.
    pub fn new(
        device: impl VirtioDevice + 'static,
        memory: &Memory,
        host: &Arc<dyn TransportHost>,
    ) -> Result<Self, VirtioPciError> {
        let queues = device.queue_sizes().len();
        let vectors = (0..=queues).map(|_| host.msi_vector()).collect::<Result<Vec<_>, _>>();
        let msix = Msix::new(vectors.map_err(VirtioPciError::Vector)?);
        let mut config = ConfigSpace::new(&identity(device.device_type()));
        config.add_memory_bar(BAR, BAR_LEN);
        config.add_port_bar(NOTIFY_BAR, (queues as u16 * NOTIFY_STRIDE as u16).next_power_of_two());
        let window_at = usize::from(add_capabilities(&mut config, queues as u64, device.may_be_notified_here()));
        let (body, writable) = msix.capability(BAR as u32, TABLE as u32, PENDING as u32);
        let msix_at = usize::from(config.add_capability(MSIX_CAPABILITY, &body, &writable));
        let transport =
            Transport::new(Box::new(device), memory, host, msix.vectors()).map_err(VirtioPciError::Event)?;
        Ok(Self { transport, msix_at, window_at, config, msix, ports: None })
    }

    /// The device behind the transport.
    pub fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut *self.transport.device
    }

    /// How far the queues are that the driver has enabled.
    pub fn queue_positions(&self) -> Vec<QueuePosition> {
        self.transport.queue_positions()
    }

    /// Where the window of the PCI configuration access capability looks, 4.1.4.9.
    fn window(&self) -> Option<(usize, u64, usize)> {
        let bar = usize::from(self.config.word(self.window_at + 4) & 0xff);
        let offset = u64::from(self.config.dword(self.window_at + 8));
        let len = self.config.dword(self.window_at + 12);
        let size = self.config.bar(bar).map_or(0, |bar| bar.size);
        let valid = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(u64::from(len)) && offset < size;
        valid.then_some((bar, offset, len as usize))
    }

    /// Whether an access touches the data of that window.
    fn touches_window(&self, offset: u16, len: usize) -> bool {
        let data = self.window_at + 16;
        usize::from(offset) < data + 4 && usize::from(offset) + len > data
    }
}

/// Identity of a device of this type, 4.1.2.
fn identity(device_type: u32) -> Identity {
    Identity {
        vendor: 0x1af4,
        device: 0x1040 + device_type as u16,
        revision: 1,
        class: match device_type {
            VIRTIO_ID_NET => 0x02_0000,
            VIRTIO_ID_BLOCK | VIRTIO_ID_FS => 0x01_8000,
            _ => 0x07_8000,
        },
        subsystem_vendor: 0x1af4,
        subsystem: 0x40 + device_type as u16,
    }
}

/// Appends what a driver finds the structures by; returns where the configuration access window is.
fn add_capabilities(config: &mut ConfigSpace, queues: u64, by_memory: bool) -> u16 {
    let body = |cfg_type: u8, bar: usize, offset: u64, len: u64, extra: usize| {
        let mut body = vec![0; 14 + extra];
        body[0] = (16 + extra) as u8;
        body[1] = cfg_type;
        body[2] = bar as u8;
        body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
        body[10..14].copy_from_slice(&(len as u32).to_le_bytes());
        body
    };
    for (cfg_type, offset, len) in
        [(TYPE_COMMON, COMMON, COMMON_LEN as u64), (TYPE_ISR, ISR, 1), (TYPE_DEVICE, DEVICE, PAGE)]
    {
        config.add_capability(VENDOR_CAPABILITY, &body(cfg_type, BAR, offset, len, 0), &[]);
    }
    // Drivers take the first of a kind that they can use.
    for (bar, offset) in [(NOTIFY_BAR, 0), (BAR, NOTIFY)].into_iter().take(1 + usize::from(by_memory)) {
        let mut notify = body(TYPE_NOTIFY, bar, offset, queues * NOTIFY_STRIDE, 4);
        notify[14..].copy_from_slice(&(NOTIFY_STRIDE as u32).to_le_bytes());
        config.add_capability(VENDOR_CAPABILITY, &notify, &[]);
    }
    // BAR, offset, length and data of the window are the driver's.
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    config.add_capability(VENDOR_CAPABILITY, &body(TYPE_PCI, BAR, 0, 0, 4), &writable)
}

impl PciFunction for VirtioPciDevice {
    fn placed(&mut self, slot: Slot) {
        self.config.set_interrupt_pin(self.transport.connect(slot));
    }

    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        if self.touches_window(offset, data.len())
            && let Some((bar, at, len)) = self.window()
        {
            let mut value = [0; 4];
            self.read_bar(bar, at, &mut value[..len]);
            self.config.put(self.window_at + 16, &value);
        }
        self.config.set_interrupt_status(self.transport.lines.asks_by_intx());
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if self.touches_window(offset, data.len())
            && let Some((bar, at, len)) = self.window()
        {
            let value = self.config.dword(self.window_at + 16).to_le_bytes();
            self.write_bar(bar, at, &value[..len]);
        }
        let control = self.config.word(self.msix_at + 2);
        let result = self.msix.set_control(control);
        self.transport.host_fault("route an interrupt", result);
        self.transport.set_way(self.msix.is_enabled(), self.config.may_assert());
    }

    fn read_bar(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        if bar == NOTIFY_BAR {
            // Notification addresses are write-only.
            return data.fill(0);
        }
        let at = offset % PAGE;
        match offset - at {
            COMMON => self.transport.registers.read(at, data),
            ISR => {
                data.fill(0);
                if let (0, Some(first)) = (at, data.first_mut()) {
                    *first = self.transport.lines.take_isr();
                }
            }
            DEVICE => self.transport.device.read_config(at, data),
            TABLE => self.msix.read_table(at, data),
            PENDING => self.msix.read_pending(at, data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&mut self, bar: usize, offset: u64, data: &[u8]) {
        if bar == NOTIFY_BAR {
            return self.transport.notify(offset / NOTIFY_STRIDE);
        }
        let at = offset % PAGE;
        match offset - at {
            COMMON => self.transport.write(at, data),
            DEVICE => self.transport.device.write_config(at, data),
            NOTIFY => self.transport.notify(at / NOTIFY_STRIDE),
            TABLE => {
                let result = self.msix.write_table(at, data);
                self.transport.host_fault("route an interrupt", result);
            }
            _ => self.transport.guest_fault(),
        }
    }

    fn bar_moved(&mut self, bar: usize, address: Option<u64>) {
        if bar != NOTIFY_BAR {
            return;
        }
        // Ports have 16 bits: the root decodes nothing outside of its windows.
        let bells = |first: u16| move |queue: u16| Doorbell::Port(first + queue * NOTIFY_STRIDE as u16);
        let new = address.map(|address| address as u16);
        if let Some(old) = std::mem::replace(&mut self.ports, new) {
            self.transport.remove_doorbells(bells(old));
        }
        if let Some(new) = new {
            self.transport.add_doorbells(bells(new));
        }
    }

    fn shutdown(&mut self) {
        self.transport.is_retired = true;
        self.transport.reset();
        self.bar_moved(NOTIFY_BAR, None);
        let result = self.msix.shutdown();
        self.transport.host_fault("release an interrupt", result);
    }
}

impl Drop for VirtioPciDevice {
    fn drop(&mut self) {
        self.shutdown();
    }
}
