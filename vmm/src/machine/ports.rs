//! Where the platform devices sit: as on every PC. And where virtio devices are for a guest without PCI.

use bedplate_devices::virtio::mmio::{Place, WINDOW_LEN};

use crate::memory::layout;

/// First serial port.
pub const SERIAL: u16 = 0x3f8;
/// Its interrupt.
pub const SERIAL_IRQ: u32 = 4;
/// Battery-backed clock.
pub const RTC: u16 = 0x70;
/// Where BARs of ports are: where SeaBIOS puts them, too.
pub const PCI: std::ops::Range<u64> = 0xc000..0x1_0000;
/// Where a guest may put them that does not believe what it is told of the former.
pub const PCI_ELSEWHERE: std::ops::Range<u64> = 0x1000..PCI.start;
/// The interval timer's interrupt.
pub const PIT_IRQ: u32 = 0;

/// Pins that nothing else has, in the order in which devices get them: those first that a guest without I/O APIC reaches
/// (`noapic`), which are on both. Not those of PCI: they are edges, a guest gets to know them with PCI too, and it takes no
/// pin for both kinds.
const VIRTIO_PINS: [u32; 15] = [5, 6, 7, 12, 14, 15, 3, 16, 17, 18, 19, 20, 21, 22, 23];

/// Places of virtio devices in the order in which they are attached, as many as there are.
pub fn virtio_places() -> impl Iterator<Item = Place> {
    (layout::VIRTIO..).step_by(WINDOW_LEN as usize).zip(VIRTIO_PINS).map(|(address, pin)| Place { address, pin })
}
