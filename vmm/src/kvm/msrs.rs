//! Model-specific registers that KVM does not have: what a guest gets that touches them.

use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN, kvm_enable_cap};
use kvm_ioctls::VmFd;

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

/// Asks for an exit wherever the guest touches a register that KVM does not have. Without it, before Linux 5.10, each of
/// them faults and is not counted.
pub(super) fn ask_for_exits(vm: &VmFd) {
    let args = [KVM_MSR_EXIT_REASON_UNKNOWN.into(), 0, 0, 0];
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
}
