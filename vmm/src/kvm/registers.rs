//! The state in which a vCPU first runs: what any processor needs, and what each boot protocol wants.

use bedplate_api::vmm::MsrModifier;
use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::{KvmError, call};
use crate::boot::{Entry, start};

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, and memory that no range names is write-back.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// Offsets of the local vector table in the local APIC's page.
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVER_EXTINT: u32 = 7 << 8;
const DELIVER_NMI: u32 = 4 << 8;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 is always set.
const RFLAGS: u64 = 2;

/// State that is the same for every vCPU and every protocol.
pub(super) fn initialise(fd: &VcpuFd) -> Result<(), KvmError> {
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    fd.set_fpu(&fpu).map_err(call("set floating-point registers"))?;
    for (index, data) in [(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK)]
    {
        // A register that this KVM does not know stays as it is: the guest finds out from CPUID.
        fd.set_msrs(&one_msr(index, data)?).map_err(call("set model-specific registers"))?;
    }
    let mut lapic = fd.get_lapic().map_err(call("read a local interrupt controller"))?;
    for (offset, mode) in [(APIC_LVT0, DELIVER_EXTINT), (APIC_LVT1, DELIVER_NMI)] {
        for (register, byte) in lapic.regs[offset..offset + 4].iter_mut().zip(mode.to_le_bytes()) {
            *register = byte as _;
        }
    }
    fd.set_lapic(&lapic).map_err(call("set a local interrupt controller"))
}

/// Turns the local interrupt controller on or off. Off, it takes no message, also none that would start the processor.
pub(super) fn set_apic(fd: &VcpuFd, on: bool) -> Result<(), KvmError> {
    const ENABLE: u64 = 1 << 11;
    let mut sregs = fd.get_sregs().map_err(call("read system registers"))?;
    sregs.apic_base = if on { sregs.apic_base | ENABLE } else { sregs.apic_base & !ENABLE };
    fd.set_sregs(&sregs).map_err(call("set system registers"))
}

pub(super) fn one_msr(index: u32, data: u64) -> Result<Msrs, KvmError> {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[entry]).map_err(|e| KvmError::Call {
        what: "list a model-specific register",
        source: std::io::Error::other(format!("{e:?}")),
    })
}

/// Changes a model-specific register as a template says.
pub(super) fn modify(fd: &VcpuFd, modifier: &MsrModifier) -> Result<(), KvmError> {
    let addr = modifier.addr.0;
    let mut msr = one_msr(addr, 0)?;
    let read = fd.get_msrs(&mut msr).map_err(call("read a model-specific register"))?;
    let now = msr.as_slice().first().filter(|_| read == 1).ok_or(KvmError::NoMsr(addr))?.data;
    let value = modifier.bitmap.apply(now);
    // KVM says how many it took.
    match fd.set_msrs(&one_msr(addr, value)?).map_err(call("set a model-specific register"))? {
        1 => Ok(()),
        _ => Err(KvmError::MsrValue { addr, value }),
    }
}

/// The state of the first vCPU at its first instruction.
pub(super) fn apply(fd: &VcpuFd, entry: Entry) -> Result<(), KvmError> {
    let mut sregs = fd.get_sregs().map_err(call("read system registers"))?;
    let mut regs = kvm_regs { rflags: RFLAGS, ..Default::default() };
    match entry {
        Entry::Linux64 { rip, zero_page } => {
            long_mode(&mut sregs);
            (regs.rip, regs.rsi, regs.rsp) = (rip, zero_page, start::STACK);
        }
        Entry::Linux32 { rip, zero_page } => {
            protected_mode(&mut sregs);
            sregs.cs.selector = start::LINUX_CODE_SELECTOR;
            (regs.rip, regs.rsi) = (rip.into(), zero_page.into());
        }
        Entry::Pvh { rip, start_info } => {
            protected_mode(&mut sregs);
            (regs.rip, regs.rbx) = (rip.into(), start_info.into());
        }
        Entry::Real { address } => {
            (sregs.cs.base, sregs.cs.selector) = (0, 0);
            regs.rip = address.into();
        }
        // That is how KVM makes it.
        Entry::Reset => return Ok(()),
    }
    fd.set_sregs(&sregs).map_err(call("set system registers"))?;
    fd.set_regs(&regs).map_err(call("set registers"))
}

/// A segment as a descriptor of `start::GDT` says it.
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let flags = descriptor >> 40;
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    let granular = flags >> 15 & 1 == 1;
    kvm_segment {
        base: 0,
        limit: if granular { limit << 12 | 0xfff } else { limit },
        selector,
        type_: (flags & 0xf) as u8,
        s: (flags >> 4 & 1) as u8,
        dpl: (flags >> 5 & 3) as u8,
        present: (flags >> 7 & 1) as u8,
        l: (flags >> 13 & 1) as u8,
        db: (flags >> 14 & 1) as u8,
        g: u8::from(granular),
        ..Default::default()
    }
}

fn flat_segments(sregs: &mut kvm_sregs, code: usize) {
    let data = segment(start::DATA_SELECTOR, start::GDT[start::DATA]);
    // A task segment must be there and busy; nothing ever switches to it.
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, s: 0, ..Default::default() };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cs = segment((code * 8) as u16, start::GDT[code]);
    (sregs.gdt.base, sregs.gdt.limit) = (start::GDT_ADDRESS, (size_of_val(&start::GDT) - 1) as u16);
    // No entry of it is valid. Not empty: that is how a guest says later that it wants a reset.
    (sregs.idt.base, sregs.idt.limit) = (0, 0xffff);
}

fn long_mode(sregs: &mut kvm_sregs) {
    flat_segments(sregs, start::CODE_64);
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = start::PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

fn protected_mode(sregs: &mut kvm_sregs) {
    flat_segments(sregs, start::CODE_32);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
}
