//! The least that a VMM can be: a loop over `KVM_RUN`, to compare with.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::exits::{Times, times};
use crate::guests::{BASE, ENTRY, WAYS};

const RAM: usize = 4 << 20;
/// Where Intel's processors have what they need for real mode, out of the guest's way.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const SERIAL: u16 = 0x3f8;

/// Runs the guest of exits to its last word.
pub fn run(kernel: &[u8]) -> Result<Times> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM)])?;
    memory.write_slice(kernel, GuestAddress(BASE.into()))?;
    let kvm = Kvm::new().context("open /dev/kvm")?;
    let vm = machine(&kvm, &memory)?;
    let mut vcpu = vcpu(&kvm, &vm)?;
    let mut marks = Vec::new();
    while marks.len() < WAYS.len() {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(SERIAL, b"\n")) => marks.push(Instant::now()),
            Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..)) => {}
            Ok(VcpuExit::MmioRead(_, data)) => data.fill(0xff),
            Ok(exit) => bail!("the bare loop's guest did what it should not: {exit:?}"),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => bail!("KVM cannot run the bare loop's guest: {error}"),
        }
    }
    Ok(times([marks[0], marks[1], marks[2], marks[3]]))
}

fn machine(kvm: &Kvm, memory: &GuestMemoryMmap<()>) -> Result<VmFd> {
    let vm = kvm.create_vm()?;
    vm.set_identity_map_address(IDENTITY_MAP)?;
    vm.set_tss_address((IDENTITY_MAP + 0x1000) as usize)?;
    vm.create_irq_chip()?;
    for region in memory.iter() {
        let slot = kvm_userspace_memory_region {
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the mapping is as long as that, and `run` drops it after the VM.
        unsafe { vm.set_user_memory_region(slot) }?;
    }
    Ok(vm)
}

/// In 32-bit protected mode, as PVH has it.
fn vcpu(kvm: &Kvm, vm: &VmFd) -> Result<VcpuFd> {
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.get_sregs()?;
    let flat = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(8, 0xb);
    [sregs.ds, sregs.es, sregs.ss] = [flat(16, 3); 3];
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (ENTRY.into(), 2);
    vcpu.set_regs(&regs)?;
    Ok(vcpu)
}
