//! Registers in the order in which a debugger gets them, and the document that tells it the order.

use std::sync::LazyLock;

use gdbstub::arch::Arch;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use kvm_bindings::{kvm_regs, kvm_segment};

use crate::kvm::VcpuState;

/// x86-64 with SSE, as `gdb` has it, and what a kernel's developer wants to see beside that.
pub enum X86_64 {}

/// The core registers, and [`SYSTEM`].
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Registers {
    core: X86_64CoreRegs,
    system: [u64; SYSTEM.len()],
}

/// What there is beside the core registers, 64 bits each. The first two are `gdb`'s own idea, and it names them.
const SYSTEM: [&str; 7] = ["fs_base", "gs_base", "cr0", "cr2", "cr3", "cr4", "efer"];
const SEGMENT_BASES: usize = 2;

const CR0_PE: u64 = 1;
const SELECTORS: [&str; 6] = ["cs", "ss", "ds", "es", "fs", "gs"];

impl Arch for X86_64 {
    type Usize = u64;
    type Registers = Registers;
    type RegId = ();
    type BreakpointKind = usize;

    fn target_description_xml() -> Option<&'static str> {
        static DESCRIPTION: LazyLock<String> = LazyLock::new(description);
        Some(&DESCRIPTION)
    }
}

impl gdbstub::arch::Registers for Registers {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.core.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.core.gdb_serialize(&mut write_byte);
        self.system.iter().flat_map(|value| value.to_le_bytes()).for_each(|byte| write_byte(Some(byte)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        let (core, system) = bytes.split_last_chunk::<{ SYSTEM.len() * 8 }>().ok_or(())?;
        self.core.gdb_deserialize(core)?;
        for (value, bytes) in self.system.iter_mut().zip(system.as_chunks().0) {
            *value = u64::from_le_bytes(*bytes);
        }
        Ok(())
    }
}

/// A debugger wants what cannot be.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused;

impl Registers {
    /// Those of a vCPU.
    pub fn of(state: &VcpuState) -> Self {
        let VcpuState { mut regs, mut sregs, fpu } = *state;
        let mut core = X86_64CoreRegs { regs: general(&mut regs).map(|reg| *reg), rip: regs.rip, ..Default::default() };
        // The upper half is reserved.
        core.eflags = regs.rflags as u32;
        for (to, from) in selectors(&mut core).into_iter().zip(segments(&mut sregs)) {
            *to = from.selector.into();
        }
        for (to, from) in core.st.iter_mut().zip(&fpu.fpr) {
            to.copy_from_slice(&from[..10]);
        }
        (core.fpu.fctrl, core.fpu.fstat, core.fpu.fop) = (fpu.fcw.into(), fpu.fsw.into(), fpu.last_opcode.into());
        // One bit for each that is not empty; a debugger has two, 3 for empty.
        core.fpu.ftag = (0..8).filter(|bit| fpu.ftwx >> bit & 1 == 0).map(|bit| 3 << (bit * 2)).sum();
        // Pointers are split.
        (core.fpu.fioff, core.fpu.fiseg) = (fpu.last_ip as u32, (fpu.last_ip >> 32) as u32);
        (core.fpu.fooff, core.fpu.foseg) = (fpu.last_dp as u32, (fpu.last_dp >> 32) as u32);
        core.xmm = fpu.xmm.map(u128::from_le_bytes);
        core.mxcsr = fpu.mxcsr;
        let system = [sregs.fs.base, sregs.gs.base, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer];
        Self { core, system }
    }

    /// Makes `state` what these say.
    ///
    /// # Errors
    /// A selector is to change in protected mode, where it is more than its number.
    pub fn put(&self, state: &mut VcpuState) -> Result<(), Refused> {
        let VcpuState { regs, sregs, fpu } = state;
        for (to, from) in general(regs).into_iter().zip(self.core.regs) {
            *to = from;
        }
        regs.rip = self.core.rip;
        regs.rflags = regs.rflags & !u64::from(u32::MAX) | u64::from(self.core.eflags);
        let real_mode = sregs.cr0 & CR0_PE == 0;
        for (to, from) in segments(sregs).into_iter().zip(selectors(&mut self.core.clone())) {
            let selector = u16::try_from(*from).map_err(|_| Refused)?;
            if selector != to.selector {
                if !real_mode {
                    return Err(Refused);
                }
                (to.selector, to.base) = (selector, u64::from(selector) << 4);
            }
        }
        for (to, from) in fpu.fpr.iter_mut().zip(&self.core.st) {
            to[..10].copy_from_slice(from);
        }
        let of = &self.core.fpu;
        // Their upper halves mean nothing.
        (fpu.fcw, fpu.fsw, fpu.last_opcode) = (of.fctrl as u16, of.fstat as u16, of.fop as u16);
        fpu.ftwx = (0..8).filter(|bit| of.ftag >> (bit * 2) & 3 != 3).map(|bit| 1u8 << bit).sum();
        fpu.last_ip = u64::from(of.fiseg) << 32 | u64::from(of.fioff);
        fpu.last_dp = u64::from(of.foseg) << 32 | u64::from(of.fooff);
        fpu.xmm = self.core.xmm.map(u128::to_le_bytes);
        fpu.mxcsr = self.core.mxcsr;
        [sregs.fs.base, sregs.gs.base, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer] = self.system;
        Ok(())
    }
}

/// In `gdb`'s order.
fn general(regs: &mut kvm_regs) -> [&mut u64; 16] {
    [
        &mut regs.rax,
        &mut regs.rbx,
        &mut regs.rcx,
        &mut regs.rdx,
        &mut regs.rsi,
        &mut regs.rdi,
        &mut regs.rbp,
        &mut regs.rsp,
        &mut regs.r8,
        &mut regs.r9,
        &mut regs.r10,
        &mut regs.r11,
        &mut regs.r12,
        &mut regs.r13,
        &mut regs.r14,
        &mut regs.r15,
    ]
}

/// In the order of [`SELECTORS`].
fn segments(sregs: &mut kvm_bindings::kvm_sregs) -> [&mut kvm_segment; 6] {
    [&mut sregs.cs, &mut sregs.ss, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs]
}

/// Likewise.
fn selectors(core: &mut X86_64CoreRegs) -> [&mut u32; 6] {
    let of = &mut core.segments;
    [&mut of.cs, &mut of.ss, &mut of.ds, &mut of.es, &mut of.fs, &mut of.gs]
}

/// `gdb` knows the features and the names in them; what it does not know it shows as it is.
fn description() -> String {
    const FLAGS: [(&str, u8); 12] = [
        ("CF", 0),
        ("PF", 2),
        ("AF", 4),
        ("ZF", 6),
        ("SF", 7),
        ("TF", 8),
        ("IF", 9),
        ("DF", 10),
        ("OF", 11),
        ("NT", 14),
        ("RF", 16),
        ("AC", 18),
    ];
    const VECTORS: [(&str, &str, u8); 6] = [
        ("v4_float", "ieee_single", 4),
        ("v2_double", "ieee_double", 2),
        ("v16_int8", "int8", 16),
        ("v8_int16", "int16", 8),
        ("v4_int32", "int32", 4),
        ("v2_int64", "int64", 2),
    ];
    let reg = |name: &str, bits: u8, kind: &str| format!(r#"<reg name="{name}" bitsize="{bits}" type="{kind}"/>"#);
    let mut text = String::from(
        r#"<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0"><architecture>i386:x86-64</architecture>"#,
    );
    text += r#"<feature name="org.gnu.gdb.i386.core"><flags id="i386_eflags" size="4">"#;
    for (name, bit) in FLAGS {
        text += &format!(r#"<field name="{name}" start="{bit}" end="{bit}"/>"#);
    }
    text += "</flags>";
    for name in ["rax", "rbx", "rcx", "rdx", "rsi", "rdi"] {
        text += &reg(name, 64, "int64");
    }
    text += &(reg("rbp", 64, "data_ptr") + &reg("rsp", 64, "data_ptr"));
    text.extend((8..16).map(|number| reg(&format!("r{number}"), 64, "int64")));
    text += &(reg("rip", 64, "code_ptr") + &reg("eflags", 32, "i386_eflags"));
    text.extend(SELECTORS.map(|name| reg(name, 32, "int32")));
    text.extend((0..8).map(|number| reg(&format!("st{number}"), 80, "i387_ext")));
    for name in ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"] {
        text += &format!(r#"<reg name="{name}" bitsize="32" type="int" group="float"/>"#);
    }
    text += r#"</feature><feature name="org.gnu.gdb.i386.sse">"#;
    for (name, kind, count) in VECTORS {
        text += &format!(r#"<vector id="{name}" type="{kind}" count="{count}"/>"#);
    }
    text += r#"<union id="vec128">"#;
    for (name, ..) in VECTORS {
        text += &format!(r#"<field name="{name}" type="{name}"/>"#);
    }
    text += r#"<field name="uint128" type="uint128"/></union>"#;
    text.extend((0..16).map(|number| reg(&format!("xmm{number}"), 128, "vec128")));
    text += &reg("mxcsr", 32, "int");
    text += r#"</feature><feature name="org.gnu.gdb.i386.segments">"#;
    text.extend(SYSTEM[..SEGMENT_BASES].iter().map(|name| reg(name, 64, "int64")));
    text += r#"</feature><feature name="bedplate.system">"#;
    text.extend(SYSTEM[SEGMENT_BASES..].iter().map(|name| reg(name, 64, "int64")));
    text += "</feature></target>";
    text
}

#[cfg(test)]
mod tests {
    use gdbstub::arch::Registers as _;

    use super::*;

    fn state() -> VcpuState {
        let mut state = VcpuState::default();
        for (number, reg) in general(&mut state.regs).into_iter().enumerate() {
            *reg = 0x1111_2222_3333_0000 + number as u64;
        }
        (state.regs.rip, state.regs.rflags) = (0xffff_ffff_8100_0000, 0x246);
        for (number, segment) in segments(&mut state.sregs).into_iter().enumerate() {
            segment.selector = number as u16 * 8;
        }
        (state.sregs.cr0, state.sregs.gs.base) = (0x8005_0033, 0xffff_8880_0000_0000);
        (state.fpu.ftwx, state.fpu.mxcsr, state.fpu.last_ip) = (0b1000_0001, 0x1f80, 0x0012_3456_7890);
        state.fpu.xmm[15] = [7; 16];
        state
    }

    #[test]
    fn registers_go_to_the_debugger_and_back() {
        let state = state();
        let mut bytes = Vec::new();
        Registers::of(&state).gdb_serialize(|byte| bytes.push(byte.unwrap()));
        assert_eq!(&bytes[128..136], 0xffff_ffff_8100_0000u64.to_le_bytes());
        // As many as the description names.
        let xml = X86_64::target_description_xml().unwrap();
        let bits: usize =
            xml.split("bitsize=\"").skip(1).map(|rest| rest.split_once('"').unwrap().0.parse::<usize>().unwrap()).sum();
        assert_eq!(bytes.len(), bits / 8);
        let mut registers = Registers::default();
        registers.gdb_deserialize(&bytes).unwrap();
        let mut back = state;
        registers.put(&mut back).unwrap();
        assert_eq!(back, state);
        assert!(registers.gdb_deserialize(&bytes[..20]).is_err() && registers.gdb_deserialize(&bytes[..100]).is_err());
    }

    #[test]
    fn a_selector_is_a_number_in_real_mode_only() {
        let mut state = state();
        let mut registers = Registers::of(&state);
        registers.core.segments.ds = 0x1234;
        assert_eq!(registers.put(&mut state), Err(Refused));
        state.sregs.cr0 &= !CR0_PE;
        registers.put(&mut state).unwrap();
        assert_eq!((state.sregs.ds.selector, state.sregs.ds.base), (0x1234, 0x1_2340));
        registers.core.segments.ds = 0x1_0000;
        assert_eq!(registers.put(&mut state), Err(Refused));
    }
}
