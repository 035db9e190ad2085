//! The guest in the least loop that runs it.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{self, Access, BEGIN_PORT, CODE_ADDRESS, END_PORT, PORT};

const RAM: usize = 2 << 20;
/// Where Intel's processors have what they need for real mode, out of the guest's way.
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// How long the guest takes for `count` accesses.
pub fn run(access: Access, count: u64) -> Duration {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let code = guest::code(access, u32::try_from(count).unwrap());
    memory.write_slice(&code, GuestAddress(CODE_ADDRESS.into())).unwrap();
    let kvm = Kvm::new().unwrap();
    let vm = machine(&kvm, &memory);
    let mut vcpu = vcpu(&kvm, &vm);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    if access == Access::Notify {
        vm.register_ioevent(&event, &IoEventAddress::Pio(PORT.into()), NoDatamatch).unwrap();
    }
    let (seen, time) = dispatch(&mut vcpu);
    let seen = if access == Access::Notify { event.read().unwrap() } else { seen };
    assert_eq!(seen, count);
    time
}

/// The loop: returns how many bytes were written, and the time between the guest's marks.
fn dispatch(vcpu: &mut VcpuFd) -> (u64, Duration) {
    let (mut seen, mut begin) = (0, Instant::now());
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, data)) => seen += data.len() as u64,
            Ok(VcpuExit::MmioWrite(_, data)) => seen += data.len() as u64,
            Ok(VcpuExit::IoOut(BEGIN_PORT, _)) => begin = Instant::now(),
            Ok(VcpuExit::IoOut(END_PORT, _)) => return (seen, begin.elapsed()),
            Ok(exit) => panic!("unexpected exit: {exit:?}"),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => panic!("KVM cannot run the guest: {error}"),
        }
    }
}

fn machine(kvm: &Kvm, memory: &GuestMemoryMmap) -> VmFd {
    let vm = kvm.create_vm().unwrap();
    vm.set_identity_map_address(IDENTITY_MAP).unwrap();
    vm.set_tss_address((IDENTITY_MAP + 0x1000) as usize).unwrap();
    vm.create_irq_chip().unwrap();
    for region in memory.iter() {
        let slot = kvm_userspace_memory_region {
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the mapping is as long as that, and `run` drops it after the VM.
        unsafe { vm.set_user_memory_region(slot) }.unwrap();
    }
    vm
}

fn vcpu(kvm: &Kvm, vm: &VmFd) -> VcpuFd {
    let vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags) = (CODE_ADDRESS.into(), 2);
    vcpu.set_regs(&regs).unwrap();
    vcpu
}
