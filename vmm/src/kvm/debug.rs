//! What a debugger wants a vCPU to stop at; and of what it stops at, what is the debugger's and what the guest's own.

use std::collections::BTreeSet;

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug, kvm_guest_debug_arch,
};

use super::{KvmError, Vcpu, call};

/// Breakpoint registers of a processor.
pub const HARDWARE_BREAKPOINTS: usize = 4;

const DEBUG_EXCEPTION: u32 = 1;
const BREAKPOINT_EXCEPTION: u32 = 3;

/// What a debugger wants of one vCPU; by default, nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Debug {
    /// To stop after one instruction. No interrupt comes before it where the host's KVM can hold them back (Linux 5.15).
    pub step: bool,
    /// Guest-physical addresses where the debugger has put an `int3`.
    pub software: BTreeSet<u64>,
    /// For the processor's breakpoint registers, which the guest's own are not in meanwhile.
    pub hardware: [Option<HardwareBreakpoint>; HARDWARE_BREAKPOINTS],
}

/// One breakpoint register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HardwareBreakpoint {
    /// Guest-virtual.
    pub address: u64,
    /// 1, 2, 4 or 8, and the address a multiple of it; 1 for execution.
    pub len: u64,
    /// At what.
    pub on: On,
}

/// What a breakpoint register stops at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum On {
    Execution,
    Write,
    /// Processors have none for reads only.
    ReadOrWrite,
}

/// A debug exit, as KVM tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DebugExit {
    /// The exception's number.
    pub exception: u32,
    /// Guest-virtual address of the instruction.
    pub pc: u64,
    /// Debug status register.
    pub dr6: u64,
}

/// Something that the debugger has asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trap {
    /// The instruction is done.
    Step,
    /// At an `int3` of the debugger's.
    Software,
    /// By a breakpoint register: before an instruction, or after the access to data.
    Hardware(HardwareBreakpoint),
}

impl Debug {
    fn control(&self, able: u32) -> u32 {
        let mut control = 0;
        if self.step {
            control |= KVM_GUESTDBG_SINGLESTEP | able & KVM_GUESTDBG_BLOCKIRQ;
        }
        if !self.software.is_empty() {
            control |= KVM_GUESTDBG_USE_SW_BP;
        }
        if self.hardware.iter().any(Option::is_some) {
            control |= KVM_GUESTDBG_USE_HW_BP;
        }
        if control == 0 { 0 } else { control | KVM_GUESTDBG_ENABLE }
    }

    /// The processor's debug registers 0 to 7.
    fn registers(&self) -> [u64; 8] {
        /// Always set.
        const DR7: u64 = 1 << 10;
        let mut registers = [0, 0, 0, 0, 0, 0, 0, DR7];
        for (slot, breakpoint) in self.hardware.iter().enumerate() {
            let Some(breakpoint) = breakpoint else { continue };
            registers[slot] = breakpoint.address;
            let on: u64 = match breakpoint.on {
                On::Execution => 0,
                On::Write => 1,
                On::ReadOrWrite => 3,
            };
            let len: u64 = match breakpoint.len {
                2 => 1,
                4 => 3,
                8 => 2,
                _ => 0,
            };
            registers[7] |= 2 << (slot * 2) | (on | len << 2) << (16 + slot * 4);
        }
        registers
    }
}

impl Vcpu {
    /// From the next run on it stops at these, and at nothing else.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_debug(&mut self, debug: Debug) -> Result<(), KvmError> {
        self.debug = debug;
        self.debug_with(0)
    }

    fn debug_with(&self, inject: u32) -> Result<(), KvmError> {
        let arch = kvm_guest_debug_arch { debugreg: self.debug.registers() };
        let control = self.debug.control(self.debug_flags) | inject;
        self.fd.set_guest_debug(&kvm_guest_debug { control, pad: 0, arch }).map_err(call("debug a vCPU"))
    }

    /// Whose a debug exit is. What the debugger has not asked for is given to the guest, and is nothing to it.
    ///
    /// # Errors
    /// KVM refuses to give it to the guest.
    pub fn sort_out(&mut self, exit: DebugExit) -> Result<Option<Trap>, KvmError> {
        if exit.exception == BREAKPOINT_EXCEPTION {
            // By physical address: what the debugger has put into a page is in each mapping of it.
            if self.translate(exit.pc)?.is_some_and(|at| self.debug.software.contains(&at)) {
                return Ok(Some(Trap::Software));
            }
            self.debug_with(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_INJECT_BP)?;
            return Ok(None);
        }
        if exit.exception != DEBUG_EXCEPTION {
            return Ok(None);
        }
        let slots = self.debug.hardware.iter().enumerate();
        let hit = slots.filter(|(slot, _)| exit.dr6 >> slot & 1 == 1).find_map(|(_, breakpoint)| *breakpoint);
        if let Some(breakpoint) = hit {
            return Ok(Some(Trap::Hardware(breakpoint)));
        }
        if self.debug.step {
            return Ok(Some(Trap::Step));
        }
        // The guest steps something of its own, or has a debug register that ours are in the place of.
        let mut registers = self.fd.get_debug_regs().map_err(call("read the debug registers of a vCPU"))?;
        registers.dr6 |= exit.dr6;
        self.fd.set_debug_regs(&registers).map_err(call("set the debug registers of a vCPU"))?;
        self.debug_with(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_INJECT_DB)?;
        Ok(None)
    }

    /// The guest-physical address behind a guest-virtual one, as the vCPU's page tables are now.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn translate(&self, address: u64) -> Result<Option<u64>, KvmError> {
        let found = self.fd.translate_gva(address).map_err(call("translate an address of the guest"))?;
        Ok((found.valid != 0).then_some(found.physical_address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breakpoint_registers_are_as_the_processor_wants_them() {
        let mut debug = Debug::default();
        assert_eq!(debug.control(u32::MAX), 0);
        debug.hardware[0] = Some(HardwareBreakpoint { address: 0x1000, len: 1, on: On::Execution });
        debug.hardware[3] = Some(HardwareBreakpoint { address: 0x2000, len: 8, on: On::Write });
        assert_eq!(debug.registers(), [0x1000, 0, 0, 0x2000, 0, 0, 0, 0x9000_0482]);
        assert_eq!(debug.control(u32::MAX), KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP);
        debug.step = true;
        assert_eq!(debug.control(0) & (KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ), KVM_GUESTDBG_SINGLESTEP);
        assert_ne!(debug.control(u32::MAX) & KVM_GUESTDBG_BLOCKIRQ, 0);
    }
}
