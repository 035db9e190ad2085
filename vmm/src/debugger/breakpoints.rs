//! What a debugger wants the guest to stop at: instructions that are replaced in guest memory, and the processors'
//! breakpoint registers.

use std::collections::{BTreeMap, BTreeSet};

use bedplate_devices::Memory;
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::{HARDWARE_BREAKPOINTS, HardwareBreakpoint};

const INT3: u8 = 0xcc;

/// All of them. The guest stands still while they change.
pub(super) struct Breakpoints {
    memory: Memory,
    /// Guest-virtual address to guest-physical one. The same place may have several.
    wanted: BTreeMap<u64, u64>,
    /// What was there, by guest-physical address.
    replaced: BTreeMap<u64, u8>,
    registers: [Option<HardwareBreakpoint>; HARDWARE_BREAKPOINTS],
}

impl Breakpoints {
    pub fn new(memory: Memory) -> Self {
        Self { memory, wanted: BTreeMap::new(), replaced: BTreeMap::new(), registers: Default::default() }
    }

    /// Where the debugger's `int3` are.
    pub fn software(&self) -> BTreeSet<u64> {
        self.replaced.keys().copied().collect()
    }

    pub const fn hardware(&self) -> [Option<HardwareBreakpoint>; HARDWARE_BREAKPOINTS] {
        self.registers
    }

    /// Puts one at `address`, which is at `physical`; false where that is no RAM.
    pub fn add_software(&mut self, address: u64, physical: u64) -> bool {
        if !self.replaced.contains_key(&physical) {
            let mut before = [0];
            let there = self.memory.read_slice(&mut before, GuestAddress(physical));
            if there.and_then(|()| self.memory.write_slice(&[INT3], GuestAddress(physical))).is_err() {
                return false;
            }
            self.replaced.insert(physical, before[0]);
        }
        self.wanted.insert(address, physical);
        true
    }

    /// Takes one away; false where there is none.
    pub fn remove_software(&mut self, address: u64) -> bool {
        let Some(physical) = self.wanted.remove(&address) else { return false };
        if !self.wanted.values().any(|other| *other == physical) {
            self.restore(physical);
        }
        true
    }

    /// Puts back what was there, unless the guest has put something else there meanwhile.
    fn restore(&mut self, physical: u64) {
        let Some(before) = self.replaced.remove(&physical) else { return };
        let mut now = [0];
        if self.memory.read_slice(&mut now, GuestAddress(physical)).is_ok() && now == [INT3] {
            // What can be read can be written: it is RAM.
            let _ = self.memory.write_slice(&[before], GuestAddress(physical));
        }
    }

    /// False where all registers are in use.
    pub fn add_hardware(&mut self, breakpoint: HardwareBreakpoint) -> bool {
        match self.registers.iter_mut().find(|register| register.is_none()) {
            Some(free) => {
                *free = Some(breakpoint);
                true
            }
            None => false,
        }
    }

    /// False where there is none such.
    pub fn remove_hardware(&mut self, breakpoint: HardwareBreakpoint) -> bool {
        match self.registers.iter_mut().find(|register| **register == Some(breakpoint)) {
            Some(register) => {
                *register = None;
                true
            }
            None => false,
        }
    }

    /// Takes all away.
    pub fn clear(&mut self) {
        self.registers = Default::default();
        self.wanted.clear();
        for physical in self.software() {
            self.restore(physical);
        }
    }

    /// Reads memory as the guest has it; false where that is no RAM.
    pub fn read(&self, physical: u64, bytes: &mut [u8]) -> bool {
        let len = bytes.len() as u64;
        if self.memory.read_slice(bytes, GuestAddress(physical)).is_err() {
            return false;
        }
        for (at, before) in self.replaced.range(physical..physical.saturating_add(len)) {
            // Less than the length.
            bytes[(at - physical) as usize] = *before;
        }
        true
    }

    /// Writes memory, under the breakpoints in it; false where that is no RAM.
    pub fn write(&mut self, physical: u64, bytes: &[u8]) -> bool {
        let mut bytes = bytes.to_vec();
        let len = bytes.len() as u64;
        let place = GuestAddress(physical);
        if self.memory.read_slice(&mut vec![0; bytes.len()], place).is_err() {
            return false;
        }
        for (at, before) in self.replaced.range_mut(physical..physical.saturating_add(len)) {
            // Less than the length.
            *before = std::mem::replace(&mut bytes[(at - physical) as usize], INT3);
        }
        self.memory.write_slice(&bytes, place).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::On;
    use crate::memory::{Pages, Ram};

    #[test]
    fn a_breakpoint_is_not_seen_in_memory_and_leaves_nothing() {
        let memory = Ram::new(2, Pages::Normal).unwrap().memory;
        let raw = |at: u64| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        memory.write_slice(b"abcdef", GuestAddress(0x1000)).unwrap();
        let mut breakpoints = Breakpoints::new(memory.clone());
        assert!(breakpoints.add_software(0xffff_0000_0000_1002, 0x1002));
        assert!(breakpoints.add_software(0x1002, 0x1002) && !breakpoints.add_software(0, 1 << 40));
        assert_eq!(raw(0x1002), INT3);
        let mut seen = [0; 6];
        assert!(breakpoints.read(0x1000, &mut seen));
        assert_eq!(&seen, b"abcdef");
        assert!(breakpoints.write(0x1001, b"BCD") && !breakpoints.write((2 << 20) - 1, b"xx"));
        assert_eq!((raw(0x1001), raw(0x1002), raw(0x1003)), (b'B', INT3, b'D'));
        assert!(breakpoints.remove_software(0x1002) && !breakpoints.remove_software(0x1002));
        assert_eq!(raw(0x1002), INT3, "another address has it, too");
        assert!(breakpoints.remove_software(0xffff_0000_0000_1002));
        assert_eq!(raw(0x1002), b'C');
        // The guest may have written there.
        assert!(breakpoints.add_software(0x1000, 0x1000) && breakpoints.add_software(0x1004, 0x1004));
        memory.write_slice(b"!", GuestAddress(0x1000)).unwrap();
        breakpoints.clear();
        assert_eq!((raw(0x1000), raw(0x1004)), (b'!', b'e'));
        assert!(breakpoints.software().is_empty());
    }

    #[test]
    fn there_are_four_registers() {
        let mut breakpoints = Breakpoints::new(Ram::new(2, Pages::Normal).unwrap().memory);
        let at = |address| HardwareBreakpoint { address, len: 1, on: On::Execution };
        assert!((0..4).all(|address| breakpoints.add_hardware(at(address))) && !breakpoints.add_hardware(at(4)));
        assert!(breakpoints.remove_hardware(at(2)) && !breakpoints.remove_hardware(at(2)));
        assert!(breakpoints.add_hardware(at(4)));
    }
}
