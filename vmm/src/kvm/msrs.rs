//! Model-specific registers: which a guest has, and what it gets that touches another one.

use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_UNKNOWN, KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE,
    KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_msr_filter, kvm_msr_filter_range,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::registers::one_msr;
use super::{KvmError, call};

ioctl_iow_nr!(KVM_X86_SET_MSR_FILTER, 0xae, 0xc6, kvm_msr_filter);

/// Registers that some guests touch without asking the processor first whether it has them, and that tell about a machine
/// which a VM is not. They read as zero and take writes silently; each of all others faults, as in a processor without it.
const HARMLESS: [(u32, u32); 10] = [
    // Intel: system management interrupts counted; clock modulation, thermal interrupts and status; temperature target;
    // power management; residency in core and package states; energy counters and their units.
    (0x34, 0x34),
    (0x19a, 0x19c),
    (0x1a2, 0x1a2),
    (0x1aa, 0x1aa),
    (0x1fc, 0x1fc),
    (0x3f8, 0x3fe),
    (0x606, 0x641),
    // AMD: C1E's message; P-states; energy counters and their units.
    (0xc001_0055, 0xc001_0055),
    (0xc001_0061, 0xc001_006b),
    (0xc001_0299, 0xc001_029b),
];

/// Whether a guest that touches `register` goes on.
pub(super) fn is_harmless(register: u32) -> bool {
    HARMLESS.iter().any(|(first, last)| (*first..=*last).contains(&register))
}

/// What a guest with a baseline can reach, first and last: what KVM has on every host of the vendor, with the same answers,
/// and what it refuses by itself where the baseline's `CPUID` does not tell of it. KVM answers to more, and to more with
/// each version, whatever `CPUID` says.
const ALLOWED: [(u32, u32); 47] = [
    // Time stamp, KVM's clock by its old numbers, platform id, local APIC, features that firmware enables, adjustment.
    (0x10, 0x12),
    (0x17, 0x17),
    (0x1b, 0x1b),
    (0x2a, 0x2a),
    (0x2c, 0x2c),
    (0x3a, 0x3b),
    // Speculation: by `CPUID`, as 0x10a and 0x10b, and 0xc001011f.
    (0x48, 0x49),
    // Microcode: its version is KVM's own.
    (0x79, 0x79),
    (0x8b, 0x8b),
    (0xcd, 0xce),
    (0xfe, 0xfe),
    (0x10a, 0x10b),
    (0x119, 0x119),
    (0x140, 0x140),
    // System calls; machine checks.
    (0x174, 0x176),
    (0x179, 0x17b),
    (0x198, 0x199),
    (0x1a0, 0x1a0),
    (0x1d9, 0x1d9),
    (0x1db, 0x1de),
    // Kinds of memory.
    (0x200, 0x20f),
    (0x250, 0x250),
    (0x258, 0x259),
    (0x268, 0x26f),
    (0x277, 0x277),
    (0x2ff, 0x2ff),
    // Machine checks, by bank.
    (0x400, 0x47f),
    // The local timer; the local APIC, which no filter is asked for.
    (0x6e0, 0x6e0),
    (0x800, 0x8ff),
    // Supervisor state of `XSAVES`, by `CPUID`.
    (0xda0, 0xda0),
    // KVM's own, by its `CPUID`.
    (0x4b56_4d00, 0x4b56_4d07),
    // 64-bit mode, system calls, segments, processor number.
    (0xc000_0080, 0xc000_0084),
    (0xc000_0100, 0xc000_0103),
    // AMD: configuration, of which KVM keeps some bits and answers zero for the rest.
    (0xc001_0010, 0xc001_0010),
    (0xc001_0015, 0xc001_0015),
    (0xc001_001a, 0xc001_001a),
    (0xc001_001d, 0xc001_001d),
    (0xc001_001f, 0xc001_0020),
    (0xc001_0055, 0xc001_0055),
    (0xc001_0058, 0xc001_0058),
    (0xc001_0112, 0xc001_0112),
    (0xc001_0114, 0xc001_0114),
    (0xc001_011f, 0xc001_011f),
    (0xc001_1020, 0xc001_1020),
    (0xc001_1022, 0xc001_1022),
    (0xc001_1029, 0xc001_1029),
    (0xc001_102a, 0xc001_102a),
];

/// Where the bits of a filter begin, and how many there are: multiples of 64, and at most 12288.
const RANGES: [(u32, u32); 4] = [(0, 0x1000), (0x4b56_4d00, 64), (0xc000_0000, 0x200), (0xc001_0000, 0x1100)];

fn is_allowed(register: u32) -> bool {
    ALLOWED.iter().any(|(first, last)| (*first..=*last).contains(&register))
}

/// A bit for each register of a range.
fn bitmap((base, count): (u32, u32)) -> Vec<u8> {
    let byte = |at: u32| (0..8).fold(0, |byte, bit| byte | u8::from(is_allowed(base + 8 * at + bit)) << bit);
    (0..count / 8).map(byte).collect()
}

/// The guest reaches what is on the list, and nothing else: for a VM with a baseline. An access to another register is an
/// exit, as that to one that KVM does not have.
pub(super) fn allow_only_listed(vm: &VmFd) -> Result<(), KvmError> {
    let mut bitmaps = RANGES.map(bitmap);
    let mut filter = kvm_msr_filter { flags: KVM_MSR_FILTER_DEFAULT_DENY, ..Default::default() };
    for ((range, bits), (base, nmsrs)) in filter.ranges.iter_mut().zip(&mut bitmaps).zip(RANGES) {
        let flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;
        *range = kvm_msr_filter_range { flags, nmsrs, base, bitmap: bits.as_mut_ptr() };
    }
    // SAFETY: the kernel reads `filter` and the bitmaps that it names, each of as many bits as it says, during the call;
    // all of them live until it returns. Ranges that are left are empty.
    let done = unsafe { ioctl_with_ref(vm, KVM_X86_SET_MSR_FILTER(), &filter) };
    if done == 0 {
        return Ok(());
    }
    Err(KvmError::Call { what: "filter model-specific registers", source: std::io::Error::last_os_error() })
}

/// A vCPU's registers are as its `CPUID` tells: KVM's own exist only where its leaf has them, and what a processor says of
/// its faults it does not say where the bit for that is hidden, also not by what else there is.
pub(super) fn go_with_cpuid(vcpu: &VcpuFd) -> Result<(), KvmError> {
    const ARCH_CAPABILITIES: u32 = 0x10a;
    let enforce = kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, args: [1, 0, 0, 0], ..Default::default() };
    vcpu.enable_cap(&enforce).map_err(call("refuse its own features that are hidden"))?;
    // Of one that KVM does not know on this host nothing is told either.
    vcpu.set_msrs(&one_msr(ARCH_CAPABILITIES, 0)?).map_err(call("set model-specific registers")).map(drop)
}

/// Performance counters are the host's, and tell much about it. Before Linux 5.18 only `CPUID` hides them.
pub(super) fn disable_counters(vm: &VmFd) {
    let args = [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0];
    let _ = vm.enable_cap(&kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, args, ..Default::default() });
}

/// Asks for an exit wherever the guest touches a register that KVM does not have, or that a filter keeps from it. Without
/// it, before Linux 5.10, each of them faults and is not counted.
pub(super) fn ask_for_exits(vm: &VmFd) {
    let args = [(KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER).into(), 0, 0, 0];
    let _ = vm.enable_cap(&kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, args, ..Default::default() });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_could_rely_on_faults() {
        // Zero would be a lie in each of these: they are KVM's to answer.
        let telling = [0x10, 0x1b, 0x3a, 0x8b, 0xce, 0x174, 0x1a0, 0x277, 0xc000_0080, 0xc001_0015, 0x4b56_4d00];
        assert!(telling.into_iter().all(|register| !is_harmless(register)));
        assert!(is_harmless(0x19c) && is_harmless(0xc001_0064) && !is_harmless(0xffff_ffff));
        assert!(HARMLESS.iter().all(|(first, last)| first <= last));
    }

    #[test]
    fn the_filter_has_each_register_of_the_list_and_no_other() {
        let mut bits = Vec::new();
        for (base, count) in RANGES {
            assert!(count % 64 == 0 && count <= 8 * kvm_bindings::KVM_MSR_FILTER_MAX_BITMAP_SIZE, "{base:#x}");
            let bitmap = bitmap((base, count));
            bits.extend((0..count).filter(|at| bitmap[*at as usize / 8] >> (at % 8) & 1 == 1).map(|at| base + at));
        }
        let listed: Vec<_> = ALLOWED.into_iter().flat_map(|(first, last)| first..=last).collect();
        bits.sort_unstable();
        assert_eq!(bits, {
            let mut listed = listed;
            listed.sort_unstable();
            listed
        });
        // Counters; a count of interrupts; what VMX can do; how often AMD's clock runs.
        assert!([0x345, 0xc1, 0x34, 0x480, 0xc000_0104, 0xc001_0000].into_iter().all(|register| !is_allowed(register)));
    }
}
