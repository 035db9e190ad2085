//! The configuration space of one function: 4 KiB of bytes, each bit of which the guest may write or not.
//!
//! PCI Local Bus 3.0, chapter 6, and PCI Express Base, 7.5. Nothing here has a side effect: whoever owns the space looks
//! at the registers after a write and acts.

/// Bytes in the configuration space of a PCI Express function.
pub const CONFIG_LEN: usize = 4096;
/// Base address registers in a type 0 header.
pub const BAR_COUNT: usize = 6;

const VENDOR: usize = 0x00;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CACHE_LINE: usize = 0x0c;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// First byte after the type 0 header.
const FIRST_CAPABILITY: usize = 0x40;
/// Capabilities of the conventional kind live below the extended space.
const CONVENTIONAL_LEN: usize = 0x100;

/// Value of the interrupt pin register, which follows the line's.
const INTA: u8 = 1;

const COMMAND_PORTS: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Memory decode, bus master, parity, SERR# and INTx disable; no special cycles.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 6 | 1 << 8 | COMMAND_INTX_DISABLE;
const STATUS_INTERRUPT: u16 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Memory space, 64 bits wide, prefetchable.
const MEMORY_BAR_FLAGS: u64 = 0b1100;
/// I/O space.
const PORT_BAR_FLAGS: u32 = 0b01;

/// What a base address register is an address in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Memory, 64 bits wide.
    Memory,
    /// I/O ports.
    Ports,
}

/// A base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Where it is decoded.
    pub space: Space,
    /// Bytes, or ports.
    pub size: u64,
}

/// Who a function says it is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision of the device.
    pub revision: u8,
    /// Class, subclass and programming interface, most significant byte first: `0x020000` is an Ethernet controller.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// The registers of one function.
pub struct ConfigSpace {
    registers: Box<[u8; CONFIG_LEN]>,
    /// A set bit may be changed by the guest.
    writable: Box<[u8; CONFIG_LEN]>,
    bars: [Option<Bar>; BAR_COUNT],
    /// Where the pointer to the next capability goes.
    link: usize,
    free: usize,
}

impl ConfigSpace {
    /// A type 0 header without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            registers: Box::new([0; CONFIG_LEN]),
            writable: Box::new([0; CONFIG_LEN]),
            bars: [None; BAR_COUNT],
            link: CAPABILITIES,
            free: FIRST_CAPABILITY,
        };
        space.put(VENDOR, &identity.vendor.to_le_bytes());
        space.put(VENDOR + 2, &identity.device.to_le_bytes());
        space.put(REVISION, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.put(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        // Both are scratch registers for software here.
        space.writable[CACHE_LINE] = 0xff;
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    /// Declares a 64-bit memory BAR in the register pair `index`, `index + 1`.
    ///
    /// # Panics
    /// If the size is not a power of two of at least 16 bytes, or the registers are taken: a fault of the device's code.
    pub fn add_memory_bar(&mut self, index: usize, size: u64) {
        assert!(size.is_power_of_two() && size >= 16, "BAR {index} of {size:#x} bytes cannot be decoded");
        assert!(self.bars[index].is_none() && self.bars[index + 1].is_none(), "BAR {index} is taken");
        self.bars[index] = Some(Bar { space: Space::Memory, size });
        let at = BAR0 + index * 4;
        self.put(at, &MEMORY_BAR_FLAGS.to_le_bytes());
        // Sizing falls out of this: the bits below the size stay zero whatever is written.
        self.writable[at..at + 8].copy_from_slice(&(!(size - 1)).to_le_bytes());
    }

    /// Declares a BAR of `size` I/O ports in register `index`, and that the function has any.
    ///
    /// # Panics
    /// If the size is not a power of two from 4 to 256, or the register is taken: a fault of the device's code.
    pub fn add_port_bar(&mut self, index: usize, size: u16) {
        assert!(size.is_power_of_two() && (4..=256).contains(&size), "BAR {index} of {size} ports cannot be decoded");
        assert!(self.bars[index].is_none(), "BAR {index} is taken");
        self.bars[index] = Some(Bar { space: Space::Ports, size: size.into() });
        let at = BAR0 + index * 4;
        self.put(at, &PORT_BAR_FLAGS.to_le_bytes());
        self.writable[at..at + 4].copy_from_slice(&(!(u32::from(size) - 1)).to_le_bytes());
        self.writable[COMMAND] |= COMMAND_PORTS as u8;
    }

    /// Appends a capability whose bytes after id and next pointer are `body`; a set bit in `writable` may be changed by
    /// the guest. Returns its offset.
    ///
    /// # Panics
    /// If the space below 0x100 is used up: a fault of the device's code.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.free;
        let end = at + 2 + body.len();
        assert!(end <= CONVENTIONAL_LEN && writable.len() <= body.len(), "capability {id:#x} does not fit");
        self.registers[self.link] = at as u8;
        self.registers[at] = id;
        self.put(at + 2, body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.put(STATUS, &(self.word(STATUS) | STATUS_CAPABILITIES).to_le_bytes());
        self.link = at + 1;
        self.free = end.next_multiple_of(4);
        at as u16
    }

    /// Says that the function interrupts by INTA#, and where firmware would have found that this leads: pin `line`.
    pub fn set_interrupt_pin(&mut self, line: u8) {
        self.put(INTERRUPT_LINE, &[line, INTA]);
    }

    /// Whether the guest lets the function assert INTA#.
    pub fn may_assert(&self) -> bool {
        self.word(COMMAND) & COMMAND_INTX_DISABLE == 0
    }

    /// Says whether the function has a reason to assert INTA#, be it allowed or not.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let status = self.word(STATUS) & !STATUS_INTERRUPT | if pending { STATUS_INTERRUPT } else { 0 };
        self.put(STATUS, &status.to_le_bytes());
    }

    /// The guest reads. What lies past the end reads as ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        match self.registers.get(usize::from(offset)..usize::from(offset) + data.len()) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    /// The guest writes: bits that are read-only keep their value, what crosses the end is dropped.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let range = usize::from(offset)..usize::from(offset) + data.len();
        let (Some(registers), Some(masks)) = (self.registers.get_mut(range.clone()), self.writable.get(range)) else {
            return;
        };
        for ((register, mask), value) in registers.iter_mut().zip(masks).zip(data) {
            *register = *register & !mask | value & mask;
        }
    }

    /// Whether the guest lets the function answer accesses in `space`.
    pub fn decodes(&self, space: Space) -> bool {
        let bit = match space {
            Space::Memory => COMMAND_MEMORY,
            Space::Ports => COMMAND_PORTS,
        };
        self.word(COMMAND) & bit != 0
    }

    /// The BAR that begins at register `index`.
    pub fn bar(&self, index: usize) -> Option<Bar> {
        self.bars.get(index).copied().flatten()
    }

    /// Where the guest has put the BAR at `index`.
    pub fn bar_address(&self, index: usize) -> u64 {
        let at = BAR0 + index * 4;
        let low = self.dword(at);
        match self.bars[index].map(|bar| bar.space) {
            Some(Space::Ports) => u64::from(low & !0b11),
            _ => u64::from(low & !0xf) | u64::from(self.dword(at + 4)) << 32,
        }
    }

    /// Puts the BAR at `index` to `address`, as firmware would.
    pub fn set_bar_address(&mut self, index: usize, address: u64) {
        let len = match self.bars[index].map(|bar| bar.space) {
            Some(Space::Ports) => 4,
            _ => 8,
        };
        self.write((BAR0 + index * 4) as u16, &address.to_le_bytes()[..len]);
    }

    /// The 16-bit register at `offset`.
    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.registers[offset], self.registers[offset + 1]])
    }

    /// The 32-bit register at `offset`.
    pub fn dword(&self, offset: usize) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    /// Sets registers from the device's side, read-only bits too.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.registers[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}
