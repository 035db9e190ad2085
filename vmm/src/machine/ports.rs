//! Where the platform devices sit: as on every PC.

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
/// Keyboard controller.
pub const I8042: u16 = 0x60;
